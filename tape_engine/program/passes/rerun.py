"""The nodes of a step with those among them that run again, on the same values, for values that were let go.

A batch normalisation has found the mean and the deviation of its batch before: of that only the line ``a * x + b`` is
run again, as ATen's own loop does it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import torch

from ...registry import find
from ...tape import Node, Value
from ..opened import renamed
from .cost import Timeline

__all__ = ["Recomputed", "Rerun", "needed", "rerun"]

aten = torch.ops.aten

#: Batch normalisations that give the mean and the inverse deviation that they found.
NORMS: set[Any] = {
    aten.native_batch_norm.default, aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
}  # fmt: skip


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


@dataclass
class Rerun:
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


def needed(node: Node, tape: Timeline) -> list[Value]:
    """What has to be there for a node to run again."""
    given = [tape.canonical(v) for v in node.inputs]
    return [*given, *(tape.canonical(v) for v in node.outputs[1:3])] if _is_line(node) else given


def rerun(tape: Timeline, plans: Mapping[Value, Rerun]) -> Recomputed:
    """The nodes, with those that are run again."""
    canonical = tape.canonical
    made = Recomputed([], values=list(plans))
    copies: dict[Value, Value] = {}

    def run(step: int, known: dict[Value, Value]) -> None:
        """Runs the node at `step` again, on what `known` tells of."""
        node = tape.nodes[step]
        for each in _line(node, known, canonical) if _is_line(node) else [_copied(node, known, canonical)]:
            made.nodes.append(each)
            made.again[each] = node

    def compute(plan: Rerun) -> None:
        if plan.value in copies:
            return
        known = dict[Value, Value]()
        for value in plan.uses:
            if value in plans:
                compute(plans[value])
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

    first: dict[int, list[Rerun]] = {}
    for plan in plans.values():
        first.setdefault(plan.place, []).append(plan)
    for place, node in enumerate(tape.nodes):
        for plan in first.get(place, ()):
            compute(plan)
        if place >= tape.turn and node not in tape.folded:
            given = [canonical(v) for v in node.inputs]
            gone = {v for v in given if tape.root(v) in plans and tape.makers[v] < tape.turn}
            if gone:
                names = {v: there(canonical(v)) for v in node.inputs if canonical(v) in gone}
                node = _with(node, names)
        made.nodes.append(node)
    made.nodes = _read(made.nodes, tape)
    left = set(made.nodes)
    made.again = {node: of for node, of in made.again.items() if node in left}
    return made


def _read(nodes: list[Node], tape: Timeline) -> list[Node]:
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
