# mypy: allow-untyped-defs
"""Losses. ``reduction`` is 0 for each element alone, 1 for the mean, 2 for the sum."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample, rule, sample, spec
from .common import Tensor, aten, keep_where, kernels, stand_in


def pairs(*more: Any, low: float = -2.0, high: float = 2.0, **kwargs: Any) -> list[Sample]:
    """Samples of a loss of a prediction and a target, under each reduction."""
    x, y = spec(3, 4, low=low, high=high), spec(3, 4, low=low, high=high)
    made = [sample(x, y, *more, r, **kwargs) for r in (0, 1, 2)]
    return [*made, sample(spec(low=low, high=high), spec(low=low, high=high), *more, 0, **kwargs)]


def averaged(g: Tensor, reduction: int, number: int) -> Tensor:
    """The gradient of each element's loss, from that of what they were reduced to."""
    return g / number if reduction == 1 else g


def losing(shape: tuple[int, ...], reduction: int) -> Any:
    """The gradient of a loss, as an argument of a sample."""
    return spec(*shape) if reduction == 0 else spec()


def backward_samples(*more: Any) -> list[Sample]:
    """Samples of a loss's backward operation."""
    return [sample(losing((3, 4), r), spec(3, 4), spec(3, 4), r, *more) for r in (0, 1, 2)]


# -- differences -------------------------------------------------------------------------------------


@rule(aten.mse_loss.default, broadcasts=True, formula="mse(a, b)", samples=[*pairs(), sample(spec(3), spec(3))])
def mse_loss_grad(g, out, a, b, reduction=1):
    by_a = kernels.mse_loss_backward(g, a, b, reduction)
    return by_a, -by_a


@rule(aten.mse_loss_backward.default, broadcasts=True, samples=backward_samples())
def mse_loss_backward_grad(g, out, gy, a, b, reduction):
    double = averaged(g * 2, reduction, a.numel())
    return double * (a - b), double * gy, -double * gy


@rule(aten.smooth_l1_loss.default, broadcasts=True, samples=[*pairs(), sample(spec(3), spec(3), 2, 0.5)])
def smooth_l1_loss_grad(g, out, a, b, reduction=1, beta=1.0):
    by_a = kernels.smooth_l1_loss_backward(g, a, b, reduction, beta)
    return by_a, -by_a


@rule(aten.smooth_l1_loss_backward.default, broadcasts=True, samples=backward_samples(0.7))
def smooth_l1_loss_backward_grad(g, out, gy, a, b, reduction, beta):
    each, apart = averaged(g, reduction, a.numel()), a - b
    slope = apart.clamp(-beta, beta) / beta if beta else apart.sign()
    bend = keep_where(apart.abs() < beta, each * gy / beta) if beta else torch.zeros_like(g)
    return each * slope, bend, -bend


@rule(aten.huber_loss.default, broadcasts=True, samples=[*pairs(), sample(spec(3), spec(3), 2, 0.5)])
def huber_loss_grad(g, out, a, b, reduction=1, delta=1.0):
    by_a = kernels.huber_loss_backward(g, a, b, reduction, delta)
    return by_a, -by_a


@rule(aten.huber_loss_backward.default, broadcasts=True, samples=backward_samples(0.7))
def huber_loss_backward_grad(g, out, gy, a, b, reduction, delta):
    each, apart = averaged(g, reduction, a.numel()), a - b
    bend = keep_where(apart.abs() < delta, each * gy)
    return each * apart.clamp(-delta, delta), bend, -bend


@rule(aten.soft_margin_loss.default, broadcasts=True, samples=pairs())
def soft_margin_loss_grad(g, out, x, y, reduction=1):
    each = averaged(g, reduction, x.numel()) * -(-x * y).sigmoid()
    return each * y, each * x


# -- cross entropies ---------------------------------------------------------------------------------

_classes = spec(4, dtype=torch.int64, values=[2, 0, 1, 2])
_rows = spec(4, 3)


@rule(
    aten.nll_loss_forward.default,
    formula="nll(x, y)",
    samples=[
        *[sample(_rows, _classes, None, r, -100) for r in (0, 1, 2)],
        *[sample(_rows, _classes, spec(3, values=[0.5, 1.0, 2.0]), r, 0) for r in (0, 1, 2)],
        sample(spec(3), spec(dtype=torch.int64, values=[1]), None, 1, -100),
        sample(spec(0, 3), spec(0, dtype=torch.int64), None, 2, -100),
    ],
)
def nll_loss_grad(g, out, x, target, weight, reduction, ignore_index):
    if g[0] is None:
        return None, None, None
    whole = stand_in(g[0], x.shape)
    return kernels.nll_loss_backward(g[0], whole, target, weight, reduction, ignore_index, out[1]), None, None


