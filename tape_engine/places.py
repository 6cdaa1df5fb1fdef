"""Where a view lies in its base, and the two operations that read and write there.

An in-place write through a view is recorded as what it makes of the base (`aliases`): a copy of that with the part
written (`write_view`). A view that is read again after a write is read off the new base (`read_view`).
"""

from __future__ import annotations

import torch

from .registry import op, sample, spec

__all__ = [
    "Place",
    "extent",
    "offset_of",
    "overlapping",
    "positions",
    "read_view",
    "stride_of",
    "within",
    "write_view",
]

#: Size, stride and offset of a view, counted from the first element of its base.
Place = tuple[tuple[int, ...], tuple[int, ...], int]

stride_of = torch._C.TensorBase.stride  # torch's own: the methods on Tensor may be wrapped while a block is open
offset_of = torch._C.TensorBase.storage_offset


def positions(size: tuple[int, ...], stride: tuple[int, ...], offset: int, device: torch.device) -> torch.Tensor:
    """The positions in storage of a view's elements, in the order of its elements: int64 ``(numel,)``."""
    found = torch.full((), offset, dtype=torch.int64, device=device)
    for length, step in zip(size, stride, strict=True):
        found = found.unsqueeze(-1) + torch.arange(length, device=device) * step
    return found.reshape(-1)


def extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many positions of storage a view spans."""
    return 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))


def overlapping(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides may put two elements in one place (as those of an expanded tensor do)."""
    span = 1
    for step, length in sorted(zip(strides, shape, strict=True)):
        if length > 1:
            if step < span:
                return True
            span += step * (length - 1)  # from the first of those so far to behind the last
    return False


def within(place: Place, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a base of this shape, no two elements of which lie in one place, has all elements of a view of it.

    Each step of the view is told as steps along the dimensions of the base, the longest first; whether it can be told
    so is known for views that were made by slices and the like.
    """
    size, stride, offset = place
    longest: list[tuple[int, int]] = []
    for step, length in sorted(((s, n) for s, n in zip(strides, shape, strict=True) if n > 1), reverse=True):
        if longest and longest[-1][0] == step * length:  # rows without a gap between them are one long row
            length *= longest.pop()[1]
        longest.append((step, length))

    def steps(distance: int) -> list[int] | None:
        found = []
        for step, _ in longest:
            found.append(distance // step)
            distance %= step
        return None if distance else found

    last = steps(offset)
    for length, step in zip(size, stride, strict=True):
        along = steps(step) if length > 1 else [0] * len(longest)  # of one element the step is never taken
        if last is None or along is None:
            return False
        last = [at + (length - 1) * each for at, each in zip(last, along, strict=True)]
    return last is not None and all(at < length for at, (_, length) in zip(last, longest, strict=True))


@op(
    formula="view of base",
    samples=[
        sample(spec(4, 3), (2, 3), (3, 1), 3),
        sample(spec(4, 3), (3,), (4,), 0),
        sample(spec(5), (3, 2), (1, 1), 1),  # overlapping
        sample(spec(4), (), (), 2),
        sample(spec(3), (0,), (1,), 0),
    ],
)
def read_view(base: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> torch.Tensor:
    """The elements of `base` at a place of its storage, as a view."""
    return base.as_strided(size, stride, offset_of(base) + offset)


@read_view.rule
def read_view_grad(g, out, base, size, stride, offset):  # type: ignore[no-untyped-def]
    spread = g.new_zeros(max(extent(base.shape, base.stride()), extent(size, stride) + offset))
    spread = spread.index_add(0, positions(size, stride, offset, g.device), g.reshape(-1))
    return spread.index_select(0, positions(base.shape, base.stride(), 0, g.device)).reshape(base.shape)


@op(
    formula="base with part written",
    samples=[
        sample(spec(4, 3), spec(2, 3), (2, 3), (3, 1), 3),
        sample(spec(4, 3), spec(3), (3,), (4,), 0),
        sample(spec(4), spec(), (), (), 2),
        sample(spec(3), spec(0), (0,), (1,), 0),
    ],
)
def write_view(
    base: torch.Tensor, part: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> torch.Tensor:
    """A copy of `base`, of its strides, with `part` written at a place of its storage."""
    out = torch.empty_strided(base.shape, base.stride(), dtype=base.dtype, device=base.device)
    out.copy_(base).as_strided(size, stride, offset).copy_(part)
    return out


@write_view.rule
def write_view_grad(g, out, base, part, size, stride, offset):  # type: ignore[no-untyped-def]
    if g.stride() == base.stride() and not (overlapping(base.shape, base.stride()) or overlapping(size, stride)):
        g_part = read_view(g, size, stride, offset).clone()  # before the place in `g` is written, in its own memory
        return write_view(g, g.new_zeros(size), size, stride, offset), g_part
    of_base = positions(base.shape, base.stride(), 0, g.device)
    of_part = positions(size, stride, offset, g.device)
    spread = g.new_zeros(extent(base.shape, base.stride())).index_copy(0, of_base, g.reshape(-1))
    g_part = spread.index_select(0, of_part)
    if overlapping(size, stride):  # of the elements that lie in one place the last is what was left there
        order = torch.arange(of_part.numel(), device=g.device)
        last = torch.full_like(spread, -1, dtype=torch.int64).scatter_reduce(0, of_part, order, "amax")
        g_part = g_part * (last.index_select(0, of_part) == order)
    g_part = g_part.reshape(size)
    return spread.index_fill(0, of_part, 0).index_select(0, of_base).reshape(base.shape), g_part
