"""Early results: a gradient that is only returned is computed as soon as it can be.

What it is computed from, an activation mostly, is then needed no longer, and its memory serves the rest of the sweep.
"""

from __future__ import annotations

from ...tape import Node, Value
from ..data import Frozen, sized_by_elements

__all__ = ["results_early"]


def results_early(nodes: list[Node], frozen: Frozen, wanted: set[Value]) -> list[Node]:
    """The nodes, with those of the sweep that make nothing but results (and the views for them) moved up."""
    canonical = frozen.canonical
    recorded = set(frozen.forward)
    moving: set[Node] = set()
    read, read_early = set[Value](), set[Value]()  # by what stays, and by what moves
    for node in reversed(nodes):
        if _moves(node, [canonical(value) for value in node.outputs], read, read_early, wanted, recorded):
            moving.add(node)
            read_early.update(map(canonical, node.inputs))
        else:
            read.update(map(canonical, node.inputs))
    if not moving:
        return nodes
    made: dict[Value, int] = {}  # after how many of the nodes that stay a value is there
    after: dict[int, list[Node]] = {}
    least = sum(node in recorded for node in nodes)  # no node of the sweep runs before it
    stays = 0
    for node in nodes:
        if node in moving:
            place = max((made.get(canonical(value), 0) for value in node.inputs), default=0)
            place = max(place, least)
            after.setdefault(place, []).append(node)
        else:
            stays += 1
            place = stays
        made.update((canonical(value), place) for value in node.outputs)
    ordered = list(after.get(0, ()))
    for i, node in enumerate((node for node in nodes if node not in moving), 1):
        ordered += [node, *after.get(i, ())]
    return ordered


def _moves(
    node: Node, made: list[Value], read: set[Value], read_early: set[Value], wanted: set[Value], recorded: set[Node]
) -> bool:
    if not read.isdisjoint(made) or node in recorded:
        return False
    if node.op.is_named or node.random or node.mutates or node.result is not None or sized_by_elements(node):
        return False
    return wanted.issuperset(made) if read_early.isdisjoint(made) else _is_view(node)


def _is_view(node: Node) -> bool:
    schema = getattr(node.op.forward, "_schema", None)
    return schema is not None and any(each.alias_info is not None for each in schema.returns)
