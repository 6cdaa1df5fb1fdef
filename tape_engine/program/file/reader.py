"""A frozen tape from the header of a file, of which nothing is taken on trust.

Everything is looked at before it is used: types, indices, names, sizes against the payload, arguments against
the schemas of the operations, and that each node reads what is there by then. Nothing is run.
"""

from __future__ import annotations

import unicodedata
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ...tape import Node, Tape, Value
from ..buffers import overlapping
from ..data import DESCRIBED, SAME, Frozen
from ..passes import drop_dead
from .allowed import Table
from .checked import LARGEST, Place, boolean, integer, listed, record, refuse, text
from .container import Payload
from .nodes import read_nodes
from .tables import Tables, alike

__all__ = ["Read", "read"]

Tensor = torch.Tensor

PARTS = (
    "made_by ops types scopes lines values nodes recorded forward backward inputs outputs single seed leaves live "
    "constants gradients unreached writes lying same shared copy tensors"
).split()


class Read:
    """What a file holds.

    Attributes:
        frozen: the frozen tape.
        shared: which tensors shared memory with one that is written to.
        copy: whether results belong to the caller.
        nodes: every node, with the place where it stands.
    """

    def __init__(self, header: Any, payload: Payload, table: Table, device: Callable[[str], torch.device]) -> None:
        self._header = record(header, (), PARTS)
        self.tables = tables = Tables(self._header, payload, table, device)
        record(tables.part("made_by", dict), ("made_by",), ("torch",))
        text(header["made_by"]["torch"], ("made_by", "torch"))
        given = [self._input(each, ("inputs", i)) for i, each in enumerate(self.tables.part("inputs"))]
        self.frozen = self._rim(given)
        self.nodes = read_nodes(tables)
        self._lists()
        self._results()
        self.copy = boolean(header["copy"], ("copy",))
        for node in self.frozen.nodes:
            self.frozen.tape.append(node)
        self.shared = self._shared()

    # -- the rim ---------------------------------------------------------------------------------------------------

    def _input(self, row: Any, place: Place) -> tuple[str, Value | None, Tensor]:
        """Title and value of an input, and what stands for the one that was recorded: a tensor of no memory."""
        record(row, place, ("title", "value", "type"))
        kind = self.tables.index(row["type"], (*place, "type"), self.tables.types)
        value = None if row["value"] is None else self.tables.index(row["value"], (*place, "value"), self.tables.values)
        if value is not None and not alike(value, kind, kind.stands_for):
            refuse((*place, "value"), "the value is of another type than the input.")
        title = unicodedata.normalize("NFKC", text(row["title"], (*place, "title")))
        # a single element of memory, or none: every element of what stands for the input lies there
        given = torch.empty((1,) * kind.ndim, dtype=kind.dtype, device=kind.stands_for).expand(kind.shape)
        return title, value, given

    def _rim(self, given: list[tuple[str, Value | None, Tensor]]) -> Frozen:
        """The frozen tape, its nodes still missing: inputs, leaves, live tensors, and what is the same."""
        values, tensors = self.tables.values, self.tables.tensors
        single = boolean(self._header["single"], ("single",))
        outputs = [self.tables.index(v, ("outputs", i), values) for i, v in enumerate(self.tables.part("outputs"))]
        if not outputs or (single and len(outputs) > 1):
            refuse(("outputs",), f"{len(outputs)} of them.")
        seed = self.tables.index(self._header["seed"], ("seed",), values)
        if seed.shape != outputs[0].shape or seed.dtype != outputs[0].dtype:
            refuse(("seed",), "it is of another type than the first output.")
        frozen = Frozen(
            tape=Tape(strong=True),
            nodes=[],
            leaves={},
            inputs=[value for _, value, _ in given],
            given=[tensor for _, _, tensor in given],
            titles=[title for title, _, _ in given],
            outputs=outputs,
            single=single,
            seed=seed,
            names={id(v): v.name for v in values if v.name},
        )
        rim = [v for v in (*frozen.inputs, seed) if v is not None]
        if len({*rim}) != len(rim):
            refuse(("inputs",), "one value stands for two of them.")
        for i, row in enumerate(self.tables.part("leaves")):
            place = ("leaves", i)
            record(row, place, ("value",), ("tensor", "input"))
            value = self.tables.index(row["value"], (*place, "value"), values)
            if value in frozen.leaves or len(row) > 2:
                refuse(place, "it stands there twice.")
            holder = self._target(row, place, frozen) if len(row) == 2 else None
            tensor = frozen.given[holder] if isinstance(holder, int) else holder
            self._hold(value, tensor, place)
            frozen.leaves[value] = tensor
        for i, row in enumerate(self.tables.part("live")):
            place = ("live", i)
            record(row, place, ("value", "tensor"))
            value = self.tables.index(row["value"], (*place, "value"), values)
            tensor = self.tables.index(row["tensor"], (*place, "tensor"), tensors)
            if value in frozen.live or value in rim:
                refuse(place, "its value stands for another tensor already.")
            self._hold(value, tensor, place)
            frozen.live[value] = tensor
        constants = [
            self.tables.index(v, ("constants", i), values) for i, v in enumerate(self.tables.part("constants"))
        ]
        if not {*constants} <= frozen.live.keys():
            refuse(("constants",), "one of them is not live.")
        frozen.constants = {*constants}
        self._read_same(frozen)
        return frozen

    def _hold(self, value: Value, tensor: Tensor | None, place: Place) -> None:
        """Notes that a tensor holds a leaf."""
        if tensor is None:
            return
        if not alike(value, tensor, tensor.device):
            refuse((*place, "value"), "the value is of another type than the tensor.")
        before = value.holder
        if before is not None and before is not tensor:
            refuse((*place, "value"), "the value stands for another tensor already.")
        value._tensor = weakref.ref(tensor)

    def _target(self, row: dict[str, Any], place: Place, frozen: Frozen) -> int | Tensor:
        """An input by its place, or a tensor of the file."""
        if ("input" in row) == ("tensor" in row):
            refuse(place, "an input or a tensor is wanted.")
        if "input" in row:
            self.tables.index(row["input"], (*place, "input"), frozen.given)
            return int(row["input"])
        found: Tensor = self.tables.index(row["tensor"], (*place, "tensor"), self.tables.tensors)
        if "value" in row:
            self._hold(self.tables.index(row["value"], (*place, "value"), self.tables.values), found, place)
        return found

    def _read_same(self, frozen: Frozen) -> None:
        """Values that are one: each pair names the one that stands for both, which no other stands for."""
        pairs = []
        for i, row in enumerate(self.tables.part("same")):
            place = ("same", i)
            one, other = [
                self.tables.index(v, (*place, k), self.tables.values) for k, v in enumerate(listed(row, place, 2))
            ]
            if one.shape != other.shape or one.dtype != other.dtype:
                refuse(place, "values of two types cannot be the same.")
            pairs.append((one, other))
        frozen.same = dict(pairs)
        if len(frozen.same) < len(pairs) or any(other in frozen.same for _, other in pairs):
            refuse(("same",), "a value that stands for another is itself stood for.")
        if any(value in frozen.same for value in (*frozen.live, frozen.seed)):
            refuse(("same",), "a live value is stood for by another.")

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _lists(self) -> None:
        """The three orders in which nodes run: each reads what is there by then, and makes what is not."""
        frozen = self.frozen
        lists = {}
        for name in ("recorded", "forward", "backward"):
            rows = self.tables.part(name)
            if len(rows) > len(self.nodes):  # said before each of them is looked at
                refuse((name,), "a node stands there twice.")
            lists[name] = [self.tables.index(i, (name, k), self.nodes) for k, i in enumerate(rows)]
            if len({*rows}) < len(rows):
                refuse((name,), "a node stands there twice.")
        frozen.nodes, frozen.forward, frozen.backward = lists["recorded"], lists["forward"], lists["backward"]
        here = {v for v in frozen.inputs if v is not None}
        self._in_order("recorded", frozen.nodes, {*frozen.leaves, *here}, lambda value: value)
        self._all_there(("outputs",), frozen.outputs, {*frozen.leaves, *here}, frozen.nodes, lambda value: value)
        if any(node.op.forward in SAME for node in (*frozen.forward, *frozen.backward)):
            refuse(
                ("forward",),
                "a node whose result is its argument is in `recorded` alone: in a replay the two are the `same`.",
            )
        rim = {frozen.canonical(v) for v in here} | {*frozen.live}
        nodes = [*frozen.forward, *frozen.backward]
        made = {frozen.canonical(v) for node in nodes for v in node.outputs}
        # what is read and never made stands for a tensor; a node that nobody needs may read one that is not kept
        besides = {frozen.canonical(v) for node in nodes for v in node.inputs} - made
        before = self._in_order("forward", frozen.forward, rim | besides, frozen.canonical)
        self._in_order("backward", frozen.backward, before | {frozen.seed}, frozen.canonical)
        for list_of in (frozen.backward, frozen.forward, frozen.nodes):  # the recorded ones have the last word
            for node in list_of:
                for i, value in enumerate(node.outputs):
                    value._node, value.index = weakref.ref(node), i
        for node in self.nodes:
            node.sources = tuple([v.node for v in node.inputs])

    def _in_order(self, name: str, nodes: list[Node], there: set[Value], of: Callable[[Value], Value]) -> set[Value]:
        there = set(there)
        for i, node in enumerate(nodes):
            for value in node.inputs:
                if of(value) not in there:
                    refuse((name, i), f"{node.op.name} reads {value.name or 'a value'} before it is made.")
            for value in node.outputs:
                if of(value) in there:
                    refuse((name, i), f"{node.op.name} makes {value.name or 'a value'}, which is there already.")
                there.add(of(value))
        return there

    def _all_there(
        self, place: Place, values: list[Value], there: set[Value], nodes: list[Node], of: Callable[[Value], Value]
    ) -> None:
        there = there | {of(v) for node in nodes for v in node.outputs}
        for i, value in enumerate(values):
            if of(value) not in there:
                refuse((*place, i), f"{value.name or 'a value'} is never made.")

    # -- what comes out --------------------------------------------------------------------------------------------

    def _results(self) -> None:
        frozen, values = self.frozen, self.tables.values
        for i, row in enumerate(self.tables.part("gradients")):
            place = ("gradients", i)
            record(row, place, ("g",), ("input", "tensor", "value"))
            target = self._target(row, place, frozen)
            g = self.tables.index(row["g"], (*place, "g"), values)
            tensor = frozen.given[target] if isinstance(target, int) else target
            if g.shape != tensor.shape:
                refuse((*place, "g"), f"a gradient of shape {tuple(g.shape)} for one of {tuple(tensor.shape)}.")
            frozen.gradients.append((target, g))
        for i, row in enumerate(self.tables.part("unreached")):
            record(row, ("unreached", i), (), ("input", "tensor", "value"))
            frozen.unreached.append(self._target(row, ("unreached", i), frozen))
        for i, row in enumerate(self.tables.part("writes")):
            place = ("writes", i)
            leaf, after = [self.tables.index(v, (*place, k), values) for k, v in enumerate(listed(row, place, 2))]
            self._check_write(leaf, after, place)
            frozen.writes.append((leaf, after))
        for i, row in enumerate(self.tables.part("lying")):
            place = ("lying", i)
            index, conj, neg = listed(row, place, 3)
            value = self.tables.index(index, (*place, 0), values)
            if value in frozen.lying or not (value in frozen.live or value in frozen.inputs):
                refuse((*place, 0), "it is no input and no live value, or stands there twice.")
            frozen.lying[value] = boolean(conj, (*place, 1)), boolean(neg, (*place, 2))
        self._check_reads()

    def _check_reads(self) -> None:
        """Of the nodes that a replay runs, each reads what is made, given or live."""
        frozen = self.frozen
        nodes = drop_dead(frozen, with_sweep=True)
        there = {frozen.canonical(v) for node in nodes for v in node.outputs} | {*frozen.live, frozen.seed}
        there |= {frozen.canonical(v) for v in frozen.inputs if v is not None}
        for node in nodes:
            for value in node.inputs if node.op.forward not in DESCRIBED else ():
                if frozen.canonical(value) not in there:
                    name = value.name or "a value"
                    refuse(("nodes", self.nodes.index(node)), f"{node.op.name} reads {name}, which nothing gives.")
        for word, values in (
            ("outputs", frozen.outputs),
            ("gradients", [g for _, g in frozen.gradients]),
            ("writes", [after for _, after in frozen.writes]),
        ):
            self._all_there((word,), values, there, [], frozen.canonical)

    def _check_write(self, leaf: Value, after: Value, place: Place) -> None:
        frozen = self.frozen
        target = frozen.canonical(leaf)
        if leaf not in frozen.leaves or not (target in frozen.live or target in frozen.inputs):
            refuse((*place, 0), "it is no tensor that could be written to.")
        if target in frozen.constants or (target in frozen.live and leaf.holder is None):
            refuse((*place, 0), "nobody can write to it.")
        if after.shape != leaf.shape or after.dtype != leaf.dtype:
            refuse((*place, 1), "what is written is of another type.")
        tensor = frozen.live.get(target)
        if tensor is not None and overlapping(tuple(tensor.shape), tensor.stride()):
            refuse((*place, 0), "elements of it share one place in memory.")

    def _shared(self) -> list[tuple[int, int, int]]:
        count = len(self.frozen.given) + len(self.frozen.read_anew)
        found = []
        for i, row in enumerate(self.tables.part("shared")):
            one, other, apart = listed(row, ("shared", i), 3)
            integer(one, ("shared", i, 0), 0, count - 1)
            integer(other, ("shared", i, 1), 0, count - 1)
            found.append((one, other, integer(apart, ("shared", i, 2), -LARGEST, LARGEST)))
        return found


def read(header: Any, payload: Payload, table: Table, device: Callable[[str], torch.device]) -> Read:
    """What a file holds, checked.

    Raises:
        LoadError: naming the place in the file where something is wrong.
    """
    with torch.inference_mode(False), torch.no_grad():
        return Read(header, payload, table, device)
