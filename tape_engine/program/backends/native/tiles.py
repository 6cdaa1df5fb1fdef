"""The inmost parts of products of matrices, whose sums stay in vector registers.

A loop would write each line of the result back for every few steps of the sum, and finish lines that fill no
register one element at a time. So these are written in LLVM's own terms: lines are loaded and stored under masks, and
the sums are written once.

Those that pass over a block of rows `ahead` ask for the block after it as they go, each for half of its lines: a block
is read from memory once and used more than once while it is in cache, and memory would rest meanwhile. They ask for it
into the cache that a core has for itself, as the nearest one is too small for two blocks.
"""

from __future__ import annotations

from typing import Any

__all__ = ["dots", "lines", "packed", "panel", "tile"]

PANEL = 2  # registers of a line of a packed matrix


class _Vectors:
    """What the inmost parts are made of, for one width of elements, in the code of one function."""

    def __init__(self, builder: Any, width: int) -> None:
        from llvmlite import ir

        self.builder = builder
        self.low = ir.FloatType() if width == 32 else ir.DoubleType()
        self.lanes, self.item = 512 // width, width // 8
        self.kind = ir.VectorType(self.low, self.lanes)
        self.zeros = ir.Constant(self.kind, None)
        self._ir, self._width = ir, width
        self._number = ir.IntType(32)
        self._numbers = ir.VectorType(self._number, self.lanes)
        self._mask = ir.VectorType(ir.IntType(1), self.lanes)
        self._place = self.kind.as_pointer()

    def word(self, number: int) -> Any:
        return self._ir.IntType(64)(number)

    def spread(self, x: Any, kind: Any = None) -> Any:
        """A register full of one number."""
        kind = kind or self.kind
        nothing = self._ir.Constant(kind, self._ir.Undefined)
        first = self.builder.insert_element(nothing, x, self._number(0))
        return self.builder.shuffle_vector(first, nothing, self._ir.Constant(self._numbers, [0] * self.lanes))

    def within(self, room: Any, start: int = 0) -> Any:
        """The mask of those elements from `start` on that come before `room`."""
        places = self._ir.Constant(self._numbers, [start + i for i in range(self.lanes)])
        room = self.spread(self.builder.trunc(room, self._number), self._numbers)
        return self.builder.icmp_signed("<", places, room)

    def where(self, mask: Any | None, word: Any) -> Any:
        """The mask (all elements without one), or an empty one if the word is nought."""
        wanted = self.spread(self.builder.icmp_signed("!=", word, self.word(0)), self._mask)
        return wanted if mask is None else self.builder.and_(mask, wanted)

    def load(self, address: Any, mask: Any = None) -> Any:
        """A register from memory; of a masked one the elements outside are nought, and not read."""
        if mask is None:
            return self.builder.load(self.builder.inttoptr(address, self._place), align=self.item)
        kind = self._ir.FunctionType(self.kind, [self._place, self._number, self._mask, self.kind])
        given = [self.builder.inttoptr(address, self._place), self._number(self.item), mask, self.zeros]
        return self.builder.call(self._function("load", kind), given)

    def store(self, x: Any, address: Any, mask: Any = None) -> None:
        if mask is None:
            self.builder.store(x, self.builder.inttoptr(address, self._place), align=self.item)
            return
        kind = self._ir.FunctionType(self._ir.VoidType(), [self.kind, self._place, self._number, self._mask])
        given = [x, self.builder.inttoptr(address, self._place), self._number(self.item), mask]
        self.builder.call(self._function("store", kind), given)

    def element(self, address: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, self.low.as_pointer()), align=self.item)

    def put(self, x: Any, address: Any) -> None:
        self.builder.store(x, self.builder.inttoptr(address, self.low.as_pointer()), align=self.item)

    def added(self, total: Any, x: Any, y: Any) -> Any:
        """``total + x * y``."""
        return self.builder.fadd(total, self.builder.fmul(x, y, flags=("contract",)), flags=("contract",))

    def total(self, x: Any) -> Any:
        """The sum of the elements of a register."""
        kind = self._ir.FunctionType(self.low, [self.low, self.kind])
        function = self._declared(f"llvm.vector.reduce.fadd.v{self.lanes}f{self._width}", kind)
        return self.builder.call(function, [self._ir.Constant(self.low, -0.0), x], fastmath=("reassoc",))

    def fetch(self, address: Any, *, write: bool = False) -> None:
        """Asks for a line of memory that will be read soon, or written."""
        byte = self._ir.IntType(8).as_pointer()
        kind = self._ir.FunctionType(self._ir.VoidType(), [byte, self._number, self._number, self._number])
        given = [
            self.builder.inttoptr(address, byte),
            self._number(int(write)),
            self._number(3 if write else 2),
            self._number(1),
        ]
        self.builder.call(self.builder.module.declare_intrinsic("llvm.prefetch", [byte], fnty=kind), given)

    def _function(self, name: str, kind: Any) -> Any:
        return self._declared(f"llvm.masked.{name}.v{self.lanes}f{self._width}.p0", kind)

    def _declared(self, name: str, kind: Any) -> Any:
        return self.builder.module.globals.get(name) or self._ir.Function(self.builder.module, kind, name)

    def variable(self, kind: Any = None) -> Any:
        """A place for a register, or for what is of another kind, in the function's first block."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind or self.kind)


def tile(width: int, rows: int, vectors: int) -> Any:
    """What computes `rows` lines of C = A B, or C += A B, of up to `vectors` registers each, as a kernel can call it.

    Args:
        width: the bits of an element, 32 or 64.
        rows: how many lines of A.
        vectors: how many registers of 64 bytes a line takes; what the arguments say is left of it may be less.
    """
    from .translator import repeated

    unrolled = 4 if rows == 1 else 1  # sums of their own, so that none waits for the one before

    def computed(
        builder: Any, C: Any, rc: Any, A: Any, ra: Any, ca: Any, B: Any, rb: Any, K: Any, left: Any, add: Any
    ) -> None:
        of = _Vectors(builder, width)
        word = of.word
        masks = [of.within(left, j * of.lanes) for j in range(vectors)]

        def at(address: Any, step: Any, count: Any, vector_number: int = 0) -> Any:
            moved = builder.add(address, builder.mul(step, count))
            return builder.add(moved, word(vector_number * of.lanes * of.item))

        sums = {}
        for r in range(rows):
            for j in range(vectors):
                for u in range(unrolled):
                    sums[r, j, u] = of.variable()
                    start = of.load(at(C, rc, word(r), j), of.where(masks[j], add)) if u == 0 else of.zeros
                    builder.store(start, sums[r, j, u])

        def step(k: Any, u: int) -> None:
            line = [of.load(at(B, rb, k, j), masks[j]) for j in range(vectors)]
            for r in range(rows):
                x = of.spread(of.element(builder.add(at(A, ra, word(r)), builder.mul(ca, k))))
                for j in range(vectors):
                    builder.store(of.added(builder.load(sums[r, j, u]), x, line[j]), sums[r, j, u])

        whole = builder.sdiv(K, word(unrolled))
        with repeated(builder, whole) as k:
            for u in range(unrolled):
                step(builder.add(builder.mul(k, word(unrolled)), word(u)), u)
        if unrolled > 1:
            done = builder.mul(whole, word(unrolled))
            with repeated(builder, builder.sub(K, done)) as k:
                step(builder.add(k, done), 0)
        for r in range(rows):
            for j in range(vectors):
                total = builder.load(sums[r, j, 0])
                for u in range(1, unrolled):
                    total = builder.fadd(total, builder.load(sums[r, j, u]))
                of.store(total, at(C, rc, word(r), j), masks[j])

    return computed


def dots(width: int, rows: int, *, ahead: bool = False) -> Any:
    """What computes c = A b, or c += A b, for `rows` lines of A, as a kernel can call it.

    Elements of the lines and of b have no gaps between. With `ahead` the first half of the lines that are as many
    bytes further on as the last argument says is asked for.
    """
    from .translator import repeated

    unrolled = 4 if rows == 1 else 1

    def computed(builder: Any, C: Any, rc: Any, A: Any, ra: Any, B: Any, K: Any, add: Any, further: Any) -> None:
        of = _Vectors(builder, width)
        word = of.word
        sums = {(r, u): of.variable() for r in range(rows) for u in range(unrolled)}
        for each in sums.values():
            builder.store(of.zeros, each)
        starts = [builder.add(A, builder.mul(ra, word(r))) for r in range(rows)]

        def step(k: Any, u: int, mask: Any = None) -> None:
            place = builder.mul(k, word(of.item))
            line = of.load(builder.add(B, place), mask)
            for r in range(rows):
                here = builder.add(starts[r], place)
                if ahead and r < rows // 2:
                    of.fetch(builder.add(here, further))
                builder.store(of.added(builder.load(sums[r, u]), of.load(here, mask), line), sums[r, u])

        size = word(of.lanes * unrolled)
        whole = builder.sdiv(K, size)
        with repeated(builder, whole) as turn:
            for u in range(unrolled):
                step(builder.add(builder.mul(turn, size), word(u * of.lanes)), u)
        done = builder.mul(whole, size)
        rest = builder.add(builder.sub(K, done), word(of.lanes - 1))
        with repeated(builder, builder.sdiv(rest, word(of.lanes))) as turn:
            k = builder.add(done, builder.mul(turn, word(of.lanes)))
            step(k, 0, of.within(builder.sub(K, k)))
        adds = builder.icmp_signed("!=", add, word(0))
        for r in range(rows):
            total = builder.load(sums[r, 0])
            for u in range(1, unrolled):
                total = builder.fadd(total, builder.load(sums[r, u]))
            place = builder.add(C, builder.mul(rc, word(r)))
            found = of.variable(of.low)
            builder.store(of.total(total), found)
            with builder.if_then(adds):
                builder.store(builder.fadd(of.element(place), builder.load(found)), found)
            of.put(builder.load(found), place)

    return computed


def lines(width: int, rows: int, *, ahead: bool = False) -> Any:
    """What computes c = a B, or c += a B, for a and B of `rows` elements and lines, as a kernel can call it.

    Elements of the lines and of c have no gaps between. With `ahead` the second half of the lines that are as many
    bytes further on as the last argument says is asked for.
    """
    from .translator import repeated

    def computed(builder: Any, C: Any, A: Any, ca: Any, B: Any, rb: Any, N: Any, add: Any, further: Any) -> None:
        of = _Vectors(builder, width)
        word = of.word
        factors = [of.spread(of.element(builder.add(A, builder.mul(ca, word(r))))) for r in range(rows)]
        starts = [builder.add(B, builder.mul(rb, word(r))) for r in range(rows)]

        def step(n: Any, mask: Any = None) -> None:
            place = builder.mul(n, word(of.item))
            total = of.load(builder.add(C, place), of.where(mask, add))
            for r in range(rows):
                here = builder.add(starts[r], place)
                if ahead and r >= rows // 2:
                    of.fetch(builder.add(here, further))
                total = of.added(total, factors[r], of.load(here, mask))
            of.store(total, builder.add(C, place), mask)

        whole = builder.sdiv(N, word(of.lanes))
        with repeated(builder, whole) as turn:
            step(builder.mul(turn, word(of.lanes)))
        n = builder.mul(whole, word(of.lanes))
        with builder.if_then(builder.icmp_signed("<", n, N)):
            step(n, of.within(builder.sub(N, n)))

    return computed


def panel(width: int, rows: int, vectors: int) -> Any:
    """What computes `rows` lines of up to `vectors` registers each of C = S + A B, as a kernel can call it.

    B is given packed: two registers for each step of the sum, one step after the other (`packed`). S may be C, or one
    line for all; without `starts` it is nought. What the arguments say is left of a line may be less than the registers
    hold.
    """
    from .translator import repeated

    def computed(
        builder: Any, C: Any, rc: Any, S: Any, rs: Any, starts: Any, A: Any, ra: Any, ca: Any, B: Any, K: Any, left: Any
    ) -> None:
        of = _Vectors(builder, width)
        word = of.word
        masks = [of.within(left, j * of.lanes) for j in range(vectors)]
        sums = {}

        def at(address: Any, step: Any, r: int, j: int) -> Any:
            return builder.add(builder.add(address, builder.mul(step, word(r))), word(j * of.lanes * of.item))

        for r in range(rows):
            for j in range(vectors):
                sums[r, j] = of.variable()
                of.fetch(at(C, rc, r, j), write=True)
                builder.store(of.zeros, sums[r, j])
        with repeated(builder, K) as k:
            here = builder.add(B, builder.mul(k, word(PANEL * 64)))
            line = [of.load(builder.add(here, word(j * 64))) for j in range(vectors)]
            for r in range(rows):
                x = of.spread(of.element(builder.add(at(A, ra, r, 0), builder.mul(ca, k))))
                for j in range(vectors):
                    builder.store(of.added(builder.load(sums[r, j]), x, line[j]), sums[r, j])
        # S comes last: added to each product in turn, its size would be that of the rounding of every one of them
        for r in range(rows):
            for j in range(vectors):
                start = of.load(at(S, rs, r, j), of.where(masks[j], starts))
                of.store(builder.fadd(start, builder.load(sums[r, j])), at(C, rc, r, j), masks[j])

    return computed


def packed(width: int) -> Any:
    """What copies a line of B for `panel`, of which the arguments say how many elements there are, as a kernel can."""

    def computed(builder: Any, to: Any, source: Any, left: Any) -> None:
        of = _Vectors(builder, width)
        for j in range(PANEL):
            here = of.word(j * 64)
            of.store(of.load(builder.add(source, here), of.within(left, j * of.lanes)), builder.add(to, here))

    return computed


def twelve(width: int) -> Any:
    """What copies twelve elements that lie in order, as a kernel can call it."""

    def computed(builder: Any, to: Any, source: Any) -> None:
        of = _Vectors(builder, width)
        for j in range(-(-12 // of.lanes)):
            here, mask = of.word(j * 64), of.within(of.word(12), j * of.lanes)
            of.store(of.load(builder.add(source, here), mask), builder.add(to, here), mask)

    return computed
