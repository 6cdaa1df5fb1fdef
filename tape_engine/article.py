"""The backward pass of lin → relu → mse written out by hand, as the article develops it.

No tape is used here: this is what the engine is held against, and what its speed is compared with. The
gradients are worked out row by row first, since each row of `X` is an input of its own, and then by the
matrix products that do the same sums at once::

    backward(X, w, b, Y, lin_grad=lin_grad_rows)    # a loop over the rows for w.g, another for X.g
    backward(X, w, b, Y, lin_grad=lin_grad_half)    # w.g by a matrix product, X.g still by a loop
    backward(X, w, b, Y)                            # both by matrix products

Shapes: `X` (N, D), `w` (D, M), `b` (M,) or (1,); `Z` and `U` (N, M); `Y` of the shape of `U`, or (N,) where M is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

__all__ = [
    "Gradients",
    "backward",
    "by_rows",
    "closed_form",
    "forward",
    "lin_grad",
    "lin_grad_half",
    "lin_grad_rows",
    "mse_grad",
    "mse_grad_rows",
    "relu_grad",
    "relu_grad_rows",
]

Tensor = torch.Tensor


class Gradients(NamedTuple):
    """The gradient of the loss with respect to each value, each of that value's shape."""

    X: Tensor
    w: Tensor
    b: Tensor
    Z: Tensor
    U: Tensor


def forward(X: Tensor, w: Tensor, b: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Z`, `U` and the loss `C`, a 0-d tensor: the mean over all elements of (U - Y)²."""
    Z = X @ w + b
    U = Z.clamp_min(0.0)
    C = (U - Y.reshape(U.shape)).pow(2).mean()
    return Z, U, C


# -- C(u) = 1/N Σ (y - u)² -----------------------------------------------------------------------------------


def mse_grad_rows(U: Tensor, Y: Tensor) -> Tensor:
    """∂C/∂u, a row at a time."""
    Y = Y.reshape(U.shape)
    return torch.stack([-2.0 / U.numel() * (Y[i] - U[i]) for i in range(len(U))])


def mse_grad(U: Tensor, Y: Tensor) -> Tensor:
    """∂C/∂u for all rows at once."""
    # The article derives -2/N (y - u), and its code line then leaves the minus out. This is the derivation.
    return 2.0 * (U - Y.reshape(U.shape)) / U.numel()


# -- u(z) = max(0, z) ----------------------------------------------------------------------------------------


def relu_grad_rows(g: Tensor, Z: Tensor) -> Tensor:
    """∂C/∂z, a row at a time; `g` is ∂C/∂u."""
    return torch.stack([g[i] * (Z[i] > 0) for i in range(len(Z))])


def relu_grad(g: Tensor, Z: Tensor) -> Tensor:
    """∂C/∂z for all rows at once; `g` is ∂C/∂u."""
    return g * (Z > 0).to(g.dtype)


# -- z(w, x, b) = w·x + b --------------------------------------------------------------------------------------

LinGrad = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def lin_grad_rows(g: Tensor, X: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `X`, `w` and `b`, with a loop over the rows for `X` and for `w`; `g` is ∂C/∂z."""
    # Every row has its own term under the sum sign of the loss, and w is in each of them: so they are added up.
    per_row = [X[i].unsqueeze(1) @ g[i].unsqueeze(0) for i in range(len(X))]
    return _X_rows(g, w), torch.stack(per_row).sum(0), _b(g, b)


def lin_grad_half(g: Tensor, X: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with `w` by a matrix product and a loop over the rows for `X`."""
    return _X_rows(g, w), X.t() @ g, _b(g, b)


def lin_grad(g: Tensor, X: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, by matrix products alone: N is the inner dimension of Xᵀ g, so it sums over the rows."""
    return g @ w.t(), X.t() @ g, _b(g, b)


def _X_rows(g: Tensor, w: Tensor) -> Tensor:
    return torch.stack([g[i] @ w.t() for i in range(len(g))])


def _b(g: Tensor, b: Tensor) -> Tensor:
    summed = g.sum(0)
    return summed if b.shape == summed.shape else summed.sum(0, keepdim=True)


# -- the whole pass --------------------------------------------------------------------------------------------


def backward(X: Tensor, w: Tensor, b: Tensor, Y: Tensor, *, lin_grad: LinGrad = lin_grad) -> Gradients:
    """Forward, then back: mse and relu for all rows at once, the linear layer as `lin_grad` does it."""
    Z, U, _ = forward(X, w, b, Y)
    g_U = mse_grad(U, Y)
    g_Z = relu_grad(g_U, Z)
    g_X, g_w, g_b = lin_grad(g_Z, X, w, b)
    return Gradients(X=g_X, w=g_w, b=g_b, Z=g_Z, U=g_U)


def by_rows(X: Tensor, w: Tensor, b: Tensor, Y: Tensor) -> Gradients:
    """Forward, then back with a loop over the rows in each of the three steps."""
    Z, U, _ = forward(X, w, b, Y)
    g_U = mse_grad_rows(U, Y)
    g_Z = relu_grad_rows(g_U, Z)
    g_X, g_w, g_b = lin_grad_rows(g_Z, X, w, b)
    return Gradients(X=g_X, w=g_w, b=g_b, Z=g_Z, U=g_U)


def closed_form(X: Tensor, w: Tensor, b: Tensor, Y: Tensor) -> Gradients:
    """Each gradient from the one formula that all the factors multiply out to, without a chain rule.

    ∂C/∂w = 2/N Σ (w·x + b - y) xᵀ over the rows with w·x + b > 0, and 0 for the others (the article,
    "But how do you know when to sum the gradients?"). N counts the elements of `Y`: rows times columns.
    """
    z = torch.einsum("nd,dm->nm", X, w) + b
    y = Y.reshape(z.shape)
    active = torch.where(z > 0, 2.0 / z.numel() * (z - y), 0.0)
    return Gradients(
        X=torch.einsum("nm,dm->nd", active, w),
        w=torch.einsum("nm,nd->dm", active, X),
        b=_b(active, b),
        Z=active,
        U=2.0 / z.numel() * (torch.maximum(z, torch.zeros_like(z)) - y),
    )
