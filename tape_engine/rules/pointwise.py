# mypy: allow-untyped-defs
"""Arithmetic, powers, comparisons and selections, element by element, with broadcasting."""

from __future__ import annotations

import cmath
import math
from typing import Any

import torch

from ..registry import declare, rule, sample, spec, spends
from .common import C128, Tensor, aten, binary, conj, is_tensor, keep_where, rule_name, unary

# -- sums, products, quotients -----------------------------------------------------------------------


@rule(
    aten.add.Tensor,
    broadcasts=True,
    formula="a + b",
    samples=[*binary(), *binary(alpha=3)[:2], sample(spec(2, 3), 2.0)],
)
def add_grad(g, out, a, b, *, alpha=1):
    return g, g if alpha == 1 else g * conj(alpha)


@rule(aten.add.Scalar, formula="a + b", samples=unary(-2, 2, 3.0))
def add_scalar_grad(g, out, a, b, alpha=1):
    return g


@rule(
    aten.sub.Tensor,
    broadcasts=True,
    formula="a - b",
    samples=[*binary(), *binary(alpha=3)[:2], sample(spec(2, 3), 2.0)],
)
def sub_grad(g, out, a, b, *, alpha=1):
    return g, -g if alpha == 1 else g * -conj(alpha)


@rule(aten.sub.Scalar, formula="a - b", samples=unary(-2, 2, 3.0))
def sub_scalar_grad(g, out, a, b, alpha=1):
    return g


@rule(aten.rsub.Tensor, broadcasts=True, formula="b - a", samples=[*binary(), *binary(alpha=3)[:2]])
def rsub_grad(g, out, a, b, *, alpha=1):
    return -g if alpha == 1 else g * -conj(alpha), g


@rule(aten.rsub.Scalar, formula="b - a", samples=[*unary(-2, 2, 3.0), *unary(-2, 2, 3.0, 2.0)[:1]])
def rsub_scalar_grad(g, out, a, b, alpha=1):
    return -g if alpha == 1 else g * -conj(alpha)


@rule(aten.mul.Tensor, broadcasts=True, formula="a · b", samples=[*binary(), sample(spec(2, 3), 2.0)])
def mul_grad(g, out, a, b):
    return g * conj(b), g * a.conj() if is_tensor(b) else None


@spends(aten.mul.Tensor)
def mul_spent(needs, g, out, a, b):
    other = b if needs[0] else a
    if all(needs[:2]) is (len(needs) > 1) or (is_tensor(other) and other.dtype != g.dtype):
        return None
    return (g.mul_(other), None) if needs[0] else (None, g.mul_(other))


@rule(aten.mul.Scalar, formula="a · b", samples=[*unary(-2, 2, 3.0), sample(spec(2, dtype=C128), 1 + 2j)])
def mul_scalar_grad(g, out, a, b):
    return g * conj(b)


@rule(aten.div.Tensor, broadcasts=True, formula="a / b", samples=[*binary(other=(0.5, 2)), sample(spec(2, 3), 2.0)])
def div_grad(g, out, a, b):
    return g / conj(b), -g * (out / b).conj() if is_tensor(b) else None


@rule(aten.div.Scalar, formula="a / b", samples=unary(-2, 2, 3.0))
def div_scalar_grad(g, out, a, b):
    return g / conj(b)


@rule(
    aten.div.Tensor_mode,
    broadcasts=True,
    samples=[
        *binary(other=(0.5, 2), rounding_mode=None),
        *binary(other=(0.5, 2), rounding_mode="floor", complex=False),
        *binary(other=(0.5, 2), rounding_mode="trunc", complex=False)[:2],
    ],
)
def div_mode_grad(g, out, a, b, *, rounding_mode):
    if rounding_mode is not None:
        return torch.zeros_like(g), torch.zeros_like(g)
    return g / conj(b), -g * (out / b).conj() if is_tensor(b) else None


@rule(
    aten.div.Scalar_mode,
    samples=[sample(spec(3), 2.0, rounding_mode=None), sample(spec(3), 2.0, rounding_mode="floor")],
)
def div_scalar_mode_grad(g, out, a, b, *, rounding_mode):
    return g / b if rounding_mode is None else torch.zeros_like(g)


