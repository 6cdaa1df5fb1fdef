"""What there is to draw: the nodes behind a tape, a program or a tensor, and which values have a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tape_engine.errors import DTypeError, NotRecordedError, message
from tape_engine.names import local_name
from tape_engine.tape import Node, Tape, Value, ancestors, describe, values_by_tensor

from .errors import caller, user_line
from .roles import roles_of

__all__ = ["Recording", "passes", "recording"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Recording:
    """What there is to draw: the nodes in order, which values have a gradient, what leaves are for.

    Attributes:
        nodes: the operations, in the order of recording.
        gradients: of each value that has one, by ``id``, the shape of its ``.g``.
        passed: the ``id`` of every value that a gradient came to, whether it was kept as ``.g`` or not.
        roles: of each leaf, by ``id``, its role.
        planned: whether the gradients are those that a program computes when it steps.
    """

    nodes: list[Node]
    gradients: dict[int, Shape]
    passed: set[int]
    roles: dict[int, str]
    planned: bool = False

    def sends(self, node: Node, value: Value) -> bool:
        """Whether the rule of `node` sends a gradient back to `value`, which keeps it."""
        return id(value) in self.gradients and passes(node) and any(id(v) in self.passed for v in node.outputs)


def recording(root: Any) -> Recording:
    """The nodes behind `root`, with their gradients and the roles of their leaves (see `graph`)."""
    if isinstance(root, torch.Tensor):
        binding = values_by_tensor.get(id(root))
        if binding is None or binding.node is None:
            raise NotRecordedError(
                message(
                    "no recorded operation made this tensor: there is nothing to draw.",
                    where=caller(),
                    operands=[(local_name(user_line(), root) or "root", describe(root))],
                    fix="compute it inside `with te.record() as tape:`, or draw the tape itself: viz.draw(tape)",
                )
            )
        nodes, planned = ancestors(binding.node), False
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
    gradients, passed = _planned(nodes, getattr(root, "outputs", None)) if planned else _written(nodes)
    return Recording(nodes, gradients, passed, roles_of(nodes), planned and bool(gradients))


# -- gradients -----------------------------------------------------------------------------------------


def passes(node: Node) -> bool:
    """Whether a gradient passes through `node` to its inputs."""
    return node.rule not in ("cut", "none")


def _written(nodes: Sequence[Node]) -> tuple[dict[int, Shape], set[int]]:
    """The shape of every ``.g`` that a sweep over `nodes` wrote, and all the values that it came to.

    A sweep begins at values with a ``.g`` of their own, or (of ``wrt=``, which writes few) at what it passed over
    and nothing passed over reads. A leaf may still have a ``.g`` of an earlier sweep: it counts where this one
    comes to it. Of a tensor that is gone, or was written to since, it cannot be said; a sweep that writes all wrote
    it, too.
    """
    passed, read, wrote_all = set[int](), set[int](), True
    for node in reversed(nodes):
        for value in node.outputs:
            if value.differentiable and id(value) not in passed:
                begins = node.swept and id(value) not in read and value.index == 0
                wrote_all = wrote_all and not (begins and value.tensor is not None and _g_shape(value) is None)
                if begins or _g_shape(value) is not None:
                    passed.add(id(value))
        if node.swept:
            read.update(map(id, node.inputs))
        if passes(node) and any(id(v) in passed for v in node.outputs):
            passed.update(id(v) for v in node.inputs if v.differentiable)
    gradients: dict[int, Shape] = {}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if id(value) in passed and id(value) not in gradients:
                shape = _g_shape(value)
                if shape is None and value.tensor is None and node.swept and wrote_all:
                    shape = tuple(value.shape)
                if shape is not None:
                    gradients[id(value)] = shape
    return gradients, passed


def _g_shape(value: Value) -> Shape | None:
    g = getattr(value.tensor, "g", None)
    return tuple(g.shape) if isinstance(g, torch.Tensor) else None


def _planned(nodes: Sequence[Node], outputs: Any) -> tuple[dict[int, Shape], set[int]]:
    """The shape of every gradient that a sweep from `outputs` would compute, by default from the last result.

    Of an operation with several outputs (``nll_loss``: the loss and the sum of its weights) that is the first that
    nobody reads.
    """
    if not outputs:
        read = {id(v) for node in nodes for v in node.inputs}
        ends = [[v for v in n.outputs if id(v) not in read and v.differentiable] for n in nodes if passes(n)]
        outputs = [v for left in ends for v in left[:1]][-1:]
    given = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    found = {id(v): tuple(v.shape) for v in given if isinstance(v, Value) and v.differentiable}
    for node in reversed(nodes):
        if passes(node) and any(id(v) in found for v in node.outputs):
            found.update({id(v): tuple(v.shape) for v in node.inputs if v.differentiable})
    return found, set(found)
