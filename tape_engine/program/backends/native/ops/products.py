"""Products of matrices, and lines picked by indices."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from .....tape import Node, Value
from ..lowering import Lowering, lowers, reshaped, reshaped_or_none
from ..machine import Place, Unfit

aten = torch.ops.aten


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
