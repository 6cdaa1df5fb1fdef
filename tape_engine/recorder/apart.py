"""A dispatch mode that stops a write: freezing runs the body of an operation, which must change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import NotRecordedError
from ..plans import plan_of
from ..regions import storage_of

__all__ = ["Apart"]

Tensor = torch.Tensor


class Apart(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops a body that would write to a tensor that it has not made itself: freezing must change nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own: dict[int, torch.UntypedStorage] = {}  # kept, so that no address serves twice

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch's guard would import torch._dynamo at the first call: in the midst of a body, where it fails.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for key in plan_of(func, args).writes:
            written = kwargs.get(key) if isinstance(key, str) else args[key] if key < len(args) else None
            for tensor in written if isinstance(written, (list, tuple)) else (written,):
                if isinstance(tensor, Tensor) and storage_of(tensor) not in self.own:
                    raise NotRecordedError("the body of a named operation writes to a tensor that it was given")
        before = {storage_of(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor)}
        result = func(*args, **kwargs)
        for tensor in (result,) if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else ():
            if isinstance(tensor, Tensor) and storage_of(tensor) not in before:
                self.own[storage_of(tensor)] = tensor.untyped_storage()
        return result
