"""What a step holds at each moment, and what its operations cost: the reckoning that recomputation goes by.

It is rough: bytes that are moved, multiplications, elements of functions that take longer than the way to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload

from ...tape import Node, Value
from ..data import VIEWS, Frozen, sized_by_elements
from .in_place import WRITES

__all__ = ["Timeline", "bytes_of", "pointwise", "seconds"]

aten = torch.ops.aten

#: Besides element-wise operations and views: those that cost about as much as reading and writing their arguments.
CHEAP: set[Any] = {
    aten.clone.default, aten._to_copy.default, aten.copy.default, aten.cat.default, aten.stack.default,
    aten.constant_pad_nd.default, aten.embedding.default, aten.index_select.default, aten.repeat.default,
    aten.native_layer_norm.default, aten.native_group_norm.default, aten._softmax.default, aten._log_softmax.default,
    aten.native_batch_norm.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit_no_training.default,
}  # fmt: skip

#: Element-wise operations that take longer than the way to memory.
SLOW = "acos asin atan cos elu erf exp gelu log mish pow selu sigmoid silu sin soft tan xlogy".split()

MOVED, MULTIPLIED, WORKED = 2e10, 5e10, 3e9  # bytes, multiplications and slow elements a second, about


class Timeline:
    """A list of nodes as the choice sees it: in whose memory values lie, and from where to where these are needed.

    Attributes:
        turn: the place of the first node of the sweep.
        makers: the place of the node that makes a value.
        held: the bytes that are held while a node runs, for each.
        reads: the places at which a value, or a view of it, is read.
    """

    def __init__(
        self,
        nodes: list[Node],
        frozen: Frozen,
        wanted: Collection[Value],
        folded: Collection[Node],
        looks_into: Callable[[Node], bool],
        inside: Collection[Value],
    ) -> None:
        self.nodes, self.canonical, self.folded, self.inside = nodes, frozen.canonical, folded, inside
        self.looks_into = looks_into
        recorded = set(frozen.forward)
        self.turn = max((i + 1 for i, node in enumerate(nodes) if node in recorded), default=0)
        self.makers: dict[Value, int] = {}
        self.roots: dict[Value, Value] = {}
        self.reads: dict[Value, list[int]] = {}
        self.pinned: set[Value] = set()  # what must stay as it is
        self.written: set[Value] = set()  # what a later write may lie in the memory of
        self.unseen: list[int] = []  # the places of code that is not seen
        for place, node in enumerate(nodes):
            given = [self.canonical(v) for v in node.inputs]
            unseen = node.op.is_named and node.op not in VIEWS and node.result is None
            viewed = bool(given) and node not in folded and looks_into(node)
            for value in given:
                self.reads.setdefault(self.root(value), []).append(place)
            if node.op in VIEWS or node.op.forward in WRITES:
                self.written.update(map(self.root, given[:1]))
            if unseen or (viewed and len({*given}) > 1):
                self.pinned.update(map(self.root, given))
            if unseen:
                self.unseen.append(place)
            for value in map(self.canonical, node.outputs):
                self.makers[value] = place
                if viewed:
                    self.roots[value] = self.root(given[0])
                if unseen:
                    self.pinned.add(self.root(value))
        self.kept = {self.root(value) for value in wanted}
        self.last = {value: max(places) for value, places in self.reads.items()}
        self.last.update((value, len(nodes) - 1) for value in self.kept)
        self.held = self.holds(range(len(nodes)), self.last)

    def root(self, value: Value) -> Value:
        """The value in whose memory one lies."""
        return self.roots.get(value, value)

    def bytes(self, value: Value) -> int:
        """What a value takes that has memory of its own, and is not there anyway."""
        return 0 if value in self.inside or not self.passing(value) else bytes_of(value)

    def passing(self, value: Value) -> bool:
        """Whether a value is made on each replay."""
        return value in self.makers and self.nodes[self.makers[value]] not in self.folded

    def holds(self, places: Sequence[int], last: Mapping[Value, int] | None = None) -> torch.Tensor:
        """The bytes of what some nodes make that are held while each of them runs, one after the other.

        `last` says which of them a value, or a view of it, is read by last; without it, what others read counts not.
        """
        if last is None:
            read = [(self.root(self.canonical(v)), i) for i, p in enumerate(places) for v in self.nodes[p].inputs]
            last = {value: i for value, i in read if self.makers.get(value) in places}
        change = [0] * (len(places) + 1)
        for i, node in enumerate(self.nodes[place] for place in places):
            for value in {self.canonical(v) for v in node.outputs} - self.roots.keys():
                size, stop = self.bytes(value), last.get(value, i)
                over = pointwise(node) and any(
                    last.get(root) == i and self.bytes(root) == size > 0
                    for root in {self.root(self.canonical(v)) for v in node.inputs}
                )
                change[min(i + over, stop)] += size  # else it is written where an operand lies
                change[stop + 1] -= size
        return torch.tensor(change[:-1], dtype=torch.int64, device="cpu").cumsum(0)

    def can(self, node: Node) -> bool:
        """Whether a node may be run again, and costs little."""
        forward = node.op.forward
        if node.random or node.result is not None or node.op.is_named or node in self.folded:
            return False
        if not isinstance(forward, OpOverload) or not forward._schema.name.startswith("aten::"):
            return False
        if forward._schema.is_mutable or sized_by_elements(node):
            return False
        return forward in CHEAP or pointwise(node) or self.is_view(node)

    def is_view(self, node: Node) -> bool:
        """Whether a node of the forward pass makes views of one value."""
        roots = {self.root(self.canonical(v)) for v in node.outputs}
        return bool(node.outputs) and all(self.canonical(v) in self.roots for v in node.outputs) and len(roots) == 1

    def candidates(self, least: int) -> list[Value]:
        """The values of the forward pass that the sweep reads, and that can be computed again."""
        found = []
        for value, place in self.makers.items():
            swept = place < self.turn <= self.last.get(value, 0)
            fixed = value in self.kept or value in self.pinned or value in self.roots or value in self.inside
            if swept and not fixed and self.bytes(value) >= least and self.can(self.nodes[place]):
                found.append(value)
        return found

    def first(self, value: Value) -> int:
        """The place at which the sweep reads a value first."""
        return next(place for place in self.reads[value] if place >= self.turn)


def bytes_of(value: Value) -> int:
    """The bytes of a value in memory."""
    steps = value.strides or (1,) * value.ndim
    return prod(n for n, step in zip(value.shape, steps, strict=True) if step or not n) * value.itemsize


def pointwise(node: Node) -> bool:
    """Whether a node works element by element."""
    return torch.Tag.pointwise in getattr(node.op.forward, "tags", ())


def seconds(node: Node) -> float:
    """The seconds that a node takes, about."""
    name, out = node.op.name, node.outputs[0].numel() if node.outputs else 0
    moved = sum(map(bytes_of, (*node.inputs, *node.outputs))) / MOVED
    if pointwise(node):
        slow = any(name.startswith(each) or f"_{each}" in name for each in SLOW) or name.startswith("tanh")
        return moved + slow * out / WORKED
    if "convolution" in name and len(node.inputs) > 1:
        weight = node.inputs[2 if "backward" in name else 1]
        pixels = node.inputs[0] if "backward" in name else node.outputs[0]
        turns = len(node.outputs) if "backward" in name else 1
        return moved + min(turns, 2) * pixels.numel() * prod(weight.shape[1:]) / MULTIPLIED
    if "mm" in name and len(node.inputs) > 1 and node.inputs[-1].ndim > 1:
        return moved + out * node.inputs[-1].shape[-2] / MULTIPLIED
    return moved
