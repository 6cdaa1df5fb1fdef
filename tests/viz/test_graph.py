"""The networkx graph, against an independent walk of the tape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import networkx as nx
import pytest
import torch

import tape_engine as te
import viz
from tape_engine.tape import Tape, Value

from .examples import EXAMPLES, article, chain, kept, residual, values

KEYS = {
    "kind", "op", "name", "role", "shape", "g_shape", "dtype", "device", "scope", "source", "code", "formula", "params",
    "rule", "marks", "inputs", "outputs", "elements", "bytes", "g_elements", "g_bytes",
}  # fmt: skip


def keys_of(tape: Tape) -> tuple[dict[int, str], dict[int, tuple[str, int]]]:
    """The key that each operation should have, by ``id``, and of each value the key and place it comes from."""
    made = {id(v) for node in tape.nodes for v in node.outputs}
    leaves: dict[int, str] = {}
    for value in (v for node in tape.nodes for v in node.inputs):
        if id(value) not in made and id(value) not in leaves:
            leaves[id(value)] = f"leaf{len(leaves)}"
    origin = {ident: (key, 0) for ident, key in leaves.items()}
    for i, node in enumerate(tape.nodes):
        origin |= {id(v): (f"op{i}", place) for place, v in enumerate(node.outputs)}
    return {id(node): f"op{i}" for i, node in enumerate(tape.nodes)}, origin


def g_of(value: Value) -> torch.Tensor | None:
    assert value.tensor is not None
    g: torch.Tensor | None = getattr(value.tensor, "g", None)
    return g


def edges(graph: nx.MultiDiGraph[str], direction: str) -> set[tuple[Any, ...]]:
    found = [
        (tail, head, e["output"], e["port"], e["shape"], e["dtype"])
        for tail, head, e in graph.edges(data=True)
        if e["direction"] == direction
    ]
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("example", ["article", "shared"])
def test_nodes_and_edges_follow_the_tape(example: str) -> None:
    tape = EXAMPLES[example]()
    graph = viz.graph(tape)
    keys, origin = keys_of(tape)
    assert set(graph.nodes) == {*keys.values(), *(key for key, _ in origin.values())}
    forward, backward = set(), set()
    for node in tape.nodes:
        for port, value in enumerate(node.inputs):
            maker, output = origin[id(value)]
            facts = (output, port, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            forward.add((maker, keys[id(node)], *facts))
            if g_of(value) is not None and any(g_of(v) is not None for v in node.outputs):
                backward.add((keys[id(node)], maker, *facts))
    assert edges(graph, "forward") == forward
    assert edges(graph, "backward") == backward
    assert backward
    assert nx.is_directed_acyclic_graph(
        nx.edge_subgraph(graph, [e for e in graph.edges(keys=True) if e[2].startswith("forward")])
    )


@pytest.mark.parametrize("example", list(EXAMPLES))
def test_every_node_carries_its_facts(example: str) -> None:
    tape = EXAMPLES[example]()
    graph = viz.graph(tape)
    keys, origin = keys_of(tape)
    for node in tape.nodes:
        facts = graph.nodes[keys[id(node)]]
        assert facts.keys() >= KEYS
        assert (facts["kind"], facts["op"], facts["scope"]) == ("op", node.op.name, node.scope)
        assert facts["shape"] == tuple(node.outputs[0].shape)
        assert [each["shape"] for each in facts["inputs"]] == [tuple(v.shape) for v in node.inputs]
        assert [each["shape"] for each in facts["outputs"]] == [tuple(v.shape) for v in node.outputs]
        assert facts["elements"] == sum(v.numel() for v in node.outputs)
        assert facts["bytes"] == sum(v.numel() * v.dtype.itemsize for v in node.outputs)
    for value in values(tape.nodes):
        key, place = origin[id(value)]
        facts = graph.nodes[key]
        assert facts.keys() >= KEYS
        if value.tensor is not None:  # what a module's forward made in passing is gone
            g = g_of(value)
            assert facts["outputs"][place]["g_shape"] == (None if g is None else tuple(g.shape))


def test_names_places_and_formulas_are_the_users_own() -> None:
    graph = viz.graph(article())
    names = [graph.nodes[key]["name"] for key in ("leaf0", "leaf1", "leaf2", "op0", "op1", "leaf3", "op2")]
    assert names == ["X", "w", "b", "Z", "U", "Y", "C"]
    lin = graph.nodes["op0"]
    assert lin["source"].startswith("examples.py:")
    assert lin["code"] == "Z = te.lin(X, w, b)"
    assert lin["formula"] == "Z = X @ w + b"
    assert lin["rule"] == "lin_grad"
    assert [graph.nodes[key]["role"] for key in ("op0", "op1", "op2")] == ["intermediate", "intermediate", "result"]


def test_the_same_tensor_given_twice_has_two_ports() -> None:
    a = torch.randn(2)
    with te.record() as tape:
        square = a * a
    te.backward(square, seed=torch.ones(2))
    graph = viz.graph(tape)
    assert {e[3] for e in edges(graph, "forward")} == {0, 1}
    assert {e[3] for e in edges(graph, "backward")} == {0, 1}


def test_shapes_of_no_dimension_and_of_no_element() -> None:
    s, empty = torch.tensor(2.0), torch.zeros(0, 3)
    with te.record() as tape:
        y = empty * s
    graph = viz.graph(tape)
    assert {graph.nodes[n]["shape"] for n in graph} == {(), (0, 3)}
    assert graph.nodes["op0"]["elements"] == 0
    kept.append(y)


def test_what_is_out_of_the_ordinary_is_marked() -> None:
    x = torch.rand(3)
    with te.record() as tape:
        y = x * 2
        y.add_(1)
        with torch.no_grad():
            frozen = y * 3
        noise = torch.nn.functional.dropout(y, 0.5)
        big = bool((y > 0).all())
        odd = te.op(unruled)(y)
    kept.append((y, frozen, noise, big, odd))
    marks = {mark for _, facts in viz.graph(tape).nodes(data=True) for mark in facts["marks"]}
    assert marks == {"in place", "no gradient", "random", "guard", "borrowed rule"}


def unruled(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_the_gradient_of_a_loss_with_a_second_output_is_that_of_the_loss() -> None:
    """`nll_loss` makes the sum of its weights besides, of which nobody asked for a gradient."""
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    with te.record() as tape:
        loss = torch.nn.functional.nll_loss(x, y)
    program = tape.program(inputs=x, outputs=loss)
    te.backward(loss)
    for root in (program, tape, loss):
        outputs = viz.graph(root).nodes["op0"]["outputs"]
        assert [(each["name"], each["g_shape"]) for each in outputs] == [("loss", ()), ("nll_loss_forward", None)]


def test_a_program_shows_the_gradients_that_a_step_computes() -> None:
    tape = article(sweep=False)
    assert all(facts["g_shape"] is None for _, facts in viz.graph(tape).nodes(data=True))
    graph = viz.graph(SimpleNamespace(tape=tape))
    assert graph.graph["planned"]
    for _, facts in graph.nodes(data=True):
        assert facts["g_shape"] == facts["shape"]


def test_scopes_and_parameters_of_modules() -> None:
    graph = viz.graph(residual())
    linear = [facts for _, facts in graph.nodes(data=True) if facts["op"] == "addmm"]
    assert linear[1]["scope"] == ("Residual", "blocks.0", "blocks.0.fc1")
    assert [port["label"] for port in linear[1]["inputs"]] == ["bias", linear[1]["inputs"][1]["name"], "weightᵀ"]
    assert linear[1]["formula"].endswith("@ weightᵀ")
    parameters = {facts["name"] for _, facts in graph.nodes(data=True) if facts["role"] == "parameter"}
    assert {"stem.weight", "blocks.2.fc2.bias", "head.bias"} <= parameters


def test_it_is_plain_data() -> None:
    again = nx.node_link_graph(nx.node_link_data(viz.graph(residual()), edges="edges"), edges="edges")
    assert again.number_of_edges() == viz.graph(residual()).number_of_edges()


@pytest.mark.slow
def test_a_long_tape_takes_time_in_proportion() -> None:
    graph = viz.graph(chain(20_000))
    assert graph.number_of_nodes() == 20_002
