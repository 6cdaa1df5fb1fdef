"""Recomputation: what the sweep can cheaply compute again is not kept from the forward pass until then.

Most of what a step holds at its fullest moment, between the forward pass and the sweep, are values that some rule will
read. A product or a convolution among them is dear; an activation, a normalised value, a cast or a copy costs little
more than the way to memory and back. Where what it was computed from is there anyway when a rule reads it, it is let go
after the forward pass, and computed again by the same operation, on the same values, right before that reading.

Nothing is changed that is not at the fullest moment, and no more is done than a small share of what the step takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import torch

from ...tape import Node, Value
from ..data import Frozen
from .cost import Timeline, seconds
from .rerun import Recomputed, Rerun, needed, rerun

__all__ = ["large", "recompute"]

FULL = 1 << 22  # bytes that a step holds at its fullest moment, below which nothing is done
LEAST = 1 << 16  # bytes of a value that is worth it
PART = 1 << 8  # what part of the fullest moment a value must be
SHARE = 0.02  # how much of a step's time may be spent, as far as that is known beforehand
LONGEST = 12  # operations that are run again for one value
EVERYTHING = False  # whatever can be computed again is, however little it is worth


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
    tape = Timeline(_late_views(nodes, frozen, folded, looks_into), frozen, wanted, folded, looks_into, inside)
    if not EVERYTHING and int(tape.held.max()) < FULL:
        return Recomputed(nodes)
    choice = _Choice(tape)
    if EVERYTHING:
        for value in tape.candidates(0):
            found = choice.plan(value)
            if found is not None:
                choice.take(found)
        return rerun(tape, choice.plans)
    best, plans = choice.choose()
    if not plans:
        return Recomputed(nodes)
    made = rerun(tape, plans)
    made.spared = int(tape.held.max()) - best
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


# -- the choice --------------------------------------------------------------------------------------------


class _Choice:
    """The values that are computed again, found one by one."""

    def __init__(self, tape: Timeline) -> None:
        self.tape = tape
        self.held = tape.held
        self.last = dict(tape.last)  # where a value is needed last, be it for another that is computed again
        self.plans: dict[Value, Rerun] = {}

    def choose(self) -> tuple[int, dict[Value, Rerun]]:
        """Lowers what is held at the fullest moment as far as that can be.

        Gives the lowest that was reached, and how the values are computed again by which it was.
        """
        full = int(self.held.max())
        budget = SHARE * sum(
            seconds(n) for n in self.tape.nodes if n not in self.tape.folded and not self.tape.is_view(n)
        )
        candidates = self.tape.candidates(max(LEAST, full // PART))
        nodes, makers = self.tape.nodes, self.tape.makers
        candidates.sort(key=lambda value: seconds(nodes[makers[value]]) / self.tape.bytes(value))
        best, plans = full, dict[Value, Rerun]()
        while True:
            moment, found = int(self.held.argmax()), None
            for value in candidates:
                if value not in self.plans:
                    plan = self.plan(value)
                    if plan is not None and plan.cost <= budget and self._lowers(plan, moment):
                        found = plan
                        break
            if found is None:
                return best, plans
            self.take(found)
            budget -= found.cost
            if int(self.held.max()) < best:
                best = int(self.held.max())
                plans = {value: replace(plan) for value, plan in self.plans.items()}  # what follows may lower nothing

    def _rests(self, value: Value) -> int:
        """The place of the last node of the forward pass that reads a value."""
        places = [place for place in self.tape.reads[value] if place < self.tape.turn]
        return max(places, default=self.tape.makers[value])

    def _lowers(self, plan: Rerun, moment: int) -> bool:
        """Whether less is held at the fullest moment, and nowhere more than there was then."""
        held = _changed(self.held, plan.change)
        return bool(held[moment] < self.held[moment]) and int(held.max()) <= int(self.held.max())

    def _until(self, value: Value) -> int:
        """The place at which a value is needed last."""
        return self.last.get(value, self.tape.makers[value])

    def take(self, plan: Rerun) -> None:
        """The value of a plan is computed again."""
        self.held = _changed(self.held, plan.change)
        self.plans[plan.value] = plan
        for value in plan.uses:
            self.last[value] = max(self._until(value), plan.place)
        for other in self._under(plan.uses):
            other.place = min(other.place, plan.place)

    def _under(self, uses: Iterable[Value]) -> list[Rerun]:
        """How those among some values are computed again that are, and what these need."""
        found: dict[Value, Rerun] = {}
        left = [*uses]
        while left:
            value = left.pop()
            if value in self.plans and value not in found:
                found[value] = self.plans[value]
                left += found[value].uses
        return list(found.values())

    def plan(self, value: Value) -> Rerun | None:
        """How a value could be computed again; ``None`` if it could not."""
        tape = self.tape
        place = tape.first(value)
        for other in self.plans.values():  # another that is computed from it may be needed before
            if value in other.uses:
                place = min(place, other.place)
        steps: list[int] = []
        uses: dict[Value, None] = {}
        if not self._steps(value, place, steps, uses, value, set()):
            return None
        if any(steps[0] < unseen < place for unseen in tape.unseen):
            return None  # it may have changed what they read
        size = tape.bytes(value)
        change = [(self._rests(value) + 1, place, -size)]
        change += [(self._until(each) + 1, place + 1, tape.bytes(each)) for each in uses]
        change += [(place, other.place, tape.bytes(other.value)) for other in self._under(uses)]
        nodes = [tape.nodes[step] for step in steps]
        change.append((place, place + 1, int(tape.holds(steps).max()) - size))  # on the way to it
        cost = sum(seconds(node) for node in nodes if not tape.is_view(node))
        return Rerun(value, place, steps, list(uses), change, cost)

    def _steps(
        self,
        value: Value,
        place: int,
        steps: list[int],
        uses: dict[Value, None],
        wanted: Value,
        asked: set[int],
    ) -> bool:
        """Adds the nodes that have to run again for `value` to be there before the node at `place`."""
        tape = self.tape
        root = tape.root(value)
        if not tape.passing(root) or tape.makers[value] in steps:
            return True
        made = tape.makers[value]
        if root is not wanted and (root in self.plans or self._until(root) >= place):
            uses[root] = None
            return root not in tape.inside
        node = tape.nodes[made]
        if len(steps) + len(asked) < LONGEST and tape.can(node) and made not in asked:
            tried, used = list(steps), dict(uses)
            below = {*asked, made}
            if all(self._steps(v, place, tried, used, wanted, below) for v in needed(node, tape)):
                grows = sum(tape.bytes(each) for each in used if each not in uses and self._until(each) < place)
                if root is wanted or grows < tape.bytes(root):
                    steps[:] = [*tried, made]
                    uses.update(used)
                    return True
        if root is wanted or root in tape.inside or root in tape.written or root in tape.pinned:
            return False
        uses[root] = None
        return True


def _changed(held: torch.Tensor, change: Iterable[tuple[int, int, int]]) -> torch.Tensor:
    held = held.clone()
    for start, stop, size in change:
        if start < stop:
            held[start:stop] += size
    return held
