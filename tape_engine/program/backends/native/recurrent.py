"""Layers of an LSTM, forward and back, as loops over the moments that never leave a core.

oneDNN, which torch gives such a layer to, has nothing better for many a processor than its plain form: a product for
each moment, shared by all cores, and element-wise work around it. The rows of a batch know nothing of each other. So
each thread takes some of them through all moments, with the weights packed in its cache; what does not depend on the
moment before (the part of the inputs, the gradients of the weights) are large products before and after.

With the gates i, f, g, o of a moment, ``c = f c' + i g`` and ``h = o tanh(c)`` (Hochreiter and Schmidhuber, Long
short-term memory, 1997; the gate f is Gers' and others', 2000).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....tape import Node, Value
from ...calls import Call
from ...products import blas_lags
from . import large, objects
from .machine import ALIGNED
from .team import Share, threads

__all__ = ["calls"]

aten = torch.ops.aten
Tensor = torch.Tensor
FORWARD, BACKWARD = aten.mkldnn_rnn_layer.default, aten.mkldnn_rnn_layer_backward.default

LSTM = 2  # the mode, as torch counts them
WORKSPACE = 22  # the place of the workspace among the arguments of the backward
WORK = 1 << 22  # multiplications of a layer from which on it is worth it
ROWS, NARROW = 16, 32  # rows of a batch, and elements of a state, from which on tiles are full
PACKED = 1 << 20  # bytes of the recurrent weights that a core's cache has room for


def calls(
    nodes: Sequence[Node], canonical: Callable[[Value], Value], wanted: Collection[Value]
) -> Callable[[Node], Call | None]:
    """What tells how a node among `nodes` is run, or one that does its work again; ``None`` where torch is to run it.

    A layer and its gradient go together, for one reads what the other has noted in a form of its own.
    """
    read: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            read.setdefault(canonical(value), []).append(node)
    layers = [node for node in nodes if node.op.forward is FORWARD]
    ours: set[Value] = set()
    for node in layers:
        note = canonical(node.outputs[-1])
        after = read.get(note, [])
        if _fits(node) and note not in wanted and all(map(_goes_back, after)):
            ours.add(note)

    def found(node: Node) -> Call | None:
        if node.op.forward is FORWARD and ours and canonical(node.outputs[-1]) in ours:
            return Call(forward, "lstm")
        if node.op.forward is BACKWARD and ours and canonical(node.args[WORKSPACE]) in ours:
            gives = [canonical(v) in wanted or canonical(v) in read for v in node.outputs]
            return Call(_Backward(tuple(gives)), "lstm_backward")
        return None

    return found


def _fits(node: Node) -> bool:
    x, w, _, _, _, hx, cx, _, batch_sizes, mode, size, *_ = node.args
    if mode != LSTM or batch_sizes or len(node.outputs) != 4 or node.gaps or not blas_lags():
        return False
    values = [*node.inputs, *node.outputs[:3]]
    if any(v.dtype is not torch.float32 or v.device.type != "cpu" for v in values) or w.shape[0] != 4 * size:
        return False
    T, B, _ = x.shape
    dense = [(B * size, size, 1), (size, 1), (size, 1)]
    if [v.strides for v in node.outputs[:3]] != dense or hx.shape != (B, size) or cx.shape != (B, size):
        return False
    large: bool = 16 * size * size <= PACKED and 4 * T * B * size * size >= WORK
    return large and bool(B >= ROWS and size >= NARROW)


def _goes_back(node: Node) -> bool:
    return node.op.forward is BACKWARD and all(isinstance(node.args[i], Value) for i in (10, 11, 12))


# -- what the kernel is told ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operand:
    """Rows at each moment.

    Attributes:
        first, second: their address at the first moment, and at the second.
        step, row: the bytes from moment to moment, from the second on, and from row to row.
    """

    first: int
    second: int
    step: int
    row: int

    def words(self, begin: int) -> list[int]:
        moved = begin * self.row
        return [self.first + moved, self.second + moved, self.step, self.row]

    def part(self, elements: int) -> _Operand:
        """From so many elements of each row on."""
        return _Operand(self.first + 4 * elements, self.second + 4 * elements, self.step, self.row)


NONE = _Operand(0, 0, 0, 0)


def _series(x: Tensor, back: bool) -> _Operand:
    """The rows of a tensor (moments, rows, elements), from the first moment on or from the last one back."""
    step, row = 4 * x.stride(0), 4 * x.stride(1)
    start = x.data_ptr() + (step * (x.shape[0] - 1) if back else 0)
    step = -step if back else step
    return _Operand(start, start + step, step, row)


def _still(x: Tensor, row: int | None = None) -> _Operand:
    """The rows of a matrix, the same at each moment."""
    return _Operand(x.data_ptr(), x.data_ptr(), 0, 4 * x.stride(0) if row is None else row)


def _after(first: Tensor, then: _Operand) -> _Operand:
    """The rows of a matrix at the first moment, and each time what was there a moment before."""
    return _Operand(first.data_ptr(), then.first, then.step, then.row)


@dataclass(frozen=True)
class _Map:
    """A map of each row: its kernel, how many elements, the result and its operands."""

    name: str
    count: int
    result: _Operand
    operands: tuple[_Operand, ...]


def _run(
    moments: int,
    rows: int,
    weights: Tensor,
    first: int,
    C: _Operand,
    S: _Operand,
    A: _Operand,
    maps: Callable[[Sequence[_Operand]], Sequence[_Map]],
    size: int,
) -> None:
    """Runs the recurrence on all threads, each with some of the rows.

    Args:
        moments: how many there are.
        rows: of the batch.
        weights: the right factor of the product of each moment.
        first: how many steps the sum of the first moment's product has.
        C: the result of that product, ``S + A @ weights``.
        S: what it begins with.
        A: its left factor.
        maps: gives the maps, on lines for passing results.
        size: the elements of such a line.
    """
    K, N = weights.shape
    share = -(-rows // threads())
    share = min(-(-share // 4) * 4, rows)
    starts = range(0, rows, share)
    panels = -(-N // 32) * 32 * K * 4
    lines = -(-size * 4 // ALIGNED) * ALIGNED
    each = panels + 8 * lines
    room = large.room(len(starts) * each)
    kept: list[Any] = []
    words = []
    for i, begin in enumerate(starts):
        start = -(-room.data_ptr() // ALIGNED) * ALIGNED + i * each
        begins = [start + panels + j * lines for j in range(8)]
        passing = [_Operand(address, address, 0, 0) for address in begins]
        table = maps(passing)
        named = [f"{m.name}_f_{'1' * (1 + len(m.operands))}" for m in table]
        addresses = objects.load([*named, "recurrence_f", "share"])
        told: list[int] = []
        for name, m in zip(named, table, strict=True):
            told += [addresses[name], m.count]
            for operand in (m.result, *m.operands, *[NONE] * (2 - len(m.operands))):
                told += operand.words(begin)
        kept.append((ctypes.c_int64 * len(told))(*told))
        given = [moments, min(share, rows - begin), N, K, weights.data_ptr(), 4 * weights.stride(0)]
        given += [4 * weights.stride(1), start, first, *C.words(begin), *S.words(begin), 1, *A.words(begin)]
        given += [len(table), ctypes.addressof(kept[-1])]
        words.append((ctypes.c_int64 * len(given))(*given))
    Share([ctypes.addressof(w) for w in words], objects.load(["recurrence_f", "share"]), "recurrence_f")()


# -- forward and back -------------------------------------------------------------------------------------------------


def _parts(note: Tensor, T: int, B: int, H: int) -> tuple[Tensor, Tensor]:
    """The gates of each moment, and the cells: those before the first one, then those after each, as they came."""
    many = T * B * 4 * H
    return note[:many].view(T, B, 4 * H), note[many:].view(T + 1, B, H)


def forward(
    x: Tensor, w: Tensor, u: Tensor, b: Tensor, d: Tensor, hx: Tensor, cx: Tensor, reverse: bool, batch_sizes: Any,
    mode: int, size: int, num_layers: int, has_biases: bool, bidirectional: bool, batch_first: bool, train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``aten.mkldnn_rnn_layer``: all outputs, the last ones, the last cells, and what the gradient needs."""
    T, B, _ = x.shape
    H = size
    out = x.new_empty(T, B, H)
    note = x.new_empty((5 * T + 1) * B * H)
    gates, cells = _parts(note, T, B, H)
    x = x.contiguous()
    flat, into = x.view(T * B, -1), gates.view(T * B, 4 * H)
    if has_biases:
        large.addmm(b + d, flat, w.t(), out=into)
    else:
        large.mm(flat, w.t(), out=into)
    hx = hx.contiguous()
    cells[0].copy_(cx)
    Z = x.new_empty(B, 4 * H)
    G, c, h, z = _series(gates, reverse), _series(cells, False), _series(out, reverse), _still(Z)
    i, f, g, o = (G.part(n * H) for n in range(4))
    before = c
    c = _Operand(c.second, c.second + c.step, c.step, c.row)

    def maps(q: Sequence[_Operand]) -> list[_Map]:
        return [
            _Map("sigmoid", 2 * H, i, (z,)),
            _Map("tanh", H, g, (z.part(2 * H),)),
            _Map("sigmoid", H, o, (z.part(3 * H),)),
            _Map("mul", H, q[0], (i, g)),
            _Map("mul", H, q[1], (f, before)),
            _Map("add", H, c, (q[0], q[1])),
            _Map("tanh", H, q[2], (c,)),
            _Map("mul", H, h, (o, q[2])),
        ]

    _run(T, B, u.t(), H, z, G, _after(hx, h), maps, H)
    return out, out[0 if reverse else -1].clone(), cells[T].clone(), note


