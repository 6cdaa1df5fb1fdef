"""Threads that are started inside a block: a block hears its own thread, and what another computes it does not.

What another thread makes of a recorded value is a leaf to the sweep, so a thread that a block has started is watched,
and warns. It is watched from above, by a function mode: torch computes there as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .. import exits
from ..tape import DIFFERENTIABLE
from ..warned import warn_of_thread
from .listening import DETACHES
from .mode import quietly
from .state import current_tape_is_global, state, tensors_in

__all__: list[str] = []


class Elsewhere(TorchFunctionMode):
    """Warns once where a thread that records nothing makes a tensor of what another is recording."""

    told = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            not self.told
            and current_tape_is_global()
            and torch.is_grad_enabled()
            and not (state.deaf or func in DETACHES or getattr(func, "__name__", "") in ("detach", "detach_"))
        ):
            given = [*tensors_in(args), *tensors_in(list((kwargs or {}).values()))]
            made = [each for each in tensors_in(result) if not any(each is other for other in given)]
            if any(
                each.dtype in DIFFERENTIABLE for each in made
            ):  # of a write the sweep says by itself that it was unseen
                with quietly():
                    self.told = warn_of_thread(getattr(func, "__name__", "an operation"), given)
        return result


def _watched(thread: threading.Thread, run: Callable[[], None]) -> Callable[[], None]:
    own = "run" in thread.__dict__

    def watched() -> None:
        if own:
            thread.run = run  # type: ignore[method-assign]
        else:
            del thread.run  # the class's own shows again, and no cycle is left
        with Elsewhere():
            run()

    return watched


exits.on_thread(_watched)
