"""Layout: on which leaves it matters how their elements lie in memory.

Most operations take a tensor of any strides. A few were recorded for those that it had (``view``, a write
through a view); what they look into, back to the leaves, has to lie as it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...places import read_view, write_view
from ...tape import Node, Value
from ..data import Frozen

__all__ = ["laid_out", "looked_beyond"]

aten = torch.ops.aten

#: What depends on the strides of its argument.
STRIDED = {
    aten.view.default, aten.view.dtype, aten._unsafe_view.default, aten._reshape_alias.default, aten.as_strided.default,
    aten.as_strided_scatter.default, aten.view_as_complex.default, aten.view_as_real.default,
    read_view.forward, write_view.forward,
}  # fmt: skip


def laid_out(frozen: Frozen, nodes: list[Node]) -> set[Value]:
    """The leaves that a replay must have in the recorded layout."""
    wanted: set[Value] = set()
    strided = {op for op in {node.op for node in nodes} if op.forward in STRIDED}
    for node in reversed(nodes):
        if node.op in strided or (wanted and any(frozen.canonical(value) in wanted for value in node.outputs)):
            wanted.update(frozen.canonical(value) for value in node.inputs)
    rim = {value for value in (*frozen.inputs, *frozen.live) if value is not None} - frozen.constants
    return {value for value in wanted & rim if value.strides}


def looked_beyond(nodes: Sequence[Node], canonical: Callable[[Value], Value]) -> set[Node]:
    """The views beyond which ``as_strided`` may look: they have to lie in the memory of what they are views of."""
    makers = {canonical(value): node for node in nodes for value in node.outputs}
    found: set[Node] = set()
    for each in nodes:
        node: Node | None = each if each.op.forward is aten.as_strided.default else None
        while node is not None and (node := makers.get(canonical(node.inputs[0]))) is not None:
            schema = getattr(node.op.forward, "_schema", None)
            if not node.inputs or schema is None or all(each.alias_info is None for each in schema.returns):
                break
            found.add(node)
    return found