@rule(aten.neg.default, formula="-x", samples=unary())
def neg_grad(g, out, x):
    return -g


@rule(aten.reciprocal.default, formula="1 / x", samples=unary(0.5, 2))
def reciprocal_grad(g, out, x):
    return -g * (out * out).conj()


@rule(
    aten.addcmul.default,
    broadcasts=True,
    samples=[sample(spec(3, 4), spec(4), spec(3, 1)), sample(spec(3), spec(3), spec(3), value=2.5)],
)
def addcmul_grad(g, out, x, a, b, *, value=1):
    return g, g * (b * value).conj(), g * (a * value).conj()


@rule(
    aten.addcdiv.default,
    broadcasts=True,
    samples=[
        sample(spec(3, 4), spec(4), spec(3, 1, low=0.5)),
        sample(spec(3), spec(3), spec(3, low=0.5), value=2.5),
        sample(spec(3, dtype=C128), spec(3, dtype=C128), spec(3, dtype=C128)),
    ],
)
def addcdiv_grad(g, out, x, a, b, *, value=1):
    return g, g * (value / b).conj(), -g * (a * value / (b * b)).conj()


@rule(aten.lerp.Scalar, broadcasts=True, samples=[sample(spec(3, 4), spec(4), 0.3), sample(spec(2), spec(2), 0.7)])
def lerp_scalar_grad(g, out, a, b, weight):
    return g * (1 - conj(weight)), g * conj(weight)


@rule(
    aten.lerp.Tensor,
    broadcasts=True,
    samples=[sample(spec(3, 4), spec(4), spec(3, 1)), sample(spec(2), spec(2), spec(2))],
)
def lerp_grad(g, out, a, b, weight):
    return g * (1 - weight).conj(), g * weight.conj(), g * (b - a).conj()


def remainder_like(target: Any, rounding_mode: str) -> None:
    """Of ``out = a - n b``, where ``n`` is ``a / b`` rounded: its derivative by `a` is 1, by `b` ``-n``."""
    kinked = sample(spec(4, values=[4.0, -4.0, 1.0, 0.0]), spec(4, values=[2.0, 2.0, 1.0, 3.0]))

    @rule(target, broadcasts=True, samples=[*binary(other=(0.6, 2), complex=False), kinked])
    def grad(g: Tensor, out: Tensor, a: Tensor, b: Any) -> Any:
        return g, -g * torch.div(a, b, rounding_mode=rounding_mode) if is_tensor(b) else None

    grad.__name__ = rule_name(target)


remainder_like(aten.remainder.Tensor, "floor")
remainder_like(aten.fmod.Tensor, "trunc")


@rule(aten.remainder.Scalar, samples=unary(-2, 2, 0.7, complex=False))
@rule(aten.fmod.Scalar, samples=unary(-2, 2, 0.7, complex=False))
def remainder_scalar_grad(g, out, a, b):
    return g


@rule(aten.remainder.Scalar_Tensor, samples=[sample(2.0, spec(3, low=0.6))])
def remainder_scalar_tensor_grad(g, out, a, b):
    return -g * torch.div(a, b, rounding_mode="floor")


# -- powers ------------------------------------------------------------------------------------------


@rule(
    aten.pow.Tensor_Scalar,
    formula="x ** p",
    samples=[
        *unary(-2, 2, 2),
        *unary(-2, 2, 3)[:1],
        *unary(-2, 2, 0),
        *unary(-2, 2, 1)[:1],
        *unary(0.5, 2, -1.5),
        *unary(0.5, 2, 0.5)[:1],
        sample(spec(3, values=[0.0, 1.0, 2.0]), 1),
        sample(spec(3, values=[0.0, 1.0, -2.0]), 0),
        sample(spec(3, values=[0.0, 1.0, -2.0]), 2),
        sample(spec(3, values=[0.0, 1.0, 2.0]), 0.5),
        sample(spec(2, dtype=C128), 1 + 2j),
    ],
)
def pow_scalar_grad(g, out, x, exponent):
    if exponent == 0:
        return torch.zeros_like(g)
    if exponent == 1:
        return g
    return g * ((x * exponent) if exponent == 2 else x.pow(exponent - 1) * exponent).conj()


