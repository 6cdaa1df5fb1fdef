# mypy: allow-untyped-defs
"""Random operations: what was drawn does not depend on what was there before.

Fresh numbers (``rand``, ``bernoulli_``, ``normal_``) depend on no value that they replace, and are
declared. Where a parameter of the distribution is a tensor, torch gives it a gradient of zeros.
"""

from __future__ import annotations

import torch

from ..registry import declare, rule, sample, spec
from .common import aten, kernels


@rule(
    aten.native_dropout.default,
    formula="dropout(x)",
    samples=[sample(spec(3, 4), 0.4, True), sample(spec(3, 4), 1.0, True), sample(spec(3), 0.4, False)],
)
def native_dropout_grad(g, out, x, p, train):
    if g[0] is None:
        return None
    scale = 1.0 if train is False else 0.0 if p == 1 else 1 / (1 - p)
    return kernels.native_dropout_backward(g[0], out[1], scale)


@rule(aten.native_dropout_backward.default, samples=[sample(spec(3, 4), spec(3, 4, dtype=torch.bool), 2.0)])
def native_dropout_backward_grad(g, out, gy, mask, scale):
    return kernels.native_dropout_backward(g, mask, scale), None


@rule(aten.bernoulli.default, samples=[sample(spec(3, values=[0.2, 0.5, 0.9]))])
@rule(aten.poisson.default, samples=[sample(spec(3, values=[0.0, 1.0, 4.0]))])
def bernoulli_grad(g, out, x, generator=None):
    return torch.zeros_like(g)


@rule(aten.normal.Tensor_float, samples=[sample(spec(3, values=[-1.0, 0.0, 2.0]), 0.5)])
def normal_mean_grad(g, out, mean, std=1.0, generator=None):
    return torch.zeros_like(g)


@rule(aten.normal.float_Tensor, samples=[sample(0.5, spec(3, values=[0.1, 1.0, 2.0]))])
def normal_std_grad(g, out, mean, std, generator=None):
    return torch.zeros_like(g)


@rule(
    aten.normal.Tensor_Tensor,
    broadcasts=True,
    samples=[sample(spec(3, values=[-1.0, 0.0, 2.0]), spec(3, values=[0.1, 1.0, 2.0]))],
)
def normal_grad(g, out, mean, std, generator=None):
    return torch.zeros_like(g), torch.zeros_like(g)


@rule(aten.bernoulli.Tensor, samples=[sample(spec(3), spec(3, values=[0.2, 0.5, 0.9]))])
def bernoulli_tensor_grad(g, out, x, p, generator=None):
    return None, torch.zeros_like(p)


declare(
    aten.bernoulli.p, aten.bernoulli_.float, aten.uniform.default, aten.uniform_.default,
    aten.normal_functional.default,
    aten.normal_.default, aten.exponential.default, aten.exponential_.default, aten.geometric.default,
    aten.geometric_.default, aten.log_normal.default, aten.log_normal_.default, aten.cauchy.default,
    aten.cauchy_.default, aten.random.default, aten.random_.default, getattr(aten.random, "from"),
    getattr(aten.random_, "from"), aten.random.to, aten.random_.to, aten.multinomial.default, aten.normal.float_float,
    aten.rand.default, aten.rand.generator, aten.rand_like.default, aten.randn.default, aten.randn.generator,
    aten.randn_like.default, aten.randint.default, aten.randint.generator, aten.randint.low,
    aten.randint.low_generator, aten.randint_like.default, aten.randint_like.low_dtype, aten.randperm.default,
    aten.randperm.generator,
)  # fmt: skip
