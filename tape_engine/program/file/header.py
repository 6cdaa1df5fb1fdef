"""What goes into a file: a frozen tape as JSON, and the tensors that it reads as payload.

``docs/reference/program-file.md`` describes the result part by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from ...errors import SaveError, message
from ...names import call_site, code_line, located, user_frame, where
from ...places import extent
from ...regions import storage_of
from ...registry import Op
from ...tape import Node, Value, describe
from ..data import Frozen
from .allowed import name_of, refusal, schema_of
from .params import DTYPES, Unknown, encoded

__all__ = ["Written", "written"]

Tensor = torch.Tensor

LONGEST_LINE = 400  # characters of the user's source that are kept


class Written:
    """A frozen tape on its way into a file.

    Attributes:
        header: the JSON.
        payload: the tensors of the container, by name.
    """

    def __init__(self, frozen: Frozen, *, copy: bool, shared: Sequence[tuple[int, int, int]]) -> None:
        self.frozen = frozen
        self._values: dict[int, int] = {}
        self._found: list[Value] = []  # keeps the values alive while their ids are keys
        self._types: dict[Any, int] = {}
        self._nodes: dict[int, int] = {}
        self._ops: dict[int, int] = {}
        self._op_rows: list[dict[str, Any]] = []
        self._scopes: dict[tuple[str, ...], int] = {}
        self._lines: dict[Any, int] = {}
        self._line_rows: list[dict[str, Any]] = []
        self._value_rows: list[dict[str, Any]] = []
        self._node_rows: list[dict[str, Any]] = []
        self._tensors = _Tensors(frozen)
        self._leaves = {id(tensor) for tensor in frozen.leaves.values()}
        self._places = {id(given): i for i, given in enumerate(frozen.given)}
        self.header = self._header(copy, shared)
        self.payload = self._tensors.payload()

    def _header(self, copy: bool, shared: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        frozen = self.frozen
        inputs = [
            {"title": _printable(title), "value": None if value is None else self.value(value), **self.type_of(given)}
            for title, value, given in zip(frozen.titles, frozen.inputs, frozen.given, strict=True)
        ]
        lists = {
            "recorded": [self.node(each) for each in frozen.nodes],
            "forward": [self.node(each) for each in frozen.forward],
            "backward": [self.node(each) for each in frozen.backward],
        }
        rest = {
            "outputs": [self.value(each) for each in frozen.outputs],
            "single": frozen.single,
            "seed": self.value(frozen.seed),
            "leaves": [{"value": self.value(v), **self._leaf(t)} for v, t in frozen.leaves.items()],
            "live": [{"value": self.value(v), "tensor": self._tensors.add(t, v)} for v, t in frozen.live.items()],
            "constants": [self.value(v) for v in frozen.live if v in frozen.constants],
            "gradients": [{**self._target(t), "g": self.value(g)} for t, g in frozen.gradients],
            "unreached": [self._target(each) for each in frozen.unreached],
            "writes": [[self.value(leaf), self.value(after)] for leaf, after in frozen.writes],
            "lying": [[self.value(v), conj, neg] for v, (conj, neg) in frozen.lying.items()],
            "same": self._same(),
            "shared": [list(each) for each in shared],
            "copy": copy,
        }
        return {
            "made_by": {"torch": str(torch.__version__)},
            "ops": self._op_rows,
            "types": [dict(each) for each in self._type_rows()],
            "scopes": [list(each) for each in self._scopes],
            "lines": self._line_rows,
            "values": self._value_rows,
            "nodes": self._node_rows,
            **lists,
            "inputs": inputs,
            **rest,
            "tensors": self._tensors.rows(),
        }

    # -- values ------------------------------------------------------------------------------------------------

    def value(self, value: Value) -> int:
        """The index of a value."""
        found = self._values.get(id(value))
        if found is None:
            found = self._values[id(value)] = len(self._found)
            self._found.append(value)
            row: dict[str, Any] = self.type_of(value)
            name = self.frozen.names.get(id(value)) or value.name
            if name:
                row["name"] = _printable(name)
            if value.constant:
                row["constant"] = True
            self._value_rows.append(row)
        return found

    def type_of(self, value: Value | Tensor) -> dict[str, Any]:
        """The entry of a value's shape, strides, dtype and device."""
        strides = value.strides if isinstance(value, Value) else _strides(value)
        if len(strides) != len(value.shape) or str(value.dtype).removeprefix("torch.") not in DTYPES:
            name = (self.frozen.names.get(id(value)) if isinstance(value, Value) else None) or "a value"
            _refuse(f"{name} is no plain tensor, and a file holds no others.", [(name, describe(value))])
        key = (*value.shape,), (*strides,), value.dtype, str(value.device)
        return {"type": self._types.setdefault(key, len(self._types))}

    def _type_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "shape": list(shape),
                "strides": list(strides),
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
            }
            for shape, strides, dtype, device in self._types
        ]

    def _same(self) -> list[list[int]]:
        """The values of the file that are one and the same with another, which stands for both."""
        pairs = [(v, self.frozen.canonical(v)) for v in self.frozen.same if id(v) in self._values]
        return [[self.value(v), self.value(w)] for v, w in pairs]

    # -- nodes -------------------------------------------------------------------------------------------------

    def node(self, node: Node) -> int:
        """The index of a node."""
        found = self._nodes.get(id(node))
        if found is None:
            row = self._row(node)
            found = self._nodes[id(node)] = len(self._node_rows)
            self._node_rows.append(row)
        return found

    def _row(self, node: Node) -> dict[str, Any]:
        row: dict[str, Any] = {"op": self._op(node)}
        try:
            row["args"] = [encoded(each, self.value) for each in node.args]
            if node.kwargs:
                row["kwargs"] = {name: encoded(each, self.value) for name, each in node.kwargs.items()}
            if node.result is not None:
                row["guard"] = encoded(node.result, self.value)
        except Unknown as unknown:
            what = f"{node.op.name} is given {unknown}, which a file cannot hold."
            _refuse(what, [], located(node), "give it numbers, strings, dtypes and lists of them")
        row["outputs"] = [self.value(each) for each in node.outputs]
        if node.outputs_tuple:
            row["tuple"] = True
        if node.gaps:
            row["gaps"] = list(node.gaps)
        if [*_values_in(node.args), *_values_in(list(node.kwargs.values()))] != [*node.inputs]:
            row["inputs"] = [self.value(each) for each in node.inputs]
        if node.mutates:
            row["writes"] = [list(each) for each in node.mutates]
        for word in ("cut", "random"):
            if getattr(node, word):
                row[word] = True
        if node.scope:
            row["scope"] = self._scopes.setdefault(tuple([_printable(each) for each in node.scope]), len(self._scopes))
        if node.site[0] is not None:
            row["line"] = self._line(node)
        return row

    def _line(self, node: Node) -> int:
        """The index of the user's line; one for each expression, of which a line may hold several."""
        if node.site not in self._lines:
            file, _, line = (where(node) or ":0").rpartition(":")
            code = _printable(code_line(node) or "", LONGEST_LINE)
            self._lines[node.site] = len(self._line_rows)
            self._line_rows.append({"file": _printable(file), "line": int(line), "code": code})
        return self._lines[node.site]

    def _op(self, node: Node) -> int:
        op = node.op
        found = self._ops.get(id(op))
        if found is None:
            reason = refusal(op)
            if reason is None and any(row["name"] == name_of(op) for row in self._op_rows):
                reason = "another operation of the program has the same name"
            if reason is not None:
                what = f"{op.name} cannot be kept in a file: {reason}."
                _refuse(what, [], located(node), _way_around(op, reason))
            found = self._ops[id(op)] = len(self._op_rows)
            self._op_rows.append({"name": name_of(op), "schema": _printable(schema_of(op), 4000)})
            if op.is_named and op.grad is not None:
                self._op_rows[-1]["rule"] = _printable(getattr(op.grad, "__name__", "rule"))
        return found

    # -- tensors -----------------------------------------------------------------------------------------------

    def _leaf(self, tensor: Tensor | None) -> dict[str, int]:
        if tensor is None:
            return {}
        place = self._places.get(id(tensor))
        return {"tensor": self._tensors.add(tensor)} if place is None else {"input": place}

    def _target(self, target: int | Tensor) -> dict[str, int]:
        """A tensor that gets ``.g``; of one that is no leaf the value, too, that it held when it was recorded."""
        if isinstance(target, int):
            return {"input": target}
        row = {"tensor": self._tensors.add(target)}
        if id(target) not in self._leaves:
            made = next((v for n in self.frozen.nodes for v in n.outputs if v.holder is target), None)
            row |= {} if made is None else {"value": self.value(made)}
        return row


