"""Layout: on which leaves it matters how their elements lie in memory.

Most operations take a tensor of any strides. A few were recorded for those that it had (``view``, a write
through a view); what they look into, back to the leaves, has to lie as it was recorded.
"""

from __future__ import annotations

import torch

from ...aliases import read_view, write_view
from ...tape import Node, Value
from ..data import Frozen

__all__ = ["laid_out"]

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
