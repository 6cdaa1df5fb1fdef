"""Choices: where the recorded code got a view or a copy, whichever the strides gave, and it matters which.

``x.reshape(-1)`` looks into the memory of `x` where its strides allow that, and copies elsewhere; ``x.contiguous()`` is
`x` itself, or a copy. As long as nobody writes there, both are the same numbers. Where one of the two is written
to and the other is read later, an input that lies otherwise could make the code do something else than the tape tells.
So the strides of what the choice came from, back to the leaves, are demanded of a replay.
"""

from __future__ import annotations

import ast
import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...names import expression
from ...places import overlapping, positions
from ...tape import Node, Told, Value
from ..data import DESCRIBED, VIEWS, Frozen
from .dead import drop_dead

__all__ = ["Place", "demanded"]

aten = torch.ops.aten

#: A choice: where in the order of the forward nodes it was made, of which value, and which it gave.
Place = tuple[int, Value, Value]

#: Overloads that may be what ``reshape`` runs where it gives a view; the user's own calls of a view are none.
VIEWING = {aten.view.default, aten._reshape_alias.default}
VIEW_CALLS = {"view", "view_as", "unflatten"}

#: Overloads that may be the copy in the place of a view; the user's own calls of a copy are none.
COPYING = {aten.clone.default, aten._to_copy.default}
COPY = aten.clone.default
COPY_CALLS = {"clone", "copy", "deepcopy", "repeat", "float", "double", "half"}

#: Overloads whose result looks into their first argument, and whose schema does not say so.
UNTOLD = {aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default}

#: Of a view of more elements than this it is not asked whether one of them shows twice.
LOOKED_AT = 1 << 20

#: Overloads whose result lies in order, however their arguments lie.
IN_ORDER = {aten.mm.default, aten.addmm.default, aten.bmm.default}


def demanded(
    frozen: Frozen, order: list[Node], ended: Mapping[Value, float], more: Sequence[Place], strided: Iterable[Value]
) -> set[Value]:
    """The leaves whose strides a replay must find as they were recorded.

    Args:
        frozen: of which `forward` is complete, and nothing of it is merged yet.
        order: what was recorded, in order, with the nodes of `forward` among the rest: a write that serves no output
            would serve one if it went elsewhere.
        ended: values that were written over by nodes that are gone, and between which places these would stand.
        more: choices that no node shows: ``contiguous()`` gave the tensor itself, or the body of an operation chose.
        strided: values of which the code has asked how they lie.
    """
    wanted = {frozen.canonical(value) for value in strided}
    if ended or any(node.mutates or node.op is VIEWS[1] for node in order):
        memory = _Memory(frozen, order, ended)
        wanted |= {frozen.canonical(of) for at, of, made in (*_choices(order), *more) if memory.matters(at, of, made)}
    return _leaves_of(wanted, frozen, order)


def _choices(order: list[Node]) -> Iterable[Place]:
    """The choices that nodes show: without the user's own calls of a view or a copy, as far as the source tells."""
    for at, node in enumerate(order):
        forward = node.op.forward
        if forward in VIEWING or forward in COPYING:
            yield at, node.inputs[0], node.outputs[0]
        elif node.op.is_named and node.op not in VIEWS and node.result is None:  # whose body nobody has looked into
            yield from [(at, of, made) for of in node.inputs for made in node.outputs]


def _asked_outright(node: Node) -> bool:
    """Whether the user called a view, or a copy, by its name."""
    code, lasti = node.site
    call = None if code is None or isinstance(code, Told) else expression(code, lasti)
    if not isinstance(call, ast.Call):
        return False
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    return name in (VIEW_CALLS if node.op.forward in VIEWING else COPY_CALLS)


