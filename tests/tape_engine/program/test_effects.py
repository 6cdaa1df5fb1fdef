"""Effects of the recorded code, which happen on each replay: counters, running statistics, writes through views."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tape_engine as te
from tests.helpers import close, g_of, plain
from tests.tape_engine.program.common import F64, draw, follows, freeze

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    te.global_tape().clear()
    yield
    assert te.current_tape() is te.global_tape()


# -- effects happen on each replay ---------------------------------------------------------------------------


def test_counter() -> None:
    n, x = torch.zeros((), dtype=torch.int64), draw(3)
    with te.record() as tape:
        n.add_(1)
        y = x * n
    program = tape.program(inputs=x, outputs=y)
    assert n == 1
    close(program(x), x * 2)
    close(program.step(x, seed=torch.ones(3, dtype=F64)), x * 3)
    close(g_of(x), torch.full((3,), 3.0, dtype=F64))
    assert n == 3


def test_counter_that_nothing_reads() -> None:
    n, x = torch.zeros(()), draw(3)
    with te.record() as tape:
        y = x * 2
        n.add_(1)
    program = tape.program(inputs=x, outputs=y)
    program(x)
    program(x)
    assert n == 3


def test_counter_under_no_grad() -> None:
    n, x = torch.zeros(()), draw(3)
    with te.record() as tape:
        with torch.no_grad():
            n.add_(1)
        y = x * n
    program = tape.program(inputs=x, outputs=y)
    close(program(x), x * 2)
    assert n == 2


def test_running_mean() -> None:
    mean, x = torch.zeros(2, dtype=F64), draw(5, 2)

    def function(x: Tensor, mean: Tensor) -> Tensor:
        mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return (x - mean).square().sum()

    program = freeze(function, [x], [mean])
    expected = plain(mean)
    for _ in range(5):
        x = draw(5, 2)
        wanted = function(x, expected)
        close(program(x), wanted)
        close(mean, expected)


def test_old_contents_are_read_where_they_were_read() -> None:
    """`y` reads the state before the write, `z` after it; both have their gradients."""
    state = draw(3)

    def function(x: Tensor, state: Tensor) -> Tensor:
        y = x * state
        state.add_(x.detach())
        z = x * state
        return (y * z).sum()

    program = freeze(function, [draw(3)], [state])
    for _ in range(3):
        x, before = draw(3), plain(state)
        tracked = x.clone().requires_grad_()
        mine = before.clone()
        y = tracked * before
        mine += x
        (wanted,) = torch.autograd.grad((y * (tracked * mine)).sum(), tracked)
        program.step(x)
        close(state, mine)
        close(g_of(x), wanted)


def test_writes_to_an_input() -> None:
    def function(x: Tensor) -> Tensor:
        x.add_(1)
        return (x * x).sum()

    program = freeze(function, [draw(3)])
    x, mine = torch.arange(3.0, dtype=F64), torch.arange(3.0, dtype=F64)
    close(program(x), function(mine))
    close(x, mine)
    close(program.step(x), function(mine))
    close(x, mine)
    close(g_of(x), 2 * mine)


@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_writes_to_an_input_of_other_strides(layout: str) -> None:
    def function(x: Tensor) -> Tensor:
        x[0].mul_(3)
        return x.sum()

    program = freeze(function, [draw(2, 3)])
    x = torch.ones(2, 6, dtype=F64)[:, ::2] if layout == "strided" else torch.ones(3, 2, dtype=F64).t()
    close(program(x), torch.tensor(12.0, dtype=F64))
    close(x, torch.tensor([[3.0] * 3, [1.0] * 3], dtype=F64))


def test_views_written_through() -> None:
    buffer = torch.zeros(4, 3, dtype=F64)

    def function(x: Tensor, buffer: Tensor) -> Tensor:
        buffer[1].copy_(x)
        buffer[:, 2].add_(1)
        buffer.view(-1)[0] = 5
        return (buffer * buffer).sum()

    program = freeze(function, [draw(3)], [buffer])
    expected = plain(buffer)
    for _ in range(3):
        x = draw(3)
        close(program(x), function(x, expected))
        close(buffer, expected)


def test_two_live_tensors_swapped() -> None:
    a, b = draw(3), draw(3)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        old = a.clone()
        a.copy_(b)
        b.copy_(old)
        return x + a

    program = freeze(function, [draw(3)], [a, b])
    first, second = plain(a), plain(b)
    x = draw(3)
    close(program(x), x + second)
    close(a, second)
    close(b, first)


def test_one_live_tensor_copied_onto_another() -> None:
    """As a target network follows: the source is written to as well, in the same code."""
    a, b = draw(3), draw(3)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a.copy_(b)
        b.add_(1)
        return x * a

    program = freeze(function, [draw(3)], [a, b])
    mine = plain(a), plain(b)
    for _ in range(2):
        x = draw(3)
        close(program(x), function(x, *mine))
        close(a, mine[0])
        close(b, mine[1])


def test_a_write_to_a_view_that_was_made_before() -> None:
    base = torch.zeros(2, 3, dtype=F64)
    row = base[1]
    with te.record() as tape:
        row.add_(1)
        y = base.sum()
    program = tape.program(outputs=y)
    close(program(), torch.tensor(6.0, dtype=F64))
    close(base, torch.tensor([[0.0] * 3, [2.0] * 3], dtype=F64))


def test_out_argument_onto_a_live_tensor() -> None:
    kept = torch.zeros(3, dtype=F64)

    def function(x: Tensor, kept: Tensor) -> Tensor:
        torch.mul(x, 2, out=kept)
        return kept.sum()

    program = freeze(function, [draw(3)], [kept])
    x = draw(3)
    close(program(x), (2 * x).sum())
    close(kept, 2 * x)


def test_batch_norm_called_twice() -> None:
    net = nn.BatchNorm1d(3, momentum=0.5).double()
    twin = copy.deepcopy(net)
    x = draw(5, 3)
    with te.record() as tape:
        y = net(net(x) * 2).square().sum()
    twin(twin(x) * 2)
    program = tape.program(inputs=x, outputs=y)
    for _ in range(3):
        x = draw(5, 3)
        close(program(x), twin(twin(x) * 2).square().sum().detach())
        for a, b in zip(net.buffers(), twin.buffers(), strict=True):
            close(a, b)


def test_batch_norm_whose_output_is_not_asked_for() -> None:
    """Running the code would move its statistics all the same."""
    net = nn.BatchNorm1d(3).double()
    twin = copy.deepcopy(net)
    x = draw(5, 3)
    with te.record() as tape:
        net(x)
        y = x.sum()
    program = tape.program(inputs=x, outputs=y)
    twin(x)
    program(x)
    twin(x)
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        close(a, b)


def test_batch_norm_in_eval_mode_moves_nothing() -> None:
    net = nn.BatchNorm1d(3).double().eval()
    before = [plain(b) for b in net.buffers()]
    follows(freeze(lambda x: net(x).square().sum(), [draw(5, 3)]), lambda x: net(x).square().sum(), [draw(5, 3)])
    for a, b in zip(net.buffers(), before, strict=True):
        assert torch.equal(a, b)
