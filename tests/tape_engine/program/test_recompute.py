"""Recomputation: what is computed again is what it was, and what is not kept is not there; nothing else changes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tape_engine as te
from tape_engine.program import lifetimes
from tape_engine.program.backends import native
from tape_engine.program.backends.native import plan, writer
from tests.benchmarks.models import counting
from tests.helpers import close, g_of, plain
from tests.tape_engine import test_architectures as architectures
from tests.tape_engine.architectures import ARCHITECTURES, Architecture
from tests.tape_engine.program.common import F64, draw, follows, freeze, ran, snapshot, unchanged

Tensor = torch.Tensor

BACKENDS = ("python", "native") if native.available() else ("python",)
both = pytest.mark.parametrize("backend", BACKENDS)
recomputing: Any = importlib.import_module("tape_engine.program.passes.recompute")


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be computed again is, and memory is let go wherever that makes the fullest moment less full."""
    monkeypatch.setattr(recomputing, "EVERYTHING", True)
    monkeypatch.setattr(lifetimes, "FULL", 0)
    monkeypatch.setattr(lifetimes, "ROOM", (1, 1 << 25))


def again(program: te.Program) -> list[str]:
    """The operations that the sweep runs again."""
    program._step.source  # noqa: B018
    return [node.op.name for node in program._step.source.again.again]


# -- the same results --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("forced")
@both
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_architectures(architecture: Architecture, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model of the suite, with all that can be computed again computed again, against torch.autograd."""
    if backend == "python":
        monkeypatch.setattr(native, "available", lambda: False)
    architectures.test_replay_on_another_batch(architecture)


def written_between(x: Tensor, w: Tensor) -> Tensor:
    """What a rule reads is written over on the way to it."""
    h = (x * w).sin()
    held = h * 2
    h.mul_(3)
    h[0] = w.sum()
    return (held.exp() * h).sum() + (h.sin() * held).sum()


def viewed(x: Tensor, w: Tensor) -> Tensor:
    """Rules read views of what is computed again, and views of those."""
    h = (x * w).sigmoid()
    turned = h.t().reshape(-1)
    first, second = h.chunk(2)
    return (turned * turned).sum() + (first * second.exp()).sum() + h.view(2, -1)[0].pow(3).sum()


def read_twice(x: Tensor, w: Tensor) -> Tensor:
    """Several rules read one value, far apart."""
    h = torch.tanh(x * w)
    y = h
    for _ in range(4):
        y = (y * h).sin() + h * w
    return (y * h).sum()


def chained(x: Tensor, w: Tensor) -> Tensor:
    """One is computed from the other, and every one is read."""
    h = x @ w
    for _ in range(5):
        h = F.gelu(h * 1.5 + x).tanh() * h.sigmoid()
    return h.pow(2).sum()


def normalised(x: Tensor, w: Tensor) -> Tensor:
    h = F.layer_norm(x @ w, (4,), w[0], w[1]).relu()
    h = F.batch_norm(h, None, None, w[2], w[3], training=True).tanh()
    bare = F.batch_norm(h @ w, None, None, training=True).sin()
    return (F.softmax(bare @ w, -1) * h).log1p().sum()


def aliased(x: Tensor, w: Tensor) -> Tensor:
    """An argument given twice, and leaves that look into each other."""
    return torch.addcmul(x, x[:, :1].exp(), w[0].exp()).tanh().mul(x.T.tanh()).sum() + (w[1] * w).cos().sin().sum()


def cast(x: Tensor, w: Tensor) -> Tensor:
    small = (x * w).float().tanh()
    wide = torch.cat([small.double(), w.exp()], 0).clone()
    return (wide * wide).sum() + F.embedding(torch.tensor([0, 1, 1]), wide).exp().sum()


HARD: list[Callable[[Tensor, Tensor], Tensor]] = [
    written_between, viewed, read_twice, chained, normalised, aliased, cast
]  # fmt: skip


@pytest.mark.usefixtures("forced")
@both
@pytest.mark.parametrize("function", HARD, ids=lambda each: each.__name__)
def test_hard_cases(function: Callable[[Tensor, Tensor], Tensor], backend: str) -> None:
    x, w = draw(4, 4), draw(4, 4)
    program = freeze(function, [x], [w], wrt=(x, w), backend=backend)
    assert again(program)
    for _ in range(3):
        x = draw(4, 4)
        with torch.no_grad():
            w.copy_(draw(4, 4))
        follows(program, lambda x, w: function(x.clone(), w), [x], [w], tol=1e-5 if function is cast else 1e-10)


def torch_first(x: Tensor, w: Tensor) -> Tensor:
    """The forward pass leaves a value to torch, by itself, among kernels it would be computed again."""
    h = (x @ w).exp()
    return (h.cumsum(1) + h.amax(1, keepdim=True)).square().sum()


def torch_last(x: Tensor, w: Tensor) -> Tensor:
    """The forward pass has kernels, and in the sweep a value is by itself."""
    h = (x @ w).exp()
    return (w @ (h / h.amax(1, keepdim=True))).cumsum(0).square().sum()


def line_compared(x: Tensor, w: Tensor) -> Tensor:
    h = F.batch_norm(x.view(2, 24, 4, 12), None, None, w[0, :24], w[1, :24], training=True).relu()
    return (h.amax((2, 3)) @ w[:24]).square().sum() + (h.amax(0).sin() * 2).exp().sum()


@pytest.mark.usefixtures("forced")
@both
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("function", [torch_first, torch_last, line_compared], ids=lambda each: each.__name__)
def test_the_largest_is_still_the_largest(
    function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, backend: str
) -> None:
    """What is computed again has its former bits: where none were equal to ``amax``, the gradient would be NaN."""
    x, w = draw(48, 48, dtype=dtype), draw(48, 48, dtype=dtype) / 7
    program = freeze(function, [x], [w], wrt=(x, w), backend=backend)
    assert again(program)
    for _ in range(3):
        follows(program, function, [draw(48, 48, dtype=dtype)], [w], tol=1e-10 if dtype == F64 else 1e-4)


@pytest.mark.usefixtures("forced")
@pytest.mark.skipif(not native.available(), reason="no kernels")
@pytest.mark.parametrize("function", [*HARD, torch_first, torch_last, line_compared], ids=lambda each: each.__name__)
def test_kernels_repeat_what_kernels_did(
    function: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch and the kernels round differently: who computed a value computes it again."""
    plans: list[tuple[Any, Any]] = []

    def noting(nodes: Any, *args: Any) -> Any:
        plans.append((plan.planned(nodes, *args), args[-1]))
        return plans[-1][0]

    monkeypatch.setattr(writer, "planned", noting)
    n = 4 if function in HARD else 48
    assert again(freeze(function, [draw(n, n)], [draw(n, n)], backend="native"))
    last, repeats = plans[-1]
    ours = {node for part in last.parts for node in part.nodes}
    assert ours
    for node, of in repeats.items():
        nodes = [each for item in last.items for each in (item.nodes if isinstance(item, plan.Part) else [item])]
        if node.op.forward not in plan.FREE and of in nodes:
            assert (node in ours) == (of in ours), node


@pytest.mark.usefixtures("forced")
@both
def test_a_value_that_is_also_a_result_is_kept(backend: str) -> None:
    x, w = draw(3, 3), draw(3, 3)

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x * w)
        return (h * h).sin().sum(), h

    program = freeze(function, [x], [w], wrt=(x, w), backend=backend)
    assert "tanh" not in again(program)
    follows(program, function, [draw(3, 3)], [w])


