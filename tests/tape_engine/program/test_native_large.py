"""Large products of the native backend: right for every layout and size, and only where they are meant to be."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import tape_engine as te
from tape_engine.program import products
from tape_engine.program.backends import native
from tests.helpers import plain

if not native.available():
    pytest.skip("no kernels", allow_module_level=True)

from tape_engine.program.backends.native import large

Tensor = torch.Tensor

SHAPES = [(612, 96, 97), (100, 130, 1100), (37, 24, 2000), (1, 70, 3000), (613, 200, 24), (24, 1100, 41)]


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's BLAS is taken to lag behind, whatever processor this is."""
    monkeypatch.setattr(large, "blas_lags", lambda: True)
    monkeypatch.setattr(products, "blas_lags", lambda: True)


@pytest.fixture(params=[1, 2, 3])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """In how many parts a product goes."""
    monkeypatch.setattr(large, "threads", lambda: request.param)
    return int(request.param)


def matrix(rows: int, columns: int, dtype: torch.dtype, turned: bool = False, gap: int = 0) -> Tensor:
    whole = torch.randn(columns if turned else rows, (rows if turned else columns) + gap, dtype=dtype)
    cut = whole[:, : whole.shape[1] - gap]
    return cut.t() if turned else cut


def right(found: Tensor, wanted: Tensor, steps: int) -> None:
    tolerance = steps * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int], dtype: torch.dtype, parts: int) -> None:
    """Factors in order and turned, with gaps, tails in every direction; what the result held before does not count."""
    M, N, K = shape
    torch.manual_seed(0)
    for a_turned, b_turned, gap in ((0, 0, 0), (1, 0, 3), (0, 1, 5), (1, 1, 0)):
        a, b = matrix(M, K, dtype, bool(a_turned), gap), matrix(K, N, dtype, bool(b_turned), gap)
        wanted = a.double() @ b.double()
        out = torch.full((M, N + gap), float("nan"), dtype=dtype)[:, :N]
        assert large.mm(a, b, out=out) is out
        right(out, wanted, K)
        line, whole = torch.randn(N, dtype=dtype), torch.randn(M, N, dtype=dtype)
        for start in (line, whole, torch.randn(1, N, dtype=dtype)):
            out.fill_(float("nan"))
            large.addmm(start, a, b, out=out)
            right(out, wanted + start.double(), K)


@pytest.mark.parametrize("K", [1000, 4096, 20000])
@pytest.mark.parametrize("turned", [False, True])
def test_long_sums_are_as_exact_as_torchs(K: int, turned: bool, parts: int) -> None:
    """Also of numbers that are all of one sign, and where what is added to the product is large beside it."""
    torch.manual_seed(0)
    b, out = torch.rand(K, 64), torch.empty(96, 64)
    a = matrix(96, K, torch.float32, turned).abs_()
    for start in (torch.zeros(64), torch.full((64,), 1e5)):
        wanted = a.double() @ b.double() + start.double()
        large.addmm(start, a, b, out=out)
        ours, torchs = (float((each - wanted).square().mean().sqrt()) for each in (out, torch.addmm(start, a, b)))
        assert ours < 3 * torchs


def test_an_empty_sum_is_nought(parts: int) -> None:
    out = torch.full((64, 32), 7.0)
    assert not large.mm(torch.empty(64, 0), torch.empty(0, 32), out=out).any()
    large.addmm(torch.ones(32), torch.empty(64, 0), torch.empty(0, 32), out=out)
    assert bool((out == 1.0).all())
    assert large.mm(torch.empty(0, 64), torch.empty(64, 32), out=out[:0]).shape == (0, 32)


