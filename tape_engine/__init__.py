"""A tape-based computation-graph engine for PyTorch tensors.

Forward operations record nodes on a tape, a reverse sweep walks it back and leaves ``.g`` on every
tensor, and a tape can be replayed on new inputs. `ops` is the page to begin with::

    import tape_engine as te

    Z = te.lin(X, w, b)
    U = te.relu(Z)
    C = te.mse(U, Y)
    te.backward(C)          # X.g, w.g, b.g, Z.g, U.g
"""

from __future__ import annotations

from . import listing, rules  # noqa: F401 - what registers itself: print(tape), the gradient rules of torch
from .bridge import fill_grad
from .checks import check, check_rule
from .errors import (
    BackendError,
    DTypeError,
    GuardError,
    InputError,
    LoadError,
    MissingRuleError,
    NotRecordedError,
    OverwrittenError,
    PathError,
    RuleError,
    SaveError,
    ShapeError,
    SweptError,
    TapeError,
    TapeWarning,
)
from .ops import lin, mse, relu
from .program import Program, load, replayable
from .recorder import pause, record, scope, stop_gradient
from .registry import op, rule, sample, spec
from .sweep import backward, grad
from .tape import Node, Tape, Value, current_tape, global_tape

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DTypeError",
    "GuardError",
    "InputError",
    "LoadError",
    "MissingRuleError",
    "Node",
    "NotRecordedError",
    "OverwrittenError",
    "PathError",
    "Program",
    "RuleError",
    "SaveError",
    "ShapeError",
    "SweptError",
    "Tape",
    "TapeError",
    "TapeWarning",
    "Value",
    "backward",
    "check",
    "check_rule",
    "current_tape",
    "fill_grad",
    "global_tape",
    "grad",
    "lin",
    "load",
    "mse",
    "op",
    "pause",
    "record",
    "relu",
    "replayable",
    "rule",
    "sample",
    "scope",
    "spec",
    "stop_gradient",
]
