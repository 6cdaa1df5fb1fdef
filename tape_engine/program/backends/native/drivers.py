"""The drivers: plain functions of an instruction's words and the registers, in the kernels' small part of Python.

Those with a K in the source are made for each kind of element; SIZE is its bytes, LANES is how many fill a register.
"""

from __future__ import annotations

__all__ = ["DRIVERS", "RUNNERS"]

MAP_FLAT = """
def map_flat(w, regs):
    call_map(w[2], w[3], regs[w[4]] + w[5], w[6], regs[w[7]] + w[8], w[9], regs[w[10]] + w[11], w[12],
             regs[w[13]] + w[14], w[15])
"""

MAP_LINES = """
def map_lines(w, regs):
    o0 = regs[w[7]] + w[8]
    a0 = regs[w[13]] + w[14]
    b0 = regs[w[19]] + w[20]
    c0 = regs[w[25]] + w[26]
    for i in range(w[3]):
        o1 = o0; a1 = a0; b1 = b0; c1 = c0
        for j in range(w[4]):
            o2 = o1; a2 = a1; b2 = b1; c2 = c1
            for k in range(w[5]):
                call_map(w[2], w[6], o2, w[12], a2, w[18], b2, w[24], c2, w[30])
                o2 += w[11]; a2 += w[17]; b2 += w[23]; c2 += w[29]
            o1 += w[10]; a1 += w[16]; b1 += w[22]; c1 += w[28]
        o0 += w[9]; a0 += w[15]; b0 += w[21]; c0 += w[27]
"""

#: C = A B or C += A B, for a stack of matrices. Words: [2] stack, [3] M, [4] N, [5] K, [6] whether to add, then for
#: C, A, B: register, offset, distance in the stack (bytes), from row to row, from column to column (elements).
#: ``product_lines`` wants lines of B and C without gaps, ``product_dots`` lines of A and columns of B.
PRODUCT_LINES = """
def product_lines_K(w, regs):
    M = w[3]; N = w[4]; K = w[5]
    rc = w[10]; ra = w[15]; ca = w[16]; rb = w[20]
    for s in range(w[2]):
        C0 = regs[w[7]] + w[8] + s * w[9]
        A = pointer_K(regs[w[12]] + w[13] + s * w[14])
        B0 = regs[w[17]] + w[18] + s * w[19]
        for i in range(M):
            C = pointer_K(C0 + i * rc * SIZE)
            if w[6] == 0:
                for j in range(N):
                    C[j] = zero
            for k in range(K):
                B = pointer_K(B0 + k * rb * SIZE)
                x0 = A[i * ra + k * ca]
                for j in range(N):
                    C[j] += x0 * B[j]
"""

#: The same for one column and one line, K = 1, where C is so large that it is written past the cache: it would drive
#: out what is read again.
PRODUCT_PAST = """
def product_past_K(w, regs):
    M = w[3]; N = w[4]
    rc = w[10]; ra = w[15]
    for s in range(w[2]):
        C0 = regs[w[7]] + w[8] + s * w[9]
        A = pointer_K(regs[w[12]] + w[13] + s * w[14])
        B0 = regs[w[17]] + w[18] + s * w[19]; B = pointer_K(B0)
        for i in range(M):
            C1 = C0 + i * rc * SIZE; x0 = A[i * ra]
            C = pointer_K(C1)
            j = 0
            while j < N and (C1 + j * SIZE) & 63 != 0:
                C[j] = x0 * B[j]
                j += 1
            while (j + LANES) <= N:
                stream_K(C1 + j * SIZE, B0 + j * SIZE, x0)
                j += LANES
            while j < N:
                C[j] = x0 * B[j]
                j += 1
"""

#: The same where lines of B and C have no gaps, by tiles that stay in registers: eight lines of one register, four of
#: two, one of four.
PRODUCT_TILES = """
def product_tiles_K(w, regs):
    M = w[3]; N = w[4]; K = w[5]
    rc = w[10] * SIZE; ra = w[15] * SIZE; ca = w[16] * SIZE; rb = w[20] * SIZE
    for s in range(w[2]):
        C = regs[w[7]] + w[8] + s * w[9]
        A = regs[w[12]] + w[13] + s * w[14]
        B = regs[w[17]] + w[18] + s * w[19]
        i = 0
        while N <= LANES and i + 8 <= M:
            tile_K_8_1(C, rc, A, ra, ca, B, rb, K, N, w[6])
            i += 8
            C += 8 * rc
            A += 8 * ra
        while i + 4 <= M:
            n = 0
            while n < N:
                tile_K_4_2(C + n * SIZE, rc, A, ra, ca, B + n * SIZE, rb, K, N - n, w[6])
                n += 2 * LANES
            i += 4
            C += 4 * rc
            A += 4 * ra
        while i < M:
            n = 0
            while n < N:
                tile_K_1_4(C + n * SIZE, rc, A, ra, ca, B + n * SIZE, rb, K, N - n, w[6])
                n += 4 * LANES
            i += 1
            C += rc
            A += ra
"""