@dataclass(frozen=True)
class _Backward:
    """The gradient of a layer, as ``aten.mkldnn_rnn_layer_backward`` gives it; ``None`` for what nobody reads."""

    gives: tuple[bool, ...]

    def __call__(
        self, x: Tensor, w: Tensor, u: Tensor, b: Tensor, d: Tensor, hx: Tensor, cx: Tensor, out: Tensor, hy: Tensor,
        cy: Tensor, by_out: Tensor, by_h: Tensor, by_c: Tensor, reverse: bool, mode: int, size: int, num_layers: int,
        has_biases: bool, train: bool, bidirectional: bool, batch_sizes: Any, batch_first: bool, note: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        T, B, _ = x.shape
        H = size
        gates, cells = _parts(note, T, B, H)
        by_out = by_out if by_out.stride(2) == 1 and by_out.stride(1) else by_out.contiguous()
        last = by_out[0 if reverse else -1] + by_h
        by_c = by_c.contiguous()
        swept = x.new_empty(T, B, 4 * H)
        by_h, by_cell = x.new_empty(B, H), x.new_empty(B, H)
        back = not reverse
        G, D, dh = _series(gates, back), _series(swept, back), _still(by_h)
        i, f, g, o = (G.part(n * H) for n in range(4))
        di, df, dg, do = (D.part(n * H) for n in range(4))
        c = _series(cells[1:], True)
        before = _series(cells[:-1], True)
        dc = _still(by_cell)
        dc_after = _Operand(by_c.data_ptr(), dc.first, 0, dc.row)
        S = _series(by_out, back)
        S = _Operand(last.data_ptr(), S.second, S.step, S.row)

        def maps(q: Sequence[_Operand]) -> list[_Map]:
            return [
                _Map("tanh", H, q[0], (c,)),
                _Map("mul", H, q[1], (dh, q[0])),
                _Map("sigmoid_backward", H, do, (q[1], o)),
                _Map("mul", H, q[2], (dh, o)),
                _Map("tanh_backward", H, q[3], (q[2], q[0])),
                _Map("add", H, q[4], (q[3], dc_after)),
                _Map("mul", H, q[5], (q[4], g)),
                _Map("sigmoid_backward", H, di, (q[5], i)),
                _Map("mul", H, q[6], (q[4], before)),
                _Map("sigmoid_backward", H, df, (q[6], f)),
                _Map("mul", H, q[7], (q[4], i)),
                _Map("tanh_backward", H, dg, (q[7], g)),
                _Map("mul", H, dc, (q[4], f)),
            ]

        # a row of S is as far from the next one at the first moment as at all others
        if last.stride(0) != by_out.stride(1):
            room = x.new_empty_strided((B, H), (by_out.stride(1), 1))
            last = room.copy_(last)
            S = _Operand(last.data_ptr(), S.second, S.step, S.row)
        _run(T, B, u, 0, dh, S, _after(swept[0], D), maps, H)
        flat = swept.view(T * B, 4 * H)
        first = swept[-1 if reverse else 0]
        by_x, by_w, by_u, by_b, by_d, by_hx, _ = self.gives
        found: list[Tensor | None] = [None] * 7
        if by_x:
            found[0] = large.mm(flat, w, out=x.new_empty(T * B, w.shape[1])).view(x.shape)
        if by_w:
            found[1] = large.mm(flat.t(), x.reshape(T * B, -1), out=torch.empty_like(w))
        if by_u:
            found[2] = made = torch.empty_like(u)
            later = swept[:-1] if reverse else swept[1:]
            earlier = out[1:] if reverse else out[:-1]
            large.mm(later.reshape(-1, 4 * H).t(), earlier.reshape(-1, H), out=made)
            made.addmm_(first.t(), hx)
        if by_b or by_d:
            of_bias = flat.sum(0)
            found[3:5] = [of_bias, of_bias.clone()]
        if by_hx:
            found[5] = first @ u
        found[6] = by_cell
        return tuple(found)
