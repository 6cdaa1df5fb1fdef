"""Common subexpressions: what is computed twice from the same values is computed once.

A rule does not know what the forward pass or another rule has computed: it turns a matrix again, takes the same
exponential, asks for the same mask.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch._ops import OpOverload

from ...registry import Op
from ...tape import Node, Value
from ..data import VIEWS, Frozen, sized_by_elements

__all__ = ["merge_common"]

#: Arguments that two calls may be compared by.
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device)


class _Other(Exception):
    """An argument by which calls cannot be compared."""


def merge_common(frozen: Frozen) -> None:
    """Leaves out nodes that do what an earlier one did: its outputs stand for theirs.

    Only operations of torch's own, and readings and writings of views, whose results depend on their arguments alone:
    no random ones, no guards, none whose shape depends on elements. Where code runs that is not seen, a live tensor
    may have other contents afterwards, and what was computed before is not computed by that.
    """
    known: dict[Hashable, Node] = {}
    own = {op for op in {node.op for nodes in (frozen.forward, frozen.backward) for node in nodes} if _alone(op)}
    for nodes in (frozen.forward, frozen.backward):
        kept = []
        for node in nodes:
            if node.op.is_named and node.op not in VIEWS:
                known.clear()
            elif node.op in own and not (node.random or node.result is not None or sized_by_elements(node)):
                try:
                    key = _key(node, frozen)
                except _Other:
                    kept.append(node)
                    continue
                first = known.setdefault(key, node)
                if first is not node:
                    for value, other in zip(node.outputs, first.outputs, strict=True):
                        frozen.same[value] = other
                        if id(value) in frozen.names:
                            frozen.names.setdefault(id(other), frozen.names[id(value)])
                    continue
            kept.append(node)
        nodes[:] = kept


def _alone(op: Op) -> bool:
    """Whether an operation depends on its arguments alone, and changes nothing."""
    if op in VIEWS:
        return True
    forward = op.forward
    if not isinstance(forward, OpOverload) or not forward._schema.name.startswith("aten::"):
        return False
    return not forward._schema.is_mutable


def _key(node: Node, frozen: Frozen) -> Hashable:
    return node.op, _told(node.args, frozen), _told(node.kwargs, frozen), len(node.outputs), node.gaps


def _told(argument: Any, frozen: Frozen) -> Hashable:
    """An argument such that equal ones, and no others, are equal: 1, 1.0 and True are three."""
    if isinstance(argument, Value):
        return frozen.canonical(argument)
    if isinstance(argument, dict):
        return tuple([(name, _told(each, frozen)) for name, each in sorted(argument.items())])
    if isinstance(argument, (list, tuple)):
        return type(argument), tuple([_told(each, frozen) for each in argument])
    if not isinstance(argument, PLAIN):
        raise _Other
    return type(argument), repr(argument)
