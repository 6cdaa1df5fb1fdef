"""Lifetimes: buffers share memory where they are not needed at one time, and nowhere else."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import tape_engine as te
from tape_engine.program.lifetimes import Lifetimes, periods, released, stretches
from tape_engine.tape import Value
from tests.helpers import close, g_of
from tests.tape_engine.program.common import draw, follows, freeze

Tensor = torch.Tensor


def plain_g(tensor: Tensor) -> Tensor:
    """``.g`` itself, not a copy."""
    found: Tensor = vars(tensor)["g"]
    return found


def value(*shape: int, dtype: torch.dtype = torch.float32) -> Value:
    return Value(torch.empty(shape, dtype=dtype))


def test_memory_passes_on_when_nobody_reads_it_any_more() -> None:
    a, b, c, d = (value(100) for _ in range(4))
    life = Lifetimes()
    life.make(a)
    life.step = 1  # b from a
    life.touch(a)
    life.make(b)
    life.step = 2  # c from b: a's memory is free, b's not yet
    life.touch(b)
    life.make(c)
    life.step = 3
    life.touch(c)
    life.make(d)
    found = stretches([a, b, c, d], life)
    assert found[a] is found[c]
    assert found[b] is found[d]
    assert found[a] is not found[b]


def test_a_view_keeps_what_it_looks_into() -> None:
    a, view, b = value(100), value(100), value(100)
    life = Lifetimes()
    life.make(a)
    life.view(view, [a])
    life.step = 1
    life.make(b)
    life.step = 2
    life.touch(view)
    found = stretches([a, b], life)
    assert found[a] is not found[b]


def test_an_operand_that_dies_is_written_over() -> None:
    a, b = value(100), value(100)
    life = Lifetimes()
    life.make(a)
    life.step = 1
    life.touch(a)
    life.make(b, life.operands(b, [a]))
    found = stretches([a, b], life)
    assert found[a] is found[b]
    life.step = 2
    life.touch(a)  # it lives on
    found = stretches([a, b], life)
    assert found[a] is not found[b]


@pytest.mark.parametrize("other", [value(100, dtype=torch.float64), value(10, 10), value(1)])
def test_only_an_operand_of_the_same_description_is(other: Value) -> None:
    life = Lifetimes()
    life.make(other)
    assert life.operands(value(100), [other]) == []


def test_an_operand_is_not_written_over_under_the_eyes_of_another() -> None:
    a, turned = value(10, 10), value(10, 10)
    life = Lifetimes()
    life.make(a)
    life.view(turned, [a])
    assert life.operands(value(10, 10), [a, turned]) == []
    assert life.operands(value(10, 10), [a, a]) == [a, a]


def test_the_second_operand_is_written_over_where_the_first_lives_on() -> None:
    a, b, c = value(100), value(100), value(100)
    life = Lifetimes()
    life.make(a)
    life.make(b)
    life.step = 1
    life.touch(a)
    life.touch(b)
    life.make(c, life.operands(c, [a, b]))
    life.step = 2
    life.touch(a)
    found = stretches([a, b, c], life)
    assert found[c] is found[b]
    assert found[c] is not found[a]


def test_memory_is_free_once_where_nobody_reads_what_is_written_over_an_operand() -> None:
    a, b, c, d = (value(100) for _ in range(4))
    life = Lifetimes()
    life.make(a)
    life.step = 1  # b over a, and nobody reads it: both are needed no more after this step
    life.touch(a)
    life.make(b, [a])
    life.step = 2
    life.make(c)
    life.step = 3
    life.make(d)
    life.step = 4
    life.touch(c)
    life.touch(d)
    found = stretches([a, b, c, d], life)
    assert found[a] is found[b] is found[c]
    assert found[c] is not found[d]


def test_a_result_that_is_written_over_before_it_is_read_lends_its_memory_once() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w) / 3
        z = x * w
        y.copy_(x.sin())  # the quotient is never read
        return z.square().sum() + y.sum()

    x, w = draw(3, 3), draw(3, 3)
    follows(freeze(function, [x], [w], backend="python"), function, [draw(3, 3)], [w])


def test_what_code_may_have_kept_is_never_passed_on() -> None:
    a, b = value(100), value(100)
    life = Lifetimes()
    life.make(a)
    life.keep([a])
    life.step = 2
    life.make(b)
    found = stretches([a, b], life)
    assert found[a] is not found[b]


def test_what_code_may_have_kept_is_never_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks into it would look into memory that is gone."""
    monkeypatch.setattr("tape_engine.program.lifetimes.FULL", 0)
    monkeypatch.setattr("tape_engine.program.lifetimes.ROOM", (1, 1 << 25))
    for held in (False, True):
        a = value(8)
        life = Lifetimes(step=2)
        life.make(a)
        life.touch(a)
        if held:
            life.keep([a])
        life.step = 3
        parts = list(periods(stretches([a], life), life).values())
        assert released(parts, [(1, 1, 1000)], life.step) == ([] if held else parts)


