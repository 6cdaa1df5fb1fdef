"""What can go wrong with a picture, in the form that every message of the project has."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import FrameType

from tape_engine.errors import TapeError, message
from tape_engine.names import call_site, user_frame

__all__ = ["LayoutError", "NotSweptError", "OptionError"]

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class OptionError(TapeError, ValueError):
    """An argument of a drawing function that is not one of the values it can take."""


class LayoutError(TapeError, RuntimeError):
    """No Graphviz was found, or none could lay out the picture in the time given."""


class NotSweptError(TapeError, ValueError):
    """The reverse sweep is to be drawn of a recording over which none has passed."""


def user_line() -> FrameType | None:
    """The innermost frame of the user's own code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and os.path.abspath(frame.f_code.co_filename).startswith(_HERE):
        frame = frame.f_back
    return frame if frame is not None else user_frame()


def caller() -> str | None:
    """The user's own line, as messages show it."""
    return call_site(user_line())


def choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """`value`, if it is one of `allowed`.

    Raises:
        OptionError: naming the argument, what was given and what is allowed.
    """
    if isinstance(value, str) and value in allowed:
        return value
    listed = ", ".join(repr(each) for each in allowed)
    near = _nearest(value, allowed)
    raise OptionError(message(f"{name}={value!r} is not one of {listed}.", where=caller(), fix=f"{name}={near!r}"))


def _nearest(value: object, allowed: Sequence[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.5)
    return found[0] if found else allowed[0]


def seconds(name: str, value: object) -> float:
    """`value` as a positive, finite number of seconds.

    Raises:
        OptionError: for anything else.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    raise OptionError(
        message(f"{name}={value!r} is not a positive number of seconds.", where=caller(), fix=f"{name}=20")
    )
