"""``python -m tests.benchmarks``: every benchmark in one run, as tables beside eager torch.autograd."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

import tape_engine as te
from tape_engine import data

from . import article, models, replay, steps
from . import others as beside
from .report import HELD, figure, held_table, page, scale_of
from .timing import Table, Timing


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__, allow_abbrev=False)
    made.add_argument("--quick", action="store_true", help="small sizes and few rounds: seconds, and rough figures")
    made.add_argument("--json", type=Path, metavar="PATH", help="writes every figure to a file as well")
    made.add_argument("--markdown", type=Path, metavar="PATH", help="writes the tables to a page of the documentation")
    made.add_argument("--data", metavar="mnist|FOLDER", help="real MNIST for the first tables, not random numbers")
    made.add_argument("--rows", type=int, metavar="N", help="rows of X in the first tables (default: 50,000)")
    made.add_argument("--rounds", type=int, metavar="N", help="measurements of each of the quick ways (default: 15)")
    made.add_argument("--others", action="store_true", help="beside torch.compile and, where it is installed, JAX")
    made.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: as torch has it)")
    return made


def machine(*, others: bool = False) -> dict[str, Any]:
    """What the figures depend on, those of `others` too."""
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llvmlite": _version("llvmlite"),
        "tape_engine": te.__version__,
    }
    return {**found, "jax": _version("jax"), "C++ compiler": beside.compiler()} if others else found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs them all; the exit status."""
    options = parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = options.rows or (2_000 if options.quick else article.ROWS)
    rounds = options.rounds or (5 if options.quick else 15)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)
    about = machine(others=options.others)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    if options.data:
        digits = data.load(options.data)
        X, Y = digits.images[:rows], digits.labels[:rows].float()
    else:
        X, Y = article.random_data(rows)

    others: bool = options.others
    few = 30 if options.quick else 300
    size = 2 if options.quick else None
    small = rounds if options.quick else 5 * rounds
    close = rounds if options.quick else 3 * rounds  # where the ways lie close together, and one busy second tells
    # Those beside others come last: once those are loaded, whatever runs in Python takes longer.
    alone: list[Callable[[Callable[[str], None]], Table]] = [
        lambda tell: steps.chain(30 if options.quick else 300, close, on_run=tell),
        *((lambda tell, model=model: models.step(model, close, batch=size, on_run=tell)) for model in models.MODELS),
        lambda tell: replay.tiny(60 if options.quick else 3_000, rounds, on_run=tell),
        lambda tell: replay.tiny(60 if options.quick else 3_000, rounds, products=True, on_run=tell),
    ]
    jobs: list[Callable[[Callable[[str], None]], Table]] = [
        *alone,
        lambda tell: article.all_gradients(X, Y, rounds, others=others, on_run=tell),
        lambda tell: article.parameters_only(X, Y, rounds, others=others, on_run=tell),
        *(
            (lambda tell, batch=batch: steps.perceptron(batch, small, others=others, on_run=tell))
            for batch in (1, 64, 512)
        ),
        *(
            (lambda tell, mixed=mixed: replay.tiny(few, rounds, products=mixed, others=True, on_run=tell))
            for mixed in (False, True)[: 2 * others]
        ),
        lambda tell: replay.posterior(1_000, small, others=others, on_run=tell),
        lambda tell: replay.first_result(
            rows, 60 if options.quick else 3_000, min(rounds, 3), others=others, on_run=tell
        ),
        lambda tell: replay.growth((30, 60) if options.quick else (10_000, 30_000, 100_000), 1, on_run=tell),
        lambda tell: article.loops(X, Y, 1, on_run=tell),
    ]
    tables: list[Table] = []
    for job in jobs:
        with status(console) as tell:
            tables.append(job(tell))
        console.print()
        console.print(shown(tables[-1]))
    first = len(alone)
    tables = [*tables[first : first + 2], *tables[:first], *tables[first + 2 :]]  # the article's stand at the top
    peaks = [models.memory(model, batch=size) for model in models.MODELS]
    console.print()
    console.print(held(peaks))
    if options.json:
        report = {"machine": about, "tables": [table.as_data() for table in tables]}
        report["memory"] = [each.as_data() for each in peaks]
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"\n{options.json}")
    if options.markdown:
        options.markdown.write_text(page(about, tables, peaks), encoding="utf-8")
        console.print(f"\n{options.markdown}")
    return 0


@contextmanager
def status(console: Console) -> Iterator[Callable[[str], None]]:
    """On a terminal, a line that tells what is being measured."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as line:
        yield lambda name: line.update(f"measuring {name}")


def shown(table: Table) -> RichTable:
    """The table as it is printed."""
    scale, unit = scale_of(table)
    made = RichTable(box=box.SIMPLE_HEAD, show_edge=False, title=table.title, title_justify="left", title_style="bold")
    made.add_column("", no_wrap=True)
    for column in (f"median, {unit}", "min to max", "runs", "of the first"):
        made.add_column(column, justify="right", no_wrap=True)
    for timing in table.timings:
        made.add_row(timing.name, *_figures(timing, scale), f"{table.ratio(timing):.2f} x")
    return made


def held(peaks: Sequence[models.Memory]) -> RichTable:
    """The table of memory as it is printed."""
    made = RichTable(box=box.SIMPLE_HEAD, show_edge=False, title=HELD, title_justify="left", title_style="bold")
    heads, rows = held_table(peaks)
    for i, head in enumerate(heads):
        made.add_column(head, justify="left" if i < 2 else "right", no_wrap=True, min_width=10 if i > 1 else None)
    for row in rows:
        made.add_row(*row)
    return made


def _figures(timing: Timing, scale: float) -> tuple[str, str, str]:
    low, high = (figure(scale * each) for each in (timing.low, timing.high))
    return figure(scale * timing.median), f"{low} to {high}", str(timing.measurements)


if __name__ == "__main__":
    sys.exit(main())
