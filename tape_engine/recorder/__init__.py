"""The recorder: the one place where the engine listens to torch.

Three doors lead onto a tape, and behind each the same function (`writing.write`) makes the node:

- a **named operation** (``te.lin(X, w, b)``) records itself, on the current tape;
- inside ``with te.record():`` a dispatch mode hears **every torch operation** of the thread. It stands
  below torch's own autograd and composites: what it hears are ATen overloads. What programs do most is heard
  above all that as well, by a function mode, and takes a shorter way there (`shortcut`);
- outside such a block a recorded tensor is a `Recorded`: torch's tensor under another class name, which
  sends the **plain torch operations** applied to it through the same mode onto the global tape, so
  that none of them cuts a gradient in silence.

An in-place write is recorded as what it computes: ``x.add_(y)`` is ``add(x, y)``, whose output `x` holds
from then on. `aliases` follows the other tensors that look into the same storage.
"""

from __future__ import annotations

from . import copies as copies
from . import elsewhere as elsewhere
from .asked import updated
from .called import CalledBack, called_again, freezing
from .contexts import leaves_of
from .doors import pause, record, scope, stop_gradient
from .functions import FunctionOp
from .layouts import demand
from .listening import Recorded, forget_leaves, listen_to, rest_leaves
from .mode import quietly, recording
from .state import (
    IN_TURN,
    MOVED,
    ONCE,
    OUTSIDE,
    OVERLAPPED,
    PARTED,
    RESHAPED,
    SWEEP,
    SWEPT,
    UNFOLLOWED,
    UNKNOWN,
    UNSEEN,
    current_tape_is_global,
    detaching,
    is_quiet,
    opened,
)
from .strict import rule_to_add
from .writing import ALIAS, read, settle

__all__ = [
    "ALIAS",
    "IN_TURN",
    "MOVED",
    "ONCE",
    "OUTSIDE",
    "OVERLAPPED",
    "PARTED",
    "RESHAPED",
    "SWEEP",
    "SWEPT",
    "UNFOLLOWED",
    "UNKNOWN",
    "UNSEEN",
    "CalledBack",
    "FunctionOp",
    "Recorded",
    "called_again",
    "current_tape_is_global",
    "demand",
    "detaching",
    "forget_leaves",
    "freezing",
    "is_quiet",
    "leaves_of",
    "listen_to",
    "opened",
    "pause",
    "quietly",
    "read",
    "record",
    "recording",
    "rest_leaves",
    "rule_to_add",
    "scope",
    "settle",
    "stop_gradient",
    "updated",
]
