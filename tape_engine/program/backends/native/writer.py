"""The replay function of the native backend: straight-line Python, with calls of segments among those of torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ....tape import Node, Value
from ...buffers import overlapping
from ...calls import Call
from ...data import Frozen
from ...passes import find_in_place
from ...passes.recompute import large
from ..python import _Writer
from ..source import Name, Source
from . import large as large_products
from . import objects, recurrent
from .compiler import compiled
from .machine import Unfit, dense
from .plan import Part, Plan, planned
from .segment import Loop, Segment

__all__ = ["Told", "generate"]

PAYS = 6  # operations in a segment, on the average, from which on it is worth its call

IN_PLACE = 1 << 14  # elements of a value from which on a write to a part of it, in its memory, is left to torch


@dataclass
class Told:
    """What a plan comes to, for `print(program)`."""

    nodes: int = 0
    segments: int = 0
    loops: int = 0
    torch: int = 0
    products: int = 0
    lstms: int = 0
    seconds: float = 0.0
    bytes: int = 0
    compiled: int = 0
    kernels: int = 0

    @property
    def pays(self) -> bool:
        """Whether a replay gains more than the calls of the segments cost."""
        return self.loops + self.products + self.lstms > 0 or self.nodes >= PAYS * max(self.segments, 1)

    def __str__(self) -> str:
        rows = f", {self.loops} of them by blocks of rows" if self.loops else ""
        made = f"{self.compiled} of {self.kernels} kernels compiled" if self.compiled else f"{self.kernels} kernels"
        counts = (self.products, "large product"), (self.lstms, "LSTM layer")
        large = "".join(f", {count} {what}{'s' * (count > 1)}" for count, what in counts if count)
        return (
            f"{self.nodes} operations in {self.segments} compiled segments{rows}{large}, {self.torch} calls of torch; "
            f"{self.bytes:,} bytes between; {made}, ready in {self.seconds:.2f} s"
        )


class _Poor(Exception):
    """The segments of a plan are not worth their calls."""


def generate(frozen: Frozen, *, with_sweep: bool, always: bool = True) -> tuple[Source, Told] | None:
    """The function that replays a frozen tape, with what it is made of.

    ``None``, before anything was compiled, if it does not pay and is not wanted `always`.
    """
    writer = _Native(frozen, with_sweep, always)
    try:
        source = writer.write()
    except _Poor:
        return None
    return source, writer.told


class _Native(_Writer):
    def __init__(self, frozen: Frozen, with_sweep: bool, always: bool) -> None:
        super().__init__(frozen, with_sweep)
        self.always = always
        self.layers: Callable[[Node], Call | None] | None = None
        self.told = Told()
        self.plan = Plan([*self.nodes], None, frozen.canonical, {})  # as long as there is no other: each by itself
        self.taken: set[Node] = set()  # what the segments do
        self.bound: list[tuple[int, list[Value]]] = []  # for each its place among `views`, and what it is given

    def recompute(self, wanted: set[Value], inside: Collection[Value] = ()) -> None:
        if self.with_sweep and large(self.frozen):
            plan = planned(self.nodes, self.frozen.canonical, wanted, self.folded, self.loose, set())
            made = {self.frozen.canonical(v) for part in plan.parts for node in part.nodes for v in node.outputs}
            super().recompute(wanted, made - {v for part in plan.parts for v in part.outputs})

    def _results(self, wanted: set[Value]) -> set[Value]:
        frozen = self.frozen
        read = wanted | {frozen.canonical(after) for _, after in frozen.writes}
        found = find_in_place(self.order(), frozen.canonical, self.looks_into, read, self.makes)
        parts = [node for node in found.over if node.outputs[0].numel() > IN_PLACE]
        refused = {*parts, *(found.spread[node] for node in parts if node in found.spread)}
        again = self.again.again
        while True:
            self.plan = planned(self.nodes, frozen.canonical, read, self.folded, self.loose, refused, again)
            try:
                self.segments = [self._compiled(part) for part in self.plan.parts]
                break
            except Unfit as error:
                if error.node is None or error.node in refused:
                    raise
                refused.add(error.node)
        self.told.nodes = sum(segment.nodes for segment in self.segments)
        self.told.segments = len(self.segments)
        self.told.loops = sum(any(isinstance(s, Loop) for s in segment.steps) for segment in self.segments)
        self.told.bytes = sum(segment.shared + segment.local for segment in self.segments)
        self.taken = {node for part in self.plan.parts for node in part.nodes}
        left = [node for node in self.nodes if node not in self.taken and node not in self.folded]
        self.told.products = sum(self.way(node).function in large_products.FUNCTIONS for node in left)
        self.told.lstms = sum(self.way(node).function is recurrent.forward for node in left)
        if not (self.always or self.told.pays):
            raise _Poor
        everything = self.nodes
        self.nodes = [node for node in everything if node not in self.taken]
        mine = super()._results(wanted)
        self.nodes = everything
        return mine | {v for part in self.plan.parts for v in part.outputs if v in wanted}

    def way(self, node: Node) -> Call:
        """How a node is called that no segment does."""
        if node not in self.ways:
            if self.layers is None:
                self.layers = recurrent.calls(self.nodes, self.frozen.canonical, self.wanted)
            call = large_products.call_for(node) or self.layers(node)
            if call is not None and self.loose.isdisjoint(map(self.frozen.canonical, node.inputs)):
                self.ways[node] = call
        return super().way(node)

    def order(self) -> list[list[Node]]:
        return [each.nodes if isinstance(each, Part) else [each] for each in self.plan.items]

    def makes(self, node: Node) -> bool:
        return node not in self.taken and super().makes(node)

    def _compiled(self, part: Part) -> Segment:
        return compiled(part, self.plan, {v: _strides(v) for v in (*part.inputs, *part.outputs)})

    def _nodes(self) -> None:
        before, start = objects.loaded().compiled, objects.loaded().seconds
        used: set[str] = set()
        segments = iter(self.segments)
        for item in self.plan.items:
            if isinstance(item, Part):
                segment = next(segments)
                used |= segment.kernels
                self.segment(item, segment)
            else:
                self.node(item)
                ours = self.way(item).function in large_products.FUNCTIONS
                self.told.torch += item not in self.folded and not ours
        self.told.kernels = len(used)
        self.told.compiled = objects.loaded().compiled - before
        self.told.seconds = objects.loaded().seconds - start

    def plan_memory(self) -> None:
        super().plan_memory()
        rooms = set(self.rooms.values())
        for place, values in self.bound:
            roots = [self.life.rooted(value) for value in values]
            moving = [i for i, each in enumerate(roots) if any(self.places.get(root) in rooms for root in each)]
            title, bind, args, _ = self.views[place]
            self.views[place] = title, bind, args, {"moving": moving}

    def segment(self, part: Part, segment: Segment) -> None:
        """The line that runs a segment."""
        names = [self.name(v) for v in part.inputs]
        fixed = [v in self.static for v in part.inputs]
        for value in part.outputs:
            names.append(self.target(value, "v"))
            fixed.append(value not in self.mine)
        addresses = objects.load(segment.kernels)
        title = self.unused("native")
        arguments = [Name(name) if still else None for name, still in zip(names, fixed, strict=True)]
        self.bound.append((len(self.views), [*part.inputs, *part.outputs]))
        self.views.append((title, segment.bind, (addresses, arguments), {}))
        changing = [name for name, still in zip(names, fixed, strict=True) if not still]
        start = len(self.lines)
        self.lines.append(f"# {_in_words(part.nodes)}")
        self.tell_again(*part.nodes)
        self.lines.append(f"{title}({', '.join(changing)})")
        loops = any(isinstance(step, Loop) for step in segment.steps)
        self.unit("rows" if loops else "segment", start, part.nodes, part.inputs, part.outputs)
        self.tick()


def _strides(value: Value) -> tuple[int, ...]:
    """How the elements of a tensor that stands for a value must lie."""
    if value.strides and not overlapping(value.shape, value.strides):
        return tuple(value.strides)
    return dense(value.shape)


def _in_words(nodes: list[Node]) -> str:
    """What a segment does: ``3 mul, 2 tanh, ...``."""
    counts: dict[str, int] = {}
    for node in nodes:
        name = node.op.name.partition(".")[0]
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items())
