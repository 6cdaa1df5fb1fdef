"""Dead nodes: what is left out of a replay, and what must stay."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tape_engine as te
from tape_engine.program.passes import drop_dead
from tests.helpers import close
from tests.tape_engine.program.common import F64, draw, freeze

Tensor = torch.Tensor


def left(program: te.Program, *, with_sweep: bool = False) -> list[str]:
    return [node.op.name for node in drop_dead(program._frozen, with_sweep=with_sweep)]


def test_order_is_kept() -> None:
    program = freeze(lambda x: (x * 2).exp().sum(), [draw(3)])
    assert left(program) == ["mul", "exp", "sum"]
    nodes = drop_dead(program._frozen, with_sweep=True)
    assert [node.op.name for node in nodes][:3] == ["mul", "exp", "sum"]
    assert len(nodes) > 3


def test_a_dead_chain_goes_whole() -> None:
    def function(x: Tensor) -> Tensor:
        x.exp().sin().sum().sqrt()
        return x * 2

    assert left(freeze(function, [draw(3)])) == ["mul"]


def test_every_result_of_an_operation_keeps_it() -> None:
    def function(x: Tensor) -> Tensor:
        return x.max(0)[1] * 2

    assert left(freeze(function, [draw(3, 2)])) == ["max", "mul"]


def test_random_operations_stay() -> None:
    """What is drawn after them must be what running the code would draw."""

    def function(x: Tensor) -> Tensor:
        torch.rand(5)
        return x * torch.rand(3, dtype=F64)

    program = freeze(function, [draw(3)])
    assert left(program).count("rand") == 2
    x = draw(3)
    torch.manual_seed(1)
    got = program(x)
    torch.manual_seed(1)
    close(got, function(x))


def test_guards_stay_with_what_they_need() -> None:
    def function(x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x

    assert left(freeze(function, [draw(3).abs()])) == ["sum", "gt", "_local_scalar_dense", "mul"]


def test_writes_to_live_tensors_stay() -> None:
    n = torch.zeros(())

    def function(x: Tensor) -> Tensor:
        n.add_(1)
        return x * 2

    assert sorted(left(freeze(function, [draw(3)]))) == ["add", "mul"]


def test_writes_to_what_nobody_reads_go() -> None:
    def function(x: Tensor) -> Tensor:
        scratch = torch.zeros(3, dtype=F64)
        scratch.add_(x).mul_(2)
        scratch[0] = 5
        return x * 2

    assert left(freeze(function, [draw(3)])) == ["mul"]


def test_named_operations_whose_bodies_may_have_effects_stay() -> None:
    seen: list[float] = []

    @te.op
    def noting(x: Tensor) -> Tensor:
        seen.append(float(x.sum()))
        return x * 1.0

    @noting.rule
    def noting_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g

    def function(x: Tensor) -> Tensor:
        return noting(x * 2) * 3  # type: ignore[no-any-return]

    program = freeze(function, [draw(3)])
    seen.clear()
    x = draw(3)
    program(x)
    assert seen == [float((x * 2).sum())]


def swept(function: Callable[[Tensor, Tensor], Tensor], which: str) -> list[str]:
    x, w = draw(3, 3), draw(3, 3)
    with te.record() as tape:
        y = function(x, w)
    program = tape.program(inputs=x, outputs=y, wrt={"x": x, "w": w}[which])
    forward = len(left(program))
    return left(program, with_sweep=True)[forward:]


def test_the_sweep_to_one_side() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).sum()

    assert swept(function, "x").count("mm") == 1
    assert swept(function, "w").count("mm") == 1


def test_forward_values_that_only_the_sweep_reads_are_left_out_of_a_call() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).max(0)[0].sum()

    x, w = draw(3, 3), draw(3, 3)
    program = freeze(function, [x], [w])
    assert left(program) == ["mm", "max", "sum"]
