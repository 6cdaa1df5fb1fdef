"""Which nodes the kernels take, in which order everything runs, and which work goes by blocks of rows.

Nodes that the kernels cannot do, or that are a call of their own (large products), stay out, in their order. The
others gather in segments between them: a segment costs one call from Python, so there should be few.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ....tape import Node, Value
from ...data import VIEWS
from ...passes.layout import looked_beyond
from .lowering import FILLS, Constants, Lowering
from .machine import GIVEN, KIND, Memory, Place, Unfit, dense
from .ops import LOWERED
from .rows import ADDED, PRODUCTS, RESHAPED, TURNED, Rows

__all__ = ["Part", "Plan", "levels_of", "planned"]

aten = torch.ops.aten

FLAT = 1 << 16  # elements up to which one thread's loop is no worse than torch
PRODUCT = 1 << 16  # multiplications of a product, likewise
ROWS = 512  # rows from which on blocks are thought of
ROW_BYTES = 1 << 18  # bytes of values with rows from which on they pay
SAVED = 1.45  # how many times more bytes its operations would move, one by one, for a part with rows to pay
ROW_WORK = 24  # multiplications for each number read, above which torch's own products are better
LEAST = 3  # nodes for which a segment is worth its call

TURNS = 8  # how often nodes of poor segments go back to torch, which may leave others poor

#: Operations that move nothing: their results are views.
FREE = TURNED | RESHAPED | {aten.expand.default, aten.select.int, aten.slice.Tensor}


@dataclass
class Part:
    """A run of nodes for one segment: what it reads from outside, and what is read of it there."""

    nodes: list[Node]
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    @property
    def working(self) -> int:
        """How many of its nodes compute something."""
        return sum(node.op.forward not in FREE for node in self.nodes)


@dataclass
class Plan:
    """What runs, in order: nodes of torch's, and parts for the kernels."""

    items: list[Node | Part]
    rows: Rows | None
    canonical: Callable[[Value], Value]
    constants: dict[Value, Any]

    @property
    def parts(self) -> list[Part]:
        return [each for each in self.items if isinstance(each, Part)]


