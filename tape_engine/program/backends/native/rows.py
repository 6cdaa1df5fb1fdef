"""Which operations work row by row, so that a block of rows can go through all of them while it is in cache.

Of a value with rows one dimension is told: the one along which the rows lie. An operation keeps rows if each row of
its result depends on the same row of its operands alone (and on what has no rows). It is a sum over the rows if the
dimension goes in it: those sums are all that one block needs of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch

from ....tape import Node, Value
from .lowering import FILLS, POINTWISE, dims_of

__all__ = ["SUMMED", "Rows", "dimension_of"]

aten = torch.ops.aten

#: What a sum over the rows is told by, in the place of a dimension.
SUMMED = -1

PRODUCTS = {aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default}
ADDED = {aten.addmm.default, aten.baddbmm.default, aten.addmv.default}
RESHAPED = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
TURNED = {aten.t.default, aten.transpose.int, aten.permute.default}
REDUCED = {
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten.max.default, aten.min.default, aten.any.default, aten.all.default, aten.any.dim, aten.all.dim,
    aten.any.dims, aten.all.dims,
}  # fmt: skip
WHOLE = {
    aten.sum.default, aten.mean.default, aten.max.default, aten.min.default, aten.any.default, aten.all.default,
}  # fmt: skip
SOFTMAX = {aten._softmax.default: 1, aten._log_softmax.default: 1,
           aten._softmax_backward_data.default: 2, aten._log_softmax_backward_data.default: 2}  # fmt: skip
TAKEN = {aten.index.Tensor, aten.embedding.default}


class Rows:
    """The rows of a list of nodes, for one number of rows.

    Attributes:
        count: how many rows there are.
        dims: for each value with rows the dimension in which they lie.
        summed: the values that are sums over the rows.
        nodes: the nodes that work row by row, or sum over the rows.
    """

    def __init__(
        self, count: int, nodes: Iterable[Node], canonical: Callable[[Value], Value], able: Callable[[Node], bool]
    ) -> None:
        self.count = count
        self.dims: dict[Value, int] = {}
        self.summed: set[Value] = set()
        self.nodes: set[Node] = set()
        self._canonical = canonical
        self._known: set[Value] = set()  # values looked at
        for node in nodes:
            outputs = [canonical(v) for v in node.outputs]
            found = self._of(node) if able(node) and len(outputs) == 1 and node.result is None else None
            self._known.update(outputs)
            if found is None:
                if len(outputs) >= 1 and node.result is None:
                    for value in outputs:
                        self._outside(value)
                continue
            self.nodes.add(node)
            if found == SUMMED:
                self.summed.add(outputs[0])
            else:
                self.dims[outputs[0]] = found

    def _outside(self, value: Value) -> None:
        """A value that is made elsewhere has rows where just one of its dimensions is as long."""
        dim = dimension_of(value.shape, self.count)
        if dim is not None:
            self.dims[value] = dim

    def dim(self, value: Value) -> int | None:
        """The dimension in which the rows of a value lie; ``None`` if it has none."""
        value = self._canonical(value)
        if value not in self._known:
            self._known.add(value)
            self._outside(value)
        return self.dims.get(value)

    def _of(self, node: Node) -> int | None:
        """The dimension in which the rows of its result lie, `SUMMED`, or ``None`` if it does not work by rows."""
        forward = node.op.forward
        out = node.outputs[0]
        if forward in FILLS:
            return dimension_of(out.shape, self.count)
        dims = [self.dim(v) for v in node.inputs]
        if all(d is None for d in dims):
            if forward is aten.expand.default and self.count not in node.inputs[0].shape:
                return dimension_of(out.shape, self.count)
            return None
        first = dims[0]
        if forward in POINTWISE:
            return self._aligned(node.inputs, dims, out)
        if forward in PRODUCTS:
            return _product(forward, dims)
        if forward in ADDED:
            found = _product(PRODUCT_OF[forward], dims[1:])
            if found is None or found == SUMMED:
                return None
            bias = self._aligned(node.inputs[:1], [first], out) if first is not None else found
            clear = first is not None or self._clear(node.inputs[0], out, found)
            return found if bias == found and clear else None
        if forward in TAKEN:
            if first is not None or (forward is aten.index.Tensor and len(node.inputs) != 2):
                return None
            return dims[1]
        if forward in (aten.cat.default, aten.stack.default):
            rank = out.ndim
            along = (node.args[1] if len(node.args) > 1 else 0) % rank
            if first is None or len({*dims}) != 1:
                return None
            moved = first + (forward is aten.stack.default and along <= first)
            return None if along == moved else moved
        if first is None:
            return None
        return self._of_one(node, first)

    def _of_one(self, node: Node, dim: int) -> int | None:
        """The same for operations on one tensor with rows."""
        forward, source, out = node.op.forward, node.inputs[0], node.outputs[0]
        rank = source.ndim
        if forward in TURNED:
            order = list(range(rank))
            if forward is aten.permute.default:
                order = [d % rank for d in node.args[1]]
            elif forward is aten.t.default:
                order.reverse()
            else:
                one, other = node.args[1] % rank, node.args[2] % rank
                order[one], order[other] = other, one
            return order.index(dim)
        if forward in RESHAPED:
            before = prod(source.shape[:dim])
            fitting = [d for d, n in enumerate(out.shape) if n == self.count and prod(out.shape[:d]) == before]
            return fitting[0] if fitting else None
        if forward is aten.expand.default:
            return dim + out.ndim - rank
        if forward in REDUCED:
            over = tuple(range(rank)) if forward in WHOLE else dims_of(node)
            if dim in over:
                return SUMMED
            return dim if out.ndim == rank else dim - sum(d < dim for d in over)
        if forward in SOFTMAX:
            if any(self.dim(v) != dim for v in node.inputs):
                return None
            return None if node.args[SOFTMAX[forward]] % rank == dim else dim
        if forward is aten.select.int:
            along = node.args[1] % rank
            return None if along == dim else dim - (along < dim)
        if forward is aten.slice.Tensor:
            along = (node.args[1] if len(node.args) > 1 else 0) % rank
            return None if along == dim else dim
        if forward is aten.select_backward.default:
            along = node.args[2] % out.ndim
            moved = dim + (along <= dim)
            return None if along == moved else moved
        if forward is aten.slice_backward.default:
            return None if node.args[2] % rank == dim else dim
        return None

    def _aligned(self, values: Sequence[Value], dims: Sequence[int | None], out: Value) -> int | None:
        """The dimension of the result where the rows of all operands meet, broadcast."""
        met = {d + out.ndim - v.ndim for v, d in zip(values, dims, strict=True) if d is not None}
        if len(met) != 1:
            return None
        dim = met.pop()
        clear = all(self._clear(v, out, dim) for v, d in zip(values, dims, strict=True) if d is None)
        return dim if clear and out.shape[dim] == self.count else None

    def _clear(self, value: Value, out: Value, dim: int) -> bool:
        """Whether a value without rows is the same for all of them."""
        place = dim - (out.ndim - value.ndim)
        return place < 0 or value.shape[place] == 1


PRODUCT_OF = {
    aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default, aten.addmv.default: aten.mv.default,
}  # fmt: skip


def _product(forward: Any, dims: Sequence[int | None]) -> int | None:
    """Where the rows of a product lie."""
    a, b = dims
    last = {aten.mm.default: 1, aten.bmm.default: 2, aten.mv.default: 1, aten.dot.default: 0}[forward]
    stack = forward is aten.bmm.default
    if stack and a == b == 0:
        return 0
    if a == last and b == last - 1 if forward in (aten.mm.default, aten.bmm.default) else a == last and b == 0:
        return SUMMED
    if a is not None and b is None and a == last - 1 and forward is not aten.dot.default:
        return a
    if b is not None and a is None and b == last and forward in (aten.mm.default, aten.bmm.default):
        return b
    return None


def dimension_of(shape: Sequence[int], count: int) -> int | None:
    """The one dimension that is `count` long, if there is just one."""
    fitting = [d for d, n in enumerate(shape) if n == count]
    return fitting[0] if len(fitting) == 1 else None
