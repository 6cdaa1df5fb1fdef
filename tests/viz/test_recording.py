"""What there is to draw: the nodes behind a root, and which values have a gradient."""

from __future__ import annotations

import pytest
import torch

import tape_engine as te
import viz
from viz.recording import recording

from .examples import kept

X, w, b, Y = torch.randn(4, 3), torch.randn(3, 1), torch.zeros(1), torch.randn(4)


def leaf_gradients(root: object) -> dict[str, tuple[int, ...] | None]:
    nodes = viz.graph(root).nodes(data=True)
    return {facts["name"]: facts["g_shape"] for _, facts in nodes if facts["kind"] == "leaf"}


def test_a_tensor_stands_for_what_it_was_computed_from() -> None:
    with te.record() as tape:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        aside = te.relu(X)
    assert len(tape) == 3
    assert [node.op.name for node in recording(U).nodes] == ["lin", "relu"]
    assert recording(aside).nodes == [tape.nodes[2]]


def test_a_long_chain_needs_no_deep_stack() -> None:
    x = torch.ones(1)
    for _ in range(5000):
        x = te.relu(x)
    assert len(recording(x).nodes) == 5000


def test_the_global_tape_can_be_drawn_after_its_sweep() -> None:
    Z = te.lin(X, w, b)
    C = te.mse(te.relu(Z), Y)
    te.backward(C)
    assert len(te.global_tape()) == 0
    found = recording(C)
    assert len(found.nodes) == 3
    assert all(tuple(v.shape) == found.gradients[id(v)] for node in found.nodes for v in node.outputs)


def test_a_value_whose_tensor_is_gone_had_a_gradient_if_the_sweep_came_to_it() -> None:
    C = te.mse(te.relu(te.lin(X, w, b)), Y)
    assert [facts["g_shape"] for _, facts in viz.graph(C).nodes(data=True) if facts["kind"] == "op"] == [None] * 3
    te.backward(C)
    shapes = [facts["g_shape"] for _, facts in viz.graph(C).nodes(data=True) if facts["kind"] == "op"]
    assert shapes == [(4, 1), (4, 1), ()]


def test_a_gradient_of_an_earlier_sweep_does_not_count() -> None:
    p = torch.randn(3, 1)
    te.backward(te.mse(te.lin(X, p, b), Y))
    assert p.g.shape == (3, 1)  # type: ignore[attr-defined]
    C = te.mse(te.lin(X, p, b), Y)
    assert set(leaf_gradients(C).values()) == {None}


def test_a_sweep_with_wrt_shows_what_it_wrote() -> None:
    inputs = A, p, c, T = torch.randn(4, 3), torch.randn(3, 1), torch.zeros(1), torch.randn(4)
    with te.record() as tape:
        Z = te.lin(A, p, c)
        C = te.mse(te.relu(Z), T)
    te.backward(C, wrt=[p])
    assert [hasattr(t, "g") for t in (*inputs, Z, C)] == [False, True, False, False, False, False]
    assert leaf_gradients(tape) == {"A": None, "p": (3, 1), "c": None, "T": None}
    edges = [e for e in viz.graph(tape).edges(data=True) if e[2]["direction"] == "backward"]
    assert [(tail, head) for tail, head, _ in edges] == [("op0", "leaf1")]


def test_an_output_that_the_loss_does_not_reach_has_none() -> None:
    x = torch.randn(6)
    with te.record() as tape:
        first, second = torch.split(x, 3)
        loss = first.sum()
    kept.append((first, second))
    te.backward(loss)
    outputs = viz.graph(tape).nodes["op0"]["outputs"]
    assert [each["g_shape"] for each in outputs] == [(3,), None]
    assert [each["read"] for each in outputs] == [True, False]


def test_no_gradient_passes_a_cut() -> None:
    x = torch.randn(3)
    with te.record() as tape:
        with torch.no_grad():
            y = x * 2
        loss = (y * x).sum()
    kept.append(y)
    te.backward(loss)
    graph = viz.graph(tape)
    assert not [e for e in graph.out_edges("op0", data=True) if e[2]["direction"] == "backward"]


def test_none_passes_what_is_declared_to_have_no_gradient() -> None:
    x, y = torch.randn(3), torch.randn(3)
    with te.record() as tape:
        zeros = torch.zeros_like(x * 2)  # what it was made of is gone, so that its `.g` cannot be looked at
        loss = (zeros + y).sum()
    kept.append(zeros)
    te.backward(loss)
    facts = viz.graph(tape).nodes
    assert (facts["op1"]["op"], facts["op1"]["rule"]) == ("zeros_like", "none")
    assert (facts["leaf0"]["g_shape"], facts["op0"]["g_shape"]) == (None, None)
    assert facts["leaf1"]["g_shape"] == (3,)


def test_what_cannot_be_drawn_is_named_with_its_shape() -> None:
    stranger = torch.zeros(2, 5)
    with pytest.raises(te.NotRecordedError) as found:
        viz.graph(stranger)
    assert str(found.value).splitlines()[0] == "no recorded operation made this tensor: there is nothing to draw."
    assert "viz.graph(stranger)" in str(found.value)
    assert "stranger    (2, 5)  float32" in str(found.value)
    te.lin(X, w, b)
    with pytest.raises(te.NotRecordedError):  # a leaf is no operation's result
        viz.graph(X)
    with pytest.raises(te.DTypeError, match="not of int"):
        viz.graph(3)