@rule(
    aten.nll_loss_backward.default,
    samples=[
        sample(spec(), spec(4, 3), _classes, None, 1, -100, spec(values=[4.0])),
        sample(spec(4), spec(4, 3), _classes, spec(3, values=[0.5, 1.0, 2.0]), 0, 0, spec(values=[0.0])),
    ],
)
def nll_loss_backward_grad(g, out, gy, x, target, weight, reduction, ignore_index, total_weight):
    each = kernels.nll_loss_forward(g, target, weight, reduction, ignore_index)[0]
    return each, None, None, None, None


_pixels = spec(2, 2, 2, dtype=torch.int64, values=[2, 0, 1, 2, 0, 0, 1, 1])


@rule(
    aten.nll_loss2d_forward.default,
    formula="nll(x, y)",
    samples=[sample(spec(2, 3, 2, 2), _pixels, None, r, -100) for r in (0, 1, 2)],
)
def nll_loss2d_grad(g, out, x, target, weight, reduction, ignore_index):
    if g[0] is None:
        return None, None, None
    whole = stand_in(g[0], x.shape)
    return kernels.nll_loss2d_backward(g[0], whole, target, weight, reduction, ignore_index, out[1]), None, None


@rule(
    aten.nll_loss2d_backward.default,
    samples=[sample(spec(), spec(2, 3, 2, 2), _pixels, None, 1, -100, spec(values=[8.0]))],
)
def nll_loss2d_backward_grad(g, out, gy, x, target, weight, reduction, ignore_index, total_weight):
    each = kernels.nll_loss2d_forward(g, target, weight, reduction, ignore_index)[0]
    return each, None, None, None, None


@rule(
    aten.multi_margin_loss.default,
    samples=[sample(spec(4, 3), _classes), sample(spec(4, 3), _classes, 2, 0.5, None, 0)],
)
def multi_margin_loss_grad(g, out, x, target, p=1, margin=1, weight=None, reduction=1):
    return kernels.multi_margin_loss_backward(g, x, target, p, margin, weight, reduction), None, None


@rule(
    aten.multilabel_margin_loss_forward.default,
    samples=[sample(spec(2, 3), spec(2, 3, dtype=torch.int64, values=[2, 0, -1, 1, -1, 0]), r) for r in (0, 1, 2)],
)
def multilabel_margin_loss_grad(g, out, x, target, reduction):
    if g[0] is None:
        return None, None
    return kernels.multilabel_margin_loss_backward(g[0], x, target, reduction, out[1]), None


def _weighted(g: Tensor, weight: Any) -> Tensor:
    return g if weight is None else g * weight


_probabilities = spec(3, 4, low=0.1, high=0.9)


@rule(
    aten.binary_cross_entropy.default,
    broadcasts=True,
    samples=[
        *[sample(_probabilities, _probabilities, None, r) for r in (0, 1, 2)],
        sample(_probabilities, _probabilities, spec(3, 4, values=[1.0, 2.0] * 6), 1),
        sample(_probabilities, spec(3, 4, values=[0.0, 1.0] * 6)),
    ],
)
def binary_cross_entropy_grad(g, out, x, y, weight=None, reduction=1):
    by_x = kernels.binary_cross_entropy_backward(g, x, y, weight, reduction)
    each = _weighted(averaged(g, reduction, x.numel()), weight)
    # the loss takes no logarithm below -100
    return by_x, each * ((-x).log1p().clamp(min=-100) - x.log().clamp(min=-100)), None


@rule(
    aten.binary_cross_entropy_backward.default,
    broadcasts=True,
    samples=[sample(losing((3, 4), r), _probabilities, _probabilities, None, r) for r in (0, 1, 2)],
)
def binary_cross_entropy_backward_grad(g, out, gy, x, y, weight=None, reduction=1):
    each = _weighted(averaged(g, reduction, x.numel()), weight)
    spread = x * (1 - x)
    bend = (x * x - 2 * x * y + y) / (spread * spread)
    return each * (x - y) / spread, each * gy * bend, -each * gy / spread, None


@rule(
    aten.binary_cross_entropy_with_logits.default,
    broadcasts=True,
    samples=[
        *[sample(spec(3, 4), spec(3, 4), None, None, r) for r in (0, 1, 2)],
        sample(spec(3, 4), spec(3, 4, values=[0.0, 1.0] * 6)),
        sample(spec(3, 4), spec(3, 4), spec(3, 4, values=[1.0, 2.0] * 6), spec(4, values=[1.0, 2.0, 3.0, 4.0]), 1),
        sample(spec(3, 4), spec(3, 4), spec(4, values=[1.0, 2.0, 3.0, 4.0]), None, 1),
    ],
)
def binary_cross_entropy_with_logits_grad(g, out, x, y, weight=None, pos_weight=None, reduction=1):
    each = _weighted(averaged(g, reduction, x.numel()), weight)
    if pos_weight is None:
        return each * (x.sigmoid() - y), each * -x, None, None
    positive = pos_weight * y
    by_x = each * ((1 - y + positive) * x.sigmoid() - positive)
    log_sigmoid = torch.nn.functional.logsigmoid
    return by_x, each * (log_sigmoid(-x) - pos_weight * log_sigmoid(x)), None, None
