"""The article's backward passes of lin → relu → mse, in plain torch: what the engine is held against.

Each version takes `X` (N, D), `w` (D, M), `b` (M,), (1,) or none, and `Y` of the shape of `X @ w`, or (N,)
where M is 1, and gives the loss with its gradients. None of them uses the engine, or torch's autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Result(NamedTuple):
    """The loss, a 0-d tensor, and its gradient with respect to each value, of that value's shape."""

    C: Tensor
    X: Tensor
    w: Tensor
    b: Tensor | None
    Z: Tensor
    U: Tensor


def _forward(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Z = X @ w if b is None else X @ w + b
    U = Z.clamp_min(0.0)
    Y = Y.reshape(U.shape)
    return Z, U, Y, (U - Y).pow(2).mean()


def _for_b(per_row: Tensor, b: Tensor | None) -> Tensor | None:
    """The gradient of `b`: a row's is that of Z, and a single bias stands in every column."""
    if b is None:
        return None
    return per_row.sum(0) if b.numel() == per_row.shape[1] else per_row.sum().reshape(1)


def row_loops(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> Result:
    """Row by row throughout, each row an input of its own, stacked and summed at the end."""
    Z, U, Y, C = _forward(X, w, b, Y)
    N = U.numel()
    U_g = torch.stack([-2.0 / N * (Y[i] - U[i]) for i in range(len(U))])
    Z_g = torch.stack([U_g[i] * (Z[i] > 0).to(Z.dtype) for i in range(len(Z))])
    w_g = torch.stack([X[i].unsqueeze(1) * Z_g[i].unsqueeze(0) for i in range(len(X))]).sum(0)
    X_g = torch.stack([Z_g[i] @ w.t() for i in range(len(X))])
    return Result(C, X_g, w_g, _for_b(Z_g, b), Z_g, U_g)


def half_vectorised(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> Result:
    """`w.g` by a matrix product, `X.g` still row by row."""
    Z, U, Y, C = _forward(X, w, b, Y)
    U_g = 2.0 * (U - Y) / U.numel()
    Z_g = U_g * (Z > 0).to(Z.dtype)
    X_g = torch.stack([Z_g[i] @ w.t() for i in range(len(X))])
    return Result(C, X_g, X.t() @ Z_g, _for_b(Z_g, b), Z_g, U_g)


def vectorised(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> Result:
    """All rows at once."""
    Z, U, Y, C = _forward(X, w, b, Y)
    U_g = 2.0 * (U - Y) / U.numel()
    Z_g = U_g * (Z > 0).to(Z.dtype)
    return Result(C, Z_g @ w.t(), X.t() @ Z_g, _for_b(Z_g, b), Z_g, U_g)


def closed_form(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> Result:
    """From the formula that the chain rule multiplies out to: 2/N Σ (w·x + b - y) xᵀ over the rows with w·x + b > 0."""
    z = torch.einsum("nd,dm->nm", X, w) + (0.0 if b is None else b)
    y = Y.reshape(z.shape)
    open_rows = torch.where(z > 0, (z - y) * (2.0 / z.numel()), torch.zeros_like(z))
    return Result(
        C=torch.where(z > 0, z - y, y).square().sum() / z.numel(),
        X=torch.einsum("nm,dm->nd", open_rows, w),
        w=torch.einsum("nm,nd->dm", open_rows, X),
        b=_for_b(open_rows, b),
        Z=open_rows,
        U=torch.where(z > 0, z - y, -y) * (2.0 / z.numel()),
    )


VERSIONS: tuple[Callable[[Tensor, Tensor, Tensor | None, Tensor], Result], ...] = (
    row_loops,
    half_vectorised,
    vectorised,
    closed_form,
)
