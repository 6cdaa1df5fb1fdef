"""The tables of a program file: operations, types, scopes, lines, values, and the tensors of the payload."""

from __future__ import annotations

import re
import unicodedata
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ...places import extent
from ...registry import Op
from ...tape import Told, Value
from .allowed import Table
from .checked import LARGEST, Place, boolean, integer, listed, record, refuse, shown, text
from .container import Payload
from .params import dtype_of

__all__ = ["Tables", "alike"]

Tensor = torch.Tensor

DIMENSIONS = 64  # as many as torch's iterators can take
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?")

#: A reference to a tensor that is no more.
GONE = weakref.ref(torch.empty(0))


class Tables:
    """What the other parts of a header refer to by index; each row is checked.

    Attributes:
        types: tensors of no memory, each with the device that it ``stands_for``.
        ops, scopes, lines, values, tensors: as the file lists them.
    """

    def __init__(
        self, header: dict[str, Any], payload: Payload, table: Table, device: Callable[[str], torch.device]
    ) -> None:
        self._header = header
        self._payload = payload
        self._table = table
        self._device_for = device
        self.ops = [self._op(each, ("ops", i)) for i, each in enumerate(self.part("ops"))]
        self.types = [self._type(each, ("types", i)) for i, each in enumerate(self.part("types"))]
        self.scopes = [self._scope(each, ("scopes", i)) for i, each in enumerate(self.part("scopes"))]
        self.lines = [self._line(each, ("lines", i)) for i, each in enumerate(self.part("lines"))]
        self.values = [self._value(each, ("values", i)) for i, each in enumerate(self.part("values"))]
        self.tensors = self._read_tensors()

    def part(self, name: str, kind: type = list) -> Any:
        """A part of the header."""
        part = self._header[name]
        if type(part) is not kind:
            refuse((name,), f"{'a list' if kind is list else 'an object'} is wanted, not {shown(part)}.")
        return part

    def index(self, thing: Any, place: Place, of: list[Any]) -> Any:
        """The element of a list that an index of the file means."""
        if not of:
            refuse(place, "it refers to an empty list.")
        return of[integer(thing, place, 0, len(of) - 1)]

    def device(self, thing: Any, place: Place) -> torch.device:
        """The device here for the name of one."""
        if type(thing) is not str or not DEVICE.fullmatch(thing):
            refuse(place, f"{shown(thing)} is no device.")
        return self._device_for(thing)

    def _op(self, row: Any, place: Place) -> Op:
        record(row, place, ("name", "schema"), ("rule",))
        schema = text(row["schema"], (*place, "schema"))
        rule = text(row["rule"], (*place, "rule")) if "rule" in row else None
        return self._table.find(text(row["name"], (*place, "name")), (*place, "name"), schema, rule)

    def shape(self, row: Any, place: Place, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
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
        shape, strides = self.shape(row, place, dtype)
        found = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        found.stands_for = self.device(row["device"], (*place, "device"))  # type: ignore[attr-defined]
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
        kind = self.index(row["type"], (*place, "type"), self.types)
        found = Value(kind, constant=boolean(row.get("constant", False), (*place, "constant")))
        found.device = kind.stands_for
        found._tensor = GONE
        if "name" in row:
            found.name = unicodedata.normalize("NFKC", text(row["name"], (*place, "name")))
        return found

    def _read_tensors(self) -> list[Tensor]:
        """The tensors of the payload, those of one memory in one storage."""
        rows = self.part("tensors")
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
            shape, strides = self.shape(row, place, dtype)
            offset = integer(row["offset"], (*place, "offset"))
            reach = (offset + extent(shape, strides)) * dtype.itemsize if 0 not in shape else 0
            if reach > self._payload.nbytes(held):
                size = self._payload.nbytes(held)
                refuse(place, f"it reaches to byte {reach} of {shown(held)}, which has {size}.")
            device = self.device(row["device"], (*place, "device"))
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


def alike(value: Value, tensor: Tensor, device: torch.device) -> bool:
    """Whether a value is of the shape and dtype of a tensor, and on a device."""
    return value.shape == tensor.shape and value.dtype == tensor.dtype and value.device == device