@rule(
    aten.pow.Scalar,
    formula="b ** x",
    samples=[sample(2.5, spec(3, 4)), sample(0.0, spec(3, values=[0.0, 1.0, 2.0])), sample(2.5, spec(2, dtype=C128))],
)
def pow_exponent_grad(g, out, base, exponent):
    if base == 0:  # 0 ** x is flat where it is defined at all
        slope = out * -math.inf
        return g * keep_where(exponent.real < 0, slope.conj())  # an infinite g leaves nothing that is known
    log = cmath.log(base) if isinstance(base, complex) else math.log(base) if base > 0 else math.nan
    return g * (out * log).conj()


@rule(
    aten.pow.Tensor_Tensor,
    broadcasts=True,
    formula="a ** b",
    samples=[
        *binary(0.5, 2, other=(-2, 2)),
        sample(spec(4, values=[0.0, 0.0, -1.5, 2.0]), spec(4, values=[0.0, 2.0, 2.0, 0.0])),
    ],
)
def pow_grad(g, out, a, b):
    by_a = g * (b * a.pow(b - 1)).conj()
    flat = (a == 0) & ((b.real if b.is_complex() else b) >= 0)  # a slope of 0: times an infinite g it is unknown
    return torch.where(b == 0, 0, by_a), g * torch.where(flat, 0, out * a.log()).conj()


# -- chosen elements --------------------------------------------------------------------------------


@rule(
    aten.where.self,
    broadcasts=True,
    samples=[
        sample(spec(3, 4, dtype=torch.bool), spec(3, 4), spec(3, 4)),
        sample(spec(3, 1, dtype=torch.bool), spec(4), spec()),
        sample(spec(0, 3, dtype=torch.bool), spec(0, 3), spec(3)),
        sample(spec(dtype=torch.bool), spec(), spec()),
        sample(spec(3, dtype=torch.bool), spec(3, dtype=C128), spec(1, dtype=C128)),
    ],
)
def where_grad(g, out, condition, a, b):
    return None, torch.where(condition, g, 0), torch.where(condition, 0, g)


@rule(
    aten.nan_to_num.default,
    samples=[*unary(complex=False), sample(spec(4, values=[math.nan, math.inf, -math.inf, 1.0]))],
)
def nan_to_num_grad(g, out, x, nan=None, posinf=None, neginf=None):
    return keep_where(x.isfinite(), g)


# -- steps: flat almost everywhere -------------------------------------------------------------------


def step(target: Any, **kwargs: Any) -> None:
    """Of an operation that is constant between its jumps: zeros, as torch has it."""

    @rule(target, samples=[sample(spec(3, 4), **kwargs), sample(spec(), **kwargs), sample(spec(0, 3), **kwargs)])
    def grad(g: Tensor, out: Tensor, x: Tensor, *, decimals: int = 0) -> Tensor:
        return torch.zeros_like(g)

    grad.__name__ = rule_name(target)


for _target in (aten.floor.default, aten.ceil.default, aten.trunc.default, aten.round.default, aten.sign.default):
    step(_target)
step(aten.round.decimals, decimals=1)


@rule(aten.floor_divide.default, broadcasts=True, samples=[sample(spec(3, 4), spec(4, low=0.5))])
def floor_divide_grad(g, out, a, b):
    return torch.zeros_like(g), torch.zeros_like(g)


# -- declared: comparisons, logic, integers ----------------------------------------------------------

declare(
    aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.lt.Scalar, aten.lt.Tensor,
    aten.le.Scalar, aten.le.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor,
    aten.isnan.default, aten.isinf.default, aten.isposinf.default, aten.isneginf.default, aten.signbit.default,
    aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default, aten.logical_not.default,
    aten.bitwise_not.default, aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.bitwise_or.Tensor,
    aten.bitwise_or.Scalar, aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar,
    aten.bitwise_left_shift.Tensor, aten.bitwise_right_shift.Tensor, aten.bitwise_left_shift.Tensor_Scalar,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.equal.default, aten.allclose.default, aten._is_all_true.default, aten._is_any_true.default,
)  # fmt: skip
