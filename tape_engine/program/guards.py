"""Guards: what a replay refuses because the recorded code would have done something else."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import GuardError, message

__all__ = ["check_guard", "check_shape"]

FIX = "record the code again on these inputs"


def check_guard(now: Any, recorded: Any, site: str | None) -> None:
    """Refuses a decision that comes out differently."""
    if now == recorded or (now != now and recorded != recorded):
        return
    what = f"a decision of the recorded code comes out differently: {recorded!r} when recorded, {now!r} now."
    raise GuardError(message(what, where=site, fix=FIX))


def check_shape(tensor: torch.Tensor, shape: tuple[int, ...], site: str | None) -> None:
    """Refuses a result whose shape, which depends on elements, is not the recorded one."""
    if tensor.shape != shape:
        what = (
            f"a shape that depends on the elements comes out differently: {shape} when recorded, "
            f"{tuple(tensor.shape)} now."
        )
        raise GuardError(message(what, where=site, fix=FIX))
