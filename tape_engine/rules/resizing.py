# mypy: allow-untyped-defs
"""Images made larger, smaller, padded, sampled at points, or cut into columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ..registry import Sample, rule, sample, spec
from .common import Tensor, aten, kernels, rule_name, stand_in

# -- interpolation -----------------------------------------------------------------------------------


def interpolation(name: str, size: Sequence[int], larger: Sequence[int], *, aligns: bool) -> None:
    """Of ``upsample_…``: linear, so the rule of its backward is itself."""
    forward, backward = (getattr(aten, each).default for each in (name, f"{name}_backward"))
    x, n = spec(1, 2, *size), len(size)
    scales = [None] * n
    made = [sample(x, list(larger), *([each] if aligns else [])) for each in ((True, False) if aligns else (True,))]
    back = [
        sample(spec(1, 2, *larger), list(larger), [1, 2, *size], *([False] if aligns else []), *scales),
    ]
    if aligns:

        @rule(forward, samples=made, formula="resize(x)")
        def grad(
            g: Tensor, out: Tensor, x: Tensor, size: Any, align: bool, a: Any = None, b: Any = None, c: Any = None
        ) -> Any:
            return backward(g, size, x.shape, align, *(a, b, c)[:n])

        @rule(backward, samples=back)
        def again(
            g: Tensor,
            out: Tensor,
            gy: Tensor,
            size: Any,
            shape: Any,
            align: bool,
            a: Any = None,
            b: Any = None,
            c: Any = None,
        ) -> Any:
            return forward(g, size, align, *(a, b, c)[:n])

    else:

        @rule(forward, samples=made, formula="resize(x)")
        def grad(g: Tensor, out: Tensor, x: Tensor, size: Any, a: Any = None, b: Any = None, c: Any = None) -> Any:
            return backward(g, size, x.shape, *(a, b, c)[:n])

        @rule(backward, samples=back)
        def again(
            g: Tensor, out: Tensor, gy: Tensor, size: Any, shape: Any, a: Any = None, b: Any = None, c: Any = None
        ) -> Any:
            return forward(g, size, *(a, b, c)[:n])

    grad.__name__, again.__name__ = rule_name(forward), rule_name(backward)


for _name, _size, _larger, _aligns in (
    ("upsample_nearest1d", [3], [5], False),
    ("upsample_nearest2d", [2, 3], [4, 4], False),
    ("upsample_nearest3d", [1, 2, 2], [2, 3, 3], False),
    ("_upsample_nearest_exact1d", [3], [5], False),
    ("_upsample_nearest_exact2d", [2, 3], [4, 4], False),
    ("_upsample_nearest_exact3d", [1, 2, 2], [2, 3, 3], False),
    ("upsample_linear1d", [3], [5], True),
    ("upsample_bilinear2d", [2, 3], [4, 4], True),
    ("upsample_trilinear3d", [1, 2, 2], [2, 3, 3], True),
    ("upsample_bicubic2d", [2, 3], [4, 4], True),
    ("_upsample_bilinear2d_aa", [3, 3], [2, 4], True),
    ("_upsample_bicubic2d_aa", [3, 3], [2, 4], True),
):
    interpolation(_name, _size, _larger, aligns=_aligns)


# -- sampling at points ------------------------------------------------------------------------------


@rule(
    aten.grid_sampler_2d.default,
    samples=[
        sample(spec(1, 2, 3, 3), spec(1, 2, 2, 2, low=-0.9, high=0.9), mode, padding, align)
        for mode, padding, align in ((0, 0, False), (0, 1, True), (2, 0, False), (0, 2, False))
    ],
)
def grid_sampler_2d_grad(g, out, x, grid, mode, padding, align_corners):
    return kernels.grid_sampler_2d_backward(g, x, grid, mode, padding, align_corners, [True, True])


@rule(
    aten.grid_sampler_3d.default,
    samples=[sample(spec(1, 1, 2, 3, 3), spec(1, 1, 2, 2, 3, low=-0.9, high=0.9), 0, 0, False)],
)
def grid_sampler_3d_grad(g, out, x, grid, mode, padding, align_corners):
    return kernels.grid_sampler_3d_backward(g, x, grid, mode, padding, align_corners, [True, True])


def _sampled(x: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    """What ``grid_sampler`` computes, in operations that have derivatives of every order.

    `x` is of shape (N, C, *sizes), with two or three sizes, and `grid` of shape (N, *out, number of sizes), whose
    last dimension begins with the last of them. `mode` is 0 for linear, 1 for nearest, 2 for cubic, and `padding`
    0 for zeros, 1 for the border, 2 for reflection.
    """
    sizes = x.shape[2:][::-1]
    taps: list[list[tuple[Tensor, Tensor | None]]] = []  # for each dimension the places read, with their weights
    for d, size in enumerate(sizes):
        place = grid[..., d].flatten(1)
        place = (place + 1) / 2 * (size - 1) if align_corners else ((place + 1) * size - 1) / 2
        if mode != 2:
            place = _padded(place, size, padding, align_corners)
        if mode == 1:
            taps.append([(place.round(), None)])
            continue
        first = place.detach().floor()
        weights = _cubic(place - first) if mode == 2 else [1 - (place - first), place - first]
        shifted = [first + i for i in (range(-1, 3) if mode == 2 else range(2))]
        if mode == 2:
            shifted = [_padded(each, size, padding, align_corners) for each in shifted]
        taps.append(list(zip(shifted, weights, strict=True)))
    out: Any = 0
    corners: list[list[tuple[Tensor, Tensor | None]]] = [[]]
    for tap in taps:
        corners = [[*corner, each] for corner in corners for each in tap]
    for corner in corners:
        index: Any = 0
        weight: Any = 1.0
        for (place, own), size in zip(reversed(corner), reversed(sizes), strict=True):
            inside = (place >= 0) & (place <= size - 1)
            index = index * size + place.detach().clamp(0, size - 1).long()
            weight = torch.where(inside, weight * (1.0 if own is None else own), 0)
        picked = x.flatten(2).gather(2, index.unsqueeze(1).expand(-1, x.shape[1], -1))
        out = out + picked * weight.unsqueeze(1)
    return cast(Tensor, out.reshape(*x.shape[:2], *grid.shape[1:-1]))


def _padded(place: Tensor, size: int, padding: int, align_corners: bool) -> Tensor:
    """Places outside of a dimension, moved to its border or reflected at it."""
    if padding == 2:
        low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(place)
        past = torch.where(place < low, low - place, place - low)
        turns = (past / span).detach().floor()
        past = past - turns * span
        place = torch.where(turns % 2 == 1, span - past, past) + low
    return place if padding == 0 else place.clamp(0, size - 1)


def _cubic(t: Tensor) -> list[Tensor]:
    """The weights of four neighbours, of which the second lies `t` before: Keys' kernel with a = -3/4."""
    a = -0.75

    def near(s: Tensor) -> Tensor:
        return ((a + 2) * s - (a + 3)) * s * s + 1

    def far(s: Tensor) -> Tensor:
        return ((a * s - 5 * a) * s + 8 * a) * s - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _grid_samples(*ways: tuple[int, int, bool], sizes: tuple[int, ...]) -> list[Any]:
    x, grid = spec(1, 2, *sizes), spec(1, *[2] * len(sizes), len(sizes), low=-1.3, high=1.3)
    return [sample(spec(1, 2, *[2] * len(sizes)), x, grid, *way, [True, True]) for way in ways]


