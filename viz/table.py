"""A recording as a table: a line an operation, with shapes forward and back, elements and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .graph import graph
from .markup import counted, shape_text, shorten

__all__ = ["table"]

Facts = Mapping[str, Any]
_HEAD = ("#", "operation", "reads", "value", "shape", ".g", "dtype", "elements", "bytes", "bytes of .g", "source")
_TO_THE_RIGHT = frozenset([0, 7, 8, 9])


def table(root: Any) -> str:
    """A table of the operations of a tape, a program, or of what a recorded tensor was computed from.

    Each line has the operation's name, the shapes that it reads, the name, shape and dtype of what it makes, the
    shape of the gradient of that (``-`` where it has none), elements and bytes of all its values and of their
    gradients, and the user's line. Totals of operations and leaves end it. A view counts as a tensor of its own.

    Raises:
        NotRecordedError: for a tensor that no recorded operation made.
        DTypeError: for a root of another kind.
    """
    nodes = [facts for _, facts in graph(root).nodes(data=True)]
    steps = [facts for facts in nodes if facts["kind"] == "op"]
    leaves = [facts for facts in nodes if facts["kind"] == "leaf"]
    rows = [_line(i, facts) for i, facts in enumerate(steps)]
    totals = [
        _total(counted(len(steps), "operation"), steps),
        _total(counted(len(leaves), "leaf", "leaves"), leaves),
    ]
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, *totals, strict=True)]
    rule = "  ".join("─" * width for width in widths)
    text = [_aligned(_HEAD, widths), rule, *(_aligned(each, widths) for each in rows), rule]
    return "\n".join([*text, *(_aligned(each, widths) for each in totals)])


def _line(index: int, facts: Facts) -> Sequence[str]:
    outputs = facts["outputs"]
    names = ", ".join(each["name"] for each in outputs[:3]) + (", …" if len(outputs) > 3 else "")
    g_shapes = [shape_text(each["g_shape"]) or "-" for each in outputs]
    reads = " ".join(shape_text(each["shape"]) for each in facts["inputs"])
    return (
        str(index),
        facts["op"],
        shorten(reads or "-", 60),
        shorten(names or "-", 32),
        shorten(" ".join(shape_text(each["shape"]) for each in outputs) or "-", 40),
        shorten(" ".join(g_shapes) if set(g_shapes) != {"-"} else "-", 40) if outputs else "-",
        " ".join(dict.fromkeys(each["dtype"] for each in outputs)) or "-",
        f"{facts['elements']:,}",
        f"{facts['bytes']:,}",
        f"{facts['g_bytes']:,}",
        facts["source"] or "-",
    )


def _total(what: str, nodes: Sequence[Facts]) -> Sequence[str]:
    sums = [f"{sum(facts[key] for facts in nodes):,}" for key in ("elements", "bytes", "g_bytes")]
    return ("", what, "", "", "", "", "", *sums, "")


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    pieces = [
        cell.rjust(width) if i in _TO_THE_RIGHT else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(pieces).rstrip()
