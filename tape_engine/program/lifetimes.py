"""Lifetimes: which memory a replay needs at one time, and which of its buffers can lie in the same place.

A function that is generated line by line tells here what each step of it reads and writes. A buffer is needed from the
step that fills it to the last one that reads it, or looks into it through a view; from the next step on another may
have its place. An element-wise operation may even write where an operand lies that nobody reads after it.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..places import extent
from ..tape import Value
from .buffers import overlapping, strides_of

__all__ = ["Lifetimes", "Part", "Stretch", "released", "stretches"]

ALIKE = 4  # how many times larger than a buffer the memory may be that it gets
LARGE = 4096  # bytes from which on memory is worth a `del`
FULL = 1 << 22  # bytes that a replay holds at its fullest moment, below which all its memory is kept
ROOM = 1 << 18, 1 << 25  # bytes of memory that may be let go: above, the system gives what it has to clear each time


@dataclass
class Life:
    """From which step to which a value's memory is needed; `over`: operands in whose place it may be written."""

    born: int
    dies: int
    over: Sequence[Value] = ()


@dataclass
class Lifetimes:
    """The lives of the values of a function, found while it is written.

    Attributes:
        step: the step that is being written.
        lives: each value that has memory of its own, with its life.
        roots: each other value that is made, with those in whose memory it lies.
        lasting: values that something out of sight may hold on to.
    """

    step: int = 0
    lives: dict[Value, Life] = field(default_factory=dict)
    roots: dict[Value, tuple[Value, ...]] = field(default_factory=dict)
    lasting: set[Value] = field(default_factory=set)
    last: dict[Value, int] = field(default_factory=dict)

    def make(self, value: Value, over: Sequence[Value] = ()) -> None:
        """A value gets memory of its own at this step."""
        self.lives[value] = Life(self.step, self.step, over)

    def view(self, value: Value, of: Iterable[Value]) -> None:
        """A value lies in the memory of others, or may do so."""
        self.roots[value] = tuple(dict.fromkeys(root for each in of for root in self.rooted(each)))

    def rooted(self, value: Value) -> tuple[Value, ...]:
        """The values in whose memory one lies; itself, if that is its own."""
        return self.roots.get(value, (value,))

    def touch(self, value: Value) -> None:
        """A value is read or written at this step."""
        self.last[value] = self.step
        for root in self.rooted(value):
            life = self.lives.get(root)
            if life is not None:
                life.dies = max(life.dies, self.step)

    def keep(self, values: Iterable[Value]) -> None:
        """What these lie in stays as it is to the end: code that is not seen may have kept it."""
        self.lasting.update(root for value in values for root in self.rooted(value))

    def operands(self, value: Value, operands: Sequence[Value]) -> list[Value]:
        """The operands in whose place the result `value` of an element-wise operation may be written if they die.

        They have the elements of the result in the same order, and no other operand looks into their memory.
        """
        found = []
        for each in operands:
            alike = each.shape == value.shape and each.dtype == value.dtype and each.strides == value.strides
            seen = any(each in self.rooted(other) for other in operands if other is not each)
            if (
                alike
                and each in self.lives
                and self.rooted(each) == (each,)
                and not seen
                and not overlapping(each.shape, each.strides)
            ):
                found.append(each)
        return found


@dataclass(eq=False)
class Stretch:
    """Memory that a copy of a function keeps, for one buffer after the other.

    Each of them begins where it begins: what looks into a buffer by a place in its storage finds it there.
    """

    device: torch.device
    size: int
    ends: int = -1  # the last step at which the buffer that lies there is needed


def stretches(buffers: Iterable[Value], lifetimes: Lifetimes) -> dict[Value, Stretch]:
    """The memory of each buffer; those that are not needed at one time share it, as far as their sizes are alike."""
    found: dict[Value, Stretch] = {}
    lives = lifetimes.lives
    free: dict[torch.device, _Free] = {}
    busy: list[tuple[int, int, Stretch]] = []  # who is free first, first
    for i, value in enumerate(sorted(buffers, key=lambda value: lives[value].born)):
        life = lives[value]
        while busy and busy[0][0] < life.born:
            ends, _, stretch = heapq.heappop(busy)
            if stretch.ends == ends:  # it was not passed on meanwhile
                stretch.ends = (
                    -1
                )  # and not again: a result that nobody reads is gone when the operand is that it is over
                free[stretch.device].give(stretch)
        unused = free.setdefault(value.device, _Free())
        place = _passed_on(value, life, found, lifetimes) or unused.take(value)
        place.ends = lifetimes.step + 1 if value in lifetimes.lasting else life.dies
        found[value] = place
        heapq.heappush(busy, (place.ends, i, place))
    return found


