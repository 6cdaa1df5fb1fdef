"""The picture in words."""

from __future__ import annotations

import torch

import tape_engine as te
import viz
from viz.collapse import plan
from viz.describe import describe
from viz.graph import build
from viz.recording import recording

from .examples import article, chain, kept, residual


def test_the_article_in_words() -> None:
    lines = [line.replace("examples.py", "file") for line in describe(viz.graph(article())).splitlines()]
    places = [line.partition(" at ")[2].partition(":")[2].partition(":")[0] for line in lines[2:5]]
    assert lines == [
        "A computation of 3 operations on 4 leaves, in float32 unless said otherwise.",
        "Leaves: an input X (64, 784), a parameter w (784, 1), a parameter b (1,) and a target Y (64,).",
        f"1. lin at file:{places[0]}: Z = X @ w + b; from X (64, 784), w (784, 1) and b (1,) to Z (64, 1).",
        f"2. relu at file:{places[1]}: U = max(0, Z); from Z (64, 1) to U (64, 1).",
        f"3. mse at file:{places[2]}: C = mean((U - Y)²); from U (64, 1) and Y (64,) to C ().",
        "The gradients, from the last operation to the first:",
        "- mse_grad sends U.g (64, 1) and Y.g (64,), from C.g ().",
        "- relu_grad sends Z.g (64, 1), from U.g (64, 1).",
        "- lin_grad sends X.g (64, 784), w.g (784, 1) and b.g (1,), from Z.g (64, 1).",
    ]


def test_views() -> None:
    graph = viz.graph(article())
    assert ".g" not in describe(graph, view="forward")
    assert "Z = X @ w" not in describe(graph, view="backward")
    assert "No sweep has passed" in describe(viz.graph(article(sweep=False)))


def test_an_operation_a_sentence() -> None:
    tape = residual()
    lines = describe(viz.graph(tape), view="forward").splitlines()
    assert len(lines) == 2 + len(tape)
    assert "16 parameters of" in lines[1]
    for node, line in zip(tape.nodes, lines[2:], strict=True):
        assert f" {node.op.name} " in line
        assert str(tuple(node.outputs[0].shape)) in line


def test_groups_and_what_was_not_kept() -> None:
    source = recording(chain(600))
    text = describe(build(source, plan(source.nodes)))
    assert "592 operations at" in text
    assert "296 × (mul → tanh)" in text
    x, w = torch.randn(2, 2), torch.randn(2, 1)
    with te.record() as tape:
        C = te.lin(x, w).sum()
    kept.append(C)
    te.backward(C, wrt=[w])
    assert "lin_grad sends w.g (2, 1), from a gradient that was not kept." in describe(viz.graph(tape))
