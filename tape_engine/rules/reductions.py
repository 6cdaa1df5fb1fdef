# mypy: allow-untyped-defs
"""Sums, means, products, extremes, norms, and running sums."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..registry import Sample, declare, rule, sample, spec
from .common import C128, Tensor, aten, count, flipped_cumsum, keep_dims, kernels, reduced, rule_name, spread


def over_dims(*more: Any, low: float = -2.0, complex: bool = True, **kwargs: Any) -> list[Sample]:
    """Samples of a reduction that takes a list of dimensions and ``keepdim``."""
    x = spec(2, 3, 4, low=low)
    made = [
        sample(x, *more, [1], **kwargs),
        sample(x, *more, [0, -1], **kwargs),
        sample(x, *more, [-2], True, **kwargs),
        sample(spec(low=low), *more, [0], **kwargs),
        sample(spec(3, 2, low=low), *more, [], **kwargs),
    ]
    if complex:
        made.append(sample(spec(2, 3, dtype=C128), *more, [1], **kwargs))
    return made


_whole = [sample(spec(2, 3)), sample(spec()), sample(spec(0, 3)), sample(spec(2, dtype=C128))]

# -- sums and means ----------------------------------------------------------------------------------


@rule(aten.sum.default, formula="Σ x", samples=[*_whole, sample(spec(3, dtype=torch.float32), dtype=torch.float64)])
def sum_grad(g, out, x, *, dtype=None):
    return g.expand(x.shape)


@rule(aten.sum.dim_IntList, formula="Σ x", samples=[*over_dims(), sample(spec(0, 3), [0]), sample(spec(2, 3), None)])
def sum_dim_grad(g, out, x, dim=None, keepdim=False, *, dtype=None):
    return spread(g, x.shape, dim, keepdim)


@rule(
    aten.nansum.default, samples=[*over_dims(complex=False), sample(spec(2, 2, values=[1.0, math.nan, 2.0, 3.0]), [0])]
)
def nansum_grad(g, out, x, dim=None, keepdim=False, *, dtype=None):
    return torch.where(x.isnan(), 0, spread(g, x.shape, dim, keepdim))


@rule(aten.mean.default, formula="mean(x)", samples=_whole)
def mean_grad(g, out, x, *, dtype=None):
    return (g / max(x.numel(), 1)).expand(x.shape)


@rule(aten.mean.dim, formula="mean(x)", samples=[*over_dims(), sample(spec(0, 3), [0])])
def mean_dim_grad(g, out, x, dim=None, keepdim=False, *, dtype=None):
    return spread(g / max(count(x.shape, dim), 1), x.shape, dim, keepdim)


@rule(
    aten.cumsum.default,
    samples=[sample(spec(3, 4), 1), sample(spec(3, 4), -2), sample(spec(), 0), sample(spec(0, 2), 0)],
)
def cumsum_grad(g, out, x, dim, *, dtype=None):
    return flipped_cumsum(g, dim)


# -- spread about the mean ---------------------------------------------------------------------------

_spreads = [
    sample(spec(2, 3)),
    sample(spec(2, 3, 4), [1]),
    sample(spec(2, 3, 4), [0, -1], correction=0),
    sample(spec(2, 3, 4), [1], correction=2, keepdim=True),
    sample(spec(2, 3), None, correction=0.5, keepdim=True),
    sample(spec(3, 4, dtype=C128), [1]),
]


def _variance(g: Tensor, x: Tensor, dim: Any, correction: Any, keepdim: bool) -> Tensor:
    """The gradient of ``Σ (x - mean)² / (n - correction)``; the mean's own part sums to nothing."""
    freedom = count(x.shape, dim) - (1 if correction is None else correction)
    centred = x - x.mean(reduced(x.ndim, dim), keepdim=True)
    return keep_dims(g, x.ndim, dim, keepdim) * (centred * 2 / freedom)