def _passed_on(value: Value, life: Life, found: dict[Value, Stretch], lifetimes: Lifetimes) -> Stretch | None:
    """The memory of an operand in whose place a value may be written, if that is needed no more."""
    for over in life.over:
        dies = over in found and over not in lifetimes.lasting and lifetimes.lives[over].dies == life.born
        if dies and found[over].ends == life.born:  # else another result of the step has it
            return found[over]
    return None


class _Free:
    """The free memory of a device, by size."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._of_size: dict[int, list[Stretch]] = {}

    def give(self, stretch: Stretch) -> None:
        if stretch.size not in self._of_size:
            bisect.insort(self._sizes, stretch.size)
        self._of_size.setdefault(stretch.size, []).append(stretch)

    def take(self, value: Value) -> Stretch:
        """The smallest that is large enough and not far too large; the next smaller one, grown; or new memory."""
        size = max(extent(value.shape, strides_of(value)), 1) * value.itemsize
        place = bisect.bisect_left(self._sizes, size)
        if place == len(self._sizes) or self._sizes[place] > ALIKE * size:
            place -= 1
            if place < 0 or size > ALIKE * self._sizes[place]:
                return Stretch(value.device, size)
        stack = self._of_size[self._sizes[place]]
        stretch = stack.pop()
        if not stack:
            del self._of_size[self._sizes.pop(place)]
        stretch.size = max(stretch.size, size)
        return stretch


# -- what is let go between replays ------------------------------------------------------------------------


@dataclass(eq=False)
class Part:
    """Memory that may be let go while nothing of a replay lies in it.

    Attributes:
        size: its bytes.
        periods: from which step to which it is needed, and how many bytes of it then.
        of: what it is the memory of.
    """

    size: int
    periods: list[tuple[int, int, int]]
    of: object


def periods(places: dict[Value, Stretch], lifetimes: Lifetimes) -> dict[Stretch, Part]:
    """When memory is needed; what something out of sight may hold on to, from the first step to the last."""
    found: dict[Stretch, Part] = {}
    lives = lifetimes.lives
    for value, stretch in sorted(places.items(), key=lambda item: lives[item[0]].born):
        part = found.setdefault(stretch, Part(stretch.size, [], stretch))
        start, stop, size = lives[value].born, lives[value].dies, extent(value.shape, strides_of(value))
        size = max(size, 1) * value.itemsize
        if value in lifetimes.lasting:
            start, stop, size = 0, lifetimes.step, stretch.size
        if part.periods and start <= part.periods[-1][1] + 1:  # there is no step between
            begun, until, before = part.periods.pop()
            start, stop, size = begun, max(stop, until), max(size, before)
        part.periods.append((start, stop, size))
    return found


def released(kept: Sequence[Part], passing: Iterable[tuple[int, int, int]], steps: int) -> list[Part]:
    """The memory that a replay should not keep, for the fullest moment not to be fuller than it need be.

    Memory that is let go has to be found again on the next replay: so what lies elsewhere at the fullest moment goes,
    the largest first, and no more than lowers that moment.

    Args:
        kept: memory that could be kept from replay to replay.
        passing: from which step to which other memory is needed, and how much.
        steps: how many there are.
    """
    held = torch.zeros(steps + 2, dtype=torch.int64, device="cpu")
    for start, stop, size in passing:
        held[start : stop + 1] += size
    held += sum(part.size for part in kept)
    if int(held.max()) < FULL:
        return []
    left = sorted((p for p in kept if ROOM[0] <= p.size <= ROOM[1]), key=lambda part: part.size, reverse=True)
    found: list[Part] = []
    best, count = int(held.max()), 0
    while True:
        moment = int(held.argmax())
        part = next((p for p in left if not any(a <= moment <= b and n == p.size for a, b, n in p.periods)), None)
        if part is None:
            return found[:count]
        left.remove(part)
        found.append(part)
        held -= part.size
        for start, stop, size in part.periods:
            held[start : stop + 1] += size
        if int(held.max()) < best:
            best, count = int(held.max()), len(found)
