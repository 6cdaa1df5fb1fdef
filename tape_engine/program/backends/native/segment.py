"""A segment: a run of nodes without torch in it, as instructions, and what runs them.

It is a list of steps. A flat step is run once, by the thread that calls. A loop goes through blocks of rows: each
thread takes an equal part of them, with registers and an arena of its own; sums over the rows are added up a thread
at a time, and then together.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from ...buffers import laid
from .lowering import Constants
from .machine import ALIGNED, GIVEN, LOCAL, SHARED, STATUS, Arena, Code, Memory, Place
from .team import Share, threads

__all__ = ["Bound", "Loop", "Segment"]

Tensor = torch.Tensor


@dataclass
class Loop:
    """A loop over blocks of rows.

    Attributes:
        count, block: how many rows there are, and how many make a block.
        start: what each thread does first (its totals begin).
        body, rest: the work on a block, and on the rows that are left over.
        merge: what adds a thread's totals to those of all; `finish` what is done with these in the end.
        first: what the totals of all begin with.
        moving: the registers that move on with the rows, each with the one that it starts from, and the bytes
            from row to row.
    """

    count: int
    block: int
    first: Code
    start: Code
    body: Code
    rest: Code
    merge: Code
    finish: Code
    moving: list[tuple[int, int, int]]

    @property
    def codes(self) -> list[Code]:
        return [self.first, self.start, self.body, self.rest, self.merge, self.finish]


@dataclass
class Segment:
    """The steps of a segment, and the memory that they need.

    Attributes:
        nodes: how many nodes it stands for.
        given: the strides that the tensors it is given must have, in the order of the registers.
        inputs: how many of them are read; the others are written.
        sliding: how many registers there are besides, that move on with rows.
    """

    steps: list[Code | Loop]
    constants: Constants
    nodes: int
    given: list[tuple[int, ...]] = field(default_factory=list)
    inputs: int = 0
    sliding: int = 0
    shared: int = 0
    local: int = 0

    def lay_out(self) -> None:
        """Gives every memory its offset."""
        arena = Arena()
        for place in self.constants.places.values():
            arena.take(place.memory)
        last: dict[Memory, int] = {}
        moments: list[Collection[Memory]] = []
        for step in self.steps:
            if isinstance(step, Code):
                moments += [(*i.reads, *i.writes) for i in step.instructions]
            else:
                moments.append({m for code in step.codes for m in code.memories()})
        fixed = {place.memory for place in self.constants.places.values()}
        for moment, memories in enumerate(moments):
            for memory in memories:
                if memory.register == SHARED and memory not in fixed:
                    last[memory] = moment
        taken: set[Memory] = set()
        ends: dict[int, list[Memory]] = {}
        for memory, moment in last.items():
            ends.setdefault(moment, []).append(memory)
        for moment, memories in enumerate(moments):
            for memory in memories:
                if memory in last and memory not in taken:
                    taken.add(memory)
                    arena.take(memory)
            for memory in ends.get(moment, ()):
                arena.give(memory)
        self.shared = arena.size
        for step in self.steps:
            if isinstance(step, Loop):
                self.local = max(self.local, _lay_out_local(step))

    @functools.cached_property
    def kernels(self) -> set[str]:
        codes = [c for step in self.steps for c in ([step] if isinstance(step, Code) else step.codes)]
        looped = {"part", "share"} if any(isinstance(step, Loop) for step in self.steps) else set()
        return {"run"}.union(looped, *(code.kernels for code in codes))

    def bind(self, addresses: dict[str, int], tensors: Sequence[Tensor | None], moving: Sequence[int] = ()) -> Bound:
        """The segment with memory of its own; `tensors` are those that are the same on every replay.

        The memory of those at the places `moving` may lie elsewhere each time.
        """
        return Bound(self, addresses, tensors, moving)


def _lay_out_local(loop: Loop) -> int:
    """Offsets in the arena of a thread: totals stay, what passes through a block is given back."""
    arena = Arena()
    kept = {m for code in (loop.start, loop.merge) for m in code.memories() if m.register == LOCAL}
    for memory in kept:
        arena.take(memory)
    largest = arena.size
    for code in (loop.body, loop.rest):
        part = Arena()
        part.size = arena.size
        last: dict[Memory, int] = {}
        for i, each in enumerate(code.instructions):
            last.update((m, i) for m in (*each.reads, *each.writes) if m.register == LOCAL and m not in kept)
        ends: dict[int, list[Memory]] = {}
        for memory, i in last.items():
            ends.setdefault(i, []).append(memory)
        taken: set[Memory] = set()
        for i, each in enumerate(code.instructions):
            for memory in (*each.reads, *each.writes):
                if memory in last and memory not in taken:
                    taken.add(memory)
                    part.take(memory)
            for memory in ends.get(i, ()):
                part.give(memory)
        largest = max(largest, part.size)
    return largest


RUN = ctypes.CFUNCTYPE(
    None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
)


class _Words:
    """Words in memory: of a code, or registers."""

    __slots__ = ("address", "count", "words")

    def __init__(self, words: Sequence[int], count: int = 0) -> None:
        self.words = (ctypes.c_int64 * max(len(words), 1))(*words)
        self.address = ctypes.addressof(self.words)
        self.count = count


class Bound:
    """A segment with memory of its own, to be called by one replay at a time."""

    def __init__(
        self,
        segment: Segment,
        addresses: dict[str, int],
        tensors: Sequence[Tensor | None],
        moving: Sequence[int],
    ) -> None:
        self._run: Callable[..., None] = RUN(addresses["run"])
        self._threads = threads()
        self._shared = _room(segment.shared)
        self._segment = segment
        self._strides = segment.given
        for place in segment.constants.places.values():
            self._put(place, segment.constants)
        registers = [0, _start(self._shared), 0] + [0] * (len(segment.given) + segment.sliding)
        self._changing: list[int] = []
        self._wanted: list[tuple[int, ...]] = []  # their strides
        made: list[int] = []  # memory of our own
        self._copied: list[tuple[int, Tensor, tuple[int, ...]]] = []
        self._tensors = tensors
        for i, (tensor, strides) in enumerate(zip(tensors, segment.given, strict=True)):
            if tensor is None and i >= segment.inputs:
                made.append(GIVEN + i)
            elif tensor is None:
                self._changing.append(GIVEN + i)
                self._wanted.append(strides)
            elif tensor.stride() == strides and not tensor.is_neg() and i not in moving:
                registers[GIVEN + i] = tensor.data_ptr()
            else:
                self._copied.append((GIVEN + i, tensor, strides))
        self._places = [*self._changing, *made]
        self._all = self._places == [*range(GIVEN, GIVEN + len(tensors))]
        self._registers = _Words(registers)
        self._steps = [
            self._flat(step, addresses) if isinstance(step, Code) else _Running(step, self, addresses)
            for step in segment.steps
        ]

    def _put(self, place: Place, constants: Constants) -> None:
        content = next(bits for (_, bits), found in constants.places.items() if found is place)
        ctypes.memmove(_start(self._shared) + place.memory.offset, content, len(content))

    def _flat(self, code: Code, addresses: dict[str, int]) -> Callable[[], None]:
        words = _Words(code.assembled(addresses), len(code))
        run, registers, at = self._run, ctypes.c_int64(self._registers.address), ctypes.c_int64(words.address)
        count, zero, one = (ctypes.c_int64(n) for n in (words.count, 0, 1))  # made once: each µs counts

        def call(_keep: _Words = words) -> None:
            run(at, count, registers, zero, zero, one)

        return call

    def __call__(self, *tensors: Tensor) -> None:
        """Runs the segment on the tensors that differ from replay to replay.

        Raises:
            IndexError: for an index that is out of range.
        """
        registers = self._registers.words
        given = tensors[: len(self._changing)]
        if [t.stride() for t in given] != self._wanted or True in [t.is_neg() for t in given]:
            given = tuple(laid(t, strides) for t, strides in zip(given, self._wanted, strict=True))
            tensors = (*given, *tensors[len(given) :])
        pointers: list[ctypes.c_int64 | int] = [t.data_ptr() for t in tensors]
        if self._all:
            registers[GIVEN : GIVEN + len(pointers)] = pointers  # each µs counts
        else:
            for place, pointer in zip(self._places, pointers, strict=True):
                registers[place] = pointer
        kept = []
        for place, tensor, strides in self._copied:
            tensor = laid(tensor, strides)
            kept.append(tensor)
            registers[place] = tensor.data_ptr()
        for step in self._steps:
            step()
        if registers[STATUS]:
            registers[STATUS] = 0
            raise IndexError("an index is out of range for the dimension that it picks from")


class _Running:
    """A loop with the words and arenas of its threads."""

    def __init__(self, loop: Loop, bound: Bound, addresses: dict[str, int]) -> None:
        self._run = bound._run
        self._registers = main = bound._registers
        first, start, body, rest, merge, finish = self._codes = [
            _Words(code.assembled(addresses), len(code)) for code in loop.codes
        ]
        self._first, self._merge, self._finish = first, merge, finish
        blocks, left = divmod(loop.count, loop.block)
        parts = max(1, min(bound._threads, blocks))
        size = len(main.words)
        steps = [0] * size
        for register, _, step in loop.moving:
            steps[register] = step * loop.block
        self._steps = _Words(steps)
        self._moving = _Words([word for each in loop.moving for word in each])
        self._parts: list[tuple[_Words, _Words, Tensor]] = []
        begin = 0
        for i in range(parts):
            count = blocks // parts + (i < blocks % parts)
            room, registers = _room(bound._segment.local), _Words([0] * size)
            words = [main.address, size, registers.address, _start(room), begin * loop.block]
            words += [len(loop.moving), self._moving.address, start.address, start.count, body.address, body.count]
            words += [self._steps.address, count, rest.address, rest.count if left and i == parts - 1 else 0]
            self._parts.append((_Words([*words, addresses["run"]]), registers, room))
            begin += count
        self._share = Share([words.address for words, *_ in self._parts], addresses)

    def __call__(self) -> None:
        main = self._registers
        run = self._run
        run(self._first.address, self._first.count, main.address, 0, 0, 1)
        self._share()
        words = main.words
        for _, registers, room in self._parts:
            words[LOCAL] = _start(room)
            run(self._merge.address, self._merge.count, main.address, 0, 0, 1)
            words[STATUS] |= registers.words[STATUS]
        run(self._finish.address, self._finish.count, main.address, 0, 0, 1)


def _room(size: int) -> Tensor:
    """Memory for an arena, with room to begin on a line of the cache."""
    return torch.zeros(size + ALIGNED, dtype=torch.uint8, device="cpu")


def _start(room: Tensor) -> int:
    address: int = room.data_ptr()
    return -(-address // ALIGNED) * ALIGNED
