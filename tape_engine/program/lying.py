"""How tensors lie: what a recording tells of where it matters, put in the order in which a replay runs."""

from __future__ import annotations

import bisect

from ..tape import Node, Tape, Value
from .data import Frozen
from .passes.choices import demanded

__all__ = ["as_they_lay", "strided"]


def strided(tape: Tape, frozen: Frozen, steps: dict[Node, list[Node]]) -> set[Value]:
    """The leaves whose strides decide what the recorded code did, besides numbers."""
    order: list[Node] = []
    places: list[tuple[int, int]] = []  # where in that stands what was recorded when
    for node in sorted({*frozen.tape.nodes, *steps}, key=lambda node: node.seq):  # a write may serve no output
        places.append((node.seq, len(order)))
        order += steps.get(node, [node])
    noted = {*tape.asked, *(v for node in order for v in (*node.inputs, *node.outputs) if v.asked or v.chosen >= 0)}

    def before(seq: int) -> int:
        """The place in `order` of the last node that was recorded before."""
        at = bisect.bisect_right(places, (seq, 0))
        return places[at][1] - 1 if at < len(places) else len(order)

    begin = dict(places)
    more = [(begin[node.seq], of, made) for node, _ in frozen.unsure for of in node.inputs for made in node.outputs]
    for value in noted:
        if value.chosen >= 0:
            more.append((before(value.chosen), value, value))
    ended = {v: before(v.ended) + 0.5 for node in order for v in (*node.inputs, *node.outputs) if v.ended >= 0}
    asked = [value for node, is_asked in frozen.unsure if is_asked for value in node.inputs]
    frozen.unsure.clear()
    return demanded(frozen, order, ended, more, [*asked, *(value for value in noted if value.asked)])


def as_they_lay(leaves: set[Value], frozen: Frozen) -> dict[Value, tuple[bool, bool]]:
    """The inputs and live tensors among leaves, and how their elements are to be read."""
    held = {frozen.canonical(v): t for v, t in zip(frozen.inputs, frozen.given, strict=True) if v is not None}
    held |= {value: tensor for value, tensor in frozen.live.items() if value not in frozen.constants}
    wanted = {frozen.canonical(value) for value in leaves}
    return {value: (tensor.is_conj(), tensor.is_neg()) for value, tensor in held.items() if value in wanted}
