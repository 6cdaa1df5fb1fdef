"""What is chosen to be computed again: what it spares, what it may cost, and what is left as it is."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tape_engine as te
from tape_engine.program.passes.cost import seconds
from tape_engine.tape import Node, Value
from tests.tape_engine.program.common import draw, follows, freeze

Tensor = torch.Tensor
recomputing: Any = importlib.import_module("tape_engine.program.passes.recompute")
F32 = torch.float32


def frozen(function: Callable[..., Tensor], x: Tensor, weights: list[Tensor]) -> te.Program:
    return freeze(function, [x], weights, wrt=weights, backend="python")


def nodes_of(program: te.Program) -> list[Node]:
    return list(program._step.source.again.nodes)


def again(program: te.Program) -> list[Node]:
    """The nodes that run again."""
    program._step.source  # noqa: B018
    return list(program._step.source.again.again)


def names(program: te.Program) -> list[str]:
    return [node.op.name for node in again(program)]


def fullest(program: te.Program) -> int:
    """The bytes that a step holds at its fullest moment, by a walk of its own: each value until it is read last."""
    frozen, nodes = program._frozen, nodes_of(program)
    canonical = frozen.canonical
    wanted = {canonical(v) for v in (*frozen.outputs, *(g for _, g in frozen.gradients))}
    root: dict[Value, Value] = {}
    born: dict[Value, int] = {}
    dies: dict[Value, int] = {}
    for i, node in enumerate(nodes):
        given = [root.get(canonical(v), canonical(v)) for v in node.inputs]
        for value in given:
            dies[value] = i
        overload: Any = node.op.forward
        view = any(each.alias_info is not None for each in overload._schema.returns)
        for value in map(canonical, node.outputs):
            if view:
                root[value] = given[0]
            else:
                born[value] = dies[value] = i
    most = 0
    for i, node in enumerate(nodes):
        dying = [
            v.nbytes for v in {root.get(canonical(v), canonical(v)) for v in node.inputs} if dies[v] == i and v in born
        ]
        held = sum(v.nbytes for v in born if born[v] <= i <= dies[v] or (v in wanted and born[v] <= i))
        made = [canonical(v).nbytes for v in node.outputs if canonical(v) in born]
        if torch.Tag.pointwise in getattr(node.op.forward, "tags", ()) and made and made[0] in dying:
            held -= made[0]  # it is written where that operand lies
        most = max(most, held)
    return most


def deep(x: Tensor, *weights: Tensor) -> Tensor:
    for w in weights:
        x = F.gelu(x @ w) * 0.5
    return x.square().mean()


def layers(count: int = 10) -> tuple[Tensor, list[Tensor]]:
    return draw(1024, 128, dtype=F32), [draw(128, 128, dtype=F32) / 9 for _ in range(count)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps are chosen for as large ones are: only the sizes say what is worth it."""
    monkeypatch.setattr(recomputing, "FULL", 0)
    monkeypatch.setattr(recomputing, "LEAST", 1)
    monkeypatch.setattr(recomputing, "PART", 1 << 60)


def few() -> tuple[Tensor, list[Tensor]]:
    return draw(16, 8, dtype=F32), [draw(8, 8, dtype=F32) / 3 for _ in range(6)]


def linked(x: Tensor, *weights: Tensor) -> Tensor:
    """One value is computed from the other, and the sweep reads them in the other order."""
    for w in weights:
        a = F.gelu(x @ w)
        b = (a * 2).sin()
        c = (b + a).tanh()
        x = (c * b).sigmoid()
    return x.square().mean()


