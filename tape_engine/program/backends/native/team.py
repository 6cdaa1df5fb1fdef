"""The threads of a loop: torch's own where they can be had.

After an operation of torch its helping threads go on running for some milliseconds, waiting for more. Threads beside
them would share the cores with these, so that a loop would take half as long again. Torch's are those of an OpenMP
library, which starts work on them within microseconds (`GOMP_parallel`, which the libraries of GNU, LLVM and Intel have
in common on Linux). Elsewhere, and in a forked process, where that library's threads are gone, there is a pool.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Share", "threads"]

PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint)
ONE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@dataclass(frozen=True)
class _Library:
    """The functions of the OpenMP library that torch has loaded."""

    parallel: Callable[[int, int, int, int], None]
    number: int  # the address of what tells a thread its number in the team
    count: int  # and of what tells how many they are


class Share:
    """Parts of a loop, to be run by as many threads.

    Args:
        parts: the addresses of their words.
        addresses: those of the kernels.
        kernel: what runs a part.
    """

    def __init__(self, parts: Sequence[int], addresses: dict[str, int], kernel: str = "part") -> None:
        self._parts = list(parts)
        self._one = ONE(addresses[kernel])
        self._function = addresses["share"]
        library = _library()
        asked = [library.number, library.count] if library else [0, 0]
        words = [*asked, addresses[kernel], len(self._parts), *self._parts]
        self._words = (ctypes.c_int64 * len(words))(*words)
        self._address = ctypes.addressof(self._words)

    def __call__(self) -> None:
        if len(self._parts) == 1:
            self._one(self._parts[0])
            return
        library = _library()
        if library is not None:  # as many as torch has, for a team of another size would be made anew
            library.parallel(self._function, self._address, torch.get_num_threads(), 0)
            return
        others: list[Future[None]] = [workers().submit(self._one, each) for each in self._parts[1:]]
        self._one(self._parts[0])
        for each in others:
            each.result()


@functools.cache
def _library() -> _Library | None:
    """The OpenMP library of this process; ``None`` where there is none, or where its threads are gone."""
    if _forked or not sys.platform.startswith("linux"):
        return None
    try:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
        names = ("libgomp", "libiomp5", "libomp")
        paths = [path for path in mapped if path.startswith("/") and Path(path).name.startswith(names)]
        # more than one may be loaded; torch's lies with it
        paths.sort(key=lambda path: (not path.startswith(str(Path(torch.__file__).parent)), path))
        library = ctypes.CDLL(paths[0])
        number, count = (
            ctypes.cast(each, ctypes.c_void_p).value or 0
            for each in (library.omp_get_thread_num, library.omp_get_num_threads)
        )
        parallel = PARALLEL(ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0)
    except (OSError, AttributeError, IndexError):  # none, or one without this function
        return None
    return _Library(parallel, number, count)


def threads() -> int:
    """How many parts a loop is to have."""
    return max(1, min(torch.get_num_threads(), cores()))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_forked: list[bool] = []
_pool: list[ThreadPoolExecutor] = []
_pool_lock = threading.Lock()


def workers() -> ThreadPoolExecutor:
    """The threads of the pool: made when first asked for, and anew in a forked process."""
    if not _pool:
        with _pool_lock:
            if not _pool:
                _pool.append(ThreadPoolExecutor(max_workers=max(1, cores()), thread_name_prefix="tape_engine"))
    return _pool[0]


def _after_fork() -> None:
    _forked.append(True)
    _pool.clear()
    _library.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
