"""A frozen tape from the header of a file, of which nothing is taken on trust.

Everything is looked at before it is used: types, indices, names, sizes against the payload, arguments against
the schemas of the operations, and that each node reads what is there by then. Nothing is run.
"""

from __future__ import annotations

import re
import unicodedata
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ...aliases import extent
from ...registry import Op
from ...tape import Node, Tape, Told, Value
from ..buffers import overlapping
from ..data import DESCRIBED, SAME, Frozen
from ..passes import drop_dead
from .allowed import Table
from .arguments import check_arguments
from .checked import LARGEST, Place, boolean, integer, listed, record, refuse, shown, text
from .container import Payload
from .params import Decoder, dtype_of

__all__ = ["Read", "read"]

Tensor = torch.Tensor

PARTS = (
    "made_by ops types scopes lines values nodes recorded forward backward inputs outputs single seed leaves live "
    "constants gradients unreached writes same shared copy tensors"
).split()

DIMENSIONS = 64  # as many as torch's iterators can take
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?")


class Read:
    """What a file holds.

    Attributes:
        frozen: the frozen tape.
        tape: its recorded nodes.
        shared: which tensors shared memory with one that is written to.
        copy: whether results belong to the caller.
        nodes: every node, with the place where it stands.
    """

    def __init__(self, header: Any, payload: Payload, table: Table, device: Callable[[str], torch.device]) -> None:
        self._header = record(header, (), PARTS)
        self._payload = payload
        self._table = table
        self._device_for = device
        record(self._part("made_by", dict), ("made_by",), ("torch",))
        text(header["made_by"]["torch"], ("made_by", "torch"))
        ops = [self._op(each, ("ops", i)) for i, each in enumerate(self._part("ops"))]
        self._types = [self._type(each, ("types", i)) for i, each in enumerate(self._part("types"))]
        self._scopes = [self._scope(each, ("scopes", i)) for i, each in enumerate(self._part("scopes"))]
        self._lines = [self._line(each, ("lines", i)) for i, each in enumerate(self._part("lines"))]
        self._values = [self._value(each, ("values", i)) for i, each in enumerate(self._part("values"))]
        self._tensors = self._read_tensors()
        self._ops = ops
        given = [self._input(each, ("inputs", i)) for i, each in enumerate(self._part("inputs"))]
        self.frozen = self._rim(given)
        self._nodes = self._read_nodes()
        self._lists()
        self._results()
        self.nodes = self._nodes
        self.copy = boolean(header["copy"], ("copy",))
        self.tape = Tape(strong=True)
        for node in self.frozen.nodes:
            self.tape.append(node)
        for tensor in self.frozen.leaves.values():
            if tensor is not None:
                self.tape.hold(tensor)
        self.shared = self._shared()

    def _part(self, name: str, kind: type = list) -> Any:
        part = self._header[name]
        if type(part) is not kind:
            refuse((name,), f"{'a list' if kind is list else 'an object'} is wanted, not {shown(part)}.")
        return part

    def _index(self, thing: Any, place: Place, of: list[Any]) -> Any:
        """The element of a list that an index of the file means."""
        if not of:
            refuse(place, "it refers to an empty list.")
        return of[integer(thing, place, 0, len(of) - 1)]

    def _device(self, thing: Any, place: Place) -> torch.device:
        if type(thing) is not str or not DEVICE.fullmatch(thing):
            refuse(place, f"{shown(thing)} is no device.")
        return self._device_for(thing)

    # -- tables ----------------------------------------------------------------------------------------------------

    def _op(self, row: Any, place: Place) -> Op:
        record(row, place, ("name", "schema"))
        text(row["schema"], (*place, "schema"))
        return self._table.find(text(row["name"], (*place, "name")), (*place, "name"))

    def _shape(self, row: Any, place: Place, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides, of an extent that torch can count in bytes."""
        shape = listed(row["shape"], (*place, "shape"))
        strides = listed(row["strides"], (*place, "strides"), len(shape))
        if len(shape) > DIMENSIONS:
            refuse((*place, "shape"), f"{len(shape)} dimensions, of which {DIMENSIONS} are allowed.")
        for i, (length, step) in enumerate(zip(shape, strides, strict=True)):
            integer(length, (*place, "shape", i))
            integer(step, (*place, "strides", i))
        count = 1
        for length in shape:
            count *= length or 1
        if max(count, extent(tuple(shape), tuple(strides))) * dtype.itemsize > LARGEST:
            refuse((*place, "shape"), "more bytes than can be counted.")
        return tuple(shape), tuple(strides)

    def _type(self, row: Any, place: Place) -> Tensor:
        """A tensor of no memory, of a shape, strides and dtype; the device that it stands for is noted beside it."""
        record(row, place, ("shape", "strides", "dtype", "device"))
        dtype = dtype_of(row["dtype"], (*place, "dtype"))
        shape, strides = self._shape(row, place, dtype)
        found = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        found.stands_for = self._device(row["device"], (*place, "device"))  # type: ignore[attr-defined]
        return found

    def _scope(self, row: Any, place: Place) -> tuple[str, ...]:
        return tuple([text(each, (*place, i), empty=True) for i, each in enumerate(listed(row, place))])

    def _line(self, row: Any, place: Place) -> Told:
        record(row, place, ("file", "line", "code"))
        return Told(
            text(row["file"], (*place, "file"), empty=True),
            integer(row["line"], (*place, "line")),
            text(row["code"], (*place, "code"), empty=True),
        )

    def _value(self, row: Any, place: Place) -> Value:
        record(row, place, ("type",), ("name", "constant"))
        kind = self._index(row["type"], (*place, "type"), self._types)
        found = Value(kind, constant=boolean(row.get("constant", False), (*place, "constant")))
        found.device = kind.stands_for
        found._tensor = GONE
        if "name" in row:
            found.name = unicodedata.normalize("NFKC", text(row["name"], (*place, "name")))
        return found

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _read_tensors(self) -> list[Tensor]:
        """The tensors of the payload, those of one memory in one storage."""
        rows = self._part("tensors")
        storages: dict[str, Tensor] = {}
        found, names = [], set()
        for i, row in enumerate(rows):
            place = ("tensors", i)
            record(
                row, place, ("name", "payload", "offset", "shape", "strides", "dtype", "device"),
                ("requires_grad", "parameter"),
            )  # fmt: skip
            name = text(row["name"], (*place, "name"))
            if name in names:
                refuse((*place, "name"), f"{shown(name)} stands for another tensor already.")
            names.add(name)
            held = row["payload"]
            if type(held) is not str or held not in self._payload.entries:
                refuse((*place, "payload"), f"{shown(held)} is not in the payload.")
            dtype = dtype_of(row["dtype"], (*place, "dtype"))
            shape, strides = self._shape(row, place, dtype)
            offset = integer(row["offset"], (*place, "offset"))
            reach = (offset + extent(shape, strides)) * dtype.itemsize if 0 not in shape else 0
            if reach > self._payload.nbytes(held):
                size = self._payload.nbytes(held)
                refuse(place, f"it reaches to byte {reach} of {shown(held)}, which has {size}.")
            device = self._device(row["device"], (*place, "device"))
            if held not in storages:
                storages[held] = self._payload.read(held).to(device)
            memory = storages[held]
            if memory.device != device:
                refuse((*place, "device"), f"{shown(held)} lies on {memory.device} already.")
            tensor = torch.empty(0, dtype=dtype, device=device)
            tensor.set_(memory.untyped_storage(), 0 if 0 in shape else offset, shape, strides)
            if dtype is torch.bool and bool((memory > 1).any()):
                refuse(place, "bytes that are neither true nor false.")
            found.append(self._dressed(tensor, row, place))
        unused = self._payload.entries.keys() - storages.keys()
        if unused:
            refuse(("payload", min(unused)[:80]), "no tensor of the program lies there.")
        return found

    def _dressed(self, tensor: Tensor, row: dict[str, Any], place: Place) -> Tensor:
        """`tensor` as a parameter, if it was one, with or without a gradient of torch's."""
        wants = boolean(row.get("requires_grad", False), (*place, "requires_grad"))
        if wants and not (tensor.is_floating_point() or tensor.is_complex()):
            refuse((*place, "requires_grad"), f"{row['dtype']} has no gradient.")
        if boolean(row.get("parameter", False), (*place, "parameter")):
            return torch.nn.Parameter(tensor, requires_grad=wants)
        return tensor.requires_grad_(wants)

    def _input(self, row: Any, place: Place) -> tuple[str, Value | None, Tensor]:
        """Title and value of an input, and what stands for the one that was recorded: a tensor of no memory."""
        record(row, place, ("title", "value", "type"))
        kind = self._index(row["type"], (*place, "type"), self._types)
        value = None if row["value"] is None else self._index(row["value"], (*place, "value"), self._values)
        if value is not None and not _alike(value, kind, kind.stands_for):
            refuse((*place, "value"), "the value is of another type than the input.")
        title = unicodedata.normalize("NFKC", text(row["title"], (*place, "title")))
        # a single element of memory, or none: every element of what stands for the input lies there
        given = torch.empty((1,) * kind.ndim, dtype=kind.dtype, device=kind.stands_for).expand(kind.shape)
        return title, value, given

    def _rim(self, given: list[tuple[str, Value | None, Tensor]]) -> Frozen:
        """The frozen tape, its nodes still missing: inputs, leaves, live tensors, and what is the same."""
        values, tensors = self._values, self._tensors
        single = boolean(self._header["single"], ("single",))
        outputs = [self._index(v, ("outputs", i), values) for i, v in enumerate(self._part("outputs"))]
        if not outputs or (single and len(outputs) > 1):
            refuse(("outputs",), f"{len(outputs)} of them.")
        seed = self._index(self._header["seed"], ("seed",), values)
        if seed.shape != outputs[0].shape or seed.dtype != outputs[0].dtype:
            refuse(("seed",), "it is of another type than the first output.")
        frozen = Frozen(
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
        for i, row in enumerate(self._part("leaves")):
            place = ("leaves", i)
            record(row, place, ("value",), ("tensor", "input"))
            value = self._index(row["value"], (*place, "value"), values)
            if value in frozen.leaves or len(row) > 2:
                refuse(place, "it stands there twice.")
            holder = self._target(row, place, frozen) if len(row) == 2 else None
            tensor = frozen.given[holder] if isinstance(holder, int) else holder
            self._hold(value, tensor, place)
            frozen.leaves[value] = tensor
        for i, row in enumerate(self._part("live")):
            place = ("live", i)
            record(row, place, ("value", "tensor"))
            value = self._index(row["value"], (*place, "value"), values)
            tensor = self._index(row["tensor"], (*place, "tensor"), tensors)
            if value in frozen.live or value in rim:
                refuse(place, "its value stands for another tensor already.")
            self._hold(value, tensor, place)
            frozen.live[value] = tensor
        constants = [self._index(v, ("constants", i), values) for i, v in enumerate(self._part("constants"))]
        if not {*constants} <= frozen.live.keys():
            refuse(("constants",), "one of them is not live.")
        frozen.constants = {*constants}
        self._read_same(frozen)
        return frozen

    def _hold(self, value: Value, tensor: Tensor | None, place: Place) -> None:
        """Notes that a tensor holds a leaf."""
        if tensor is None:
            return
        if not _alike(value, tensor, tensor.device):
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
            self._index(row["input"], (*place, "input"), frozen.given)
            return int(row["input"])
        found: Tensor = self._index(row["tensor"], (*place, "tensor"), self._tensors)
        return found

    def _read_same(self, frozen: Frozen) -> None:
        """Values that are one: each pair names the one that stands for both, which no other stands for."""
        pairs = []
        for i, row in enumerate(self._part("same")):
            place = ("same", i)
            one, other = [self._index(v, (*place, k), self._values) for k, v in enumerate(listed(row, place, 2))]
            if one.shape != other.shape or one.dtype != other.dtype:
                refuse(place, "values of two types cannot be the same.")
            pairs.append((one, other))
        frozen.same = dict(pairs)
        if len(frozen.same) < len(pairs) or any(other in frozen.same for _, other in pairs):
            refuse(("same",), "a value that stands for another is itself stood for.")
        if any(value in frozen.same for value in (*frozen.live, frozen.seed)):
            refuse(("same",), "a live value is stood for by another.")

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _read_nodes(self) -> list[Node]:
        decoder = Decoder(self._values, self._device)
        return [self._node(row, ("nodes", i), decoder) for i, row in enumerate(self._part("nodes"))]

    def _node(self, row: Any, place: Place, decoder: Decoder) -> Node:
        record(
            row, place, ("op", "args", "outputs"),
            ("kwargs", "guard", "tuple", "gaps", "inputs", "writes", "cut", "random", "scope", "line"),
        )  # fmt: skip
        op = self._index(row["op"], (*place, "op"), self._ops)
        decoder.read = []
        args = tuple(
            [decoder.decoded(a, (*place, "args", i)) for i, a in enumerate(listed(row["args"], (*place, "args")))]
        )
        kwargs = {}
        if "kwargs" in row:
            if type(row["kwargs"]) is not dict:
                refuse((*place, "kwargs"), f"an object is wanted, not {shown(row['kwargs'])}.")
            kwargs = {
                text(name, (*place, "kwargs")): decoder.decoded(a, (*place, "kwargs", name[:40]))
                for name, a in row["kwargs"].items()
            }
        check_arguments(op, args, kwargs, place)
        inputs = decoder.read
        if "inputs" in row:  # what it takes over besides its arguments
            more = [
                decoder.value(v, (*place, "inputs", i))
                for i, v in enumerate(listed(row["inputs"], (*place, "inputs")))
            ]
            if more[: len(inputs)] != inputs:
                refuse((*place, "inputs"), "they begin with the arguments.")
            inputs = more
        line = self._index(row["line"], (*place, "line"), self._lines) if "line" in row else None
        scope = self._index(row["scope"], (*place, "scope"), self._scopes) if "scope" in row else ()
        node = Node(op, args, kwargs, tuple(inputs), line, 0, scope)
        self._made(node, row, place, decoder)
        return node

    def _made(self, node: Node, row: dict[str, Any], place: Place, decoder: Decoder) -> None:
        """The outputs of a node, and what else is told of it."""
        outputs = [
            decoder.value(v, (*place, "outputs", i)) for i, v in enumerate(listed(row["outputs"], (*place, "outputs")))
        ]
        if len({*outputs}) < len(outputs):
            refuse((*place, "outputs"), "one value is made twice.")
        node.outputs = tuple(outputs)
        node.cut = boolean(row.get("cut", False), (*place, "cut"))
        random = boolean(row.get("random", False), (*place, "random"))
        node.random = random or torch.Tag.nondeterministic_seeded in getattr(node.op.forward, "tags", ())
        node.outputs_tuple = boolean(row.get("tuple", False), (*place, "tuple"))
        if "guard" in row:
            node.result = decoder.decoded(row["guard"], (*place, "guard"))
        if (node.result is None) == (not outputs):
            refuse(place, "a node makes values or is a guard, one of the two.")
        if len(outputs) > 1 and not node.outputs_tuple:
            refuse((*place, "tuple"), f"{len(outputs)} values are a tuple.")
        gaps = listed(row.get("gaps", []), (*place, "gaps"))
        for i, each in enumerate(gaps):
            integer(each, (*place, "gaps", i), gaps[i - 1] + 1 if i else 0, len(outputs) + len(gaps) - 1)
        if gaps and not node.outputs_tuple:
            refuse((*place, "gaps"), "gaps are in tuples.")
        node.gaps = tuple(gaps)
        for i, pair in enumerate(listed(row.get("writes", []), (*place, "writes"))):
            taken, made = listed(pair, (*place, "writes", i), 2)
            integer(taken, (*place, "writes", i, 0), -1, len(node.inputs) - 1)
            integer(made, (*place, "writes", i, 1), 0, len(outputs) - 1)
            node.mutates = (*node.mutates, (taken, made))

    def _lists(self) -> None:
        """The three orders in which nodes run: each reads what is there by then, and makes what is not."""
        frozen = self.frozen
        lists = {}
        for name in ("recorded", "forward", "backward"):
            rows = self._part(name)
            lists[name] = [self._index(i, (name, k), self._nodes) for k, i in enumerate(rows)]
            if len({*rows}) < len(rows):
                refuse((name,), "a node stands there twice.")
        frozen.nodes, frozen.forward, frozen.backward = lists["recorded"], lists["forward"], lists["backward"]
        here = {v for v in frozen.inputs if v is not None}
        self._in_order("recorded", frozen.nodes, {*frozen.leaves, *here}, lambda value: value)
        self._all_there(("outputs",), frozen.outputs, {*frozen.leaves, *here}, frozen.nodes, lambda value: value)
        if any(node.op.forward in SAME for node in (*frozen.forward, *frozen.backward)):
            refuse(("forward",), f"a node whose result is its argument is in `recorded` alone: in a replay the two are the `same`.")
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
        for node in self._nodes:
            node.sources = tuple([v.node for v in node.inputs])

    def _in_order(
        self, name: str, nodes: list[Node], there: set[Value], of: Callable[[Value], Value]
    ) -> set[Value]:
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
        frozen, values = self.frozen, self._values
        for i, row in enumerate(self._part("gradients")):
            place = ("gradients", i)
            record(row, place, ("g",), ("input", "tensor"))
            target = self._target(row, place, frozen)
            g = self._index(row["g"], (*place, "g"), values)
            tensor = frozen.given[target] if isinstance(target, int) else target
            if g.shape != tensor.shape:
                refuse((*place, "g"), f"a gradient of shape {tuple(g.shape)} for one of {tuple(tensor.shape)}.")
            frozen.gradients.append((target, g))
        for i, row in enumerate(self._part("unreached")):
            record(row, ("unreached", i), (), ("input", "tensor"))
            frozen.unreached.append(self._target(row, ("unreached", i), frozen))
        for i, row in enumerate(self._part("writes")):
            place = ("writes", i)
            leaf, after = [self._index(v, (*place, k), values) for k, v in enumerate(listed(row, place, 2))]
            self._check_write(leaf, after, place)
            frozen.writes.append((leaf, after))
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
                    refuse(("nodes", self._nodes.index(node)), f"{node.op.name} reads {name}, which nothing gives.")
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
        for i, row in enumerate(self._part("shared")):
            one, other, apart = listed(row, ("shared", i), 3)
            integer(one, ("shared", i, 0), 0, count - 1)
            integer(other, ("shared", i, 1), 0, count - 1)
            found.append((one, other, integer(apart, ("shared", i, 2), -LARGEST, LARGEST)))
        return found


#: A reference to a tensor that is no more.
GONE = weakref.ref(torch.empty(0))


def _alike(value: Value, tensor: Tensor, device: torch.device) -> bool:
    return value.shape == tensor.shape and value.dtype == tensor.dtype and value.device == device


def read(header: Any, payload: Payload, table: Table, device: Callable[[str], torch.device]) -> Read:
    """What a file holds, checked.

    Raises:
        LoadError: naming the place in the file where something is wrong.
    """
    with torch.inference_mode(False), torch.no_grad():
        return Read(header, payload, table, device)
