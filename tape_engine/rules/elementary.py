# mypy: allow-untyped-defs
"""Exponentials, logarithms, trigonometric and other functions of one element, real or complex."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..registry import Sample, rule, sample, spec
from .common import C128, Tensor, aten, binary, keep_where, kernels, rule_name, unary

# -- the two families: a derivative told by the output, or by the input ------------------------------


def by_output(
    target: Any, derivative: Callable[[Tensor], Tensor], samples: Iterable[Sample], formula: str = ""
) -> None:
    """The rule of a holomorphic ``out = f(x)`` whose derivative is `derivative` of the output."""

    @rule(target, samples=samples, formula=formula or None)
    def grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * derivative(out).conj()

    grad.__name__ = rule_name(target)


def by_input(target: Any, derivative: Callable[[Tensor], Tensor], samples: Iterable[Sample], formula: str = "") -> None:
    """The rule of a holomorphic ``out = f(x)`` whose derivative is `derivative` of the input."""

    @rule(target, samples=samples, formula=formula or None)
    def grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * derivative(x).conj()

    grad.__name__ = rule_name(target)


def by_ratio(target: Any, divisor: Callable[[Tensor], Tensor], samples: Iterable[Sample], formula: str = "") -> None:
    """The rule of a holomorphic ``out = f(x)`` whose derivative is one over `divisor` of the input."""

    @rule(target, samples=samples, formula=formula or None)
    def grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g / divisor(x).conj()

    grad.__name__ = rule_name(target)


SQRT_PI = math.sqrt(math.pi)
_real = unary(complex=False)

by_output(aten.exp.default, lambda out: out, unary(), "exp(x)")
by_output(aten.exp2.default, lambda out: out * math.log(2), unary(), "2 ** x")
by_output(aten.expm1.default, lambda out: out + 1, unary(), "exp(x) - 1")
by_output(aten.sqrt.default, lambda out: 0.5 / out, [*unary(0.2, 2), sample(spec(2, values=[0.0, 1.0]))], "√x")
by_output(aten.rsqrt.default, lambda out: -0.5 * out.pow(3), unary(0.2, 2), "1 / √x")
by_output(aten.tan.default, lambda out: 1 + out * out, unary(-1, 1), "tan(x)")
by_output(aten.erfinv.default, lambda out: 0.5 * SQRT_PI * (out * out).exp(), unary(-0.9, 0.9, complex=False))
by_output(
    aten.special_ndtri.default,
    lambda out: math.sqrt(2 * math.pi) * (out * out / 2).exp(),
    unary(0.1, 0.9, complex=False),
)

by_ratio(aten.log.default, lambda x: x, unary(0.1, 2), "log(x)")
by_ratio(aten.log2.default, lambda x: x * math.log(2), unary(0.1, 2), "log2(x)")
by_ratio(aten.log10.default, lambda x: x * math.log(10), unary(0.1, 2), "log10(x)")
by_ratio(aten.log1p.default, lambda x: x + 1, unary(-0.9, 2), "log(1 + x)")
by_ratio(aten.atan.default, lambda x: x * x + 1, unary(), "atan(x)")
by_ratio(aten.atanh.default, lambda x: 1 - x * x, unary(-0.9, 0.9), "atanh(x)")

by_input(aten.sin.default, torch.cos, unary(), "sin(x)")
by_input(aten.cos.default, lambda x: -x.sin(), unary(), "cos(x)")
by_input(aten.sinh.default, torch.cosh, unary(), "sinh(x)")
by_input(aten.cosh.default, torch.sinh, unary(), "cosh(x)")
by_input(aten.asin.default, lambda x: (1 - x * x).rsqrt(), unary(-0.9, 0.9), "asin(x)")
by_input(aten.acos.default, lambda x: -(1 - x * x).rsqrt(), unary(-0.9, 0.9), "acos(x)")
by_input(aten.asinh.default, lambda x: (x * x + 1).rsqrt(), unary(), "asinh(x)")
# two roots, not the root of a product, which would lie on another branch for complex x
by_input(aten.acosh.default, lambda x: (x + 1).rsqrt() * (x - 1).rsqrt(), unary(1.1, 3), "acosh(x)")
by_input(aten.erf.default, lambda x: (2 / SQRT_PI) * (-x * x).exp(), _real, "erf(x)")
by_input(aten.erfc.default, lambda x: (-2 / SQRT_PI) * (-x * x).exp(), _real, "erfc(x)")
by_input(aten.lgamma.default, torch.digamma, unary(0.2, 3, complex=False))
by_input(aten.digamma.default, lambda x: torch.polygamma(1, x), unary(0.2, 3, complex=False))
by_input(aten.i0.default, torch.special.i1, _real)
by_input(aten.deg2rad.default, lambda x: torch.full_like(x, math.pi / 180), _real)
by_input(aten.rad2deg.default, lambda x: torch.full_like(x, 180 / math.pi), _real)


# -- those with a shape of their own -----------------------------------------------------------------


@rule(aten.tanh.default, formula="tanh(x)", samples=unary())
def tanh_grad(g, out, x):
    return kernels.tanh_backward(g, out)


@rule(
    aten.tanh_backward.default,
    samples=[sample(spec(3, 4), spec(3, 4)), sample(spec(2, dtype=C128), spec(2, dtype=C128))],
)
def tanh_backward_grad(g, out, gy, y):
    return g * (1 - y * y), g.conj() * gy * (-2 * y).conj()


@rule(aten.sigmoid.default, formula="σ(x)", samples=unary())
def sigmoid_grad(g, out, x):
    return kernels.sigmoid_backward(g, out)


@rule(
    aten.sigmoid_backward.default,
    samples=[sample(spec(3, 4), spec(3, 4)), sample(spec(2, dtype=C128), spec(2, dtype=C128))],
)
def sigmoid_backward_grad(g, out, gy, y):
    return g * (y * (1 - y)), g.conj() * gy * (1 - 2 * y).conj()


@rule(aten.abs.default, formula="|x|", samples=[*unary(), sample(spec(3, values=[-1.0, 0.0, 1.0]))])
def abs_grad(g, out, x):
    return g * x.sgn()


@rule(aten.sgn.default, samples=[*unary(), sample(spec(2, dtype=C128, values=[0.0, 1.0]))])
def sgn_grad(g, out, x):
    if not x.is_complex():
        return torch.zeros_like(g)
    across = g - out * (g * out.conj()).real  # of a unit vector only the part across it can change
    return torch.where(x == 0, 0, across / x.abs())


@rule(aten.angle.default, samples=[*unary(), sample(spec(2, dtype=C128, values=[0.0, 1.0]))])
def angle_grad(g, out, x):
    if not x.is_complex():
        return torch.zeros_like(g)
    return torch.where(x == 0, 0, g * (1j * x) / (x * x.conj()).real)


@rule(aten.frac.default, samples=unary(complex=False))
def frac_grad(g, out, x):
    return g


@rule(aten.logit.default, samples=[*unary(0.1, 0.9, complex=False), *unary(0.1, 0.9, 0.3, complex=False)])
def logit_grad(g, out, x, eps=None):
    slope = g / (x * (1 - x)).abs()  # infinite with the sign of g at -0.0 too
    if eps is None:
        return torch.where((x < 0) | (x > 1), math.nan, slope)
    return keep_where((x >= eps) & (x <= 1 - eps), slope)


@rule(aten.sinc.default, samples=[*unary(), sample(spec(3, values=[-1.0, 0.0, 1.0]))])
def sinc_grad(g, out, x):
    z = x * math.pi
    slope = (z * z.cos() - z.sin()) / (z * x)
    return g * torch.where(x == 0, 0, slope).conj()


@rule(
    aten.polygamma.default,
    samples=[sample(1, spec(3, 4, low=0.5)), sample(0, spec(3, low=0.5)), sample(2, spec(low=0.5))],
)
def polygamma_grad(g, out, n, x):
    return g * torch.polygamma(n + 1, x)


@rule(aten.mvlgamma.default, samples=[sample(spec(3, 4, low=1.6, high=3), 3)])
def mvlgamma_grad(g, out, x, p):
    halves = torch.arange(0.0, -p / 2, -0.5, dtype=x.dtype, device=x.device)
    return g * (x.unsqueeze(-1) + halves).digamma().sum(-1)


@rule(aten.special_entr.default, samples=unary(0.1, 2, complex=False))
def special_entr_grad(g, out, x):
    return g * torch.where(x > 0, -x.log() - 1, torch.where(x == 0, math.inf, math.nan))


@rule(aten.special_erfcx.default, samples=_real)
def special_erfcx_grad(g, out, x):
    return g * (2 * x * out - 2 / SQRT_PI)


@rule(aten.special_log_ndtr.default, samples=_real)
def special_log_ndtr_grad(g, out, x):
    return g * math.sqrt(2 / math.pi) / torch.special.erfcx(x * -math.sqrt(0.5))


@rule(aten.special_i1.default, samples=[*_real, sample(spec(2, values=[0.0, 1.0]))])
def special_i1_grad(g, out, x):
    near = torch.where(x == 0, 1, x)  # apart, so that no second derivative divides by 0
    return g * torch.where(x == 0, 0.5, torch.i0(x) - out / near)


@rule(aten.special_i0e.default, samples=[*_real, sample(spec(2, values=[0.0, 1.0]))])
def special_i0e_grad(g, out, x):
    return g * (torch.special.i1e(x) - x.sgn() * out)


@rule(aten.special_i1e.default, samples=[*_real, sample(spec(2, values=[0.0, 1.0]))])
def special_i1e_grad(g, out, x):
    near = torch.where(x == 0, 1, x)
    return g * torch.where(x == 0, 0.5, torch.special.i0e(x) - out * (x.sgn() + 1 / near))


# -- of two elements ---------------------------------------------------------------------------------


@rule(
    aten.nextafter.default,
    broadcasts=True,
    samples=[sample(spec(3, 4), spec(4)), sample(spec(2, values=[1.0, 2.0]), spec(2, values=[1.0, 1.0]))],
)
def nextafter_grad(g, out, a, b):
    """One step of rounding from `a`, wherever `b` lies beyond; `b` itself where they are equal, which gives none."""
    return torch.where(a != b, g, 0), torch.zeros_like(g)


@rule(
    aten.atan2.default,
    broadcasts=True,
    formula="atan2(a, b)",
    samples=[
        *binary(complex=False),
        sample(spec(3, values=[0.0, 0.0, 1.0]), spec(3, values=[0.0, -1.0, 0.0])),
    ],
)
def atan2_grad(g, out, a, b):
    squared = a * a + b * b
    scaled = g / torch.where(squared == 0, 1, squared)  # 0 where the angle is undefined
    return scaled * b, scaled * -a


@rule(aten.hypot.default, broadcasts=True, samples=binary(complex=False))
def hypot_grad(g, out, a, b):
    return g * (a / out), g * (b / out)


@rule(aten.logaddexp.default, broadcasts=True, samples=binary()[:-1])
def logaddexp_grad(g, out, a, b):
    return g / (1 + (b - a).exp()).conj(), g / (1 + (a - b).exp()).conj()


@rule(aten.logaddexp2.default, broadcasts=True, samples=binary(complex=False))
def logaddexp2_grad(g, out, a, b):
    return g / (1 + (b - a).exp2()), g / (1 + (a - b).exp2())


_logs = [*binary(0.2, 2, complex=False), sample(spec(3, values=[0.0, 0.0, 1.0]), spec(3, values=[0.0, 2.0, 2.0]))]


@rule(aten.xlogy.Tensor, broadcasts=True, formula="a · log(b)", samples=_logs)
def xlogy_grad(g, out, a, b):
    return torch.where((a == 0) & (b <= 0), 0, g * b.log()), g * a / b


@rule(aten.xlogy.Scalar_Other, samples=[sample(spec(3, low=0.2), 2.5)])
def xlogy_scalar_other_grad(g, out, a, b):
    return torch.where((a == 0) & (b <= 0), 0, g * (math.log(b) if b > 0 else -math.inf if b == 0 else math.nan))


@rule(aten.xlogy.Scalar_Self, samples=[sample(2.5, spec(3, low=0.2))])
def xlogy_scalar_self_grad(g, out, a, b):
    return g * a / b


@rule(aten.special_xlog1py.default, broadcasts=True, samples=_logs)
def special_xlog1py_grad(g, out, a, b):
    return torch.where((a == 0) & (b <= -1), 0, g * b.log1p()), g * a / (b + 1)


@rule(
    aten.copysign.Tensor,
    broadcasts=True,
    samples=[*binary(complex=False), sample(spec(2, values=[0.0, -1.0]), spec(2, values=[1.0, -1.0]))],
)
def copysign_grad(g, out, a, b):
    return g * torch.where(a == 0, 0, out / a), torch.zeros_like(g)


@rule(aten.copysign.Scalar, samples=unary(-2, 2, -1.0, complex=False))
def copysign_scalar_grad(g, out, a, b):
    return g * torch.where(a == 0, 0, out / a)


@rule(aten.ldexp.Tensor, broadcasts=True, samples=binary(complex=False))
def ldexp_grad(g, out, a, b):
    return g * torch.exp2(b), g * out * math.log(2)


@rule(aten.frexp.Tensor, samples=unary(0.3, 2, complex=False))
def frexp_grad(g, out, x):
    return None if g[0] is None else g[0] * torch.exp2(-out[1])


# -- real and complex numbers in each other's terms --------------------------------------------------


@rule(aten.complex.default, broadcasts=True, samples=binary(complex=False))
def complex_grad(g, out, real, imag):
    return g.real, g.imag


@rule(aten.polar.default, broadcasts=True, samples=binary(0.2, 2, complex=False))
def polar_grad(g, out, radius, angle):
    return g.real * angle.cos() + g.imag * angle.sin(), (g * (1j * out).conj()).real


@rule(
    aten.view_as_real.default,
    samples=[sample(spec(2, 3, dtype=C128)), sample(spec(dtype=C128)), sample(spec(0, dtype=C128))],
)
def view_as_real_grad(g, out, x):
    return torch.view_as_complex(g.contiguous())


@rule(aten.view_as_complex.default, samples=[sample(spec(3, 2)), sample(spec(2)), sample(spec(0, 2))])
def view_as_complex_grad(g, out, x):
    return torch.view_as_real(g.resolve_conj())


@rule(aten._conj.default, samples=[sample(spec(2, 3, dtype=C128)), sample(spec(dtype=C128))])
@rule(aten._conj_physical.default, samples=unary())
def conj_grad(g, out, x):
    return g.conj()


@rule(aten._neg_view.default, samples=unary())
def neg_view_grad(g, out, x):
    return -g
