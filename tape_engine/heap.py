"""The C library's heap, told early that large blocks come and go.

glibc takes a block from the system by itself, page by page, until it has seen one of that size freed; and it gives
the end of its heap back once twice that size lies free there. Both sizes grow with the largest block freed so far,
up to 32 MiB. What torch's own backward frees on its way is memory of the forward, in the midst of the heap. A sweep
frees its own gradients alone, for the recording stays as long as its root does, and those lie at the end of the
heap: at each of them the memory went back, and the next one paid for thousands of new pages (a third of a step of
`tests/benchmarks`' residual net). So one such block is made and freed, untouched, before the first recording. Any
process that once had a large tensor has done the same.

When the root goes, all of a recording is freed at once, and where that is more than 64 MiB it would go back as well,
to be taken anew by the next step: by chance, as one small block above it that stays is enough to keep it. So one is
put there, after a sweep that found the heap grown, and stays as long as a leaf of that sweep does: a model's memory
goes with the model.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

import torch

__all__ = ["hold_heap", "settle_heap"]

#: Just below the largest size that the C library learns from, in bytes.
LARGEST = (32 << 20) - (8 << 10)

#: Few gaps between blocks in use are as large, and the C library still takes it from its heap, in bytes.
PROBE = 24 << 20

#: How many blocks are taken, until one is new memory.
TRIES = 32

#: So large that the C library joins it, freed, with what is free around it, and does not put it by for the next one.
LEFT = 4096

_settled = False


def _library() -> Any:
    """The C library, if it is glibc."""
    try:
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return None
        found = ctypes.CDLL(None)
        for name, result, *given in (
            ("malloc", ctypes.c_void_p, ctypes.c_size_t),
            ("realloc", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
            ("free", None, ctypes.c_void_p),
            ("sbrk", ctypes.c_void_p, ctypes.c_ssize_t),
        ):
            function = getattr(found, name)
            function.restype, function.argtypes = result, given
    except (AttributeError, OSError, ValueError):  # another system
        return None
    return found


_libc = _library()
_top: Any = None if _libc is None else _libc.sbrk  # where the heap ends; blocks by themselves lie beyond


def settle_heap() -> None:
    """Makes and frees one large block, once a process; its pages are never touched."""
    global _settled
    if not _settled:
        _settled = True
        if _libc is not None:
            _libc.free(_fresh(LARGEST))


def _fresh(size: int) -> Any:
    """The address of a block that is new memory: by itself, or at the end of the heap, which it has moved.

    What lies free in the heap, or at its end, is taken first, and tells and holds nothing.
    """
    taken = []
    for _ in range(TRIES):
        end = _top(0)
        taken.append(_libc.malloc(size))
        if taken[-1] is None or taken[-1] > end or _top(0) != end:
            break
    for each in taken[:-1]:
        _libc.free(each)
    return taken[-1]


class _Pin:
    """A small block of the heap, above what is in use now; it stays as long as `leaf` and this object do."""

    def __init__(self, leaf: torch.Tensor) -> None:
        self.leaf = weakref.ref(leaf, _let_go)
        self.free = _libc.free
        # A large block lies above all others; what is left of it once it is made small still does.
        self.address = _libc.realloc(_fresh(PROBE), LEFT)
        self.end = _top(0)

    def __del__(self) -> None:
        self.free(self.address)


_pin: _Pin | None = None


def _let_go(leaf: weakref.ref[torch.Tensor]) -> None:
    global _pin
    if _pin is not None and _pin.leaf is leaf:
        _pin = None


def hold_heap(leaf: torch.Tensor) -> None:
    """What lies in the heap now is not given back to the system when it is freed, as long as `leaf` is there.

    Nothing is done while the heap ends where it did the last time.
    """
    global _pin
    pin = _pin  # another thread's leaf may go meanwhile
    if _settled and _top is not None and (pin is None or _top(0) != pin.end):
        _pin = _Pin(leaf)
