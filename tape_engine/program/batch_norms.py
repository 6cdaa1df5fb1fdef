"""Batch normalisation of large batches, in passes that go at the speed of memory.

Torch's own kernel takes a fourfold of that for the mean and the deviation of a channel. Here a channel's numbers are
summed up line by line, by torch's sums; the deviation is that of what is left without the mean, and both are put right
by the mean of what is left, so that numbers far from nought lose nothing (Chan, Golub and LeVeque, Algorithms for
computing the sample variance, 1983). The line ``a x + b`` is then the one that recomputation takes.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from ..tape import Node, Value
from .calls import Call

__all__ = ["call_for"]

aten = torch.ops.aten
kernel: Any = aten._native_batch_norm_legit_functional.default
Tensor = torch.Tensor

LEAST = 1 << 18  # elements from which on it is worth more calls
LINE = 64  # elements of a channel that lie in a line, likewise


def call_for(node: Node) -> Call | None:
    """How a batch normalisation is run in passes; ``None`` for every other node, and where torch's kernel does."""
    if node.op.forward is not kernel or node.kwargs or node.gaps:
        return None
    x, training = node.args[0], node.args[5]
    values: list[Any] = [*node.args[:5], *node.outputs]
    if not all(isinstance(v, Value) and v.dtype is x.dtype and v.device.type == "cpu" for v in values) or not training:
        return None
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 3 or prod(x.shape) < LEAST:
        return None
    line = prod(x.shape[2:])
    dense = tuple(prod(x.shape[d + 1 :]) for d in range(x.ndim))
    return Call(batch_norm, "batch_norm") if line >= LINE and x.strides == dense else None


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    """As ``aten._native_batch_norm_legit_functional`` in training.

    Gives the normalised values, the mean and the inverse deviation that were found, and the running statistics with a
    share `momentum` of them.
    """
    N, C = x.shape[:2]
    lies = (1, C, *[1] * (x.ndim - 2))
    n = x.numel() // C
    found = x.reshape(N, C, -1).sum(2).sum(0).div_(n)
    left = torch.sub(x, found.view(lies))
    lines = left.view(N, C, -1)
    off = lines.sum(2).sum(0).div_(n)
    squares = torch.linalg.vector_norm(lines, 2, 2).square_().sum(0).div_(n)
    found.add_(off)
    spread = torch.sub(squares, off.square_(), out=squares).clamp_min_(0)
    inverse = torch.add(spread, eps).rsqrt_()
    if not bool(torch.add(spread, inverse).isfinite().all()):  # torch sums up in double, and `eps` may be nought
        made: tuple[Tensor, ...] = kernel(x, weight, bias, mean, var, training, momentum, eps)
        return made
    a = inverse * weight
    b = torch.addcmul(bias, found, a, value=-1)
    torch.addcmul(b.view(lies), x, a.view(lies), out=left)
    new_mean = mean.mul(1 - momentum).add_(found, alpha=momentum)
    new_var = var.mul(1 - momentum).add_(spread, alpha=momentum * n / (n - 1))
    return left, found, inverse, new_mean, new_var
