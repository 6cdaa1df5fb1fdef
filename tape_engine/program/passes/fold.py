"""Constants: what depends on no input, no live tensor and no chance is computed once."""

from __future__ import annotations

from ...tape import Node, Value
from ..data import DESCRIBED, VIEWS, Frozen, sized_by_elements

__all__ = ["fold_constants"]


def fold_constants(frozen: Frozen, nodes: list[Node]) -> set[Node]:
    """The nodes whose outputs are the same on every replay."""
    constant: set[Value] = set(frozen.constants)
    described = {op for op in {node.op for node in nodes} if op.forward in DESCRIBED}
    canonical = frozen.canonical
    folded: set[Node] = set()
    for node in nodes:
        if node.op not in described and not constant.issuperset(map(canonical, node.inputs)):
            continue
        named = node.op.is_named and node.op not in VIEWS
        if not (node.random or named or node.result is not None or sized_by_elements(node)):
            folded.add(node)
            constant.update(map(canonical, node.outputs))
    return folded
