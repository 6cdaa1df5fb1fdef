"""After a tape was frozen: plain torch beside the program does not pay for it, and no gradient is cut in silence."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine.recorder import Recorded
from tests.helpers import close, g_of
from tests.tape_engine.program.common import counted, draw

Tensor = torch.Tensor


def listens(tensor: Tensor) -> bool:
    return isinstance(tensor, Recorded)


def frozen(x: Tensor, w: Tensor) -> tuple[Any, Tensor, te.Program]:
    """A tape that lives on, its output, and its program."""
    with te.record() as tape:
        C = (x @ w).tanh().sum()
    return tape, C, tape.program(inputs=(x,), outputs=C)


def test_plain_training_beside_a_program_runs_hardly_a_line_of_ours() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x = torch.randn(8, 4)

    def step() -> None:
        net(x).square().mean().backward()

    with te.record() as tape:
        C = net(x).square().mean()
    step()
    with counted() as waiting:
        step()
    program = tape.program(inputs=x, outputs=C)
    with counted() as lines:
        step()
    assert lines[0] * 10 < waiting[0]
    assert lines[0] < 100
    assert not any(listens(p) for p in net.parameters())
    assert program(x).shape == ()


def test_a_gradient_through_what_required_one_of_torch_s_says_so() -> None:
    x, w = draw(3, 2), draw(2, 2).requires_grad_()
    _tape, C, _ = frozen(x, w)
    D = C + (w * w).sum()
    with pytest.raises(te.NotRecordedError, match="was computed by torch operations outside the recording") as caught:
        te.backward(D)
    assert "inside `with te.record():`" in str(caught.value)
    assert g_of(w) is None


def test_a_gradient_through_what_did_not_is_followed() -> None:
    x, w = draw(3, 2), draw(2, 2)
    _tape, C, _ = frozen(x, w)
    D = C + (w * w).sum()
    te.backward(D)
    p, q = x.clone().requires_grad_(), w.clone().requires_grad_()
    ((p @ q).tanh().sum() + (q * q).sum()).backward()  # type: ignore[no-untyped-call]
    close(g_of(w), q.grad)
    close(g_of(x), p.grad)


def test_data_that_met_a_parameter_of_torch_s_says_so() -> None:
    x, w = draw(3, 2), draw(2, 2)
    _tape, C, _ = frozen(x, w)
    other = draw(2, 2).requires_grad_()
    for y in (x @ other, (2 * x + 1) @ other):  # also by way of what was computed from the data alone
        assert not listens(y)
        assert y.grad_fn is not None
        with pytest.raises(te.NotRecordedError, match="outside the recording"):
            te.backward(C + y.sum(), keep=True)


def test_the_tape_can_still_be_swept() -> None:
    x, w = draw(3, 2), draw(2, 2).requires_grad_()
    _tape, C, program = frozen(x, w)
    program.step(x)
    wanted = g_of(w)
    te.backward(C)
    close(g_of(w), wanted)


def test_another_recording_makes_them_listen_again() -> None:
    x, w = draw(3, 2), draw(2, 2).requires_grad_()
    _tape, _C, _ = frozen(x, w)
    with te.record() as other:
        D = (x * w.sum()).sum()
    D = D + (w * w).sum() + (x * w.sum()).sum()
    te.backward(D)
    p, q = x.clone().requires_grad_(), w.detach().clone().requires_grad_()
    (2 * (p * q.sum()).sum() + (q * q).sum()).backward()  # type: ignore[no-untyped-call]
    close(g_of(w), q.grad)
    close(g_of(x), p.grad)
    assert len(other)


def test_a_tape_frozen_inside_its_block_rests_at_its_end() -> None:
    x, w = draw(3, 2), draw(2, 2).requires_grad_()
    with te.record() as tape:
        C = (x @ w).sum()
        tape.program(inputs=x, outputs=C)
    assert not listens(w)
    with te.record() as tape:
        C = (x @ w).sum()
        tape.program(inputs=x, outputs=C)
        D = C * 2  # the recording went on
    assert listens(w)
    te.backward(D + (w * w).sum())
    close(g_of(w), 2 * x.t().sum(1, keepdim=True).expand(2, 2) + 2 * w.detach())


def test_the_rest_ends_with_the_tape() -> None:
    x, w = draw(3, 2), draw(2, 2)
    tape, C, program = frozen(x, w)
    assert listens(x)
    del tape, C
    gc.collect()
    assert not listens(x)
    assert not listens(w)
    program.step(x)
    assert g_of(w) is not None


def test_a_sweep_ends_the_rest() -> None:
    x, w = draw(3, 2), draw(2, 2)
    _tape, C, _ = frozen(x, w)
    te.backward(C)
    assert not listens(x)


def test_two_programs_of_one_tape_and_of_two() -> None:
    x, w = draw(3, 2), draw(2, 2)
    tape, C, _ = frozen(x, w)
    tape.program(inputs=x, outputs=C)
    other, _, _ = frozen(x, w)
    parameter = draw(2, 2).requires_grad_()
    assert not listens(x @ parameter)
    del tape, C
    gc.collect()
    assert listens(x)
    del other, _
    gc.collect()
    assert not listens(x)


def test_writes_to_what_rests_are_updates() -> None:
    """``w -= lr * w.g`` on a leaf of a frozen tape: the next replay reads it, and the tape's own sweep is right."""
    x, w = draw(3, 2), draw(2, 2)
    _tape, C, program = frozen(x, w)
    program.step(x)
    wanted = g_of(w)
    assert wanted is not None
    before = w.clone()
    w -= 0.1 * wanted
    close(program(x), (x @ (before - 0.1 * wanted)).tanh().sum())
    te.backward(C)
    close(g_of(w), wanted)
