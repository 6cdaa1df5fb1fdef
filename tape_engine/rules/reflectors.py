# mypy: allow-untyped-defs
"""Products of Householder reflectors."""

from __future__ import annotations

import torch

from ..registry import rule, sample, spec
from .common import C128, Tensor, aten


def _reflectors(g: Tensor, x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``Q = H₁ … H_k E`` with ``H = 1 - τ v vᴴ``, each `v` a column of `x` below its diagonal, with 1 on it.

    Of each factor ``dH = Pᴴ g Sᴴ``, with `P` what stands left of it and `S` what stands right.
    """
    rows, columns = g.shape[-2:]
    unit = torch.eye(rows, x.shape[-1], dtype=x.dtype, device=x.device)
    whole = x.tril(-1) + unit
    vectors = [whole.narrow(-1, i, 1) for i in range(x.shape[-1])]
    scales = [tau.narrow(-1, i, 1).unsqueeze(-1) for i in range(tau.shape[-1])]
    right = [torch.eye(rows, columns, dtype=x.dtype, device=x.device).expand(g.shape)]
    for v, t in zip(vectors[: len(scales)][::-1], scales[::-1], strict=True):
        right.append(right[-1] - t * v @ (v.mH @ right[-1]))
    left, by_v, by_tau = g, [], []
    for v, t, s in zip(vectors, scales, right[-2::-1], strict=False):
        forth, back = left @ (s.mH @ v), s @ (left.mH @ v)
        by_v.append(-t.conj() * forth - t * back)
        by_tau.append(-(v.mH @ forth).squeeze(-1))
        left = left - t.conj() * v @ (v.mH @ left)
    by_v += [torch.zeros_like(v) for v in vectors[len(scales) :]]
    by_x = torch.cat(by_v, -1).tril(-1) if by_v else torch.zeros_like(x)
    return by_x, torch.cat(by_tau, -1) if by_tau else torch.zeros_like(tau)


@rule(
    aten.linalg_householder_product.default,
    samples=[
        sample(spec(4, 3), spec(3)),
        sample(spec(2, 4, 3), spec(2, 2)),
        sample(spec(3, 3, dtype=C128), spec(3, dtype=C128)),
        sample(spec(3, 2), spec(0)),
    ],
)
def linalg_householder_product_grad(g, out, x, tau):
    return _reflectors(g, x, tau)


@rule(
    aten.ormqr.default,
    samples=[
        sample(spec(4, 3), spec(3), spec(4, 2)),
        sample(spec(4, 3), spec(3), spec(4, 2), True, True),
        sample(spec(4, 3), spec(3), spec(2, 4), False),
        sample(spec(2, 3, 3, dtype=C128), spec(2, 3, dtype=C128), spec(2, 2, 3, dtype=C128), False, True),
    ],
)
def ormqr_grad(g, out, x, tau, other, left=True, transpose=False):
    """Of ``Q other``, ``other Q`` (not `left`), or the same with ``Qᴴ``; Q the whole square of the reflectors."""
    by_q = g @ other.mH if left else other.mH @ g
    return *_reflectors(by_q.mH if transpose else by_q, x, tau), torch.ormqr(x, tau, g, left, not transpose)
