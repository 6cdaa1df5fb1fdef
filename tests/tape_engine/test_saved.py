"""What torch's autograd has saved and unpacks within a block, against torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import tape_engine as te

Tensor = torch.Tensor
Pair = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def same(t: Any) -> Any:
    return t


HOOKS: dict[str, Pair] = {
    "as they are": (same, same),
    "packed copies": (torch.clone, same),
    "unpacked copies": (same, torch.clone),
    "products": (lambda t: t * 2, lambda t: t / 2),
    "lists": (Tensor.tolist, torch.tensor),
}


def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(3, 3, generator=generator) for _ in range(2))
    return x.requires_grad_(), w.requires_grad_()


def penalty(y: Tensor, *of: Tensor) -> Tensor:
    """A function of torch's own gradients of `y`, so that a gradient of it is one of second order."""
    return torch.stack([(g**2).sum() for g in torch.autograd.grad(y.sum(), of, create_graph=True)]).sum()


def agree(compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, w = leaves()
    expected = torch.autograd.grad(compute(x, w), (x, w))
    x, w = leaves()
    with te.record():
        C = compute(x, w)
    for g, right in zip(te.grad(C, (x, w)), expected, strict=True):
        assert g is not None
        torch.testing.assert_close(g, right)


@pytest.mark.parametrize("name", HOOKS)
def test_inputs_that_hooks_have_packed_are_what_was_saved(name: str) -> None:
    def compute(x: Tensor, w: Tensor) -> Tensor:
        a = x * 1.5
        with saved_tensors_hooks(*HOOKS[name]):
            y = torch.sin(a * w) * x
        return penalty(y, a, w)

    agree(compute)


@pytest.mark.parametrize("name", HOOKS)
def test_outputs_that_hooks_have_packed_are_what_was_saved(name: str) -> None:
    def compute(x: Tensor, w: Tensor) -> Tensor:
        with saved_tensors_hooks(*HOOKS[name]):
            y = torch.exp(x * w)
        return penalty(y, x, w)

    agree(compute)


def test_a_packed_output_that_is_gone_is_refused_at_the_sweep() -> None:
    x, w = leaves()
    with te.record():
        with saved_tensors_hooks(torch.clone, same):
            y = torch.exp(x * w).sum()
        C = penalty(y, x, w)
    with pytest.raises(te.TapeError, match="outside the recording"):
        te.backward(C)


def test_what_waits_on_the_cpu_is_what_was_saved() -> None:
    def compute(x: Tensor, w: Tensor) -> Tensor:
        with save_on_cpu():
            y = torch.tanh(x * w) * x
        return penalty(y, x, w)

    agree(compute)


def test_a_gradient_of_a_gradient_passes_a_checkpoint() -> None:
    def part(x: Tensor, w: Tensor) -> Tensor:
        return torch.sigmoid(torch.tanh(x * w) * x)

    agree(lambda x, w: penalty(checkpoint(part, x * 1.5, w, use_reentrant=False), x, w))
