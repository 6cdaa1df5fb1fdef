# mypy: allow-untyped-defs
"""The activations of networks, and the softmaxes."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..registry import rule, sample, spec, spends
from .common import Tensor, aten, keep_where, kernels, rule_name, unary

_kink = spec(5, values=[-1.0, -0.5, 0.0, 0.5, 1.0])
_pair = [sample(spec(3, 4), spec(3, 4)), sample(spec(), spec())]


@rule(
    aten.relu.default,
    formula="relu(x)",
    samples=[*unary(complex=False), sample(_kink), sample(spec(2, values=[math.nan, 1.0]))],
)
def relu_grad(g, out, x):
    return kernels.threshold_backward(g, out, 0)


@spends(aten.relu.default)
def relu_spent(needs, g, out, x):
    return (kernels.threshold_backward(g, out, 0, grad_input=g),)


@rule(aten.threshold.default, samples=[*unary(-2, 2, 0.1, 0.7, complex=False), sample(_kink, 0.0, 1.0)])
def threshold_grad(g, out, x, threshold, value):
    return kernels.threshold_backward(g, x, threshold)


@rule(aten.threshold_backward.default, samples=[sample(spec(3, 4), spec(3, 4), 0.1)])
def threshold_backward_grad(g, out, gy, x, threshold):
    return kernels.threshold_backward(g, x, threshold), torch.zeros_like(g)


@rule(aten.hardtanh.default, samples=[*unary(complex=False), sample(_kink), sample(_kink, 0.0, 6.0)])
def hardtanh_grad(g, out, x, low=-1, high=1):
    return kernels.hardtanh_backward(g, x, low, high)


@rule(aten.hardtanh_backward.default, samples=[sample(spec(3, 4), spec(3, 4), -1.0, 1.0)])
def hardtanh_backward_grad(g, out, gy, x, low, high):
    return kernels.hardtanh_backward(g, x, low, high), torch.zeros_like(g)


@rule(aten.leaky_relu.default, samples=[*unary(complex=False), *unary(-2, 2, 0.3, complex=False)[:1], sample(_kink)])
def leaky_relu_grad(g, out, x, slope=0.01):
    return kernels.leaky_relu_backward(g, x, slope, False)


@rule(aten.leaky_relu_backward.default, samples=[sample(spec(3, 4), spec(3, 4), 0.1, False)])
def leaky_relu_backward_grad(g, out, gy, x, slope, is_result):
    return kernels.leaky_relu_backward(g, x, slope, is_result), torch.zeros_like(g)


@rule(aten._prelu_kernel.default, broadcasts=True, samples=[sample(spec(3, 4), spec(1, 4)), sample(_kink, spec(1))])
def prelu_grad(g, out, x, weight):
    positive = x > 0
    return torch.where(positive, g, g * weight), torch.where(positive, 0, g * x)


@rule(
    aten.rrelu_with_noise_functional.default,
    samples=[sample(spec(3, 4), spec(3, 4), 0.1, 0.3, training) for training in (True, False)],
)
def rrelu_with_noise_grad(g, out, x, noise, lower=0.125, upper=1 / 3, training=False, generator=None):
    if g[0] is None:
        return None, None
    if training:  # the noise that was drawn is each element's slope, 1 where it was positive
        return g[0] * out[1], None
    return kernels.leaky_relu_backward(g[0], x, (lower + upper) / 2, False), None


@rule(aten.gelu.default, formula="gelu(x)", samples=[*unary(complex=False), *unary(approximate="tanh", complex=False)])
def gelu_grad(g, out, x, *, approximate="none"):
    return kernels.gelu_backward(g, x, approximate=approximate)


@spends(aten.gelu.default)
def gelu_spent(needs, g, out, x, *, approximate="none"):
    return (kernels.gelu_backward(g, x, approximate=approximate, grad_input=g),)


@rule(aten.gelu_backward.default, samples=[*_pair, sample(spec(3, 4), spec(3, 4), approximate="tanh")])
def gelu_backward_grad(g, out, gy, x, *, approximate="none"):
    if approximate == "none":  # of x Φ(x): 2 φ(x) - x² φ(x)
        second = (2 - x * x) * (x * x * -0.5).exp() / math.sqrt(2 * math.pi)
    else:  # of x (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³)
        scale = math.sqrt(2 / math.pi)
        t = (scale * (x + 0.044715 * x * x * x)).tanh()
        bend = 1 - t * t
        du = scale * (1 + 3 * 0.044715 * x * x)
        second = bend * du + 0.5 * x * bend * (6 * 0.044715 * scale * x - 2 * t * du * du)
    return kernels.gelu_backward(g, x, approximate=approximate), g * gy * second


@rule(aten.silu.default, formula="x · σ(x)", samples=unary(complex=False))
def silu_grad(g, out, x):
    s = x.sigmoid()
    return g * s * (1 + x * (1 - s))


@rule(aten.mish.default, samples=unary(complex=False))
def mish_grad(g, out, x):
    t = torch.nn.functional.softplus(x).tanh()
    return g * (t + x * x.sigmoid() * (1 - t * t))


@rule(aten.elu.default, samples=[*unary(complex=False), sample(spec(3, 4), 1.5, 1.2, 0.7), sample(_kink)])
def elu_grad(g, out, x, alpha=1, scale=1, input_scale=1):
    return kernels.elu_backward(g, alpha, scale, input_scale, False, x)


@rule(aten.elu_backward.default, samples=[sample(spec(3, 4), 1.5, 1.2, 0.7, False, spec(3, 4))])
def elu_backward_grad(g, out, gy, alpha, scale, input_scale, is_result, x):
    if is_result:
        bend = torch.full_like(x, input_scale)
    else:
        bend = (x * input_scale).exp() * (input_scale * input_scale * alpha * scale)
    return (
        kernels.elu_backward(g, alpha, scale, input_scale, is_result, x),
        keep_where(x < 0, g * gy * bend),  # at the kink none, as torch's own
    )


@rule(aten.celu.default, samples=[*unary(complex=False), sample(spec(3, 4), 1.5), sample(_kink)])
def celu_grad(g, out, x, alpha=1.0):
    return kernels.elu_backward(g, alpha, 1, 1 / alpha, False, x)


@rule(
    aten.softplus.default,
    formula="softplus(x)",
    samples=[*unary(complex=False), sample(spec(3, 4, low=-8, high=8), 2.0, 5.0)],
)
def softplus_grad(g, out, x, beta=1, threshold=20):
    return kernels.softplus_backward(g, x, beta, threshold)


@rule(aten.softplus_backward.default, samples=[sample(spec(3, 4), spec(3, 4), 2.0, 5.0)])
def softplus_backward_grad(g, out, gy, x, beta, threshold):
    s = (x * beta).sigmoid()
    bend = torch.where(x * beta >= threshold, 0, g * gy * s * (1 - s) * beta)
    return kernels.softplus_backward(g, x, beta, threshold), bend


@rule(aten.log_sigmoid_forward.default, formula="log σ(x)", samples=unary(complex=False))
def log_sigmoid_grad(g, out, x):
    return None if g[0] is None else g[0] * (-x).sigmoid()


@rule(aten.hardsigmoid.default, samples=[*unary(complex=False), sample(spec(3, values=[-3.0, 0.0, 3.0]))])
def hardsigmoid_grad(g, out, x):
    return kernels.hardsigmoid_backward(g, x)


@rule(aten.hardsigmoid_backward.default, samples=[sample(spec(3, 4), spec(3, 4))])
def hardsigmoid_backward_grad(g, out, gy, x):
    return kernels.hardsigmoid_backward(g, x), torch.zeros_like(g)


@rule(aten.hardswish.default, samples=[*unary(complex=False), sample(spec(5, values=[-4.0, -3.0, 0.0, 3.0, 4.0]))])
def hardswish_grad(g, out, x):
    return kernels.hardswish_backward(g, x)


@rule(aten.hardswish_backward.default, samples=[sample(spec(3, 4), spec(3, 4))])
def hardswish_backward_grad(g, out, gy, x):
    return kernels.hardswish_backward(g, x), keep_where((x > -3) & (x < 3), g * gy / 3)


def shrink(target: Any) -> None:
    """Of ``hardshrink`` and ``softshrink``: nothing passes from within the threshold."""

    @rule(target, samples=[*unary(complex=False), sample(_kink)])
    def grad(g: Tensor, out: Tensor, x: Tensor, lambd: float = 0.5) -> Tensor:
        return torch.where((x >= -lambd) & (x <= lambd), 0, g)

    grad.__name__ = rule_name(target)


shrink(aten.hardshrink.default)
shrink(aten.softshrink.default)


@rule(aten.glu.default, samples=[sample(spec(3, 4)), sample(spec(4, 3), 0), sample(spec(0, 4))])
def glu_grad(g, out, x, dim=-1):
    a, b = x.chunk(2, dim)
    s = b.sigmoid()
    return torch.cat([g * s, g * a * s * (1 - s)], dim)


# -- softmax -----------------------------------------------------------------------------------------

_rows = [
    sample(spec(3, 4), -1, False),
    sample(spec(3, 4), 0, False),
    sample(spec(2, 3, 2), 1, False),
    sample(spec(), 0, False),
    sample(spec(0, 3), 1, False),
]


@rule(aten._softmax.default, formula="softmax(x)", samples=_rows)
def softmax_grad(g, out, x, dim, half_to_float):
    return kernels._softmax_backward_data(g, out, dim, x.dtype)


@rule(
    aten._safe_softmax.default,
    formula="softmax(x)",
    samples=[sample(spec(3, 4), -1), sample(spec(2, 2, values=[-math.inf, -math.inf, 0.0, 1.0]), -1)],
)
def safe_softmax_grad(g, out, x, dim, dtype=None):
    return kernels._softmax_backward_data(g, out, dim, out.dtype)


@rule(aten._softmax_backward_data.default, samples=[sample(spec(3, 4), spec(3, 4), 1, torch.float64)])
def softmax_backward_grad(g, out, gy, y, dim, dtype):
    inner = (g * y).sum(dim, keepdim=True)
    return y * (g - inner), g * (gy - (gy * y).sum(dim, keepdim=True)) - gy * inner


@rule(aten._log_softmax.default, formula="log softmax(x)", samples=_rows)
def log_softmax_grad(g, out, x, dim, half_to_float):
    return kernels._log_softmax_backward_data(g, out, dim, x.dtype)


@rule(aten._log_softmax_backward_data.default, samples=[sample(spec(3, 4), spec(3, 4), 1, torch.float64)])
def log_softmax_backward_grad(g, out, gy, y, dim, dtype):
    weighted = g * y.exp()
    return g - weighted.sum(dim, keepdim=True), -weighted * gy.sum(dim, keepdim=True)
