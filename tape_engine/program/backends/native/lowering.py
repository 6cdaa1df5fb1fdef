"""Where values lie while nodes become instructions: what the functions in `ops` ask for.

Each of those is registered by the overload that it lowers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from ....tape import Node, Value
from .machine import ITEM, KIND, LOCAL, SHARED, Code, Memory, Place, Unfit, bits_of, dense

__all__ = ["FILLS", "LOWERED", "POINTWISE", "Lowering", "Total", "dims_of"]

aten = torch.ops.aten
Lowered = Callable[["Lowering", Node], None]

LARGE = 16 << 20  # bytes of a result that no cache is to hold

#: The lowering functions by overload.
LOWERED: dict[Any, Lowered] = {}

#: Those of operations that work element by element: a result's element depends on the same element of the operands.
POINTWISE: set[Any] = set()

#: Maps for whole numbers and for masks; all others are for floating-point numbers.
WHOLE = {"copy", "neg", "square", "cube", "add", "sub", "mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge",
         "where", "masked_fill", "sum", "largest", "smallest", "clamp", "relu_whole", "and", "or", "xor",
         "to_f", "to_d", "to_l", "to_b"}  # fmt: skip
MASKS = {"copy", "where", "masked_fill", "and", "or", "xor", "not", "eq", "ne", "largest", "smallest",
         "to_f", "to_d", "to_l", "to_b"}  # fmt: skip


@dataclass(eq=False)
class Total:
    """A sum (or an extremum) over the rows: what it is made by, and what is divided by in the end."""

    name: str
    place: Place
    divisor: float | None = None
    start: float | int | bool = 0.0


@dataclass
class Constants:
    """Numbers that instructions read, each kept once."""

    places: dict[tuple[str, bytes], Place] = field(default_factory=dict)

    def place(self, number: float | int | bool, kind: str) -> Place:
        key = (kind, bits_of(number, kind))
        found = self.places.get(key)
        if found is None:
            found = self.places[key] = Place(Memory(SHARED, ITEM[kind]), kind, (), ())
        return found


class Lowering:
    """Where values lie while a list of nodes becomes instructions.

    Attributes:
        code: the instructions so far.
        places: the places of the values known.
        wanted: results that have a place already, in memory of the caller's.
        rows: for each value with rows the dimension in which they lie, and how many are in a block; of a program
            that works in blocks of rows.
        totals: the values that are made by running up a total over the blocks.
    """

    def __init__(
        self,
        canonical: Callable[[Value], Value],
        constants: Constants,
        *,
        rows: dict[Value, int] | None = None,
        block: int = 0,
        summed: set[Value] | None = None,
        register: int = SHARED,
    ) -> None:
        self.code = Code()
        self.places: dict[Value, Place] = {}
        self.wanted: dict[Value, Place] = {}
        self.canonical = canonical
        self.constants = constants
        self.rows = rows or {}
        self.block = block
        self.summed = summed or set()
        self.totals: dict[Value, Total] = {}
        self.register = register

    # -- what a lowering function asks for -----------------------------------------------------------------------

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value; of one with rows, that of a block of it."""
        value = self.canonical(value)
        shape = tuple(value.shape)
        dim = self.rows.get(value)
        return shape if dim is None else (*shape[:dim], self.block, *shape[dim + 1 :])

    def place(self, argument: Any) -> Place:
        if not isinstance(argument, Value):
            raise Unfit(f"{argument!r} where a tensor is wanted")
        return self.places[self.canonical(argument)]

    def operand(self, argument: Any, kind: str) -> Place:
        """An argument as elements of a kind: a tensor, cast if need be, or a number."""
        if isinstance(argument, Value):
            return self.cast(self.place(argument), kind)
        if isinstance(argument, (bool, int, float)):
            if (kind == "l" and isinstance(argument, float)) or (kind == "b" and not isinstance(argument, bool)):
                raise Unfit(f"{argument!r} among whole numbers")
            if kind == "l" and not -(2**63) <= argument < 2**63:
                raise Unfit("a number too large")
            return self.constants.place(argument, kind)
        raise Unfit(f"{argument!r} where a tensor or a number is wanted")

    def cast(self, place: Place, kind: str) -> Place:
        if place.kind == kind:
            return place
        small = Place(place.memory, place.kind, place.shape, place.strides, place.start)
        made = self.scratch(kind, small.shape)
        self.map(f"to_{kind}", made, small, kind=place.kind)
        return made

    def scratch(self, kind: str, shape: Sequence[int]) -> Place:
        """Memory for what passes through."""
        shape = tuple(shape)
        return Place(Memory(self.register, prod(shape) * ITEM[kind]), kind, shape, dense(shape))

    def result(self, value: Value) -> Place:
        """The place that a result is to fill."""
        value = self.canonical(value)
        place = self.wanted.get(value)
        if place is None:
            place = self.scratch(kind_of(value), self.shape(value))
        self.places[value] = place
        return place

    def view(self, value: Value, place: Place) -> None:
        """Says that a result lies in `place`; it is copied where the caller wants it for himself."""
        value = self.canonical(value)
        wanted = self.wanted.get(value)
        if wanted is not None:
            self.map("copy", wanted, place)
            place = wanted
        self.places[value] = place

    def map(self, name: str, result: Place, *operands: Place, kind: str | None = None, gathers: bool = False) -> None:
        """Appends a map; `kind` is that of its operands, if not the first one's."""
        kind = kind or operands[0].kind
        if (kind == "l" and name not in WHOLE) or (kind == "b" and name not in MASKS):
            raise Unfit(f"{name} of {kind}")
        self.code.map(f"{name}_{kind}", result, *operands, gathers=gathers)

    def reduce(
        self, name: str, value: Value, source: Place, dims: Sequence[int], start: float | int | bool,
        divisor: float | None = None,
    ) -> None:  # fmt: skip
        """Fills a result with a total over the dimensions `dims` of `source`, whether these stay as ones or not."""
        value = self.canonical(value)
        shape = tuple(1 if d in dims else n for d, n in enumerate(source.shape))
        if value in self.summed:
            total = self._total(name, value, source.kind, divisor, start)
            if total.place.numel == 1:
                self.map(name, reshaped(total.place, shape), source, gathers=True)
                return
            part = self.scratch(source.kind, shape)
            self.map("copy", part, self.constants.place(start, source.kind))
            self.map(name, part, source, gathers=True)
            self.map(name, reshaped(total.place, shape), part, gathers=True)
            return
        result = self.result(value)
        into = reshaped_or_none(result, shape)
        made = into or self.scratch(source.kind, shape)
        self.map("copy", made, self.constants.place(start, source.kind))
        self.map(name, made, source, gathers=True)
        if divisor is not None:
            self.map("div", made, made, self.constants.place(divisor, source.kind))
        if into is None:
            self.map("copy", result, reshaped(made, result.shape))

    def product(self, value: Value, a: Place, b: Place, bias: Place | None = None) -> None:
        """``a @ b`` of stacks of matrices (stack, rows, columns), added to `bias` where one is given."""
        value = self.canonical(value)
        if value in self.summed:
            if bias is not None:
                raise Unfit("a total that begins with something")
            total = self._total("sum", value, a.kind, None, 0.0)
            shape = (a.shape[0], a.shape[1], b.shape[2])
            part = self.scratch(a.kind, shape)
            self.code.product(part, a, b, add=False, scratch=self.scratch, summed=True)
            self.map("sum", reshaped(total.place, shape), part, gathers=True)
            return
        result = self.result(value)
        stacked = reshaped_or_none(result, (a.shape[0], a.shape[1], b.shape[2]))
        if stacked is None:
            raise Unfit("a product laid out so")
        if bias is not None:
            self.map("copy", stacked, bias)
        past = value in self.wanted and value.nbytes > LARGE
        self.code.product(stacked, a, b, add=bias is not None, scratch=self.scratch, past=past)

    def _total(self, name: str, value: Value, kind: str, divisor: float | None, start: float | int | bool) -> Total:
        found = self.totals.get(value)
        if found is None:
            shape = tuple(value.shape)
            memory = Memory(LOCAL, prod(shape) * ITEM[kind])
            found = Total(name, Place(memory, kind, shape, dense(shape)), divisor, start)
            self.totals[value] = found
        return found

    def lower(self, node: Node) -> None:
        """Appends the instructions of a node.

        Raises:
            Unfit: where the kernels cannot do it.
        """
        try:
            LOWERED[node.op.forward](self, node)
        except Unfit as error:
            error.node = node
            raise


