"""Products by tiles, the kernel itself: every size of tile with what is left over, and nothing written beside it."""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch

from tape_engine.program.backends.native import objects
from tests.helpers import close
from tests.tape_engine.program.common import F32, F64, draw, follows, freeze

pytest.importorskip("llvmlite")

Tensor = torch.Tensor

GAP = 5  # elements between lines of the result


def multiplied(C: Tensor, A: Tensor, B: Tensor, *, add: bool, by: str = "product_tiles") -> None:
    """Runs a kernel on stacks of matrices; lines of `B` and `C` have no gaps inside, or those of `A` and `B.mT`."""
    name = f"{by}_{'f' if C.dtype == F32 else 'd'}"
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(objects.load([name])[name])
    words = [0, 0, C.shape[0], C.shape[1], C.shape[2], A.shape[2], int(add)]
    registers: list[int] = []
    for tensor in (C, A, B):
        stack, row, column = tensor.stride()
        words += [len(registers), 0, stack * tensor.element_size(), row, column]
        registers.append(tensor.data_ptr())
    w, r = ((ctypes.c_int64 * len(x))(*x) for x in (words, registers))
    kernel(ctypes.addressof(w), ctypes.addressof(r))


ROWS = (1, 2, 3, 4, 7, 8, 9, 13)
COLUMNS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 50, 64, 65, 130)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9, 18])
def test_every_size(steps: int, dtype: torch.dtype, add: bool) -> None:
    for rows, columns in itertools.product(ROWS, COLUMNS):
        room = draw(2, rows, columns + GAP, dtype=dtype)
        before = room.clone()
        A, B = draw(2, steps, rows, dtype=dtype).transpose(1, 2), draw(2, steps, columns, dtype=dtype)
        multiplied(room[..., :columns], A, B, add=add)
        wanted = A @ B + (before[..., :columns] if add else 0)
        close(room[..., :columns], wanted, 1e-5 if dtype == F32 else 1e-12)
        assert torch.equal(room[..., columns:], before[..., columns:]), (rows, columns)


def test_what_is_no_number_stays_in_its_row_and_column() -> None:
    for rows, columns in itertools.product((1, 5, 9), (3, 17, 50)):
        A, B = draw(1, rows, 6), draw(1, 6, columns)
        A[0, rows - 1, 2], B[0, 4, columns - 1] = math.nan, math.inf
        C = torch.full((1, rows, columns), math.nan)  # what was there before counts for nothing
        C = C.to(A.dtype)
        multiplied(C, A, B, add=False)
        wanted = A @ B
        assert torch.equal(C.isnan(), wanted.isnan())
        assert torch.equal(C.isinf(), wanted.isinf())
        close(C.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0), 1e-12)


AHEAD = ["", "_ahead"]  # with those that ask for rows which are not there


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_dots_of_every_size(dtype: torch.dtype, add: bool, ahead: str) -> None:
    for rows, columns, steps in itertools.product(ROWS, (1, 2, 5), (0, *COLUMNS)):
        room = draw(2, rows, columns * 3, dtype=dtype)  # its columns lie apart
        before = room.clone()
        A, B = draw(2, rows, steps + GAP, dtype=dtype)[..., :steps], draw(2, columns, steps, dtype=dtype).mT
        multiplied(room[..., ::3], A, B, add=add, by=f"product_dot_tiles{ahead}")
        wanted = A @ B + (before[..., ::3] if add else 0)
        close(room[..., ::3], wanted, 1e-5 if dtype == F32 else 1e-12)
        assert torch.equal(room[..., 1::3], before[..., 1::3]), (rows, columns, steps)


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_sums_of_lines_of_every_size(dtype: torch.dtype, add: bool, ahead: str) -> None:
    for rows, columns, steps in itertools.product((1, 3), COLUMNS, (0, 1, *ROWS, 16, 21)):
        room = draw(2, rows, columns + GAP, dtype=dtype)
        before = room.clone()
        A, B = draw(2, steps, rows, dtype=dtype).mT, draw(2, steps, columns + GAP, dtype=dtype)[..., :columns]
        multiplied(room[..., :columns], A, B, add=add, by=f"product_line_tiles{ahead}")
        wanted = A @ B + (before[..., :columns] if add else 0)
        close(room[..., :columns], wanted, 1e-5 if dtype == F32 else 1e-12)
        assert torch.equal(room[..., columns:], before[..., columns:]), (rows, columns, steps)


@pytest.mark.parametrize("by", ["product_dot_tiles", "product_line_tiles"])
def test_dots_and_sums_keep_what_is_no_number(by: str) -> None:
    for rows, columns, steps in ((9, 1, 21), (1, 21, 9), (3, 5, 7)):
        A = draw(1, rows, steps + GAP)[..., :steps]
        B = draw(1, columns, steps).mT if "dot" in by else draw(1, steps, columns)
        A[0, rows - 1, 2], B[0, steps - 1, columns - 1] = math.nan, math.inf
        C = torch.full((1, rows, columns), math.nan, dtype=A.dtype)
        multiplied(C, A, B, add=False, by=by)
        wanted = A @ B
        assert torch.equal(C.isnan(), wanted.isnan())
        assert torch.equal(C.isinf(), wanted.isinf())
        close(C.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0), 1e-12)


@pytest.mark.parametrize("by", ["product_lines", "product_dots"])
@pytest.mark.parametrize("add", [False, True])
def test_without_registers_of_parts(by: str, add: bool) -> None:
    """The loops for processors that cannot load and store parts of a register."""
    for rows, columns, steps in itertools.product((1, 4, 9), (1, 5, 33), (0, 1, 6, 19)):
        C, A = draw(2, rows, columns), draw(2, rows, steps)
        B = draw(2, columns, steps).mT if "dots" in by else draw(2, steps, columns)
        wanted = A @ B + (C if add else 0)
        multiplied(C, A, B, add=add, by=by)
        close(C, wanted, 1e-12)


def test_one_column_and_one_line_past_the_cache() -> None:
    for dtype, start, columns in itertools.product((F32, F64), range(5), (1, 3, 40, 784)):
        room = draw(3, columns + 16, dtype=dtype)  # lines that begin anywhere in a line of the cache
        before = room.clone()
        A, B = draw(1, 3, 1, dtype=dtype), draw(1, 1, columns, dtype=dtype)
        multiplied(room[None, :, start : start + columns], A, B, add=False, by="product_past")
        assert torch.equal(room[:, start : start + columns], (A @ B)[0])
        room[:, start : start + columns] = before[:, start : start + columns]
        assert torch.equal(room, before)


@pytest.mark.parametrize("columns", [2, 10, 50])
def test_in_a_program(columns: int) -> None:
    W, b = draw(7, columns), draw(columns)

    def function(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(b, X, W).relu().square().mean()

    for rows in (1, 6, 64):
        follows(freeze(function, [draw(rows, 7)], [W, b], backend="native"), function, [draw(rows, 7)], [W, b])
