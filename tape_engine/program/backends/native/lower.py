"""From torch's operations to instructions: a small function for each operation that the kernels can do.

A lowering function is given the `Lowering` and a node. It asks for the places of the arguments, and either gives
the result a place of its own and appends instructions that fill it, or says that it is a view of another. What it
cannot do it refuses with `Unfit`, and the node stays with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, prod
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
            self.code.product(part, a, b, add=False, scratch=self.scratch)
            self.map("sum", reshaped(total.place, shape), part, gathers=True)
            return
        result = self.result(value)
        stacked = reshaped_or_none(result, (a.shape[0], a.shape[1], b.shape[2]))
        if stacked is None:
            raise Unfit("a product laid out so")
        if bias is not None:
            self.map("copy", stacked, bias)
        large = value in self.wanted and value.nbytes > LARGE
        self.code.product(stacked, a, b, add=bias is not None, scratch=self.scratch, large=large)

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


# -- element by element ----------------------------------------------------------------------------------------


def common_kind(node: Node, operands: Sequence[Any]) -> str:
    """The kind in which an operation works on operands of several dtypes."""
    tensors = [torch.empty(o.shape, dtype=o.dtype, device="meta") if isinstance(o, Value) else o for o in operands]
    dtype = torch.result_type(tensors[0], tensors[1]) if len(tensors) > 1 else operands[0].dtype
    if dtype not in KIND:
        raise Unfit(str(dtype))
    return KIND[dtype]


def plain_map(name: str, operands: int) -> Lowered:
    """An operation that is one map, in the dtype of its result."""

    def lower(at: Lowering, node: Node) -> None:
        if len(node.args) != operands or node.kwargs:
            raise Unfit(f"{node.op.name} with other arguments")
        kind = kind_of(node.outputs[0])
        places = [at.operand(each, kind) for each in node.args]
        at.map(name, at.result(node.outputs[0]), *places, kind=kind)

    return lower


for _name, _overloads in {
    "neg": [aten.neg.default], "exp": [aten.exp.default], "expm1": [aten.expm1.default], "log": [aten.log.default],
    "log1p": [aten.log1p.default], "tanh": [aten.tanh.default], "sigmoid": [aten.sigmoid.default],
    "sqrt": [aten.sqrt.default], "rsqrt": [aten.rsqrt.default], "reciprocal": [aten.reciprocal.default],
    "sin": [aten.sin.default], "cos": [aten.cos.default], "tan": [aten.tan.default], "atan": [aten.atan.default],
    "abs": [aten.abs.default], "erf": [aten.erf.default], "sign": [aten.sign.default, aten.sgn.default],
    "silu": [aten.silu.default], "square": [aten.square.default],
}.items():  # fmt: skip
    for _overload in _overloads:
        lowers(_overload, pointwise=True)(plain_map(_name, 1))

for _name, _overloads in {
    "mul": [aten.mul.Tensor, aten.mul.Scalar], "div": [aten.div.Tensor, aten.div.Scalar],
    "maximum": [aten.maximum.default, aten.clamp_min.default, aten.clamp_min.Tensor],
    "minimum": [aten.minimum.default, aten.clamp_max.default, aten.clamp_max.Tensor],
    "atan2": [aten.atan2.default], "tanh_backward": [aten.tanh_backward.default],
    "sigmoid_backward": [aten.sigmoid_backward.default], "silu_backward": [aten.silu_backward.default],
    "and": [aten.bitwise_and.Tensor], "or": [aten.bitwise_or.Tensor], "xor": [aten.bitwise_xor.Tensor],
}.items():  # fmt: skip
    for _overload in _overloads:
        lowers(_overload, pointwise=True)(plain_map(_name, 2))

lowers(aten.threshold_backward.default, pointwise=True)(plain_map("threshold_backward", 3))


@lowers(aten.relu.default, pointwise=True)
def relu(at: Lowering, node: Node) -> None:
    place = at.place(node.args[0])
    at.map("relu_whole" if place.kind == "l" else "relu", at.result(node.outputs[0]), place)


def sum_of_two(name: str, *, turned: bool = False) -> Lowered:
    def lower(at: Lowering, node: Node) -> None:
        kind = kind_of(node.outputs[0])
        a, b = node.args[:2]
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if turned:
            a, b = b, a
        left, right = at.operand(a, kind), at.operand(b, kind)
        if alpha != 1:
            scaled = left if turned else right
            made = at.scratch(kind, scaled.shape)
            at.map("mul", made, scaled, at.operand(alpha, kind))
            left, right = (made, right) if turned else (left, made)
        at.map(name, at.result(node.outputs[0]), left, right, kind=kind)

    return lower


lowers(aten.add.Tensor, aten.add.Scalar, pointwise=True)(sum_of_two("add"))
lowers(aten.sub.Tensor, aten.sub.Scalar, pointwise=True)(sum_of_two("sub"))


@lowers(aten.rsub.Scalar, aten.rsub.Tensor, pointwise=True)
def rsub(at: Lowering, node: Node) -> None:  # alpha scales the first
    kind = kind_of(node.outputs[0])
    a, b = at.operand(node.args[0], kind), at.operand(node.args[1], kind)
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if alpha != 1:
        made = at.scratch(kind, a.shape)
        at.map("mul", made, a, at.operand(alpha, kind))
        a = made
    at.map("sub", at.result(node.outputs[0]), b, a, kind=kind)


def comparison(name: str) -> Lowered:
    def lower(at: Lowering, node: Node) -> None:
        kind = common_kind(node, node.args)
        a, b = (at.operand(each, kind) for each in node.args)
        if kind == "b" and name not in ("eq", "ne"):
            raise Unfit("an order of masks")
        at.map(name, at.result(node.outputs[0]), a, b, kind=kind)

    return lower


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    for _variant in ("Tensor", "Scalar"):
        lowers(getattr(getattr(aten, _name), _variant), pointwise=True)(comparison(_name))


@lowers(aten.logical_not.default, aten.bitwise_not.default, pointwise=True)
def inverted(at: Lowering, node: Node) -> None:
    if node.inputs[0].dtype is not torch.bool:
        raise Unfit("not of numbers")
    at.map("not", at.result(node.outputs[0]), at.place(node.args[0]))


def of_masks(name: str) -> Lowered:
    def lower(at: Lowering, node: Node) -> None:
        a, b = (at.operand(each, "b") for each in node.args)
        at.map(name, at.result(node.outputs[0]), a, b)

    return lower


for _name in ("and", "or", "xor"):
    lowers(getattr(aten, f"logical_{_name}").default, pointwise=True)(of_masks(_name))


@lowers(aten.isnan.default, pointwise=True)
def isnan(at: Lowering, node: Node) -> None:
    place = at.place(node.args[0])
    if place.kind not in "fd":
        raise Unfit("isnan of whole numbers")
    at.map("isnan", at.result(node.outputs[0]), place)


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, pointwise=True)
def power(at: Lowering, node: Node) -> None:
    kind = kind_of(node.outputs[0])
    exponent = node.args[1]
    known = {1: "copy", 2: "square", 3: "cube", 0.5: "sqrt", -1: "reciprocal", -0.5: "rsqrt"}
    name = known.get(exponent) if isinstance(exponent, (int, float)) else None
    if kind not in "fd" and (name not in WHOLE or exponent not in (1, 2, 3)):
        raise Unfit("a power of whole numbers")
    if name is not None and isinstance(node.args[0], Value):
        at.map(name, at.result(node.outputs[0]), at.operand(node.args[0], kind), kind=kind)
        return
    base, by = at.operand(node.args[0], kind), at.operand(exponent, kind)
    at.map("pow", at.result(node.outputs[0]), base, by, kind=kind)


@lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, pointwise=True)
def where(at: Lowering, node: Node) -> None:
    kind = kind_of(node.outputs[0])
    mask, a, b = at.operand(node.args[0], "b"), at.operand(node.args[1], kind), at.operand(node.args[2], kind)
    at.map("where", at.result(node.outputs[0]), mask, a, b, kind=kind)


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor, pointwise=True)
def masked_fill(at: Lowering, node: Node) -> None:
    kind = kind_of(node.outputs[0])
    number = node.args[2]
    if kind == "l" and isinstance(number, Value) and number.dtype.is_floating_point:
        raise Unfit("a fraction among whole numbers")
    a, mask = at.operand(node.args[0], kind), at.operand(node.args[1], "b")
    at.map("masked_fill", at.result(node.outputs[0]), a, mask, at.operand(number, kind), kind=kind)


@lowers(aten.clamp.default, aten.clamp.Tensor, aten.hardtanh.default, pointwise=True)
def clamp(at: Lowering, node: Node) -> None:
    kind = kind_of(node.outputs[0])
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    if node.op.forward is aten.hardtanh.default:
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    place = at.operand(node.args[0], kind)
    result = at.result(node.outputs[0])
    if low is not None and high is not None:
        at.map("clamp", result, place, at.operand(low, kind), at.operand(high, kind), kind=kind)
    elif low is not None:
        at.map("maximum", result, place, at.operand(low, kind), kind=kind)
    else:
        at.map("minimum", result, place, at.operand(high, kind), kind=kind)


@lowers(aten.softplus.default, pointwise=True)
def softplus(at: Lowering, node: Node) -> None:
    a, beta, threshold = (*node.args, 1.0, 20.0)[:3] if len(node.args) < 3 else node.args
    if len(node.args) == 2:
        threshold = 20.0
    kind = kind_of(node.outputs[0])
    at.map("softplus", at.result(node.outputs[0]), at.place(a), at.operand(float(beta), kind),
           at.operand(float(threshold), kind))  # fmt: skip


@lowers(aten.softplus_backward.default, pointwise=True)
def softplus_backward(at: Lowering, node: Node) -> None:
    g, x, beta, threshold = node.args
    kind = kind_of(node.outputs[0])
    scaled = at.place(x)
    if beta != 1:
        made = at.scratch(kind, scaled.shape)
        at.map("mul", made, scaled, at.operand(float(beta), kind))
        scaled = made
    at.map("softplus_backward", at.result(node.outputs[0]), at.place(g), scaled, at.operand(float(threshold), kind))


@lowers(aten.addcmul.default, aten.addcdiv.default, pointwise=True)
def addcmul(at: Lowering, node: Node) -> None:
    kind = kind_of(node.outputs[0])
    a, b, c = (at.operand(each, kind) for each in node.args[:3])
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else 1)
    made = at.scratch(kind, at.shape(node.outputs[0]))
    at.map("mul" if node.op.forward is aten.addcmul.default else "div", made, b, c)
    if value != 1:
        at.map("mul", made, made, at.operand(value, kind))
    at.map("add", at.result(node.outputs[0]), a, made)


@lowers(aten._to_copy.default, aten.clone.default, pointwise=True)
def copied(at: Lowering, node: Node) -> None:
    result = at.result(node.outputs[0])
    place = at.place(node.args[0])
    if place.kind in "fd" and result.kind == "l":
        raise Unfit("whole numbers of fractions")  # what becomes of NaN is the processor's business
    at.map("copy" if place.kind == result.kind else f"to_{result.kind}", result, place)


# -- views -------------------------------------------------------------------------------------------------------


@lowers(aten.t.default, aten.transpose.int, aten.permute.default)
def turned(at: Lowering, node: Node) -> None:
    place = at.place(node.args[0])
    rank = len(place.shape)
    order = list(range(rank))
    if node.op.forward is aten.permute.default:
        order = [d % rank for d in node.args[1]] if rank else []
    elif rank and node.op.forward is aten.t.default:
        order.reverse()
    elif rank:
        one, other = node.args[1] % rank, node.args[2] % rank
        order[one], order[other] = other, one
    at.view(node.outputs[0], place.permuted(order))


@lowers(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default,
        aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)  # fmt: skip
def viewed(at: Lowering, node: Node) -> None:
    place, shape = at.place(node.args[0]), at.shape(node.outputs[0])
    found = reshaped_or_none(place, shape)
    if found is None:
        copy = at.scratch(place.kind, place.shape)
        at.map("copy", copy, place)
        found = reshaped(copy, shape)
    at.view(node.outputs[0], found)


@lowers(aten.expand.default)
def expanded(at: Lowering, node: Node) -> None:
    at.view(node.outputs[0], at.place(node.args[0]).expanded(at.shape(node.outputs[0])))


@lowers(aten.select.int)
def selected(at: Lowering, node: Node) -> None:
    place, dim, i = at.place(node.args[0]), node.args[1], node.args[2]
    dim %= len(place.shape)
    at.view(node.outputs[0], place.part(dim, i % place.shape[dim], 1).without(dim))


def begin_of(node: Node, place: int, length: int) -> tuple[int, int]:
    """Where a slice begins, and its step: `place` is where the argument ``start`` stands."""
    start = node.args[place] if len(node.args) > place else None
    step = node.args[place + 2] if len(node.args) > place + 2 else 1
    start = 0 if start is None else start
    return min(max(start + length if start < 0 else start, 0), length), step


@lowers(aten.slice.Tensor)
def sliced(at: Lowering, node: Node) -> None:
    place = at.place(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(place.shape)
    start, step = begin_of(node, 2, place.shape[dim])
    length = at.shape(node.outputs[0])[dim]
    if length == place.shape[dim]:
        start = 0
    at.view(node.outputs[0], place.part(dim, start, length, step))


# -- parts put together ------------------------------------------------------------------------------------------


@lowers(aten.select_backward.default)
def select_backward(at: Lowering, node: Node) -> None:
    g, _, dim, i = node.args
    result = at.result(node.outputs[0])
    dim %= len(result.shape)
    at.map("copy", result, at.constants.place(0.0, result.kind))
    at.map("copy", result.part(dim, i % result.shape[dim], 1).without(dim), at.place(g))


@lowers(aten.slice_backward.default)
def slice_backward(at: Lowering, node: Node) -> None:
    g, _, dim = node.args[:3]
    result, source = at.result(node.outputs[0]), at.place(g)
    dim %= len(result.shape)
    start, step = begin_of(node, 3, result.shape[dim])
    at.map("copy", result, at.constants.place(0.0, result.kind))
    at.map("copy", result.part(dim, start, source.shape[dim], step), source)


@lowers(aten.cat.default)
def cat(at: Lowering, node: Node) -> None:
    result = at.result(node.outputs[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(result.shape)
    begin = 0
    for each in node.args[0]:
        place = at.operand(each, result.kind)
        if len(place.shape) != len(result.shape):  # torch leaves out what has the shape (0,)
            raise Unfit("parts of other shapes")
        at.map("copy", result.part(dim, begin, place.shape[dim]), place)
        begin += place.shape[dim]


@lowers(aten.stack.default)
def stack(at: Lowering, node: Node) -> None:
    result = at.result(node.outputs[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(result.shape)
    for i, each in enumerate(node.args[0]):
        at.map("copy", result.part(dim, i, 1).without(dim), at.operand(each, result.kind))


# -- totals ------------------------------------------------------------------------------------------------------


@lowers(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def summed(at: Lowering, node: Node) -> None:
    value = node.outputs[0]
    mean = node.op.name.startswith("mean")
    kind = kind_of(value)
    source = node.inputs[0]
    dims = dims_of(node) if node.op.forward in (aten.sum.dim_IntList, aten.mean.dim) else tuple(range(source.ndim))
    count = prod(source.shape[d] for d in dims)
    if mean and not count:
        raise Unfit("a mean of nothing")
    at.reduce("sum", value, at.cast(at.place(source), kind), dims, 0 if kind == "l" else 0.0, count if mean else None)


@lowers(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default, aten.any.default, aten.any.dim,
        aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims)  # fmt: skip
def extreme(at: Lowering, node: Node) -> None:
    value, name = node.outputs[0], node.op.name.partition(".")[0]
    place = at.place(node.args[0])
    if name in ("any", "all"):
        place = at.cast(place, "b")
    dims = dims_of(node)
    large = name in ("amax", "max", "any")
    starts = {"b": not large, "l": -(2**63) if large else 2**63 - 1}
    start = starts.get(place.kind, -inf if large else inf)
    at.reduce("largest" if large else "smallest", value, place, dims, start)


def parts_of_softmax(at: Lowering, place: Place, dim: int) -> tuple[Place, Place]:
    """The arguments less their largest, and the sums of the exponentials of that, which go back to the caller."""
    kept = tuple(1 if d == dim else n for d, n in enumerate(place.shape))
    top = at.scratch(place.kind, kept)
    at.map("copy", top, at.constants.place(-inf, place.kind))
    at.map("largest", top, place, gathers=True)
    return top, at.scratch(place.kind, kept)


def filled_sum(at: Lowering, total: Place, source: Place) -> None:
    at.map("copy", total, at.constants.place(0.0, total.kind))
    at.map("sum", total, source, gathers=True)


@lowers(aten._softmax.default, aten._log_softmax.default)
def softmax(at: Lowering, node: Node) -> None:
    x, dim, half = node.args
    place, result = at.place(x), at.result(node.outputs[0])
    if half or not place.shape:
        raise Unfit("another dtype")
    dim %= len(place.shape)
    top, total = parts_of_softmax(at, place, dim)
    at.map("sub", result, place, top)
    if node.op.forward is aten._softmax.default:
        at.map("exp", result, result)
        filled_sum(at, total, result)
        at.map("div", result, result, total)
        return
    made = at.scratch(place.kind, place.shape)
    at.map("exp", made, result)
    filled_sum(at, total, made)
    at.map("log", total, total)
    at.map("sub", result, result, total)


@lowers(aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)
def softmax_backward(at: Lowering, node: Node) -> None:
    g, out, dim, dtype = node.args
    given, made = at.place(g), at.place(out)
    if dtype is not node.outputs[0].dtype or not given.shape:
        raise Unfit("another dtype")
    dim %= len(given.shape)
    result = at.result(node.outputs[0])
    total = at.scratch(given.kind, tuple(1 if d == dim else n for d, n in enumerate(given.shape)))
    part = at.scratch(given.kind, given.shape)
    if node.op.forward is aten._softmax_backward_data.default:
        at.map("mul", part, given, made)
        filled_sum(at, total, part)
        at.map("sub", part, given, total)
        at.map("mul", result, part, made)
        return
    filled_sum(at, total, given)
    at.map("exp", part, made)
    at.map("mul", part, part, total)
    at.map("sub", result, given, part)


# -- products ----------------------------------------------------------------------------------------------------


def stacked(place: Place) -> Place:
    """A matrix as a stack of one."""
    return Place(place.memory, place.kind, (1, *place.shape), (0, *place.strides), place.start)


def column(place: Place) -> Place:
    return Place(place.memory, place.kind, (1, *place.shape, 1), (0, *place.strides, 1), place.start)


def row(place: Place) -> Place:
    return Place(place.memory, place.kind, (1, 1, *place.shape), (0, 0, *place.strides), place.start)


def floating(place: Place) -> Place:
    if place.kind not in "fd":
        raise Unfit("a product of whole numbers")
    return place


@lowers(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def product(at: Lowering, node: Node) -> None:
    a, b = floating(at.place(node.args[0])), at.place(node.args[1])
    if node.op.forward is aten.mv.default:
        a, b = stacked(a), column(b)
    elif node.op.forward is aten.dot.default:
        a, b = row(a), column(b)
    elif node.op.forward is aten.mm.default:
        a, b = stacked(a), stacked(b)
    at.product(node.outputs[0], a, b)


@lowers(aten.addmm.default, aten.addmv.default, aten.baddbmm.default)
def product_added(at: Lowering, node: Node) -> None:
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        raise Unfit("a product scaled")
    bias, a, b = floating(at.place(node.args[0])), at.place(node.args[1]), at.place(node.args[2])
    shape = at.shape(node.outputs[0])
    if node.op.forward is aten.addmv.default:
        at.product(node.outputs[0], stacked(a), column(b), column(bias.expanded(shape)))
    elif node.op.forward is aten.addmm.default:
        at.product(node.outputs[0], stacked(a), stacked(b), stacked(bias.expanded(shape)))
    else:
        at.product(node.outputs[0], a, b, bias.expanded(shape))


# -- lines picked by indices ---------------------------------------------------------------------------------------


def in_lines(at: Lowering, place: Place) -> Place:
    """A tensor as lines (first dimension, all others), each without gaps."""
    count = place.shape[0]
    shape = (count, prod(place.shape[1:]))
    found = reshaped_or_none(place, shape)
    if found is None or (found.strides[1] != 1 and shape[1] != 1):
        copy = at.scratch(place.kind, place.shape)
        at.map("copy", copy, place)
        found = reshaped(copy, shape)
    return found


def single_index(node: Node, indices: Sequence[Any]) -> Value:
    """The one tensor of indices into the first dimension."""
    found = indices[0] if len(indices) == 1 else None
    if not isinstance(found, Value) or found.ndim != 1 or found.dtype is not torch.int64:
        raise Unfit("indices of another form")
    return found


@lowers(aten.index.Tensor, aten.index_select.default, aten.embedding.default)
def taken(at: Lowering, node: Node) -> None:
    source = node.args[0]
    if node.op.forward is aten.index.Tensor:
        indices = single_index(node, node.args[1])
    elif node.op.forward is aten.index_select.default:
        if node.args[1] not in (0, -source.ndim):
            raise Unfit("indices into another dimension")
        indices = single_index(node, [node.args[2]])
    else:
        indices = node.args[1]
    flat = at.place(indices)
    if flat.kind != "l" or not source.shape or not prod(source.shape):
        raise Unfit("indices of another dtype")
    lines = in_lines(at, at.place(source))
    count = prod(flat.shape)
    result = at.result(node.outputs[0])
    into = reshaped_or_none(result, (count, lines.shape[1]))
    if into is None or (into.strides[1] != 1 and lines.shape[1] != 1) or lines.kind == "b":
        raise Unfit("lines with gaps")
    if lines.kind == "l":
        raise Unfit("whole numbers picked")
    at.code.lines_at("take", into, lines, reshaped(flat, (count,)), lines.shape[0])


@lowers(aten.index_put.default, aten.index_add.default)
def added_at(at: Lowering, node: Node) -> None:
    if node.op.forward is aten.index_put.default:
        base, listed, values = node.args[:3]
        indices = single_index(node, listed)
        adds = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
        if not adds:
            raise Unfit("a write to what indices pick")
    else:
        base, dim, indices, values = node.args[:4]
        if dim not in (0, -base.ndim) or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 4:
            raise Unfit("indices into another dimension")
        indices = single_index(node, [indices])
    result = at.result(node.outputs[0])
    floating(result)
    if not result.is_dense or not result.numel:
        raise Unfit("lines with gaps")
    at.map("copy", result, at.place(base))
    count = indices.shape[0]
    values = at.place(values).expanded((count, *result.shape[1:]))
    into = reshaped(result, (result.shape[0], prod(result.shape[1:])))
    if not count:
        return
    at.code.lines_at("add_at", into, in_lines(at, values), at.place(indices), result.shape[0])


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
