"""What `Program.profile` gives: where the time of a replay went, as a table and as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Held", "Profile", "ProfileRow", "Total"]

#: Rows that are printed at most; `Profile.rows` has them all.
PRINTED = 200


@dataclass(frozen=True)
class Held:
    """An operation that a row runs.

    Attributes:
        op: its name (``addmm``).
        name: what it makes, as the user's code or ``program.code`` calls it.
        line: ``file:line`` of the user's code; in the sweep, of the operation whose gradient it is of.
        scope: the groups that it stands in (``net/0``).
        part: ``"forward"`` or ``"sweep"``.
        again: whether the sweep computes again here what the forward pass did not keep.
    """

    op: str
    name: str
    line: str
    scope: str
    part: str
    again: bool = False


@dataclass(frozen=True)
class ProfileRow:
    """A part of a replay that was timed as one: an operation, or several that the native backend runs as one.

    Attributes:
        place: where it stands in the order of running, from 0 on.
        kind: ``call``: an operation of torch; ``guard``: a decision that is checked; ``segment``: operations that run
            as one compiled piece; ``rows``: such a piece that goes through blocks of rows; ``layout``: an input that is
            copied if it does not lie in memory as recorded; ``result``: a copy that the caller gets; ``effect``: a
            write to a tensor of the caller's; ``whole``: a replay whose backend cannot be looked into.
        op: the operation's name, or what the kind is in words.
        name: what it makes, as the user's code or ``program.code`` calls it.
        line, code: ``file:line`` of the user's code, and its text; empty where there is none. In the sweep they are
            those of the operation whose gradient it is of.
        scope: the groups that it stands in (``net/0``).
        part: ``"forward"``, ``"sweep"``, or ``"both"`` for a piece that does some of each.
        again: whether some of it computes again what the forward pass did not keep (`holds` tells which).
        seconds: the median of all runs; `low` and `high` the shortest and the longest of them.
        share: of the time of all rows, from 0 to 1.
        bytes_read, bytes_written: of the tensors that it reads from memory and writes to it, each counted once. A view
            moves nothing; what stays inside a compiled piece does not count.
        holds: the operations that it runs.
    """

    place: int
    kind: str
    op: str
    name: str
    line: str
    code: str
    scope: str
    part: str
    seconds: float
    low: float
    high: float
    share: float
    bytes_read: int
    bytes_written: int
    holds: tuple[Held, ...]
    again: bool = False

    @property
    def bytes_per_second(self) -> float:
        """How quickly it moves its bytes."""
        return (self.bytes_read + self.bytes_written) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Total:
    """What rows with something in common come to: how many they are, seconds, their share from 0 to 1, and bytes."""

    count: int
    seconds: float
    share: float
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True, repr=False)
class Profile:
    """Where the time of a replay went. It prints as a table, a line a row, in the order in which they ran.

    Attributes:
        rows: what was timed.
        timed: the seconds of all rows together.
        seconds: the median of whole replays without clocks, with the checks of the inputs, but without writing ``.g``.
        runs: how often a replay was timed, with clocks and without.
        clock: seconds that reading the clock adds to a row; they are taken off.
        backend: what ran it.
        sweep: whether the sweep ran as well.
        once: how many operations ran once, when the program was made ready: constants, views of kept memory.
    """

    rows: tuple[ProfileRow, ...]
    timed: float
    seconds: float
    runs: int
    clock: float
    backend: str
    sweep: bool
    once: int

    @property
    def around(self) -> float:
        """Seconds of a replay that belong to no row: checks of the inputs, the call; what is left by chance as well."""
        return self.seconds - self.timed

    def top(self, n: int | None = None) -> Profile:
        """The `n` rows that take longest, the longest first; all rows without `n`."""
        return replace(self, rows=tuple(sorted(self.rows, key=lambda row: -row.seconds)[:n]))

    def by_op(self) -> dict[str, Total]:
        """Totals by operation, the longest first."""
        return _totals(self.rows, lambda row: row.op)

    def by_scope(self) -> dict[str, Total]:
        """Totals by scope, the longest first; ``""`` for what stands in none."""
        return _totals(self.rows, lambda row: row.scope)

    def by_line(self) -> dict[str, Total]:
        """Totals by the user's line, the longest first: an operation with its gradient."""
        return _totals(self.rows, lambda row: row.line)

    def as_data(self) -> dict[str, Any]:
        """All of it for a JSON file; times in seconds."""
        rows = [asdict(row) | {"bytes_per_second": row.bytes_per_second} for row in self.rows]
        found: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "rows"}
        return found | {"around": self.around, "rows": rows}

    def __str__(self) -> str:
        what = "a replay with its sweep" if self.sweep else "a replay, forward"
        head = [
            f"profile of {what}; backend {self.backend}; median of {self.runs} runs",
            f"  {_us(self.seconds)} µs in all: {_us(self.timed)} in rows, {_us(self.around)} around them; "
            f"the clock's {_us(self.clock, 2)} µs a row are taken off",
        ]
        if self.once:
            head.append(
                f"  {self.once} operation{'s' * (self.once > 1)} ran once, before: constants, views of kept memory"
            )
        shown = self.rows[:PRINTED]
        table = _table(("#", "operation", "value", "line", "scope", "part", *MEASURED), map(_cells, shown), left=6)
        lines = [table[0]]
        for row, line in zip(shown, table[1:], strict=True):
            lines.append(line)
            if row.kind in ("segment", "rows"):
                lines.append(f"       = {_in_words(row.holds)}")
        if len(self.rows) > PRINTED:
            lines.append(f"  and {len(self.rows) - PRINTED:,} more: profile.top({PRINTED}), profile.rows")
        for title, totals in (("by operation", self.by_op()), ("by scope", self.by_scope())):
            if len(totals) > 1:
                cells = ((name or "-", f"{t.count}", *_measured(t)) for name, t in list(totals.items())[:10])
                lines += ["", *_table((title, "rows", *MEASURED), cells, left=1)]
        return "\n".join([*head, *lines])

    __repr__ = __str__  # at a prompt and in a notebook it shows itself


