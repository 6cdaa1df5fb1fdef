"""Writes in place: where nobody reads the old value any more, a write to a part of it costs that part alone.

On a tape a write makes a new value: a buffer that is filled in n writes is n buffers, and copying one to the next would
cost as much as n times all of it. So may the sweep of n readings ``x[i]``, each of which gives a gradient for all of
``x``, to be added up. Where the value before dies with the operation, its memory is that of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from ...places import write_view
from ...tape import Node, Value
from ..buffers import overlapping

__all__ = ["InPlace", "find_in_place"]

aten = torch.ops.aten

#: Gradients of readings of a part: zeros, with the gradient of the part in its place; and the reading.
SPREAD: dict[Any, Any] = {
    aten.select_backward.default: aten.select.int,
    aten.slice_backward.default: aten.slice.Tensor,
}

#: Writes to some elements of the first argument, by the method that does them in its memory.
WRITES: dict[Any, str] = {
    aten.index_put.default: "index_put_", aten.index_copy.default: "index_copy_", aten.index_add.default: "index_add_",
    aten.index_fill.int_Scalar: "index_fill_", aten.scatter.src: "scatter_", aten.scatter.value: "scatter_",
    aten.scatter_add.default: "scatter_add_",
}  # fmt: skip


NEAR = 64  # how far from the sum the node may stand whose work it takes over


@dataclass
class InPlace:
    """What is done in the memory of a value that dies.

    Attributes:
        over: for each such node the value whose memory it writes to.
        spread: the sums that add a spread gradient to one that dies, with the node that would spread it.
        left_out: those nodes, which need not run.
    """

    over: dict[Node, Value] = field(default_factory=dict)
    spread: dict[Node, Node] = field(default_factory=dict)
    left_out: set[Node] = field(default_factory=set)


def find_in_place(
    order: Sequence[Collection[Node]],
    canonical: Callable[[Value], Value],
    looks_into: Callable[[Node], bool],
    kept: Collection[Value],
    able: Callable[[Node], bool],
) -> InPlace:
    """The nodes that may write to the memory of what they are given.

    Args:
        order: the nodes in the order in which they run; those of one collection run as one.
        canonical: gives the value that stands for a value.
        looks_into: whether what a node gives lies in memory of what it is given, or may do so.
        kept: what is not the replay's own to write to, or is read at its end.
        able: whether a node runs by itself and makes memory of its own on each replay.
    """
    if not any(n.op is write_view or n.op.forward in WRITES or n.op.forward in SPREAD for n in chain(*order)):
        return InPlace()
    states: dict[Value, Value] = {}  # a view stands for the value that it looks into
    last: dict[Value, int] = {}  # the place at which a value, or a view of it, is read last
    reads: dict[Value, int] = {}
    makers: dict[Value, Node] = {}
    for place, nodes in enumerate(order):
        for node in nodes:
            inputs = [canonical(v) for v in node.inputs]
            for value in inputs:
                state = states.setdefault(value, value)
                last[state] = place
                reads[value] = reads.get(value, 0) + 1
            for value in map(canonical, node.outputs):
                viewed = looks_into(node) and inputs
                states[value] = states[inputs[0]] if viewed else value
                makers[value] = node
            if looks_into(node) and len({*inputs}) > 1:  # it is not known which
                last.update((states[value], len(order)) for value in inputs)
    for value in kept:
        last[states.get(value, value)] = len(order)

    found = InPlace()
    memory: dict[Value, Value] = {}

    def lies_in(value: Value) -> Value:
        value = states.get(value, value)
        return memory.get(value, value)

    def dies(value: Value, place: int) -> bool:
        """Whether a value in memory of the replay's own, laid out as it is to be, is read for the last time."""
        maker = makers.get(value)
        own = maker is not None and states[value] is value and (maker in found.over or able(maker))
        laid_out = bool(value.strides) or not value.ndim
        return own and last[value] == place and laid_out and not overlapping(value.shape, value.strides)

    def others_apart(base: Value, others: Iterable[Value]) -> bool:
        return all(lies_in(base) is not lies_in(value) for value in others)

    for place, nodes in enumerate(order):
        for node in nodes if len(nodes) == 1 else ():
            if not node.outputs or canonical(node.outputs[0]) in kept:
                continue
            out, inputs = canonical(node.outputs[0]), [canonical(v) for v in node.inputs]
            base: Value | None = None
            if node.op is write_view or (node.op.forward in WRITES and node.args[0] is node.inputs[0]):
                base = inputs[0]
                if not dies(base, place) or not others_apart(base, inputs[1:]):
                    continue
            elif node.op.forward is aten.add.Tensor and len(inputs) == 2 and node.kwargs.get("alpha", 1) == 1:
                for one, other in ((0, 1), (1, 0)):
                    maker = makers.get(inputs[other])
                    alone = reads[inputs[other]] == 1 and last.get(states[inputs[other]]) == place
                    spreads = maker is not None and maker.op.forward in SPREAD and able(maker) and able(node)
                    if maker is None or not (spreads and alone) or maker in found.over:
                        continue
                    part = canonical(maker.inputs[0])
                    like = inputs[one].shape == out.shape and inputs[one].dtype == out.dtype == part.dtype
                    if like and dies(inputs[one], place) and others_apart(inputs[one], [part]):
                        if not _unwritten(part, maker, place, order, found, lies_in):
                            continue
                        base = inputs[one]
                        found.spread[node] = maker
                        found.left_out.add(maker)
                        last[states.get(part, part)] = max(last[states.get(part, part)], place)
                        break
            if base is not None:
                found.over[node] = base
                memory[out] = lies_in(base)
    return found


def _unwritten(
    part: Value,
    maker: Node,
    place: int,
    order: Sequence[Collection[Node]],
    found: InPlace,
    lies_in: Callable[[Value], Value],
) -> bool:
    """Whether nothing writes over `part` between the node that would have read it and the sum that does."""
    for nodes in reversed(order[max(place - NEAR, 0) : place]):
        if maker in nodes:
            return True
        if any(node in found.over and lies_in(found.over[node]) is lies_in(part) for node in nodes):
            return False
    return False