PRODUCT_DOTS = """
def product_dots_K(w, regs):
    M = w[3]; N = w[4]; K = w[5]
    rc = w[10]; cc = w[11]; ra = w[15]; cb = w[21]
    for s in range(w[2]):
        C = pointer_K(regs[w[7]] + w[8] + s * w[9])
        A0 = regs[w[12]] + w[13] + s * w[14]
        B0 = regs[w[17]] + w[18] + s * w[19]
        for i in range(M):
            A = pointer_K(A0 + i * ra * SIZE)
            for j in range(N):
                B = pointer_K(B0 + j * cb * SIZE)
                total = zero
                for k in range(K):
                    total += A[k] * B[k]
                if w[6] != 0:
                    total += C[i * rc + j * cc]
                C[i * rc + j * cc] = total
"""

#: Dots by tiles of eight, and one line that is a sum of lines, eight at a time. Where these are rows of a block, those
#: of the next one are asked for meanwhile: so many bytes further on as the block has.
PRODUCT_DOT_TILES = """
def product_dot_tilesAHEAD_K(w, regs):
    M = w[3]; N = w[4]; K = w[5]
    rc = w[10] * SIZE; cc = w[11] * SIZE; ra = w[15] * SIZE; cb = w[21] * SIZE
    for s in range(w[2]):
        A = regs[w[12]] + w[13] + s * w[14]
        i = 0
        while i + 8 <= M:
            for j in range(N):
                C = regs[w[7]] + w[8] + s * w[9] + i * rc + j * cc
                B = regs[w[17]] + w[18] + s * w[19] + j * cb
                dots_K_8(C, rc, A + i * ra, ra, B, K, w[6], M * ra)
            i += 8
        while i < M:
            for j in range(N):
                C = regs[w[7]] + w[8] + s * w[9] + i * rc + j * cc
                B = regs[w[17]] + w[18] + s * w[19] + j * cb
                dots_K_1(C, rc, A + i * ra, ra, B, K, w[6], 0)
            i += 1
"""

PRODUCT_LINE_TILES = """
def product_line_tilesAHEAD_K(w, regs):
    M = w[3]; N = w[4]; K = w[5]
    rc = w[10] * SIZE; ra = w[15] * SIZE; ca = w[16] * SIZE; rb = w[20] * SIZE
    for s in range(w[2]):
        for i in range(M):
            C = regs[w[7]] + w[8] + s * w[9] + i * rc
            A = regs[w[12]] + w[13] + s * w[14] + i * ra
            B = regs[w[17]] + w[18] + s * w[19]
            add = w[6]
            k = 0
            while k + 8 <= K:
                lines_K_8(C, A + k * ca, ca, B + k * rb, rb, N, add, K * rb)
                add = 1
                k += 8
            while k < K:
                lines_K_1(C, A + k * ca, ca, B + k * rb, rb, N, add, 0)
                add = 1
                k += 1
            if K == 0:
                lines_K_0(C, A, ca, B, rb, N, add, 0)
"""

