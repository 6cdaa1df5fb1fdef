"""Whole models, trained: every gradient at every step, against a twin that torch.autograd trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tape_engine as te
from tests.helpers import close, g_of, plain
from tests.tape_engine.architectures import ARCHITECTURES, Architecture

Tensor = torch.Tensor

STEPS, RATE = 4, 0.1
every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)


def part_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def leaves(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The parameters and the floating inputs, by name."""
    given = {f"input {i}": t for i, t in enumerate(batch) if t.is_floating_point()}
    return {**{name: p for name, p in model.named_parameters() if p.requires_grad}, **given}


def by_autograd(model: nn.Module, loss: Any, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss, and the gradient of each parameter and floating input, as torch.autograd gives them."""
    batch = tuple(plain(t).requires_grad_(t.is_floating_point()) for t in batch)
    asked = leaves(model, batch)
    result = loss(model, *batch)
    found = torch.autograd.grad(result, list(asked.values()), allow_unused=True)
    return result.detach(), dict(zip(asked, found, strict=True))


def forget(tensors: dict[str, Tensor]) -> None:
    for t in tensors.values():
        vars(t).pop("g", None)


def compare(tensors: dict[str, Tensor], wanted: dict[str, Tensor | None]) -> None:
    """Asserts that each ``.g`` is its reference; where torch finds no way to the loss there is none, or zeros."""
    assert tensors.keys() == wanted.keys()
    for name, t in tensors.items():
        found, reference = g_of(t), wanted[name]
        try:
            if reference is None or found is None:
                assert found is None or not found.any()
                assert reference is None or not reference.any(), "a gradient is missing"
            else:
                close(found, reference, 1e-8)
        except AssertionError as error:
            error.add_note(f"the gradient of {name}")
            raise


def same_buffers(ours: nn.Module, theirs: nn.Module, tol: float) -> None:
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        if tol:
            torch.testing.assert_close(plain(mine), plain(other), rtol=tol, atol=tol)
        else:
            assert torch.equal(plain(mine), plain(other))


def step(model: nn.Module, gradients: dict[str, Tensor | None]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            g = gradients.get(name)
            if g is not None:
                p.sub_(RATE * g)


def new(architecture: Architecture) -> nn.Module:
    return architecture.model().double()


@every
def test_training(architecture: Architecture) -> None:
    """Steps of gradient descent: the recording changes no bit, and the gradients train the same model."""
    ours = new(architecture)
    theirs = copy.deepcopy(ours)
    for _ in range(STEPS):
        batch = architecture.data()
        for loss, part in architecture.losses:
            start = torch.get_rng_state()
            same = copy.deepcopy(ours)
            unrecorded, at_ours = by_autograd(same, loss, batch)
            state = torch.get_rng_state()

            torch.set_rng_state(start)
            with te.record() as tape:
                result = loss(ours, *batch)
            assert torch.equal(plain(result), unrecorded), "recording has changed the result"
            assert torch.equal(torch.get_rng_state(), state), "recording has changed the random stream"
            same_buffers(ours, same, 0.0)
            asked = leaves(ours, batch)
            forget(asked)
            te.backward(result)
            compare(asked, at_ours)
            assert not [node for node in tape.nodes if node.rule == "borrowed"]

            torch.set_rng_state(start)
            _, gradients = by_autograd(theirs, loss, batch)
            compare(asked, gradients)
            step(part_of(ours, part), {name.removeprefix(f"{part}."): g_of(p) for name, p in asked.items()})
            step(part_of(theirs, part), {name.removeprefix(f"{part}."): g for name, g in gradients.items()})
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(plain(mine), plain(other), 1e-6)
    same_buffers(ours, theirs, 1e-6)


@every
def test_strict(architecture: Architecture) -> None:
    """Each operation has a registered rule."""
    model, batch = new(architecture), architecture.data()
    for loss, _ in architecture.losses:
        start = torch.get_rng_state()
        _, wanted = by_autograd(copy.deepcopy(model), loss, batch)
        torch.set_rng_state(start)
        asked = leaves(model, batch)
        forget(asked)
        with te.record(strict=True):
            result = loss(model, *batch)
        te.backward(result)
        compare(asked, wanted)


@every
def test_replay_on_another_batch(architecture: Architecture) -> None:
    """A tape that was recorded on one batch gives the loss and the gradients of others, and their side effects.

    Of code that makes its shapes by the batch it is refused, before anything was written.
    """
    model = new(architecture)
    for loss, _ in architecture.losses:
        first = architecture.data()
        before = copy.deepcopy(model.state_dict())
        with te.record() as tape:
            result = loss(model, *first)
        program = tape.program(inputs=first, outputs=result)
        model.load_state_dict(before)
        for _ in range(3):
            batch = architecture.data()
            start = torch.get_rng_state()
            theirs = copy.deepcopy(model)
            expected, wanted = by_autograd(theirs, loss, batch)
            state = torch.get_rng_state()

            torch.set_rng_state(start)
            asked = leaves(model, batch)
            forget(asked)
            if architecture.decides:
                with pytest.raises(te.GuardError, match="depends on the elements comes out differently"):
                    program.step(*batch)
                assert not any(g_of(t) is not None for t in asked.values())
                return
            close(program.step(*batch), expected, 1e-9)
            assert torch.equal(torch.get_rng_state(), state), "the random stream differs"
            compare(asked, wanted)
            same_buffers(model, theirs, 1e-9)
            step(model, {name: g_of(p) for name, p in model.named_parameters()})


def test_a_scan_that_writes_over_its_state() -> None:
    """Torch refuses to differentiate a state that is written over step by step; its twin makes new ones."""

    def scan(x: Tensor, decay: Tensor, mix: Tensor, *, in_place: bool) -> Any:
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            if in_place:
                h.mul_(decay.sigmoid()).add_(x[:, t]).tanh_()
            else:
                h = torch.tanh(h * decay.sigmoid() + x[:, t])
            out.append(h * mix)
        return torch.stack(out).pow(2).sum()

    given = [torch.randn(2, 6, 3, dtype=torch.float64), *torch.randn(2, 3, dtype=torch.float64)]
    tracked = [t.clone().requires_grad_() for t in given]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(scan(*tracked, in_place=True), tracked)
    wanted = torch.autograd.grad(scan(*tracked, in_place=False), tracked)
    with te.record():
        C = scan(*given, in_place=True)
    te.backward(C)
    for t, reference in zip(given, wanted, strict=True):
        close(g_of(t), reference)
