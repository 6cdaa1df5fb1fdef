"""What several test files share: comparisons, references from torch.autograd, texts of errors."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._C import DisableTorchFunctionSubclass
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    Tensor = Any  # torch's own annotations know no `.g`
else:
    Tensor = torch.Tensor


def plain(t: Tensor) -> Tensor:
    """A torch tensor of the same contents and strides that no tape knows."""
    with DisableTorchFunctionSubclass():
        return t.detach().clone()


def close(got: Tensor | None, wanted: Tensor | None, tol: float = 1e-10) -> None:
    """Asserts equal shape and dtype, and equal elements to `tol`, relative to the largest of them."""
    if wanted is None:
        assert got is None
        return
    assert got is not None, "no gradient"
    assert isinstance(got, torch.Tensor)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    got, wanted = plain(got), plain(wanted)
    scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    torch.testing.assert_close(got, wanted, rtol=tol, atol=tol * scale)


def reference(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor | None]:
    """The gradients of ``function(*tensors)`` as torch.autograd gives them, run on copies."""
    copies = [plain(t).requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors]
    result = function(*copies)
    asked = [t for t in copies if t.requires_grad]
    found = iter(torch.autograd.grad(result, asked, torch.ones_like(result), allow_unused=True))
    return [next(found) if t.requires_grad else None for t in copies]


def g_of(t: Tensor) -> Tensor | None:
    """``t.g``, or None where there is none."""
    found: Tensor | None = getattr(t, "g", None)
    return found


def grad_of(t: Any) -> Any:
    """``t.g``, which must be there."""
    found = g_of(t)
    assert found is not None, "no gradient"
    return found


def the(found: Sequence[Any]) -> Any:
    """The only element."""
    (one,) = found
    return one


def agree(tensors: Sequence[Tensor], references: Sequence[Tensor | None], tol: float = 1e-10) -> None:
    """Asserts that each tensor's ``.g`` is its reference; a missing one counts as none or as zeros."""
    for t, wanted in zip(tensors, references, strict=True):
        found = g_of(t)
        if wanted is None or found is None:
            assert found is None or not found.any()
            assert wanted is None or not wanted.any(), "a gradient is missing"
        else:
            close(found, wanted, tol)


def error_text(caught: pytest.ExceptionInfo[BaseException], file: str) -> str:
    """The text of an error, its line number (which must be that of the failing call in `file`) replaced by LINE."""
    text = str(caught.value)
    here = Path(file).name
    entries = [entry for entry in caught.traceback if Path(str(entry.path)).name == here]
    assert entries, "the error did not come from this file"
    line = entries[0].lineno + 1  # pytest counts from zero
    source = linecache.getline(file, line).strip()
    assert f"at {here}:{line}    {source}" in text, text
    return text.replace(f"{here}:{line}    {source}", "LINE")


def unshared(*tensors: Tensor) -> None:
    """Asserts that no two tensors share memory, told from their storages and by writing to each in turn."""
    full = [t for t in tensors if t.numel()]
    places = [t.untyped_storage().data_ptr() for t in full]
    assert len(set(places)) == len(places)
    contents = [plain(t) for t in full]
    with DisableTorchFunctionSubclass(), torch.no_grad():
        for i, t in enumerate(full):
            t.detach().fill_(7)
            for other, before in zip(full[i + 1 :], contents[i + 1 :], strict=True):
                assert torch.equal(other, before)
        for t, before in zip(full, contents, strict=True):
            t.detach().copy_(before)


def each_tensor(structure: Any) -> list[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(structure, torch.Tensor):
        return [structure]
    if isinstance(structure, (tuple, list)):
        return [t for item in structure for t in each_tensor(item)]
    return []


class Overloads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode of the user's: notes the overloads that it hears, and runs them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(func)
        return func(*args, **(kwargs or {}))
