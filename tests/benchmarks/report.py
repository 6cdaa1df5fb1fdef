"""The figures of a run as a page of the documentation: tables in Markdown, with the machine and the versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .models import Memory
from .others import JAX, TORCH_COMPILE
from .timing import Table

__all__ = ["HELD", "figure", "held_table", "page", "scale_of"]

HELD = "the most memory that tensors hold in a step, forward and back to the parameters, beyond those"

HEAD = """# How fast it is

Every figure of a table comes from one run, in which the ways took turns; the last column is the ratio of medians to the
first line. Written by `python3 dev.py bench --markdown docs/explanation/speed.md`; [](replay.md) tells what is behind
the replays.

Measured with {machine}.
"""

BESIDE = f"""
Where {TORCH_COMPILE} and {JAX} have lines, each was given the same computation, written in its own terms, and had to
give torch's gradients, to rounding, before it was timed. Compiling is not in the time, but where the table is of first
results.

- **{TORCH_COMPILE}**: `torch.autograd.grad` of a function that `torch.compile(..., dynamic=False)` compiled for tensors
  of these shapes.
- **{JAX}**: `jax.jit(jax.value_and_grad(...))` on the CPU, in the dtype of the tensors (64-bit numbers are switched
  on). The arrays lie with JAX before, none is donated, and every run is waited for. JAX has threads of its own.
"""


def page(about: dict[str, Any], tables: Sequence[Table], peaks: Sequence[Memory]) -> str:
    """The page: what the figures depend on, a table a benchmark, then the table of memory."""
    parts = [HEAD.format(machine=", ".join(f"{name} {value}" for name, value in about.items()))]
    if any(way in each.name for table in tables for each in table.timings for way in (TORCH_COMPILE, JAX)):
        parts[0] += BESIDE
    parts += [_timed(table) for table in tables]
    parts.append(_held(peaks))
    return "\n".join(parts)


def _timed(table: Table) -> str:
    scale, unit = scale_of(table)
    rows = [
        [
            each.name,
            figure(scale * each.median),
            f"{figure(scale * each.low)} to {figure(scale * each.high)}",
            f"{table.ratio(each):.2f} x",
        ]
        for each in table.timings
    ]
    heads = ["", f"median, {unit} a {table.unit}", "least to most", "of the first"]
    return f"## {table.title[:1].upper()}{table.title[1:]}\n\n{_table(heads, rows)}"


def _held(peaks: Sequence[Memory]) -> str:
    heads, rows = held_table(peaks)
    return f"## {HELD[:1].upper()}{HELD[1:]}\n\n{_table(heads, rows)}"


def held_table(peaks: Sequence[Memory]) -> tuple[list[str], list[list[str]]]:
    """The heads and the lines of the table of memory: a line for each way of each model."""
    rows = []
    for each in peaks:
        for i, (way, held) in enumerate(each.peaks.items()):
            rows.append(["" if i else each.name, way, figure(held / 1e6), f"{each.ratio(way):.2f} x"])
    return ["", "", "MB", "of the first"], rows


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def scale_of(table: Table) -> tuple[float, str]:
    """What seconds are multiplied by so that the first way takes one or more, and the unit that this gives."""
    scales = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
    return next((s, u) for s, u in scales if table.timings[0].median * s >= 1 or u == "µs")


def figure(number: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
