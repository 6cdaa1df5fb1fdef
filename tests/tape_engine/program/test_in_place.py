"""Writes in place: a buffer filled part by part costs its parts, and what still has to be read is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tape_engine as te
from tests.tape_engine.program.common import draw, follows, freeze

Tensor = torch.Tensor
BACKENDS = ("python", "native")


def filled_by_rows(x: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    for i in range(len(x)):
        buffer[i] = x[i] * (i + 1)
    return (buffer * buffer).sum()


def running(x: Tensor) -> Tensor:
    """Each write reads what the one before has written."""
    state = torch.zeros_like(x)
    for i in range(1, len(x)):
        state[i] = (state[i - 1] * 0.5 + x[i]).tanh()
    return state.square().sum()


def added_by_slices(x: Tensor) -> Tensor:
    total = x * 0
    for i in range(len(x) - 1):
        total[i : i + 2] += x[i : i + 2].sin()
    return total.cos().sum()


def put_by_indices(x: Tensor) -> Tensor:
    index = torch.tensor([0, 2])
    buffer = x * 0
    for i in range(4):
        buffer[index] = x[i : i + 2] * (i + 1)
        buffer.index_add_(0, index, x[:2])
        buffer.scatter_(0, torch.zeros(1, 3, dtype=torch.int64), x[:1])
        buffer.index_copy_(0, torch.tensor([4]), x[i : i + 1].exp())
        buffer.index_fill_(1, torch.tensor([1]), 0.5)
    return (buffer * x).sum()


def old_values_read_later(x: Tensor) -> Tensor:
    buffer = x * 1
    kept = []
    for i in range(len(x)):
        kept.append(buffer.exp())  # reads before the write
        before = buffer * 1
        view = buffer[0]
        buffer[i] = x[i].sin()
        kept += [before, view * 2, buffer.tanh()]
    return torch.stack([each.sum() for each in kept]).square().sum()


def shifted_over_itself(x: Tensor) -> Tensor:
    buffer = x * 1
    for _ in range(3):
        buffer[1:] = buffer[:-1].clone()
        buffer[:, 0] = buffer[:, 1]
        buffer += buffer.t().t() * 0.5
    return buffer.square().sum()


def returned_states(x: Tensor) -> tuple[Tensor, ...]:
    buffer = x * 1
    found = []
    for i in range(3):
        buffer[i] = i
        found.append(buffer.clone() if i == 1 else buffer)
    return (buffer.exp().sum(), *found)


def through_columns_and_diagonals(x: Tensor) -> Tensor:
    buffer = torch.ones_like(x)
    for i in range(3):
        buffer[:, i] *= x[:, i]
        buffer.diagonal().add_(x[0, i])
        buffer.t()[i].mul_(2)
    return buffer.log1p().sum()


CODES = [
    filled_by_rows,
    running,
    added_by_slices,
    put_by_indices,
    old_values_read_later,
    shifted_over_itself,
    returned_states,
    through_columns_and_diagonals,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code", CODES)
def test_results_are_those_of_torch(code: Callable[[Tensor], Tensor], backend: str) -> None:
    program = freeze(code, [draw(6, 3).abs()], backend=backend)
    for _ in range(3):
        follows(program, code, [draw(6, 3).abs()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_live_tensor_is_written_at_the_end_alone(backend: str) -> None:
    state, x = draw(5), draw(5)

    def code(x: Tensor) -> Tensor:
        for i in range(5):
            state[i] = state[i] * 0.5 + x[i]
        return state.sum() if x.sum() < 100 else state.prod()

    start = state.clone()
    program = freeze(code, [x], backend=backend)
    with torch.no_grad():
        state.copy_(start)
    program(x)
    torch.testing.assert_close(state, start * 0.5 + x)
    with pytest.raises(te.GuardError):
        program(x + 100)
    torch.testing.assert_close(state, start * 0.5 + x)


def moved(program: te.Program, *inputs: Tensor) -> int:
    """The bytes that a replay reads and writes, by its profile."""
    return sum(row.bytes_read + row.bytes_written for row in program.profile(*inputs, repeats=1).rows)


@pytest.mark.slow
@pytest.mark.parametrize("code", [filled_by_rows, running, added_by_slices])
def test_n_writes_move_bytes_in_proportion_to_n(code: Callable[[Tensor], Tensor]) -> None:
    """Forward and in the sweep; copying the buffer at each write would be four times the bytes for twice the writes."""
    few, many = (moved(freeze(code, [draw(n, 16)], backend="python"), draw(n, 16)) for n in (40, 80))
    assert many < 2.5 * few


def test_a_part_that_is_read_in_the_sweep_is_spared() -> None:
    """The gradient of what was written is read before its place is set to zero."""
    x = draw(4)

    def code(x: Tensor) -> Tensor:
        y = x * 2
        y[0] = y[1].clone() * y[2].clone()
        y[1] = y[0].clone() * y[3].clone()
        return (y * torch.arange(4.0, dtype=y.dtype)).sum()

    follows(freeze(code, [x], backend="python"), code, [draw(4)])


def test_second_derivatives_through_writes() -> None:
    x = draw(4)

    def code(x: Tensor) -> Tensor:
        y = x * 1
        for i in range(3):
            y[i + 1] = y[i].clone() * x[i + 1].sin()
        return (y * y).sum()

    with te.record():
        (first,) = te.grad(code(x), [x], record=True)
        (second,) = te.grad(first.square().sum(), [x])  # type: ignore[union-attr]
    p = x.clone().requires_grad_()
    (q,) = torch.autograd.grad(code(p), p, create_graph=True)
    (wanted,) = torch.autograd.grad(q.square().sum(), p)
    torch.testing.assert_close(second, wanted)
