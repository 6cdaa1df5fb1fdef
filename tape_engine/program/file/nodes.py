"""The nodes of a program file: their arguments fit their operations, their indices mean something."""

from __future__ import annotations

from typing import Any

import torch

from ...tape import Node
from .arguments import check_arguments
from .checked import Place, boolean, integer, listed, record, refuse, shown, text
from .params import Decoder
from .tables import Tables

__all__ = ["read_nodes"]


def read_nodes(tables: Tables) -> list[Node]:
    """Every node that a file lists.

    Raises:
        LoadError: naming the place of what is wrong.
    """
    return _Reader(tables).nodes


class _Reader:
    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        decoder = Decoder(tables.values, tables.device)
        self.nodes = [self._node(row, ("nodes", i), decoder) for i, row in enumerate(tables.part("nodes"))]

    def _node(self, row: Any, place: Place, decoder: Decoder) -> Node:
        record(
            row, place, ("op", "args", "outputs"),
            ("kwargs", "guard", "tuple", "gaps", "inputs", "writes", "cut", "random", "scope", "line"),
        )  # fmt: skip
        op = self.tables.index(row["op"], (*place, "op"), self.tables.ops)
        decoder.read = []
        args = tuple(
            [decoder.decoded(a, (*place, "args", i)) for i, a in enumerate(listed(row["args"], (*place, "args")))]
        )
        kwargs = {}
        if "kwargs" in row:
            if type(row["kwargs"]) is not dict:
                refuse((*place, "kwargs"), f"an object is wanted, not {shown(row['kwargs'])}.")
            kwargs = {
                text(name, (*place, "kwargs")): decoder.decoded(a, (*place, "kwargs", name[:40]))
                for name, a in row["kwargs"].items()
            }
        check_arguments(op, args, kwargs, place)
        inputs = decoder.read
        if "inputs" in row:  # what it takes over besides its arguments
            more = [
                decoder.value(v, (*place, "inputs", i)) for i, v in enumerate(listed(row["inputs"], (*place, "inputs")))
            ]
            if more[: len(inputs)] != inputs:
                refuse((*place, "inputs"), "they begin with the arguments.")
            inputs = more
        line = self.tables.index(row["line"], (*place, "line"), self.tables.lines) if "line" in row else None
        scope = self.tables.index(row["scope"], (*place, "scope"), self.tables.scopes) if "scope" in row else ()
        node = Node(op, args, kwargs, tuple(inputs), (None,) * len(inputs), line, row.get("line", 0), scope)
        self._made(node, row, place, decoder)
        return node

    def _made(self, node: Node, row: dict[str, Any], place: Place, decoder: Decoder) -> None:
        """The outputs of a node, and what else is told of it."""
        outputs = [
            decoder.value(v, (*place, "outputs", i)) for i, v in enumerate(listed(row["outputs"], (*place, "outputs")))
        ]
        if len({*outputs}) < len(outputs):
            refuse((*place, "outputs"), "one value is made twice.")
        node.outputs = tuple(outputs)
        node.cut = boolean(row.get("cut", False), (*place, "cut"))
        random = boolean(row.get("random", False), (*place, "random"))
        node.random = random or torch.Tag.nondeterministic_seeded in getattr(node.op.forward, "tags", ())
        node.outputs_tuple = boolean(row.get("tuple", False), (*place, "tuple"))
        if "guard" in row:
            node.result = decoder.decoded(row["guard"], (*place, "guard"))
        if (node.result is None) == (not outputs):
            refuse(place, "a node makes values or is a guard, one of the two.")
        if len(outputs) > 1 and not node.outputs_tuple:
            refuse((*place, "tuple"), f"{len(outputs)} values are a tuple.")
        gaps = listed(row.get("gaps", []), (*place, "gaps"))
        for i, each in enumerate(gaps):
            integer(each, (*place, "gaps", i), gaps[i - 1] + 1 if i else 0, len(outputs) + len(gaps) - 1)
        if gaps and not node.outputs_tuple:
            refuse((*place, "gaps"), "gaps are in tuples.")
        node.gaps = tuple(gaps)
        for i, pair in enumerate(listed(row.get("writes", []), (*place, "writes"))):
            taken, made = listed(pair, (*place, "writes", i), 2)
            integer(taken, (*place, "writes", i, 0), -1, len(node.inputs) - 1)
            integer(made, (*place, "writes", i, 1), 0, len(outputs) - 1)
            node.mutates = (*node.mutates, (taken, made))
