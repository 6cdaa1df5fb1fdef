"""The frames of scopes: nested, one a stay, and none around a single card."""

from __future__ import annotations

import torch

import tape_engine as te
import viz
from viz.clusters import Cluster, clusters

from .examples import kept, residual


def outline(cluster: Cluster) -> list[object]:
    return [(each.title, outline(each)) if isinstance(each, Cluster) else each for each in cluster.members]


def test_frames_nest_as_scopes_do_and_hold_every_node_once() -> None:
    graph = viz.graph(residual())
    whole = clusters(graph)

    def walk(cluster: Cluster, depth: int) -> list[str]:
        found = []
        for each in cluster.members:
            if isinstance(each, Cluster):
                assert each.scope[:depth] == cluster.scope
                found += walk(each, len(each.scope))
            else:
                assert graph.nodes[each]["scope"][: len(cluster.scope)] == cluster.scope
                found.append(each)
        return found

    assert sorted(walk(whole, 0)) == sorted(graph.nodes)
    titles = [each.title for each in whole.members if isinstance(each, Cluster)]
    assert titles == ["Residual"]


def test_a_frame_for_each_stay_and_none_for_one_card() -> None:
    x = torch.randn(2)
    with te.record() as tape:
        with te.scope("twice"):
            y = (x * x).relu()
        y = y + 1
        with te.scope("twice"):
            y = (y * y).relu()
        with te.scope("once"):
            y = y.tanh()
    kept.append(y)
    graph = viz.graph(tape)
    assert outline(clusters(graph)) == [
        "leaf0", ("twice", ["op0", "op1"]), "op2", ("twice", ["op3", "op4"]), "op5",
    ]  # fmt: skip
    frames = [each for each in clusters(graph).members if isinstance(each, Cluster)]
    assert len({each.number for each in frames}) == 2
    hidden = outline(clusters(graph, hidden={"op1"}))
    assert hidden == ["leaf0", "op0", "op2", ("twice", ["op3", "op4"]), "op5"]
