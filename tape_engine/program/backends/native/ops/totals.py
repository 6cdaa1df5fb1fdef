"""Sums, means and extrema, and what is made of them: softmax."""

from __future__ import annotations

from math import inf, prod

import torch

from .....tape import Node
from ..lowering import Lowering, dims_of, kind_of, lowers
from ..machine import Place, Unfit

aten = torch.ops.aten


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
