"""te.fill_grad: torch's optimizers, clipping and scaling, fed by .g, do what they do with torch.autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tape_engine as te

Tensor = torch.Tensor
STEPS = 6


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, dtype=torch.float64)
    return x, x.sum(1, keepdim=True).sin()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_torch_autograd(name: str) -> None:
    ours, (x, y) = model(), data()
    theirs = copy.deepcopy(ours)
    our_steps, their_steps = (OPTIMIZERS[name](each.parameters()) for each in (ours, theirs))
    for _ in range(STEPS):
        with te.record():
            C = (ours(x) - y).square().mean()
        te.backward(C)
        te.fill_grad(ours)
        our_steps.step()
        their_steps.zero_grad()
        (theirs(x) - y).square().mean().backward()
        their_steps.step()
    same(ours, theirs)
    assert not torch.equal(next(ours.parameters()), next(model().parameters()))


def test_lbfgs_with_its_closure() -> None:
    ours, (x, y) = model(), data()
    theirs = copy.deepcopy(ours)
    our_steps = torch.optim.LBFGS(ours.parameters(), line_search_fn="strong_wolfe", max_iter=5)
    their_steps = torch.optim.LBFGS(theirs.parameters(), line_search_fn="strong_wolfe", max_iter=5)

    def our_loss() -> float:
        with te.record():
            C = (ours(x) - y).square().mean()
        te.backward(C)
        te.fill_grad(our_steps)
        return float(C.detach())

    def their_loss() -> float:
        their_steps.zero_grad()
        C = (theirs(x) - y).square().mean()
        C.backward()
        return float(C.detach())

    for _ in range(3):
        our_steps.step(our_loss)  # type: ignore[no-untyped-call]
        their_steps.step(their_loss)  # type: ignore[no-untyped-call]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_clipping_leaves_g_as_the_sweep_gave_it() -> None:
    ours, (x, y) = model(), data()
    theirs = copy.deepcopy(ours)
    with te.record():
        C = (ours(x) - y).square().sum()
    te.backward(C)
    before = [p.g.clone() for p in ours.parameters()]  # type: ignore[attr-defined]
    te.fill_grad(ours.parameters())
    norm = torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
    (theirs(x) - y).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    torch.testing.assert_close(norm, expected)
    for p, q, g in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad)
        assert torch.equal(p.g, g)  # type: ignore[attr-defined]
        assert p.grad.untyped_storage().data_ptr() != p.g.untyped_storage().data_ptr()  # type: ignore[attr-defined]


def test_a_gradient_scaler_unscales_grad_and_skips_a_step_with_infinity() -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    steps = torch.optim.SGD([w], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.tensor([3.0, 4.0])
    with te.record():
        C = scaler.scale((w * x).sum())
    te.backward(C)
    te.fill_grad(steps)
    scaler.step(steps)
    scaler.update()
    torch.testing.assert_close(w.detach(), torch.tensor([1.0, 2.0]) - 0.1 * x)
    after = w.detach().clone()
    with te.record():
        C = scaler.scale((w * x * float("inf")).sum())
    te.backward(C)
    te.fill_grad(steps)
    scaler.step(steps)
    scaler.update()
    assert torch.equal(w.detach(), after)
    assert scaler.get_scale() == 512.0


def swept(*shapes: tuple[int, ...]) -> list[Tensor]:
    parameters = [torch.randn(shape) for shape in shapes]
    with te.record():
        C = sum((p * p).sum() for p in parameters)
    te.backward(C)  # type: ignore[arg-type]
    return parameters


def groups(parameters: list[Tensor]) -> Iterator[Any]:
    yield parameters
    yield tuple(parameters)
    yield iter(parameters)
    yield [("a", parameters[0]), ("b", parameters[1])]
    yield [{"params": [parameters[0]], "lr": 0.1}, {"params": iter(parameters[1:])}]
    yield {"params": parameters}
    yield torch.optim.SGD([("a", parameters[0]), ("b", parameters[1])], lr=0.1)


@pytest.mark.parametrize("which", range(7))
def test_it_takes_whatever_holds_parameters(which: int) -> None:
    parameters = swept((3,), (2, 2))
    te.fill_grad(list(groups(parameters))[which])
    for p in parameters:
        assert p.grad is not None
        assert torch.equal(p.grad, 2 * p)


def test_a_single_tensor_and_a_tied_one() -> None:
    (p,) = swept((3,))
    te.fill_grad(p)
    assert torch.equal(p.grad, 2 * p)  # type: ignore[arg-type]
    te.fill_grad([p, p], accumulate=True)  # the same tensor twice is one parameter
    assert torch.equal(p.grad, 4 * p)  # type: ignore[arg-type]


def test_nothing_stale_stays() -> None:
    p, unused = swept((3,), (2,))
    unused.grad = torch.ones(2)
    del unused.g  # type: ignore[attr-defined]
    te.fill_grad([p, unused])
    assert getattr(unused, "grad", 0) is None
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    frozen.grad = torch.ones(2)
    with te.record():
        C = (frozen * p[:2]).sum()
    te.backward(C)
    assert hasattr(frozen, "g")
    te.fill_grad([p, frozen])
    assert frozen.grad is None


def test_accumulation_adds_as_torch_does() -> None:
    ours, (x, y) = model(), data()
    theirs = copy.deepcopy(ours)
    for rows in (slice(0, 8), slice(8, 16)):
        with te.record():
            C = (ours(x[rows]) - y[rows]).square().mean()
        te.backward(C)
        te.fill_grad(ours, accumulate=True)
        (theirs(x[rows]) - y[rows]).square().mean().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    extra = torch.ones(2)
    extra.grad = torch.ones(2)
    te.fill_grad([*ours.parameters(), extra], accumulate=True)
    assert torch.equal(extra.grad, torch.ones(2))


def test_memory_is_taken_again_and_never_that_of_g() -> None:
    (p,) = swept((3,))
    te.fill_grad([p])
    kept = p.grad
    with te.record():
        C = (p * 5).sum()
    te.backward(C)
    te.fill_grad([p])
    assert p.grad is kept
    assert torch.equal(kept, torch.full((3,), 5.0))  # type: ignore[arg-type]
    p.grad = p.g  # type: ignore[attr-defined]
    te.fill_grad([p])
    assert p.grad is not p.g  # type: ignore[attr-defined]
    te.fill_grad([p], accumulate=True)
    assert torch.equal(p.g, torch.full((3,), 5.0))  # type: ignore[attr-defined]
    assert torch.equal(p.grad, torch.full((3,), 10.0))


def test_nothing_is_recorded() -> None:
    (p,) = swept((3,))
    with te.record() as tape:
        te.fill_grad([p])
        te.fill_grad([p], accumulate=True)
    assert len(tape) == 0
    assert len(te.global_tape()) == 0


def test_errors_change_nothing() -> None:
    p, q = swept((3,), (2,))
    q.g = torch.ones(3)  # type: ignore[attr-defined]
    with pytest.raises(te.ShapeError, match=r"te.fill_grad: the \.g of q is not of its shape, dtype and device"):
        te.fill_grad([p, q])
    assert p.grad is None
    q.g = "gradient"  # type: ignore[attr-defined]
    with pytest.raises(te.DTypeError, match=r"the \.g of q is str, not a tensor"):
        te.fill_grad([p, q])
    fresh = torch.randn(2, 3)
    with pytest.raises(te.NotRecordedError, match=r"none of the 1 parameters has \.g yet") as none:
        te.fill_grad([fresh])
    assert "fresh    (2, 3)  float32" in str(none.value)
    assert "fix: call te.backward(C) first" in str(none.value)
    made = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(te.DTypeError, match="torch computed made, so it is no parameter"):
        te.fill_grad([made])
    for wrong in (3, "weights", [3], {"lr": 0.1}):
        with pytest.raises(te.DTypeError, match=r"te\.fill_grad takes a module, an optimizer or an iterable"):
            te.fill_grad(wrong)
    te.fill_grad([])