class _Memory:
    """Which values of a forward pass lie in one memory, and when that is read and written."""

    def __init__(self, frozen: Frozen, order: list[Node], ended: Mapping[Value, float]) -> None:
        self._frozen = frozen
        self._order = order
        self._above: dict[Any, Any] = {}
        for node in order:
            for value in (*node.inputs, *node.outputs):
                if value.aliases is not None:
                    self._join(value, id(value.aliases))
            self._follow(node)
        self.written: dict[Any, list[float]] = {}
        self.read: dict[Any, float] = {}  # the last time
        self.carried: dict[Any, float] = {}  # when a write to one tensor was last carried to another one
        needed = set(drop_dead(frozen, with_sweep=True))
        at: float
        for at, node in enumerate(order):
            for value in self._writes(node):
                self.written.setdefault(self.of(value), []).append(at)
            if node not in needed:
                continue
            if node.op in VIEWS:
                self.carried[self.of(node.outputs[0])] = at
            for value in () if node.op.forward in DESCRIBED else node.inputs:
                self.read[self.of(value)] = at
        for value, at in ended.items():
            bisect.insort(self.written.setdefault(self.of(value), []), at)
        for value in (*frozen.leaves, *frozen.outputs):  # the caller has them at the end
            self.read[self.of(value)] = math.inf
        self._made_by = {value: node for node in order for value in node.outputs}

    def of(self, value: Any) -> Any:
        """What stands for the memory in which a value lies."""
        above = self._above
        at = self._frozen.canonical(value) if isinstance(value, Value) else value
        while (higher := above.get(at, at)) is not at and higher != at:
            above[at] = above.get(higher, higher)
            at = higher
        return at

    def _join(self, one: Any, other: Any) -> None:
        one, other = self.of(one), self.of(other)
        if one is not other and one != other:
            self._above[one] = other

    def _follow(self, node: Node) -> None:
        """Joins what a node gives with what it looks into or writes to."""
        for place, made in node.mutates:
            if place >= 0:
                self._join(node.outputs[made], node.inputs[place])
        for value in node.outputs if self._looks(node) else ():
            self._join(value, node.inputs[0])

    @staticmethod
    def _looks(node: Node) -> bool:
        """Whether what a node gives looks into its first input."""
        schema = getattr(node.op.forward, "_schema", None)
        looks = node.op in VIEWS or node.op.forward in UNTOLD
        looks = looks or (schema is not None and any(each.alias_info is not None for each in schema.returns))
        return looks and bool(node.inputs)

    @staticmethod
    def _writes(node: Node) -> list[Value]:
        """The values that a node made by writing."""
        if node.op is VIEWS[1]:
            return [node.outputs[0]]
        return [node.outputs[made] for _, made in node.mutates]

    def matters(self, at: int, of: Value, made: Value) -> bool:
        """Whether the code could do something else if `made` were a copy of `of`, or no copy."""
        one, other = self.of(of), self.of(made)
        if self._frozen.canonical(of) is self._frozen.canonical(made):  # nobody can tell who reads which of the two
            found = self._read_after(one, one, at)
        elif one is other or one == other:
            found = self._first(one, at) < math.inf and self.carried.get(one, -1) > at
        else:
            found = self._read_after(one, other, at) or self._read_after(other, one, at)
        node = self._made_by.get(made)
        if found and node is not None and node.op.forward is COPY and self._has_repeats(of):
            after = self._order[at + 1 : at + 2]  # of reshape, to which what repeats may be a view
            found = any(each.op.forward is aten._unsafe_view.default and each.inputs[0] is made for each in after)
        told = node is not None and (node.op.forward in VIEWING or node.op.forward in COPYING)
        return found and not (told and node is not None and _asked_outright(node))

    def _has_repeats(self, value: Value) -> bool:
        """Whether a view shows an element twice, wherever that lies: ``contiguous()`` of it is a copy."""
        root = value
        while (node := self._made_by.get(root)) is not None and self._looks(node):
            root = node.inputs[0]
        if root is value or value.numel() > LOOKED_AT or overlapping(root.shape, root.strides):
            return False
        places = positions(value.shape, value.strides, 0, torch.device("cpu"))
        return places.numel() > 1 and int(places.bincount().max()) > 1

    def _read_after(self, written: Any, read: Any, at: int) -> bool:
        """Whether one memory is written to after a choice, and another read after that."""
        return self._first(written, at) < self.read.get(read, -1)

    def _first(self, memory: Any, at: int) -> float:
        """When a memory is first written to after a choice."""
        places = self.written.get(memory, [])
        found = bisect.bisect_right(places, at)
        return places[found] if found < len(places) else math.inf


def _leaves_of(values: set[Value], frozen: Frozen, order: list[Node]) -> set[Value]:
    """The leaves on whose strides it depends how values lie."""
    canonical = frozen.canonical
    makers = {canonical(value): node for node in order for value in node.outputs}
    found: set[Value] = set()
    stack, seen = list(values), set(values)
    while stack:
        value = stack.pop()
        node = makers.get(value)
        if node is None:
            found.add(value)
            continue
        if node.op.forward in IN_ORDER or node.kwargs.get("memory_format") is torch.contiguous_format:
            continue
        written = [place for place, made in node.mutates if place >= 0 and canonical(node.outputs[made]) is value]
        for each in [node.inputs[place] for place in written] or node.inputs:
            if (each := canonical(each)) not in seen:
                seen.add(each)
                stack.append(each)
    return found
