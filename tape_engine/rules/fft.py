# mypy: allow-untyped-defs
"""Fourier transforms. They are linear, so each rule is the transform's conjugate transpose.

``normalization`` is 0 for none, 1 for one over the root of the number of elements, 2 for one over that
number; both are the same for a transform and its conjugate transpose.
"""

from __future__ import annotations

import torch

from ..registry import rule, sample, spec
from .common import C128, aten, kernels


@rule(
    aten._fft_c2c.default,
    formula="fft(x)",
    samples=[
        sample(spec(3, 4, dtype=C128), [1], 0, True),
        sample(spec(3, 4, dtype=C128), [0, 1], 1, False),
        sample(spec(3, 4, dtype=C128), [0], 2, False),
    ],
)
def fft_c2c_grad(g, out, x, dim, normalization, forward):
    return kernels._fft_c2c(g, dim, normalization, not forward)


@rule(
    aten._fft_r2c.default,
    formula="fft(x)",
    samples=[
        sample(spec(3, 4), [1], 0, True),
        sample(spec(3, 5), [0, 1], 1, True),
        sample(spec(4, 3), [1, 0], 0, True),
        sample(spec(3, 4), [1], 0, False),
    ],
)
def fft_r2c_grad(g, out, x, dim, normalization, onesided):
    if onesided:  # of the half that was left out nothing comes
        missing = list(g.shape)
        missing[dim[-1]] = x.shape[dim[-1]] - g.shape[dim[-1]]
        g = torch.cat([g, g.new_zeros(missing)], dim[-1])
    return kernels._fft_c2c(g, dim, normalization, False).real


@rule(
    aten._fft_c2r.default,
    formula="fft(x)",
    samples=[
        sample(spec(3, 3, dtype=C128), [1], 0, 4),
        sample(spec(3, 3, dtype=C128), [0, 1], 2, 5),
        sample(spec(3, 1, dtype=C128), [1], 0, 1),
    ],
)
def fft_c2r_grad(g, out, x, dim, normalization, last_dim_size):
    last = dim[-1]
    half = kernels._fft_r2c(g, dim, normalization, True)
    # what stands for its mirror image too counts twice
    mirrored = last_dim_size - half.shape[last]
    first, middle, rest = half.split([1, mirrored, half.shape[last] - mirrored - 1], last)
    return torch.cat([first, 2 * middle, rest], last)