def shared(x: Tensor, *weights: Tensor) -> Tensor:
    """Several values are computed from one that the sweep does not read, and that is half as large as each."""
    for w in weights:
        h = ((x @ w) - 1).double()
        x = (h.exp().log1p() + h.tanh() * h.sigmoid()).float()
    return x.square().mean()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("function", "shares"),
    [(deep, (0.05, 0.1, 0.3)), (linked, (0.03, 0.1, 0.3, 1.0)), (shared, (0.03, 0.1, 0.2))],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_said_to_be_spared_is_spared(
    function: Callable[..., Tensor], shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the walk above, with and without; and all that is left of the forward pass is what somebody reads."""
    x, weights = few()
    before = 0
    for share in shares:
        with monkeypatch.context() as patch:
            patch.setattr(recomputing, "SHARE", share)
            program = frozen(function, x, weights)
            spared = program._step.source.again.spared
            patch.setattr(recomputing, "FULL", 1 << 60)
            keeping = frozen(function, x, weights)
            assert again(keeping) == []
            assert fullest(keeping) - fullest(program) == spared > before
            before = spared
        read = {program._frozen.canonical(v) for node in nodes_of(program) for v in node.inputs}
        read |= {program._frozen.canonical(v) for v in program._frozen.outputs}
        read |= {program._frozen.canonical(g) for _, g in program._frozen.gradients}
        assert all(not read.isdisjoint(map(program._frozen.canonical, node.outputs)) for node in nodes_of(program))


STEPS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    lambda a, b, w: a @ w,
    lambda a, b, w: b @ w,
    lambda a, b, w: a.tanh(),
    lambda a, b, w: b.sigmoid(),
    lambda a, b, w: F.gelu(a),
    lambda a, b, w: a * b,
    lambda a, b, w: a + b * 0.5,
    lambda a, b, w: F.softmax(a, -1),
    lambda a, b, w: F.layer_norm(a, (8,)),
    lambda a, b, w: (a.double().tanh() * b).float(),
    lambda a, b, w: a.view(8, 16).t().sin().t().reshape(16, 8),
    lambda a, b, w: torch.cat([a[:8].sin(), b[8:]]),
    lambda a, b, w: (a[:1].exp() + b).tanh(),
]


def drawn(seed: int) -> Callable[..., Tensor]:
    """A function of some operations, drawn by a seed."""

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        pick = random.Random(seed)
        found = [x]
        for _ in range(pick.randint(8, 20)):
            step = pick.choice(STEPS)
            found.append(step(pick.choice(found[-4:]), pick.choice(found[-4:]), pick.choice(weights)))
        return torch.stack([v.square().mean() for v in found[-2:]]).sum()

    return function


@pytest.mark.usefixtures("tiny")
@pytest.mark.slow
def test_random_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least what is said to be spared is, something if anything is computed again; and no bit is another."""
    chosen = 0
    for seed in range(40):
        torch.manual_seed(seed)
        x, weights = few()
        monkeypatch.setattr(recomputing, "SHARE", 5.0)
        program = frozen(drawn(seed), x, weights)
        spared = program._step.source.again.spared
        monkeypatch.setattr(recomputing, "SHARE", 0.0)
        keeping = frozen(drawn(seed), x, weights)
        assert again(keeping) == []
        assert bool(again(program)) == (spared > 0)
        assert fullest(keeping) - fullest(program) >= spared, seed
        chosen += spared > 0
        if spared:
            x = draw(16, 8, dtype=F32)
            found = [program.step(x), *(vars(w)["g"].clone() for w in weights if vars(w).get("g") is not None)]
            kept = [keeping.step(x), *(vars(w)["g"].clone() for w in weights if vars(w).get("g") is not None)]
            for one, other in zip(found, kept, strict=True):
                assert torch.equal(one, other), seed
    assert chosen > 15


@pytest.mark.usefixtures("tiny")
def test_what_is_shared_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one of them it would be worth it by a half only, for all by more; and what it is made of is left alone."""
    monkeypatch.setattr(recomputing, "SHARE", 1.0)
    x, weights = few()
    found = names(frozen(shared, x, weights))
    assert {"exp", "tanh", "sigmoid"} <= set(found)
    assert "sub" not in found


@pytest.mark.usefixtures("tiny")
def test_what_is_not_there_at_the_fullest_moment_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """However cheap it is."""
    monkeypatch.setattr(recomputing, "SHARE", 1.0)
    wide = [draw(8, 256, dtype=F32) / 3, draw(256, 8, dtype=F32) / 16]

    def function(x: Tensor, up: Tensor, down: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = F.gelu(x @ up) @ down
        return ((x * 2) @ w).square().mean()

    found = names(frozen(function, draw(16, 8, dtype=F32), [*wide, draw(8, 8, dtype=F32)]))
    assert "gelu" in found
    assert "mul" not in found


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.06])
def test_it_costs_no_more_than_its_share(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor much less, as long as something is left to be computed again."""
    monkeypatch.setattr(recomputing, "SHARE", share)
    x, weights = layers(24)
    program = frozen(deep, x, weights)
    repeated = set(again(program))
    once = sum(
        seconds(node) for node in nodes_of(program) if node not in repeated and node.op.name not in ("t", "transpose")
    )
    spent = sum(map(seconds, repeated))
    assert spent <= share * once
    assert spent >= 0.8 * share * once - 2 * max(map(seconds, repeated), default=0)


def mixed(x: Tensor, *weights: Tensor) -> Tensor:
    """Of each layer an activation that takes long, and one that does not."""
    for w in weights:
        h = x @ w
        x = ((h * h) @ w).erf()
    return x.square().mean()


def test_the_cheapest_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputing, "SHARE", 0.012)
    x, weights = layers(8)
    found = names(frozen(mixed, x, weights))
    assert "mul" in found
    assert "erf" not in found


