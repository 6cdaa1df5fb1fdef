"""The DOT text: every shape and name in its place, solid lines down, dashed lines up, the same text every time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tape_engine as te
import viz
from viz.layout import render
from viz.palette import GRADIENT, ROLE
from viz.style import dot

from .examples import EXAMPLES, article, chain, dot_edges, dot_nodes, kept, residual, texts


def ports(source: str) -> dict[str, set[str]]:
    """The anchors that each node of a DOT text has."""
    return {key: set(re.findall(r'port="(\w+)"', text)) for key, text in dot_nodes(source).items()}


def test_a_card_has_ports_formula_value_and_gradient() -> None:
    nodes = dot_nodes(dot(viz.graph(article())))
    said = texts(nodes["op0"])
    assert said[:6] == ["X", "(64, 784)", "w", "(784, 1)", "b", "(1,)"]
    assert re.fullmatch(r"lin · examples\.py:\d+", said[6])
    assert said[7:] == ["Z = X @ w + b", "Z", "(64, 1)", "Z.g", "(64, 1)"]
    assert re.findall(r'port="(\w+)"', nodes["op0"]) == ["i0", "b0", "i1", "b1", "i2", "b2", "v0", "g0"]
    assert texts(nodes["leaf3"]) == ["Y", "(64,)", "Y.g", "(64,)"]
    assert texts(nodes["op2"])[-4:] == ["C", "()", "C.g", "()"]


@pytest.mark.parametrize("role", ["input", "parameter", "target"])
def test_a_role_has_its_colour_and_shape(role: str) -> None:
    graph = viz.graph(article())
    nodes = dot_nodes(dot(graph))
    for key, facts in graph.nodes(data=True):
        if facts["role"] == role:
            assert f"shape={ROLE[role].shape}," in nodes[key]
            assert f'fillcolor="{ROLE[role].fill}"' in nodes[key]
            assert f'tooltip="{facts["name"]}: {role} {facts["shape"]}' in nodes[key]


@pytest.mark.parametrize("view", ["both", "forward", "backward"])
@pytest.mark.parametrize("example", list(EXAMPLES))
def test_lines_follow_the_graph(example: str, view: str) -> None:
    graph = viz.graph(EXAMPLES[example]())
    source = dot(graph, view=view, docked=False, detail="full")
    anchors = ports(source)
    drawn = {"forward": set(), "backward": set()}  # type: dict[str, set[tuple[str, int, str, int, str]]]
    for tail, head, style in dot_edges(source):
        (maker, value, _), (reader, port, _) = tail.split(":"), head.split(":")
        assert value in anchors[maker]
        assert port in anchors[reader]
        back = "class=backward" in style
        assert back == ("style=dashed" in style) == ("dir=back" in style) == (f'color="{GRADIENT.line}"' in style)
        shape = re.search(r'tooltip="[^"]*?(\([\d, ]*\))', style)
        assert shape is not None
        drawn["backward" if back else "forward"].add((maker, int(value[1:]), reader, int(port[1:]), shape[1]))
        if back or view == "forward":
            assert f'label=" {shape[1]} "' in style
    for direction, lines in drawn.items():
        wanted = {
            (
                *((head, e["output"], tail) if direction == "backward" else (tail, e["output"], head)),
                e["port"],
                str(e["shape"]),
            )
            for tail, head, e in graph.edges(data=True)
            if e["direction"] == direction and view in ("both", direction)
        }
        if example != "chain":  # there, w stands in the ports that read it
            assert lines == wanted
        assert lines <= wanted


def test_every_shape_is_told() -> None:
    graph = viz.graph(residual())
    source = dot(graph)
    for _, facts in graph.nodes(data=True):
        assert str(facts["shape"]) in source
        if facts["g_shape"] is not None:
            assert str(facts["g_shape"]) in source


def test_many_parameters_stand_in_their_ports() -> None:
    graph = viz.graph(residual())
    nodes = dot_nodes(dot(graph))
    assert sum(key.startswith("leaf") for key in nodes) == 2  # the input and the labels
    addmm = [text for key, text in nodes.items() if graph.nodes[key]["op"] == "addmm"]
    assert all("bias.g" in texts(text) for text in addmm)
    few = dot_nodes(dot(graph, docked=False))
    assert set(few) == set(graph.nodes)


def test_the_transpose_of_a_parameter_stands_in_the_port_as_well() -> None:
    graph = viz.graph(residual())
    transposes = {key for key, facts in graph.nodes(data=True) if facts["op"] == "t"}
    assert transposes
    drawn = dot_nodes(dot(graph, detail="auto"))
    assert not transposes & set(drawn)
    addmm = next(text for key, text in drawn.items() if graph.nodes[key]["op"] == "addmm")
    assert texts(addmm).count("weightᵀ") == 1
    assert "(5, 8)" in texts(addmm)  # what is read
    assert "(8, 5)" in texts(addmm)  # and the gradient of the leaf itself
    assert transposes <= set(dot_nodes(dot(graph, detail="full")))


def test_a_leaf_that_many_read_stands_in_their_ports() -> None:
    graph = viz.graph(chain(40))
    source = dot(graph)
    assert not any(graph.nodes[key]["name"] == "w" for key in dot_nodes(source))
    assert len(dot_edges(source)) == 2 * 40


def test_many_ports_share_one() -> None:
    parts = [torch.randn(2) for _ in range(20)]
    with te.record() as tape:
        whole = torch.cat([part * 2 for part in parts])
        pieces = torch.split(whole, 2)
        total = pieces[0] + pieces[5] + pieces[19] + pieces[7]
    kept.append((parts, whole, pieces, total))
    te.backward(total, seed=torch.ones(2))
    source = dot(viz.graph(tape))
    anchors = ports(source)
    assert {"i7", "b7", "v0", "g0"} == {a for a in anchors["op20"] if a[1:] in ("7", "0") and a not in ("i0", "b0")}
    assert "+13 more" in texts(dot_nodes(source)["op20"])
    assert "+17 more" in texts(dot_nodes(source)["op21"])
    ends = [(tail, head) for tail, head, _ in dot_edges(source)]
    assert len(ends) == len(set(ends))  # of all that go to a shared port from one place, one line
    for tail, head in ends:
        assert tail.split(":")[1] in anchors[tail.split(":")[0]]
        assert head.split(":")[1] in anchors[head.split(":")[0]]


def test_small_cards_have_names_of_operations_and_shapes_alone() -> None:
    graph = viz.graph(article())
    small = texts(dot_nodes(dot(graph, detail="shapes"))["op0"])
    assert "lin" in small
    assert "Z" not in small
    assert small.count("(64, 1)") == 2
    assert len(dot(graph, detail="shapes")) < len(dot(graph))


def test_from_left_to_right() -> None:
    source = dot(viz.graph(article()), rankdir="LR")
    assert "rankdir=LR" in source
    assert {end.rpartition(":")[2] for tail, head, _ in dot_edges(source) for end in (tail, head)} == {"e", "w"}


def test_what_is_not_swept_has_no_gradients() -> None:
    source = dot(viz.graph(article(sweep=False)))
    assert "dashed" not in source
    assert "not swept yet" in source


def test_markup_in_names_and_formulas_is_escaped() -> None:
    odd = te.op(name='a<b>&"c"', formula="x < y & <b>")(torch.relu)
    x = torch.randn(2)
    with te.record() as tape, te.scope('s<&>"'):
        y = odd(odd(x))
    kept.append(y)
    source = dot(viz.graph(tape))
    assert "a&lt;b&gt;&amp;" in source
    svg = render(source, "svg").data.decode()
    assert "&lt; y &amp; &lt;b&gt;" in svg


def test_unusual_dtypes_are_told() -> None:
    x, i = torch.randn(5), torch.tensor([0, 2])
    with te.record() as tape:
        y = x[i].double()
    kept.append(y)
    said = "".join(dot_nodes(dot(viz.graph(tape))).values())
    assert "(2,) int64" in said
    assert "(2,) float64" in said or "(5,) float32" in said


def test_the_same_graph_gives_the_same_text() -> None:
    tape = residual()
    assert dot(viz.graph(tape)) == dot(viz.graph(tape))


def test_another_process_gives_the_same_text(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, tape_engine as te, viz\nfrom viz.style import dot\nX, w = torch.ones(3, 2), torch.ones(2, 1)\n"
        "with te.record() as tape:\n    Z = te.relu(te.lin(X, w))\nprint(dot(viz.graph(tape)))\n"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, script], env={"PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True, check=True, text=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert "<b>Z</b>" in runs[0]
