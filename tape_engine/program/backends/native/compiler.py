"""The instructions of a part of a plan: steps in which everything runs, places for every value, blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ....tape import Node, Value
from .lowering import Constants, Lowering
from .machine import GIVEN, ITEM, KIND, LOCAL, Code, Memory, Place
from .plan import FREE, Part, Plan, levels_of
from .rows import Rows
from .segment import Loop, Segment
from .team import threads

__all__ = ["compiled"]

CACHE = 320 << 10  # bytes that a block of rows may take: what a core has for itself
SMALLEST = 16  # rows of a block


def compiled(part: Part, plan: Plan, strides: dict[Value, tuple[int, ...]]) -> Segment:
    """The segment of a part: its instructions, on memory that is laid out.

    Args:
        part: a part of a plan.
        plan: that plan.
        strides: of the tensors that stand for the part's inputs and outputs.
    """
    return _Compiler(part, plan, strides).compile()


class _Compiler:
    def __init__(self, part: Part, plan: Plan, strides: dict[Value, tuple[int, ...]]) -> None:
        self.part, self.plan = part, plan
        self.canonical = plan.canonical
        self.constants = Constants()
        self.given: dict[Value, Place] = {}
        self.sliding: dict[Value, Place] = {}  # the same tensors by registers that move on with the rows
        values = [*part.inputs, *part.outputs]
        for i, value in enumerate(values):
            self.given[value] = Place(Memory(GIVEN + i), KIND[value.dtype], tuple(value.shape), strides[value])
        if plan.rows:
            rowed = [value for value in values if value in plan.rows.dims]
            for i, value in enumerate(rowed, GIVEN + len(values)):
                self.sliding[value] = replace(self.given[value], memory=Memory(i, moves=True))
        self.outputs = {*part.outputs}
        self.threads = threads()
        self.known: dict[Value, Place] = {}  # values in the arena, or given

    def compile(self) -> Segment:
        levels = levels_of(self.part, self.plan)
        steps: list[Code | Loop] = []
        for value in self.part.inputs:
            self.known[value] = self.given[value]
        views = [node for node in self.part.nodes if levels[node] < 0]
        for level in range(max(levels.values(), default=-1) + 1):
            nodes = [node for node in self.part.nodes if levels[node] == level]
            if nodes:
                steps.append(self.loop(nodes, views) if level % 2 else self.flat(nodes, views))
        if any(self.canonical(node.outputs[0]) in self.outputs for node in views):
            steps.append(self.flat(views, []))
        segment = Segment(
            [step for step in steps if isinstance(step, Loop) or len(step)],
            self.constants,
            self.part.working,
            [self.given[v].strides for v in (*self.part.inputs, *self.part.outputs)],
            len(self.part.inputs),
            len(self.sliding),
        )
        segment.lay_out()
        return segment

    def constant(self, value: Value, shape: Sequence[int]) -> Place:
        kind = KIND[value.dtype]
        number = self.plan.constants[value]
        cast: Any = {"b": bool, "l": int}.get(kind, float)
        return self.constants.place(cast(number), kind).expanded(shape)

    def flat(self, nodes: Sequence[Node], views: Sequence[Node]) -> Code:
        at = Lowering(self.canonical, self.constants)
        at.places = {**self.known}
        if views is not nodes:
            for node in self.needed(nodes, views):
                at.lower(node)
        at.wanted = {v: self.given[v] for v in self.outputs}
        for node in nodes:
            for value in map(self.canonical, node.inputs if self.plan.constants else ()):
                if value in self.plan.constants and value not in at.places:
                    at.places[value] = self.constant(value, value.shape)
            at.lower(node)
        self.known.update((v, at.places[v]) for node in nodes for v in map(self.canonical, node.outputs))
        return at.code

    def needed(self, nodes: Sequence[Node], views: Sequence[Node]) -> list[Node]:
        """The views, of tensors from outside, that nodes read."""
        needed = {self.canonical(v) for node in nodes for v in node.inputs}
        for node in reversed(views):
            if self.canonical(node.outputs[0]) in needed:
                needed.update(self.canonical(v) for v in node.inputs)
        return [node for node in views if self.canonical(node.outputs[0]) in needed]

    def loop(self, nodes: Sequence[Node], views: Sequence[Node]) -> Loop:
        rows = self.plan.rows
        assert rows is not None
        views = self.needed(nodes, views)
        block = self.block_size(nodes, rows)
        body = self.block([*views, *nodes], block, None)
        rest = self.block([*views, *nodes], rows.count % block, body)
        first, start, merge, finish = Code(), Code(), Lowering(self.canonical, self.constants), Code()
        finishing = Lowering(self.canonical, self.constants)
        for value, total in body.totals.items():
            kind = total.place.kind
            into = self.given.get(value) if value in self.outputs else None
            if into is None:
                into = merge.scratch(kind, total.place.shape)
            into = Place(into.memory, kind, total.place.shape, _unreduced(into, total.place))
            begin = self.constants.place(total.start, kind)
            first.map(f"copy_{kind}", into, begin)
            start.map(f"copy_{kind}", total.place, begin)
            merge.map(total.name, into, total.place, gathers=True)
            if total.divisor is not None:
                finishing.map("div", into, into, self.constants.place(total.divisor, kind))
            self.known[value] = into
        finish = finishing.code
        for value in self.outputs:
            if value in rows.dims and any(value in map(self.canonical, node.outputs) for node in nodes):
                self.known[value] = self.given[value]
        touched = {m.register for code in (body.code, rest.code) for m in code.memories()}
        moving = [
            (
                place.memory.register,
                self.given[value].memory.register,
                place.strides[rows.dims[value]] * ITEM[place.kind],
            )
            for value, place in self.sliding.items()
            if place.memory.register in touched
        ]
        return Loop(rows.count, block, first, start, body.code, rest.code, merge.code, finish, moving)

    def block(self, nodes: Sequence[Node], block: int, before: Lowering | None) -> Lowering:
        """The instructions for a block of rows."""
        rows = self.plan.rows
        assert rows is not None
        at = Lowering(self.canonical, self.constants, rows=rows.dims, block=block, summed=rows.summed, register=LOCAL)
        if before is not None:
            at.totals = before.totals
        for value, place in self.known.items():
            place = self.sliding.get(value, place)
            at.places[value] = replace(place, shape=at.shape(value))
        for value in self.outputs:
            if value in rows.dims:
                at.wanted[value] = replace(self.sliding[value], shape=at.shape(value))
        if not block:
            return at
        for node in nodes:
            for value in {self.canonical(v) for v in node.inputs}:
                if value in self.plan.constants and value not in at.places:
                    at.places[value] = self.constant(value, at.shape(value))
            at.lower(node)
        return at

    def block_size(self, nodes: Sequence[Node], rows: Rows) -> int:
        """How many rows go through at once: what fits in cache, and leaves each thread its share."""
        values = {self.canonical(v) for node in nodes for v in (*node.inputs, *node.outputs)}
        values -= {self.canonical(v) for node in self.part.nodes if node.op.forward in FREE for v in node.outputs}
        per_row = sum(v.nbytes for v in values if v in rows.dims and v not in self.plan.constants) // rows.count
        block = SMALLEST
        while block < 1024 and 2 * block * per_row <= CACHE:
            block *= 2
        share = -(-rows.count // self.threads)
        return min(block, share)


def _unreduced(place: Place, like: Place) -> tuple[int, ...]:
    return place.strides if place.shape == like.shape else like.strides
