"""The collector of garbage is put off while a program is built, and comes back as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import tape_engine as te
from tape_engine.program.collecting import Uncollected
from tests.tape_engine.program.common import draw, freeze


@pytest.fixture(autouse=True)
def back() -> Iterator[None]:
    yield
    gc.enable()


def test_it_comes_back_after_the_last() -> None:
    first, second = Uncollected(), Uncollected()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert not gc.isenabled()
    second.__exit__()
    assert gc.isenabled()


def test_it_stays_off_where_it_was() -> None:
    gc.disable()
    with Uncollected():
        pass
    assert not gc.isenabled()


def test_it_comes_back_after_an_error() -> None:
    with te.record() as tape:
        (draw(3) * 2).sum()
    with pytest.raises(te.NotRecordedError):
        tape.program(outputs=draw(3))
    assert gc.isenabled()


def test_nothing_is_collected_meanwhile() -> None:
    seen: list[bool] = []

    @te.op
    def doubled(x):  # type: ignore[no-untyped-def]
        return x * 2

    @doubled.rule
    def doubled_grad(g, out, x):  # type: ignore[no-untyped-def]
        seen.append(gc.isenabled())
        return g * 2

    program = freeze(lambda x: doubled(x).sum(), [draw(3)])
    assert seen == [False]
    program.step(draw(3))
    assert gc.isenabled()
