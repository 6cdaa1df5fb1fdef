"""Turned products: a product of which a transposed copy is wanted is computed transposed.

The gradient of the weights of ``x @ w.t()`` comes out as that of ``w.t()``; turned back, it is a view, of which ``.g``
has to be a copy. ``(a @ b).t()`` is ``b.t() @ a.t()``, written at once as it is to lie.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ...registry import find
from ...tape import Node, Value
from ..data import Frozen

__all__ = ["turn_products"]

aten = torch.ops.aten
CLONE, MM, TRANSPOSE, T = aten.clone.default, aten.mm.default, aten.transpose.int, aten.t.default


def turn_products(nodes: list[Node], frozen: Frozen, wanted: set[Value]) -> list[Node]:
    """The nodes, with a turned product for each copy of a transposed one that nobody else reads."""
    if not any(op.forward is MM for op in {node.op for node in nodes}):
        return nodes
    canonical = frozen.canonical
    readers: dict[Value, int] = {}
    makers: dict[Value, Node] = {}
    for node in nodes:
        for value in node.inputs:
            readers[canonical(value)] = readers.get(canonical(value), 0) + 1
        for value in node.outputs:
            makers[canonical(value)] = node

    def made_by(value: Value) -> Node | None:
        """The node that made a value which is read once, and no result."""
        value = canonical(value)
        return makers.get(value) if readers[value] == 1 and value not in wanted else None

    left_out: set[Node] = set()
    turned: dict[Node, list[Node]] = {}
    for node in nodes:
        if node.op.forward is not CLONE or node.outputs[0].strides != _dense(node.outputs[0]):
            continue
        views: list[Node] = []
        product = made_by(node.inputs[0])
        while product is not None and _is_turn(product):
            views.append(product)
            product = made_by(product.inputs[0])
        if product is None or product.op.forward is not MM or not views:
            continue
        steps: list[Node] = []
        a, b = product.inputs
        if len(views) % 2:
            b, a = (_turned(value, makers, canonical, product, steps) for value in (a, b))
        made = copy.copy(product)
        made.args = made.inputs = tuple([_straight(value, makers, canonical) for value in (a, b)])
        made.outputs = node.outputs
        turned[product] = [*steps, made]
        left_out |= {node, *views}
    found = [each for node in nodes if node not in left_out for each in turned.get(node, [node])]
    read = set(wanted)
    kept = []
    for node in reversed(found):
        if not _is_turn(node) or canonical(node.outputs[0]) in read:
            kept.append(node)
            read.update(map(canonical, node.inputs))
    return kept[::-1]


def _dense(value: Value) -> tuple[int, ...]:
    return (value.shape[1], 1) if value.ndim == 2 else ()


def _is_turn(node: Node) -> bool:
    """Whether a node swaps the two dimensions of a matrix."""
    if node.op.forward not in (T, TRANSPOSE):
        return False
    if node.inputs[0].ndim != 2 or node.outputs[0].ndim != 2:
        return False
    if node.op.forward is T:
        return True
    return node.op.forward is TRANSPOSE and {d % 2 for d in node.args[1:]} == {0, 1}


def _straight(value: Value, makers: dict[Value, Node], canonical: Callable[[Value], Value]) -> Value:
    """`value`, or what it was turned from twice."""
    maker = makers.get(canonical(value))
    if maker is not None and _is_turn(maker):
        before = makers.get(canonical(maker.inputs[0]))
        if before is not None and _is_turn(before):
            return _straight(before.inputs[0], makers, canonical)
    return value


def _turned(
    value: Value, makers: dict[Value, Node], canonical: Callable[[Value], Value], like: Node, steps: list[Node]
) -> Value:
    """The transposed `value`: what it was turned from, or the result of a further step."""
    maker = makers.get(canonical(value))
    if maker is not None and _is_turn(maker):
        return maker.inputs[0]
    made: Any = object.__new__(Value)
    made.__dict__.update(value.__dict__, shape=torch.Size(value.shape[::-1]), strides=tuple(value.strides[::-1]))
    step = copy.copy(like)
    step.op, step.args, step.kwargs, step.inputs, step.outputs = find(T), (value,), {}, (value,), (made,)
    steps.append(step)
    return made  # type: ignore[no-any-return]
