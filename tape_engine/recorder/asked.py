"""When torch asks anew how a view was computed: as it is used after a write that it has counted.

A view keeps the ``grad_fn`` that it had, until its count of writes, which it shares with its base, has gone up: then
torch makes it another one, of what its base holds by then, once the view is used where a gradient is wanted. That
matters where the base has lost its gradient since (``detach_()``): the gradient of a view that was used before goes on
to what the base was, and of one that is used after it to what the base is, or nowhere.
"""

from __future__ import annotations

import torch

from ..tape import Node, Tape, Value, next_in_sequence, version_of

__all__ = ["ends_there", "note_write", "to_be_asked", "updated"]

Tensor = torch.Tensor


def note_write(tensor: Tensor, value: Value, pending: int) -> None:
    """Notes on `value`, which the view `tensor` holds, a write to memory of its base; torch may not count it.

    `pending` is how many writes torch has yet to count.
    """
    before, count, known = value.written
    now = version_of(tensor) - 1 + pending
    value.written = next_in_sequence(), now, before if now > count else known


def to_be_asked(tape: Tape, tensor: Tensor, value: Value) -> bool:
    """Whether torch has counted a write since the view `tensor`, which holds `value`, was used."""
    last, count, known = value.written
    if version_of(tensor) <= count:
        last = known
    return last >= 0 and not tape.has_used(value, last)


def updated(value: Value, node: Node | None) -> Value:
    """What the gradient of a value meets when it has passed over all writes under ``no_grad``."""
    while node is not None and node.cut:
        place = next((i for i, j in node.mutates if j == value.index), -1)
        if place < 0:
            break
        value, node = node.inputs[place], node.sources[place]
    return value


def ends_there(value: Value) -> bool:
    """Whether a gradient ends at `value` although it was computed: of a base, that it was detached in place."""
    met = updated(value, value.node)
    return value.constant or (met.begins and met.node is not None)
