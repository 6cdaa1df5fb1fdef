# mypy: allow-untyped-defs
"""Views whose strides are given outright, and so may overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..registry import rule, sample, spec
from .common import Tensor, aten


def _places(shape: Sequence[int], stride: Sequence[int], device: torch.device) -> Tensor:
    """For each element the place in storage that it lies at, counted from the first's."""
    places = torch.zeros(tuple(shape), dtype=torch.int64, device=device)
    for dim, (size, step) in enumerate(zip(shape, stride, strict=True)):
        along = torch.arange(size, device=device) * step
        places = places + along.reshape([-1] + [1] * (len(shape) - dim - 1))
    return places.reshape(-1)


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many places of storage such a tensor spans."""
    return 0 if math.prod(shape) == 0 else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


@rule(
    aten.as_strided.default,
    samples=[
        sample(spec(3, 4), [2, 2], [4, 1]),
        sample(spec(3, 4), [2, 3], [1, 2], 1),
        sample(spec(6), [4, 3], [1, 1]),
        sample(spec(6), [3, 2], [0, 1], 2),
        sample(spec(2, 3), [], [], 4),
        sample(spec(2, 3), [0, 2], [2, 1]),
    ],
)
@rule(aten.as_strided_copy.default, samples=[sample(spec(6), [4, 3], [1, 1])])
def as_strided_grad(g, out, x, size, stride, storage_offset=None):
    """Sums `g` into the places of storage it came from, then reads `x`'s elements back from theirs.

    Elements of `x` that share a place share its gradient evenly.
    """
    shape, steps, start = x.shape, x.stride(), x.storage_offset()
    shift = 0 if storage_offset is None else storage_offset - start
    low = min(shift, 0)
    span = max(_extent(shape, steps) - low, _extent(size, stride) + shift - low, 1)
    from_x, from_out = _places(shape, steps, g.device) - low, _places(size, stride, g.device) + (shift - low)
    storage = g.new_zeros(span).index_add(0, from_out, g.reshape(-1))
    holders = torch.zeros(span, device=g.device).index_add(0, from_x, torch.ones(from_x.shape, device=g.device))
    return (storage.index_select(0, from_x) / holders.index_select(0, from_x)).reshape(shape)


@rule(
    aten.as_strided_scatter.default,
    samples=[sample(spec(3, 4), spec(2, 2), [2, 2], [4, 1], 1), sample(spec(6), spec(3), [3], [2])],
)
def as_strided_scatter_grad(g, out, x, src, size, stride, storage_offset=None):
    shape, steps, start = x.shape, x.stride(), x.storage_offset()
    offset = start if storage_offset is None else storage_offset
    places, written = _places(shape, steps, g.device) + start, _places(size, stride, g.device) + offset
    # which element of `x` lies at each place; those between its elements lead to one element too many
    element = torch.full(
        (max(_extent(shape, steps) + start, _extent(size, stride) + offset, 1),), shape.numel(), device=g.device
    )
    element = element.scatter(0, places, torch.arange(shape.numel(), device=g.device)).index_select(0, written)
    flat = torch.cat([g.reshape(-1), g.new_zeros(1)])
    kept = flat.index_fill(0, element, 0).narrow(0, 0, shape.numel())
    return kept.reshape(shape), flat.index_select(0, element).reshape(src.shape)
