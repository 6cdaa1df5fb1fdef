# mypy: allow-untyped-defs
"""Norms, distances between rows, and products of three."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..registry import rule, sample, spec
from .common import C128, Tensor, aten, keep_dims, kernels, reduced

# -- norms -------------------------------------------------------------------------------------------


def _norm(g: Tensor, norm: Tensor, x: Tensor, p: Any, dim: Any, keepdim: bool) -> Tensor:
    """The gradient of ``(Σ |x|^p)^(1/p)``: ``sgn(x) (|x| / norm)^(p-1)``; 0 at 0, as torch has it."""
    p = 2.0 if p is None else float(p)
    g, norm = keep_dims(g, x.ndim, dim, keepdim), keep_dims(norm, x.ndim, dim, keepdim)
    if p == 0:
        return torch.zeros_like(x)
    if p == 1:
        return x.sgn() * g
    if p == 2:
        return torch.where(norm == 0, 0, x / norm) * g
    if math.isinf(p):
        size = x.abs()
        chosen = (size == norm) | (size.isnan() & norm.isnan())
        return x.sgn() * chosen * (g / chosen.sum(reduced(x.ndim, dim), keepdim=True))
    if p < 1:
        return torch.where(x == 0, 0, x.sgn() * x.abs().pow(p - 1)) * (g * norm.pow(1 - p))
    if p < 2:
        return x.sgn() * x.abs().pow(p - 1) * torch.where(norm == 0, 0, g / norm.pow(p - 1))
    return x * x.abs().pow(p - 2) * torch.where(norm == 0, 0, g / norm.pow(p - 1))


_orders = [
    *[sample(spec(2, 3), p) for p in (2, 1, 0, 3, 1.5, 0.5, math.inf, -math.inf)],
    sample(spec(2, 3, 4), 2, [1]),
    sample(spec(2, 3, 4), 3, [0, -1], True),
    sample(spec(2, 3, 4), math.inf, [-1]),
    sample(spec(2, 3, dtype=C128), 2, [1]),
    sample(spec(2, 3, dtype=C128), 3, [1]),
    sample(spec(2, 3, dtype=C128), math.inf, [1]),
    *[sample(spec(2, 2, values=[0.0, 0.0, 1.0, -1.0]), p, [1]) for p in (2, 1, 3, 1.5, math.inf)],
]


@rule(aten.linalg_vector_norm.default, formula="‖x‖", samples=[*_orders, sample(spec()), sample(spec(0, 3))])
def linalg_vector_norm_grad(g, out, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    return _norm(g, out, x, ord, dim, keepdim)


@rule(aten.norm.Scalar, samples=[sample(spec(2, 3)), sample(spec(2, 3), 3)])
def norm_grad(g, out, x, p=2):
    return _norm(g, out, x, p, None, False)


@rule(aten.norm.ScalarOpt_dim, samples=[each for each in _orders if len(each.args) > 2])
def norm_dim_grad(g, out, x, p, dim, keepdim=False):
    return _norm(g, out, x, p, dim, keepdim)


_distances = [sample(spec(2, 3), spec(2, 3), p) for p in (2, 1, 3, math.inf)]


@rule(aten.dist.default, broadcasts=True, samples=[*_distances, sample(spec(2, 1), spec(3))])
def dist_grad(g, out, a, b, p=2):
    apart = _norm(g, out, a - b, p, None, False)
    return apart, -apart


# -- distances between rows ----------------------------------------------------------------------------


@rule(
    aten._cdist_forward.default,
    broadcasts=True,
    samples=[
        *[sample(spec(3, 2), spec(4, 2), p, None) for p in (2.0, 1.0, 3.0)],
        sample(spec(2, 1, 3, 2), spec(2, 4, 2), 2.0, None),
    ],
)
def cdist_grad(g, out, a, b, p, compute_mode):
    g = g.contiguous()
    batch = g.shape[:-2]  # each pair of rows of the two, whose further dimensions broadcast
    a, b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
    by_b = kernels._cdist_backward(g.mT.contiguous(), b, a, p, out.mT.contiguous())
    return kernels._cdist_backward(g, a, b, p, out), by_b


@rule(aten._euclidean_dist.default, samples=[sample(spec(3, 2), spec(4, 2)), sample(spec(2, 3, 2), spec(2, 4, 2))])
def euclidean_dist_grad(g, out, a, b):
    ratio = torch.where(out == 0, 0, g / out)
    by_a = a * ratio.sum(-1, keepdim=True) - ratio @ b
    return by_a, b * ratio.mT.sum(-1, keepdim=True) - ratio.mT @ a


@rule(aten._pdist_forward.default, samples=[sample(spec(4, 2)), sample(spec(4, 3), 1.0)])
def pdist_grad(g, out, x, p=2.0):
    return kernels._pdist_backward(g, x, p, out)


@rule(
    aten._trilinear.default,
    samples=[sample(spec(3, 4), spec(2, 4, 5), spec(3, 5), [1, 3], [0], [1, 2], [2, 3])],
)
def trilinear_grad(g, out, a, b, c, expand1, expand2, expand3, sumdim, unroll_dim=1):
    """Each of the three and `g` play the same part: what was summed stands in `g` as a dimension of size 1."""
    by_a = kernels._trilinear(g, b.conj(), c.conj(), sumdim, expand2, expand3, expand1)
    by_b = kernels._trilinear(a.conj(), g, c.conj(), expand1, sumdim, expand3, expand2)
    return by_a, by_b, kernels._trilinear(a.conj(), b.conj(), g, expand1, expand2, sumdim, expand3)


@rule(
    aten.renorm.default,
    samples=[
        sample(spec(3, 4), 2, 0, 1.0),
        sample(spec(3, 4), 1, 1, 2.0),
        sample(spec(2, 3, 2), 3, -1, 0.5),
        sample(spec(2, 3), 1.5, 0, 1.0),
    ],
)
def renorm_grad(g, out, x, p, dim, maxnorm):
    """Each slice is scaled to ``maxnorm / (norm + 1e-7)`` where its norm is larger."""
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    norm = torch.linalg.vector_norm(x, p, others, keepdim=True)
    scale = maxnorm / (norm + 1e-7)
    slope = -(g * x.conj()).sum(others, keepdim=True).real * scale / (norm + 1e-7)
    return torch.where(norm > maxnorm, g * scale + _norm(slope, norm, x, p, others, True), g)
