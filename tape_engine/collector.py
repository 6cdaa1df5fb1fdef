"""Python's garbage collector, which does not look through a recording that grows.

The collector looks for rings of objects each time that several hundred more were made than freed. Plain torch makes
few; a recording makes some ten for each operation, which stay until it is swept and its root is let go. None of them is
in a ring: all are freed by the counts of their references. The collector would pass over them again and again, a tenth
of the time of a step of tiny operations, and once in some seventy such steps over every object of the process, torch's
own as well, which takes a tenth of a second.

So from the opening of a block on, until its tape is swept or gone, the collector waits for as many objects more as the
recording before made. After that it looks when as many were made as the user has it wait for, those of the recording
not counted; and then, or once the tape is gone, all is as the user has set it.
"""

from __future__ import annotations

import gc
import threading
import weakref

from .tape import Token

__all__ = ["hold_off", "let_go", "wait_for"]

#: How many objects a node of a recording is made of, with its values, cells and references.
OBJECTS = 12

#: For more objects than these the collector is not made to wait.
MOST = 50_000

_Threshold = tuple[int, ...]
_lock = threading.RLock()  # a tape may go at any time, while this is held as well
_blocks = 0  # that are open, of all threads
_waiting: weakref.ref[Token] | None = None  # for the tape of the last block to be swept, or to go
_expected = 0  # how many objects the last recording made
_swept = False  # whether it was, so that the next look of the collector is to be as the user has set it
_own: _Threshold | None = None  # what the user has set, while something else is
_ours: _Threshold | None = None  # what is set instead


def hold_off() -> None:
    """A block opens."""
    global _blocks, _swept
    with _lock:
        if _looked not in gc.callbacks:
            gc.callbacks.append(_looked)
        _blocks += 1
        _swept = False
        first, *others = _own if _own is not None and gc.get_threshold() == _ours else gc.get_threshold()
        _set((first, *others), (_raised(first, _expected), *others))


def wait_for(token: Token, length: int) -> None:
    """The block of this tape, of so many nodes, closes."""
    global _blocks, _waiting, _expected
    with _lock:
        _blocks -= 1
        _waiting = weakref.ref(token, _gone)
        _expected = OBJECTS * length
        if token.closed_at:  # inside the block
            let_go()


def let_go() -> None:
    """A tape was swept: what was made so far is not counted, if it is the one that was waited for."""
    global _swept
    with _lock:
        if _own is not None and not _blocks and gc.get_threshold() == _ours:
            first, *others = _own
            _set(_own, (_raised(first, gc.get_count()[0]), *others))
            _swept = True


def _raised(first: int, by: int) -> int:
    """The threshold for new objects, so many higher; at 0 the collector is off."""
    return first and max(first, min(first + by, MOST))


def _set(own: _Threshold, ours: _Threshold) -> None:
    global _own, _ours
    _own, _ours = own, ours
    gc.set_threshold(*ours)


def _restore() -> None:
    """All is as the user has set it, meanwhile perhaps."""
    global _own, _ours, _swept
    own, ours = _own, _ours
    _own, _ours, _swept = None, None, False
    if own is not None and gc.get_threshold() == ours:
        gc.set_threshold(*own)


def _gone(ref: weakref.ref[Token]) -> None:
    if ref is _waiting and not _blocks:
        _restore()


def _looked(phase: str, info: object) -> None:
    if _swept and phase == "start":
        _restore()