def test_small_values_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputing, "SHARE", 1.0)
    x, weights = layers(8)

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        side = x[0]
        for w in weights:
            x = F.gelu(x @ w)
            side = side * x[0].sin()
        return x.square().mean() + (side * 3).sum()

    found = again(frozen(function, x, weights))
    assert found
    assert all(node.op.name in ("select", "view") or node.outputs[0].nbytes >= recomputing.LEAST for node in found)


def test_a_step_that_holds_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much its forward pass makes on its way."""
    x, weights = layers()
    monkeypatch.setattr(recomputing, "SHARE", 0.0)
    most = fullest(frozen(deep, x, weights))
    monkeypatch.setattr(recomputing, "SHARE", 1.0)
    made = 3 * x.nbytes * len(weights)
    assert made > most + x.nbytes
    monkeypatch.setattr(recomputing, "FULL", most + x.nbytes)
    assert again(frozen(deep, x, weights)) == []
    monkeypatch.setattr(recomputing, "FULL", most - x.nbytes)
    assert again(frozen(deep, x, weights))


@pytest.mark.usefixtures("tiny")
def test_nothing_larger_is_kept_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part picked from what nobody else reads would keep all of that."""
    monkeypatch.setattr(recomputing, "SHARE", 1.0)
    indices = torch.arange(0, 16, 4)

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        parts = []
        for w in weights:
            large = x @ w
            picked = large.index_select(0, indices)
            parts.append((picked * picked).sum())
            x = F.gelu(x @ w.t())
        return torch.stack(parts).sum() + x.square().sum()

    x, weights = few()
    found = names(frozen(function, x, weights))
    assert "gelu" in found
    assert "index_select" not in found


@pytest.mark.parametrize(("count", "repeats"), [(10, True), (20, False), (1500, False)])
def test_no_long_run_of_operations_for_one_value(count: int, repeats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputing, "EVERYTHING", True)

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = x
        for i in range(count):
            h = h + w[i % 32]
        return (h * h * w[0]).sum()

    x, w = draw(4, 32), draw(32, 32)
    program = freeze(function, [x], [w], wrt=(x, w), backend="python")
    assert (names(program).count("add") >= count) == repeats
    follows(program, function, [draw(4, 32)], [w])


def test_what_another_needs_is_there_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are computed from each other, read by the sweep in the other order: and each of them once."""
    monkeypatch.setattr(recomputing, "EVERYTHING", True)

    def function(x: Tensor, w: Tensor) -> Tensor:
        a = (x @ w).sin()
        b = (a * w).exp()
        c = (b + a).tanh()
        d = (c * b * a).sigmoid()
        return (d * c * w).sum() + (a * d).exp().sum() + (b * c).sum()

    x, w = draw(5, 5), draw(5, 5)
    program = freeze(function, [x], [w], wrt=(x, w), backend="python")
    found = names(program)
    assert len(found) > 4
    for name in ("sin", "tanh", "sigmoid"):
        assert found.count(name) <= 1
    nodes = nodes_of(program)
    frozen = program._frozen
    made = set(map(frozen.canonical, [*frozen.live, *(v for v in frozen.inputs if v is not None), frozen.seed]))
    for node in nodes:
        assert made.issuperset(map(frozen.canonical, node.inputs)), node
        made.update(map(frozen.canonical, node.outputs))
    for _ in range(3):
        follows(program, function, [draw(5, 5)], [w])


def test_profile_marks_what_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputing, "EVERYTHING", True)
    x, w = draw(6, 6), draw(6, 6)
    program = freeze(lambda x, w: (x @ w).tanh().square().sum(), [x], [w], wrt=(x, w), backend="python")
    profile = program.profile(x)
    marked = [row for row in profile.rows if row.again]
    assert sorted(row.op for row in marked) == sorted(set(names(program)) - {"t", "transpose"})
    assert all(row.part == "sweep" and all(each.again for each in row.holds) for row in marked)
    assert str(profile).count("sweep, again") == len(marked)
    assert [row["again"] for row in profile.as_data()["rows"]] == [row.again for row in profile.rows]