@pytest.mark.usefixtures("forced")
@both
def test_memory_that_an_effect_reads_in_the_end_is_let_go_after_it(backend: str) -> None:
    x, w, mean = draw(64, 64), draw(64, 64) / 8, torch.zeros(64, 64, dtype=F64)

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        mean.mul_(0.5).add_(h.detach() * 0.5)
        return ((h @ w).tanh() @ w).sin().sum()

    program = freeze(function, [x], [w], wrt=(x, w), backend=backend)
    assert program._step.source.rooms
    mean.zero_()
    for _ in range(2):
        wanted = mean * 0.5 + (x @ w) * 0.5
        program.step(x)
        close(plain(mean), wanted)


@pytest.mark.usefixtures("forced")
@both
def test_dropout_keeps_its_mask_and_draws_once(backend: str) -> None:
    x, w = draw(6, 6), draw(6, 6)

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = F.dropout((x @ w).relu(), 0.4, True)
        return F.dropout(h * h, 0.3, True).exp().sum()

    program = freeze(function, [x], [w], wrt=(x, w), backend=backend)
    assert again(program)
    assert "bernoulli" not in again(program)
    for _ in range(3):
        x = draw(6, 6)
        start = torch.get_rng_state()
        ours = [plain(t).requires_grad_() for t in (x, w)]
        wanted = torch.autograd.grad(function(*ours), ours)
        state = torch.get_rng_state()
        torch.set_rng_state(start)
        program.step(x)
        assert torch.equal(torch.get_rng_state(), state)
        for t, g in zip((x, w), wanted, strict=True):
            close(g_of(t), g)


@pytest.mark.usefixtures("forced")
@both
def test_a_guard_refuses_before_anything_is_written(backend: str) -> None:
    x, w, seen = draw(3, 3).abs(), draw(3, 3).abs(), torch.zeros((), dtype=F64)

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = torch.tanh(x * w)
        seen.add_(h.sum())
        if h.sum() > 0:
            return (h * h.exp()).sum()
        return h.sum()

    program = freeze(function, [x], [w], wrt=(x, w), backend=backend)
    assert again(program)
    program.step(x)
    before = snapshot(x, w, seen)
    with pytest.raises(te.GuardError):
        program.step(-x)
    unchanged(before, x, w, seen)
    seen.zero_()
    follows(program, lambda x, w: (torch.tanh(x * w) * torch.tanh(x * w).exp()).sum(), [x * 2], [w])


