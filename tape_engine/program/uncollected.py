"""A pause of Python's garbage collector, while much is made that stays.

Each time the objects of a process have grown by a quarter, the collector looks at all of them again. Of a tape of
100,000 nodes that is a third of the time in which it becomes a program, and nothing is found.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]

_lock = threading.Lock()
_pauses: list[bool] = []  # one for each that is inside now: whether the collector ran when it came


@contextmanager
def uncollected() -> Iterator[None]:
    """The collector rests until the last of those inside has left; off when they came, it stays off."""
    with _lock:
        _pauses.append(gc.isenabled() or any(_pauses))
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            ran = _pauses.pop()
            if ran and not _pauses:
                gc.enable()
