"""The threads of a loop: torch's own, a pool where these cannot be had, and as many as there are to be."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine.program.backends.native import team
from tests.helpers import close
from tests.tape_engine.program.common import draw, follows, freeze

pytest.importorskip("llvmlite")

Tensor = torch.Tensor

ROWS = 1003


@pytest.fixture(autouse=True)
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are made of tensors that a test can afford, in three parts whatever the machine has."""
    monkeypatch.setattr("tape_engine.program.backends.native.plan.ROW_BYTES", 1 << 10)
    monkeypatch.setattr("tape_engine.program.backends.native.team.cores", lambda: 3)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)


def function(X: Tensor, Y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ((X @ w + b).relu() - Y).pow(2).mean()


def made() -> tuple[te.Program, list[Tensor]]:
    params = [draw(7, 1), draw(1)]
    program = freeze(function, [draw(ROWS, 7), draw(ROWS, 1)], params, backend="native")
    assert program._step.source is not None
    told = program._step.native
    assert told is not None
    assert told.loops == 1, str(told)
    return program, params


def right(program: te.Program, params: list[Tensor]) -> None:
    follows(program, function, [draw(ROWS, 7), draw(ROWS, 1)], params, tol=1e-9)


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments with which a function is called from now on."""
    calls: list[tuple[Any, ...]] = []
    real: Callable[..., Any] = getattr(owner, name)

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(owner, name, noted)
    return calls


@pytest.mark.skipif(team._library() is None, reason="torch has no OpenMP library here whose threads can be had")
def test_torchs_own_threads_do_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    program, params = made()
    pooled = counted(monkeypatch, team, "workers")
    right(program, params)
    assert not pooled


def test_a_pool_does_them_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_library", lambda: None)
    program, params = made()
    pooled = counted(monkeypatch, team, "workers")
    right(program, params)
    assert len(pooled) % 2 == 0
    assert pooled


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_team_of_another_size_does_all_parts(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program, params = made()
    right(program, params)
    monkeypatch.setattr("torch.get_num_threads", lambda: count)
    right(program, params)


def test_teams_of_several_threads_at_once() -> None:
    programs = [made() for _ in range(4)]
    examples = [[draw(ROWS, 7), draw(ROWS, 1)] for _ in programs]
    wanted = [function(*inputs, *params) for inputs, (_, params) in zip(examples, programs, strict=True)]

    def run(i: int) -> list[Tensor]:
        return [programs[i][0](*examples[i]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for got, right_one in zip(pool.map(run, range(4)), wanted, strict=True):
            for each in got:
                close(each, right_one, 1e-9)


def test_an_index_out_of_range_is_told_whichever_part_finds_it() -> None:
    table, picked = draw(5, 2), torch.randint(0, 5, (ROWS,))
    program = freeze(lambda i, X, t: (t[i] * X).square().sum(), [picked, draw(ROWS, 2)], [table], backend="native")
    for place in (0, ROWS // 2, ROWS - 1):
        wrong = picked.clone()
        wrong[place] = 5
        with pytest.raises(IndexError):
            program.step(wrong, draw(ROWS, 2))
        program.step(picked, draw(ROWS, 2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    program, params = made()
    right(program, params)
    inputs = [draw(ROWS, 7), draw(ROWS, 1)]
    wanted = float(function(*inputs, *params))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on: that a process of several threads is forked
        child = os.fork()
    if child == 0:
        os._exit(0 if abs(float(program(*inputs)) - wanted) < 1e-9 else 1)
    assert os.waitpid(child, 0)[1] == 0
