"""The recordings that the tests of the pictures draw, and how a picture's parts are read back."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from html import unescape

import torch
from torch import nn

import tape_engine as te
from tape_engine.tape import Node, Tape, Value

Tensor = torch.Tensor


def article(*, sweep: bool = True, rows: int = 64) -> Tape:
    """lin → relu → mse, as the article has it."""
    X, w, b, Y = torch.randn(rows, 784), torch.randn(784, 1), torch.zeros(1), torch.randn(rows)
    with te.record() as tape:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        C = te.mse(U, Y)
    kept.append((X, w, b, Y, Z, U, C))
    if sweep:
        te.backward(C)
    return tape


kept: list[object] = []  # a tensor that is gone has no `.g` to compare with


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.fc2(self.act(self.fc1(x)))
        return x + changed


class Residual(nn.Module):
    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def residual(blocks: int = 3, *, sweep: bool = True) -> Tape:
    """A residual network of `blocks` blocks of modules, with cross-entropy."""
    net, X, labels = Residual(blocks), torch.randn(6, 5), torch.randint(0, 4, (6,))
    with te.record() as tape:
        loss = nn.functional.cross_entropy(net(X), labels)
    kept.append((net, X, labels, loss))
    if sweep:
        te.backward(loss)
    return tape


def chain(length: int, *, sweep: bool = True) -> Tape:
    """`length` operations one after the other, ``x = tanh(x * w)`` over and over."""
    x, w = torch.randn(3, 3), torch.randn(3, 3)
    kept.append((x, w))
    with te.record() as tape:
        for _ in range(length // 2):
            x = torch.tanh(x * w)
    kept.append(x)
    if sweep:
        te.backward(x, seed=torch.ones(3, 3))
    return tape


def shared() -> Tape:
    """One tensor read several times, twice by one operation, and a fan-out that meets again."""
    a = torch.randn(4, 4)
    with te.record() as tape:
        square = a * a
        both = square + a
        product = both @ square
        total = product.sum()
    kept.append((a, square, both, product, total))
    te.backward(total)
    return tape


#: Every recording in which all tensors are alive after the sweep, so that `.g` can be looked at.
EXAMPLES: dict[str, Callable[[], Tape]] = {
    "article": article,
    "residual": residual,
    "chain": lambda: chain(10),
    "shared": shared,
}


def values(nodes: Iterable[Node]) -> Iterator[Value]:
    for node in nodes:
        yield from node.inputs
        yield from node.outputs


# -- reading back ----------------------------------------------------------------------------------------


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG, after checking that every chunk of it is whole."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        kinds.append(body[:4])
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def png_ink(data: bytes) -> float:
    """The share of a PNG's bytes, unfiltered, that are not those of plain paper."""
    at, packed = 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw = zlib.decompress(packed)
    return 1 - raw.count(0) / len(raw)  # a filtered row of one colour is nearly all zeros


def dot_nodes(source: str) -> dict[str, str]:
    """The attribute list of every node of a DOT text, by key."""
    return dict(re.findall(r"^\s+((?:op|leaf|group)\d+) \[(.*)\]$", source, re.MULTILINE))


def dot_edges(source: str) -> list[tuple[str, str, str]]:
    """Tail with port, head with port, and attributes of every edge of a DOT text."""
    return re.findall(r"^\s+(\S+) -> (\S+) \[(.*)\]$", source, re.MULTILINE)


def texts(attributes: str) -> list[str]:
    """The texts of a node's HTML-like label, unescaped, without the spaces that only keep lines apart."""
    label = re.search(r"label=<(.*)>, class=", attributes)
    assert label is not None
    return [unescape(each) for each in re.split(r"<[^>]*>", label[1]) if each.strip()]
