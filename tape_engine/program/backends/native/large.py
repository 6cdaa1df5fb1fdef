"""Large products of matrices, each on all threads: by tiles of twelve lines, which are summed in vector registers.

Torch's BLAS does not make the most of every processor: where MKL meets one that is not Intel's, it takes an older
way, and leaves a quarter of the time on the table. There these take its place. The right factor is laid into panels
that fill a line of two registers each, and goes through the cache in parts (Goto and van de Geijn, Anatomy of
high-performance matrix multiplication, 2008).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch

from ....tape import Node, Value
from ...calls import Call
from ...products import blas_lags
from . import objects
from .machine import ALIGNED, KIND
from .team import Share, threads

__all__ = ["FUNCTIONS", "addmm", "call_for", "mm", "room"]

aten = torch.ops.aten
Tensor = torch.Tensor

LEAST = 1 << 22  # multiplications from which on it is worth it to share a product
NARROW = 24  # columns, and steps of the sum, below which tiles are mostly empty
PACKED = 1 << 18  # bytes of the right factor that are packed at a time
DEPTH, LINES = 512, 192  # steps of the sum, and lines of the left factor, at a time
SUMS = 1 << 22  # bytes of a result up to which threads share its sums: each but the first needs room for all of it
TURNED = 256, 264  # the same where that lies column by column, and is packed as well


def call_for(node: Node) -> Call | None:
    """How a node is run as a large product; ``None`` where torch is to run it."""
    forward = node.op.forward
    if forward not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return None
    values = [*node.inputs, *node.outputs]
    if any(v.dtype not in (torch.float32, torch.float64) or v.device.type != "cpu" for v in values):
        return None
    if not all(isinstance(v, Value) for v in node.args) or not blas_lags():
        return None
    (M, K), N = node.inputs[-2].shape, node.outputs[0].shape[1]
    if M * N * K < LEAST or min(N, K) < NARROW:
        return None
    if forward is aten.mm.default:
        return Call(mm, "mm", ("out",))
    return Call(addmm, "addmm", ("out",))


def mm(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """``a @ b``, written to `out`."""
    return out if _multiplied(None, a, b, out) else torch.mm(a, b, out=out)


def addmm(start: Tensor, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """``start + a @ b``, written to `out`; `start` is broadcast."""
    return out if _multiplied(start.expand(out.shape), a, b, out) else torch.addmm(start, a, b, out=out)


FUNCTIONS: tuple[Callable[..., Tensor], ...] = (mm, addmm)


def _multiplied(start: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Fills `out`, unless something lies in memory as the kernel does not know it."""
    given = [a, b, out] if start is None else [a, b, out, start]
    if out.stride(1) != 1 or any(each.is_neg() or each.is_conj() for each in given):
        return False
    if start is not None and start.stride(1) != 1:
        return False
    (M, K), N, item, parts = a.shape, b.shape[1], a.element_size(), threads()
    if not (M and N and K):
        return False
    turned = a.stride(0) == 1
    depth, lines = TURNED if turned else (DEPTH, LINES)
    depth = min(K, depth)
    across = min(N, PACKED // (depth * item))
    across = -(-across // 32) * 32
    by_sum = M * (parts - 1) < K and M * N * item <= SUMS and parts > 1
    panels = across * depth * item
    sums = M * N * item if by_sum else 0
    tiles = lines * depth * item if turned else 0
    panels += tiles
    work = room(parts * panels + (parts - 1) * sums)
    address = -(-work.data_ptr() // ALIGNED) * ALIGNED
    size = K if by_sum else M
    share = -(-size // parts)
    share = -(-share // 12) * 12
    words: list[Any] = []
    rest = address + parts * panels
    partial = []
    for i, begin in enumerate(range(0, size, share)):
        count = min(share, size - begin)
        A, B, C = a.data_ptr(), b.data_ptr(), out.data_ptr()
        S, rs = (C, 0) if start is None else (start.data_ptr(), start.stride(0) * item)
        rc, starts = out.stride(0) * item, int(start is not None)
        if by_sum:
            A, B = A + begin * a.stride(1) * item, B + begin * b.stride(0) * item
            if i:
                offset = rest - work.data_ptr()
                partial.append(work[offset : offset + sums].view(a.dtype).view(M, N))
                C, rc, starts = rest, N * item, 0
                rest += sums
        else:
            A, C, S = A + begin * a.stride(0) * item, C + begin * rc, S + begin * rs
        words.append(
            (ctypes.c_int64 * 19)(
                M if by_sum else count, N, count if by_sum else K, C, rc, A, a.stride(0) * item, a.stride(1) * item,
                B, b.stride(0) * item, b.stride(1) * item, S, rs, starts, address + i * panels, depth, across, lines,
                address + (i + 1) * panels - tiles if tiles else 0,
            )
        )  # fmt: skip
    kernel = f"product_large_{KIND[a.dtype]}"
    Share([ctypes.addressof(each) for each in words], objects.load([kernel, "share"]), kernel)()
    for each in partial:
        out.add_(each)
    return True


_rooms = threading.local()


def room(size: int) -> Tensor:
    """Memory of so many bytes to work in, from the next line of the cache on, which the calling thread keeps."""
    found: Tensor | None = getattr(_rooms, "room", None)
    if found is None or found.numel() < size + ALIGNED:
        with torch.inference_mode(False):
            found = _rooms.room = torch.empty(size + ALIGNED, dtype=torch.uint8, device="cpu")
    return found
