# mypy: allow-untyped-defs
"""Views, copies and joins: what only moves elements about."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..registry import declare, rule, sample, spec
from .common import C128, Tensor, aten, kernels

_x = spec(2, 3, 4)

# -- the same elements in another shape --------------------------------------------------------------


@rule(
    aten.view.default,
    samples=[sample(_x, [6, 4]), sample(spec(6), [2, -1]), sample(spec(), [1, 1]), sample(spec(0, 3), [3, 0])],
)
@rule(aten._unsafe_view.default, samples=[sample(_x, [6, 4]), sample(spec(0, 3), [3, 0])])
@rule(aten._reshape_alias.default, samples=[sample(_x, [6, 4], [4, 1])])
@rule(aten.view_copy.default, samples=[sample(_x, [6, 4])])
def view_grad(g, out, x, size, stride=None):
    return g.reshape(x.shape)


@rule(aten.unsqueeze.default, samples=[sample(_x, 1), sample(_x, -1), sample(spec(), 0), sample(spec(0, 3), 0)])
@rule(aten.unsqueeze_copy.default, samples=[sample(_x, 1)])
def unsqueeze_grad(g, out, x, dim):
    return g.squeeze(dim)


_thin = spec(1, 3, 1)


@rule(aten.squeeze.default, samples=[sample(_thin), sample(spec(2, 3)), sample(spec()), sample(spec(0, 1))])
@rule(aten.squeeze_copy.default, samples=[sample(_thin)])
def squeeze_grad(g, out, x):
    return g.reshape(x.shape)


@rule(aten.squeeze.dim, samples=[sample(_thin, 0), sample(_thin, -1), sample(_thin, 1), sample(spec(), 0)])
@rule(aten.squeeze_copy.dim, samples=[sample(_thin, 0)])
@rule(aten.squeeze.dims, samples=[sample(_thin, [0, -1]), sample(_thin, [1]), sample(spec(0, 1), [1])])
@rule(aten.squeeze_copy.dims, samples=[sample(_thin, [0, 2])])
def squeeze_dim_grad(g, out, x, dim):
    return g.reshape(x.shape)


@rule(aten.t.default, formula="xᵀ", samples=[sample(spec(2, 3)), sample(spec(3)), sample(spec()), sample(spec(0, 3))])
@rule(aten.t_copy.default, samples=[sample(spec(2, 3))])
def t_grad(g, out, x):
    return g.t()


@rule(aten.transpose.int, formula="xᵀ", samples=[sample(_x, 0, 2), sample(_x, -1, -2), sample(spec(), 0, -1)])
@rule(aten.transpose_copy.int, samples=[sample(_x, 0, 2)])
def transpose_grad(g, out, x, dim0, dim1):
    return g.transpose(dim0, dim1)


@rule(aten.permute.default, samples=[sample(_x, [2, 0, 1]), sample(_x, [0, -1, 1]), sample(spec(), [])])
@rule(aten.permute_copy.default, samples=[sample(_x, [2, 0, 1])])
def permute_grad(g, out, x, dims):
    back = [0] * len(dims)
    for place, dim in enumerate(dims):
        back[dim % len(dims)] = place
    return g.permute(back)


# -- copies ------------------------------------------------------------------------------------------


@rule(aten.clone.default, samples=[sample(_x), sample(spec()), sample(spec(0, 3)), sample(spec(2, dtype=C128))])
@rule(aten.alias.default, samples=[sample(_x)])
@rule(aten.alias_copy.default, samples=[sample(_x)])
@rule(aten.lift.default, samples=[sample(_x)])
def clone_grad(g, out, x, *, memory_format=None):
    return g


@rule(
    aten._to_copy.default,
    samples=[
        sample(spec(2, 3, dtype=torch.float32), dtype=torch.float64),
        sample(spec(2, 3), dtype=C128),
        sample(spec(2, 3, dtype=C128), dtype=torch.complex64),
        sample(_x, memory_format=torch.contiguous_format),
    ],
)
def to_copy_grad(
    g, out, x, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None
):
    return g.to(x.device)  # the dtype is the sweep's to cast


@rule(
    aten.copy.default,
    broadcasts=True,
    samples=[sample(_x, _x), sample(_x, spec(4)), sample(_x, spec(dtype=torch.float32))],
)
def copy_grad(g, out, x, src, non_blocking=False):
    return None, g.to(src.device)  # of what was overwritten nothing is left


@rule(aten.fill.Tensor, samples=[sample(_x, spec()), sample(spec(), spec()), sample(spec(0, 3), spec())])
def fill_grad(g, out, x, value):
    return None, g.sum()


# -- repeated elements -------------------------------------------------------------------------------


@rule(
    aten.expand.default,
    broadcasts=True,
    samples=[sample(spec(3, 1), [2, 3, 4]), sample(spec(), [2, 2]), sample(spec(3, 1), [-1, 0])],
)
@rule(aten.expand_copy.default, broadcasts=True, samples=[sample(spec(3, 1), [2, 3, 4])])
def expand_grad(g, out, x, size, *, implicit=False):
    return g


@rule(
    aten.repeat.default,
    samples=[
        sample(spec(2, 3), [2, 1]),
        sample(spec(2, 3), [2, 2, 3]),
        sample(spec(), [3]),
        sample(spec(2), [0]),
        sample(spec(), []),
    ],
)
def repeat_grad(g, out, x, repeats):
    shape = x.shape
    sizes = [1] * (len(repeats) - len(shape)) + list(shape)
    split = [n for pair in zip(repeats, sizes, strict=True) for n in pair]  # each dimension as copies of itself
    copies = list(range(0, len(split), 2))
    return (g.reshape(split).sum(copies) if copies else g).reshape(shape)


@rule(aten.flip.default, samples=[sample(_x, [0, -1]), sample(_x, []), sample(spec(0, 2), [1])])
def flip_grad(g, out, x, dims):
    return g.flip(dims)


@rule(aten.roll.default, samples=[sample(_x, [1, -2], [0, 2]), sample(_x, [3]), sample(spec(0, 2), [1], [1])])
def roll_grad(g, out, x, shifts, dims=()):
    return g.roll([-s for s in ([shifts] if isinstance(shifts, int) else shifts)], dims)


@rule(aten.rot90.default, samples=[sample(_x), sample(_x, 3, [1, 2])])
def rot90_grad(g, out, x, k=1, dims=(0, 1)):
    return g.rot90(-k, dims)


@rule(aten.unfold.default, samples=[sample(spec(2, 7), 1, 3, 2), sample(spec(5), -1, 3, 1), sample(spec(), 0, 1, 1)])
@rule(aten.unfold_copy.default, samples=[sample(spec(2, 7), 1, 3, 2)])
def unfold_grad(g, out, x, dim, size, step):
    return kernels.unfold_backward(g, x.shape, dim, size, step)


@rule(aten.unfold_backward.default, samples=[sample(spec(2, 3, 3), [2, 7], 1, 3, 2)])
def unfold_backward_grad(g, out, gy, sizes, dim, size, step):
    return g.unfold(dim, size, step)


# -- a part of the elements, and its putting back ----------------------------------------------------


@rule(aten.select.int, samples=[sample(_x, 1, 0), sample(_x, -1, -2), sample(spec(2, 0), 0, 1)])
@rule(aten.select_copy.int, samples=[sample(_x, 1, 0)])
def select_grad(g, out, x, dim, index):
    return kernels.select_backward(g, x.shape, dim, index)


@rule(aten.select_backward.default, samples=[sample(spec(2, 4), [2, 3, 4], 1, 0)])
def select_backward_grad(g, out, gy, sizes, dim, index):
    return g.select(dim, index)


@rule(aten.select_scatter.default, samples=[sample(_x, spec(2, 4), 1, 2), sample(_x, spec(2, 3), -1, -1)])
def select_scatter_grad(g, out, x, src, dim, index):
    part = g.select(dim, index)
    return g.select_scatter(torch.zeros_like(part), dim, index), part


_slices = [(0, 0, 1), (1, 1, 3), (2, 0, 4, 2), (-1, -3, -1), (1, 2, 2), (1,), (2, None, 9223372036854775807, 3)]


@rule(aten.slice.Tensor, samples=[sample(_x), *[sample(_x, *each) for each in _slices], sample(spec(0, 3), 1, 1)])
@rule(aten.slice_copy.Tensor, samples=[sample(_x, 1, 1, 3)])
def slice_grad(g, out, x, dim=0, start=None, end=None, step=1):
    start, end, _ = slice(start, end).indices(x.shape[dim])
    return kernels.slice_backward(g, x.shape, dim, start, end, step)


@rule(aten.slice_backward.default, samples=[sample(spec(2, 2, 4), [2, 3, 4], 1, 1, 3, 1)])
def slice_backward_grad(g, out, gy, sizes, dim, start, end, step):
    return kernels.slice(g, dim, start, end, step)


@rule(
    aten.slice_scatter.default,
    samples=[sample(_x, spec(2, 2, 4), 1, 1, 3), sample(_x, spec(2, 3, 2), 2, None, None, 2)],
)
def slice_scatter_grad(g, out, x, src, dim=0, start=None, end=None, step=1):
    part = kernels.slice(g, dim, start, end, step)
    return kernels.slice_scatter(g, torch.zeros_like(part), dim, start, end, step), part


@rule(aten.narrow_copy.default, samples=[sample(_x, 1, 1, 2), sample(_x, -1, -3, 2)])
def narrow_copy_grad(g, out, x, dim, start, length):
    start = start % x.shape[dim] if start < 0 else start
    return kernels.slice_backward(g, x.shape, dim, start, start + length, 1)


@rule(
    aten.diagonal.default,
    samples=[sample(spec(3, 4)), sample(_x, 1, -1, 0), sample(spec(3, 4), -1), sample(spec(3, 4), 9)],
)
@rule(aten.diagonal_copy.default, samples=[sample(_x, 1, -1, 0)])
def diagonal_grad(g, out, x, offset=0, dim1=0, dim2=1):
    return kernels.diagonal_backward(g, x.shape, offset, dim1, dim2)


@rule(aten.diagonal_backward.default, samples=[sample(spec(3), [3, 4], 0, 0, 1)])
def diagonal_backward_grad(g, out, gy, sizes, offset, dim1, dim2):
    return g.diagonal(offset, dim1, dim2)


@rule(aten.diagonal_scatter.default, samples=[sample(spec(3, 4), spec(3)), sample(spec(3, 4), spec(2), -1)])
def diagonal_scatter_grad(g, out, x, src, offset=0, dim1=0, dim2=1):
    part = g.diagonal(offset, dim1, dim2)
    return g.diagonal_scatter(torch.zeros_like(part), offset, dim1, dim2), part


@rule(aten.diag_embed.default, samples=[sample(spec(2, 3)), sample(spec(2, 3), 1, 0, -1)])
def diag_embed_grad(g, out, x, offset=0, dim1=-2, dim2=-1):
    return g.diagonal(offset, dim1, dim2)


@rule(aten.triu.default, samples=[sample(spec(3, 4)), sample(_x, 1), sample(spec(2, 2, dtype=C128), -1)])
def triu_grad(g, out, x, diagonal=0):
    return g.triu(diagonal)


@rule(aten.tril.default, samples=[sample(spec(3, 4)), sample(_x, 1), sample(spec(2, 2, dtype=C128), -1)])
def tril_grad(g, out, x, diagonal=0):
    return g.tril(diagonal)


@rule(
    aten.constant_pad_nd.default,
    samples=[
        sample(_x, [1, 2]),
        sample(_x, [1, 0, 0, 2], 3.5),
        sample(_x, [-1, 1]),
        sample(_x, [0, 0, 1, -2]),
        sample(spec(0, 2), [1, 1]),
    ],
)
def constant_pad_grad(g, out, x, pad, value=0):
    return kernels.constant_pad_nd(g, [-p for p in pad])


# -- joins and splits --------------------------------------------------------------------------------


@rule(
    aten.cat.default,
    samples=[
        sample([spec(2, 3), spec(1, 3)]),
        sample([spec(2, 3), spec(2, 1), spec(2, 0)], -1),
        sample([spec(0), spec(2, 3)], 1),
        sample([spec(2, dtype=torch.float32), spec(3)]),
    ],
)
def cat_grad(g, out, tensors, dim=0):
    sizes = [0 if t.shape == (0,) else t.shape[dim] for t in tensors]  # an empty vector joins anything
    parts = g.split(sizes, dim)
    return tuple(part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True))


@rule(
    aten.stack.default,
    samples=[sample([spec(2, 3), spec(2, 3)]), sample([spec(2), spec(2), spec(2)], -1), sample([spec(), spec()])],
)
def stack_grad(g, out, tensors, dim=0):
    return g.unbind(dim)


@rule(aten.block_diag.default, samples=[sample([spec(2, 3), spec(1, 2)]), sample([spec(2), spec(), spec(2, 1)])])
def block_diag_grad(g, out, tensors):
    parts, row, column = [], 0, 0
    for t in tensors:
        height, width = [1, 1, *t.shape][-2:]
        parts.append(g[row : row + height, column : column + width].reshape(t.shape))
        row, column = row + height, column + width
    return tuple(parts)


def _join(g: Sequence[Tensor | None], shape: Sequence[int], sizes: Sequence[int], dim: int) -> Tensor | None:
    """The parts' gradients side by side; zeros for a part that the loss does not reach."""
    some = next((part for part in g if part is not None), None)
    if some is None:
        return None
    empty = [[*shape[: dim % len(shape)], size, *shape[dim % len(shape) + 1 :]] for size in sizes]
    return torch.cat([some.new_zeros(e) if p is None else p for p, e in zip(g, empty, strict=True)], dim)


