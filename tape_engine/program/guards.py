"""Guards: what a replay refuses because the recorded code would have done something else."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import GuardError, message

__all__ = ["check_guard", "check_shape"]

FIX = "record the code again on these inputs"


def check_guard(now: Any, recorded: Any, site: str | None) -> None:
    """Refuses a decision that comes out differently."""
    if _same(now, recorded):
        return
    what = f"a decision of the recorded code comes out differently: {recorded!r} when recorded, {now!r} now."
    raise GuardError(message(what, where=site, fix=FIX))


def _same(a: Any, b: Any) -> bool:
    """Equality by which NaN is NaN, in lists as well."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))


def check_shape(tensor: torch.Tensor, shape: tuple[int, ...], site: str | None) -> None:
    """Refuses a result whose shape, which depends on elements, is not the recorded one."""
    if tensor.shape != shape:
        what = (
            f"a shape that depends on the elements comes out differently: {shape} when recorded, "
            f"{tuple(tensor.shape)} now."
        )
        raise GuardError(message(what, where=site, fix=FIX))
