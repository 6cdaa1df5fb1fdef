"""Times several ways of doing the same thing in turns, so that what disturbs the machine disturbs them all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Case", "Table", "Timing", "measure"]


@dataclass(frozen=True)
class Case:
    """One way of doing it.

    Attributes:
        name: as the table shows it.
        run: does it once.
        every: it takes part in each `every`-th round only, because it is slow.
        number: how often it is run in a row for one measurement, because it is quick.
        units: what one run is divided by (operations, say).
    """

    name: str
    run: Callable[[], object]
    every: int = 1
    number: int = 1
    units: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds a unit of one case: the median of all measurements, the smallest and the largest."""

    name: str
    median: float
    low: float
    high: float
    measurements: int


@dataclass(frozen=True)
class Table:
    """The timings of several cases; the first is what the others are compared with."""

    title: str
    unit: str
    timings: tuple[Timing, ...]

    def ratio(self, timing: Timing) -> float:
        """How much of the first case's time this one takes."""
        return timing.median / self.timings[0].median

    def as_data(self) -> dict[str, Any]:
        """The table for a JSON file; times in seconds."""
        rows = [asdict(timing) | {"ratio": self.ratio(timing)} for timing in self.timings]
        return {"title": self.title, "per": self.unit, "timings": rows}


def measure(
    title: str,
    cases: Sequence[Case],
    rounds: int,
    *,
    unit: str = "step",
    on_run: Callable[[str], None] = lambda _: None,
) -> Table:
    """Runs every case once to warm up, then `rounds` times in turns, each round beginning with another one.

    `on_run` is told the name of a case before it runs.
    """
    taken: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        on_run(case.name)
        case.run()
        if case.every == 1:
            case.run()  # memory that a first run took is at hand from the second on
    for i in range(rounds):
        turn = i % len(cases)
        for case in (*cases[turn:], *cases[:turn]):
            if i % case.every:
                continue
            on_run(case.name)
            start = time.perf_counter()
            for _ in range(case.number):
                case.run()
            taken[case.name].append((time.perf_counter() - start) / case.number / case.units)
    timings = (
        Timing(name, statistics.median(times), min(times), max(times), len(times)) for name, times in taken.items()
    )
    return Table(title, unit, tuple(timings))
