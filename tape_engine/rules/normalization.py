# mypy: allow-untyped-defs
"""Normalisation by layer, group and batch.

All of them compute ``x̂ = (x - mean) r`` with ``r = 1 / √(var + eps)`` over some dimensions, then ``x̂ w + b``.
With ``u = g w`` the gradient of x is ``J u = r (u - mean(u) - x̂ mean(u x̂))``, where J is symmetric: that
is what their backward kernels give. `_second` differentiates it once more.
"""

from __future__ import annotations

from typing import Any

import torch

from ..registry import Sample, rule, sample, spec
from .common import Tensor, aten, kernels


def _second(
    g: tuple[Any, ...],
    gy: Tensor,
    x: Tensor,
    mean: Tensor,
    r: Tensor,
    w: Any,
    dims: tuple[int, ...],
    fixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, by gy, x and the weight (not yet summed), of what the backward kernel computes.

    Of ``φ = <v, J(x) u> + <v_w, Σ gy x̂> + <v_b, Σ gy>`` for g = (v, v_w, v_b), all of x's number of
    dimensions. By x it goes through x̂ (whose own derivative is J) and through r (by x: -r² x̂ / n).
    With `fixed` statistics x̂ depends on x by r alone.
    """
    v, v_w, v_b = (0 if each is None else each for each in g)
    v = v + torch.zeros_like(x)
    normal = (x - mean) * r
    u = gy if w is None else gy * w

    def over(t: Tensor) -> Tensor:
        return t.mean(dims, keepdim=True)

    def through(t: Tensor) -> Tensor:
        return r * t if fixed else r * (t - over(t) - normal * over(t * normal))

    jv = through(v)
    by_gy = (jv if w is None else jv * w) + v_w * normal + v_b
    if fixed:
        by_x = r * (v_w * gy + torch.zeros_like(x))
    else:
        by_normal = v_w * gy - r * (v * over(u * normal) + u * over(v * normal))
        by_x = through(by_normal) - r * normal * over(v * through(u))
    return by_gy, by_x, gy * jv


def _wanted(weight: Any, bias: Any) -> list[bool]:
    """Which gradients to ask of a kernel: never that of a bias without a weight, see `_with_bias`."""
    return [True, weight is not None, weight is not None and bias is not None]


def _with_bias(gradients: tuple[Any, ...], g: Tensor, weight: Any, bias: Any, dims: list[int]) -> tuple[Any, ...]:
    """A kernel's gradients, with that of a bias that came without a weight."""
    if weight is not None or bias is None:
        return gradients
    return gradients[0], None, g.sum(dims).reshape(bias.shape) if dims else g


def _full(t: Any, shape: list[int]) -> Any:
    return None if t is None else t.reshape(shape)


# -- layers ------------------------------------------------------------------------------------------

_values = [-1.0, 1.0, -2.0, 2.0, -3.0, 3.0]  # rows of mean 0 and standard deviation 1, 2, 3


def _statistics(dims: int) -> list[Any]:
    shape = [3] + [1] * dims
    return [spec(*shape, values=[0.0] * 3), spec(*shape, values=[1.0, 0.5, 1 / 3])]


@rule(
    aten.native_layer_norm.default,
    formula="layer norm(x)",
    samples=[
        sample(spec(3, 4), [4], spec(4), spec(4), 1e-5),
        sample(spec(2, 3, 4), [3, 4], spec(3, 4), spec(3, 4), 1e-5),
        sample(spec(3, 4), [4], None, None, 1e-5),
        sample(spec(3, 4), [4], spec(4), None, 1e-5),
        sample(spec(3, 4), [4], None, spec(4), 1e-5),
        sample(spec(0, 4), [4], spec(4), spec(4), 1e-5),
    ],
)
def native_layer_norm_grad(g, out, x, shape, weight, bias, eps):
    if g[0] is None:
        return None, None, None
    wanted = _wanted(weight, bias)
    gradients = kernels.native_layer_norm_backward(g[0], x, shape, out[1], out[2], weight, bias, wanted)
    return _with_bias(gradients, g[0], weight, bias, list(range(g[0].ndim - len(shape))))


@rule(
    aten.native_layer_norm_backward.default,
    samples=[
        sample(spec(3, 2), spec(3, 2, values=_values), [2], *_statistics(1), spec(2), spec(2), [True] * 3),
        sample(spec(3, 2), spec(3, 2, values=_values), [2], *_statistics(1), None, None, [True, False, False]),
    ],
)
def native_layer_norm_backward_grad(g, out, gy, x, shape, mean, rstd, weight, bias, wanted):
    dims = tuple(range(x.ndim - len(shape), x.ndim))
    by_gy, by_x, by_weight = _second((*g, None, None)[:3], gy, x, mean, rstd, weight, dims)
    lead = list(range(x.ndim - len(shape)))
    summed = by_weight.sum(lead) if lead else by_weight
    return by_gy, by_x, None, None, None if weight is None else summed, None


# -- groups of channels ------------------------------------------------------------------------------


@rule(
    aten.native_group_norm.default,
    formula="group norm(x)",
    samples=[
        sample(spec(2, 4, 3), spec(4), spec(4), 2, 4, 3, 2, 1e-5),
        sample(spec(2, 4, 2, 2), None, None, 2, 4, 4, 2, 1e-5),
        sample(spec(0, 4, 2), spec(4), spec(4), 0, 4, 2, 2, 1e-5),
    ],
)
def native_group_norm_grad(g, out, x, weight, bias, n, channels, pixels, groups, eps):
    by_x = by_weight = by_bias = None
    if g[0] is not None:
        wanted = _wanted(weight, bias)
        gradients = kernels.native_group_norm_backward(
            g[0].contiguous(), x.contiguous(), out[1], out[2], weight, n, channels, pixels, groups, wanted
        )
        dims = [d for d in range(g[0].ndim) if d != 1]
        by_x, by_weight, by_bias = _with_bias(gradients, g[0], weight, bias, dims)
    if g[1] is not None or g[2] is not None:  # by the mean 1 / number, by r -r² x̂ / number
        rows = [n, groups, channels // groups * pixels]
        mean, r, by_mean, by_r = (None if t is None else t.reshape(n, groups, 1) for t in (*out[1:], *g[1:]))
        through_r = 0 if by_r is None else by_r * r * r * r * (x.reshape(rows) - mean)
        part = (0 if by_mean is None else by_mean) - through_r
        part = (part + x.new_zeros(n, groups, channels // groups * pixels)).reshape(x.shape) * (
            groups / channels / pixels
        )
        by_x = part if by_x is None else by_x + part
    return by_x, by_weight, by_bias


@rule(
    aten.native_group_norm_backward.default,
    samples=[
        sample(
            spec(1, 3, 2),
            spec(1, 3, 2, values=_values),
            spec(1, 3, values=[0.0] * 3),
            spec(1, 3, values=[1.0, 0.5, 1 / 3]),
            spec(3),
            1,
            3,
            2,
            3,
            [True] * 3,
        )
    ],
)
def native_group_norm_backward_grad(g, out, gy, x, mean, rstd, weight, n, channels, pixels, groups, wanted):
    shape, split = x.shape, [n, groups, channels // groups, pixels]
    by_channel = [1, groups, channels // groups, 1]
    v, v_weight, v_bias = (*g, None, None)[:3]
    parts = (_full(v, split), _full(v_weight, by_channel), _full(v_bias, by_channel))
    mean, rstd = mean.reshape(n, groups, 1, 1), rstd.reshape(n, groups, 1, 1)
    by_gy, by_x, by_weight = _second(
        parts, gy.reshape(split), x.reshape(split), mean, rstd, _full(weight, by_channel), (2, 3)
    )
    summed = by_weight.sum([0, 3]).reshape(channels)
    return by_gy.reshape(shape), by_x.reshape(shape), None, None, None if weight is None else summed


# -- batches -----------------------------------------------------------------------------------------


def _batches() -> list[Sample]:
    """Samples of batch normalisation: with and without weights, in training and not."""
    x, each = spec(4, 3, 2), spec(3)
    running = [spec(3, values=[0.1, -0.2, 0.3]), spec(3, values=[1.0, 2.0, 0.5])]
    return [
        sample(x, each, each, None, None, True, 0.1, 1e-5),
        sample(x, None, None, *running, True, 0.1, 1e-5),
        sample(spec(4, 3), each, each, *running, False, 0.1, 1e-5),
        sample(x, each, each, *running, False, 0.1, 1e-5),
        sample(x, each, None, None, None, True, 0.1, 1e-5),
        sample(x, None, each, None, None, True, 0.1, 1e-5),
    ]


def _updated() -> Sample:
    x, *rest = _batches()[3].args[:5]
    return sample(x, *rest, 0.1, 1e-5)


def _batch_norm(
    g: Tensor,
    mean: Tensor,
    r: Tensor,
    x: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    eps: float,
) -> tuple[Any, ...]:
    # Some of torch's kernels take it that these lie in one piece, and read beside them otherwise.
    each = [None if t is None else t.contiguous() for t in (weight, running_mean, running_var, mean, r)]
    gradients = kernels.native_batch_norm_backward(g, x, *each, training, eps, _wanted(weight, bias))
    return _with_bias(gradients, g, weight, bias, [d for d in range(x.ndim) if d != 1])


@rule(aten.native_batch_norm.default, formula="batch norm(x)", samples=_batches())
@rule(aten._native_batch_norm_legit_functional.default, formula="batch norm(x)", samples=_batches()[1:4])
def native_batch_norm_grad(g, out, x, weight, bias, running_mean, running_var, training, momentum, eps):
    if g[0] is None:
        return None, None, None, None, None
    # In training what the statistics were before has no part in it, and a recording does not keep it.
    mean, var = (None, None) if training else (running_mean, running_var)
    return *_batch_norm(g[0], out[1], out[2], x, weight, bias, mean, var, training, eps), None, None


@rule(aten._batch_norm_with_update_functional.default, formula="batch norm(x)", samples=[_updated()])
def batch_norm_with_update_grad(g, out, x, weight, bias, running_mean, running_var, momentum, eps):
    if g[0] is None:
        return None, None, None, None, None
    return *_batch_norm(g[0], out[1], out[2], x, weight, bias, running_mean, running_var, True, eps), None, None


@rule(
    aten._native_batch_norm_legit.no_stats,
    formula="batch norm(x)",
    samples=[sample(spec(4, 3, 2), spec(3), spec(3), True, 0.1, 1e-5)],
)
def batch_norm_no_stats_grad(g, out, x, weight, bias, training, momentum, eps):
    if g[0] is None:
        return None, None, None
    return _batch_norm(g[0], out[1], out[2], x, weight, bias, None, None, training, eps)


@rule(
    aten.native_batch_norm_backward.default,
    samples=[
        sample(
            spec(2, 3),
            spec(2, 3, values=[-1.0, -2.0, -3.0, 1.0, 2.0, 3.0]),
            spec(3),
            None,
            None,
            spec(3, values=[0.0] * 3),
            spec(3, values=[1.0, 0.5, 1 / 3]),
            True,
            0.0,
            [True] * 3,
        ),
        sample(
            spec(2, 3),
            spec(2, 3),
            spec(3),
            spec(3, values=[0.1, -0.2, 0.3]),
            spec(3, values=[1.0, 2.0, 0.5]),
            None,
            None,
            False,
            1e-5,
            [True] * 3,
        ),
    ],
)
def native_batch_norm_backward_grad(
    g, out, gy, x, weight, running_mean, running_var, save_mean, save_invstd, train, eps, wanted
):
    channels = [1, -1] + [1] * (x.ndim - 2)
    dims = tuple(d for d in range(x.ndim) if d != 1)
    mean, r = (save_mean, save_invstd) if train else (running_mean, (running_var + eps).rsqrt())
    v, v_weight, v_bias = (*g, None, None)[:3]
    parts = (v, _full(v_weight, channels), _full(v_bias, channels))
    by_gy, by_x, by_weight = _second(
        parts, gy, x, mean.reshape(channels), r.reshape(channels), _full(weight, channels), dims, not train
    )
    return by_gy, by_x, None if weight is None else by_weight.sum(dims), None, None, None, None


@rule(
    aten._weight_norm_interface.default,
    formula="v s / |v|",
    samples=[
        sample(spec(3, 4), spec(3, 1)),
        sample(spec(3, 2, 2), spec(3, 1, 1), 0),
        sample(spec(3, 4), spec(1, 4), 1),
    ],
)
def _weight_norm_interface_grad(g, out, v, s, dim=0):
    """Of ``w = v s / |v|`` and of ``|v|``, the norm over all dimensions but one."""
    g_w, g_norm = (0 if each is None else each for each in g)
    others = tuple(d for d in range(v.ndim) if d != dim)
    unit = v / out[1]
    by_s = (g_w * unit).sum(others, keepdim=True)
    return s / out[1] * (g_w - unit * by_s) + g_norm * unit, by_s