@rule(aten.unbind.int, samples=[sample(_x), sample(_x, -1)])
@rule(aten.unbind_copy.int, samples=[sample(_x, 1)])
def unbind_grad(g, out, x, dim=0):
    some = next((part for part in g if part is not None), None)
    if some is None:
        return None
    return torch.stack([torch.zeros_like(some) if part is None else part for part in g], dim)


@rule(aten.split.Tensor, samples=[sample(_x, 1), sample(_x, 2, 1), sample(_x, 3, -1), sample(spec(0, 2), 1)])
@rule(aten.split_copy.Tensor, samples=[sample(_x, 2, 1)])
@rule(aten.unsafe_split.Tensor, samples=[sample(_x, 2, 1), sample(_x, 3, -1)])
def split_grad(g, out, x, split_size, dim=0):
    whole = x.shape[dim]
    sizes = [min(split_size, whole - start) for start in range(0, whole, split_size)] if whole else [0] * len(g)
    return _join(g, x.shape, sizes, dim)


@rule(aten.split_with_sizes.default, samples=[sample(_x, [1, 2], 1), sample(_x, [0, 3, 1], -1)])
@rule(aten.split_with_sizes_copy.default, samples=[sample(_x, [1, 2], 1)])
@rule(aten.unsafe_split_with_sizes.default, samples=[sample(_x, [1, 2], 1)])
def split_with_sizes_grad(g, out, x, split_sizes, dim=0):
    return _join(g, x.shape, split_sizes, dim)


# -- rearrangements of images ------------------------------------------------------------------------


@rule(aten.pixel_shuffle.default, samples=[sample(spec(1, 8, 2, 3), 2)])
def pixel_shuffle_grad(g, out, x, factor):
    return torch.pixel_unshuffle(g, factor)


@rule(aten.pixel_unshuffle.default, samples=[sample(spec(1, 2, 4, 6), 2)])
def pixel_unshuffle_grad(g, out, x, factor):
    return torch.pixel_shuffle(g, factor)


@rule(aten.channel_shuffle.default, samples=[sample(spec(1, 6, 2, 2), 3)])
def channel_shuffle_grad(g, out, x, groups):
    return torch.channel_shuffle(g, x.shape[1] // groups)


# a cut by definition; and views of the bits, which have no derivative
declare(aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.view.dtype)
