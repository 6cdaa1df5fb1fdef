"""What works element by element: a map or two each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .....tape import Node, Value
from ..lowering import WHOLE, Lowered, Lowering, kind_of, lowers
from ..machine import KIND, Unfit

aten = torch.ops.aten


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


def sum_of_two(name: str) -> Lowered:
    def lower(at: Lowering, node: Node) -> None:
        kind = kind_of(node.outputs[0])
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        left, right = at.operand(node.args[0], kind), at.operand(node.args[1], kind)
        if alpha != 1 and kind in "fd":
            factor = at.operand(alpha if name == "add" else -alpha, kind)
            at.map("add_scaled", at.result(node.outputs[0]), left, right, factor)
            return
        if alpha != 1:
            made = at.scratch(kind, right.shape)
            at.map("mul", made, right, at.operand(alpha, kind))
            right = made
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
    if value != 1:  # before the other two meet, as torch has it: what they give may be too large
        scaled = at.scratch(kind, b.shape)
        at.map("mul", scaled, b, at.operand(value, kind))
        b = scaled
    made = at.scratch(kind, at.shape(node.outputs[0]))
    at.map("mul" if node.op.forward is aten.addcmul.default else "div", made, b, c)
    at.map("add", at.result(node.outputs[0]), a, made)


@lowers(aten._to_copy.default, aten.clone.default, pointwise=True)
def copied(at: Lowering, node: Node) -> None:
    result = at.result(node.outputs[0])
    place = at.place(node.args[0])
    if place.kind in "fd" and result.kind == "l":
        raise Unfit("whole numbers of fractions")  # what becomes of NaN is the processor's business
    at.map("copy" if place.kind == result.kind else f"to_{result.kind}", result, place)
