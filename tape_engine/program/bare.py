"""Nodes without contents: what a program keeps of a recording is its structure, and none of its activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tape import Node, Tape
from .data import Frozen

__all__ = ["bare", "bare_tape", "let_go"]


def bare(nodes: Sequence[Node], known: dict[Node, Node] | None = None) -> list[Node]:
    """Copies of `nodes` that keep no tensor; each is read by those after it in the place of the recorded one."""
    known = {} if known is None else known
    found = []
    for node in nodes:
        made = known.get(node)
        if made is None:
            made = known[node] = Node.__new__(Node)  # a copy; `copy.copy` takes five times as long
            vars(made).update(vars(node))
            made.saved, made.args = (), node.op.bare(node.args)
            made.sources = tuple([None if source is None else known.get(source) for source in node.sources])
        found.append(made)
    return found


def bare_tape(tape: Tape, known: dict[Node, Node]) -> Tape:
    """A copy of `tape` that keeps neither its tensors nor those of its nodes; `known` as in `bare`."""
    made = Tape(strong=True, strict=tape.strict)
    for node in bare(tape.nodes, known):
        made.append(node)
    return made


def let_go(frozen: Frozen) -> None:
    """Puts stand-ins of the same description, without memory, in the place of the inputs that were recorded."""
    for i, tensor in enumerate(frozen.given):
        one = torch.empty((1,) * tensor.ndim, dtype=tensor.dtype, device=tensor.device)
        stand_in = frozen.given[i] = one.expand(tensor.shape)
        for value, holder in frozen.leaves.items():
            if holder is tensor:
                frozen.leaves[value] = stand_in
