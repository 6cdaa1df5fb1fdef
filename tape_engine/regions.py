"""Where tensors lie in storages: which share one, which share an element of it, and which have all of another's.

What is asked of every tensor that shares a storage with one that is written to (`aliases`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .places import Place, extent, offset_of, overlapping, positions, stride_of, within

__all__ = [
    "askew",
    "contains",
    "in_reals",
    "meeting",
    "overlap",
    "parted",
    "place_of",
    "same_place",
    "same_storage",
    "shares",
    "storage_in",
    "storage_of",
]


def storage_in(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The tensor's storage; None where it has none to share (sparse tensors)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def storage_of(tensor: torch.Tensor) -> int:
    """The address of the tensor's storage; 0 where it has none to share (sparse tensors)."""
    storage = storage_in(tensor)
    return 0 if storage is None else int(storage._cdata)


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors look into one storage."""
    return storage_of(a) == storage_of(b) != 0


def parted(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a view, to torch, of one that has other memory since (``x.data = y``)."""
    return tensor._base is not None and not same_storage(tensor, tensor._base)


def place_of(view: torch.Tensor, base: torch.Tensor) -> Place:
    """Where `view` lies in `base`."""
    return tuple(view.shape), stride_of(view), int(offset_of(view)) - int(offset_of(base))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    start = int(offset_of(tensor)) * tensor.element_size()
    return start, start + extent(tuple(tensor.shape), stride_of(tensor)) * tensor.element_size()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage share an element; where that is dear to tell, whether they could."""
    (a0, a1), (b0, b1) = _span(a), _span(b)
    if a1 <= b0 or b1 <= a0:
        return False
    if a.dtype != b.dtype or _dense(a) or _dense(b) or max(a.numel(), b.numel()) > 1 << 20:
        return True
    return _meet(a, b)  # two columns of a matrix, say


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage and dtype share an element."""
    cpu = torch.device("cpu")
    places = [positions(tuple(t.shape), stride_of(t), int(offset_of(t)), cpu) for t in (a, b)]
    return bool(torch.isin(*places).any())


def same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same elements of one storage."""
    return same_storage(a, b) and place_of(a, b) == (tuple(b.shape), stride_of(b), 0)


def shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share an element."""
    return same_storage(a, b) and overlap(a, b)


def askew(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share an element, and not each with the same one of the other."""
    if not shares(a, b):
        return False
    if a.dtype != b.dtype:
        return True
    if same_place(a, b):
        return False
    return max(a.numel(), b.numel()) > 1 << 20 or _meet(a, b)


def meeting(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether two of these tensors share an element."""
    by_storage: dict[int, list[torch.Tensor]] = {}
    for each in tensors:
        by_storage.setdefault(storage_of(each), []).append(each)
    by_storage.pop(0, None)
    for group in by_storage.values():
        reaching: list[torch.Tensor] = []  # in the order of their first elements: those not over by the next one's
        for each in sorted(group, key=_span):
            start = _span(each)[0]
            reaching = [other for other in reaching if _span(other)[1] > start]
            if any(overlap(other, each) for other in reaching):
                return True
            reaching.append(each)
    return False


def _dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor leaves out nothing between its first element and its last."""
    return tensor.numel() == extent(tuple(tensor.shape), stride_of(tensor))


def _covers(base: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether every element of `part` lies between the first and last of `base`, of the same dtype."""
    (a0, a1), (b0, b1) = _span(base), _span(part)
    return a0 <= b0 and b1 <= a1 and base.dtype == part.dtype


def in_reals(part: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`part`, or the pairs of reals that it consists of, where it is a complex view of a real `base`."""
    return torch.view_as_real(part) if part.is_complex() and not base.is_complex() else part


def contains(wide: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether `wide`, of which no two elements lie in one place, is known to have every element of `part`."""
    if not _covers(wide, part):
        return False
    if _in_order(wide):
        return True
    shape, strides = tuple(wide.shape), stride_of(wide)
    return not overlapping(shape, strides) and (_dense(wide) or within(place_of(part, wide), shape, strides))


_in_order = torch._C.TensorBase.is_contiguous  # torch's own: the method on Tensor may be wrapped while a block is open
