"""A frozen tape as plain data: what the passes read and change, and the backends run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..tape import Node, Value

__all__ = ["DESCRIBED", "SAME", "Frozen"]

Tensor = torch.Tensor
aten = torch.ops.aten

#: Overloads of whose tensor argument only the description matters.
DESCRIBED = {
    getattr(aten, name).default
    for name in (
        "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split()
    )
}


#: Overloads whose result is their argument: nothing needs to run.
SAME = {aten.detach.default, aten.lift_fresh.default, aten.alias.default}


@dataclass
class Frozen:
    """What a replay needs to know of a tape.

    Attributes:
        forward, backward: the nodes, in the order in which they run.
        inputs: the leaves that stand for the caller's inputs, in order; ``None`` for one never read.
        given: the tensors that were named as inputs when the tape was frozen.
        live: the other leaves with the tensors they are read from, anew on every replay.
        outputs: the values to return.
        seed: the leaf that stands for the gradient of the first output.
        gradients: each tensor that gets ``.g`` (an input by its place), with the value that is its gradient.
        writes: leaves that the recorded code wrote to, with the value that they hold at its end.
        same: values that are one and the same, by the one that stands for both.
        names: a name for every value.
        single: whether one output was asked for, rather than a tuple of them.
    """

    forward: list[Node]
    inputs: list[Value | None]
    given: list[Tensor]
    live: dict[Value, Tensor]
    outputs: list[Value]
    single: bool
    seed: Value
    backward: list[Node] = field(default_factory=list)
    gradients: list[tuple[int | Tensor, Value]] = field(default_factory=list)
    writes: list[tuple[Value, Value]] = field(default_factory=list)
    same: dict[Value, Value] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def canonical(self, value: Value) -> Value:
        """The value that stands for `value`."""
        while (other := self.same.get(value, value)) is not value:
            value = other
        return value
