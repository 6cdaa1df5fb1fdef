"""Which decisions of the global tape a program has to check.

The global tape holds what other code does as well, so that a decision counts only if it came before the last operation
that the outputs depend on, and was taken by something that has to do with them: a value on their way, an input, or
nothing but leaves that they read too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import NotRecordedError, message
from ..names import call_site, user_frame
from ..tape import Node, Tape, Value

__all__ = ["decisive"]


def decisive(tape: Tape, nodes: set[Node], inputs: Sequence[torch.Tensor]) -> set[Node]:
    """The decisions that a replay of `nodes` has to check, with what they are computed from besides `nodes`.

    Raises:
        NotRecordedError: if the tape has given up decisions that may have been among them.
    """
    if not nodes:
        return set()
    first, last = min(node.seq for node in nodes), max(node.seq for node in nodes)
    if first < tape.forgotten <= last:
        raise NotRecordedError(
            message(
                "tape.program: more decisions were taken by recorded values than the global tape keeps.",
                where=call_site(user_frame()),
                fix="record the code inside `with te.record() as tape:`",
            )
        )
    made = {value for node in nodes for value in node.outputs}
    read = {value for node in nodes for value in node.inputs} - made
    given = {id(tensor) for tensor in inputs}
    found: set[Node] = set()
    for decision, _ in tape.decisions:
        if decision.seq > last:
            continue
        before = _before(decision, made)
        here = {value for node in before for value in node.outputs}
        from_outside = {value for node in before for value in node.inputs} - here
        on_the_way = bool(from_outside & made)
        if on_the_way or any(id(v.holder) in given for v in from_outside) or from_outside <= read:
            found |= before
    return found


def _before(decision: Node, made: set[Value]) -> set[Node]:
    """A decision and the nodes that it is computed from, as far as they make what is not in `made`."""
    found = {decision}
    stack = [decision]
    while stack:
        for source in stack.pop().sources:
            if source is not None and source not in found and not any(value in made for value in source.outputs):
                found.add(source)
                stack.append(source)
    return found
