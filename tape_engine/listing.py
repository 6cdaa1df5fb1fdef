"""What ``print(tape)`` shows: a line a node, with names, shapes, dtype, rule and the user's line."""

from __future__ import annotations

from .names import names_of, where
from .tape import Hidden, Node, Tape, Value, on_print

__all__ = ["listing"]


def listing(tape: Tape) -> str:
    """The tape as text, one node a line.

    ::

    tape of 3 nodes, 4 leaves
      0  Z (64, 1) float32 = lin(X (64, 784), w (784, 1), b (1,))    lin_grad    train.py:12
    """
    nodes = tape.nodes
    names = names_of(nodes)
    leaves = len(tape.leaves)
    head = f"tape of {len(nodes)} node{'s' * (len(nodes) != 1)}, {leaves} {'leaf' if leaves == 1 else 'leaves'}"
    rows = [(str(i), *_row(node, names)) for i, node in enumerate(nodes)]
    widths = [max((len(row[k]) for row in rows), default=0) for k in range(4)]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([head, *lines])


def _row(node: Node, names: dict[int, str]) -> tuple[str, str, str]:
    made = ", ".join(_made(value, names) for value in node.outputs)
    arguments = [_argument(each, names) for each in node.args if not isinstance(each, Hidden)]
    arguments += [f"{name}={_argument(each, names)}" for name, each in node.kwargs.items()]
    call = f"{node.op.name}({', '.join(arguments)})"
    rule = node.rule + (", random" if node.random else "") + (", in place" if node.mutates else "")
    scope = f"{'/'.join(node.scope)}: " if node.scope else ""
    return f"{made} = {scope}{call}" if made else f"{scope}{call} -> {node.result!r}", rule, where(node) or ""


def _made(value: Value, names: dict[int, str]) -> str:
    device = "" if value.device.type == "cpu" else f" {value.device}"
    return f"{names[id(value)]} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{device}"


def _argument(argument: object, names: dict[int, str]) -> str:
    if isinstance(argument, Value):
        return f"{names[id(argument)]} {tuple(argument.shape)}"
    if isinstance(argument, (list, tuple)):
        inside = ", ".join(_argument(each, names) for each in argument)
        return f"[{inside}]" if isinstance(argument, list) else f"({inside})"
    return repr(argument).removeprefix("torch.")


on_print(listing)
