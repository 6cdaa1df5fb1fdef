"""Memory that others have too: a write by NumPy, which torch does not count, spoils no gradient in silence."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import dlpack

import tape_engine as te
from tape_engine import tape as tapes
from tests.helpers import close, g_of, grad_of, plain

Tensor = torch.Tensor
F64 = torch.float64


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def detached(y: Tensor) -> Any:
    return y.detach().numpy()


def by_numpy(y: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", te.TapeWarning)
        return y.numpy()


def by_dlpack(y: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", te.TapeWarning)
        return dlpack.from_dlpack(dlpack.to_dlpack(y)).detach().numpy()  # type: ignore[attr-defined]


def of_a_view(y: Tensor) -> Any:
    return y[1:].detach().numpy()


HANDED: dict[str, Callable[[Tensor], Any]] = {
    "numpy": by_numpy,
    "numpy, detached": detached,
    "dlpack": by_dlpack,
    "a view": of_a_view,
}


@pytest.mark.parametrize("name", HANDED)
@pytest.mark.parametrize("leaf", [False, True])
def test_memory_handed_out_in_a_block(name: str, leaf: bool) -> None:
    """What rules had kept there is copied when it is handed out."""
    x = real(4)
    before = plain(x)
    with te.record():
        y = x * 2
        given = x if leaf else y
        loss = (y * y).sum() + x.exp().sum() + (x * x).sum()
        array = HANDED[name](given)
    array += 1
    te.backward(loss)
    close(g_of(x), 8 * before + before.exp() + 2 * before)


@pytest.mark.parametrize("name", ["numpy", "numpy, detached", "a view"])
@pytest.mark.parametrize("leaf", [False, True])
def test_memory_handed_out_after_a_block(name: str, leaf: bool) -> None:
    x = real(4)
    before = plain(x)
    with te.record():
        y = x * 2
        loss = (y * y).sum() + (x * x).sum()
    array = HANDED[name](x if leaf else y)
    array += 1
    te.backward(loss)
    close(g_of(x), 8 * before + 2 * before)


def test_what_is_read_after_it_was_handed_out_is_as_it_is_then() -> None:
    x = real(4)
    before = plain(x)
    with te.record():
        y = x * 2
        array = y.detach().numpy()
        array += 1  # a constant, as torch.autograd has it
        loss = (y * y).sum()
    array += 1
    te.backward(loss)
    close(loss, ((2 * before + 1) ** 2).sum())
    close(g_of(x), 4 * (2 * before + 1))


@pytest.mark.parametrize("size", [3, 10_000])
@pytest.mark.parametrize("way", ["from_numpy", "numpy before", "frombuffer"])
def test_memory_shared_before_the_block(way: str, size: int) -> None:
    """Nobody hears such a write; a sample of the elements tells of it."""
    if way == "numpy before":
        x = real(size)
        array: Any = x.numpy()
    elif way == "from_numpy":
        array = np.random.default_rng(0).standard_normal(size)
        x = torch.from_numpy(array)
    else:
        array = np.random.default_rng(0).standard_normal(size)
        x = torch.frombuffer(array, dtype=F64)
    with te.record():
        loss = (x * x).sum()
    te.backward(loss, keep=True)
    close(g_of(x), 2 * x)
    array[:] = array[::-1].copy() + 1
    before = plain(grad_of(x))
    with pytest.raises(te.OverwrittenError, match=r"x that the rule of mul reads(.|\n)*test_shared_memory.py"):
        te.backward(loss)
    close(g_of(x), before)


def test_a_batch_that_no_rule_reads_may_be_filled_again() -> None:
    array = np.ones(3)
    x, w = torch.from_numpy(array), real(3)
    with te.record():
        loss = (x + w).sum()
    array[:] = 5
    te.backward(loss)
    close(g_of(w), torch.ones(3, dtype=F64))


def test_writes_that_torch_tells_of_are_none_of_these() -> None:
    array = np.ones(3)
    x = torch.from_numpy(array)
    with te.record():
        loss = (x * x).sum()
        x.add_(1)
    te.backward(loss)
    x = torch.from_numpy(array)
    for _ in range(3):
        with te.record():
            loss = (x * x).sum()
        te.backward(loss)
        close(g_of(x), 2 * x)
        array += 1  # between two recordings


def test_every_kind_of_leaf_can_be_watched() -> None:
    for dtype in (np.bool_, np.uint8, np.int64, np.float16, np.float32, np.complex64):
        x = torch.from_numpy(np.ones((300, 2), dtype=dtype))[:, 1]
        w = real(300)
        with te.record():
            loss = (torch.where(x.real.bool() if x.is_complex() else x.bool(), w, 2 * w) * w).sum()
        te.backward(loss)
        close(g_of(w), 2 * w)
    empty = torch.from_numpy(np.ones((0, 2)))
    with te.record():
        loss = (empty * empty).sum()
    te.backward(loss)


def test_it_is_forgotten_with_the_memory() -> None:
    x = real(3)
    with te.record():
        y = x * 2
        array = y.detach().numpy()
    assert tapes.exposed
    del y, array
    gc.collect()
    with te.record():
        pass
    assert not tapes.exposed


def test_a_loop_that_never_sweeps_keeps_no_samples() -> None:
    w = real(3)
    for _ in range(200):
        te.relu(torch.from_numpy(np.ones(3)) * 1.0 + te.relu(w))
        te.relu(torch.from_numpy(np.ones(3)))
    assert len(te.global_tape().token.foreign) < 100
