"""A frozen tape as plain data: what the passes read and change, and the backends run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..places import read_view, write_view
from ..tape import Node, Tape, Value

__all__ = ["DESCRIBED", "DETACH", "LIFT", "SAME", "STEPPED", "VIEWS", "Frozen", "sized_by_elements"]

Tensor = torch.Tensor
aten = torch.ops.aten

#: Overloads of whose tensor argument only the description matters.
DESCRIBED = {
    getattr(aten, name).default
    for name in (
        "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split()
    )
}


#: Why no gradient passes into what `Program.step` gave inside a recording (`Value.closed`).
STEPPED = "was given by program.step, which sweeps by itself and is not recorded"

#: ``torch.tensor(...)``: the leaf before it holds what the tensor is made of.
LIFT = aten.lift_fresh.default
DETACH = aten.detach.default

#: Overloads whose result is their argument: nothing needs to run.
SAME = {DETACH, aten.alias.default, LIFT}

#: The named operations that look into memory and write to it: nothing in them can differ from call to call.
VIEWS = (read_view, write_view)


def sized_by_elements(node: Node) -> bool:
    """Whether the shape of what a node returns depends on its arguments' elements (``nonzero``, a mask)."""
    if not node.op.sized_by_elements:
        return False
    if node.op.forward is aten.index.Tensor:  # by integers, the shape is that of the indices
        return any(v.dtype in (torch.bool, torch.uint8) for v in node.inputs[1:])
    return True


@dataclass
class Frozen:
    """What a replay needs to know of a tape.

    Attributes:
        tape: the recording as it was, without contents.
        forward, backward: the nodes, in the order in which they run; named operations are opened up.
        nodes: the recorded nodes of the forward pass, as they stand on the tape.
        leaves: the values that these read and do not make, with their tensors (``None``: gone).
        inputs: the leaves that stand for the caller's inputs, in order; ``None`` for one never read.
        given: tensors of the description of those that were named as inputs; stand-ins once a program is made.
        titles: how messages call the inputs.
        live: the other leaves with the tensors they are read from, anew on every replay.
        constants: those of them that nobody can write to (``torch.tensor(...)`` in the code).
        outputs: the values to return.
        single: whether one output was asked for, rather than a tuple of them.
        seed: the leaf that stands for the gradient of the first output.
        gradients: each tensor that gets ``.g`` (an input by its place), with the value that is its gradient.
        unreached: the tensors of `wrt` that the first output does not depend on.
        writes: leaves that the recorded code wrote to, with the value that they hold at its end.
        lying: the leaves that a replay must find as they lay, each with whether it is lazily conjugated and negated.
        same: values that are one and the same, by the one that stands for both.
        names: a name for every value, by its ``id``.
        held: tensors of leaves found on the way, until it is known which of them are read.
        unsure: named operations whose bodies go by how their arguments lie, and whether they ask for strides outright.
        stand_ins: the memory in which the bodies of named operations find large arguments, while they are opened up.
    """

    tape: Tape
    nodes: list[Node]
    leaves: dict[Value, Tensor | None]
    inputs: list[Value | None]
    given: list[Tensor]
    titles: list[str]
    outputs: list[Value]
    single: bool
    seed: Value
    forward: list[Node] = field(default_factory=list)
    backward: list[Node] = field(default_factory=list)
    live: dict[Value, Tensor] = field(default_factory=dict)
    constants: set[Value] = field(default_factory=set)
    gradients: list[tuple[int | Tensor, Value]] = field(default_factory=list)
    unreached: list[int | Tensor] = field(default_factory=list)
    writes: list[tuple[Value, Value]] = field(default_factory=list)
    lying: dict[Value, tuple[bool, bool]] = field(default_factory=dict)
    same: dict[Value, Value] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)
    unsure: list[tuple[Node, bool]] = field(default_factory=list)
    stand_ins: dict[tuple[torch.dtype, torch.device, int], Tensor] = field(default_factory=dict)

    def canonical(self, value: Value) -> Value:
        """The value that stands for `value`."""
        same = self.same
        while (other := same.get(value)) is not None and other is not value:
            value = other
        return value

    @property
    def read_anew(self) -> list[tuple[Value, Tensor]]:
        """The live references: leaves with the user's own tensors."""
        return [(value, tensor) for value, tensor in self.live.items() if value not in self.constants]

    def title(self, value: Value) -> str | None:
        """How messages call a leaf: the user's name, if it is known."""
        for leaf, title in zip(self.inputs, self.titles, strict=True):
            if leaf is value:
                return title
        return self.names.get(id(value)) or value.name