#: C = S + A B for matrices so large that each thread does a part. B goes into panels of so many columns as a tile has,
#: which lie in order; of B as many lines and columns at a time, and of A as many lines, as a core's own cache holds.
#: Words: [0] M, [1] N, [2] K, then the address of C and its distance from row to row (all are in bytes), of A with
#: those from row to row and from column to column, of B likewise; [11] of S with that from row to row, [13] whether it
#: counts; [14] of memory for the panels, [15] how many lines of B, [16] columns, [17] lines of A there are at a time.
PRODUCT_LARGE = """
def product_large_K(w):
    M = w[0]; N = w[1]; K = w[2]
    C = w[3]; rc = w[4]; A = w[5]; ra = w[6]; ca = w[7]; B = w[8]; rb = w[9]; cb = w[10]
    n0 = 0
    while n0 < N:
        nc = min(w[16], N - n0)
        S = w[11]; rs = w[12]; starts = w[13]
        k0 = 0
        while k0 < K:
            kc = min(w[15], K - k0)
            n = 0
            while n < nc:
                P0 = w[14] + n * kc * SIZE
                B0 = B + k0 * rb + (n0 + n) * cb
                if cb == SIZE:
                    for k in range(kc):
                        packed_K(P0 + k * 128, B0 + k * rb, nc - n)
                else:
                    k1 = 0
                    while k1 < kc:
                        for l in range(min(2 * LANES, nc - n)):
                            for k in range(k1, min(k1 + 16, kc)):
                                P = pointer_K(P0 + k * 128 + l * SIZE)
                                x = pointer_K(B0 + k * rb + l * cb)
                                P[0] = x[0]
                        k1 += 16
                n += 2 * LANES
            i0 = 0
            while i0 < M:
                end = min(i0 + w[17], M)
                tiles = w[18] if ra == SIZE else 0
                if tiles != 0:
                    i = i0
                    while i + 12 <= end:
                        A1 = A + i * ra + k0 * ca
                        Q0 = tiles + (i - i0) * kc * SIZE
                        for k in range(kc):
                            twelve_K(Q0 + k * 12 * SIZE, A1 + k * ca)
                        i += 12
                n = 0
                while n < nc:
                    i = i0
                    while i < end:
                        C0 = C + i * rc + (n0 + n) * SIZE
                        S0 = S + i * rs + (n0 + n) * SIZE
                        A0 = A + i * ra + k0 * ca
                        P0 = w[14] + n * kc * SIZE
                        if i + 12 <= end:
                            cq = 12 * SIZE if tiles != 0 else ca
                            A0 = tiles + (i - i0) * kc * SIZE if tiles != 0 else A0
                            if nc - n > LANES:
                                panel_K_12_2(C0, rc, S0, rs, starts, A0, ra, cq, P0, kc, nc - n)
                            else:
                                panel_K_12_1(C0, rc, S0, rs, starts, A0, ra, cq, P0, kc, nc - n)
                            i += 12
                        else:
                            if i + 4 <= end:
                                panel_K_4_2(C0, rc, S0, rs, starts, A0, ra, ca, P0, kc, nc - n)
                                i += 4
                            else:
                                panel_K_1_2(C0, rc, S0, rs, starts, A0, ra, ca, P0, kc, nc - n)
                                i += 1
                    n += 2 * LANES
                i0 = end
            S = C; rs = rc; starts = 1
            k0 += kc
        n0 += nc
"""

#: A recurrence, for some rows of a batch: for each moment ``C = S + A B``, with B in panels, then maps of each row.
#: Words: [0] how many moments, [1] M, [2] N, [3] K, [4] B with its distances from row to row and column to column, [7]
#: memory for the panels, [8] K at the first moment, [9] C, [13] S, [17] whether it counts, [18] A; [22] how many maps
#: there are, [23] their address: for each that of its kernel, how many elements, and three operands. An operand is its
#: address at the first moment and at the second one, the distance from moment to moment from then on, and from row to
#: row.
RECURRENCE = """
def recurrence_K(w):
    M = w[1]; N = w[2]; K = w[3]; rb = w[5]; cb = w[6]; ca = SIZE
    rc = w[12]; rs = w[16]; starts = w[17]; ra = w[21]
    n = 0
    while n < N:
        P0 = w[7] + n * K * SIZE
        B0 = w[4] + n * cb
        if cb == SIZE:
            for k in range(K):
                packed_K(P0 + k * 128, B0 + k * rb, N - n)
        else:
            k1 = 0
            while k1 < K:
                for l in range(min(2 * LANES, N - n)):
                    for k in range(k1, min(k1 + 16, K)):
                        P = pointer_K(P0 + k * 128 + l * SIZE)
                        x = pointer_K(B0 + k * rb + l * cb)
                        P[0] = x[0]
                k1 += 16
        n += 2 * LANES
    for t in range(w[0]):
        k = w[8] if t == 0 else K
        n = 0
        while n < N:
            P0 = w[7] + n * K * SIZE
            C0 = moment(w[9], w[10], w[11], t) + n * SIZE
            S0 = moment(w[13], w[14], w[15], t) + n * SIZE
            A0 = moment(w[18], w[19], w[20], t)
            i = 0
            while i < M:
                if i + 12 <= M:
                    panel_K_12_2(C0, rc, S0, rs, starts, A0, ra, ca, P0, k, N - n)
                    i += 12; C0 += 12 * rc; S0 += 12 * rs; A0 += 12 * ra
                else:
                    if i + 4 <= M:
                        panel_K_4_2(C0, rc, S0, rs, starts, A0, ra, ca, P0, k, N - n)
                        i += 4; C0 += 4 * rc; S0 += 4 * rs; A0 += 4 * ra
                    else:
                        panel_K_1_2(C0, rc, S0, rs, starts, A0, ra, ca, P0, k, N - n)
                        i += 1; C0 += rc; S0 += rs; A0 += ra
            n += 2 * LANES
        for r in range(M):
            e = pointer_l(w[23])
            for i in range(w[22]):
                o = moment(e[2], e[3], e[4], t) + r * e[5]
                a = moment(e[6], e[7], e[8], t) + r * e[9]
                b = moment(e[10], e[11], e[12], t) + r * e[13]
                call_map(e[0], e[1], o, 1, a, 1, b, 1, 0, 0)
                e = moved(e, 14)
"""

