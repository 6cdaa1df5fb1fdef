"""Python's collector of garbage, put off while something large is built that will stay."""

from __future__ import annotations

import gc
import threading

__all__ = ["Uncollected"]


class Uncollected:
    """A context in which the collector does not run: all that is made meanwhile is kept, and it would look in vain.

    For a tape of thousands of nodes its searches take as long as the work itself. Contexts of several threads may
    overlap; the last to end puts the collector back as the first found it.
    """

    _lock = threading.Lock()
    _open = 0
    _enabled = False

    def __enter__(self) -> None:
        cls = Uncollected
        with cls._lock:
            if not cls._open:
                cls._enabled = gc.isenabled()
                gc.disable()
            cls._open += 1

    def __exit__(self, *error: object) -> None:
        cls = Uncollected
        with cls._lock:
            cls._open -= 1
            if not cls._open and cls._enabled:
                gc.enable()