def _totals(rows: Iterable[ProfileRow], key: Callable[[ProfileRow], str]) -> dict[str, Total]:
    groups: dict[str, list[ProfileRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    found = {
        name: Total(
            len(group),
            sum(row.seconds for row in group),
            sum(row.share for row in group),
            sum(row.bytes_read for row in group),
            sum(row.bytes_written for row in group),
        )
        for name, group in groups.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


# -- how it prints -------------------------------------------------------------------------------------------

MEASURED = ("µs", "share", "read", "written", "GB/s")


def _us(seconds: float, digits: int = 1) -> str:
    return f"{1e6 * seconds:,.{digits}f}"


def _measured(of: ProfileRow | Total) -> tuple[str, ...]:
    moved = of.bytes_read + of.bytes_written
    rate = f"{moved / of.seconds / 1e9:.1f}" if moved and of.seconds > 0 else "-"
    return _us(of.seconds), f"{100 * of.share:.1f} %", f"{of.bytes_read:,}", f"{of.bytes_written:,}", rate


def _cells(row: ProfileRow) -> tuple[str, ...]:
    told = (row.op, row.name, row.line, row.scope)
    return (f"{row.place}", *(_short(each) or "-" for each in told), row.part + ", again" * row.again, *_measured(row))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """Lines in columns; the first `left` of them begin at the left."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _in_words(holds: Sequence[Held]) -> str:
    """What a row runs: ``3 mul, 2 tanh    train.py:3, train.py:5``."""
    counts: dict[str, int] = {}
    for each in holds:
        counts[each.op] = counts.get(each.op, 0) + 1
    lines = list(dict.fromkeys(each.line for each in holds if each.line))
    told = ", ".join([f"{count} {name}" if count > 1 else name for name, count in counts.items()][:12])
    told += ", …" if len(counts) > 12 else ""
    return told + "    " + ", ".join(lines[:4]) + (f" and {len(lines) - 4} more lines" if len(lines) > 4 else "")
