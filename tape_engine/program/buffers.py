"""Memory that a replay keeps: buffers for what passes through, and results that belong to the caller.

Fresh memory is what makes small and memory-bound steps slow. A buffer is allocated once and written on
every replay. A result must not be written again while the caller has it, but as soon as nobody refers
to it any more, its memory can serve again: a loop that only reads ``.g`` rotates between two tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from ..tape import Value

__all__ = ["buffer", "rotating"]

Tensor = torch.Tensor


def buffer(value: Value) -> Tensor:
    """Memory for a value, of its shape and strides (dense where it was expanded)."""
    dense = all(step or length < 2 for length, step in zip(value.shape, value.strides, strict=False))
    if value.strides and dense:
        return torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=value.device)
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def rotating(value: Value, *, copy: bool = True) -> Callable[[], Tensor]:
    """A source of result tensors of a value's description: one that nobody refers to, or else a new one.

    With ``copy=False`` always the same one.
    """
    if not copy:
        only = buffer(value)
        return lambda: only
    ring: list[Tensor] = []
    uses = torch._C._storage_Use_Count

    def take() -> Tensor:
        for tensor in ring:
            # Referred to by `ring`, `tensor` and the call below; its storage by itself and the handle.
            if sys.getrefcount(tensor) == 3 and uses(tensor.untyped_storage()._cdata) == 2:
                return tensor
        tensor = buffer(value)
        if len(ring) >= 3:
            ring.pop(0)
        ring.append(tensor)
        return tensor

    return take
