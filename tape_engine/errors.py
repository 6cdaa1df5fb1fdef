"""Every exception class of the engine, and the one form that their text takes.

A message answers four questions, in this order: what is wrong, on which line of the user's own code,
with which operands (by the user's own names, with their shapes), and what would put it right::

    lin: the last dimension of X, 784, is not the first of w, 785.
      at train.py:12    Z = te.lin(X, w, b)
      X    (64, 784)  float32
      w    (785, 1)   float32
      fix: make w of shape (784, 1)

Each class derives from `TapeError` and from the builtin exception that it specialises, so that code
which already catches the builtin keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BackendError",
    "DTypeError",
    "DataError",
    "GuardError",
    "InputError",
    "LoadError",
    "MissingRuleError",
    "NotRecordedError",
    "OverwrittenError",
    "PathError",
    "RuleError",
    "SaveError",
    "ShapeError",
    "SweptError",
    "TapeError",
    "TapeWarning",
    "message",
]


class TapeError(Exception):
    """Base class of every error that a user of the engine can cause."""


class TapeWarning(UserWarning):
    """Something legal that is probably not meant: a value that leaves the recording's sight."""


class ShapeError(TapeError, ValueError):
    """Shapes that do not fit each other, or the operation they were given to."""


class DTypeError(TapeError, TypeError):
    """A value of a dtype (or of a Python type) that the call cannot take."""


class InputError(ShapeError, TypeError):
    """Inputs of a replay that differ from the recorded ones in shape, dtype, device or number."""


class NotRecordedError(TapeError, ValueError):
    """A tensor that no tape knows was given where a recorded value is needed."""


class MissingRuleError(TapeError, NotImplementedError):
    """An operation without a registered gradient rule, where one is needed."""


class RuleError(TapeError, RuntimeError):
    """A gradient rule that raised, or returned gradients that do not fit its arguments."""


class OverwrittenError(TapeError, RuntimeError):
    """A value that a gradient rule needs was changed by a write that the recorder could not see."""


class SweptError(TapeError, RuntimeError):
    """A gradient would have to pass into a tape that was already swept and closed."""


class GuardError(TapeError, RuntimeError):
    """A decision of the recorded code comes out differently on the inputs of a replay."""


class BackendError(TapeError, ValueError):
    """A backend that there is not, or that cannot run a tape."""


class LoadError(TapeError, ValueError):
    """A program file that is damaged, truncated or hostile."""


class SaveError(TapeError, ValueError):
    """A program that a file cannot hold: it runs Python code, or was given things that are no data."""


class PathError(TapeError, OSError):
    """A file that cannot be written, or is not there to be read."""


class DataError(TapeError, ValueError):
    """A data set that is missing, damaged, or could not be downloaded."""


def message(
    what: str,
    *,
    where: str | None = None,
    operands: Iterable[tuple[str, str]] = (),
    fix: str | None = None,
) -> str:
    """The text of an error: what is wrong, where, with which operands, and one fix.

    ``where`` is ``file:line`` followed by the source line, ``operands`` are pairs of a name and a
    description (``"(64, 784)  float32"``), shown in columns.
    """
    lines = [what]
    if where:
        lines.append(f"  at {where}")
    rows = list(operands)
    width = max((len(name) for name, _ in rows), default=0)
    lines += [f"  {name:<{width}}    {description}" for name, description in rows]
    if fix:
        lines.append(f"  fix: {fix}")
    return "\n".join(lines)
