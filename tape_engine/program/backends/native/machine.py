"""Instructions in the making, and the memory that they work on.

A `Place` says where the elements of a value lie: in which memory, from where on, how far apart. `Code` takes
instructions on places and lays them down as words. Memory of a program's own is given out by lifetime, from one
stretch (an *arena*); every other memory is a tensor that the program is given.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

__all__ = ["ITEM", "KIND", "LOCAL", "SHARED", "Arena", "Code", "Memory", "Place", "dense"]

#: The letters of the kernels for torch's dtypes, and the bytes of an element.
KIND = {torch.float32: "f", torch.float64: "d", torch.int64: "l", torch.bool: "b"}
ITEM = {"f": 4, "d": 8, "l": 8, "b": 1}

#: Registers: what went wrong; the arena of a replay; that of a thread; then the tensors that a replay is given.
STATUS, SHARED, LOCAL, GIVEN = 0, 1, 2, 3

ALIGNED = 64  # bytes: a line of the cache, a vector register


class Unfit(Exception):
    """What the kernels cannot do; `node` is what asked for it."""

    node: Any = None


@dataclass(eq=False, slots=True)
class Memory:
    """A stretch of memory: of an arena (`nbytes` from `offset` on, once that is known), or a tensor's.

    Attributes:
        moves: whether its register moves on with the rows, so that other rows follow those that are worked on.
    """

    register: int
    nbytes: int = 0
    offset: int = 0
    moves: bool = False


@dataclass(eq=False, slots=True)
class Place:
    """Where the elements of a value lie: distances and start are counted in elements. It is not changed once made.

    (Frozen, it would take four times as long to make, and there are some for every operation.)
    """

    memory: Memory
    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_dense(self) -> bool:
        return self.strides == dense(self.shape)

    def expanded(self, shape: Sequence[int]) -> Place:
        """Broadcast to `shape`."""
        if self.shape == shape:
            return self
        missing = len(shape) - len(self.shape)
        strides = [0] * missing
        for have, want, step in zip(self.shape, shape[missing:], self.strides, strict=True):
            if have != want and have != 1:
                raise Unfit(f"{self.shape} does not broadcast to {tuple(shape)}")
            strides.append(step if have == want and have != 1 else 0)
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def permuted(self, order: Sequence[int]) -> Place:
        return replace(self, shape=tuple(self.shape[d] for d in order), strides=tuple(self.strides[d] for d in order))

    def part(self, dim: int, start: int, length: int, step: int = 1) -> Place:
        """The elements of a dimension from `start` on."""
        shape, strides = list(self.shape), list(self.strides)
        begin = self.start + start * strides[dim]
        shape[dim], strides[dim] = length, strides[dim] * step
        return replace(self, shape=tuple(shape), strides=tuple(strides), start=begin)

    def without(self, dim: int) -> Place:
        """A dimension of one element dropped."""
        shape, strides = list(self.shape), list(self.strides)
        del shape[dim], strides[dim]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def reshaped(self, shape: Sequence[int]) -> Place | None:
        """The same elements in another shape, if strides can tell it."""
        if prod(shape) != self.numel:
            return None
        if not self.numel:
            return replace(self, shape=tuple(shape), strides=dense(shape))
        runs: list[tuple[int, int]] = []  # how many elements lie at even distances, and those; from the left
        for n, step in zip(self.shape, self.strides, strict=True):
            if n == 1:
                continue
            if runs and runs[-1][1] == n * step:
                runs[-1] = (runs[-1][0] * n, step)
            else:
                runs.append((n, step))
        strides: list[int] = []
        left, step = 1, 0
        for n in reversed(shape):
            if n == 1:
                strides.append(0)
                continue
            if left == 1:
                left, step = runs.pop()
            if left % n:
                return None
            strides.append(step)
            left, step = left // n, step * n
        return replace(self, shape=tuple(shape), strides=tuple(reversed(strides)))


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of elements that lie in order, without gaps."""
    return _dense(tuple(shape))


@functools.lru_cache(1024)
def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


@dataclass(slots=True)
class _Instruction:
    driver: str
    words: list[int | str | tuple[int, Place]]  # a number, the name of a kernel, or a register and an offset
    reads: list[Memory]
    writes: list[Memory]


