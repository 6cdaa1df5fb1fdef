# mypy: allow-untyped-defs
"""Inverses, solutions of linear systems, determinants, factorisations, and what is made of them.

The formulas are those of M. Giles, "An extended collection of matrix derivative results for forward and
reverse mode algorithmic differentiation" (2008), and their usual complex forms. Where an output of a
factorisation is not unique (the phase of an eigenvector), only a loss that does not depend on the
choice has a gradient.
"""

from __future__ import annotations

import torch

from ..registry import rule, sample, spec
from .common import C128, Tensor, aten, kernels

_complex = spec(2, 3, 3, dtype=C128)
_positive = spec(2, 2, values=[2.0, 0.5, 0.5, 1.0])
_lower = spec(2, 2, values=[1.4, 0.0, 0.3, 0.9])


def _diagonal(t: Tensor) -> Tensor:
    return t.diagonal(dim1=-2, dim2=-1)


# -- inverse and determinant -------------------------------------------------------------------------


@rule(aten.linalg_inv_ex.default, formula="x⁻¹", samples=[sample(spec(3, 3)), sample(_complex)])
def linalg_inv_ex_grad(g, out, x, *, check_errors=False):
    back = out[0].mH
    return None if g[0] is None else -back @ g[0] @ back


@rule(
    aten._linalg_det.default,
    formula="det(x)",
    samples=[sample(spec(3, 3)), sample(_complex), sample(spec(0, 0))],
)
def linalg_det_grad(g, out, x):
    """``g det(x)* x⁻ᴴ``; a singular matrix is first moved off by the root of a rounding, to be near the limit."""
    if g[0] is None or x.numel() == 0:
        return None if g[0] is None else torch.zeros_like(x)
    permutation, lower, upper = kernels.lu_unpack(out[1], out[2])
    pivots = _diagonal(upper)
    largest = pivots.abs().amax(-1, keepdim=True)
    step = torch.where(largest == 0, 1, largest) * torch.finfo(pivots.dtype).eps ** 0.5
    moved = x + permutation @ (lower * torch.where(pivots == 0, step, 0).unsqueeze(-2))
    scale = (g[0] * torch.linalg.det(moved).conj()).unsqueeze(-1).unsqueeze(-1)
    return scale * torch.linalg.inv_ex(moved)[0].mH


@rule(aten._linalg_slogdet.default, formula="log |det x|", samples=[sample(spec(3, 3)), sample(_complex)])
def linalg_slogdet_grad(g, out, x):
    if g[1] is None and (g[0] is None or not x.is_complex()):
        return None if g[0] is None else torch.zeros_like(x)
    scale = torch.zeros_like(out[1]) if g[1] is None else g[1]
    if g[0] is not None and x.is_complex():
        scale = scale - 1j * (g[0].conj() * out[0]).imag  # the sign turns as the logarithm's imaginary part grows
    return scale.unsqueeze(-1).unsqueeze(-1) * torch.linalg.inv_ex(x)[0].mH


# -- systems -----------------------------------------------------------------------------------------


@rule(
    aten._linalg_solve_ex.default,
    broadcasts=True,
    formula="a⁻¹ b",
    samples=[
        sample(spec(3, 3), spec(3, 2)),
        sample(spec(3, 3), spec(3)),
        sample(spec(3, 3), spec(2, 3), left=False),
        sample(_complex, spec(2, 3, 2, dtype=C128)),
        sample(spec(2, 3, 3), spec(3, 2)),
    ],
)
def linalg_solve_ex_grad(g, out, a, b, *, left=True, check_errors=False):
    if g[0] is None:
        return None, None
    solution, column = out[0], b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    by_b = torch.linalg.solve_ex(a.mH, g[0], left=left)[0]
    if column:
        return -by_b.unsqueeze(-1) * solution.unsqueeze(-2).conj(), by_b
    return -(by_b @ solution.mH if left else solution.mH @ by_b), by_b


def _part(t: Tensor, upper: bool, unit: bool) -> Tensor:
    """The triangle that was read; without its diagonal, if that was taken for ones."""
    return t.triu(int(unit)) if upper else t.tril(-int(unit))


@rule(
    aten.linalg_solve_triangular.default,
    broadcasts=True,
    samples=[
        sample(spec(3, 3, low=0.5), spec(3, 2), upper=True),
        sample(spec(3, 3, low=0.5), spec(2, 3), upper=False, left=False),
        sample(spec(3, 3), spec(3, 2), upper=False, unitriangular=True),
        sample(spec(2, 2, dtype=C128), spec(2, 2, dtype=C128), upper=True),
    ],
)
def linalg_solve_triangular_grad(g, out, a, b, *, upper, left=True, unitriangular=False):
    by_b = torch.linalg.solve_triangular(a.mH, g, upper=not upper, left=left, unitriangular=unitriangular)
    by_a = by_b @ out.mH if left else out.mH @ by_b
    return -_part(by_a, upper, unitriangular), by_b