@rule(
    aten.grid_sampler_2d_backward.default,
    samples=_grid_samples((0, 0, False), (0, 1, True), (0, 2, False), (1, 0, False), (2, 0, True), sizes=(3, 4)),
)
def grid_sampler_2d_backward_grad(g, out, gy, x, grid, mode, padding, align_corners, output_mask):
    return _grid_backward_grad(g, gy, x, grid, mode, padding, align_corners)


@rule(
    aten.grid_sampler_3d_backward.default,
    samples=_grid_samples((0, 0, False), (0, 2, True), (1, 1, False), sizes=(2, 3, 4)),
)
def grid_sampler_3d_backward_grad(g, out, gy, x, grid, mode, padding, align_corners, output_mask):
    return _grid_backward_grad(g, gy, x, grid, mode, padding, align_corners)


def _grid_backward_grad(g: Any, gy: Tensor, x: Tensor, grid: Tensor, *how: Any) -> Any:
    """ATen has no second derivative of it: that of what it computes, written in operations that have one."""

    def backward(gy: Tensor, x: Tensor, grid: Tensor) -> Any:
        back: Any = torch.func.vjp(lambda x, grid: _sampled(x, grid, *how), x, grid)[1]
        return back(gy)

    back: Any = torch.func.vjp(backward, gy, x, grid)[1]
    return back(tuple([torch.zeros_like(t) if each is None else each for each, t in zip(g, (x, grid), strict=True)]))


