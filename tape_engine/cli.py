"""The command line: ``tape-engine demo``, ``tape-engine draw``, ``tape-engine profile``.

Exit status 0: all went well. 1: a comparison failed. 2: the job could not be done (a bad argument, data that
cannot be read, a folder that cannot be written to), as one message says. 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__, data, demo
from .errors import TapeError, message
from .program.loading import draft, load
from .program.profiling import random_arguments

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

DONE, DIFFERS, FAILED, INTERRUPTED = 0, 1, 2, 130


# -- arguments ---------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """What the command line understands; each sub-command sets ``run``."""
    top = argparse.ArgumentParser(
        prog="tape-engine",
        description="A tape-based computation-graph engine on torch tensors.",
        epilog="'tape-engine COMMAND --help' tells more of one.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"tape-engine {__version__} (torch {torch.__version__})")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "demo",
        help="record, sweep, check, draw and replay lin -> relu -> mse on real handwritten digits",
        description=(
            "Records lin -> relu -> mse on real handwritten digits, sweeps back, compares every gradient with the "
            "closed form, with loops over the rows and with torch.autograd, draws the graph, and trains a small "
            "network by replay."
        ),
        epilog="Exit status 1 if a comparison fails, 2 if the job could not be done.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--data",
        default="digits",
        metavar="digits|mnist|FOLDER",
        help="scikit-learn's bundled digits (the default), MNIST (downloaded once), or a folder of IDX files",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("tape-engine-demo"),
        metavar="DIR",
        help="the folder for the pictures (default: %(default)s)",
    )
    command.add_argument(
        "--steps", type=_at_least_one, default=3000, metavar="N", help="steps of training (default: %(default)s)"
    )
    command.set_defaults(run=_demo)

    command = commands.add_parser(
        "draw",
        help="draw a program that program.save wrote",
        description=(
            "Draws the computation of a program file, with the shapes of its values and of the gradients that a step "
            "computes. Nothing of the file is run: operations of one's own need not be there."
        ),
        epilog="Exit status 2 if the file cannot be loaded, drawn or written.",
        allow_abbrev=False,
    )
    command.add_argument("file", type=Path, metavar="FILE", help="the file, as program.save wrote it")
    command.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="PICTURE",
        help="where the picture goes; its suffix picks the format: png, svg, pdf, dot, html, mmd",
    )
    choices = {
        "view": ("both", "forward", "backward", "the values, the gradients, or both"),
        "detail": ("auto", "full", "shapes", "scopes", "every operation with all, with its shapes, or scopes as one"),
        "engine": ("auto", "dot", "pygraphviz", "what lays it out"),
        "rankdir": ("TB", "LR", "from top to bottom, or from left to right"),
    }
    for name, (*offered, tells) in choices.items():
        command.add_argument(f"--{name}", choices=offered, default=offered[0], help=f"{tells} (default: %(default)s)")
    command.set_defaults(run=_draw)

    command = commands.add_parser(
        "profile",
        help="time a program that program.save wrote, operation by operation",
        description=(
            "Replays a program file on random inputs of the recorded shapes (whole numbers and masks are 0), and tells "
            "where the time went. Programs with operations of one's own are profiled from Python: program.profile(...)."
        ),
        epilog="Exit status 2 if the file cannot be loaded, or its guards refuse such inputs.",
        allow_abbrev=False,
    )
    command.add_argument("file", type=Path, metavar="FILE", help="the file, as program.save wrote it")
    command.add_argument("--forward", action="store_true", help="without the sweep")
    command.add_argument("--top", type=_at_least_one, metavar="N", help="the N rows that take longest alone")
    command.add_argument(
        "--repeats", type=_at_least_one, default=10, metavar="N", help="how often it is run (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="JSON in the place of tables; times in seconds")
    command.set_defaults(run=_profile)
    return top


def _at_least_one(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 1 or more")
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # where a terminal has no → it is to show a ? instead
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    options = parser().parse_args(argv)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("tape-engine: interrupted", file=sys.stderr)
        return INTERRUPTED
    except TapeError as error:
        text = "\n".join(line for line in str(error).splitlines() if not line.startswith("  at cli.py:"))
    except ImportError as error:
        text = message(f"a package that this needs is not here: {error}.", fix="pip install tape-engine")
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print(f"tape-engine: {text}", file=sys.stderr)
    return FAILED


# -- tape-engine demo ----------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    console = _console()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)  # first of all, so that a folder that cannot be is told at once

    digits = data.load(options.data)
    held = f" (and {len(digits.test):,} to test on)" if digits.test is not None else ""
    height, width = digits.size
    _say(console, "Data", f"{len(digits):,} digits{held} of {height} x {width} pixels: {digits.source}")

    job = demo.record_main(digits.images[: demo.ROWS], digits.labels[: demo.ROWS])
    rows = f"the first {len(job.X):,} of them" if len(job.X) < len(digits) else "all of them"
    _say(console, "Record", f"lin, relu and mse on {rows}; the target of a digit is its label")
    _say(console, "", job.listing)
    _say(console, "Sweep", f"back from C = {float(job.C):.4f} to {', '.join(f'{name}.g' for name in demo.NAMES)}")

    comparisons = demo.compare(job)
    _say(console, "Compare", "each .g with the same gradient by other ways; largest relative difference")
    console.print(_comparison_table(comparisons), "")

    pictures = demo.draw(job, out)
    _say(console, "Draw", "\n".join(str(path) for path in pictures))

    with _progress(console, options.steps) as advance:
        trained = demo.train(digits, options.steps, on_step=advance)
    sizes = " to ".join(map(str, trained.sizes))
    _say(
        console,
        "Train",
        f"a network of {sizes}, by {trained.steps:,} replays of one recording, in {trained.seconds:.1f} s",
    )
    console.print(_score_table(trained), "")
    differs = f"differ by {trained.replay:.1e} at most"
    _say(console, "", f"The gradients of a replay and of torch.autograd, in float32, {differs}.")
    _say(console, "", f"A step on {trained.batch} rows: {_times(trained)}.")

    failed = sum(not each.agrees for each in comparisons) + (not trained.agrees)
    if failed:
        _say(console, "Done", f"{failed} of {len(comparisons) + 1} comparisons failed.", style="bold red")
        return DIFFERS
    _say(console, "Done", "Every comparison agrees.", style="bold green")
    return DONE


# -- tape-engine draw ----------------------------------------------------------------------------------------


def _draw(options: argparse.Namespace) -> int:
    import viz

    program = draft(options.file)
    settings = {name: getattr(options, name) for name in ("view", "detail", "engine", "rankdir")}
    drawing = viz.draw(program, **settings)
    drawing.save(options.out)
    for each in drawing.warnings:
        print(f"tape-engine: {each}", file=sys.stderr)
    print(options.out)
    return DONE


# -- tape-engine profile -------------------------------------------------------------------------------------


def _profile(options: argparse.Namespace) -> int:
    program = load(options.file)
    inputs, seed = random_arguments(program._frozen)
    found = program.profile(*inputs, seed=seed, sweep=not options.forward, repeats=options.repeats)
    if options.top is not None:
        found = found.top(options.top)
    print(json.dumps(found.as_data(), indent=2) if options.json else found)
    return DONE


# -- what is printed -----------------------------------------------------------------------------------------


def _console() -> Console:
    """Standard output; plain text where it is no terminal."""
    from rich.console import Console

    class Report(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process, with the status of a failed comparison

    console = Report(highlight=False, soft_wrap=True)
    console.width = max(console.width, 80)  # what the tables need: narrower, they would leave out digits
    return console


def _say(console: Console, label: str, text: str, style: str = "") -> None:
    """A line of the report (or several) beside its label."""
    from rich.text import Text

    for i, line in enumerate(text.splitlines()):
        console.print(Text.assemble((f"{'' if i else label:<9}", "bold cyan"), (line, style)))


def _table(*columns: str) -> Any:
    """An empty table of numbers, its first column of names."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _indented(table: Any) -> Any:
    from rich.padding import Padding

    return Padding(table, (0, 0, 0, 2), expand=False)


