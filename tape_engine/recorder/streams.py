"""The random streams of a block: whether something other than recorded operations moved them.

A replay draws from the generators as the recorded operations did. Where the code seeded a generator in between
(``torch.manual_seed``, ``fork_rng``), made one of its own, or drew unheard, a replay would draw other numbers than
running it again: such a block is noted, and a program of it refused.
"""

from __future__ import annotations

from typing import Any

import torch

from ..aliases import unheard
from ..names import call_site, user_frame

__all__ = ["Streams"]


_CPU = torch.device("cpu")
_DEFAULT = torch.default_generator


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

    def draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Draw:
        """The context of one operation that draws."""
        return _Draw(self, self._of(args, kwargs))

    def end(self) -> None:
        """The end of the block: what was drawn must not have been taken back. A block that drew nothing may seed."""
        for generator, state in list(self._left.values()):
            if len(self._left) > 1 or state is not self._began:
                self._look(generator)

    def _look(self, generator: torch.Generator | None) -> None:
        known = None if generator is None else self._left.get(id(generator))
        if known is None or self.moved:
            return
        with unheard():
            if torch.equal(known[1], known[0].get_state()):
                return
        self.moved = call_site(user_frame()) or "a line that is not known"

    def _of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator | None:
        if (
            not kwargs
            and len(args) == 2
            and type(args[0]) is torch.Tensor
            and type(args[1]) is float
            and args[0].is_cpu
        ):
            return _DEFAULT  # a mask, of ones with a probability
        for each in (*args, *kwargs.values()):
            if isinstance(each, torch.Generator):
                return each
        device: Any = kwargs.get("device")
        if not device:
            device = next((each.device for each in args if isinstance(each, torch.Tensor)), _CPU)
        elif not isinstance(device, torch.device):
            device = torch.device(device)
        if device.type == "cuda":
            return torch.cuda.default_generators[device.index or 0]
        return _DEFAULT if device.type == "cpu" else None


class _Draw:
    """The context of one operation that draws from `generator`; a class, as it is entered at each of them."""

    __slots__ = ("generator", "streams")

    def __init__(self, streams: Streams, generator: torch.Generator | None) -> None:
        self.streams = streams
        self.generator = generator

    def __enter__(self) -> None:
        self.streams._look(self.generator)
        self.streams.drawing = True

    def __exit__(self, *error: object) -> None:
        self.streams.drawing = False
        if self.generator is not None:
            self.streams._left[id(self.generator)] = (self.generator, self.generator.get_state())
