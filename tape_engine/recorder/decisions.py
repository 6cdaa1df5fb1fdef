"""Decisions outside a block: what Python asked of recorded values while the global tape listened.

The global tape refers to its nodes weakly, and what decides is often held by nobody (``if Z.sum() > 0:``). So a
decision keeps an *outline* of what it was computed from: copies of those nodes, which hold no tensor. A program of the
global tape checks those decisions that came before its outputs and have to do with them. A loss that is printed after
it was computed decides nothing about it, and a loop that prints and never sweeps keeps a bounded number of outlines.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..registry import Op
from ..tape import Node, Tape
from .taken import Taken
from .writing import write

__all__ = ["decided", "observe_from", "record_tolist"]

MOST = 4_000  # nodes in the outlines that one tape keeps
FEW = 16  # how many decisions it keeps whose values are gone

_tolist = Op(torch.Tensor.tolist, name="tolist")
_tolist.differentiable = False


def decided(tape: Tape, node: Node) -> None:
    """Keeps a guard of the global tape; of one that asks a value of a tape that was swept, nothing."""
    if any(value.closed for value in node.inputs):
        return
    node.sources, made = _outlines(node.sources)
    tape.decisions.append((node, made + 1))
    if len(tape.decisions) % FEW == 0:
        _give_up(tape)


def _give_up(tape: Tape) -> None:
    """Gives up the oldest decisions: of those whose values are gone but for leaves, all but a few."""
    kept, gone, total = [], 0, 0
    for decision, count in reversed(tape.decisions):
        total += count
        alive = _alive(decision)
        gone += not alive
        if total > MOST or (gone > FEW and not alive):
            tape.forgotten = max(tape.forgotten, decision.seq)
        else:
            kept.append((decision, count))
    tape.decisions = kept[::-1]


def _alive(decision: Node) -> bool:
    """Whether something that a decision was computed from can still lie on the way to an output."""
    stack: list[Node | None] = [*decision.sources]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if any(value.node is not None for value in node.outputs):
            return True
        seen.add(node)
        stack += node.sources
    return False


def observe_from(node: Node) -> None:
    """Lets go of what a node was computed from, but for an outline: it serves decisions and no gradient."""
    node.sources, _ = _outlines(node.sources)


def _outlines(sources: Sequence[Node | None]) -> tuple[tuple[Node | None, ...], int]:
    """Copies of nodes and of all before them, without tensors, through which no sweep passes; how many are new."""
    stack = [node for node in sources if node is not None]
    made = 0
    while stack:
        node = stack[-1]
        waiting = [each for each in node.sources if each is not None and not _outlined(each)]
        if _outlined(node):
            stack.pop()
        elif waiting:
            stack += waiting
        else:
            stack.pop()
            outline = copy.copy(node)
            outline.saved, outline.cut, outline.mutates = (), True, ()
            outline.args = node.op.bare(node.args)
            outline.sources = tuple([None if each is None else _outline_of(each) for each in node.sources])
            outline.is_outline = True
            node.outline = outline
            made += 1
    return tuple([None if each is None else _outline_of(each) for each in sources]), made


def _outlined(node: Node) -> bool:
    return node.is_outline or node.outline is not None


def _outline_of(node: Node) -> Node:
    found = node if node.is_outline else node.outline
    assert found is not None
    return found


def record_tolist(tape: Tape, tensor: torch.Tensor, result: Any) -> None:
    """Records ``tolist()``, which the dispatcher does not hear: a guard."""
    taken = Taken(_tolist, tape, (tensor,), {})
    node = write(tape, _tolist, taken.args, {}, taken.inputs, taken.kept, [])
    node.result = result
    if not tape.strong:
        decided(tape, node)