def written(frozen: Frozen, *, copy: bool, shared: Sequence[tuple[int, int, int]]) -> Written:
    """A frozen tape as header and payload.

    Raises:
        SaveError: for what a file cannot hold, with the line that recorded it.
    """
    return Written(frozen, copy=copy, shared=shared)


def _way_around(op: Op, reason: str) -> str:
    if op.is_named and "same name" in reason:
        return f"give one of them another name: @te.op(name={op.name + '2'!r})"
    if op.is_named:
        return "make a named operation of it, te.op(forward) with a rule, and load with te.load(path, ops=[...])"
    return "record the computation without it"


def _refuse(what: str, operands: list[tuple[str, str]], line: str | None = None, fix: str | None = None) -> NoReturn:
    where = line or call_site(user_frame())
    raise SaveError(message(f"program.save: {what}", where=where, operands=operands, fix=fix))


def _printable(text: str, most: int = 1000) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _values_in(argument: Any) -> list[Value]:
    if isinstance(argument, Value):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [value for each in argument for value in _values_in(each)]
    return []


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else (-1,) * (tensor.ndim + 1)


# -- the tensors, with what they share -------------------------------------------------------------------------


class _Tensors:
    """The tensors that a program reads, each once, and the memory in which they lie."""

    def __init__(self, frozen: Frozen) -> None:
        self._frozen = frozen
        self._holds = {id(t): v for v, t in reversed([*frozen.live.items(), *frozen.leaves.items()]) if t is not None}
        self._index: dict[int, int] = {}
        self._tensors: list[Tensor] = []
        self._names: list[str] = []
        self._used: set[str] = set()

    def add(self, tensor: Tensor, value: Value | None = None) -> int:
        """The index of a tensor; `value` is what it stands for, by which it is named."""
        found = self._index.get(id(tensor))
        if found is None:
            found = self._index[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
            value = value or self._holds.get(id(tensor))
            value = value or next((v for n in self._frozen.nodes for v in n.outputs if v.holder is tensor), None)
            title = None if value is None else self._frozen.title(value)
            self._names.append(self._unused(_printable(title) if title else f"live{found}"))
        return found

    def _unused(self, wanted: str) -> str:
        found, count = wanted, 1
        while found in self._used or found == "__metadata__":
            count += 1
            found = f"{wanted}#{count}"
        self._used.add(found)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """What the header tells of each tensor."""
        owners = self._owners()
        found = []
        for i, (name, tensor) in enumerate(zip(self._names, self._tensors, strict=True)):
            owner, begin = owners[i]
            row = {
                "name": name,
                "payload": self._names[owner],
                "offset": tensor.storage_offset() - begin // tensor.element_size(),
                "shape": list(tensor.shape),
                "strides": list(tensor.stride()),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "device": str(tensor.device),
            }
            if tensor.requires_grad:
                row["requires_grad"] = True
            if isinstance(tensor, torch.nn.Parameter):
                row["parameter"] = True
            found.append(row)
        return found

    def _owners(self) -> list[tuple[int, int]]:
        """For each tensor the first one of its storage, and the byte at which what is kept of that begins."""
        first: dict[int, int] = {}
        starts: dict[int, int] = {}
        dtypes: dict[int, set[torch.dtype]] = {}
        for i, tensor in enumerate(self._tensors):
            if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or not storage_of(tensor):
                _refuse(f"{self._names[i]} is no plain tensor, and a file holds no others.", [], None, ".clone() it")
            owner = first.setdefault(storage_of(tensor), i)
            begin = int(tensor.storage_offset()) * tensor.element_size()
            starts[owner] = min(starts.get(owner, begin), begin)
            dtypes.setdefault(owner, set()).add(tensor.dtype)
        for owner, begin in starts.items():
            if len(dtypes[owner]) > 1:  # a boundary for the widest elements that look into it
                starts[owner] = begin - begin % 16
        return [(first[storage_of(t)], starts[first[storage_of(t)]]) for t in self._tensors]

    def payload(self) -> dict[str, Tensor]:
        """What the container holds: the memory of each storage, as a tensor of its shape where one fills it."""
        owners = self._owners()
        members: dict[int, list[Tensor]] = {}
        for (owner, _), tensor in zip(owners, self._tensors, strict=True):
            members.setdefault(owner, []).append(tensor)
        found = {}
        with torch.no_grad():
            for owner, tensors in members.items():
                found[self._names[owner]] = _memory(tensors, owners[owner][1])
        return found


def _memory(tensors: list[Tensor], begin: int) -> Tensor:
    """The memory from byte `begin` on in which tensors of one storage lie."""
    first = tensors[0].detach().as_subclass(Tensor)
    alone = len(tensors) == 1 and first.is_contiguous() and first.storage_offset() * first.element_size() == begin
    if not alone:
        size = max((t.storage_offset() + extent(tuple(t.shape), t.stride())) * t.element_size() for t in tensors)
        unit = first.dtype if len({t.dtype for t in tensors}) == 1 else torch.uint8
        flat = torch.empty(0, dtype=unit, device=first.device)
        count = max(0, size - begin) // unit.itemsize
        first = flat.set_(first.untyped_storage(), begin // unit.itemsize, (count,), (1,))
    if first.dtype is torch.complex128:
        first = torch.view_as_real(first)
    elif first.dtype is torch.complex32:
        first = first.reshape(-1).view(torch.uint8)
    return first.cpu().contiguous()
