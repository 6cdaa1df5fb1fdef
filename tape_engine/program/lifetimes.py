"""Lifetimes: which memory a replay needs at one time, and which of its buffers can lie in the same place.

A function that is generated line by line tells here what each step of it reads and writes. A buffer is needed from the
step that fills it to the last one that reads it, or looks into it through a view; from the next step on another may
have its place. An element-wise operation may even write where an operand lies that nobody reads after it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..aliases import extent
from ..tape import Value
from .buffers import overlapping, strides_of

__all__ = ["Lifetimes", "Stretch", "stretches"]

ALIGNED = 512  # bytes: what torch's allocators align to, on the CPU and on GPUs
LARGE = 4096  # bytes from which on memory is worth a `del`


@dataclass
class Life:
    """From which step to which a value's memory is needed; `over`: the operand in whose place it may be written."""

    born: int
    dies: int
    over: Value | None = None


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

    def make(self, value: Value, over: Value | None = None) -> None:
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

    def operand(self, value: Value, operands: Sequence[Value]) -> Value | None:
        """An operand in whose place the result `value` of an element-wise operation may be written, if it dies there.

        It has the elements of the result in the same order, and no other operand looks into its memory.
        """
        for each in operands:
            alike = each.shape == value.shape and each.dtype == value.dtype and each.strides == value.strides
            if not alike or each not in self.lives or overlapping(each.shape, each.strides):
                continue
            if not any(each in self.rooted(other) for other in operands if other is not each):
                return each
        return None


@dataclass(frozen=True)
class Stretch:
    """A place in the memory that a copy of a function keeps: on which device, and how many bytes from its beginning."""

    device: torch.device
    offset: int


def stretches(buffers: Iterable[Value], lifetimes: Lifetimes) -> tuple[dict[Value, Stretch], dict[torch.device, int]]:
    """A place for each buffer, such that no two overlap that are needed at one time; and the bytes of each memory."""
    found: dict[Value, Stretch] = {}
    sizes: dict[torch.device, int] = {}
    by_device: dict[torch.device, list[Value]] = {}
    for value in buffers:
        by_device.setdefault(value.device, []).append(value)
    for device, values in by_device.items():
        free = _Free()
        ends: list[tuple[int, int, Value]] = []  # who dies first, first
        values.sort(key=lambda value: lifetimes.lives[value].born)
        for i, value in enumerate(values):
            life = lifetimes.lives[value]
            while ends and ends[0][0] < life.born:
                gone = ends.pop(0)[2]
                free.give(found[gone].offset, _bytes(gone))
            size = _bytes(value)
            over = life.over
            taken = over is not None and over in found and over not in lifetimes.lasting
            if taken and over is not None and lifetimes.lives[over].dies == life.born:
                place = next((k for k, end in enumerate(ends) if end[2] is over), None)
                if place is not None:  # its place goes from the operand to the result
                    ends.pop(place)
                    found[value] = found[over]
                    bisect.insort(ends, (_dies(value, lifetimes), i, value))
                    continue
            found[value] = Stretch(device, free.take(size))
            bisect.insort(ends, (_dies(value, lifetimes), i, value))
        sizes[device] = free.size
    return found, sizes


def _dies(value: Value, lifetimes: Lifetimes) -> int:
    return lifetimes.step + 1 if value in lifetimes.lasting else lifetimes.lives[value].dies


def _bytes(value: Value) -> int:
    """The bytes that a buffer takes, up to the next place where another may begin."""
    return max(-(-extent(value.shape, strides_of(value)) * value.itemsize // ALIGNED), 1) * ALIGNED


class _Free:
    """The free stretches of a memory, by offset; neighbours are one."""

    def __init__(self) -> None:
        self.size = 0
        self._offsets: list[int] = []
        self._sizes: dict[int, int] = {}

    def take(self, size: int) -> int:
        """The offset of a stretch: the smallest free one that is large enough, or new memory at the end."""
        best = min((offset for offset in self._offsets if self._sizes[offset] >= size), key=self._fit, default=None)
        if best is None:
            last = self._offsets[-1] if self._offsets else None
            if last is not None and last + self._sizes[last] == self.size:  # the free end grows
                self._offsets.pop()
                del self._sizes[last]
                self.size = last + size
                return last
            self.size += size
            return self.size - size
        self._offsets.remove(best)
        left = self._sizes.pop(best) - size
        if left:
            self._put(best + size, left)
        return best

    def _fit(self, offset: int) -> tuple[int, int]:
        return self._sizes[offset], offset

    def give(self, offset: int, size: int) -> None:
        """Gives a stretch back."""
        i = bisect.bisect(self._offsets, offset)
        if i < len(self._offsets) and self._offsets[i] == offset + size:
            size += self._sizes.pop(self._offsets.pop(i))
        if i and self._offsets[i - 1] + self._sizes[self._offsets[i - 1]] == offset:
            offset = self._offsets.pop(i - 1)
            size += self._sizes.pop(offset)
        self._put(offset, size)

    def _put(self, offset: int, size: int) -> None:
        bisect.insort(self._offsets, offset)
        self._sizes[offset] = size
