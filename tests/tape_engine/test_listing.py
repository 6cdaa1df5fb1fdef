"""print(tape): one node a line, with names, shapes, dtype, rule and the user's line."""

from __future__ import annotations

import inspect
import re

import torch

import tape_engine as te
from tests.helpers import Tensor


def line() -> int:
    """The line from which it is called."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def columns(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", row.strip()) for row in text.splitlines()[1:]]


def test_the_article_s_tape() -> None:
    X, w, b, Y = torch.zeros(64, 784), torch.zeros(784, 1), torch.zeros(1), torch.zeros(64)
    start = line()
    Z = te.lin(X, w, b)
    U = te.relu(Z)
    C = te.mse(U, Y)
    assert str(te.global_tape()) == (
        "tape of 3 nodes, 4 leaves\n"
        f"  0  Z (64, 1) float32 = lin(X (64, 784), w (784, 1), b (1,))  lin_grad   test_listing.py:{start + 1}\n"
        f"  1  U (64, 1) float32 = relu(Z (64, 1))                       relu_grad  test_listing.py:{start + 2}\n"
        f"  2  C () float32 = mse(U (64, 1), Y (64,))                    mse_grad   test_listing.py:{start + 3}"
    )
    del C


def test_one_node_a_line() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with te.record() as tape:
        parts = x.split(2, dim=1)  # type: ignore[no-untyped-call]
        best = x.max(1)
        y = torch.stack([parts[0], parts[1]]) * 2
        y.add_(1)
        with te.scope("block1"):
            z = torch.rand(2)
        with torch.no_grad():
            y.sum()
        flag = bool((z > 5).any())
    rows = columns(str(tape))
    assert len(rows) == len(tape)
    assert [row[0] for row in rows] == [str(i) for i in range(len(tape))]
    assert all(row[-1].startswith("test_listing.py:") for row in rows)
    text = str(tape)
    assert re.search(r"\S+ \(3, 2\) float64, \S+ \(3, 2\) float64 = split\(x \(3, 4\), 2, 1\)", text)
    assert re.search(r"\S+ \(3,\) float64, \S+ \(3,\) int64 = max\(x \(3, 4\), 1\)", text)
    assert re.search(r"(stack|cat)\(\[\S+ \(3, 2\), \S+ \(3, 2\)\]", text)
    assert "parts (" not in text, "parts is a tuple, not its first tensor"
    assert "in place" in text
    assert "block1: rand(" in text
    assert "random" in text
    assert "cut" in text
    assert f"-> {flag!r}" in text
    del best


def test_complex_arguments_print_in_short() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with te.record() as tape:
        x.to(torch.float32, memory_format=torch.contiguous_format)
        x.sum((0, 1), keepdim=True)
        x[..., None, ::2]
    text = str(tape)
    assert "torch.float32" not in text
    assert "float32" in text
    assert max(map(len, text.splitlines())) < 200


def test_devices_other_than_the_cpu_are_named() -> None:
    x = torch.empty(3, device="meta")
    with te.record() as tape:
        y = x * 2
    assert "y (3,) float32 meta = mul(x (3,), 2)" in str(tape)
    del y


def test_named_operations_with_keywords() -> None:
    @te.op
    def scale(x: Tensor, factor: float = 2.0, *, mode: str = "up") -> Tensor:
        return x * factor

    x = torch.randn(3)
    with te.record() as tape:
        out = scale(x, mode="down")
    assert "out (3,) float32 = scale(x (3,), 2.0, mode='down')" in str(tape)
    assert "borrowed" in str(tape)
    te.backward(out.sum())


def test_a_big_constant_does_not_flood_the_listing() -> None:
    x = torch.randn(3)
    with te.record() as tape:
        x * torch.tensor(list(range(3)))
        x[torch.arange(3)]
    assert max(map(len, str(tape).splitlines())) < 200
    assert len(str(tape).splitlines()) == len(tape) + 1


def test_printing_records_nothing_and_changes_nothing() -> None:
    x = torch.randn(3)
    with te.record() as tape:
        y = x * 2
        before = str(tape)
        assert str(tape) == before
        assert len(tape) == 1
    assert str(tape) == before
    del y


def test_global_tape_prints_what_is_alive() -> None:
    x = torch.randn(3)
    U = te.relu(x)
    te.relu(x)
    assert str(te.global_tape()).count("relu(") == 1
    del U
    assert str(te.global_tape()).splitlines() == ["tape of 0 nodes, 0 leaves"]
