"""A generated function in as many copies as replays run at once: each has buffers of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..recorder import quietly
from .backends import cudagraph, native, python
from .backends.source import Source
from .collecting import Uncollected
from .data import Frozen

__all__ = ["Function"]


class Function:
    """The forward pass of a frozen tape as a Python function, or that and the sweep.

    Attributes:
        source: the generated source; made at its first use.
        one: the seed of a sweep from one element.
        native: what the native backend made of it; ``None`` where it is not of that backend.
        device: the type of device that it runs on.
        backend: the name of the backend that made it, once it is made.
        plan: what `print(program)` tells of how it runs; empty where there is nothing to tell.
    """

    def __init__(self, frozen: Frozen, *, with_sweep: bool, copy: bool, backend: str) -> None:
        self._frozen = frozen
        self._with_sweep = with_sweep
        self._copy = copy
        self._asked = backend
        self.native: native.Told | None = None
        self.backend = "python"
        self.plan = ""
        self._source: Source | None = None
        self.device = frozen.seed.device.type
        self._idle: list[Callable[..., Any]] = []
        self._lock = threading.Lock()
        with torch.inference_mode(False):
            shape = frozen.seed.shape if frozen.seed.numel() == 1 else ()
            self.one = torch.ones(shape, dtype=frozen.seed.dtype, device=frozen.seed.device)

    @property
    def source(self) -> Source:
        with self._lock:
            if self._source is None:
                without = torch.autocast(self.device, enabled=False)
                with quietly(), torch.inference_mode(False), torch.no_grad(), without, Uncollected():
                    self._source = self._generate()
            return self._source

    def _generate(self) -> Source:
        frozen, sweep, wanted = self._frozen, self._with_sweep, self._asked
        if wanted == "inductor":
            from .backends import inductor  # torch's compiler takes long to load

            source, told = inductor.generate(frozen, with_sweep=sweep)
            self.backend, self.plan = wanted, str(told)
            return source
        if wanted == "cudagraph" or (wanted == "auto" and self.device == cudagraph.DEVICE != "cpu"):
            why = cudagraph.refusal(frozen, with_sweep=sweep)
            if why is None:
                self.backend, self.plan = "cudagraph", "captured at the first replay, and when a live tensor has moved"
            else:
                self.plan = f"not cudagraph: {why[0]}"
        made = None
        if wanted == "native":
            made = native.generate(frozen, with_sweep=sweep)
        elif wanted == "auto" and self.device == "cpu" and native.available():
            try:
                made = native.generate(frozen, with_sweep=sweep, always=False)
            except Exception as error:  # an installation of llvmlite that does not work must not stop a replay
                self.plan = f"not native: {type(error).__name__}: {error}".partition("\n")[0]
        if made is not None:
            source, self.native = made
            self.backend, self.plan = "native", str(self.native)
            return source
        return python.generate(frozen, with_sweep=sweep)

    def _copy_of(self, source: Source) -> Callable[..., Any]:
        """A copy of the function, with buffers of its own."""
        if self.backend == "cudagraph":
            return cudagraph.Captured(self._frozen, source, with_sweep=self._with_sweep, copy=self._copy)
        return source.function(copy=self._copy)

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """Runs a copy of the function that no other replay uses meanwhile."""
        try:
            run = self._idle.pop()  # atomic: no two threads get the same
        except IndexError:
            with Uncollected(), torch.autocast(self.device, enabled=False):
                run = self._copy_of(self.source)
        try:
            if torch.is_autocast_enabled(self.device):  # casts that the code made are recorded; no others are meant
                with torch.autocast(self.device, enabled=False):
                    return run(*arguments)
            return run(*arguments)
        finally:
            self._idle.append(run)