class Arena:
    """Memory given out by lifetime: what is given back serves the next of its size."""

    def __init__(self) -> None:
        self.size = 0
        self._free: dict[int, list[int]] = {}

    def take(self, memory: Memory) -> None:
        size = -(-max(memory.nbytes, 1) // ALIGNED) * ALIGNED
        free = self._free.get(size)
        if free:
            memory.offset = free.pop()
        else:
            memory.offset = self.size
            self.size += size

    def give(self, memory: Memory) -> None:
        size = -(-max(memory.nbytes, 1) // ALIGNED) * ALIGNED
        self._free.setdefault(size, []).append(memory.offset)


@dataclass
class Code:
    """A list of instructions on places."""

    instructions: list[_Instruction] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def kernels(self) -> set[str]:
        """The names of the kernels that it calls."""
        return {i.driver for i in self.instructions} | {
            word for i in self.instructions for word in i.words if isinstance(word, str)
        }

    def memories(self) -> set[Memory]:
        return {m for i in self.instructions for m in (*i.reads, *i.writes)}

    # -- instructions ------------------------------------------------------------------------------------------

    def map(self, name: str, result: Place, *operands: Place, gathers: bool = False) -> None:
        """An operation on all elements of the operands, which are broadcast to the result's shape.

        With `gathers` it adds to a result that is broadcast itself.
        """
        shape = operands[0].shape if gathers else result.shape
        count = prod(shape)
        if not count:
            return
        places = [result, *operands]
        if result.is_dense and all(p.shape == shape and p.strides == result.strides for p in places):
            self._lines(name, places, [(count, [1] * len(places))])
            return
        places = [each.expanded(shape) for each in places]
        if all(p.strides == places[0].strides for p in places) and places[0].is_dense:
            dims = [(count, [1] * len(places))]
        else:
            dims = _collapsed(shape, [p.strides for p in places], gathers)
        self._lines(name, places, dims)

    def _lines(self, name: str, places: list[Place], dims: list[tuple[int, list[int]]]) -> None:
        if len(dims) > 4:  # a line of instructions for each element of the outermost dimension
            count, steps = dims[0]
            if count > 64:
                raise Unfit(f"{len(dims)} dimensions that do not lie in order")
            for i in range(count):
                moved = [replace(p, start=p.start + i * s) for p, s in zip(places, steps, strict=True)]
                self._lines(name, moved, dims[1:])
            return
        reads, writes = [p.memory for p in places[1:]], [places[0].memory]
        if len(dims) == 1:
            count, steps = dims[0]
            words: list[int | str | tuple[int, Place]] = [f"{name}_{_pattern(steps)}", count]
            for p, step in zip(places, steps, strict=True):
                words += [(p.memory.register, p), step]
            words += [0] * (3 * (4 - len(places)))
            self.instructions.append(_Instruction("map_flat", words, reads, writes))
            return
        outer = [(1, [0] * len(places))] * (4 - len(dims)) + dims[:-1]
        items = [ITEM[p.kind] for p in places]
        words = [f"{name}_{_pattern(dims[-1][1])}", *(n for n, _ in outer), dims[-1][0]]
        for i, p in enumerate(places):
            words += [(p.memory.register, p), *(steps[i] * items[i] for _, steps in outer), dims[-1][1][i]]
        words += [0] * (6 * (4 - len(places)))
        self.instructions.append(_Instruction("map_lines", words, reads, writes))

    def product(
        self, result: Place, a: Place, b: Place, *, add: bool, scratch: Any, summed: bool = False, past: bool = False
    ) -> None:
        """``result = a @ b``, or ``+=``, of stacks of matrices (stack, rows, columns).

        `summed` tells that the sum runs over the rows of a block, `past` that the result is so large that it is written
        past the cache, where it would drive out what is read again.
        """
        kind, K = result.kind, a.shape[2]
        if not result.numel:
            return
        ways = [(result, a, b), (result.permuted((0, 2, 1)), b.permuted((0, 2, 1)), a.permuted((0, 2, 1)))]
        worth = [max(_lines(*way), _dots(*way)) for way in ways]
        result, a, b = ways[worth[1] > worth[0]]
        M, N = result.shape[1:]
        if max(worth) < min(N, LONG) and M >= 4 and result.strides[2] == 1:  # then lines that are copied first pay
            copy = scratch(kind, b.shape)
            self.map(f"copy_{kind}", copy, b)
            b = copy
        lines, dots = _lines(result, a, b), _dots(result, a, b)
        if dots > lines:
            if N > M:
                result, a, b = (p.permuted((0, 2, 1)) for p in (result, b, a))
            following = not summed and a.memory.moves  # the block after this one lies after the lines of `a`
            self._product("product_dot_tiles" if _masks() else "product_dots", result, a, b, add, following)
        elif lines and N > 1 and past and K == 1 and not add:
            self._product("product_past", result, a, b, add)
        elif lines and N > 1 and M == 1 and (N > SHORT or (summed and b.memory.moves)) and _masks():
            self._product("product_line_tiles", result, a, b, add, summed and b.memory.moves)
        elif lines and N > 1 and _masks():
            self._product("product_tiles", result, a, b, add)
        elif lines:
            self._product("product_lines", result, a, b, add)
        else:
            made, copy = scratch(kind, result.shape), scratch(kind, b.shape)
            self.map(f"copy_{kind}", copy, b)
            self._product("product_lines", made, a, copy, add=False)
            operands = (result, made) if add else (made,)
            self.map(f"{'add' if add else 'copy'}_{kind}", result, *operands)

    def _product(self, driver: str, c: Place, a: Place, b: Place, add: bool, following: bool = False) -> None:
        """A product by a driver, one that asks for the block of rows `following` where there is such a one."""
        driver += f"{'_ahead' if following and c.shape[0] == 1 and _masks() else ''}_{c.kind}"
        words: list[int | str | tuple[int, Place]] = [c.shape[0], *c.shape[1:], a.shape[2], int(add)]
        for p in (c, a, b):
            words += [(p.memory.register, p), p.strides[0] * ITEM[p.kind], p.strides[1], p.strides[2]]
        self.instructions.append(_Instruction(driver, words, [a.memory, b.memory, c.memory], [c.memory]))

    def lines_at(self, driver: str, result: Place, source: Place, indices: Place, length: int) -> None:
        """``take`` or ``add_at``: lines of two places (lines, elements), one of them picked by `indices`."""
        words: list[int | str | tuple[int, Place]] = [indices.shape[0], length, result.shape[1]]
        for p in (result, source):
            words += [(p.memory.register, p), p.strides[0] * ITEM[p.kind]]
        words += [(indices.memory.register, indices), indices.strides[0]]
        self.instructions.append(
            _Instruction(
                f"{driver}_{result.kind}", words, [source.memory, indices.memory, result.memory], [result.memory]
            )
        )

    # -- words -------------------------------------------------------------------------------------------------

    def assembled(self, addresses: dict[str, int]) -> list[int]:
        """The words, once every memory has its offset and every kernel its address."""
        found: list[int] = []
        for each in self.instructions:
            start = len(found)
            found += [addresses[each.driver], 0]
            for word in each.words:
                if isinstance(word, str):
                    found.append(addresses[word])
                elif isinstance(word, tuple):
                    register, place = word
                    found += [register, place.memory.offset + place.start * ITEM[place.kind]]
                else:
                    found.append(word)
            found[start + 1] = len(found) - start
        return found


def _pattern(steps: list[int]) -> str:
    """The distances in a line, as a map's name has them."""
    return "".join(str(step) if step in (0, 1) else "s" for step in steps)


def _collapsed(shape: Sequence[int], strides: list[tuple[int, ...]], gathers: bool) -> list[tuple[int, list[int]]]:
    """The dimensions that a loop needs, outermost first, each with its distances; neighbours made one."""
    dims = [(n, [s[d] for s in strides]) for d, n in enumerate(shape) if n != 1]
    if not dims:
        return [(1, [1] * len(strides))]
    leader = 1 if gathers else 0
    dims.sort(key=lambda dim: (-abs(dim[1][leader]), -dim[0]))
    if dims[-1][1][leader] == 0:  # broadcast: not the inner loop
        dims.sort(key=lambda dim: (abs(dim[1][leader]) != 0, -abs(dim[1][leader])))
    found = [dims[0]]
    for n, steps in dims[1:]:
        m, outer = found[-1]
        if all(o == n * s for o, s in zip(outer, steps, strict=True)):
            found[-1] = (m * n, steps)
        else:
            found.append((n, steps))
    return found


SHORT = 256  # elements up to which one line is no worse off in pieces


@functools.cache
def _masks() -> bool:
    """Whether the processor loads and stores parts of a vector register."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")


LONG = 16  # elements from which on a line is long


def _lines(result: Place, a: Place, b: Place) -> int:
    """What a product by lines is worth: their length, if those of the result and of `b` have no gaps."""
    N = result.shape[2]
    return N if N == 1 or result.strides[2] == b.strides[2] == 1 else 0


def _dots(result: Place, a: Place, b: Place) -> int:
    """What a product by dots is worth: half the length of the lines of `a` and of the columns of `b`."""
    K = a.shape[2]
    return K // 2 if a.strides[2] == b.strides[1] == 1 else 0


def bits_of(number: float | int | bool, kind: str) -> bytes:
    """A number as an element of a kind."""
    if kind == "f":
        return bytes(ctypes.c_float(number))  # infinite where it is too large, as torch has it
    return struct.pack({"d": "=d", "l": "=q", "b": "=?"}[kind], number)