def kind_of(value: Value) -> str:
    kind = KIND.get(value.dtype)
    if kind is None or value.device.type != "cpu":
        raise Unfit(f"{value.dtype} on {value.device}")
    return kind


def reshaped_or_none(place: Place, shape: Sequence[int]) -> Place | None:
    if tuple(shape) == place.shape:
        return place
    return place.reshaped(shape)


def reshaped(place: Place, shape: Sequence[int]) -> Place:
    found = reshaped_or_none(place, shape)
    if found is None:
        raise Unfit(f"{place.shape} as {tuple(shape)}")
    return found


def dims_of(node: Node, place: int = 1) -> tuple[int, ...]:
    """The dimensions over which a node reduces its first argument, all of them where it names none."""
    rank = node.inputs[0].ndim
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim")
    if given is None or given == []:
        return tuple(range(rank))
    listed = [given] if isinstance(given, int) else list(given)
    return tuple(sorted({d % rank if rank else 0 for d in listed})) if rank else ()


def lowers(*overloads: Any, pointwise: bool = False) -> Callable[[Lowered], Lowered]:
    def note(function: Lowered) -> Lowered:
        for each in overloads:
            LOWERED[each] = function
            if pointwise:
                POINTWISE.add(each)
        return function

    return note


# -- constants ---------------------------------------------------------------------------------------------------

#: Overloads that fill a tensor with one number, with how to tell it.
FILLS: dict[Any, Callable[[Node], Any]] = {
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), lambda node: 0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), lambda node: 1),
    aten.full.default: lambda node: node.args[1],
    aten.full_like.default: lambda node: node.args[1],
    aten.new_full.default: lambda node: node.args[2],
    aten.scalar_tensor.default: lambda node: node.args[0],
}
