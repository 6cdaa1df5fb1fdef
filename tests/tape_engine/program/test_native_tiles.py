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


def multiplied(C: Tensor, A: Tensor, B: Tensor, *, add: bool) -> None:
    """Runs the kernel on stacks of matrices; lines of `B` and `C` have no gaps inside."""
    name = f"product_tiles_{'f' if C.dtype == F32 else 'd'}"
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(objects.load([name])[name])
    words = [0, 0, C.shape[0], C.shape[1], C.shape[2], A.shape[2], int(add)]
    registers: list[int] = []
    for tensor in (C, A, B):
        stack, row, column = tensor.stride()
        words += [len(registers), 0, stack * tensor.element_size(), row, column]
        registers.append(tensor.data_ptr())
    w, r = ((ctypes.c_int64 * len(x))(*x) for x in ([*words, 0], registers))
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


@pytest.mark.parametrize("columns", [2, 10, 50])
def test_in_a_program(columns: int) -> None:
    W, b = draw(7, columns), draw(columns)

    def function(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(b, X, W).relu().square().mean()

    for rows in (1, 6, 64):
        follows(freeze(function, [draw(rows, 7)], [W, b], backend="native"), function, [draw(rows, 7)], [W, b])
