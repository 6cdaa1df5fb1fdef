"""The random streams of a block: whether something other than recorded operations moved them.

A replay draws from the generators as the recorded operations did. Where the code seeded a generator in between
(``torch.manual_seed``, ``fork_rng``), made one of its own, or drew unheard, a replay would draw other numbers than
running it again: such a block is noted, and a program of it refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..aliases import unheard
from ..names import call_site, user_frame

__all__ = ["Streams"]


class Streams:
    """The generators that a block has drawn from, each with the state in which that left it.

    Attributes:
        moved: what moved one of them and where that was found, or "".
        drawing: whether a recorded operation draws just now.
    """

    def __init__(self) -> None:
        self.moved = ""
        self.drawing = False
        self._began = torch.default_generator.get_state()
        self._left: dict[int, tuple[torch.Generator, torch.Tensor]] = {
            id(torch.default_generator): (torch.default_generator, self._began)
        }

    @contextmanager
    def draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """The context of one operation that draws."""
        generator = self._of(args, kwargs)
        self._look(generator)
        self.drawing = True
        try:
            yield
        finally:
            self.drawing = False
            if generator is not None:
                self._left[id(generator)] = (generator, generator.get_state())

    def end(self) -> None:
        """The end of the block: what was drawn must not have been taken back. A block that drew nothing may seed."""
        for generator, state in list(self._left.values()):
            if len(self._left) > 1 or state is not self._began:
                self._look(generator)

    def _look(self, generator: torch.Generator | None) -> None:
        known = None if generator is None else self._left.get(id(generator))
        with unheard():
            if known is None or self.moved or torch.equal(known[1], known[0].get_state()):
                return
        self.moved = call_site(user_frame()) or "a line that is not known"

    def _of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator | None:
        given = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Generator)), None)
        if given is not None:
            return given
        devices = [each.device for each in args if isinstance(each, torch.Tensor)]
        device = torch.device(kwargs.get("device") or (devices[0] if devices else "cpu"))
        if device.type == "cuda":
            return torch.cuda.default_generators[device.index or 0]
        return torch.default_generator if device.type == "cpu" else None