def test_memory_far_too_large_is_not_taken() -> None:
    a, b, c = value(10_000), value(10), value(8_000)
    life = Lifetimes()
    life.make(a)
    life.step = 1
    life.make(b)
    life.step = 2
    life.make(c)
    found = stretches([a, b, c], life)
    assert found[b] is not found[a]
    assert found[c] is found[a]
    assert found[a].size == 40_000


def test_a_chain_of_any_length_takes_the_memory_of_a_few() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(40):
            x = torch.sin(x)
        return x

    x = draw(1000)
    program = freeze(chain, [x], backend="python")
    assert program._forward.source.kept <= 2 * 8000
    assert len(program._forward.source.buffers) == 39
    follows(program, chain, [draw(1000)], seed=torch.ones(1000, dtype=torch.float64))


def test_what_an_operation_takes_for_itself_is_let_go() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU()).double()
    x = draw(4, 1, 20, 20)
    program = freeze(lambda x: net(x).sum(), [x], backend="python", wrt=list(net.parameters()))
    assert "del " in program.code
    leaf = x.clone()
    expected = torch.autograd.grad(net(leaf).sum(), list(net.parameters()))
    program.step(x)
    for parameter, g in zip(net.parameters(), expected, strict=True):
        close(g_of(parameter), g, 1e-9)


@pytest.mark.parametrize("backend", ["python", "auto"])
def test_what_is_read_at_the_very_end_is_not_let_go(backend: str) -> None:
    """A result that looks into a buffer is copied where the function returns; what else is large goes before."""
    w, v = torch.randn(256, 1024) / 16, torch.randn(1024, 1024) / 32

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        h = ((x @ w).sin() @ v).tanh()
        return h.cos().exp().mean(), h.t()

    x = torch.randn(512, 256)
    with te.record() as tape:
        outputs = function(x)
    program = tape.program(inputs=(x,), outputs=outputs, backend=backend)
    for _ in range(2):
        x = torch.randn(512, 256)
        for got, wanted in zip(program(x), function(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_results_in_memory_of_an_operations_own_are_handed_over() -> None:
    x, w = draw(2, 3, 8, 8), draw(4, 3, 3, 3)
    program = freeze(lambda x, w: torch.conv2d(x, w).sum(), [x], [w], backend="python", wrt=[w])
    assert "own(" in program.code
    held = []
    for _ in range(3):
        program.step(x)
        held.append(plain_g(w))
    assert len({g.data_ptr() for g in held}) == 3
    for g in held:
        close(g, held[0])


def test_two_results_of_one_memory_are_parted() -> None:
    torch.manual_seed(0)
    net = nn.LSTM(3, 4)  # its kernel returns one tensor as the gradient of two biases
    x = torch.randn(5, 2, 3)
    program = freeze(lambda x: net(x)[0].sum(), [x], wrt=list(net.parameters()), backend="python")
    program.step(x)
    gradients = [plain_g(p) for p in net.parameters()]
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)
    gc.collect()


@te.op
def stashed(x: Tensor) -> Tensor:
    KEPT.append(x)
    return torch.mul(x, float(x.sum() > -1e9))


@stashed.rule
def stashed_grad(g, out, x):  # type: ignore[no-untyped-def]
    return g * KEPT[-1]


KEPT: list[Tensor] = []


def test_python_code_may_keep_what_it_was_given() -> None:
    def function(x: Tensor) -> Tensor:
        y: Tensor = stashed(torch.sin(x))
        for _ in range(5):
            y = torch.cos(y)
        return y.sum()

    x = draw(2000)
    program = freeze(function, [x], backend="python")
    x = draw(2000)
    program(x)
    close(KEPT[-1], torch.sin(x))
    KEPT.clear()
