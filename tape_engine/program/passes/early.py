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
    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            readers.setdefault(canonical(value), []).append(node)
    recorded = set(frozen.forward)
    moving: set[Node] = set()
    for node in reversed(nodes):
        pure = not (node in recorded or node.op.is_named or node.random or node.mutates or node.result is not None)
        if not pure or sized_by_elements(node):
            continue
        read = [each for value in node.outputs for each in readers.get(canonical(value), ())]
        results = all(canonical(v) in wanted for v in node.outputs)
        if (not read and results) or (read and _is_view(node) and all(each in moving for each in read)):
            moving.add(node)
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


def _is_view(node: Node) -> bool:
    schema = getattr(node.op.forward, "_schema", None)
    return schema is not None and any(each.alias_info is not None for each in schema.returns)
