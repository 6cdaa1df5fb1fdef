"""Masks: of an operation that computes several gradients at once, those that nobody reads are not asked for.

The rule of a convolution, say, gives the gradients of the picture, the weights and the bias by one operation with a
mask, ``output_mask``. Where the picture is data, its gradient is a third of the work.
"""

from __future__ import annotations

import copy

from ...registry import Op
from ...tape import Node, Value
from ..data import Frozen

__all__ = ["unmask"]

MASK = "output_mask"


def unmask(nodes: list[Node], frozen: Frozen, wanted: set[Value]) -> list[Node]:
    """The nodes, with masks that leave out what neither another node nor `wanted` reads."""
    places = {op: _place(op) for op in {node.op for node in nodes}}
    if all(place is None for place in places.values()):
        return nodes
    read = wanted | {frozen.canonical(v) for node in nodes for v in node.inputs}
    return [
        node if (place := places[node.op]) is None or place >= len(node.args) else _narrowed(node, place, frozen, read)
        for node in nodes
    ]


def _place(op: Op) -> int | None:
    """Which of an operation's arguments is its mask."""
    schema = getattr(op.forward, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return names.index(MASK) if MASK in names else None


def _narrowed(node: Node, place: int, frozen: Frozen, read: set[Value]) -> Node:
    mask = list(node.args[place])
    given = [i for i in range(len(mask)) if i not in node.gaps]  # the place of each output in what is returned
    if len(given) != len(node.outputs):
        return node
    left = [(i, v) for i, v in zip(given, node.outputs, strict=True) if frozen.canonical(v) in read]
    if len(left) == len(given) or not left:
        return node
    made = copy.copy(node)
    asked = [i in {i for i, _ in left} for i in range(len(mask))]
    made.args = (*node.args[:place], asked, *node.args[place + 1 :])
    made.outputs = tuple([v for _, v in left])
    made.gaps = tuple([i for i, wanted in enumerate(asked) if not wanted])
    made.mutates = ()
    return made
