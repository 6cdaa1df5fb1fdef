# mypy: allow-untyped-defs
"""Elements picked by index or mask, and put in their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..registry import declare, rule, sample, spec
from .common import C128, Tensor, aten, kernels, stand_in
from .reductions import at_index


def indices(*values: int, shape: tuple[int, ...] | None = None) -> Any:
    """An index tensor of a sample."""
    return spec(*(shape or (len(values),)), dtype=torch.int64, values=values)


def mask(*values: int, shape: tuple[int, ...] | None = None) -> Any:
    """A boolean mask of a sample."""
    return spec(*(shape or (len(values),)), dtype=torch.bool, values=values)


_rows = indices(2, 0, 2)
_grid = indices(0, 1, 2, 0, shape=(2, 2))

# -- lists of indices --------------------------------------------------------------------------------


@rule(
    aten.index.Tensor,
    formula="x[i]",
    samples=[
        sample(spec(3, 4), [_rows]),
        sample(spec(3, 4), [None, indices(3, 3)]),
        sample(spec(3, 4), [indices(0, -1), indices(1, 1)]),
        sample(spec(2, 3, 4), [indices(1), None, indices(0, 2)]),
        sample(spec(3, 4), [_grid]),
        sample(spec(3), [mask(1, 0, 1)]),
        sample(spec(2, 2), [mask(1, 0, 1, 1, shape=(2, 2))]),
        sample(spec(3, 4), [spec(0, dtype=torch.int64)]),
        sample(spec(0, 4), [spec(0, dtype=torch.int64)]),
        sample(spec(3, dtype=C128), [_rows]),
        sample(spec(3), [indices(1, shape=())]),
    ],
)
@rule(aten._unsafe_index.Tensor, samples=[sample(spec(3, 4), [_rows])])
def index_grad(g, out, x, where):
    return kernels.index_put(g.new_zeros(x.shape), where, g, True), *[None for _ in where]


@rule(
    aten.index_put.default,
    samples=[
        sample(spec(3, 4), [indices(2, 0)], spec(2, 4)),
        sample(spec(3, 4), [indices(2, 0)], spec(4)),
        sample(spec(3, 4), [None, indices(1, 3)], spec()),
        sample(spec(3, 4), [_rows], spec(3, 4), True),
        sample(spec(3), [mask(1, 0, 1)], spec()),
        sample(spec(3), [mask(1, 0, 1)], spec(2)),
        sample(spec(3, dtype=C128), [indices(0)], spec(1, dtype=C128)),
    ],
)
@rule(aten._unsafe_index_put.default, samples=[sample(spec(3, 4), [indices(2, 0)], spec(2, 4))])
def index_put_grad(g, out, x, where, values, accumulate=False):
    g_values = to_shape(aten.index.Tensor(g, where), values.shape)  # before `g` is written to, which a replay may do
    kept = g if accumulate else kernels.index_put(g, where, g.new_zeros(()))
    return kept, *[None for _ in where], g_values


def to_shape(g: Tensor, shape: Sequence[int]) -> Tensor:
    """`g` summed to the shape that was broadcast to its own."""
    lead = g.ndim - len(shape)
    dims = [*range(lead), *[d + lead for d, n in enumerate(shape) if n == 1 and g.shape[d + lead] != 1]]
    return g.sum(dims).reshape(shape) if dims else g


# -- one index tensor, along one dimension -----------------------------------------------------------


@rule(
    aten.index_select.default,
    samples=[sample(spec(3, 4), 0, _rows), sample(spec(3, 4), -1, indices(1)), sample(spec(), 0, indices(0))],
)
def index_select_grad(g, out, x, dim, index):
    if len(x.shape) == 0:
        return g.sum(), None
    return g.new_zeros(x.shape).index_add(dim, index, g), None


@rule(
    aten.index_add.default,
    samples=[sample(spec(3, 4), 0, _rows, spec(3, 4)), sample(spec(3, 4), -1, indices(1), spec(3, 1), alpha=2.5)],
)
def index_add_grad(g, out, x, dim, index, source, *, alpha=1):
    part = g.index_select(dim, index)
    return g, None, part * alpha if alpha != 1 else part


@rule(
    aten.index_copy.default,
    samples=[sample(spec(3, 4), 0, indices(2, 0), spec(2, 4)), sample(spec(3, 4), -1, indices(1), spec(3, 1))],
)
def index_copy_grad(g, out, x, dim, index, source):
    g_source = g.index_select(dim, index).reshape(source.shape)
    return g.index_fill(dim, index, 0), None, g_source


@rule(
    aten.index_fill.int_Scalar,
    samples=[sample(spec(3, 4), 0, indices(2, 0), 1.5), sample(spec(3, 4), -1, indices(1), 0)],
)
def index_fill_grad(g, out, x, dim, index, value):
    return g.index_fill(dim, index, 0), None


@rule(
    aten.index_fill.int_Tensor,
    samples=[
        sample(spec(3, 4), 0, indices(2, 0), spec()),
        sample(spec(3), 0, indices(1, 1), spec()),
        sample(spec(), 0, indices(0), spec()),
    ],
)
def index_fill_tensor_grad(g, out, x, dim, index, value):
    filled = torch.zeros(g.shape, dtype=torch.bool, device=g.device).index_fill(dim, index, True)  # each once
    return g.index_fill(dim, index, 0), None, torch.where(filled, g, 0).sum()


# -- an index for each element -----------------------------------------------------------------------

_at = indices(0, 1, 2, 0, 0, 1, shape=(2, 3))
_each = indices(0, 1, 2, 1, 2, 0, shape=(2, 3))


@rule(
    aten.gather.default,
    samples=[sample(spec(2, 3), 1, _at), sample(spec(3, 3), 0, _at), sample(spec(), 0, indices(0, shape=()))],
)
def gather_grad(g, out, x, dim, index, *, sparse_grad=False):
    return g.new_zeros(x.shape).scatter_add(dim, index, g), None


@rule(aten.scatter.src, samples=[sample(spec(2, 3), 1, _each, spec(2, 3)), sample(spec(3, 3), 0, _each, spec(2, 3))])
def scatter_grad(g, out, x, dim, index, src):
    g_src = g.gather(dim, index)
    return g.scatter(dim, index, 0), None, g_src


@rule(aten.scatter.value, samples=[sample(spec(2, 3), 1, _at, 2.5)])
def scatter_value_grad(g, out, x, dim, index, value):
    return g.scatter(dim, index, 0), None


@rule(
    aten.scatter_add.default, samples=[sample(spec(2, 3), 1, _at, spec(2, 3)), sample(spec(3, 3), 0, _at, spec(2, 3))]
)
def scatter_add_grad(g, out, x, dim, index, src):
    return g, None, g.gather(dim, index)


def _reduced_grad(
    g: Tensor, out: Tensor, x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool
) -> tuple[Tensor, None, Tensor]:
    """Of a reduction of `src` into the places that `index` names, the element of `x` there among them or not."""
    if reduce == "sum":
        by_x, by_src = g, g.gather(dim, index)
    elif reduce == "mean":
        number = torch.ones_like(x) if include_self else torch.zeros_like(x)
        number = number.scatter_add(dim, index, torch.ones_like(src)).clamp(min=1)
        by_x, by_src = g / number, (g / number).gather(dim, index)
    elif reduce == "prod":
        # the product of the others: the whole over this one, but for a zero; there with another zero as a factor,
        # for that zero's gradient: the sum of both less this one
        start = x if include_self else x.scatter(dim, index, 1)
        filled_x, filled_src = torch.where(start == 0, 1, start), torch.where(src == 0, 1, src)
        zeros = (start == 0).to(g.dtype).scatter_add(dim, index, (src == 0).to(g.dtype))
        whole = filled_x.scatter_reduce(dim, index, filled_src, "prod")
        other = torch.where(start == 0, start, 0).scatter_add(dim, index, torch.where(src == 0, src, 0))
        by_x = g * torch.where(start == 0, _without_one(whole, zeros, other, start), out / filled_x)
        rest, number, others, all_of_it = (t.gather(dim, index) for t in (g * whole, zeros, other, g * out))
        by_src = torch.where(src == 0, _without_one(rest, number, others, src), all_of_it / filled_src)
    else:
        chosen, chosen_src = x == out, src == out.gather(dim, index)
        start = chosen.to(g.dtype) if include_self else chosen.to(g.dtype).scatter(dim, index, 0)
        share = g / start.scatter_add(dim, index, chosen_src.to(g.dtype)).clamp(min=1)
        by_x, by_src = torch.where(chosen, share, 0), torch.where(chosen_src, share.gather(dim, index), 0)
    return by_x if include_self else by_x.scatter(dim, index, 0), None, by_src


def _without_one(whole: Tensor, zeros: Tensor, their_sum: Tensor, zero: Tensor) -> Tensor:
    """The product of what stands beside a zero; `whole` is that of all but zeros, a second zero their sum less this."""
    return torch.where(zeros == 1, whole, torch.where(zeros == 2, whole * (their_sum - zero), 0))


_reductions = ("sum", "mean", "prod", "amax", "amin")


@rule(
    aten.scatter_reduce.two,
    samples=[
        *[sample(spec(2, 4), 1, _at, spec(2, 3), r) for r in _reductions],
        *[sample(spec(2, 4), 1, _at, spec(2, 3), r, include_self=False) for r in _reductions],
        sample(spec(3), 0, indices(0, 0, 1), spec(3, values=[0.0, 2.0, 0.0]), "prod"),
        sample(spec(2, values=[0.0, 1.0]), 0, indices(0, 0, 1), spec(3, values=[0.0, 2.0, 0.0]), "prod"),
        sample(spec(2, values=[3.0, 1.0]), 0, indices(0, 0, 1), spec(3, values=[3.0, 2.0, 1.0]), "amax"),
    ],
)
def scatter_reduce_grad(g, out, x, dim, index, src, reduce, *, include_self=True):
    return _reduced_grad(g, out, x, dim, index, src, reduce, include_self)


@rule(
    aten.index_reduce.default,
    samples=[
        sample(spec(4, 2), 0, _rows, spec(3, 2), r, include_self=s)
        for r in ("mean", "prod", "amax", "amin")
        for s in (True, False)
    ]
    + [sample(spec(), 0, indices(0), spec(), r) for r in ("mean", "prod", "amax", "amin")],
)
def index_reduce_grad(g, out, x, dim, index, source, reduce, *, include_self=True):
    each = index.reshape([-1 if d == dim % source.ndim else 1 for d in range(source.ndim)]).expand(source.shape)
    return _reduced_grad(g, out, x, dim, each, source, reduce, include_self)


@rule(aten.take.default, samples=[sample(spec(2, 3), indices(5, 0, 5)), sample(spec(2, 3), _grid)])
def take_grad(g, out, x, index):
    shape = x.shape
    return g.new_zeros(shape).put(index, g, accumulate=True), None


@rule(
    aten.put.default,
    samples=[sample(spec(2, 3), indices(5, 0), spec(2)), sample(spec(2, 3), indices(5, 0, 5), spec(3), True)],
)
def put_grad(g, out, x, index, source, accumulate=False):
    kept = g if accumulate else g.put(index, g.new_zeros(source.shape))
    return kept, None, g.take(index).reshape(source.shape)


# -- masks -------------------------------------------------------------------------------------------


@rule(
    aten.masked_fill.Scalar,
    broadcasts=True,
    samples=[sample(spec(2, 3), mask(1, 0, 1), 0.5), sample(spec(2, 1), mask(1, 0, 1), 0.5)],
)
def masked_fill_grad(g, out, x, mask, value):
    return g.masked_fill(mask, 0), None


@rule(
    aten.masked_fill.Tensor, samples=[sample(spec(2, 3), mask(1, 0, 1), spec()), sample(spec(3), mask(0, 0, 0), spec())]
)
def masked_fill_tensor_grad(g, out, x, mask, value):
    return to_shape(g.masked_fill(mask, 0), x.shape), None, torch.where(mask, g, 0).sum()


@rule(
    aten.masked_select.default,
    samples=[sample(spec(2, 3), mask(1, 0, 1)), sample(spec(2, 1), mask(1, 0, 1)), sample(spec(), mask(1, shape=()))],
)
def masked_select_grad(g, out, x, mask):
    whole = torch.zeros_like(torch.where(mask, stand_in(g, x.shape), 0))
    return to_shape(whole.masked_scatter(mask, g), x.shape), None


@rule(
    aten.masked_scatter.default,
    samples=[sample(spec(2, 3), mask(1, 0, 1), spec(4)), sample(spec(2, 3), mask(1, 0, 1), spec(2, 3))],
)
def masked_scatter_grad(g, out, x, mask, source):
    size = source.numel()
    whole = mask.expand(g.shape).reshape(-1)
    rank = (whole.cumsum(0) - 1).clamp(0, max(size - 1, 0))  # which element of the source went there
    taken = g.new_zeros(size).index_add(0, rank, torch.where(whole, g.reshape(-1), 0)) if size else g.new_zeros(0)
    return to_shape(g.masked_fill(mask, 0), x.shape), None, taken.reshape(source.shape)


@rule(aten._unsafe_masked_index.default, samples=[sample(spec(3), mask(1, 0, 1), [indices(2, 0, 2)], 0)])
def unsafe_masked_index_grad(g, out, x, mask, where, fill):
    back = kernels._unsafe_masked_index_put_accumulate(g.new_zeros(x.shape), mask, where, g)
    return back, None, *[None for _ in where]


@rule(
    aten._unsafe_masked_index_put_accumulate.default,
    samples=[sample(spec(3), mask(1, 0, 1), [indices(2, 0, 2)], spec(3))],
)
def unsafe_masked_index_put_accumulate_grad(g, out, x, mask, where, values):
    return g, None, *[None for _ in where], kernels._unsafe_masked_index(g, mask, where, 0)


# -- sorted ------------------------------------------------------------------------------------------


@rule(aten.topk.default, samples=[sample(spec(2, 4), 2), sample(spec(4, 2), 3, 0, False), sample(spec(), 1)])
def topk_grad(g, out, x, k, dim=-1, largest=True, sorted=True):
    return at_index(g[0], out[1], x.shape, dim, True)


@rule(aten.sort.default, samples=[sample(spec(2, 4)), sample(spec(4, 2), 0, True), sample(spec())])
def sort_grad(g, out, x, dim=-1, descending=False):
    return at_index(g[0], out[1], x.shape, dim, True)


@rule(
    aten.sort.stable,
    samples=[sample(spec(2, 4), stable=True), sample(spec(4, values=[1.0, 2.0, 1.0, 2.0]), stable=True)],
)
def sort_stable_grad(g, out, x, *, stable=None, dim=-1, descending=False):
    return at_index(g[0], out[1], x.shape, dim, True)


# -- tables ------------------------------------------------------------------------------------------


@rule(
    aten.embedding.default,
    formula="w[i]",
    samples=[
        sample(spec(4, 3), indices(1, 3, 1)),
        sample(spec(4, 2, values=range(8)), indices(1, 3, 1, 0, shape=(2, 2)), 1),
        sample(spec(4, 2, values=range(8)), indices(1, 3, 1), -1, True),
        sample(spec(4, 3), spec(0, dtype=torch.int64)),
    ],
)
def embedding_grad(g, out, weight, index, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return kernels.embedding_dense_backward(g, index, weight.shape[0], padding_idx, scale_grad_by_freq), None


@rule(
    aten.embedding_dense_backward.default,
    samples=[sample(spec(3, 2), indices(1, 3, 1), 4, -1, False), sample(spec(3, 2), indices(1, 3, 1), 4, 3, False)],
)
def embedding_dense_backward_grad(g, out, gy, index, rows, padding_idx, scale_grad_by_freq):
    picked = g.index_select(0, index.reshape(-1)).reshape(gy.shape)
    if scale_grad_by_freq:
        number = torch.zeros(rows, dtype=g.dtype, device=g.device).index_add(
            0, index.reshape(-1), torch.ones(index.numel(), dtype=g.dtype, device=g.device)
        )
        picked = picked / number.index_select(0, index.reshape(-1)).reshape(index.shape).unsqueeze(-1)
    return torch.where((index == padding_idx).unsqueeze(-1), 0, picked), None


declare(
    aten.nonzero.default, aten.searchsorted.Tensor, aten.searchsorted.Scalar, aten.bucketize.Tensor,
    aten.bucketize.Scalar, aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar, aten.isin.Scalar_Tensor,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.tril_indices.default,
    aten.triu_indices.default, aten.repeat_interleave.Tensor,
)  # fmt: skip
