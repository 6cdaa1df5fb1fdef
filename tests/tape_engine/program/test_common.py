"""Common subexpressions: what is computed twice is computed once, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tape_engine as te
from tests.tape_engine.program.common import draw, follows, freeze, ran

Tensor = torch.Tensor


def counts(program: te.Program) -> dict[str, int]:
    """How often each operation stands in a program, forward and in the sweep."""
    found: dict[str, int] = {}
    for node in (*program._frozen.forward, *program._frozen.backward):
        found[node.op.name] = found.get(node.op.name, 0) + 1
    return found


def test_the_sweep_uses_what_the_forward_pass_has_computed() -> None:
    """The gradient of sin is a cosine, which the code has taken already."""
    x = draw(5)

    def code(x: Tensor) -> Tensor:
        return (x.sin() * x.cos()).sum()

    program = freeze(code, [x], backend="python")
    assert counts(program)["cos"] == 1
    assert counts(program)["sin"] == 1
    follows(program, code, [draw(5)])
    assert ran(lambda: program.step(x)).names.count("cos") == 1


@pytest.mark.parametrize("backend", ["python", "native"])
@pytest.mark.parametrize(
    "code",
    [
        lambda x, w: ((x @ w.t()).tanh() @ w.t() + (x @ w.t()).exp()).sum(),
        lambda x, w: (x.clone() * x.clone() + x.mul(2) * x.mul(2.0)).sum() + w.sum(),
        lambda x, w: torch.stack([(x * w).sum(), (x * w).sum(), (w * x).sum()]).prod(),
        lambda x, w: x.masked_fill(x > 0, 0).sum() + w.masked_fill(x > 0, 1).sum(),
        lambda x, w: torch.cat([x.t(), x.t()]).std() * w.norm(),
        lambda x, w: (x.softmax(0) * x.softmax(1) * w.softmax(0)).sum(),
    ],
)
def test_results_are_those_of_torch(code: Callable[..., Any], backend: str) -> None:
    x, w = draw(4, 4), draw(4, 4)
    follows(freeze(code, [x], [w], backend=backend), code, [draw(4, 4)], [w])


def test_equal_results_have_memory_of_their_own() -> None:
    x = draw(3)
    program = freeze(lambda x: (x.sin(), x.sin(), x + 0, x + 0), [x])
    made = program(x)
    assert len({t.untyped_storage().data_ptr() for t in made}) == 4
    made[0].zero_()
    assert torch.equal(made[1], x.sin())
    made = program.step(x, seed=torch.ones(3, dtype=x.dtype))
    assert len({t.untyped_storage().data_ptr() for t in made}) == 4

    a, b = draw(3), draw(3)
    program = freeze(lambda a, b: (a + b).sum(), [a, b])
    program.step(a, b)
    assert a.g.data_ptr() != b.g.data_ptr()  # type: ignore[attr-defined]


def test_numbers_of_another_type_are_other_numbers() -> None:
    x = torch.arange(4)
    program = freeze(lambda x: (x * 1, x * 1.0, x * True, x / 2, x // 2), [x], backend="python")
    for got, wanted in zip(program(x), (x * 1, x * 1.0, x * True, x / 2, x // 2), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_zeros_of_either_sign_are_two() -> None:
    x = draw(3).abs()
    program = freeze(lambda x: (x * 0.0, x * -0.0), [x], backend="python")
    plus, minus = program(x)
    assert not plus.signbit().any()
    assert minus.signbit().all()


def test_random_numbers_are_drawn_each_time() -> None:
    x = draw(100)
    program = freeze(lambda x: (torch.rand_like(x), torch.rand_like(x)), [x], backend="python")
    torch.manual_seed(3)
    a, b = program(x)
    torch.manual_seed(3)
    assert torch.equal(a, torch.rand_like(x))
    assert torch.equal(b, torch.rand_like(x))


def test_a_value_that_is_written_over_is_another_one() -> None:
    x = draw(4)

    def code(x: Tensor) -> Tensor:
        y = x * 2
        a = y.exp()
        y[1:3] = 0
        b = y.exp()
        y[1:3] = 0
        return (a * b * y.exp()).sum()

    program = freeze(code, [x], backend="python")
    assert counts(program)["exp"] == 3
    follows(program, code, [draw(4)])


def test_a_live_tensor_that_unseen_code_may_change_is_read_again() -> None:
    state = draw(3)

    @te.op
    def moved(x: Tensor) -> Tensor:
        with torch.no_grad():
            state.add_(float(x.sum()))  # a body that leaves torch is left whole
        return x * 1

    @moved.rule
    def moved_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g

    x = draw(3)
    program = freeze(lambda x: moved(x), [x], backend="python")
    assert program(x).shape == (3,)


def test_guards_stay() -> None:
    x = draw(3).abs()

    def code(x: Tensor) -> Tensor:
        first = x.sin() if x.sum() > 0 else x.cos()
        return first if x.sum() > 0 else x.tan()

    program = freeze(code, [x], backend="python")
    assert counts(program)["sum"] == 1
    assert program.code.count("guard(") == 2
    with pytest.raises(te.GuardError):
        program(-x)