#: Words: [2] how many indices, [3] how many lines there are, [4] elements of a line, then register and offset of
#: the result, its distance from line to line (bytes), the same of the argument, register and offset of the indices
#: and their distance. A wrong index is told in the register nought.
BY_INDEX = """
def NAME_K(w, regs):
    I = pointer_l(regs[w[11]] + w[12])
    for n in range(w[2]):
        i = I[n * w[13]]
        if i < 0:
            i += w[3]
        if i < 0 or i >= w[3]:
            regs[0] = 1
            return
        O = pointer_K(regs[w[5]] + w[6] + TO * w[7])
        A = pointer_K(regs[w[8]] + w[9] + FROM * w[10])
        for j in range(w[4]):
            O[j] SIGN A[j]
"""


def _by_index(name: str, to: str, source: str, sign: str) -> str:
    """The kernel that puts lines where indices say, or takes them from there: `n` counts, `i` is the index."""
    return BY_INDEX.replace("NAME", name).replace("TO", to).replace("FROM", source).replace("SIGN", sign)


TAKE = _by_index("take", "n", "i", "=")
ADD_AT = _by_index("add_at", "i", "n", "+=")

#: The instructions one by one, and the same for one block of rows after the other: each block, registers move on.
RUN = """
def run(w, count, regs, steps, many, blocks):
    for block in range(blocks):
        here = w
        for i in range(count):
            call_driver(here[0], here, regs)
            here = moved(here, here[1])
        for r in range(many):
            regs[r] += steps[r]
"""

#: A thread's part of a loop: its registers are those of all but for its arena, and begin at its first row. Words: [0]
#: the registers of all, [1] how many, [2] the thread's, [3] its arena, [4] its first row, [5] how many registers move
#: on with the rows, [6] those: register, the one it starts from, bytes from row to row; then codes with their lengths:
#: [7] what comes first, [9] a block, [11] how far registers move on with it, [12] how many blocks, [13] the rows left
#: over; [15] the address of `run`.
PART = """
def part(w):
    regs = pointer_l(w[2])
    main = pointer_l(w[0])
    for i in range(w[1]):
        regs[i] = main[i]
    regs[2] = w[3]
    m = pointer_l(w[6])
    for i in range(w[5]):
        regs[m[3 * i]] = main[m[3 * i + 1]] + w[4] * m[3 * i + 2]
    call_run(w[15], w[7], w[8], w[2], w[11], 0, 1)
    call_run(w[15], w[9], w[10], w[2], w[11], w[1], w[12])
    call_run(w[15], w[13], w[14], w[2], w[11], 0, 1)
"""

#: What each thread of a team runs. Words: [0] the address of a function that tells its number, [1] of one that tells
#: how many they are, [2] that of `part`, [3] how many parts there are, then the addresses of their words.
SHARE = """
def share(w):
    many = asked(w[1])
    i = asked(w[0])
    while i < w[3]:
        call_part(w[2], w[4 + i])
        i += many
"""

#: Drivers by name.
DRIVERS = {
    "map_flat": MAP_FLAT, "map_lines": MAP_LINES, "product_lines": PRODUCT_LINES, "product_dots": PRODUCT_DOTS,
    "product_tiles": PRODUCT_TILES, "product_past": PRODUCT_PAST,
    "product_dot_tiles": PRODUCT_DOT_TILES.replace("AHEAD", ""),
    "product_dot_tiles_ahead": PRODUCT_DOT_TILES.replace("AHEAD", "_ahead"),
    "product_line_tiles": PRODUCT_LINE_TILES.replace("AHEAD", ""),
    "product_line_tiles_ahead": PRODUCT_LINE_TILES.replace("AHEAD", "_ahead"),
    "take": TAKE, "add_at": ADD_AT, "run": RUN, "part": PART, "share": SHARE, "product_large": PRODUCT_LARGE,
    "recurrence": RECURRENCE,
}  # fmt: skip

#: Those that are no instructions, but run them, or are run alone.
RUNNERS = {"run", "part", "share", "product_large", "recurrence"}