@rule(
    aten.triangular_solve.default,
    broadcasts=True,
    samples=[
        sample(spec(3, 2), spec(3, 3, low=0.5)),
        sample(spec(3, 2), spec(3, 3, low=0.5), False, True),
        sample(spec(3, 2), spec(3, 3), True, False, True),
    ],
)
def triangular_solve_grad(g, out, b, a, upper=True, transpose=False, unitriangular=False):
    by_a = g[1]
    if g[0] is None:
        return None, by_a
    by_b = kernels.triangular_solve(g[0], a.conj(), upper, not transpose, unitriangular)[0]
    part = -(out[0].conj() @ by_b.mT if transpose else by_b @ out[0].mH)
    part = _part(part, upper, unitriangular)
    return by_b, part if by_a is None else part + by_a


# -- the factorisation of Cholesky -------------------------------------------------------------------


def _cholesky(g: Tensor, lower: Tensor) -> Tensor:
    """The gradient of ``x = L Lᴴ`` from that of L, as a Hermitian matrix."""
    inner = (lower.mH @ g).tril()
    inner = inner + inner.tril(-1).mH
    if inner.is_complex():
        inner = inner - torch.diag_embed(1j * _diagonal(inner).imag)
    inner = torch.linalg.solve_triangular(lower.mH, inner, upper=True)
    whole: Tensor = torch.linalg.solve_triangular(lower, inner, upper=False, left=False)
    return whole / 2


@rule(
    aten.linalg_cholesky_ex.default,
    formula="cholesky(x)",
    samples=[sample(_positive), sample(_positive, upper=True)],
)
def linalg_cholesky_ex_grad(g, out, x, *, upper=False, check_errors=False):
    if g[0] is None:
        return None
    return _cholesky(g[0].mH, out[0].mH) if upper else _cholesky(g[0], out[0])


@rule(aten.cholesky.default, samples=[sample(_positive), sample(_positive, True)])
def cholesky_grad(g, out, x, upper=False):
    return _cholesky(g.mH, out.mH) if upper else _cholesky(g, out)


@rule(
    aten.cholesky_solve.default,
    broadcasts=True,
    samples=[sample(spec(2, 3), _lower), sample(spec(2, 3), _positive, True)],
)
def cholesky_solve_grad(g, out, b, factor, upper=False):
    by_b = torch.cholesky_solve(g, factor, upper)
    both = by_b @ out.mH
    both = both + both.mH
    return by_b, -(factor @ both if upper else both @ factor)


@rule(aten.cholesky_inverse.default, samples=[sample(_lower), sample(_positive, True)])
def cholesky_inverse_grad(g, out, factor, upper=False):
    both = out @ (g + g.mH) @ out
    return -(factor @ both if upper else both @ factor)


# -- triangles with pivots ---------------------------------------------------------------------------


