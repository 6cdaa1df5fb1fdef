"""Batch normalisation in passes: what torch's kernel gives, also far from nought."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tape_engine as te
from tape_engine.program import batch_norms
from tape_engine.program.backends import native
from tests.helpers import plain

Tensor = torch.Tensor
BACKENDS = ("python", "native") if native.available() else ("python",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 1e3, -1e5])
def test_statistics(dtype: torch.dtype, shift: float) -> None:
    """Against the same in double precision, for channels whose mean is far larger than their deviation."""
    torch.manual_seed(0)
    x = (torch.randn(8, 5, 16, 9, dtype=torch.float64) * torch.arange(1.0, 6.0).view(5, 1, 1) + shift).to(dtype)
    weight, bias, mean, var = (torch.rand(5, dtype=dtype) + 0.5 for _ in range(4))
    out, found, inverse, new_mean, new_var = batch_norms.batch_norm(x, weight, bias, mean, var, True, 0.3, 1e-5)
    wide = x.double()
    spread, middle = torch.var_mean(wide, (0, 2, 3), correction=0)
    eps = torch.finfo(dtype).eps * (1 if dtype is torch.float32 else 1 + abs(shift))  # the wide sums round as well
    torch.testing.assert_close(found.double(), middle, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(inverse.double(), (spread + 1e-5).rsqrt(), rtol=20 * eps, atol=0)
    n = x.numel() // 5
    torch.testing.assert_close(new_mean.double(), 0.7 * mean.double() + 0.3 * middle, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(
        new_var.double(), 0.7 * var.double() + 0.3 * spread * n / (n - 1), rtol=20 * eps, atol=8 * eps
    )
    wanted = (wide - middle.view(5, 1, 1)) * (spread + 1e-5).rsqrt().view(5, 1, 1)
    wanted = wanted * weight.double().view(5, 1, 1) + bias.double().view(5, 1, 1)
    torch.testing.assert_close(out.double(), wanted, rtol=1e2 * eps, atol=8 * eps * (1 + abs(shift)))


def test_a_channel_of_one_number_and_one_that_is_not_finite() -> None:
    x = torch.randn(8, 3, 70)
    x[:, 1] = 3.3
    x[2, 2, 5] = float("inf")
    ones, zeros = torch.ones(3), torch.zeros(3)
    ours = batch_norms.batch_norm(x, ones, zeros, zeros, ones, True, 0.1, 1e-5)
    torchs = torch.ops.aten._native_batch_norm_legit_functional(x, ones, zeros, zeros, ones, True, 0.1, 1e-5)
    torch.testing.assert_close(ours[0][:, :2], torchs[0][:, :2], rtol=1e-4, atol=1e-3)
    assert bool(ours[0][:, 2].isnan().all())


@pytest.mark.parametrize(("size", "eps"), [(1e37, 1e-5), (3e38, 1e-5), (1e25, 1e-5), (1e-25, 0.0), (0.0, 0.0)], ids=str)
def test_what_single_precision_cannot_sum_up_is_torchs(size: float, eps: float) -> None:
    """Sums that are too large, squares that are too large or too small, and a deviation of nought without `eps`."""
    torch.manual_seed(0)
    x = (torch.rand(8, 3, 70) + 0.1) * size
    ones, zeros = torch.ones(3), torch.zeros(3)
    found = batch_norms.batch_norm(x, ones, zeros, zeros, ones, True, 0.1, eps)
    wanted = torch.ops.aten._native_batch_norm_legit_functional(x, ones, zeros, zeros, ones, True, 0.1, eps)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert bool(found[0].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_has_them(backend: str) -> None:
    """In training: the gradients and the running statistics, on inputs other than those recorded."""
    torch.manual_seed(0)
    ours, torchs = (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2))
    x = torch.randn(16, 8, 64, 64)
    with te.record() as tape:
        C = (ours(x) * x).square().mean()
    torchs.load_state_dict(ours.state_dict())
    program = tape.program(inputs=(x,), outputs=C, wrt=[x, *ours.parameters()], backend=backend)
    assert "= batch_norm(" in program.code
    for _ in range(2):
        x = torch.randn(16, 8, 64, 64) + 2
        leaf = plain(x).requires_grad_()
        wanted = torch.autograd.grad((torchs(leaf) * leaf).square().mean(), [leaf, *torchs.parameters()])
        program.step(x)
        for each, g in zip([x, *ours.parameters()], wanted, strict=True):
            torch.testing.assert_close(vars(each)["g"], g, rtol=1e-4, atol=1e-6)
        for one, other in zip(ours.buffers(), torchs.buffers(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", ["small", "evaluated", "short lines", "channels last"])
def test_other_normalisations_are_torchs(case: str) -> None:
    model = nn.BatchNorm2d(8).train(case != "evaluated")
    shape = {"small": (4, 8, 16, 16), "short lines": (1024, 8, 6, 6)}.get(case, (16, 8, 64, 64))
    x = torch.randn(shape)
    if case == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    with te.record() as tape:
        C = model(x).square().mean()
    program = tape.program(inputs=(x,), outputs=C, backend="python")
    assert "= batch_norm(" not in program.code
    torch.testing.assert_close(program(x), model(x).square().mean().detach())
