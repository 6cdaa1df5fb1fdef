"""Which operations are drawn as one: within budget, consecutive, without cycles, and in the plainest words."""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import viz
from viz.collapse import BUDGET, plan, scope_title
from viz.graph import build
from viz.recording import recording

from .examples import article, chain, residual


def step(name: str, *scope: str) -> Any:
    return SimpleNamespace(op=SimpleNamespace(name=name), scope=scope)


def shown(nodes: list[Any], **how: Any) -> int:
    """How many boxes there are in all."""
    groups = plan(nodes, **how)
    return len(nodes) - sum(g.stop - g.start - 1 for g in groups)


def test_a_small_recording_is_drawn_whole() -> None:
    assert plan(article().nodes) == []
    assert plan([step("relu")] * BUDGET) == []
    assert plan([]) == plan([], "scopes") == []
    assert plan([step("relu")] * 5000, "full") == plan([step("relu")] * 5000, "shapes") == []


def test_a_chain_keeps_its_ends() -> None:
    (group,) = plan([step("mul"), step("tanh")] * 1500)
    assert group.start >= 4
    assert group.stop <= 2996
    turns = (group.stop - group.start) // 2
    assert group.title == f"{group.stop - group.start:,} operations"
    assert group.pattern.startswith(f"{turns:,} × (mul → tanh)")


def test_the_deepest_scopes_that_are_few_enough_are_drawn_as_one() -> None:
    nodes = [
        step("addmm", "Net", f"block.{i}", f"block.{i}.fc{j}") for i in range(20) for j in range(2) for _ in range(3)
    ]
    groups = plan(nodes)
    assert [g.title for g in groups] == [f"fc{j}" for _ in range(20) for j in range(2)]
    assert {g.scope for g in groups} == {("Net", f"block.{i}") for i in range(20)}
    fewer = plan(nodes, budget=24)
    assert [g.title for g in fewer] == [f"block.{i}" for i in range(20)]


def test_one_scope_around_everything_is_no_picture() -> None:
    nodes = [step("relu", "Net", f"layer.{i}") for i in range(200) for _ in range(2)]
    assert shown(nodes) <= BUDGET
    assert len(plan(nodes)) > 3
    assert [g.title for g in plan(nodes, "scopes")] == [f"layer.{i}" for i in range(200)]


def test_one_scope_and_a_loss_outside_of_it_are_no_picture_either() -> None:
    nodes = [*(step("relu", "Net", f"layer.{i}") for i in range(3) for _ in range(2)), step("mse")]
    assert [g.title for g in plan(nodes, "scopes")] == ["layer.0", "layer.1", "layer.2"]
    assert [g.title for g in plan([step("relu", "Net")] * 5, "scopes")] == ["Net"]


def test_a_scope_that_is_entered_again_is_a_box_each_time() -> None:
    nodes = [step("relu", "a"), step("relu", "a"), step("add"), step("relu", "a"), step("relu", "a")]
    assert [(g.start, g.stop) for g in plan(nodes, "scopes")] == [(0, 2), (3, 5)]


scopes = st.lists(st.sampled_from("abc"), max_size=3).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(["mul", "add", "relu"]), scopes), max_size=120), st.integers(3, 30))
def test_groups_are_in_order_apart_and_within_budget(steps: list[tuple[str, tuple[str, ...]]], budget: int) -> None:
    nodes = [step(name, *scope) for name, scope in steps]
    groups = plan(nodes, budget=budget)
    assert shown(nodes, budget=budget) <= budget
    for group in groups:
        assert 0 <= group.start < group.stop <= len(nodes)
        assert all(node.scope[: len(group.scope)] == group.scope for node in nodes[group.start : group.stop])
        assert group.pattern
    assert all(a.stop <= b.start for a, b in pairwise(groups))


@pytest.mark.parametrize("detail", ["auto", "scopes"])
def test_the_graph_of_groups_holds_the_values_that_cross_them(detail: str) -> None:
    source = recording(residual(30))
    groups = plan(source.nodes, detail)
    graph = build(source, groups)
    forward = [(a, b) for a, b, e in graph.edges(data=True) if e["direction"] == "forward"]
    assert nx.is_directed_acyclic_graph(nx.DiGraph(forward))
    owner: dict[int, str] = {}
    for i, node in enumerate(source.nodes):
        place = next((f"group{k}" for k, g in enumerate(groups) if g.start <= i < g.stop), f"op{i}")
        owner |= {id(v): place for v in node.outputs}
        crossing = {owner[id(v)] for v in node.inputs if id(v) in owner} - {place}
        assert all((maker, place) in forward for maker in crossing)
    counted = sum(facts.get("count", 1) for _, facts in graph.nodes(data=True) if facts["kind"] != "leaf")
    assert counted == len(source.nodes)
    assert graph.graph["operations"] == len(source.nodes)
    for _, facts in graph.nodes(data=True):
        if facts["kind"] == "group":
            assert sum(facts["counts"].values()) == facts["count"]


def test_what_goes_inside_a_group_is_told() -> None:
    source = recording(residual(30))
    graph = build(source, plan(source.nodes))
    whole = viz.graph(residual(30))
    of_leaves = sum(f["elements"] for _, f in whole.nodes(data=True) if f["role"] == "parameter")
    drawn = sum(f["elements"] for _, f in graph.nodes(data=True) if f["role"] == "parameter")
    inside = sum(e["elements"] for _, f in graph.nodes(data=True) for e in f.get("folded", ()))
    assert drawn + inside == of_leaves


def test_a_leaf_that_groups_share_stays_outside() -> None:
    source = recording(chain(600))
    graph = build(source, plan(source.nodes))
    w = [key for key, facts in graph.nodes(data=True) if facts["kind"] == "leaf" and facts["name"] == "w"]
    assert graph.out_degree(w[0]) > 2


def test_scope_titles_leave_out_what_is_told_already() -> None:
    assert scope_title(("Net", "blocks.1", "blocks.1.fc")) == "fc"
    assert scope_title(("outer", "inner")) == "inner"
    assert scope_title(()) == ""


@pytest.mark.slow
def test_a_plan_of_a_million_operations_takes_seconds() -> None:
    nodes = [step("mul"), step("tanh")] * 500_000
    start = time.perf_counter()
    assert shown(nodes) <= BUDGET
    assert time.perf_counter() - start < 20
