"""Constants: what depends on no input, no live tensor and no chance is computed once."""

from __future__ import annotations

from ...tape import Node, Value
from ..data import DESCRIBED, VIEWS, Frozen, sized_by_elements

__all__ = ["fold_constants"]


def fold_constants(frozen: Frozen, nodes: list[Node]) -> set[Node]:
    """The nodes whose outputs are the same on every replay."""
    constant: set[Value] = set(frozen.constants)
    folded: set[Node] = set()
    for node in nodes:
        named = node.op.is_named and node.op not in VIEWS
        if node.random or named or node.result is not None or sized_by_elements(node):
            continue
        described = node.op.forward in DESCRIBED
        if described or all(frozen.canonical(value) in constant for value in node.inputs):
            folded.add(node)
            constant.update(frozen.canonical(value) for value in node.outputs)
    return folded
