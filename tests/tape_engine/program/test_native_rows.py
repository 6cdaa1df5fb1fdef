"""Blocks of rows: forward, sweep and sums of a block at a time, against torch.autograd on the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import tape_engine as te
from tape_engine.program.backends import native
from tests.helpers import Tensor, close, g_of, grad_of, plain
from tests.tape_engine.program.common import F32, F64, draw, follows, freeze

pytestmark = pytest.mark.skipif(not native.available(), reason="llvmlite, an extra, is not installed")

ROWS = 3_001  # no multiple of any block


@pytest.fixture(autouse=True)
def small_rows_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are made of tensors that a test can afford, and of products however large."""
    monkeypatch.setattr("tape_engine.program.backends.native.plan.ROW_BYTES", 1 << 10)
    monkeypatch.setattr("tape_engine.program.backends.native.plan.ROW_WORK", 1 << 20)
    monkeypatch.setattr("tape_engine.program.backends.native.plan.FLAT", 1 << 10)
    monkeypatch.setattr("tape_engine.program.backends.native.plan.PRODUCT", 1 << 10)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many threads share the blocks, whatever the machine has."""
    count: int = request.param
    monkeypatch.setattr("torch.get_num_threads", lambda: count)
    monkeypatch.setattr("tape_engine.program.backends.native.team.cores", lambda: count)
    return count


def in_loops(program: te.Program, loops: int = 1) -> None:
    """Asserts that so many segments of a step go by blocks of rows."""
    assert program._step.source is not None
    told = program._step.native
    assert told is not None
    assert told.loops == loops, str(told)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("columns", [7, 301])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_article(dtype: torch.dtype, columns: int) -> None:
    X, w = draw(ROWS, columns, dtype=dtype), draw(columns, 1, dtype=dtype) / columns**0.5
    b, Y = draw(1, dtype=dtype), draw(ROWS, dtype=dtype)
    with te.record() as tape:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        C = te.mse(U, Y)
    program = tape.program(inputs=(X, Y), outputs=C, wrt=(X, w, b, Z, U), backend="native")
    in_loops(program)
    tol = 1e-5 if dtype == F32 else 1e-12
    for turn in range(3):
        X, Y = draw(ROWS, columns, dtype=dtype) + turn, draw(ROWS, dtype=dtype)
        got = program.step(X, Y)
        leaves = [plain(t).requires_grad_() for t in (X, w, b)]
        Z_ = leaves[0] @ leaves[1] + leaves[2]
        U_ = Z_.relu()
        C_ = (U_.squeeze(-1) - Y).pow(2).mean()
        wanted = torch.autograd.grad(C_, [*leaves, Z_, U_])
        close(got, C_, tol)
        for tensor, g in zip((X, w, b, Z, U), wanted, strict=True):
            close(grad_of(tensor), g, tol)
        w.sub_(0.1 * grad_of(w))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [512, 513, 527, 1_031])
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_that_ask_for_the_next(rows: int, turned: bool) -> None:
    """Forward by dots, back by sums of lines; where X lies by columns it is the other way round."""
    w, b = draw(301, 1, dtype=F32) / 17, draw(1, dtype=F32)

    def given() -> list[Tensor]:
        X = draw(301, rows, dtype=F32).t() if turned else draw(rows, 301, dtype=F32)
        return [X, draw(rows, 1, dtype=F32)]

    def function(X: Tensor, Y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ((X @ w + b).relu() - Y).square().mean()

    program = freeze(function, given(), [w, b], wrt=[w, b], backend="native")
    in_loops(program)
    X, Y = given()
    got = program.step(X, Y)
    leaves = [plain(t).requires_grad_() for t in (w, b)]
    wanted = function(X, Y, *leaves)
    close(got, wanted, 1e-5)
    for tensor, g in zip((w, b), torch.autograd.grad(wanted, leaves), strict=True):
        close(grad_of(tensor), g, 1e-5)


MODELS: dict[str, Callable[..., Tensor]] = {
    "mse of an mlp": lambda X, Y, W, b, V, c: ((X @ W + b).relu() @ V + c - Y).pow(2).mean(),
    "tanh and a softmax": lambda X, Y, W, b, V, c: -(((X @ W + b).tanh() @ V + c).log_softmax(1) * Y).sum(1).mean(),
    "logistic": lambda X, Y, W, b, V, c: F.softplus(((X @ W + b).sigmoid() @ V + c) * Y[:, :1].sign()).sum(),
    "linear": lambda X, Y, W, b, V, c: (F.linear(F.linear(X, W.t(), b).relu(), V.t(), c) - Y).abs().mean(),
    "turned": lambda X, Y, W, b, V, c: (V.t() @ (W.t() @ X.t() + b.unsqueeze(1)).relu() - Y.t()).square().sum(0).mean(),
    "of several losses": lambda X, Y, W, b, V, c: (
        (X @ W).square().mean() + (X.sum(1) * Y.amax(1)).sum() * c.sum() + V.sum() + b.sum()
    ),
    "normalised over the rows": lambda X, Y, W, b, V, c: (
        ((((X @ W + b) - (X @ W + b).mean(0)) / ((X @ W).square().mean(0) + 1).sqrt()).relu() @ V - Y + c).pow(2).mean()
    ),
    "largest of the rows": lambda X, Y, W, b, V, c: (
        ((X @ W).amax(0) * b).sum() + ((X @ W + b) @ V - Y + c).square().mean()
    ),
    "one of the rows": lambda X, Y, W, b, V, c: ((X @ W + b - (X[3] @ W)).tanh() @ V + c - Y[-1]).square().mean(),
    "parts of the columns": lambda X, Y, W, b, V, c: (
        ((torch.cat([X[:, :2], X[:, 2:] * 2], 1) @ W + b).relu() @ V[:, [0, 1, 2]] * Y[:, 1:2] + c).sin().mean()
    ),
    "rows of pictures": lambda X, Y, W, b, V, c: (
        ((X.view(-1, 2, 3) * 2).permute(0, 2, 1).reshape(-1, 6) @ W * b).square().sum() + (V.sum() + c.sum()) * Y.mean()
    ),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    function = MODELS[name]
    params = [draw(6, 5), draw(5), draw(5, 3), draw(3)]
    program = freeze(function, [draw(ROWS, 6), draw(ROWS, 3)], params, backend="native")
    assert program._step.source is not None
    told = program._step.native
    assert told is not None
    assert told.loops > 0, str(told)
    for _ in range(2):
        follows(program, function, [draw(ROWS, 6), draw(ROWS, 3)], params, tol=1e-9)


def test_inputs_that_lie_in_other_ways() -> None:
    function = MODELS["mse of an mlp"]
    params = [draw(6, 5), draw(5), draw(5, 3), draw(3)]
    ways: list[Callable[[], Tensor]] = [
        lambda: draw(6, ROWS).t(), lambda: draw(ROWS, 12)[:, ::2], lambda: draw(1, 6).expand(ROWS, 6)
    ]  # fmt: skip
    for made in ways:
        program = freeze(function, [made(), draw(ROWS, 3)], params, backend="native")
        in_loops(program)
        follows(program, function, [made(), draw(ROWS, 3)], params, tol=1e-9)
        follows(program, function, [draw(ROWS, 6), draw(ROWS, 3)], params, tol=1e-9)


def test_numbers_that_are_none_spread_as_in_torch() -> None:
    X, Y, w = draw(ROWS, 4), draw(ROWS, 1), draw(4, 1)
    program = freeze(lambda X, Y, w: ((X @ w).relu() - Y).pow(2).mean(), [X, Y], [w], backend="native")
    in_loops(program)
    X = draw(ROWS, 4)
    X[17, 2] = float("nan")
    got = program.step(X, Y)
    leaf = plain(w).requires_grad_()
    wanted = ((X @ leaf).relu() - Y).pow(2).mean()
    (g,) = torch.autograd.grad(wanted, [leaf])
    assert got.isnan()
    assert torch.equal(grad_of(w).isnan(), g.isnan())
    assert torch.equal(grad_of(X).isnan().any(1).nonzero().flatten(), torch.tensor([17]))


def test_results_belong_to_the_caller() -> None:
    X, Y, w = draw(ROWS, 4), draw(ROWS, 1), draw(4, 1)
    program = freeze(lambda X, Y, w: (((X @ w).relu() - Y).pow(2).mean(), X @ w), [X, Y], [w], backend="native")
    kept = []
    for _ in range(5):
        X = draw(ROWS, 4)
        first, second = program.step(X, Y)
        kept.append([X, first, second, grad_of(X), grad_of(w)])
        kept[-1] += [plain(t) for t in kept[-1][1:]]
        vars(w).pop("g")
    for X, a, b, c, d, *copies in kept:
        for tensor, copy in zip((a, b, c, d), copies, strict=True):
            assert torch.equal(tensor, copy)
        close(b, X @ w, 1e-9)


def test_parameters_whose_memory_changes() -> None:
    X, Y, w = draw(ROWS, 4), draw(ROWS, 1), draw(4, 1)

    def function(X: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        return ((X @ w).tanh() - Y).pow(2).mean()

    program = freeze(function, [X, Y], [w], backend="native")
    follows(program, function, [X, Y], [w], tol=1e-9)
    w.data = draw(1, 4).t()
    follows(program, function, [X, Y], [w], tol=1e-9)
    w.data = draw(8, 1)[::2]
    follows(program, function, [X, Y], [w], tol=1e-9)


def test_replays_of_several_threads_at_once() -> None:
    w, b = draw(6, 1), draw(1)

    def function(X: Tensor, Y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ((X @ w + b).relu() - Y).pow(2).mean()

    X, Y = draw(ROWS, 6), draw(ROWS, 1)
    program = freeze(function, [X, Y], [w, b], wrt=[X], backend="native")
    in_loops(program)
    given = [(draw(ROWS, 6), draw(ROWS, 1)) for _ in range(8)]
    wrong: list[str] = []

    def run(X: Tensor, Y: Tensor) -> None:
        leaf = plain(X).requires_grad_()
        wanted = function(leaf, Y, w, b)
        (g,) = torch.autograd.grad(wanted, [leaf])
        try:
            for _ in range(10):
                close(program.step(X, Y), wanted, 1e-9)
                close(g_of(X), g, 1e-9)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=pair) for pair in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_guard_is_checked_and_torch_runs_between(threads: int) -> None:
    def function(X: Tensor, Y: Tensor, w: Tensor) -> Tensor:
        Z = X @ w
        if Z.sum() > 0:
            Z = Z * 2
        order = Z.flatten().sort().values
        return ((Z.tanh() - Y).pow(2) * order.unsqueeze(1)).mean()

    X, Y, w = draw(ROWS, 4).abs(), draw(ROWS, 1), draw(4, 1).abs()
    program = freeze(function, [X, Y], [w], backend="native")
    follows(program, function, [X * 2, Y], [w], tol=1e-9)
    before = plain(grad_of(w))
    with pytest.raises(te.GuardError):
        program.step(-X, Y)
    assert torch.equal(grad_of(w), before)


def test_a_product_worth_torchs_own_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tape_engine.program.backends.native.plan.ROW_WORK", 2)
    function = MODELS["mse of an mlp"]
    params = [draw(6, 5), draw(5), draw(5, 3), draw(3)]
    program = freeze(function, [draw(ROWS, 6), draw(ROWS, 3)], params, backend="native")
    follows(program, function, [draw(ROWS, 6), draw(ROWS, 3)], params, tol=1e-9)
    assert "torch.mm" in program.code
