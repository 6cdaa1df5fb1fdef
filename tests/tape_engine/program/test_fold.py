"""Constants: what is computed once, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tape_engine as te
from tape_engine.program.passes import drop_dead, fold_constants
from tests.helpers import close, plain, unshared
from tests.tape_engine.program.common import F64, draw, follows, freeze, ran

Tensor = torch.Tensor


def folded(program: te.Program, *, with_sweep: bool = False) -> list[str]:
    nodes = drop_dead(program._frozen, with_sweep=with_sweep)
    once = fold_constants(program._frozen, nodes)
    return [node.op.name for node in nodes if node in once]


def causal(x: Tensor, w: Tensor) -> Tensor:
    mask = torch.ones(3, 3).tril() == 0
    return (x @ w).masked_fill(mask, float("-inf")).softmax(-1).square().sum()


def positions(x: Tensor, w: Tensor) -> Tensor:
    angle = torch.arange(3, dtype=F64)[:, None] * torch.linspace(0, 1, 3, dtype=F64)
    return ((x + angle.sin()) @ w).square().sum()


def like(x: Tensor, w: Tensor) -> Tensor:
    return (x * torch.ones_like(x) * 2 + torch.full_like(w, 3.0) @ w + x.new_zeros(3)).sum()


def filled(x: Tensor, w: Tensor) -> Tensor:
    table = torch.zeros(3, 3, dtype=F64)
    table[0] = 1
    table[:, 1] += 2
    return ((table @ x) @ w).square().sum()


@pytest.mark.parametrize("function", [causal, positions, like, filled], ids=lambda f: f.__name__)
def test_constants_are_computed_once(function: Callable[..., Tensor]) -> None:
    x, w = draw(3, 3), draw(3, 3)
    program = freeze(function, [x], [w])
    made = {"ones", "tril", "eq", "arange", "linspace", "sin", "ones_like", "full_like", "new_zeros", "zeros", "copy"}
    assert not made & set(ran(lambda: program.step(x)).names) - ({"eq"} if function is like else set())
    for _ in range(2):
        follows(program, function, [draw(3, 3)], [w])
        w += 0.1


def test_what_depends_on_inputs_live_tensors_or_chance_is_not() -> None:
    x, w = draw(3), draw(3)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return x * (w * 2) + torch.rand(3, dtype=F64) * torch.arange(3, dtype=F64)

    assert folded(freeze(function, [x], [w])) == ["arange"]


def test_live_constants_are_read_anew() -> None:
    scale = torch.ones(3, dtype=F64)
    program = freeze(lambda x: x * (scale * 2).sum(), [draw(3)])
    x = draw(3)
    close(program(x), x * 6)
    scale.fill_(2)
    close(program(x), x * 12)


def test_a_constant_as_an_output_belongs_to_the_caller() -> None:
    x = draw(3)
    with te.record() as tape:
        mask = torch.arange(3, dtype=F64) * 2
        y, part = x * mask, mask[1:]
    program = tape.program(inputs=x, outputs=(y, mask, part))
    first = program(x)
    unshared(*first)
    for t in first:
        t.fill_(float("nan"))
    y, mask, part = program(x)
    wanted = torch.tensor([0.0, 2.0, 4.0], dtype=F64)
    close(mask, wanted)
    close(part, wanted[1:])
    close(y, x * wanted)


def test_a_program_of_constants_alone() -> None:
    with te.record() as tape:
        y = torch.arange(4).sum() * torch.tensor(2)
    program = tape.program(outputs=y)
    assert program() == 12
    assert program() == 12


def test_a_constant_written_to_in_place_starts_anew_each_time() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        total = torch.zeros(3, dtype=F64)
        total += x
        total *= w
        return total.sum()

    x, w = draw(3), draw(3)
    program = freeze(function, [x], [w])
    for _ in range(3):
        follows(program, function, [draw(3)], [w])


def test_a_tensor_of_numbers_starts_anew_each_time() -> None:
    def function(x: Tensor) -> Tensor:
        total = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
        total += x
        return total

    x = draw(3)
    program = freeze(function, [x])
    for _ in range(3):
        x = draw(3)
        got = program(x)
        close(got, function(x))
        got.zero_()


def test_the_number_in_a_description_is_that_of_the_recording() -> None:
    x = draw(4, 3)
    program = freeze(lambda x: x.sum() / x.shape[0] + x.numel() + len(x), [x])
    x = draw(4, 3)
    close(program(x), x.sum() / 4 + 16)


def test_folding_happens_for_each_copy_of_the_function() -> None:
    """Threads share no constant that one of them might be writing while another reads."""
    x = draw(3)
    program = freeze(lambda x: x * torch.arange(3, dtype=F64), [x])
    kept = [plain(program(x)) for _ in range(3)]
    for t in kept:
        close(t, x * torch.arange(3, dtype=F64))
