# mypy: allow-untyped-defs
"""Products of vectors and matrices."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample, rule, sample, spec
from .common import C128, aten, conj


def products(*shapes: tuple[int, ...]) -> list[Sample]:
    """A product's samples: real, complex."""
    return [sample(*[spec(*s) for s in shapes]), sample(*[spec(*s, dtype=C128) for s in shapes])]


def scaled(g: Any, factor: Any) -> Any:
    """`g` times the conjugate of ``alpha`` or ``beta``."""
    return g if factor == 1 else g * conj(factor)


def product(x: Any, y: Any, strides: tuple[int, ...]) -> Any:
    """`x @ y`, column by column in memory if `strides` are.

    So the gradient of a weight that is given transposed (``nn.Linear``) comes to lie as the weight itself does.
    """
    return (y.mT @ x.mT).mT if strides == (1, x.shape[0]) else x @ y


@rule(
    aten.mm.default,
    formula="a @ b",
    samples=[
        *products((3, 4), (4, 2)),
        *products((3, 3), (3, 3)),
        *products((0, 2), (2, 3))[:1],
        *products((2, 0), (0, 3)),
    ],
)
def mm_grad(g, out, a, b):
    return product(g, b.mH, a.stride()), product(a.mH, g, b.stride())


@rule(
    aten.bmm.default,
    formula="a @ b",
    samples=[*products((2, 3, 4), (2, 4, 2)), *products((2, 2, 2), (2, 2, 2))[:1], *products((0, 2, 3), (0, 3, 2))[:1]],
)
def bmm_grad(g, out, a, b):
    return g.bmm(b.mH), a.mH.bmm(g)


@rule(aten.mv.default, formula="a @ b", samples=[*products((3, 4), (4,)), *products((0, 4), (4,))[:1]])
def mv_grad(g, out, a, b):
    return g.unsqueeze(1) * b.conj(), a.mH.mv(g)


@rule(aten.dot.default, formula="a · b", samples=[*products((4,), (4,)), *products((0,), (0,))[:1]])
def dot_grad(g, out, a, b):
    return g * b.conj(), g * a.conj()


@rule(aten.vdot.default, formula="conj(a) · b", samples=products((4,), (4,)))
def vdot_grad(g, out, a, b):
    return g.conj() * b, g * a


@rule(
    aten.addmm.default,
    broadcasts=True,
    formula="c + a @ b",
    samples=[
        *products((2,), (3, 4), (4, 2)),
        *products((3, 2), (3, 4), (4, 2))[:1],
        *products((), (3, 4), (4, 2))[:1],
        *products((3, 1), (3, 4), (4, 2))[:1],
        *products((2,), (0, 4), (4, 2))[:1],
        sample(spec(2, 2), spec(2, 2), spec(2, 2), beta=0.5, alpha=2.0),
        sample(spec(2, dtype=C128), spec(2, 2, dtype=C128), spec(2, 2, dtype=C128), beta=1 - 1j, alpha=2j),
    ],
)
def addmm_grad(g, out, c, a, b, *, beta=1, alpha=1):
    scaled_g = scaled(g, alpha)
    return scaled(g, beta), product(scaled_g, b.mH, a.stride()), product(a.mH, scaled_g, b.stride())


@rule(
    aten.baddbmm.default,
    broadcasts=True,
    formula="c + a @ b",
    samples=[
        *products((3, 1), (2, 3, 4), (2, 4, 2)),
        sample(spec(2, 2, 2), spec(2, 2, 2), spec(2, 2, 2), beta=0.5, alpha=2.0),
    ],
)
def baddbmm_grad(g, out, c, a, b, *, beta=1, alpha=1):
    scaled_g = scaled(g, alpha)
    return scaled(g, beta), scaled_g.bmm(b.mH), a.mH.bmm(scaled_g)


@rule(
    aten.addbmm.default,
    broadcasts=True,
    samples=[
        *products((3, 1), (2, 3, 4), (2, 4, 2)),
        sample(spec(2), spec(2, 2, 2), spec(2, 2, 2), beta=0.5, alpha=2.0),
    ],
)
def addbmm_grad(g, out, c, a, b, *, beta=1, alpha=1):
    each = scaled(g, alpha).expand(a.shape[0], -1, -1)
    return scaled(g, beta), each.bmm(b.mH), a.mH.bmm(each)


@rule(
    aten.addmv.default,
    broadcasts=True,
    samples=[*products((3,), (3, 4), (4,)), sample(spec(), spec(3, 4), spec(4), beta=0.5, alpha=2.0)],
)
def addmv_grad(g, out, c, a, b, *, beta=1, alpha=1):
    scaled_g = scaled(g, alpha)
    return scaled(g, beta), scaled_g.unsqueeze(1) * b.conj(), a.mH.mv(scaled_g)


@rule(
    aten.addr.default,
    broadcasts=True,
    samples=[*products((3, 4), (3,), (4,)), sample(spec(4), spec(3), spec(4), beta=0.5, alpha=2.0)],
)
def addr_grad(g, out, c, a, b, *, beta=1, alpha=1):
    scaled_g = scaled(g, alpha)
    return scaled(g, beta), scaled_g.mv(b.conj()), scaled_g.mT.mv(a.conj())


@rule(
    aten.linalg_cross.default,
    broadcasts=True,
    samples=[*products((2, 3), (2, 3)), sample(spec(3, 2), spec(3, 1), dim=0)],
)
def linalg_cross_grad(g, out, a, b, *, dim=-1):
    return torch.linalg.cross(b.conj(), g, dim=dim), torch.linalg.cross(g, a.conj(), dim=dim)


@rule(aten.trace.default, samples=products((3, 4)))
def trace_grad(g, out, x):
    return g * torch.eye(*x.shape, dtype=g.dtype, device=g.device)
