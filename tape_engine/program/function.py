"""A generated function in as many copies as replays run at once: each has buffers of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..recorder import quietly
from .backends import native, python
from .backends.source import Source
from .collecting import Uncollected
from .data import Frozen

__all__ = ["Function"]


class Function:
    """The forward pass of a frozen tape as a Python function, or that and the sweep.

    Attributes:
        source: the generated source; made at its first use.
        one: the seed of a sweep from one element.
        native: what the native backend made of it; ``None`` where the function is all calls of torch.
        device: the type of device that it runs on.
        refused: why the native backend could not make it, if it was to.
    """

    def __init__(self, frozen: Frozen, *, with_sweep: bool, copy: bool, backend: str) -> None:
        self._frozen = frozen
        self._with_sweep = with_sweep
        self._copy = copy
        self._asked = backend
        self.native: native.Told | None = None
        self.refused = ""
        self._source: Source | None = None
        self.device = frozen.seed.device.type
        self._idle: list[Callable[..., Any]] = []
        self._lock = threading.Lock()
        with torch.inference_mode(False):
            shape = frozen.seed.shape if frozen.seed.numel() == 1 else ()
            self.one = torch.ones(shape, dtype=frozen.seed.dtype, device=frozen.seed.device)

    @property
    def backend(self) -> str:
        """What made the function, once it is made."""
        return "native" if self.native else "python"

    @property
    def source(self) -> Source:
        with self._lock:
            if self._source is None:
                without = torch.autocast(self.device, enabled=False)
                with quietly(), torch.inference_mode(False), torch.no_grad(), without, Uncollected():
                    self._source = self._generate()
            return self._source

    def _generate(self) -> Source:
        made = None
        if self._asked == "native":
            made = native.generate(self._frozen, with_sweep=self._with_sweep)
        elif self._asked == "auto" and self.device == "cpu" and native.available():
            try:
                made = native.generate(self._frozen, with_sweep=self._with_sweep, always=False)
            except Exception as error:  # an installation of numba that does not work must not stop a replay
                self.refused = f"not native: {type(error).__name__}: {error}".partition("\n")[0]
        if made is not None:
            source, self.native = made
            return source
        return python.generate(self._frozen, with_sweep=self._with_sweep)

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """Runs a copy of the function that no other replay uses meanwhile."""
        try:
            run = self._idle.pop()  # atomic: no two threads get the same
        except IndexError:
            with Uncollected(), torch.autocast(self.device, enabled=False):
                run = self.source.function(copy=self._copy)
        try:
            if torch.is_autocast_enabled(self.device):  # casts that the code made are recorded; no others are meant
                with torch.autocast(self.device, enabled=False):
                    return run(*arguments)
            return run(*arguments)
        finally:
            self._idle.append(run)
