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

from ..aliases import extent
from ..tape import Value
from .buffers import overlapping, strides_of

__all__ = ["Lifetimes", "Stretch", "stretches"]

ALIKE = 4  # how many times larger than a buffer the memory may be that it gets
LARGE = 4096  # bytes from which on memory is worth a `del`


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
            if alike and each in self.lives and not seen and not overlapping(each.shape, each.strides):
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