@pytest.mark.usefixtures("forced")
@both
def test_code_that_is_not_seen_stands_between(backend: str) -> None:
    """It may give a live tensor other contents: what was read before is not read again after it."""
    x, w, live = draw(3), draw(3), draw(3)

    @te.op
    def shifting(x: Tensor) -> Tensor:
        live.data.add_(float(x.detach().sum() * 0 + 1))
        return x * 1.0

    @shifting.rule
    def shifting_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = torch.exp(w + live)
        return (shifting(x * 2) * h * h.sin()).sum()  # type: ignore[no-any-return]

    program = freeze(function, [x], [w], wrt=(x, w), backend=backend)
    x = draw(3)
    ours, now = [plain(t).requires_grad_() for t in (x, w)], plain(live)
    h = torch.exp(ours[1] + now)
    wanted = torch.autograd.grad((ours[0] * 2 * h * h.sin()).sum(), ours)
    program.step(x)
    for t, g in zip((x, w), wanted, strict=True):
        close(g_of(t), g)


@pytest.mark.usefixtures("forced")
@both
def test_second_derivatives(backend: str) -> None:
    x, w = draw(3, 3), draw(3, 3)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(F.gelu(x * w) * w).pow(3).sum()

    with te.record() as tape:
        te.backward(function(x, w), wrt=[x], record=True)
        C = (vars(x)["g"] ** 2).sum()
    program = tape.program(inputs=(x,), outputs=C, wrt=(x, w), backend=backend)
    assert again(program)
    x = draw(3, 3)
    ours = [plain(t).requires_grad_() for t in (x, w)]
    (inner,) = torch.autograd.grad(function(*ours), ours[:1], create_graph=True)
    wanted = torch.autograd.grad((inner**2).sum(), ours)
    close(program.step(x), (inner**2).sum().detach())
    for t, g in zip((x, w), wanted, strict=True):
        close(g_of(t), g)


@pytest.mark.usefixtures("forced")
def test_a_loaded_program_computes_again_too(tmp_path: Path) -> None:
    x, w = draw(4, 4), draw(4, 4)
    program = freeze(chained, [x], [w], wrt=(x, w))
    program.save(tmp_path / "chained.te")
    loaded = te.load(tmp_path / "chained.te")
    assert again(loaded) == again(program) != []
    x = draw(4, 4)
    program.step(x)
    mine, of_w = plain(vars(x)["g"]), plain(vars(w)["g"])
    loaded.step(x)
    assert torch.equal(vars(x)["g"], mine)
    assert torch.equal(next(iter(loaded.wrt.values())).g, of_w)  # type: ignore[attr-defined]


# -- when ---------------------------------------------------------------------------------------------------


def deep(x: Tensor, *weights: Tensor) -> Tensor:
    for w in weights:
        x = F.gelu(x @ w) * 0.5
    return x.square().mean()


def test_a_small_step_is_left_as_it_is() -> None:
    program = freeze(deep, [draw(8, 8)], [draw(8, 8) for _ in range(6)], backend="python")
    assert again(program) == []
    assert not program._step.source.rooms


def test_activations_are_computed_again_and_less_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as without, on less memory; products are not run again, and a forward replay is what it was."""
    monkeypatch.setattr(recomputing, "SHARE", 0.05)
    x, weights = draw(1024, 128, dtype=torch.float32), [draw(128, 128, dtype=torch.float32) / 9 for _ in range(16)]
    program = freeze(deep, [x], weights, wrt=weights, backend="python")
    assert set(again(program)) <= {"gelu", "mul"}
    assert again(program)
    with monkeypatch.context() as patch:
        patch.setattr(recomputing, "FULL", 1 << 60)
        keeping = freeze(deep, [x], weights, wrt=weights, backend="python")
        assert again(keeping) == []
    assert most(lambda: program.step(x)) < most(lambda: keeping.step(x)) - 4 * x.nbytes
    x = draw(1024, 128, dtype=torch.float32)
    loss = program.step(x)
    found = [plain(vars(w)["g"]) for w in weights]
    assert torch.equal(loss, keeping.step(x))
    for w, g in zip(weights, found, strict=True):
        assert torch.equal(vars(w)["g"], g)
    assert program._step.source.again.spared > 4 * x.nbytes
    products = [ran(lambda p=p: p.step(x)).names.count("mm") for p in (program, keeping)]  # type: ignore[misc]
    assert products[0] == products[1]
    assert "computed again" in str(program)
    assert "computed again" in program.code
    assert "computed again" not in str(keeping) + keeping.code


def most(run: Callable[[], Any]) -> int:
    """The most bytes that a replay holds at one time, with what the first one has kept for it."""
    with counting() as first:
        run()
    with counting() as second:
        run()
    return first.held + second.most


@both
def test_batch_norm_is_a_line_to_the_last_bit(backend: str) -> None:
    """The normalised values come from the mean and the deviation that were found, by the loop that ATen has."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6))
    )
    x = torch.randn(24, 8, 32, 32)
    with te.record() as tape:
        C = model(x).square().mean()
    program = tape.program(inputs=(x,), outputs=C, backend=backend)
    names = again(program)
    assert "addcmul" in names
    assert not any("batch_norm" in name for name in names)
    x = torch.randn(24, 8, 32, 32)
    wanted = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    program.step(x)
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(vars(p)["g"], g, rtol=1e-5, atol=1e-7)
