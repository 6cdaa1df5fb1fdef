"""Guards: what a replay refuses because the recorded code would have done something else."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..errors import GuardError, message
from ..tape import Node
from .data import Frozen, sized_by_elements

__all__ = ["check_guard", "check_shape", "default_generator", "generators_kept", "generators_of", "streams_of"]

FIX = "record the code again on these inputs"


def check_guard(now: Any, recorded: Any, site: str | None) -> None:
    """Refuses a decision that comes out differently."""
    if _same(now, recorded):
        return
    what = f"a decision of the recorded code comes out differently: {recorded!r} when recorded, {now!r} now."
    raise GuardError(message(what, where=site, fix=FIX))


def _same(a: Any, b: Any) -> bool:
    """Equality by which NaN is NaN, in lists as well."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def check_shape(tensor: torch.Tensor, shape: tuple[int, ...], site: str | None) -> None:
    """Refuses a result whose shape, which depends on elements, is not the recorded one."""
    if tensor.shape != shape:
        what = (
            f"a shape that depends on the elements comes out differently: {shape} when recorded, "
            f"{tuple(tensor.shape)} now."
        )
        raise GuardError(message(what, where=site, fix=FIX))


class _Streams:
    """A context after whose `GuardError` the generators stand where they stood: a replay refused has drawn nothing."""

    def __init__(self, generators: list[torch.Generator], devices: set[torch.device]) -> None:
        self.generators = generators
        self.devices = devices
        self.local = threading.local()  # several threads replay at once

    def __enter__(self) -> None:
        states = [each.get_state() for each in (*self.generators, *map(default_generator, self.devices))]
        self.local.states = [*getattr(self.local, "states", []), states]

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        states = self.local.states.pop()
        if kind is not None and issubclass(kind, GuardError):
            for each, state in zip((*self.generators, *map(default_generator, self.devices)), states, strict=True):
                each.set_state(state)


def default_generator(device: torch.device) -> torch.Generator:
    """Torch's own generator of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def streams_of(frozen: Frozen) -> AbstractContextManager[None]:
    """The context in which a frozen tape is replayed: it takes back what was drawn before a guard refused."""
    drawing = [node for node in frozen.forward if node.random]
    if not drawing or not any(n.result is not None or sized_by_elements(n) for n in frozen.forward):
        return nullcontext()
    return _Streams(generators_of(drawing), {v.device for n in drawing for v in n.outputs})


def generators_of(nodes: Iterable[Node]) -> list[torch.Generator]:
    """The generators that nodes were given to draw from."""
    arguments = (each for n in nodes for each in (*n.args, *n.kwargs.values()))
    return list({id(each): each for each in arguments if isinstance(each, torch.Generator)}.values())


@contextmanager
def generators_kept(devices: Iterable[torch.device], given: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Leaves the random streams of torch on the CPU and `devices`, of Python and of NumPy, and those `given`."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    states = [(each, each.get_state()) for each in given]
    try:
        with torch.random.fork_rng(devices=[each for each in devices if each.type == "cuda"]):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(drawn)
        for each, state in states:
            each.set_state(state)