def _deviation(g: Tensor, std: Tensor) -> Tensor:
    """From the gradient of a standard deviation to that of the variance; 0 where nothing deviates."""
    return torch.where(std == 0, 0, g / (std * 2))


@rule(aten.var.correction, samples=_spreads)
def var_grad(g, out, x, dim=None, *, correction=None, keepdim=False):
    return _variance(g, x, dim, correction, keepdim)


@rule(aten.std.correction, samples=[*_spreads, sample(spec(2, 2, values=[1.0, 1.0, 2.0, 3.0]), [1])])
def std_grad(g, out, x, dim=None, *, correction=None, keepdim=False):
    return _variance(_deviation(g, out), x, dim, correction, keepdim)


def _and_mean(g: tuple[Any, ...], spread_part: Tensor | None, x: Tensor, dim: Any, keepdim: bool) -> Tensor | None:
    if g[1] is None:
        return spread_part
    mean_part = spread(g[1] / count(x.shape, dim), x.shape, dim, keepdim)
    return mean_part if spread_part is None else spread_part + mean_part


@rule(aten.var_mean.correction, samples=_spreads)
def var_mean_grad(g, out, x, dim=None, *, correction=None, keepdim=False):
    part = None if g[0] is None else _variance(g[0], x, dim, correction, keepdim)
    return _and_mean(g, part, x, dim, keepdim)


@rule(aten.std_mean.correction, samples=_spreads)
def std_mean_grad(g, out, x, dim=None, *, correction=None, keepdim=False):
    part = None if g[0] is None else _variance(_deviation(g[0], out[0]), x, dim, correction, keepdim)
    return _and_mean(g, part, x, dim, keepdim)


# -- products ----------------------------------------------------------------------------------------


def _others(x: Tensor, dim: int) -> Tensor:
    """For each element the product of all others along `dim`: those before it times those after it.

    Not ``prod / x``, which a zero would spoil.
    """
    if x.ndim == 0:
        return torch.ones_like(x)
    one = torch.ones_like(x.narrow(dim, 0, 1))
    before = torch.cat([one, x.narrow(dim, 0, x.shape[dim] - 1)], dim).cumprod(dim)
    after = torch.cat([one, x.flip(dim).narrow(dim, 0, x.shape[dim] - 1)], dim).cumprod(dim).flip(dim)
    return before * after


@rule(
    aten.prod.default,
    samples=[*_whole, sample(spec(3, values=[0.0, 2.0, 3.0])), sample(spec(3, values=[0.0, 0.0, 3.0]))],
)
def prod_grad(g, out, x, *, dtype=None):
    if x.numel() == 0:
        return torch.zeros_like(x)
    return (g * _others(x.reshape(-1), 0).conj()).reshape(x.shape)


@rule(
    aten.prod.dim_int,
    samples=[
        sample(spec(2, 3, 4), 1),
        sample(spec(2, 3, 4), -1, True),
        sample(spec(2, 3, dtype=C128), 0),
        sample(spec(), 0),
        sample(spec(0, 3), 0),
        sample(spec(2, 3, values=[0.0, 2.0, 3.0, 0.0, 0.0, 1.0]), 1),
    ],
)
def prod_dim_grad(g, out, x, dim, keepdim=False, *, dtype=None):
    if x.numel() == 0:
        return torch.zeros_like(x)
    return keep_dims(g, x.ndim, dim, keepdim) * _others(x, dim).conj()


@rule(
    aten.cumprod.default,
    samples=[
        sample(spec(3, 5), 1),
        sample(spec(3, 4), -2),
        sample(spec(2, 3, dtype=C128), 1),
        sample(spec(), 0),
        sample(spec(0, 2), 0),
        sample(spec(2, 4, values=[1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 1.0, 2.0]), 1),
    ],
)
def cumprod_grad(g, out, x, dim, *, dtype=None):
    """Element i gets the product before it times s_i, where s_i = g_i + x_{i+1} s_{i+1}: zeros do no harm."""
    if x.ndim == 0 or x.numel() == 0:
        return g
    n = x.shape[dim]
    factors = x.conj()
    first = torch.ones_like(factors.narrow(dim, 0, 1))
    before = torch.cat([first, factors.narrow(dim, 0, n - 1)], dim).cumprod(dim)
    following = torch.cat([factors.narrow(dim, 1, n - 1), torch.zeros_like(first)], dim)
    return before * _from_the_end(g, following, dim)