@rule(
    aten.affine_grid_generator.default,
    samples=[sample(spec(2, 2, 3), [2, 1, 3, 4], False), sample(spec(1, 3, 4), [1, 1, 2, 3, 2], True)],
)
def affine_grid_generator_grad(g, out, theta, size, align_corners):
    """``out = base @ thetaᵀ`` for a grid of homogeneous points, which the identity's grid tells."""
    n = len(size) - 2
    identity = torch.eye(n, n + 1, dtype=g.dtype, device=g.device).unsqueeze(0)
    points = kernels.affine_grid_generator(identity, [1, 1, *size[2:]], align_corners).reshape(-1, n)
    points = torch.cat([points, torch.ones_like(points.narrow(1, 0, 1))], 1)
    return g.reshape(g.shape[0], -1, n).mT @ points


# -- padding -----------------------------------------------------------------------------------------


def padding(name: str, size: Sequence[int], pad: Sequence[int]) -> None:
    """Of padding by what stands at the edges: linear, so the rule of its backward is itself."""
    forward, backward = (getattr(aten, each).default for each in (name, f"{name}_backward"))
    x, n = spec(1, 2, *size), len(size)
    padded = [each + pad[2 * (n - 1 - d)] + pad[2 * (n - 1 - d) + 1] for d, each in enumerate(size)]

    @rule(forward, samples=[sample(x, list(pad)), sample(spec(2, *size), list(pad))])
    def grad(g: Tensor, out: Tensor, x: Tensor, pad: Any) -> Any:
        return backward(g, stand_in(g, x.shape), pad)

    @rule(backward, samples=[sample(spec(1, 2, *padded), x, list(pad))])
    def again(g: Tensor, out: Tensor, gy: Tensor, x: Tensor, pad: Any) -> Any:
        return forward(g, pad), None

    grad.__name__, again.__name__ = rule_name(forward), rule_name(backward)


for _kind in ("reflection", "replication"):
    padding(f"{_kind}_pad1d", [4], [1, 2])
    padding(f"{_kind}_pad2d", [3, 4], [1, 2, 2, 0])
    padding(f"{_kind}_pad3d", [2, 3, 3], [1, 0, 2, 1, 1, 1])


# -- windows as columns ------------------------------------------------------------------------------


def _windows(x: Any) -> Sample:
    return sample(x, [2, 2], [1, 1], [0, 1], [2, 1])


@rule(aten.im2col.default, samples=[_windows(spec(1, 2, 4, 3)), _windows(spec(2, 4, 3))])
def im2col_grad(g, out, x, kernel, dilation, padding, stride):
    return kernels.col2im(g, x.shape[-2:], kernel, dilation, padding, stride)


@rule(aten.col2im.default, samples=[sample(spec(1, 8, 8), [4, 3], [2, 2], [1, 1], [0, 1], [2, 1])])
def col2im_grad(g, out, x, size, kernel, dilation, padding, stride):
    return kernels.im2col(g, kernel, dilation, padding, stride)
