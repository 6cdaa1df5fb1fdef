"""What a check has found, as plain data that prints as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["CallReport", "Fault", "GradientReport", "RuleReport"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        argument: the name of the argument (or tensor) whose gradient is wrong; "" for the rule as a whole.
        kind: ``value``, ``second``, ``shape``, ``count``, ``error``, ``hidden``, ``write``,
            ``purity``, ``linear``, ``precision``, ``part``, ``differences``.
        what: the fault in words.
        index: the element that is furthest off.
        expected: its gradient as it should be.
        got: its gradient as the rule gives it.
        max_abs: the largest error.
        max_rel: the largest error in relation to what should be.
        hints: what the wrong gradient looks like.
    """

    argument: str
    kind: str
    what: str
    index: tuple[int, ...] | None = None
    expected: complex | None = None
    got: complex | None = None
    max_abs: float = 0.0
    max_rel: float = 0.0
    hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.argument}: {self.what}" if self.argument else self.what
        return "\n".join([head, *indented(self.hints)])


@dataclass
class CallReport:
    """What a check found about one call of an operation.

    Attributes:
        call: the call in words, with the shapes of its tensors.
        agrees: for each argument that is right, how it was told.
        faults: what is wrong.
        notes: what could not be compared, or is a matter of convention.
        apart: the arguments whose gradient is torch's convention rather than the forward's slope.
        second: ``agrees``, ``differs``, or why there is no second derivative to compare.
    """

    call: str
    agrees: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    apart: set[str] = field(default_factory=set)
    second: str = ""

    def __bool__(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        lines = [self.call]
        lines += indented(f"{name}: {how}" for name, how in self.agrees.items())
        lines += indented(f"WRONG  {fault}" for fault in self.faults)
        lines += indented(f"note: {note}" for note in self.notes)
        if self.second:
            lines += indented([f"second derivative: {self.second}"])
        return "\n".join(lines)


@dataclass
class RuleReport:
    """What `te.check_rule` found: true when the rule is right on every call.

    Attributes:
        title: the operation and its rule.
        calls: a report for each call.
    """

    title: str
    calls: list[CallReport] = field(default_factory=list)

    def __bool__(self) -> bool:
        return all(self.calls)

    @property
    def faults(self) -> list[Fault]:
        """Everything that is wrong, call by call."""
        return [fault for call in self.calls for fault in call.faults]

    def __str__(self) -> str:
        wrong = [call for call in self.calls if not call]
        count = f"{len(self.calls)} call{'s' * (len(self.calls) != 1)}"
        verdict = f"wrong in {len(wrong)} of {count}" if wrong else f"right in {count}"
        # one right call tells how it was checked; of many, the wrong ones alone are read
        shown = wrong or self.calls[:1]
        return "\n".join([f"{self.title}: {verdict}", *indented(shown)])

    __repr__ = __str__


@dataclass
class GradientReport:
    """What `te.check` found: true when every gradient agrees.

    Attributes:
        title: what was checked.
        agrees: for each tensor whose gradient is right, how it was told.
        faults: the tensors whose gradient is wrong.
        blamed: the nodes whose rules are wrong, going back from the loss, each with its faults.
        notes: what could not be compared, or is a matter of convention.
    """

    title: str
    agrees: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    blamed: list[CallReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        lines = [f"{self.title}: {'WRONG' if self.faults else 'every gradient agrees'}"]
        lines += indented(f"{name}: {how}" for name, how in self.agrees.items())
        lines += indented(f"WRONG  {fault}" for fault in self.faults)
        if self.blamed:
            lines += indented(["to blame, the first one going back:", *indented(self.blamed[:1])])
            if len(self.blamed) > 1:
                others = ", ".join(each.call.partition("\n")[0] for each in self.blamed[1:4])
                more = f", and {len(self.blamed) - 4} more" if len(self.blamed) > 4 else ""
                lines += indented([f"and before it: {others}{more}"])
        lines += indented(f"note: {note}" for note in self.notes)
        return "\n".join(lines)

    __repr__ = __str__


def indented(parts: Iterable[object]) -> Iterator[str]:
    """Texts, each moved to the right by two."""
    for part in parts:
        yield "\n".join("  " + line for line in str(part).splitlines())
