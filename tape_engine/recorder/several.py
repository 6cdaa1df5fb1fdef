"""What is to be seen to where one operation writes to several tensors: lists of them, several ``out=``, statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from .. import aliases, regions
from ..tape import Kept, bound, unwritten, values_by_tensor, version_of
from .state import IN_TURN, OVERLAPPED

__all__ = ["beside", "expect", "in_disorder"]

Tensor = torch.Tensor
Spared = list[tuple[Kept | None, Tensor]]


def beside(spared: Spared, written: Sequence[Tensor]) -> Spared:
    """Those of `spared` (`aliases.protect`) that all the writes spare: what one of them does, another may not."""
    return [(cell, tensor) for cell, tensor in spared if not any(regions.shares(tensor, each) for each in written)]


def expect(written: Sequence[Tensor]) -> None:
    """Torch has yet to count a write for each of the tensors: several, where these share a count."""
    counts = Counter(id(t if t._base is None else t._base) for t in written)
    for tensor in {id(t): t for t in written}.values():
        pending = counts[id(tensor if tensor._base is None else tensor._base)]
        for value in aliases.counted_with(tensor) if pending > 1 else ():
            holder, cell = value.holder, value.kept
            if holder is not None and bound(holder) is value and unwritten(holder):
                values_by_tensor[id(holder)].versions += (version_of(holder) + pending,)
            if cell is not None and not cell.own and cell.intact:
                cell.versions += (version_of(cell.tensor) + pending,)


def in_disorder(args: Sequence[Any], written: Sequence[Tensor]) -> str:
    """Why what the tensors hold afterwards depends on which of them is written to first, or ""."""
    if _read_in_turn(args, written):
        return IN_TURN
    return OVERLAPPED if regions.meeting(written) else ""


def _read_in_turn(args: Sequence[Any], written: Sequence[Tensor]) -> bool:
    """Whether an operation on lists, which takes their items in turn, reads for one what it writes for another."""
    lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], Tensor)]
    if not lists or [id(each) for each in lists[0]] != [id(each) for each in written]:
        return False
    places: dict[int, list[int]] = {}  # of what is written, by its storage
    for i, each in enumerate(written):
        places.setdefault(regions.storage_of(each), []).append(i)
    return any(
        regions.shares(each, written[j])
        for others in lists[1:]
        for i, each in enumerate(others)
        for j in places.get(regions.storage_of(each), ())
        if i != j
    )
