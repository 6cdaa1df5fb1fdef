"""Large products of matrices, where torch's BLAS is known to lag behind.

MKL takes an older way on processors that are not Intel's, and leaves a fifth of the time and more on the table. oneDNN,
which comes with torch as well and does its convolutions, goes by what the processor can do: a product of many lines is
a layer without a bias.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from ..tape import Node, Value
from .calls import Call

__all__ = ["blas_lags", "call_for"]

aten = torch.ops.aten
Tensor = torch.Tensor

WORK = 1 << 23  # multiplications from which on another way is looked for
LINES, NARROW = 1024, 64  # lines of the result, and elements of a line and steps of its sum, likewise

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def blas_lags() -> bool:
    """Whether torch multiplies matrices by MKL on a processor of AMD's that has AVX-512. Others were not looked at."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch._C.has_mkl:
        return False
    try:
        return "AuthenticAMD" in CPUINFO.read_text()
    except OSError:  # no Linux: nothing is known
        return False


def call_for(node: Node) -> Call | None:
    """How a product is run by oneDNN; ``None`` for every other node, and where torch's own way is as good."""
    forward = node.op.forward
    if forward not in (aten.mm.default, aten.addmm.default) or node.kwargs or not torch._C._get_mkldnn_enabled():
        return None
    values: list[Any] = [*node.args, *node.outputs]
    if not all(isinstance(v, Value) and v.dtype is torch.float32 and v.device.type == "cpu" for v in values):
        return None
    *start, a, _, out = values
    (M, K), N = a.shape, out.shape[1]
    if M * N * K < WORK or M < LINES or min(N, K) < NARROW or a.strides != (K, 1):
        return None
    if [v.shape for v in start] not in ([], [(N,)]) or not blas_lags() or not torch._C._has_mkldnn:
        return None
    return Call(added, "linear") if start else Call(linear, "linear")


def linear(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return made


def added(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with `start` added to each line."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), start, "none", [], "")
    return made
