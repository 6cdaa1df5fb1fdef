"""In which order kernels and torch run: as few calls as there can be."""

from __future__ import annotations

import pytest
import torch

import tape_engine as te
from tape_engine.program.backends.native.plan import planned
from tests.helpers import close
from tests.tape_engine.program.common import draw, follows, freeze

pytest.importorskip("llvmlite")

Tensor = torch.Tensor


def large(X: Tensor, W: Tensor, V: Tensor, c: Tensor) -> Tensor:
    """A product for torch, before and after which there is little to do, and views of what is given."""
    scale, turned = c * 2, V.t()
    return ((X @ W).tanh() @ turned.contiguous().t() * scale).sigmoid().square().sum()


def test_what_is_too_little_for_a_segment_waits_for_the_next() -> None:
    params = [draw(80, 80), draw(80, 3), draw()]
    program = freeze(large, [draw(80, 80)], params, backend="native")
    assert program._step.source is not None
    told = program._step.native
    assert told is not None
    assert told.segments == 1, program.code
    assert told.torch == 5, program.code  # the three large products, and two views that they read
    assert "torch.mul" not in program.code
    follows(program, large, [draw(80, 80)], params)


def test_what_torch_reads_does_not_wait() -> None:
    def function(X: Tensor, W: Tensor) -> Tensor:
        return ((X * 2) @ W).tanh().exp().square().sum() + (X * 2).sum()

    params = [draw(80, 80)]
    follows(freeze(function, [draw(80, 80)], params, backend="native"), function, [draw(80, 80)], params, tol=1e-9)


def test_a_result_that_waits_is_there_in_the_end() -> None:
    def function(X: Tensor, W: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        scale = c * 2
        return ((X @ W).tanh().exp() * scale).square().sum(), scale

    params = [draw(80, 80), draw()]
    program = freeze(function, [draw(80, 80)], params, backend="native")
    follows(program, function, [draw(80, 80)], params, tol=1e-9)


def test_nothing_waits_for_what_may_change_it() -> None:
    """An operation of the user's may write to what it reads: what was read before stays before it."""
    count = torch.zeros(())

    @te.op
    def counting(x: Tensor) -> Tensor:
        count.add_(1)
        return x * 1

    @counting.rule
    def counting_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g

    X, W, c = draw(80, 80), draw(80, 80), draw()
    with te.record() as tape:
        scale = c * 2
        C = (counting(X @ W).tanh().exp() * scale).square().sum()
    program = tape.program(inputs=(X,), outputs=C, wrt=(W, c), backend="native")
    lines = program.code.splitlines()
    first = next(i for i, line in enumerate(lines) if "counting(" in line)
    assert any("mul" in line and i < first for i, line in enumerate(lines)), program.code
    close(program.step(X), ((X @ W).tanh().exp() * (c * 2)).square().sum(), 1e-9)


def test_what_torch_computes_again_torch_computes_first() -> None:
    """Else it would come with another rounding; and what is left has to be worth a segment still."""
    with te.record() as tape:
        x = draw(80, 80)
        y = x.exp().sin().cos().tanh() @ x
        (y @ (x.exp() @ y)).sum()
    nodes = list(tape.nodes)
    names = [node.op.name for node in nodes]
    first, second = (i for i, name in enumerate(names) if name == "exp")

    def ours(again: dict[int, int]) -> list[str]:
        repeats = {nodes[one]: nodes[other] for one, other in again.items()}
        made = planned(nodes, lambda v: v, {nodes[-1].outputs[0]}, set(), set(), set(), repeats)
        return [node.op.name for part in made.parts for node in part.nodes]

    assert ours({}) == ["exp", "sin", "cos", "tanh", "exp"]
    assert ours({second: first}) == ["sin", "cos", "tanh"]


def test_what_as_strided_looks_at_lies_in_the_memory_of_its_base() -> None:
    """The columns of a stack, seen by their memory, are both of what was stacked."""

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        column = torch.stack([x, w], -1)[..., 1]
        return (column.as_strided((4, 4), (4, 1)) * w).sum()

    x, w = torch.rand(4, 4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    with te.record() as tape:
        out = f(x, w)
    program = tape.program(inputs=(x, w), outputs=out, backend="native")
    x, w = torch.rand(4, 4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    torch.testing.assert_close(program.step(x, w), f(x.detach().clone(), w.detach().clone()))
