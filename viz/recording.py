"""What there is to draw: the nodes behind a tape, a program or a tensor, and which values have a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tape_engine.errors import DTypeError, NotRecordedError, message
from tape_engine.tape import Node, Tape, Value, values_by_tensor

from .errors import caller
from .roles import roles_of

__all__ = ["Recording", "passes", "recording"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Recording:
    """What there is to draw: the nodes in order, which values have a gradient, what leaves are for.

    `gradients` maps ``id(value)`` to the shape of its ``.g``, `roles` ``id(leaf)`` to its role;
    `planned` is true where the gradients are those that a program computes when it steps.
    """

    nodes: list[Node]
    gradients: dict[int, Shape]
    roles: dict[int, str]
    planned: bool = False


def recording(root: Any) -> Recording:
    """The nodes behind `root`, with their gradients and the roles of their leaves (see `graph`)."""
    if isinstance(root, torch.Tensor):
        entry = values_by_tensor.get(id(root))
        if entry is None or entry[0]() is not root or entry[2] is None:
            raise NotRecordedError(
                message(
                    f"no recorded operation made this tensor of shape {tuple(root.shape)}: there is nothing to draw.",
                    where=caller(),
                    fix="compute it inside `with te.record() as tape:`, or draw the tape itself: viz.draw(tape)",
                )
            )
        nodes, planned = _ancestors(entry[2]), False
    else:
        tape = root if isinstance(root, Tape) else getattr(root, "tape", None)
        if not isinstance(tape, Tape):
            raise DTypeError(
                message(
                    f"a picture is drawn of a tape, a program or a recorded tensor, not of {type(root).__name__}.",
                    where=caller(),
                    fix="viz.draw(te.global_tape()), or viz.draw(C) for what a tensor C was computed from",
                )
            )
        nodes, planned = tape.nodes, tape is not root
    gradients = _planned_gradients(nodes) if planned else _gradients(nodes)
    return Recording(nodes, gradients, roles_of(nodes), planned and bool(gradients))


def _ancestors(node: Node) -> list[Node]:
    """`node` and every node it depends on, in the order of recording."""
    found, stack = {id(node): node}, [node]
    while stack:
        for source in stack.pop().sources:
            if source is not None and id(source) not in found:
                found[id(source)] = source
                stack.append(source)
    return sorted(found.values(), key=lambda each: each.seq)


# -- gradients -----------------------------------------------------------------------------------------


def passes(node: Node) -> bool:
    """Whether a gradient passes through `node` to its inputs."""
    return node.rule not in ("cut", "none")


def _gradients(nodes: Sequence[Node]) -> dict[int, Shape]:
    """The shape of every ``.g`` that a sweep over `nodes` wrote.

    A leaf may still have a ``.g`` of an earlier sweep: it counts where a gradient reaches one of its readers.
    """
    found: dict[int, Shape] = {}
    made = set()
    for node in nodes:
        for value in node.outputs:
            made.add(id(value))
            if (shape := _g_shape(value, node.swept)) is not None:
                found[id(value)] = shape
    for node in nodes:
        if not passes(node) or not any(id(v) in found for v in node.outputs):
            continue
        for value in node.inputs:
            if id(value) not in made and (shape := _g_shape(value, node.swept)) is not None:
                found[id(value)] = shape
    return found


def _g_shape(value: Value, swept: bool) -> Shape | None:
    if not value.differentiable:
        return None
    if value.tensor is None:  # the tensor is gone or was written to since; its gradient was there all the same
        return tuple(value.shape) if swept else None
    g = getattr(value.tensor, "g", None)
    return tuple(g.shape) if isinstance(g, torch.Tensor) else None


def _planned_gradients(nodes: Sequence[Node]) -> dict[int, Shape]:
    """The shape of every gradient that a sweep from the last floating value would compute."""
    read = {id(v) for node in nodes for v in node.inputs}
    ends = [v for node in nodes if passes(node) for v in node.outputs if v.differentiable and id(v) not in read]
    found = {id(v): tuple(v.shape) for v in ends[-1:]}
    for node in reversed(nodes):
        if passes(node) and any(id(v) in found for v in node.outputs):
            found.update({id(v): tuple(v.shape) for v in node.inputs if v.differentiable})
    return found
