"""The inmost part of a product of matrices: a tile of the result that stays in vector registers.

A loop would write each line of the result back for every few steps of the sum, and finish lines that fill no
register one element at a time. So these are written in LLVM's own terms: lines are loaded and stored under masks, and
the tile is written once.
"""

from __future__ import annotations

from typing import Any

__all__ = ["tile"]


def tile(width: int, rows: int, vectors: int) -> Any:
    """What computes `rows` lines of C = A B, or C += A B, of up to `vectors` registers each, as a kernel can call it.

    Args:
        width: the bits of an element, 32 or 64.
        rows: how many lines of A.
        vectors: how many registers of 64 bytes a line takes; what the arguments say is left of it may be less.
    """
    from llvmlite import ir

    from .translator import repeated

    low = ir.FloatType() if width == 32 else ir.DoubleType()
    lanes, item = 512 // width, width // 8
    vector, mask_type = ir.VectorType(low, lanes), ir.VectorType(ir.IntType(1), lanes)
    number, word = ir.IntType(32), ir.IntType(64)
    unrolled = 4 if rows == 1 else 1  # sums of their own, so that none waits for the one before

    def spread(builder: Any, x: Any, kind: Any) -> Any:
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), x, number(0))
        zeros = ir.Constant(ir.VectorType(number, lanes), [0] * lanes)
        return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def declared(builder: Any, name: str, kind: Any) -> Any:
        name = f"llvm.masked.{name}.v{lanes}f{width}.p0"
        return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)

    def computed(
        builder: Any, C: Any, rc: Any, A: Any, ra: Any, ca: Any, B: Any, rb: Any, K: Any, left: Any, add: Any
    ) -> None:
        place = vector.as_pointer()
        load = declared(builder, "load", ir.FunctionType(vector, [place, number, mask_type, vector]))
        store = declared(builder, "store", ir.FunctionType(ir.VoidType(), [vector, place, number, mask_type]))
        zeros = ir.Constant(vector, None)
        lines = ir.VectorType(number, lanes)
        room = spread(builder, builder.trunc(left, number), lines)
        masks = [
            builder.icmp_signed("<", ir.Constant(lines, [j * lanes + i for i in range(lanes)]), room)
            for j in range(vectors)
        ]
        adds = spread(builder, builder.icmp_signed("!=", add, word(0)), mask_type)

        def at(address: Any, step: Any, count: Any, vector_number: int = 0) -> Any:
            moved = builder.add(address, builder.mul(step, count))
            return builder.inttoptr(builder.add(moved, word(vector_number * lanes * item)), place)

        sums = {}
        for r in range(rows):
            for j in range(vectors):
                for u in range(unrolled):
                    with builder.goto_entry_block():
                        sums[r, j, u] = builder.alloca(vector)
                    start = zeros
                    if u == 0:
                        mask = builder.and_(masks[j], adds)
                        start = builder.call(load, [at(C, rc, word(r), j), number(item), mask, zeros])
                    builder.store(start, sums[r, j, u])

        def step(k: Any, u: int) -> None:
            line = [builder.call(load, [at(B, rb, k, j), number(item), masks[j], zeros]) for j in range(vectors)]
            for r in range(rows):
                address = builder.add(builder.add(A, builder.mul(ra, word(r))), builder.mul(ca, k))
                x = builder.load(builder.inttoptr(address, low.as_pointer()), align=item)
                x = spread(builder, x, vector)
                for j in range(vectors):
                    product = builder.fmul(x, line[j], flags=("contract",))
                    total = builder.fadd(builder.load(sums[r, j, u]), product, flags=("contract",))
                    builder.store(total, sums[r, j, u])

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
                builder.call(store, [total, at(C, rc, word(r), j), number(item), masks[j]])

    return computed