def planned(
    nodes: Sequence[Node],
    canonical: Callable[[Value], Value],
    wanted: set[Value],
    folded: set[Node],
    loose: set[Value],
    refused: set[Node],
    again: Mapping[Node, Node] | None = None,
) -> Plan:
    """The plan for the nodes of a program.

    Args:
        nodes: what has to run, in order.
        canonical: gives the value that stands for a value.
        wanted: values that are read after the last node.
        folded: the nodes that run once, when a copy of the program is made.
        loose: values whose shapes may differ.
        refused: nodes that turned out not to fit the kernels, as their arguments lie in memory.
        again: nodes that compute something again, each with the one whose work it repeats: they must not do so
            earlier than they stand, nor in another way than that did.
    """
    again = again or {}
    refused = {*refused, *looked_beyond(nodes, canonical)}
    constants = {
        canonical(node.outputs[0]): FILLS[node.op.forward](node) for node in folded if node.op.forward in FILLS
    }
    constants = {v: number for v, number in constants.items() if isinstance(number, (bool, int, float))}
    tried: dict[Any, tuple[bool, bool]] = {}

    def fit(node: Node) -> bool:
        if node in folded:
            return canonical(node.outputs[0]) in constants
        return node not in refused and _fits(node, canonical, loose, tried)[0]

    count = _row_count(nodes)
    rows = None
    if count is not None:
        rows = Rows(count, nodes, canonical, lambda node: fit(node) and not _heavy(node))
        if not _worth(rows, nodes, canonical):
            rows = None
    by_rows = rows.nodes if rows else set()
    free = (n for n in nodes if n not in folded)
    mine = {n for n in free if n in by_rows or (n not in refused and all(_fits(n, canonical, loose, tried)))}
    users: dict[Value, set[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            users.setdefault(canonical(value), set()).add(node)
    same = _same_work(nodes, again)
    for turn in itertools.count():
        poor = [node for each in same if not mine.issuperset(each) for node in each]
        mine.difference_update(poor)
        if rows:
            rows.nodes.difference_update(poor)
        plan = Plan(_ordered(nodes, mine, folded, canonical, again), rows, canonical, constants)
        poor = []
        for part in plan.parts:
            if part.working < LEAST or not _saves(part, plan, wanted, users):
                poor += part.nodes
            else:  # a view for torch alone is a copy in a part
                poor += [n for n in part.nodes if _large(n) and n.op.forward in FREE and _outside(n, part, plan, users)]
        if not poor or turn == TURNS:
            break
        mine.difference_update(poor)
        if rows:
            rows.nodes.difference_update(poor)
    readers = _readers(plan)
    for place, item in enumerate(plan.items):
        if isinstance(item, Part):
            _rim(place, item, plan, wanted, readers)
    return plan


def _same_work(nodes: Sequence[Node], again: Mapping[Node, Node]) -> list[set[Node]]:
    """The nodes that compute one thing: the kernels do all of them, or none.

    Torch rounds otherwise than they do. A value that is computed again has to have the bits that it had: the gradient
    of ``amax`` asks which elements are equal to the largest, and divides by how many there are.
    """
    found: dict[Node, set[Node]] = {}
    there = set(nodes)
    for node, of in again.items():
        if node.op.forward not in FREE:
            another = node.op is not of.op  # what torch's loop does in one is left to torch
            found.setdefault(of, {of} if of in there or another else set()).add(node)
    return list(found.values())


# -- which nodes -------------------------------------------------------------------------------------------------


def _fits(
    node: Node, canonical: Callable[[Value], Value], loose: set[Value], tried: dict[Any, tuple[bool, bool]]
) -> tuple[bool, bool]:
    """Whether the kernels can do a node, tried on tensors that lie in order, and whether it is small."""
    if len(node.outputs) != 1 or node.random or node.result is not None or node.op.forward not in LOWERED:
        return False, False
    values = [*node.inputs, *node.outputs]
    if loose and not loose.isdisjoint(map(canonical, values)):
        return False, False
    told = _told(node.kwargs) if node.kwargs else ()
    key = (node.op, _told(node.args), told, *[(v.dtype, v.shape, v.device, len(v.strides)) for v in values])
    if key not in tried:
        for value in values:
            strided = value.ndim == 0 or len(value.strides) == value.ndim
            if value.dtype not in KIND or value.device.type != "cpu" or not strided:
                tried[key] = False, False
                return tried[key]
        at = Lowering(canonical, Constants())
        for value in node.inputs:
            shape = tuple(value.shape)
            at.places[canonical(value)] = Place(Memory(GIVEN), KIND[value.dtype], shape, dense(shape))
        try:
            at.lower(node)
            tried[key] = True, _small(node)
        except (Unfit, TypeError, ValueError, IndexError, KeyError, AttributeError, ZeroDivisionError):
            tried[key] = False, False  # arguments of a form that its function does not know
    return tried[key]


def _told(argument: Any) -> Any:
    """The arguments that are not tensors, such that they can be compared."""
    if isinstance(argument, Value):
        return Value
    if isinstance(argument, dict):
        return tuple((name, _told(each)) for name, each in argument.items())
    if isinstance(argument, (list, tuple)):
        return tuple(_told(each) for each in argument)
    return type(argument), repr(argument)


def _small(node: Node) -> bool:
    if any(v.numel() > FLAT for v in (*node.inputs, *node.outputs)) and node.op.forward not in FREE:
        return False
    return _work(node) <= PRODUCT


def _sides(node: Node) -> tuple[Value, Value] | None:
    """The factors of a product."""
    if node.op.forward in PRODUCTS:
        return node.inputs[0], node.inputs[1]
    return (node.inputs[1], node.inputs[2]) if node.op.forward in ADDED else None


def _work(node: Node) -> int:
    """The multiplications of a product."""
    sides = _sides(node)
    return 0 if sides is None else int(node.outputs[0].numel() * sides[0].shape[-1])


def _heavy(node: Node) -> bool:
    """Whether a product has so much to do for each number that it reads that torch's own is better."""
    sides = _sides(node)
    if sides is None:
        return False
    moved = sum(v.numel() for v in (*sides, node.outputs[0]))
    return _work(node) > ROW_WORK * max(moved, 1)


def _row_count(nodes: Sequence[Node]) -> int | None:
    """The number of rows that most bytes have."""
    weights: dict[int, int] = {}
    seen: set[Value] = set()
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value in seen or value.ndim == 0:
                continue
            seen.add(value)
            for n in {*value.shape}:
                if n >= ROWS:
                    weights[n] = weights.get(n, 0) + value.nbytes
    best = max(weights, key=lambda n: (weights[n], n), default=None)
    return best if best is not None and weights[best] >= ROW_BYTES else None


def _worth(rows: Rows, nodes: Sequence[Node], canonical: Callable[[Value], Value]) -> bool:
    working = [n for n in nodes if n in rows.nodes and n.op.forward not in FREE]
    values = {canonical(v) for n in working for v in (*n.inputs, *n.outputs) if canonical(v) in rows.dims}
    return len(working) >= LEAST and sum(v.nbytes for v in values) >= ROW_BYTES


def _saves(part: Part, plan: Plan, wanted: set[Value], users: dict[Value, set[Node]]) -> bool:
    """Whether large operations of a part move much less as one: torch writes where an operand lies, a part does not."""
    canonical, large = plan.canonical, list(filter(_large, part.nodes))
    if plan.rows is None or not large:
        return True
    mine, made = set(part.nodes), {canonical(v) for node in part.nodes for v in node.outputs}
    read = {canonical(v) for node in part.nodes for v in node.inputs} - made
    given = {v for v in made if v in wanted or not users.get(v, set()) <= mine}
    alone = sum(v.nbytes for n in part.nodes if n.op.forward not in FREE for v in (*n.inputs, *n.outputs))
    return alone >= SAVED * sum(v.nbytes for v in read | given)


def _large(node: Node) -> bool:
    return any(v.numel() > FLAT for v in (*node.inputs, *node.outputs))


def _outside(node: Node, part: Part, plan: Plan, users: dict[Value, set[Node]]) -> bool:
    """Whether what a node gives is read, and by none of its part."""
    read = {user for value in node.outputs for user in users.get(plan.canonical(value), ())}
    return bool(read) and read.isdisjoint(part.nodes)


# -- in which order ------------------------------------------------------------------------------------------------


def _ordered(
    nodes: Sequence[Node],
    mine: set[Node],
    folded: set[Node],
    canonical: Callable[[Value], Value],
    again: Collection[Node],
) -> list[Node | Part]:
    """As few parts as there can be, between nodes of torch's that keep their order."""
    made: dict[Value, tuple[int, bool]] = {}
    phases: dict[int, tuple[list[Node], list[Node]]] = {}  # the nodes of the part, and torch's after it
    reached, barrier, last = 0, 0, 0
    effects: set[int] = set()  # phases at whose ends there may be some
    for node in nodes:
        native = node in mine
        phase = barrier
        for value in node.inputs:
            of, was = made.get(canonical(value), (0, True))
            phase = max(phase, of + (native and not was))
        if node in again:
            phase = max(phase, reached + native)
        if not native and node not in folded:
            if node.op.is_named and node.op not in VIEWS and node.result is None:  # it may have effects of its own
                phase = max(phase, last)
                barrier = phase + 1
                effects.add(max(phase, reached))
            reached = phase = max(phase, reached)
        for value in node.outputs:
            made[canonical(value)] = (0, True) if node in folded else (phase, native)
        if node not in folded:
            last = max(last, phase)
            phases.setdefault(phase, ([], []))[not native].append(node)
    _delay(phases, nodes, canonical, effects)
    items: list[Node | Part] = [node for node in nodes if node in folded]
    for _, (ours, torchs) in sorted(phases.items()):
        items += [Part(ours), *torchs] if ours else torchs
    return items


def _delay(
    phases: dict[int, tuple[list[Node], list[Node]]],
    nodes: Sequence[Node],
    canonical: Callable[[Value], Value],
    effects: set[int],
) -> None:
    """Moves what would be a poor part to the parts that read it, where these alone do, and no effect lies between."""
    of = {node: phase for phase, (ours, _) in phases.items() for node in ours}
    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            readers.setdefault(canonical(value), []).append(node)
    for phase in sorted(phases):
        ours = phases[phase][0]
        if sum(node.op.forward not in FREE for node in ours) >= LEAST:
            continue
        for node in reversed(ours):
            then = [of.get(each, -1) for value in node.outputs for each in readers.get(canonical(value), ())]
            if then and min(then) > phase and not effects.intersection(range(phase, min(then))):
                of[node] = min(then)
        for later in {of[node] for node in ours} - {phase}:
            moved = [node for node in ours if of[node] == later]
            phases[later][0][:0] = moved
        phases[phase][0][:] = [node for node in ours if of[node] == phase]


def _readers(plan: Plan) -> dict[Value, set[int]]:
    """For each value the items of a plan that read it, by their places."""
    found: dict[Value, set[int]] = {}
    for i, item in enumerate(plan.items):
        for node in item.nodes if isinstance(item, Part) else (item,):
            for value in node.inputs:
                found.setdefault(plan.canonical(value), set()).add(i)
    return found


def _rim(place: int, part: Part, plan: Plan, read: set[Value], readers: dict[Value, set[int]]) -> None:
    """What a part reads from outside, and what is read of it there, or from loop to loop; `read` are results."""
    canonical = plan.canonical
    made = dict.fromkeys(canonical(v) for node in part.nodes for v in node.outputs)
    inputs = {canonical(v): None for node in part.nodes for v in node.inputs}
    part.inputs = [v for v in inputs if v not in made and v not in plan.constants]
    crossing: set[Value] = set()
    levels = levels_of(part, plan)
    makers = {canonical(v): node for node in part.nodes for v in node.outputs} if plan.rows else {}
    for node in part.nodes if plan.rows else ():
        for value in node.inputs:
            source = canonical(value)
            maker = makers.get(source)
            if maker is None or not plan.rows or source not in plan.rows.dims:
                continue
            here, there = levels[node], levels[maker]
            if there >= 0 and here != there and (here % 2 or there % 2):
                crossing.add(source)  # a block reads its rows from a tensor, whose register moves on
    inside = {place}
    part.outputs = [v for v in made if v in read or v in crossing or not readers.get(v, inside) <= inside]


def levels_of(part: Part, plan: Plan) -> dict[Node, int]:
    """For each node the step in which it runs: flat ones are even, loops odd; -1 for views of what is outside."""
    rows, canonical = plan.rows, plan.canonical
    if rows is None:
        return dict.fromkeys(part.nodes, 0)
    levels: dict[Node, int] = {}
    makers: dict[Value, Node] = {}
    for node in part.nodes:
        looped = node in rows.nodes
        need = 1 if looped else 0
        free = looped and node.op.forward in FREE
        for value in node.inputs:
            maker = makers.get(canonical(value))
            if maker is None or levels[maker] < 0:
                continue
            free = False
            level = levels[maker]
            if canonical(value) in rows.summed:
                need = max(need, level + (2 if looped else 1))
            elif level % 2:
                need = max(need, level + (not looped))
            else:
                need = max(need, level + looped)
        levels[node] = -1 if free else need
        for value in node.outputs:
            makers[canonical(value)] = node
    return levels
