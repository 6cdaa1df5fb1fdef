"""Mermaid text: the same nodes and lines, and names that cannot break out of their quotes."""

from __future__ import annotations

import re

import pytest
import torch

import tape_engine as te
import viz
from viz.mermaid import mermaid

from .examples import article, kept, residual

LINK = re.compile(r'^  (\w+) (-->|-\.->)\|"([^"]*)"\| (\w+)$')
NODE = re.compile(r'^ +(\w+)(?:\[/|\[\(|\{\{|\[\[|\[)"([^"]*)"(?:/\]|\)\]|\}\}|\]\]|\]):::(\w+)$')


@pytest.mark.parametrize("view", ["both", "forward", "backward"])
def test_nodes_and_lines_are_those_of_the_graph(view: str) -> None:
    graph = viz.graph(residual())
    lines = mermaid(graph, view=view).splitlines()
    assert lines[0] == "flowchart TB"
    links = [found for line in lines if (found := LINK.match(line))]
    wanted = [
        (tail, "-.->" if e["direction"] == "backward" else "-->", head)
        for tail, head, e in graph.edges(data=True)
        if view in ("both", e["direction"])
    ]
    assert [(m[1], m[2], m[4]) for m in links] == wanted
    nodes = {m[1] for line in lines if (m := NODE.match(line))}
    swept = {key for key, f in graph.nodes(data=True) if any(o["g_shape"] is not None for o in f["outputs"])}
    assert nodes == (swept if view == "backward" else set(graph.nodes))
    assert sum(line.lstrip().startswith("subgraph ") for line in lines) == sum(line.strip() == "end" for line in lines)
    dashed = next((line for line in lines if "linkStyle" in line), "")
    numbers = [int(n) for n in re.findall(r"\d+", dashed.partition(" stroke")[0])]
    assert numbers == [i for i, m in enumerate(links) if m[2] == "-.->"]


def test_roles_and_direction() -> None:
    text = mermaid(viz.graph(article()), rankdir="LR")
    assert text.startswith("flowchart LR\n")
    assert '[/"X (64, 784)<br/>X.g (64, 784)"/]:::input' in text
    assert '[("w (784, 1)<br/>w.g (784, 1)")]:::parameter' in text
    assert '{{"Y (64,)<br/>Y.g (64,)"}}:::target' in text


def test_names_stay_inside_their_quotes() -> None:
    odd = te.op(name='a"]#<b>', formula='x"] --> y|`\\')(torch.relu)
    x = torch.randn(2)
    with te.record() as tape, te.scope('s"]'):
        y = odd(odd(x))
    kept.append(y)
    for line in mermaid(viz.graph(tape)).splitlines():
        assert line.count('"') in (0, 2)