def _comparison_table(comparisons: Sequence[demo.Comparison]) -> Any:
    table = _table("gradient", "shape", *demo.WAYS, "")
    for each in comparisons:
        shown = [f"{each.differences[way]:.1e}" if each.differences[way] else "0" for way in demo.WAYS]
        verdict = "[green]agrees[/]" if each.agrees else "[bold red]DIFFERS[/]"
        table.add_row(f"{each.name}.g", str(each.shape), *shown, verdict)
    return _indented(table)


def _score_table(trained: demo.Trained) -> Any:
    table = _table(f"on {trained.held:,} digits held out", "mean square error", "digits right")
    rows = {
        "predicting the mean": trained.mean,
        "before training": trained.before,
        "after training": trained.after,
    }
    for name, score in rows.items():
        table.add_row(name, f"{score.error:.4f}", f"{100 * score.right:.1f} %")
    return _indented(table)


def _times(trained: demo.Trained) -> str:
    eager = trained.microseconds["torch.autograd"]
    shown = [
        f"{way} {taken:.0f} µs" + (f" ({taken / eager:.2f} x)" if way != "torch.autograd" else "")
        for way, taken in trained.microseconds.items()
    ]
    return ", ".join(shown)


@contextlib.contextmanager
def _progress(console: Console, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, and nothing elsewhere; gives what advances it by a step."""
    if not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Train   "), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Train", total=steps)
        yield lambda: bar.advance(task)


if __name__ == "__main__":
    sys.exit(main())
