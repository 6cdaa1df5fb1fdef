# mypy: allow-untyped-defs
"""Gradient rules of bounds: the larger and the smaller of two, and clamps, as the torch at hand has them.

At a bound the gradient is a choice, and torch's own changed with release 2.14. Before, all of it passes a clamp at its
bound, and ``fmax`` gives it to the first of two equals; since then a bound that is a number lets none of it
through there, and equal tensors have an even share, as those of ``maximum`` always had.
"""

from __future__ import annotations

import math

import torch

from ..registry import rule, sample, spec
from .common import Tensor, aten, binary, keep_where, unary

#: Whether equals share a gradient evenly, as in torch since 2.14: the one difference of releases that rules look at.
SHARED = torch.torch_version.TorchVersion(torch.__version__) >= torch.torch_version.TorchVersion("2.14")

_ties = sample(spec(4, values=[1.0, 2.0, 3.0, 0.0]), spec(4, values=[1.0, 3.0, 2.0, 0.0]))
_nans = sample(spec(3, values=[math.nan, 1.0, math.nan]), spec(3, values=[1.0, math.nan, math.nan]))
_clamped = [-2.0, -1.0, 0.0, 1.0, 2.0, math.nan]
_bound = spec(6, values=[-1.0] * 6), spec(6, values=[1.0] * 6)


# -- the larger and the smaller of two ---------------------------------------------------------------


def larger(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the larger of two: equals share it, and where one is not a number each has all of it."""
    shared = torch.where(a == b, g / 2, g)
    return torch.where(a < b, 0, shared), torch.where(b < a, 0, shared)


def smaller(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the smaller of two, likewise."""
    shared = torch.where(a == b, g / 2, g)
    return torch.where(a > b, 0, shared), torch.where(b > a, 0, shared)


@rule(aten.maximum.default, broadcasts=True, formula="max(a, b)", samples=[*binary(complex=False), _ties, _nans])
def maximum_grad(g, out, a, b):
    return larger(g, a, b)


@rule(aten.minimum.default, broadcasts=True, formula="min(a, b)", samples=[*binary(complex=False), _ties, _nans])
def minimum_grad(g, out, a, b):
    return smaller(g, a, b)


@rule(aten.fmax.default, broadcasts=True, samples=[*binary(complex=False), _ties, _nans])
def fmax_grad(g, out, a, b):
    if SHARED:
        return larger(g, a, b)
    first = (a >= b) | b.isnan()
    return torch.where(first, g, 0), torch.where(first, 0, g)


@rule(aten.fmin.default, broadcasts=True, samples=[*binary(complex=False), _ties, _nans])
def fmin_grad(g, out, a, b):
    if SHARED:
        return smaller(g, a, b)
    first = (a <= b) | b.isnan()
    return torch.where(first, g, 0), torch.where(first, 0, g)


# -- bounds that are numbers -------------------------------------------------------------------------


def above(x: Tensor, bound: float) -> Tensor:
    """Where the gradient passes a lower bound that is a number."""
    return x > bound if SHARED else x >= bound


def below(x: Tensor, bound: float) -> Tensor:
    """Where the gradient passes an upper bound that is a number."""
    return x < bound if SHARED else x <= bound


@rule(
    aten.clamp.default,
    samples=[
        *unary(-2, 2, -0.7, 0.9, complex=False),
        *unary(-2, 2, 0.1, complex=False)[:2],
        *unary(-2, 2, None, 0.1, complex=False)[:2],
        sample(spec(6, values=_clamped), -1.0, 1.0),
        sample(spec(6, values=_clamped), 0.0),
        sample(spec(6, values=_clamped), None, 0.0),
        sample(spec(6, values=_clamped), 1.0, -1.0),
    ],
)
def clamp_grad(g, out, x, min=None, max=None):
    if min is None:
        return keep_where(below(x, max), g)
    return keep_where(above(x, min) if max is None else above(x, min) & below(x, max), g)


@rule(aten.clamp_min.default, samples=[*unary(-2, 2, 0.1, complex=False), sample(spec(6, values=_clamped), 0.0)])
def clamp_min_grad(g, out, x, min):
    return keep_where(above(x, min), g)


@rule(aten.clamp_max.default, samples=[*unary(-2, 2, 0.1, complex=False), sample(spec(6, values=_clamped), 0.0)])
def clamp_max_grad(g, out, x, max):
    return keep_where(below(x, max), g)


# -- bounds that are tensors -------------------------------------------------------------------------


def from_below(g: Tensor, x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and of its lower bound."""
    return larger(g, x, bound) if SHARED else (keep_where(x >= bound, g), keep_where(x < bound, g))


def from_above(g: Tensor, x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and of its upper bound."""
    return smaller(g, x, bound) if SHARED else (keep_where(x <= bound, g), keep_where(x > bound, g))


@rule(
    aten.clamp.Tensor,
    broadcasts=True,
    samples=[
        sample(spec(3, 4), spec(4, low=-1, high=0), spec(3, 1, low=0, high=1)),
        sample(spec(3, 4), spec(4)),
        sample(spec(3, 4), None, spec(4)),
        sample(spec(6, values=_clamped), *_bound),
        sample(spec(6, values=_clamped), *_bound[::-1]),
        sample(spec(6, values=_clamped), _bound[0], _bound[0]),
        sample(spec(6, values=_clamped), _bound[0], spec(6, values=[math.nan] * 6)),
    ],
)
def clamp_tensor_grad(g, out, x, min=None, max=None):
    if min is None:
        by_x, by_max = from_above(g, x, max)
        return by_x, None, by_max
    if max is None:
        return *from_below(g, x, min), None
    if not SHARED:
        inside = (x >= min) & (x <= max)
        return keep_where(inside, g), keep_where((x < min) & (min < max), g), keep_where((x > max) | (max < min), g)
    crossed, apart = max < min, min < max  # of crossed bounds the upper one holds; of equal ones none has a share
    at_min, at_max = apart & (x == min), apart & (x == max)
    by_x = torch.where((x < min) | (x > max), 0, torch.where(at_min | at_max, g / 2, g))
    by_min = torch.where((x < min) & ~crossed, g, torch.where(at_min, g / 2, 0))
    return by_x, by_min, torch.where((x > max) | crossed, g, torch.where(at_max, g / 2, 0))


@rule(
    aten.clamp_min.Tensor,
    broadcasts=True,
    samples=[*binary(complex=False), sample(spec(6, values=_clamped), _bound[1])],
)
def clamp_min_tensor_grad(g, out, x, min):
    return from_below(g, x, min)


@rule(
    aten.clamp_max.Tensor,
    broadcasts=True,
    samples=[*binary(complex=False), sample(spec(6, values=_clamped), _bound[1])],
)
def clamp_max_tensor_grad(g, out, x, max):
    return from_above(g, x, max)
