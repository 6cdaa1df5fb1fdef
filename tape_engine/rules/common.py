"""What the rules of several topics share: conjugates, reduced dimensions, and sets of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..registry import Absent, Sample, composite, sample, spec

Tensor = torch.Tensor
C128 = torch.complex128


class Kernels:
    """ATen's own kernels as rules call them: ``kernels.tanh_backward(g, y)``.

    ``torch.ops.aten.tanh_backward`` is the same, but looks first for what no rule gives it (script objects), and
    that takes half a microsecond at each call.
    """

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(torch.ops.aten, name)._op
        setattr(self, name, kernel)
        return kernel


kernels = Kernels()


# -- overloads by name -------------------------------------------------------------------------------


class Packet:
    """The overloads of one of ATen's operations, as rules are entered for them: ``aten.sum.dim_IntList``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, overload: str) -> Any:
        found = getattr(getattr(torch.ops.aten, self._name, None), overload, None)
        if found is None or composite(found):
            found = Absent(f"aten::{self._name}.{overload}")
        setattr(self, overload, found)
        return found


class Overloads:
    """``torch.ops.aten``, of which a rule may name what another release of torch has, and this one not.

    Releases differ: an operation goes (``cholesky``, after 2.13), or was several others before it became one
    (``ldexp``, up to 2.8). `Absent` stands for those, and no rule is entered for it.
    """

    def __getattr__(self, name: str) -> Packet:
        found = Packet(name)
        setattr(self, name, found)
        return found


aten = Overloads()


# -- numbers and masks -------------------------------------------------------------------------------


def conj(value: Any) -> Any:
    """The conjugate of a tensor or of a Python number (``x * 2`` has a number in a tensor's place)."""
    return value.conj() if isinstance(value, Tensor) else value.conjugate()


def is_tensor(value: Any) -> bool:
    """Whether a tensor, and not a number or ``None``, stands in a tensor's place."""
    return isinstance(value, Tensor)


def keep_where(mask: Tensor, g: Tensor) -> Tensor:
    """`g` where the mask is true, 0 elsewhere, also where `g` is infinite or NaN."""
    return torch.where(mask, g, 0)


def stand_in(g: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of that shape in one element's memory, for a kernel that asks an argument's shape alone."""
    return g.new_zeros(()).expand(shape)


def rule_name(target: Any) -> str:
    """The name of a family's rule for `target`: ``sin_grad``."""
    return f"{target.name().removeprefix('aten::').partition('.')[0]}_grad"


# -- reduced dimensions ------------------------------------------------------------------------------


def reduced(ndim: int, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """The dimensions that a reduction ran over, ascending and not negative; all for ``None`` or ``[]``."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return tuple(range(ndim))
    if ndim == 0:
        return ()
    return tuple(sorted({d % ndim for d in ([dim] if isinstance(dim, int) else dim)}))


def count(shape: Sequence[int], dim: int | Sequence[int] | None) -> int:
    """How many elements went into each element of a reduction of `shape` over `dim`."""
    return math.prod(shape[d] for d in reduced(len(shape), dim))


def keep_dims(t: Tensor, ndim: int, dim: int | Sequence[int] | None, keepdim: bool) -> Tensor:
    """A reduction's result (or its gradient) with the dimensions it ran over as dimensions of size 1."""
    if keepdim:
        return t
    for d in reduced(ndim, dim):
        t = t.unsqueeze(d)
    return t


def spread(g: Tensor, shape: Sequence[int], dim: int | Sequence[int] | None, keepdim: bool) -> Tensor:
    """A reduction's gradient, repeated over the dimensions that it ran over."""
    return keep_dims(g, len(shape), dim, keepdim).expand(shape)


def flipped_cumsum(g: Tensor, dim: int) -> Tensor:
    """The sums of `g` from each place along `dim` to the end."""
    return g if g.ndim == 0 else g.flip(dim).cumsum(dim).flip(dim)


# -- samples -----------------------------------------------------------------------------------------


def unary(low: float = -2.0, high: float = 2.0, *more: Any, complex: bool = True, **kwargs: Any) -> list[Sample]:
    """Samples of a pointwise operation of one tensor and further arguments."""
    shapes = [(3, 4), (), (0, 3)]
    made = [sample(spec(*shape, low=low, high=high), *more, **kwargs) for shape in shapes]
    if complex:
        made.append(sample(spec(2, 3, dtype=C128), *more, **kwargs))
    return made


def binary(
    low: float = -2.0,
    high: float = 2.0,
    *,
    other: tuple[float, float] | None = None,
    complex: bool = True,
    **kwargs: Any,
) -> list[Sample]:
    """Samples of a pointwise operation of two tensors, whose shapes broadcast."""
    low_b, high_b = other or (low, high)
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((3, 4), (3, 4)),
        ((3, 1), (4,)),
        ((), (2, 3)),
        ((), ()),
        ((0, 3), (3,)),
    ]
    made = [sample(spec(*a, low=low, high=high), spec(*b, low=low_b, high=high_b), **kwargs) for a, b in pairs]
    if complex:
        made.append(sample(spec(2, 3, dtype=C128), spec(2, 3, dtype=C128), **kwargs))
        made.append(sample(spec(3, low=low, high=high), spec(2, 3, dtype=C128), **kwargs))
    return made