def _lu(g_lower: Tensor | None, g_upper: Tensor | None, permutation: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The gradient of ``x = P L U`` from those of L and U; L and U of min(m, n) columns and rows.

    The square part is Giles's. The rows below it are ``x₂ U⁻¹``, the columns beside it ``L⁻¹ Pᵀ x₂``.
    """
    m, n, k = lower.shape[-2], upper.shape[-1], upper.shape[-2]
    g_lower = torch.zeros_like(lower) if g_lower is None else g_lower
    g_upper = torch.zeros_like(upper) if g_upper is None else g_upper
    square_l, square_u = lower[..., :k, :], upper[..., :, :k]
    g_l, g_u = g_lower[..., :k, :], g_upper[..., :, :k]
    below = beside = None
    if m > k:
        below = torch.linalg.solve_triangular(square_u.mH, g_lower[..., k:, :], upper=False, left=False)
        g_u = g_u - lower[..., k:, :].mH @ below
    if n > k:
        beside = torch.linalg.solve_triangular(square_l.mH, g_upper[..., :, k:], upper=True, unitriangular=True)
        g_l = g_l - beside @ upper[..., :, k:].mH
    inner = (square_l.mH @ g_l).tril(-1) + (g_u @ square_u.mH).triu()
    inner = torch.linalg.solve_triangular(square_u.mH, inner, upper=False, left=False)
    inner = torch.linalg.solve_triangular(square_l.mH, inner, upper=True, unitriangular=True)
    if below is not None:
        inner = torch.cat([inner, below], -2)
    if beside is not None:
        inner = torch.cat([inner, beside], -1)
    return permutation @ inner


_shapes = [spec(3, 3), spec(4, 2), spec(2, 4), spec(2, 2, dtype=C128)]


@rule(aten.linalg_lu.default, samples=[sample(each) for each in _shapes])
def linalg_lu_grad(g, out, x, *, pivot=True):
    if g[1] is None and g[2] is None:
        return None
    return _lu(g[1], g[2], *out)


@rule(aten.linalg_lu_factor_ex.default, samples=[sample(each) for each in _shapes])
def linalg_lu_factor_ex_grad(g, out, x, *, pivot=True, check_errors=False):
    if g[0] is None:
        return None
    k = min(x.shape[-2:])
    permutation, lower, upper = kernels.lu_unpack(out[0], out[1])
    return _lu(g[0][..., :, :k].tril(-1), g[0][..., :k, :].triu(), permutation, lower, upper)


@rule(
    aten.lu_unpack.default,
    samples=[
        sample(spec(3, 3), spec(3, dtype=torch.int32, values=[2, 3, 3])),
        sample(spec(3, 2), spec(2, dtype=torch.int32, values=[2, 3])),
        sample(spec(2, 3), spec(2, dtype=torch.int32, values=[2, 2])),
    ],
)
def lu_unpack_grad(g, out, x, pivots, unpack_data=True, unpack_pivots=True):
    m, n = x.shape[-2:]
    parts = []
    if g[1] is not None:
        parts.append(torch.nn.functional.pad(g[1].tril(-1), [0, n - min(m, n)]))
    if g[2] is not None:
        parts.append(torch.nn.functional.pad(g[2].triu(), [0, 0, 0, m - min(m, n)]))
    return sum(parts[1:], parts[0]) if parts else None, None


@rule(
    aten.linalg_lu_solve.default,
    samples=[
        sample(
            spec(3, 3, low=0.5), spec(3, dtype=torch.int32, values=[2, 3, 3]), spec(3, 2), left=left, adjoint=adjoint
        )
        if left
        else sample(
            spec(3, 3, low=0.5), spec(3, dtype=torch.int32, values=[2, 3, 3]), spec(2, 3), left=False, adjoint=adjoint
        )
        for left in (True, False)
        for adjoint in (False, True)
    ],
)
def linalg_lu_solve_grad(g, out, lu, pivots, b, *, left=True, adjoint=False):
    by_b = torch.linalg.lu_solve(lu, pivots, g, left=left, adjoint=not adjoint)
    whole = -(by_b @ out.mH if left else out.mH @ by_b)
    whole = whole.mH if adjoint else whole
    permutation, lower, upper = kernels.lu_unpack(lu, pivots)
    rows = permutation.mT @ whole
    return (rows @ upper.mH).tril(-1) + (lower.mH @ rows).triu(), None, by_b


# -- eigenvalues and singular values -----------------------------------------------------------------


def _gaps(values: Tensor) -> Tensor:
    """For each pair (i, j) value j minus value i; ones on the diagonal."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    return gaps + torch.eye(values.shape[-1], dtype=values.dtype, device=values.device)


@rule(aten._linalg_eigh.default, samples=[sample(_positive), sample(_positive, "U")])
def linalg_eigh_grad(g, out, x, uplo="L", compute_v=True):
    if g[0] is None and g[1] is None:
        return None
    values, vectors = out if compute_v else torch.linalg.eigh(x, UPLO=uplo)
    inner = torch.zeros_like(vectors) if g[0] is None else torch.diag_embed(g[0]).to(vectors.dtype)
    if g[1] is not None:
        turn = vectors.mH @ g[1] / _gaps(values)
        inner = inner + turn - torch.diag_embed(_diagonal(turn))
    whole = vectors @ inner @ vectors.mH
    return (whole + whole.mH) / 2


@rule(aten.linalg_eig.default)
def linalg_eig_grad(g, out, x):
    if g[0] is None and g[1] is None:
        return None
    values, vectors = out
    inner = 0 if g[0] is None else torch.diag_embed(g[0])
    if g[1] is not None:
        turn = vectors.mH @ g[1]
        # the vectors have length 1: what would lengthen them is taken off
        turn = turn - vectors.mH @ vectors * _diagonal(turn).real.unsqueeze(-2)
        turn = turn / _gaps(values).conj()
        inner = inner + turn - torch.diag_embed(_diagonal(turn))
    return torch.linalg.solve_ex(vectors.mH, inner @ vectors.mH)[0]


@rule(
    aten._linalg_svd.default,
    samples=[sample(spec(3, 3)), sample(spec(4, 2)), sample(spec(2, 4))],
)
def linalg_svd_grad(g, out, x, full_matrices=False, compute_uv=True, *, driver=None):
    if g[0] is None and g[1] is None and g[2] is None:
        return None
    k = min(x.shape[-2:])
    u, s, vh = out if compute_uv else torch.linalg.svd(x, full_matrices=False)
    u, vh = u[..., :, :k], vh[..., :k, :]
    inner = torch.zeros_like(u.mH @ u) if g[1] is None else torch.diag_embed(g[1]).to(u.dtype)
    squares = _gaps(s * s)
    outside = 0
    if g[0] is not None:
        g_u = g[0][..., :, :k]
        turn = u.mH @ g_u
        skew = turn - turn.mH
        inner = inner + skew / squares * s.unsqueeze(-2) - torch.diag_embed(_diagonal(skew) * s)
        if x.is_complex():
            inner = inner + torch.diag_embed(_diagonal(skew) / (2 * s))
        outside = outside + ((g_u - u @ turn) / s.unsqueeze(-2)) @ vh
    if g[2] is not None:
        g_vh = g[2][..., :k, :]
        turn = vh @ g_vh.mH
        skew = turn - turn.mH
        inner = inner + s.unsqueeze(-1) * (skew / squares) - torch.diag_embed(s * _diagonal(skew))
        outside = outside + u @ ((g_vh - turn.mH @ vh) / s.unsqueeze(-1))
    return u @ inner @ vh + outside


@rule(
    aten.linalg_qr.default,
    samples=[sample(spec(3, 3)), sample(spec(4, 2)), sample(spec(2, 4)), sample(spec(3, 2, dtype=C128))],
)
def linalg_qr_grad(g, out, x, mode="reduced"):
    if g[0] is None and g[1] is None:
        return None
    q, r = torch.linalg.qr(x) if mode == "r" else out
    k = q.shape[-1]
    g_q = torch.zeros_like(q) if g[0] is None else g[0]
    g_r = torch.zeros_like(r) if g[1] is None else g[1]
    beside = None
    if x.shape[-1] > k:  # the columns beside the square part are ``Qᴴ x₂``
        beside = q @ g_r[..., :, k:]
        g_q = g_q + x[..., :, k:] @ g_r[..., :, k:].mH
        r, g_r = r[..., :, :k], g_r[..., :, :k]
    inner = r @ g_r.mH - g_q.mH @ q
    inner = inner.tril() + inner.tril(-1).mH
    if inner.is_complex():
        inner = inner - torch.diag_embed(1j * _diagonal(inner).imag)
    square = torch.linalg.solve_triangular(r.mH, g_q + q @ inner, upper=False, left=False)
    return square if beside is None else torch.cat([square, beside], -1)


# -- pseudo-inverse, least squares, exponential ------------------------------------------------------


def _pinv(g: Tensor, p: Tensor, x: Tensor) -> Tensor:
    """The gradient of the pseudo-inverse p (Golub and Pereyra): ``-pᴴ g pᴴ`` and what leaves x's ranges."""
    gh = g.mH
    columns, rows = gh @ p @ p.mH, p.mH @ p @ gh
    return -p.mH @ g @ p.mH + columns - x @ (p @ columns) + rows - rows @ p @ x


@rule(
    aten.linalg_pinv.atol_rtol_tensor,
    samples=[sample(spec(3, 2)), sample(spec(2, 3)), sample(spec(3, 2, dtype=C128))],
)
def linalg_pinv_grad(g, out, x, *, atol=None, rtol=None, hermitian=False):
    return _pinv(g, out, x), None, None


@rule(
    aten.linalg_lstsq.default,
    samples=[sample(spec(4, 2), spec(4, 3)), sample(spec(2, 2), spec(2, 3)), sample(spec(2, 4), spec(2, 3))],
)
def linalg_lstsq_grad(g, out, a, b, rcond=None, *, driver=None):
    by_a = by_b = None
    if g[0] is not None:
        p = torch.linalg.pinv(a)
        by_a, by_b = _pinv(g[0] @ b.mH, p, a), p.mH @ g[0]
    if g[1] is not None and out[1].numel():  # the squares of ``a x - b``, where x is already best
        over = 2 * g[1].unsqueeze(-2) * (a @ out[0] - b)
        by_a, by_b = (over @ out[0].mH, -over) if by_a is None else (by_a + over @ out[0].mH, by_b - over)
    return by_a, by_b


@rule(aten.linalg_matrix_exp.default, formula="exp(x)", samples=[sample(spec(3, 3)), sample(_complex)])
def linalg_matrix_exp_grad(g, out, x):
    """The upper right block of the exponential of ``[[xᴴ, g], [0, xᴴ]]``."""
    n = x.shape[-1]
    turned = x.mH
    top, bottom = torch.cat([turned, g], -1), torch.cat([torch.zeros_like(turned), turned], -1)
    return torch.linalg.matrix_exp(torch.cat([top, bottom], -2))[..., :n, n:]
