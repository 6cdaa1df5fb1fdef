"""The article's three operations, each beside its gradient rule.

The forward pass of the article is one line of mathematics a line of code::

    Z = lin(X, w, b)      # z(x, w, b) = w·x + b
    U = relu(Z)           # u(z) = max(0, z)
    C = mse(U, Y)         # C(u) = 1/N Σ (y - u)²

and the gradient with respect to w is one factor a line, multiplied from the loss back::

    ∂C/∂w  =  ∂C/∂u  ·  ∂u/∂z  ·  ∂z/∂w
             mse_grad  relu_grad  lin_grad

Each call below records one node on the tape. A rule is given ``g``, the gradient of C with respect to
the operation's output, that is all the factors to its left, multiplies it by its own factor, and returns
one gradient for each argument. The sweep does the rest: it walks the tape back, hands each rule its
``g``, sums where a value was used more than once, and leaves the gradients on the tensors as ``.g``.
"""

from __future__ import annotations

from typing import Any

import torch

from . import fits
from .registry import op, sample, spec

__all__ = ["lin", "mse", "relu"]

Tensor = torch.Tensor


@op(
    formula="X @ w + b",
    broadcasts=True,
    check=fits.lin,
    samples=[
        sample(spec(5, 3), spec(3, 1), spec(1)),
        sample(spec(5, 3), spec(3, 4), spec(4)),
        sample(spec(5, 3), spec(3, 4), spec(1)),
        sample(spec(5, 3), spec(3, 4), None),
        sample(spec(2, 5, 3), spec(3, 4), spec(4)),
        sample(spec(0, 3), spec(3, 4), spec(4)),
        sample(spec(3, 3), spec(3, 3), spec(3)),
        sample(spec(5, 3, dtype=torch.complex128), spec(3, 2, dtype=torch.complex128), spec(2, dtype=torch.complex128)),
    ],
)
def lin(X: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """A linear layer, row by row: X (..., N, D), w (D, M), b (M,), (1,) or none; gives (..., N, M).

    Raises:
        ShapeError, DTypeError: where the operands do not fit each other.
    """
    return X @ w if b is None else X @ w + b


@lin.rule
def lin_grad(g: Tensor, Z: Tensor, X: Tensor, w: Tensor, b: Tensor | None) -> Any:
    # The rows of X are independent: each gives g·wᵀ for itself, and all of them add up in w and in b.
    # That sum over rows is the matrix product Xᵀ @ g (the article's "Optimizing the code"). For complex
    # numbers the transpose is the conjugate one, .mH; for real numbers that is the plain transpose.
    X_rows, g_rows = X.flatten(0, -2), g.flatten(0, -2)
    return g @ w.mH, X_rows.mH @ g_rows, g_rows.sum(0)


@op(
    formula="max(0, Z)",
    check=fits.relu,
    samples=[
        sample(spec(5, 3)),
        sample(spec(6, values=[-1.0, -0.0, 0.0, 1e-9, 2.0, -1e-9])),  # the kink
        sample(spec()),
        sample(spec(0, 4)),
    ],
)
def relu(Z: Tensor) -> Tensor:
    """The rectifier max(0, Z), element by element; gives the shape of Z.

    Raises:
        DTypeError: for a tensor that is not real and floating.
    """
    return Z.clamp_min(0.0)


@relu.rule
def relu_grad(g: Tensor, U: Tensor, Z: Tensor) -> Tensor:
    # 1 where Z > 0, and 0 where Z <= 0, at exactly 0 as well. U tells it as well as Z does, and is there anyway.
    return g.masked_fill(U <= 0, 0.0)


@op(
    formula="mean((U - Y)²)",
    check=fits.mse,
    samples=[
        sample(spec(5, 1), spec(5)),
        sample(spec(5, 1), spec(5, 1)),
        sample(spec(5), spec(5)),
        sample(spec(4, 3), spec(4, 3)),
        sample(spec(), spec()),
    ],
)
def mse(U: Tensor, Y: Tensor) -> Tensor:
    """The mean square error over all N elements, a 0-d tensor: U and Y of one shape, or U (N, 1) with Y (N,).

    Raises:
        ShapeError: for any other pair of shapes; torch would broadcast them.
        DTypeError: for operands that are not real numbers.
    """
    return (U - Y.reshape(U.shape)).pow(2).mean()


@mse.rule
def mse_grad(g: Tensor, C: Tensor, U: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    # ∂C/∂u = -2/N (y - u) = 2/N (u - y): the sign of the article's derivation. Its code line, which writes
    # 2 (Y - U) / N, has it reversed, and would walk up the error instead of down.
    g_U = g * 2.0 * (U - Y.reshape(U.shape)) / U.numel()
    return g_U, -g_U.reshape(Y.shape)
