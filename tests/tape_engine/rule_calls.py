"""Samples drawn: an operation called with tensors, plain, with strides, or with one tensor in two places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tape_engine.registry import Op, Sample, Spec

Tensor = torch.Tensor

SEED = 7
EXACT = (torch.float64, torch.complex128)


def each_tensor(structure: Any) -> Iterator[Tensor]:
    """The tensors of nested arguments, in order."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from each_tensor(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from each_tensor(item)


def flat(structure: Any) -> Iterator[Any]:
    if isinstance(structure, (list, tuple)):
        for item in structure:
            yield from flat(item)
    else:
        yield structure


def mapped(structure: Any, change: Callable[[Any], Any], kind: type) -> Any:
    """Nested arguments with every object of `kind` changed."""
    if isinstance(structure, kind):
        return change(structure)
    if isinstance(structure, (list, tuple)):
        return type(structure)(mapped(item, change, kind) for item in structure)
    if isinstance(structure, dict):
        return {name: mapped(item, change, kind) for name, item in structure.items()}
    return structure


def differentiable(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


@dataclass
class Call:
    """An operation with arguments drawn; ``leaves`` are its distinct floating tensors."""

    op: Op
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kinked: bool = False
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        found = {id(t): t for t in each_tensor([*self.args, self.kwargs]) if differentiable(t)}
        self.leaves = list(found.values())

    def forward(self) -> Any:
        torch.default_generator.manual_seed(SEED)  # a random operation draws the same at each call
        return self.op.forward(*self.args, **self.kwargs)

    @property
    def exact(self) -> bool:
        return all(t.dtype in EXACT for t in self.leaves)

    def slots(self) -> list[Any]:
        """What stands in each tensor's place, tensors of a list each for itself: tensors, numbers, ``None``."""
        if self.op.is_named:
            named = [each for one in (*self.args, *self.kwargs.values()) for each in flat(one)]
            return [each for each in named if each is None or isinstance(each, Tensor)]
        found: list[Any] = []
        for place, argument in enumerate(self.op.forward._schema.arguments):  # type: ignore[attr-defined]
            given = self.args[place] if place < len(self.args) else self.kwargs.get(argument.name)
            kind = str(argument.type)
            if kind in ("Tensor", "Optional[Tensor]"):
                found.append(given)
            elif kind in ("List[Tensor]", "List[Optional[Tensor]]"):
                found.extend(given or ())
        return found


def plain(t: Tensor) -> Tensor:
    return t


def strided(t: Tensor) -> Tensor:
    """The same elements, each second place of a larger tensor's last dimension."""
    if t.ndim == 0:
        return torch.stack([t, t])[1]
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def draw(op: Op, sample: Sample, layout: Callable[[Tensor], Tensor] = plain) -> Call:
    generator = torch.Generator().manual_seed(SEED)
    args, kwargs = mapped([sample.args, sample.kwargs], lambda s: layout(s.draw(generator)), Spec)
    args, kwargs = op.bind(args, kwargs)
    return Call(op, args, kwargs, is_kinked(sample))


def specs_of(sample: Sample) -> list[Spec]:
    return [s for s in flat([*sample.args, *sample.kwargs.values()]) if isinstance(s, Spec)]


def is_kinked(sample: Sample) -> bool:
    return any(s.values is not None and (s.dtype.is_floating_point or s.dtype.is_complex) for s in specs_of(sample))


def doubled(op: Op, sample: Sample) -> Call | None:
    """The call with one tensor in two places, where two of them are described alike."""
    floating = [s for s in specs_of(sample) if s.dtype.is_floating_point or s.dtype.is_complex]
    if len(set(floating)) == len(floating):
        return None
    generator = torch.Generator().manual_seed(SEED)
    drawn: dict[Spec, Tensor] = {}
    args, kwargs = mapped(
        [sample.args, sample.kwargs], lambda s: drawn[s] if s in drawn else drawn.setdefault(s, s.draw(generator)), Spec
    )
    args, kwargs = op.bind(args, kwargs)
    return Call(op, args, kwargs, is_kinked(sample))


def calls(op: Op, sample: Sample) -> Iterator[tuple[str, Call]]:
    yield "plain", draw(op, sample)
    yield "strided", draw(op, sample, strided)
    twice = doubled(op, sample)
    if twice is not None:
        yield "twice", twice