def _from_the_end(g: Tensor, factor: Tensor, dim: int) -> Tensor:
    """The solution of s_i = g_i + factor_i s_{i+1} along `dim`; the last factor is 0.

    By doubling (Hillis and Steele's scan): after k steps each s_i holds the terms of 2^k elements.
    """
    n, reach, s = g.shape[dim], 1, g
    while reach < n:
        gap = torch.zeros_like(factor.narrow(dim, 0, reach))
        s = s + factor * torch.cat([s.narrow(dim, reach, n - reach), gap], dim)
        factor = factor * torch.cat([factor.narrow(dim, reach, n - reach), gap], dim)
        reach *= 2
    return s


# -- logarithms of sums of exponentials --------------------------------------------------------------


@rule(
    aten.logsumexp.default,
    samples=[
        *over_dims()[:-2],
        sample(spec(2, 3, dtype=C128), [1]),
        sample(spec(2, 2, values=[-math.inf, -math.inf, 0.0, 1.0]), [1]),
    ],
)
def logsumexp_grad(g, out, x, dim, keepdim=False):
    return keep_dims(g, x.ndim, dim, keepdim) * (x - keep_dims(out, x.ndim, dim, keepdim)).exp().conj()


@rule(
    aten.logcumsumexp.default,
    samples=[
        sample(spec(3, 4), 1),
        sample(spec(3, 5), -2),
        sample(spec(2, 3, dtype=C128), 1),
        sample(spec(), 0),
        sample(spec(4, values=[-math.inf, -math.inf, 0.0, 900.0]), 0),
    ],
)
def logcumsumexp_grad(g, out, x, dim):
    """Element i gets exp(x_i - out_i) r_i, where r_i = g_i + exp(out_i - out_{i+1}) r_{i+1}: no power exceeds 1."""
    if x.ndim == 0 or x.numel() == 0:
        return g
    n = x.shape[dim]
    step = (out.narrow(dim, 0, n - 1) - out.narrow(dim, 1, n - 1)).exp()
    factor = torch.cat([step, torch.zeros_like(out.narrow(dim, 0, 1))], dim)
    return (x - out).exp().conj() * _from_the_end(g, factor.conj(), dim)


# -- extremes ----------------------------------------------------------------------------------------


