"""Formulas with the user's own names, and the params that they do not tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tape_engine as te
import viz

Tensor = torch.Tensor
F = torch.nn.functional
X, Y, w, b = torch.rand(4, 3), torch.rand(4, 3), torch.rand(3, 2), torch.rand(2)


def facts_of(compute: Callable[[], Any]) -> dict[str, Any]:
    with te.record() as tape:
        compute()
    return dict(viz.graph(tape).nodes["op0"])


@pytest.mark.parametrize(
    ("compute", "formula", "params"),
    [
        (lambda: te.lin(X, w, b), "lin = X @ w + b", ""),
        (lambda: te.lin(X, w, None), "lin = X @ w", ""),
        (lambda: X @ w, "mm = X @ w", ""),
        (lambda: torch.addmm(b, X, w), "addmm = b + X @ w", ""),
        (lambda: torch.add(X, Y, alpha=3), "add = X + Y", "alpha=3"),
        (lambda: X**3, "pow = X ** 3", ""),
        (lambda: X.sum(0, keepdim=True), "sum = Σ X", "dim=[0], keepdim=True"),
        (lambda: w.t(), "t = wᵀ", ""),
        (lambda: X < Y, "lt = X < Y", ""),
        (lambda: torch.cat([X, Y, X], 1), "cat = cat([X, Y, X], 1)", ""),
        (lambda: X.argmax(), "argmax = argmax(X)", ""),
    ],
)
def test_formulas(compute: Callable[[], Any], formula: str, params: str) -> None:
    facts = facts_of(compute)
    assert (facts["formula"], facts["params"]) == (formula, params)


def test_the_words_of_a_formula_may_be_the_rules_own() -> None:
    @te.op(formula="x * (1 + a) ** out")
    def grown(amount: Tensor, rate: float) -> Tensor:
        return amount * (1 + rate)

    @grown.rule
    def grown_grad(g: Tensor, out: Tensor, x: Tensor, a: float) -> Any:
        return g * (1 + a), None

    assert facts_of(lambda: grown(X, 0.25))["formula"] == "grown = X * (1 + 0.25) ** grown"


def test_a_guard_tells_what_came_out() -> None:
    with te.record() as tape:
        if (X > 2).any():
            raise AssertionError
    guard = [facts for _, facts in viz.graph(tape).nodes(data=True) if "guard" in facts["marks"]]
    assert guard[0]["formula"].endswith("→ False")
    assert guard[0]["shape"] is None


def test_of_several_outputs_those_that_are_read_are_named() -> None:
    x = torch.rand(6)
    with te.record() as tape:
        first, second, third = torch.split(x, 2)
        product = second * third
    assert viz.graph(tape).nodes["op0"]["formula"] == "second, third, … = split(x, 2)"
    assert product.shape == (2,)
    assert first.shape == (2,)


def test_a_long_formula_is_cut() -> None:
    many = [torch.rand(1) for _ in range(50)]
    formula = facts_of(lambda: torch.cat(many))["formula"]
    assert formula.endswith("…])")
    assert len(formula) <= 96
