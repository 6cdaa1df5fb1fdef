"""Recomputation: what the sweep can cheaply compute again is not kept from the forward pass until then.

Most of what a step holds at its fullest moment, between the forward pass and the sweep, are values that some rule will
read. A product or a convolution among them is dear; an activation, a normalised value, a cast or a copy costs little
more than the way to memory and back. Where what it was computed from is there anyway when a rule reads it, it is let go
after the forward pass, and computed again by the same operation, on the same values, right before that reading.

Nothing is changed that is not at the fullest moment, and no more is done than a small share of what the step takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload

from ...registry import find
from ...tape import Node, Value
from ..data import VIEWS, Frozen, sized_by_elements
from ..opened import renamed
from .in_place import WRITES

__all__ = ["Recomputed", "large", "recompute"]

aten = torch.ops.aten

FULL = 1 << 22  # bytes that a step holds at its fullest moment, below which nothing is done
LEAST = 1 << 16  # bytes of a value that is worth it
PART = 1 << 8  # what part of the fullest moment a value must be
SHARE = 0.05  # how much of a step's time may be spent, as far as that is known beforehand
LONGEST = 12  # operations that are run again for one value
EVERYTHING = False  # whatever can be computed again is, however little it is worth

#: Besides element-wise operations and views: those that cost about as much as reading and writing their arguments.
CHEAP: set[Any] = {
    aten.clone.default, aten._to_copy.default, aten.copy.default, aten.cat.default, aten.stack.default,
    aten.constant_pad_nd.default, aten.embedding.default, aten.index_select.default, aten.repeat.default,
    aten.native_layer_norm.default, aten.native_group_norm.default, aten._softmax.default, aten._log_softmax.default,
    aten.native_batch_norm.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit_no_training.default,
}  # fmt: skip

#: Batch normalisations that give the mean and the inverse deviation that they found.
NORMS: set[Any] = {
    aten.native_batch_norm.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
}  # fmt: skip

#: Element-wise operations that take longer than the way to memory.
SLOW = "acos asin atan cos elu erf exp gelu log mish pow selu sigmoid silu sin soft tan xlogy".split()

MOVED, MULTIPLIED, WORKED = 2e10, 5e10, 3e9  # bytes, multiplications and slow elements a second, about


@dataclass
class Recomputed:
    """The nodes of a step in which values are computed again.

    Attributes:
        nodes: in the order in which they run.
        again: those that compute again, each with the one whose work it repeats.
        values: what need not be kept.
        spared: how many bytes less the step holds at its fullest moment.
    """

    nodes: list[Node]
    again: dict[Node, Node] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    spared: int = 0

    def computed(self, node: Node) -> list[Value]:
        """Which values a node computes again, as far as they are not kept."""
        return [value for value in self.values if value in self.again[node].outputs]


def recompute(
    nodes: list[Node],
    frozen: Frozen,
    wanted: Collection[Value],
    folded: Collection[Node],
    looks_into: Callable[[Node], bool],
    inside: Collection[Value] = (),
) -> Recomputed:
    """The nodes of a step, with copies of forward ones before those of the sweep that read what they make.

    Args:
        nodes: what has to run, in order: the forward pass, then the sweep.
        frozen: the program.
        wanted: what is read after the last node; it is kept anyway.
        folded: the nodes that run once, when a copy of the program is made.
        looks_into: whether what a node gives lies in memory of what it is given, or may do so.
        inside: values that have no memory of their own.
    """
    if not large(frozen):
        return Recomputed(nodes)
    if EVERYTHING:
        inside = ()
    tape = _Tape(_late_views(nodes, frozen, folded, looks_into), frozen, wanted, folded, looks_into, inside)
    if not EVERYTHING and int(tape.held.max()) < FULL:
        return Recomputed(nodes)
    choice = _Choice(tape)
    if EVERYTHING:
        for value in tape.candidates(0):
            found = choice.plan(value)
            if found is not None:
                choice.take(found)
        return _written(tape, choice)
    full = int(tape.held.max())
    best, count = choice.choose()
    if not count:
        return Recomputed(nodes)
    if count < len(choice.plans):  # the last ones lowered nothing
        choice = _Choice(tape)
        choice.choose(count)
    made = _written(tape, choice)
    made.spared = full - best
    return made


def large(frozen: Frozen) -> bool:
    """Whether the forward pass makes a value that is worth being computed again, and enough in all to fill a step.

    Where it does not, nothing else is looked at: to find out which values look into others takes a while.
    """
    made = [v.nbytes for node in frozen.forward for v in node.outputs]
    return EVERYTHING or (sum(made) >= FULL and max(made, default=0) >= LEAST)


def _late_views(
    nodes: list[Node], frozen: Frozen, folded: Collection[Node], looks_into: Callable[[Node], bool]
) -> list[Node]:
    """The nodes, with the views of the sweep right before what reads them: to make a view is not to read the value."""
    recorded = set(frozen.forward)
    first: dict[Value, Node] = {}
    moved: dict[Node, list[Node]] = {}
    for node in reversed(nodes):
        free = node not in recorded and node not in folded and not node.op.is_named and looks_into(node)
        reader = next((first[v] for v in map(frozen.canonical, node.outputs) if v in first), None)
        if free and reader is not None and len(node.outputs) == 1:
            moved.setdefault(reader, []).append(node)
            first.update((frozen.canonical(v), reader) for v in node.inputs)
        else:
            first.update((frozen.canonical(v), node) for v in node.inputs)
    late = {node for each in moved.values() for node in each}
    return [each for node in nodes if node not in late for each in (*reversed(moved.get(node, ())), node)]


# -- what is held, and what it costs -----------------------------------------------------------------------


class _Tape:
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
        self.held = self._held()

    def root(self, value: Value) -> Value:
        """The value in whose memory one lies."""
        return self.roots.get(value, value)

    def bytes(self, value: Value) -> int:
        """What a value takes that has memory of its own, and is not there anyway."""
        return 0 if value in self.inside or not self.passing(value) else _bytes(value)

    def passing(self, value: Value) -> bool:
        """Whether a value is made on each replay."""
        return value in self.makers and self.nodes[self.makers[value]] not in self.folded

    def _held(self) -> torch.Tensor:
        change = [0] * (len(self.nodes) + 1)
        for value, place in self.makers.items():
            if value in self.roots or not self.passing(value):
                continue
            size, last = self.bytes(value), self.last.get(value, place)
            over = _pointwise(self.nodes[place]) and any(
                self.last.get(root) == place and self.bytes(root) == size > 0
                for root in {self.root(self.canonical(v)) for v in self.nodes[place].inputs}
            )
            change[min(place + over, last)] += size  # else it is written where an operand lies
            change[last + 1] -= size
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
        return forward in CHEAP or _pointwise(node) or self.is_view(node)

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


def _bytes(value: Value) -> int:
    """The bytes of a value in memory."""
    steps = value.strides or (1,) * value.ndim
    return prod(n for n, step in zip(value.shape, steps, strict=True) if step or not n) * value.itemsize


def _pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.op.forward, "tags", ())


def _cost(node: Node) -> float:
    """The seconds that a node takes, about."""
    name, out = node.op.name, node.outputs[0].numel() if node.outputs else 0
    moved = sum(map(_bytes, (*node.inputs, *node.outputs))) / MOVED
    if _pointwise(node):
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


# -- the choice --------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """How a value is computed again.

    Attributes:
        value: which one.
        place: before which node.
        steps: the places of the nodes that are run again, in order.
        uses: the values that have to be there.
        change: from which place to which how many bytes more are held.
        cost: the seconds that it takes.
    """

    value: Value
    place: int
    steps: list[int]
    uses: list[Value]
    change: list[tuple[int, int, int]]
    cost: float


class _Choice:
    """The values that are computed again, found one by one."""

    def __init__(self, tape: _Tape) -> None:
        self.tape = tape
        self.held = tape.held.clone()
        self.last = dict(tape.last)  # where a value is needed last, be it for another that is computed again
        self.plans: dict[Value, _Plan] = {}

    def choose(self, most: int | None = None) -> tuple[int, int]:
        """Lowers what is held at the fullest moment as far as that can be, by `most` values at most.

        Gives the lowest that was reached, and by how many values it was.
        """
        full = int(self.held.max())
        budget = SHARE * sum(
            _cost(n) for n in self.tape.nodes if n not in self.tape.folded and not self.tape.is_view(n)
        )
        candidates = self.tape.candidates(max(LEAST, full // PART))
        candidates.sort(key=lambda value: _cost(self.tape.nodes[self.tape.makers[value]]) / self.tape.bytes(value))
        best, count = full, 0
        while most is None or len(self.plans) < most:
            moment, found = int(self.held.argmax()), None
            for value in candidates:
                if value not in self.plans and self._rests(value) < moment < self.tape.first(value):
                    plan = self.plan(value)
                    if plan is not None and plan.cost <= budget and self._lowers(plan, moment):
                        found = plan
                        break
            if found is None:
                break
            self.take(found)
            budget -= found.cost
            if int(self.held.max()) < best:
                best, count = int(self.held.max()), len(self.plans)
        return best, count

    def _rests(self, value: Value) -> int:
        """The place of the last node of the forward pass that reads a value."""
        places = [place for place in self.tape.reads[value] if place < self.tape.turn]
        return max(places, default=self.tape.makers[value])

    def _lowers(self, plan: _Plan, moment: int) -> bool:
        """Whether less is held at the fullest moment, and nowhere more than there was then."""
        if sum(size for start, stop, size in plan.change if start <= moment < stop) >= 0:
            return False
        grown = [(start, stop) for start, stop, size in plan.change if size > 0 and start < stop]
        if not grown:
            return True
        held = self.held.clone()
        _add(held, plan.change)
        return int(held.max()) <= int(self.held.max())

    def take(self, plan: _Plan) -> None:
        """The value of a plan is computed again."""
        _add(self.held, plan.change)
        self.plans[plan.value] = plan
        for value in plan.uses:
            self.last[value] = max(self.last.get(value, 0), plan.place)
            other = self.plans.get(value)
            if other is not None and other.place > plan.place:
                self._earlier(other, plan.place)

    def _earlier(self, plan: _Plan, place: int) -> None:
        """What another one needs is computed before that."""
        _add(self.held, [(place, plan.place, self.tape.bytes(plan.value))])
        plan.place = place
        for value in plan.uses:
            other = self.plans.get(value)
            if other is not None and other.place > place:
                self._earlier(other, place)

    def plan(self, value: Value) -> _Plan | None:
        """How a value could be computed again; ``None`` if it could not."""
        tape = self.tape
        place = tape.first(value)
        for other in self.plans.values():  # another that is computed from it may be needed before
            if value in other.uses:
                place = min(place, other.place)
        steps: list[int] = []
        uses: dict[Value, None] = {}
        longer: dict[Value, None] = {}
        if not self._steps(value, place, steps, uses, longer, value, set()):
            return None
        if any(steps[0] < unseen < place for unseen in tape.unseen):
            return None  # it may have changed what they read
        size = tape.bytes(value)
        change = [(self._rests(value) + 1, place, -size)]
        change += [(self.last.get(each, tape.makers[each]) + 1, place + 1, tape.bytes(each)) for each in longer]
        for each in uses:
            if each in self.plans and self.plans[each].place > place:
                change.append((place, self.plans[each].place, tape.bytes(each)))
        nodes = [tape.nodes[step] for step in steps]
        if not _pointwise(nodes[-1]):
            between = [sum(map(_bytes, node.outputs)) for node in nodes[:-1] if not tape.is_view(node)]
            change.append((place, place + 1, max(between, default=0)))
        cost = sum(_cost(node) for node in nodes if not tape.is_view(node))
        return _Plan(value, place, steps, list(uses), change, cost)

    def _steps(
        self,
        value: Value,
        place: int,
        steps: list[int],
        uses: dict[Value, None],
        longer: dict[Value, None],
        wanted: Value,
        asked: set[int],
    ) -> bool:
        """Adds the nodes that have to run again for `value` to be there before the node at `place`."""
        tape = self.tape
        root = tape.root(value)
        if not tape.passing(root) or tape.makers[value] in steps:
            return True
        made = tape.makers[value]
        if value is not wanted and (root in self.plans or self.last.get(root, -1) >= place) and root is not wanted:
            uses[root] = None
            return root not in tape.inside
        node = tape.nodes[made]
        if len(steps) < LONGEST and tape.can(node) and made < tape.turn and made not in asked:
            tried, used, lengthened = list(steps), dict(uses), dict(longer)
            below = {*asked, made}
            if all(self._steps(v, place, tried, used, lengthened, wanted, below) for v in _given(node, tape)):
                grows = sum(tape.bytes(each) for each in lengthened if each not in longer)
                if root is wanted or grows < tape.bytes(root):
                    steps[:] = [*tried, made]
                    uses.update(used)
                    longer.update(lengthened)
                    return len(steps) <= LONGEST
        if root is wanted or root in tape.inside or root in tape.written or root in tape.pinned:
            return False
        uses[root] = longer[root] = None
        return True


def _given(node: Node, tape: _Tape) -> list[Value]:
    """What has to be there for a node to run again."""
    given = [tape.canonical(v) for v in node.inputs]
    return [*given, *(tape.canonical(v) for v in node.outputs[1:3])] if _is_line(node) else given


def _add(held: torch.Tensor, change: Iterable[tuple[int, int, int]]) -> None:
    for start, stop, size in change:
        if start < stop:
            held[start:stop] += size


# -- the nodes ---------------------------------------------------------------------------------------------


def _written(tape: _Tape, choice: _Choice) -> Recomputed:
    """The nodes, with those that are run again."""
    canonical = tape.canonical
    made = Recomputed([], values=list(choice.plans))
    copies: dict[Value, Value] = {}

    def run(step: int, known: dict[Value, Value]) -> None:
        """Runs the node at `step` again, on what `known` tells of."""
        node = tape.nodes[step]
        for each in _line(node, known, canonical) if _is_line(node) else [_copied(node, known, canonical)]:
            made.nodes.append(each)
            made.again[each] = node

    def compute(plan: _Plan) -> None:
        if plan.value in copies:
            return
        known = dict[Value, Value]()
        for value in plan.uses:
            if value in choice.plans:
                compute(choice.plans[value])
        for step in plan.steps:
            for value in map(canonical, tape.nodes[step].inputs):
                if value not in known and tape.root(value) in copies:
                    known[value] = there(value)
            run(step, known)
        copies[plan.value] = known[plan.value]

    def there(value: Value) -> Value:
        """The copy of a value whose memory was let go: itself computed again, or a view of that."""
        if value not in copies:
            node = tape.nodes[tape.makers[value]]
            there(canonical(node.inputs[0]))
            run(tape.makers[value], copies)
        return copies[value]

    first: dict[int, list[_Plan]] = {}
    for plan in choice.plans.values():
        first.setdefault(plan.place, []).append(plan)
    for place, node in enumerate(tape.nodes):
        for plan in first.get(place, ()):
            compute(plan)
        if place >= tape.turn and node not in tape.folded:
            given = [canonical(v) for v in node.inputs]
            gone = {v for v in given if tape.root(v) in choice.plans and tape.makers[v] < tape.turn}
            if gone:
                names = {v: there(canonical(v)) for v in node.inputs if canonical(v) in gone}
                node = _with(node, names)
        made.nodes.append(node)
    made.nodes = _read(made.nodes, tape)
    left = set(made.nodes)
    made.again = {node: of for node, of in made.again.items() if node in left}
    return made


def _read(nodes: list[Node], tape: _Tape) -> list[Node]:
    """The nodes without those of the forward pass that only the sweep has read."""
    read = set(tape.kept)
    found = []
    for node in reversed(nodes):
        made = [tape.canonical(v) for v in node.outputs]
        if not tape.can(node) or not read.isdisjoint(made) or any(tape.root(v) in tape.kept for v in made):
            found.append(node)
            read.update(map(tape.canonical, node.inputs))
    return found[::-1]


def _with(node: Node, names: dict[Value, Value]) -> Node:
    """A copy of a node that reads other values."""
    made = copy.copy(node)
    made.args, made.kwargs = renamed(node.args, names), renamed(node.kwargs, names)
    made.inputs = tuple([names.get(v, v) for v in node.inputs])
    return made


def _copied(node: Node, known: dict[Value, Value], canonical: Callable[[Value], Value]) -> Node:
    """The same work on the values that are there, for other values, which `known` gets."""
    made = _with(node, {v: known[canonical(v)] for v in node.inputs if canonical(v) in known})
    made.outputs = tuple([_like(v) for v in node.outputs])
    made.mutates = ()
    known.update(zip(map(canonical, node.outputs), made.outputs, strict=True))
    return made


def _like(value: Value, shape: Iterable[int] | None = None, strides: tuple[int, ...] = ()) -> Value:
    made: Any = object.__new__(Value)
    made.__dict__.update(value.__dict__)
    made.name = f"{value.name}_again" if value.name else None
    if shape is not None:
        made.shape, made.strides, made.name = torch.Size(shape), strides, None
    return made  # type: ignore[no-any-return]


def _is_line(node: Node) -> bool:
    """Whether a node normalises a batch by what it finds in it, and gives that: the rest is ``a * x + b``."""
    if node.op.forward not in NORMS or len(node.outputs) < 3 or node.gaps:
        return False
    training = node.args[3 if node.op.forward is aten._native_batch_norm_legit.no_stats else 5]
    values = [v for v in (*islice(node.args, 3), *node.outputs[:3]) if v is not None]
    kinds = {v.dtype for v in values if isinstance(v, Value)}
    alike = len(kinds) == 1 and kinds <= {torch.float32, torch.float64} and values[0].device.type == "cpu"
    return bool(training) and alike and values[0].ndim > 1 and _rounds_alike(*kinds)


@cache
def _rounds_alike(dtype: torch.dtype) -> bool:
    """Whether a batch normalisation and ``addcmul`` have the same bits, as torch is built for this processor.

    Another rounding would do harm: the gradient of ``amax`` asks which elements are equal to the largest.
    """
    flat = torch.arange(4 * 7 * 99, dtype=dtype, device="cpu").sin_() * 3 + 1
    weight, bias = flat[:7] + 0.3, flat[7:14]
    for x in (flat.view(4, 7, 99), flat.view(4, 9, 11, 7).permute(0, 3, 1, 2), flat.view(4 * 99, 7)):
        out, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
        a = inverse * weight
        b = torch.addcmul(bias, mean, a, value=-1)
        lies = (1, 7, *[1] * (x.ndim - 2))
        if not torch.equal(out, torch.addcmul(b.view(lies), x, a.view(lies))):
            return False
    return True


def _line(node: Node, known: dict[Value, Value], canonical: Callable[[Value], Value]) -> list[Node]:
    """A batch normalisation by the mean and the inverse deviation that were found, as ATen's own loop does it."""
    x, weight, bias = (known.get(canonical(v), v) if isinstance(v, Value) else None for v in node.args[:3])
    mean, inverse = node.outputs[1:3]
    steps: list[Node] = []

    def step(overload: Any, args: tuple[Any, ...], out: Value, **kwargs: Any) -> Value:
        made = copy.copy(node)
        made.op, made.args, made.kwargs = find(overload), args, kwargs
        made.inputs, made.outputs = tuple([v for v in args if isinstance(v, Value)]), (out,)
        made.outputs_tuple, made.mutates = False, ()
        steps.append(made)
        return out

    def small() -> Value:
        return _like(mean, mean.shape, (1,))

    assert x is not None
    lies = [1, mean.shape[0], *[1] * (x.ndim - 2)]

    def across(value: Value) -> Value:
        return step(aten.view.default, (value, lies), _like(mean, lies, (mean.shape[0], *[1] * (x.ndim - 1))))

    a = inverse if weight is None else step(aten.mul.Tensor, (inverse, weight), small())
    if bias is None:
        b = step(aten.neg.default, (step(aten.mul.Tensor, (mean, a), small()),), small())
    else:
        b = step(aten.addcmul.default, (bias, mean, a), small(), value=-1)
    out = step(aten.addcmul.default, (across(b), x, across(a)), _like(node.outputs[0]))
    known[canonical(node.outputs[0])] = out
    return steps
