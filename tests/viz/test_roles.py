"""The parts that leaves play, in the article's words, in plain torch and in modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tape_engine as te
import viz

Tensor = torch.Tensor
F = nn.functional


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


def named() -> te.Tape:
    X, w, b, Y = r(4, 3), r(3, 1), r(1), r(4)
    with te.record() as tape:
        te.mse(te.relu(te.lin(X, w, b)), Y)
    return tape


def plain() -> te.Tape:
    X, w, b, Y = r(4, 3), r(3, 1), r(1), r(4)
    with te.record() as tape:
        ((X @ w + b).clamp_min(0.0).squeeze(-1) - Y).pow(2).mean()
    return tape


def target_unsqueezed() -> te.Tape:
    X, w, Y = r(4, 3), r(3, 1), r(4)
    with te.record() as tape:
        (X @ w - Y.unsqueeze(-1)).abs().sum()
    return tape


def two_layers() -> te.Tape:
    X, w, b, v, c, Y = r(4, 3), r(3, 5), r(5), r(5, 2), r(2), r(4, 2)
    with te.record() as tape:
        F.mse_loss(F.relu(X @ w + b) @ v + c, Y)
    return tape


def weight_on_the_left() -> te.Tape:
    w, X = r(5, 3).requires_grad_(), r(3, 4)
    with te.record() as tape:
        (w @ X).sum()
    return tape


def chained_on_the_left() -> te.Tape:
    w, X, v = r(5, 3).requires_grad_(), r(3, 4), r(2, 5)
    with te.record() as tape:
        (v @ F.relu(w @ X)).sum()
    return tape


def functional() -> te.Tape:
    X, w, b, labels = r(4, 3), r(5, 3), r(5), torch.randint(0, 5, (4,))
    with te.record() as tape:
        F.cross_entropy(F.linear(X, w, b), labels)
    return tape


def embedded() -> te.Tape:
    tokens, w = torch.randint(0, 7, (4,)), r(7, 3)
    with te.record() as tape:
        F.embedding(tokens, w).sum()
    return tape


def with_number() -> te.Tape:
    X, scale = r(4, 3), torch.tensor(0.5)
    with te.record() as tape:
        (X * scale).sum()
    return tape


CASES: dict[Callable[[], te.Tape], dict[str, str]] = {
    named: {"X": "input", "w": "parameter", "b": "parameter", "Y": "target"},
    plain: {"X": "input", "w": "parameter", "b": "parameter", "Y": "target"},
    target_unsqueezed: {"X": "input", "w": "parameter", "Y": "target"},
    two_layers: dict.fromkeys("wbvc", "parameter") | {"X": "input", "Y": "target"},
    weight_on_the_left: {"w": "parameter", "X": "input"},
    chained_on_the_left: {"w": "parameter", "X": "input", "v": "parameter"},
    functional: {"X": "input", "w": "parameter", "b": "parameter", "labels": "target"},
    embedded: {"tokens": "input", "w": "parameter"},
    with_number: {"X": "input", "scale": "constant"},
}


def roles(tape: te.Tape) -> dict[str, str]:
    nodes = viz.graph(tape).nodes(data=True)
    return {facts["name"]: facts["role"] for _, facts in nodes if facts["kind"] == "leaf"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_roles(case: Callable[[], te.Tape]) -> None:
    assert roles(case()) == CASES[case]


def test_modules() -> None:
    net, X = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), r(5, 3)
    with te.record() as tape:
        net(X)
    found = roles(tape)
    assert {name for name, role in found.items() if role == "parameter"} == {name for name, _ in net.named_parameters()}
    assert {role for name, role in found.items() if "running" in name or "num_batches" in name} <= {"constant"}


def test_a_constant_is_one() -> None:
    X = te.stop_gradient(r(3, 3))
    with te.record() as tape:
        torch.relu(X)
    assert set(roles(tape).values()) <= {"constant", "input"}
