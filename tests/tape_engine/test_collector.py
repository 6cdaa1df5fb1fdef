"""Python's garbage collector: it does not look through a recording that grows, and is as before afterwards."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine import collector

Tensor = torch.Tensor

SET = (700, 10, 10)
PATIENT = (700 + 100 * collector.OBJECTS, 10, 10)


@pytest.fixture(autouse=True)
def as_usual() -> Iterator[None]:
    before = gc.get_threshold()
    collector.let_go()  # the tape of another test may be waited for
    gc.collect()
    x = torch.randn(3)
    with te.record() as tape:  # the recording before
        for _ in range(100):
            x = x * 2
    assert tape.length == 100
    del tape, x
    gc.collect()
    gc.set_threshold(*SET)
    yield
    gc.set_threshold(*before)


def chain(x: Tensor) -> Tensor:
    for _ in range(300):
        x = torch.tanh(x * 1.5)
    return x.sum()


def step(x: Tensor) -> None:
    with te.record():
        C = chain(x)
    te.backward(C, wrt=[x])


def test_a_step_is_not_looked_through_until_it_is_swept() -> None:
    collected: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            collected.append(info["generation"])

    x = torch.randn(3)
    gc.collect()
    for _ in range(2):
        step(x)  # what Python frees for the first time it puts by, and counts as if it were there
    made = [[i] for i in range(2_000)]
    del made
    gc.callbacks.append(note)
    try:
        for _ in range(5):
            step(x)
        assert not collected
        made = [[i] for i in range(2_000)]
        assert collected, "the user's own objects are"
        del made
    finally:
        gc.callbacks.remove(note)


@pytest.mark.parametrize("sweep", [te.backward, lambda C: te.grad(C, C)])
def test_it_waits_from_the_opening_of_a_block_to_the_sweep(sweep: Any) -> None:
    x = torch.randn(3)
    assert gc.get_threshold() == SET
    with te.record():
        assert gc.get_threshold() == PATIENT
        with te.record():
            assert gc.get_threshold() == PATIENT
        C = (x * 2).sum()
    assert gc.get_threshold() == PATIENT
    sweep(C)
    assert SET < gc.get_threshold() < (gc.get_count()[0] + 800, 10, 10), "of the recording nothing is counted"
    gc.collect()
    assert gc.get_threshold() == SET
    del C
    assert gc.get_threshold() == SET


def test_what_was_swept_and_is_still_there_is_looked_at_as_late_as_other_objects() -> None:
    collected: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            collected.append(len(made))

    x = torch.randn(3)
    gc.collect()
    with te.record():
        C = chain(x)
    te.backward(C, wrt=[x])
    made: list[list[int]] = []
    gc.callbacks.append(note)
    try:
        made += [[i] for i in range(600)]
        assert not collected
        for i in range(1_000):
            made.append([i])
    finally:
        gc.callbacks.remove(note)
    assert len(collected) >= 1
    assert gc.get_threshold() == SET


def test_a_sweep_in_an_open_block_does_not_end_it() -> None:
    x = torch.randn(3)
    with te.record():
        te.backward((x * 2).sum())
        assert gc.get_threshold() == PATIENT
        C = (x * 2).sum()
    te.backward(C)
    del C
    assert gc.get_threshold() == SET


def test_it_waits_no_longer_than_the_tape_is_there() -> None:
    x = torch.randn(3)
    with te.record() as tape:
        C = x * 2
    del C
    assert gc.get_threshold() == PATIENT
    del tape
    gc.collect()
    assert gc.get_threshold() == SET


def test_an_exception_in_a_block_or_in_a_sweep_leaves_it_as_it_was() -> None:
    x = torch.randn(3)
    with pytest.raises(RuntimeError), te.record():
        x @ torch.randn(4)
    gc.collect()
    assert gc.get_threshold() == SET
    with te.record():
        C = x * 2
    with pytest.raises(te.TapeError):
        te.backward(C)  # no scalar
    del C
    gc.collect()
    assert gc.get_threshold() == SET


def test_what_the_user_sets_in_a_block_stays() -> None:
    x = torch.randn(3)
    with te.record():
        gc.set_threshold(900, 5, 5)
        C = (x * 2).sum()
    te.backward(C)
    assert gc.get_threshold() == (900, 5, 5)


@pytest.mark.parametrize("threshold", [100_000_000, 2**31 - 1, collector.MOST])
def test_where_it_waits_long_it_waits_as_long(threshold: int) -> None:
    gc.set_threshold(threshold, 10, 10)
    step(torch.randn(3))
    step(torch.randn(3))
    assert gc.get_threshold() == (threshold, 10, 10)


def test_it_waits_for_no_more_objects_than_the_recording_before_made() -> None:
    """Rings of objects that hold much memory must not pile up in a block."""
    x = torch.randn(3)
    with te.record():
        assert gc.get_threshold() == PATIENT
        C = x * 2
    del C
    gc.collect()
    with te.record():
        assert gc.get_threshold() == (700 + 1 * collector.OBJECTS, 10, 10)


def test_a_tape_that_was_swept_in_its_block_is_not_waited_for() -> None:
    with te.record() as tape:
        C = (torch.randn(3) * 2).sum()
        te.backward(C)
    gc.collect()
    assert gc.get_threshold() == SET
    assert tape.length == 3


def test_where_it_is_turned_off_it_stays_so() -> None:
    gc.set_threshold(0, 10, 10)
    x = torch.randn(3)
    with te.record():
        assert gc.get_threshold() == (0, 10, 10)
        C = (x * 2).sum()
    te.backward(C)
    assert gc.get_threshold() == (0, 10, 10)


def test_blocks_of_several_threads_end_it_together() -> None:
    x, opened, closed = torch.randn(3), threading.Event(), threading.Event()

    def record() -> None:
        with te.record():
            C = (x.clone() * 2).sum()
            opened.set()
            closed.wait(10)
        te.backward(C)

    thread = threading.Thread(target=record)
    thread.start()
    opened.wait(10)
    step(torch.randn(3))
    assert gc.get_threshold() == PATIENT
    closed.set()
    thread.join()
    gc.collect()
    assert gc.get_threshold() == SET
