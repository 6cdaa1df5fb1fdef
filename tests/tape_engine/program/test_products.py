"""Large products of the python backend by oneDNN: right, and only where they are meant to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine.program import products
from tests.helpers import plain

Tensor = torch.Tensor

pytestmark = pytest.mark.skipif(not torch._C._has_mkldnn, reason="a torch without oneDNN")


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's BLAS is taken to lag behind, whatever processor this is."""
    monkeypatch.setattr(products, "blas_lags", lambda: True)


def layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, w).tanh()


def frozen(rows: int, *, dtype: torch.dtype = torch.float32, turned: bool = False) -> tuple[te.Program, list[Tensor]]:
    x, w, bias = (torch.randn(*n, dtype=dtype) for n in ((rows, 80), (80, 128), (128,)))
    if turned:
        x = x.t().contiguous().t()
    with te.record() as tape:
        C = layer(x, w, bias).square().mean()
    return tape.program(inputs=(x,), outputs=C, wrt=(x, w, bias), backend="python"), [x, w, bias]


@pytest.mark.usefixtures("lagging")
def test_a_program_has_them() -> None:
    """A layer and the gradient of its input; a weight's gradient, a product over the lines, stays with torch."""
    program, (_, w, bias) = frozen(1024)
    assert len(re.findall(r"= linear\w*\(", program.code)) == 2
    assert program.code.count("torch.mm(") == 1
    for _ in range(3):
        x = torch.randn(1024, 80)
        ours = [plain(each).requires_grad_() for each in (x, w, bias)]
        wanted = torch.autograd.grad(layer(*ours).square().mean(), ours)
        loss = program.step(x)
        torch.testing.assert_close(loss, layer(x, w, bias).square().mean())
        for each, g in zip((x, w, bias), wanted, strict=True):
            torch.testing.assert_close(vars(each)["g"], g, rtol=1e-4, atol=1e-8)


@pytest.mark.usefixtures("lagging")
@pytest.mark.parametrize(
    "case", [{"rows": 512}, {"rows": 1024, "dtype": torch.float64}, {"rows": 1024, "turned": True}], ids=str
)
def test_other_products_are_torchs(case: dict[str, Any]) -> None:
    """Few lines, other dtypes; and a factor that lies column by column, where oneDNN is slower."""
    program, (x, w, bias) = frozen(**case)
    forward = program.code.partition("# the reverse sweep")[0]
    assert "linear(" not in forward
    torch.testing.assert_close(program(x), layer(x, w, bias).square().mean())


@pytest.mark.usefixtures("lagging")
def test_factors_and_other_starts_are_torchs() -> None:
    x, w, start = torch.randn(1024, 80), torch.randn(80, 128), torch.randn(1024, 128)
    with te.record() as tape:
        C = torch.addmm(start, x, w).sum() + torch.addmm(start[0], x, w, beta=0.5, alpha=2).sum()
    program = tape.program(inputs=(x,), outputs=C, backend="python")
    program(x)
    assert "linear" not in program._forward.source.text
    x = torch.randn(1024, 80)
    wanted = (start + x @ w).double().sum() + (0.5 * start[0] + 2 * x @ w).double().sum()
    torch.testing.assert_close(program(x).double(), wanted, rtol=1e-3, atol=1.0)


@pytest.mark.usefixtures("lagging")
def test_a_user_who_switches_onednn_off_is_heard() -> None:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        program, _ = frozen(1024)
        assert "linear(" not in program.code
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def test_where_the_blas_lags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With MKL and AVX-512, on processors of AMD; where nothing is known of the processor, nothing is changed."""
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "CPUINFO", told)
    monkeypatch.setattr(torch._C, "has_mkl", True)
    lags = products.blas_lags.__wrapped__
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not lags()
    told.write_text("vendor_id\t: AuthenticAMD\n")
    assert lags()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not lags()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    told.write_text("vendor_id\t: GenuineIntel\n")
    assert not lags()
    told.write_text("vendor_id\t: AuthenticAMD\n")
    monkeypatch.setattr(torch._C, "has_mkl", False)
    assert not lags()
