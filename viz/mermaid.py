"""A picture as Mermaid text, which many wikis and code hosts draw by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx as nx

from .clusters import Cluster, clusters
from .markup import counted, shape_text, shorten
from .palette import GRADIENT, GROUP, LINE, PAPER, ROLE

__all__ = ["mermaid"]

Facts = Mapping[str, Any]
#: How each role is bracketed: a slanted box, a cylinder, a hexagon, a subroutine's box.
_BRACKETS = {"input": ("[/", "/]"), "parameter": ("[(", ")]"), "target": ("{{", "}}"), "constant": ("[[", "]]")}


def mermaid(graph: nx.MultiDiGraph[str], *, view: str = "both", rankdir: str = "TB") -> str:
    """A flowchart of a graph made by `viz.graph`; see `viz.style.dot` for the arguments."""
    forward, backward = view != "backward", view != "forward" and bool(graph.graph["swept"])

    def shown(facts: Facts) -> bool:
        return forward or any(each["g_shape"] is not None for each in facts["outputs"])

    def nodes(cluster: Cluster, depth: int) -> list[str]:
        margin, lines = "  " * depth, list[str]()
        for member in cluster.members:
            if isinstance(member, Cluster):
                head = f'{margin}subgraph scope{member.number}["{_text(member.title)}"]'
                lines += [head, *nodes(member, depth + 1), f"{margin}end"]
            elif shown(graph.nodes[member]):
                lines.append(margin + _node(member, graph.nodes[member], forward=forward, backward=backward))
        return lines

    lines = [f"flowchart {rankdir}", *nodes(clusters(graph), 1)]
    dashed, count = list[int](), 0
    for tail, head, facts in graph.edges(data=True):
        back = facts["direction"] == "backward"
        if not (backward if back else forward) or not (shown(graph.nodes[tail]) and shown(graph.nodes[head])):
            continue
        name = f"{facts['name']}.g" if back else facts["name"]
        arrow = "-.->" if back else "-->"
        label = _text(f"{shorten(name)} {shape_text(facts['shape'])}")
        lines.append(f'  {tail} {arrow}|"{label}"| {head}')
        dashed += [count] if back else []
        count += 1
    for role, paint in ROLE.items():
        lines.append(f"  classDef {role} fill:{paint.fill},stroke:{paint.line}")
    lines.append(f"  classDef op fill:{PAPER},stroke:{LINE}")
    lines.append(f"  classDef group fill:{GROUP.fill},stroke:{GROUP.line}")
    if dashed:
        lines.append(f"  linkStyle {','.join(map(str, dashed))} stroke:{GRADIENT.line},color:{GRADIENT.line}")
    return "\n".join(lines) + "\n"


def _node(key: str, facts: Facts, *, forward: bool, backward: bool) -> str:
    values = [f"{shorten(each['name'])} {shape_text(each['shape'])}" for each in facts["outputs"][:3] if forward]
    if backward:
        gradients = [each for each in facts["outputs"][:3] if each["g_shape"] is not None]
        values += [f"{shorten(each['name'])}.g {shape_text(each['g_shape'])}" for each in gradients]
    if facts["kind"] == "leaf":
        opening, closing = _BRACKETS[facts["role"]]
        return f'{key}{opening}"{"<br/>".join(map(_text, values))}"{closing}:::{facts["role"]}'
    head = [facts["formula"]]
    if facts["kind"] == "group":
        count = counted(facts["count"], "operation")
        head = [facts["formula"], *([count] if count != facts["formula"] else []), facts["pattern"]]
    elif facts["marks"]:
        head.append(" · ".join(facts["marks"]))
    text = "<br/>".join([*(_text(shorten(each, 60)) for each in head), _text(" | ".join(values))])
    return f'{key}["{text}"]:::{facts["kind"]}'


def _text(text: str) -> str:
    """`text` inside Mermaid's quotes: what means something there is written as its number."""
    return "".join(f"#{ord(each)};" if each in '"#<>&`|\\' or ord(each) < 32 else each for each in text)
