"""The passes over the sweep: masks narrowed, products turned, results early; none changes what a replay gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import tape_engine as te
from tests.helpers import close, g_of, plain
from tests.tape_engine.program.common import draw, follows, freeze

Tensor = torch.Tensor


def code_of(
    function: Callable[..., Any], inputs: Sequence[Tensor], params: Sequence[Tensor], wrt: list[Tensor] | None = None
) -> te.Program:
    return freeze(function, inputs, params, backend="python", wrt=wrt)


def test_a_gradient_that_nobody_reads_is_not_asked_for() -> None:
    x, w, b = draw(2, 3, 6, 6), draw(4, 3, 3, 3), draw(4)

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.conv2d(x, w, b).pow(2).sum()

    program = code_of(function, [x], [w, b], wrt=[w, b])
    assert "[False, True, True]" in program.code
    expected = torch.autograd.grad(function(x, w.requires_grad_(), b.requires_grad_()), [w, b])
    program.step(x)
    close(g_of(w), expected[0])
    close(g_of(b), expected[1])
    assert "[True, True, True]" in code_of(function, [x], [w, b]).code
    assert "[True, False, False]" in code_of(function, [x], [w, b], wrt=[x]).code


def test_masks_of_normalisation() -> None:
    x = draw(4, 3, 5)
    for net in (nn.BatchNorm1d(3).double(), nn.LayerNorm(5).double(), nn.GroupNorm(3, 3).double()):
        for wrt in ([net.weight], [net.bias], list(net.parameters())):
            program = freeze(lambda x, net=net: net(x).pow(3).sum(), [x], backend="python", wrt=wrt)
            assert "True, True, True" not in program.code
            expected = torch.autograd.grad(net(x).pow(3).sum(), wrt)
            program.step(x)
            for tensor, g in zip(wrt, expected, strict=True):
                close(g_of(tensor), g, 1e-9)


def test_the_gradient_of_a_turned_factor_is_computed_as_it_lies() -> None:
    x, w = draw(5, 3), draw(4, 3)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w.t()).pow(2).sum()

    program = freeze(function, [x], [w], backend="python")
    assert ".copy_(" not in program.code
    assert program.code.count("torch.mm(") == 3
    follows(program, function, [draw(5, 3)], [w])
    assert plain(g_of(w)).is_contiguous()


def test_a_product_that_is_read_otherwise_too_is_not_turned() -> None:
    x, w = draw(3, 3), draw(3, 3)

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x @ w
        return y.sum(), y, y.t().clone()

    program = freeze(function, [x], [w], backend="python")
    follows(program, function, [draw(3, 3)], [w])
    turned = freeze(lambda x, w: (x @ w).t().contiguous(), [x], [w], backend="python")
    assert ".copy_(" not in turned.code
    follows(turned, lambda x, w: (x @ w).t().contiguous(), [draw(3, 3)], [w], seed=draw(3, 3))


def test_what_is_only_returned_comes_before_what_goes_on() -> None:
    x, w, v = draw(5, 3), draw(3, 4), draw(4, 2)

    def function(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return (torch.tanh(x @ w) @ v).pow(2).sum()

    program = freeze(function, [x], [w, v], backend="python", wrt=[w, v])
    sweep = program.code.split("# the reverse sweep")[1]
    lines = [line for line in sweep.splitlines() if "torch.mm" in line]
    assert "v_g" in lines[0]  # before the gradient of the layer below it
    program = freeze(function, [x], [w, v], backend="python")
    follows(program, function, [draw(5, 3)], [w, v])