def test_a_large_result_is_not_held_once_more_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that a thread keeps to work in is bounded, however large a product was."""
    monkeypatch.setattr(large, "threads", lambda: 2)
    monkeypatch.setattr(large, "_rooms", threading.local())
    a, b, out = torch.randn(1200, 1300), torch.randn(1300, 1100), torch.empty(1200, 1100)
    right(large.mm(a, b, out=out), a.double() @ b.double(), 1300)
    assert large.room(0).numel() < out.nbytes // 4


def test_what_lies_beside_the_result_is_not_touched(parts: int) -> None:
    a, b = torch.randn(301, 600), torch.randn(600, 41)
    room = torch.full((303, 50), 7.0)
    large.mm(a, b, out=room[1:302, 3:44])
    right(room[1:302, 3:44], a.double() @ b.double(), 600)
    room[1:302, 3:44] = 7.0
    assert bool((room == 7.0).all())


def test_infinities_and_nan_stay_in_their_lines(parts: int) -> None:
    a, b = torch.rand(200, 700) + 0.1, torch.rand(700, 90) + 0.1
    a[3, 5], a[190, 699], b[650, 89] = float("inf"), float("nan"), float("-inf")
    out = torch.empty(200, 90)
    large.mm(a, b, out=out)
    torch.testing.assert_close(out, a @ b, equal_nan=True, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["turned result", "negative view", "column of starts", "turned starts"])
def test_what_the_kernel_does_not_know_is_torchs(case: str) -> None:
    a, b = torch.randn(64, 100), torch.randn(100, 48)
    start = torch.randn(64, 1) if case == "column of starts" else torch.randn(48, 64).t()
    out = torch.empty(48, 64).t() if case == "turned result" else torch.empty(64, 48)
    if case == "negative view":
        a = torch.complex(torch.zeros(64, 100), torch.randn(64, 100)).conj().imag
        assert a.is_neg()
    if "starts" in case:
        assert large.addmm(start, a, b, out=out) is out
        right(out, start.double() + a.double() @ b.double(), 100)
    else:
        assert large.mm(a, b, out=out) is out
        right(out, a.double() @ b.double(), 100)


# -- in programs -----------------------------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 40))


def frozen(model: nn.Module, x: Tensor, backend: str = "native") -> te.Program:
    with te.record() as tape:
        C = model(x).square().mean()
    program: te.Program = tape.program(inputs=(x,), outputs=C, wrt=list(model.parameters()), backend=backend)
    return program


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))


def calls(program: te.Program) -> set[str]:
    """The names under which the functions of large products are called."""
    space = program._step.source.constants
    return {name for name, each in space.items() if each in large.FUNCTIONS and f"{name}(" in program.code}


@pytest.mark.usefixtures("lagging")
@pytest.mark.parametrize("backend", ["native", "auto"])
def test_a_program_has_them(backend: str) -> None:
    """Forward, for a result's gradient and for a weight's; on inputs other than those recorded."""
    model = perceptron()
    program = frozen(model, torch.randn(1024, 96), backend)
    assert "backend native" in str(program)
    assert "large product" in str(program)
    assert calls(program)
    for _ in range(3):
        x = torch.randn(1024, 96)
        program.step(x)
        for p, g in zip(model.parameters(), gradients(model, x), strict=True):
            torch.testing.assert_close(vars(p)["g"], g, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("lagging")
def test_small_products_are_not_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    assert not calls(frozen(model, torch.randn(64, 96)))
    monkeypatch.setattr(large, "blas_lags", lambda: False)
    program = frozen(model, torch.randn(1024, 96))
    assert not calls(program)
    assert "large product" not in str(program)


@pytest.mark.usefixtures("lagging")
def test_a_product_with_factors_is_torchs() -> None:
    x, w, bias = torch.randn(1024, 96), torch.randn(96, 128), torch.randn(128)
    with te.record() as tape:
        C = torch.addmm(bias, x, w, beta=0.5, alpha=2).square().mean()
    program = tape.program(inputs=(x,), outputs=C, backend="native")
    x = torch.randn(1024, 96)
    torch.testing.assert_close(program(x), (0.5 * bias + 2 * x @ w).square().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("lagging")
def test_several_threads_replay_at_once() -> None:
    model = perceptron()
    program = frozen(model, torch.randn(1024, 96))
    inputs = [torch.randn(1024, 96) for _ in range(4)]
    wanted = [plain(model(x).square().mean()) for x in inputs]
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def run(i: int) -> None:
        found[i] += [program(inputs[i]) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for i in range(4):
        assert len(found[i]) == 20
        for loss in found[i]:
            torch.testing.assert_close(loss, wanted[i], rtol=1e-5, atol=1e-7)