def shared_extreme(target: Any) -> None:
    """Of ``amax`` and ``amin``: equals share the gradient evenly."""
    tied = spec(2, 3, values=[1.0, 3.0, 3.0, 2.0, 2.0, 2.0])

    @rule(target, samples=[*over_dims(complex=False), sample(tied, [1]), sample(tied, [0, 1]), sample(tied, [0], True)])
    def grad(g: Tensor, out: Tensor, x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
        chosen = x == keep_dims(out, x.ndim, dim, keepdim)
        share = chosen.sum(reduced(x.ndim, dim), keepdim=True) if x.ndim else 1
        return chosen * keep_dims(g, x.ndim, dim, keepdim) / share

    grad.__name__ = rule_name(target)


shared_extreme(aten.amax.default)
shared_extreme(aten.amin.default)


def one_extreme(target: Any) -> None:
    """Of the extreme or median of a whole tensor: equals share the gradient evenly; NaN equals NaN."""
    tied = spec(2, 3, values=[1.0, 3.0, 3.0, 1.0, 2.0, 1.0])
    nans = spec(3, values=[1.0, math.nan, math.nan])

    @rule(target, samples=[sample(spec(2, 3)), sample(spec()), sample(tied), sample(nans)])
    def grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        chosen = (x == out) | (x.isnan() & out.isnan())
        return chosen * g / chosen.sum()

    grad.__name__ = rule_name(target)


for _target in (aten.max, aten.min, aten.median, aten.nanmedian):
    one_extreme(_target.default)


@rule(
    aten.aminmax.default,
    samples=[sample(spec(2, 3)), sample(spec(2, 3), dim=1), sample(spec(2, 3), dim=0, keepdim=True)],
)
def aminmax_grad(g, out, x, *, dim=None, keepdim=False):
    total = None
    for each, extreme in zip(g, out, strict=True):
        if each is not None:
            chosen = x == keep_dims(extreme, x.ndim, dim, keepdim)
            part = chosen * keep_dims(each, x.ndim, dim, keepdim) / chosen.sum(reduced(x.ndim, dim), keepdim=True)
            total = part if total is None else total + part
    return total


def at_index(g: Tensor | None, index: Tensor, shape: torch.Size, dim: int, keepdim: bool) -> Tensor | None:
    """The gradient of values picked along `dim`: each goes back to the place it was picked from."""
    if g is None:
        return None
    return g.new_zeros(shape).scatter(
        dim, keep_dims(index, len(shape), dim, keepdim), keep_dims(g, len(shape), dim, keepdim)
    )


def picked(target: Any, *more: Any) -> None:
    """Of an operation that picks one value along a dimension, and tells its index."""
    tied = spec(2, 3, values=[1.0, 3.0, 3.0, 2.0, 2.0, 2.0])
    made = [
        sample(spec(2, 3), *more, 1),
        sample(spec(2, 3), *more, -2, True),
        sample(spec(), *more, 0),
        sample(tied, *more, 1),
    ]
    if more:

        @rule(target, samples=made)
        def grad(g: Any, out: Any, x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
            return at_index(g[0], out[1], x.shape, dim, keepdim)

    else:

        @rule(target, samples=made)
        def grad(g: Any, out: Any, x: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
            return at_index(g[0], out[1], x.shape, dim, keepdim)

    grad.__name__ = rule_name(target).replace("_grad", "_dim_grad")


for _picker in (aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default):
    picked(_picker)
picked(aten.kthvalue.default, 1)


def running_extreme(target: Any) -> None:
    """Of ``cummax`` and ``cummin``: an element gets the gradients of all places where it stands."""

    @rule(target, samples=[sample(spec(3, 4), 1), sample(spec(3, 4), -2), sample(spec(), 0)])
    def grad(g: Any, out: Any, x: Tensor, dim: int) -> Any:
        return None if g[0] is None else g[0].new_zeros(x.shape).scatter_add(dim, out[1], g[0])

    grad.__name__ = rule_name(target)


running_extreme(aten.cummax.default)
running_extreme(aten.cummin.default)


declare(
    aten.argmax.default, aten.argmin.default, aten.all.default, aten.all.dim, aten.all.dims, aten.any.default,
    aten.any.dim, aten.any.dims, aten.count_nonzero.default, aten.count_nonzero.dim_IntList, aten.bincount.default,
    aten.histc.default,
)  # fmt: skip


_lengths = spec(3, dtype=torch.int64, values=[2, 1, 2])


@rule(
    aten.segment_reduce.default,
    samples=[
        *[sample(spec(5, 2), r, lengths=_lengths) for r in ("sum", "mean", "max", "min", "prod")],
        sample(spec(5, 2), "sum", offsets=spec(4, dtype=torch.int64, values=[0, 2, 3, 5])),
        sample(spec(5), "max", lengths=_lengths, initial=1),
    ],
)
def segment_reduce_grad(
    g, out, x, reduce, *, lengths=None, indices=None, offsets=None, axis=0, unsafe=False, initial=None
):
    back = kernels._segment_reduce_backward(
        g.contiguous(), out, x, reduce, lengths=lengths, offsets=offsets, axis=axis, initial=initial
    )
    return back, None, None, None
