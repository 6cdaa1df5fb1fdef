# mypy: allow-untyped-defs
"""Convolution and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..registry import Sample, rule, sample, spec
from .common import Tensor, aten, kernels, rule_name, stand_in

# -- convolution -------------------------------------------------------------------------------------


def convolved(
    x: Any, w: Any, b: Any, stride: int, padding: int, dilation: int, groups: int, transposed: bool = False
) -> Sample:
    """A call of ``convolution``."""
    n = len(x.shape) - 2
    return sample(x, w, b, [stride] * n, [padding] * n, [dilation] * n, transposed, [0] * n, groups)


@rule(
    aten.convolution.default,
    formula="conv(x, w) + b",
    samples=[
        convolved(spec(2, 2, 4, 5), spec(3, 2, 3, 2), spec(3), 1, 0, 1, 1),
        convolved(spec(1, 4, 5, 5), spec(2, 2, 2, 2), None, 2, 1, 2, 2),
        convolved(spec(2, 3, 3, 2), spec(3, 2, 2, 2), spec(2), 2, 0, 1, 1, True),
        convolved(spec(2, 2, 6), spec(3, 2, 3), spec(3), 1, 1, 1, 1),
        convolved(spec(1, 1, 3, 3, 3), spec(2, 1, 2, 2, 2), spec(2), 1, 0, 1, 1),
    ],
)
def convolution_grad(g, out, x, w, b, stride, padding, dilation, transposed, output_padding, groups):
    wanted = [True, True, b is not None]
    return kernels.convolution_backward(
        g, x, w, [g.shape[1]], stride, padding, dilation, transposed, output_padding, groups, wanted
    )


@rule(
    aten.convolution_backward.default,
    samples=[
        sample(
            spec(2, 3, 2, 4),
            spec(2, 2, 4, 5),
            spec(3, 2, 3, 2),
            [3],
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [True] * 3,
        )
    ],
)
def convolution_backward_grad(
    g, out, gy, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted
):
    by_x, by_w, by_b = (*g, None)[:3]  # without a bias there are two
    return kernels._convolution_double_backward(
        by_x, by_w, by_b, gy, w, x, stride, padding, dilation, transposed, output_padding, groups, [True, True, True]
    )


# -- pooling -----------------------------------------------------------------------------------------


def _at(v: Tensor, index: Tensor, n: int) -> Tensor:
    """The elements of `v` at places counted over its last `n` dimensions."""
    return v.flatten(-n).gather(-1, index.flatten(-n)).reshape(index.shape)


_corners = spec(1, 2, 2, 2, dtype=torch.int64, values=[0, 2, 9, 15, 5, 3, 12, 10])


@rule(
    aten.max_pool2d_with_indices.default,
    formula="maxpool(x)",
    samples=[sample(spec(1, 2, 5, 4), [2, 2]), sample(spec(2, 5, 5), [3, 3], [2, 2], [1, 1], [1, 1], True)],
)
def max_pool2d_grad(g, out, x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    if g[0] is None:
        return None
    whole = stand_in(g[0], x.shape)
    return kernels.max_pool2d_with_indices_backward(
        g[0], whole, kernel_size, stride, padding, dilation, ceil_mode, out[1]
    )


@rule(
    aten.max_pool2d_with_indices_backward.default,
    samples=[sample(spec(1, 2, 2, 2), spec(1, 2, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False, _corners)],
)
def max_pool2d_backward_grad(g, out, gy, x, kernel_size, stride, padding, dilation, ceil_mode, index):
    return _at(g, index, 2), None, None


@rule(aten.max_pool3d_with_indices.default, samples=[sample(spec(1, 1, 4, 4, 4), [2, 2, 2])])
def max_pool3d_grad(g, out, x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    if g[0] is None:
        return None
    whole = stand_in(g[0], x.shape)
    return kernels.max_pool3d_with_indices_backward(
        g[0], whole, kernel_size, stride, padding, dilation, ceil_mode, out[1]
    )


@rule(
    aten.max_pool3d_with_indices_backward.default,
    samples=[
        sample(
            spec(1, 2, 1, 2, 2),
            spec(1, 2, 1, 4, 4),
            [1, 2, 2],
            [1, 2, 2],
            [0, 0, 0],
            [1, 1, 1],
            False,
            spec(1, 2, 1, 2, 2, dtype=torch.int64, values=_corners.values),
        )
    ],
)
def max_pool3d_backward_grad(g, out, gy, x, kernel_size, stride, padding, dilation, ceil_mode, index):
    return _at(g, index, 3), None, None


def averaging(forward: Any, backward: Any, samples: Sequence[Sample]) -> None:
    """Of average pooling with a window; it is linear, so the rule of its backward is itself."""

    @rule(forward, samples=samples, formula="avgpool(x)")
    def grad(
        g: Tensor, out: Tensor, x: Tensor, size: Any, stride: Any = (), padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Any:  # fmt: skip
        whole = stand_in(g, x.shape)
        return backward(g, whole, size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    @rule(backward, samples=[_backward_sample(each) for each in samples])
    def again(
        g: Tensor, out: Tensor, gy: Tensor, x: Tensor, size: Any, stride: Any, padding: Any,
        ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
    ) -> Any:  # fmt: skip
        return forward(g, size, stride, padding, ceil_mode, count_include_pad, divisor_override), None

    grad.__name__, again.__name__ = rule_name(forward), rule_name(backward)


def _backward_sample(each: Sample) -> Sample:
    """The call of a pooling's backward that belongs to a call of its forward."""
    defaults: tuple[Any, ...] = ([], 0, False, True)
    size, stride, padding, ceil_mode, with_pad = (*each.args[1:], *defaults[len(each.args) - 2 :])
    x = each.args[0]
    steps, pads = stride or size, [padding] * len(size) if isinstance(padding, int) else padding
    n = len(size)
    room = [s + 2 * p - k for s, p, k in zip(x.shape[-n:], pads, size, strict=True)]
    out = [(-(-r // t) if ceil_mode else r // t) + 1 for r, t in zip(room, steps, strict=True)]
    return sample(spec(*x.shape[:-n], *out), x, size, stride, padding, ceil_mode, with_pad, None)


averaging(
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
    [sample(spec(1, 2, 5, 4), [2, 2]), sample(spec(2, 5, 5), [3, 3], [2, 2], [1, 1], True, False)],
)
averaging(aten.avg_pool3d.default, aten.avg_pool3d_backward.default, [sample(spec(1, 1, 4, 4, 3), [2, 2, 2])])


def adaptive(forward: Any, backward: Any, *samples: Sample) -> None:
    """Of average pooling to a given size."""
    n = len(samples[0].args[1])

    @rule(forward, samples=samples, formula="avgpool(x)")
    def grad(g: Tensor, out: Tensor, x: Tensor, size: Any) -> Any:
        return backward(g, stand_in(g, x.shape))

    @rule(backward, samples=[sample(spec(*s.args[0].shape[:-n], *s.args[1]), s.args[0]) for s in samples])
    def again(g: Tensor, out: Tensor, gy: Tensor, x: Tensor) -> Any:
        return forward(g, gy.shape[-n:]), None

    grad.__name__, again.__name__ = rule_name(forward), rule_name(backward)


adaptive(
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d_backward.default,
    sample(spec(1, 2, 5, 4), [2, 3]),
    sample(spec(2, 4, 4), [2, 2]),
)
adaptive(
    aten._adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool3d_backward.default,
    sample(spec(1, 1, 4, 3, 3), [2, 2, 1]),
)


def adaptive_max(forward: Any, backward: Any, given: Sample) -> None:
    """Of the maxima of a given number of windows; their places are counted over the last dimensions."""
    n = len(given.args[1])

    @rule(forward, samples=[given], formula="maxpool(x)")
    def grad(g: Any, out: Any, x: Tensor, size: Any) -> Any:
        return None if g[0] is None else backward(g[0], stand_in(g[0], x.shape), out[1])

    picked = spec(1, *[2] * n, dtype=torch.int64, values=range(0, 3 * 2**n, 3))

    @rule(backward, samples=[sample(spec(1, *[2] * n), spec(1, *[4] * n), picked)])
    def again(g: Tensor, out: Tensor, gy: Tensor, x: Tensor, index: Tensor) -> Any:
        return _at(g, index, n), None, None

    grad.__name__, again.__name__ = rule_name(forward), rule_name(backward)


adaptive_max(
    aten.adaptive_max_pool2d.default, aten.adaptive_max_pool2d_backward.default, sample(spec(1, 2, 5, 4), [2, 3])
)
adaptive_max(
    aten.adaptive_max_pool3d.default, aten.adaptive_max_pool3d_backward.default, sample(spec(1, 1, 4, 3, 3), [2, 2, 1])
)


@rule(
    aten.max_unpool2d.default,
    samples=[sample(spec(1, 1, 2, 2), spec(1, 1, 2, 2, dtype=torch.int64, values=[0, 3, 9, 14]), [4, 4])],
)
@rule(
    aten.max_unpool3d.default,
    samples=[
        sample(
            spec(1, 1, 1, 2, 2),
            spec(1, 1, 1, 2, 2, dtype=torch.int64, values=[0, 3, 9, 14]),
            [2, 4, 4],
            [2, 2, 2],
            [0, 0, 0],
        )
    ],
)
def max_unpool_grad(g, out, x, index, size, stride=None, padding=None):
    return _at(g, index, len(size)), None


def fractional(forward: Any, backward: Any, given: Sample) -> None:
    """Of the maxima of windows placed at random."""
    n = len(given.args[1])

    @rule(forward, samples=[given])
    def grad(g: Any, out: Any, x: Tensor, kernel: Any, size: Any, points: Tensor) -> Any:
        return None if g[0] is None else backward(g[0], x, kernel, size, out[1]), None

    picked = spec(1, 1, *[2] * n, dtype=torch.int64, values=range(0, 3 * 2**n, 3))

    @rule(backward, samples=[sample(spec(1, 1, *[2] * n), spec(1, 1, *[4] * n), [2] * n, [2] * n, picked)])
    def again(g: Tensor, out: Tensor, gy: Tensor, x: Tensor, kernel: Any, size: Any, index: Tensor) -> Any:
        return _at(g, index, n), None, None

    grad.__name__, again.__name__ = rule_name(forward), rule_name(backward)


_points = spec(1, 2, 2, low=0.1, high=0.9)
fractional(
    aten.fractional_max_pool2d.default,
    aten.fractional_max_pool2d_backward.default,
    sample(spec(1, 2, 4, 5), [2, 2], [2, 3], _points),
)
fractional(
    aten.fractional_max_pool3d.default,
    aten.fractional_max_pool3d_backward.default,
    sample(spec(1, 1, 4, 4, 4), [2, 2, 2], [2, 2, 2], spec(1, 1, 3, low=0.1, high=0.9)),
)
