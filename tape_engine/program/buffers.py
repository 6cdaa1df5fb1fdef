"""Memory that a replay keeps: buffers for what passes through, and results that belong to the caller.

Fresh memory is what makes small and memory-bound steps slow. A buffer is allocated once and written on
every replay. A result must not be written again while the caller has it, but as soon as nobody refers
to its memory any more, that can serve again: a loop that only reads ``.g`` rotates between two.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache

import torch

from ..places import overlapping
from ..tape import Value

__all__ = ["buffer", "laid", "overlapping", "own", "placed", "rotating", "strides_of"]

Tensor = torch.Tensor

KEPT_RESULTS = 3  # memories a result rotates between: the one being read, the one on ``.g``, and one more


def strides_of(value: Value) -> tuple[int, ...]:
    """The strides of memory for a value: its own, or dense ones where its elements overlapped."""
    if value.strides and not overlapping(value.shape, value.strides):
        return tuple(value.strides)
    return tuple([math.prod(max(n, 1) for n in value.shape[i + 1 :]) for i in range(len(value.shape))])


def buffer(value: Value) -> Tensor:
    """Memory for a value, of its shape and strides (dense where its elements overlapped)."""
    return torch.empty_strided(value.shape, strides_of(value), dtype=value.dtype, device=value.device)


def placed(value: Value, memory: torch.UntypedStorage) -> Tensor:
    """The beginning of `memory`, as a tensor of a value's description."""
    made = torch.empty(0, dtype=value.dtype, device=value.device)
    return made.set_(memory, 0, value.shape, strides_of(value))


def own(*results: Tensor) -> list[Tensor]:
    """The results themselves where nothing else lies in their memory, which then is the caller's; copies elsewhere."""
    uses = torch._C._storage_Use_Count
    seen: set[int] = set()
    found = []
    for tensor in results:
        storage = tensor.untyped_storage()
        place = storage._cdata
        # the tensor uses the storage, and our handle; an operation may have returned one tensor twice
        alone = uses(place) == 2 and place not in seen and storage.nbytes() <= tensor.nbytes
        seen.add(place)
        found.append(tensor if alone else tensor.clone())
    return found


def laid(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`tensor` in the recorded layout: itself, or a copy that has those strides."""
    if tensor.stride() == strides and not tensor.is_conj() and not tensor.is_neg():
        return tensor
    if overlapping(tensor.shape, strides):
        return tensor.contiguous()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def rotating(value: Value, *, copy: bool = True, keep: bool = True) -> Callable[[], Tensor]:
    """A source of result tensors of a value's description, in memory that nobody else refers to.

    Each is a new tensor, whatever the caller did to the one that was in this memory before. With
    ``copy=False`` the memory is always the same; unless it is to `keep` memory, each result has some of its own.
    """
    if not copy:
        only = buffer(value)
        return only.detach
    if not keep:

        def make() -> Tensor:
            with torch.inference_mode(False):  # it may outlive the mode of this replay
                return buffer(value)

        return make
    ring: list[tuple[Tensor, torch.UntypedStorage, int]] = []
    uses = torch._C._storage_Use_Count
    references = sys.getrefcount
    alone = _references_alone()

    def take() -> Tensor:
        for tensor, storage, place in ring:
            # Our tensor and the handle use the storage; `ring`, the loop, and what else there is refer to the handle.
            if uses(place) == 2 and references(storage) == alone:
                return tensor.detach()
        with torch.inference_mode(False):  # it may outlive the mode of this replay
            tensor = buffer(value)
        storage = tensor.untyped_storage()
        if len(ring) >= KEPT_RESULTS:
            ring.pop(0)
        ring.append((tensor, storage, storage._cdata))
        return tensor.detach()

    return take


@cache
def _references_alone() -> int:
    """How many references `rotating` finds to the handle of a storage that nobody else refers to.

    Whether the storage itself counts is told by the release of torch (from 2.9 on it does), and whether a call does by
    that of Python (up to 3.13).
    """
    references = sys.getrefcount
    tensor = torch.empty(1)
    ring = [(tensor, tensor.untyped_storage(), 0)]

    def take() -> int:
        for tensor, storage, _ in ring:  # as `rotating` does
            if tensor is not None:
                return references(storage)
        return 0

    return take()
