"""What moves elements: views, which cost nothing, and parts put together."""

from __future__ import annotations

import torch

from .....tape import Node
from ..lowering import Lowering, lowers, reshaped, reshaped_or_none
from ..machine import Unfit

aten = torch.ops.aten


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
