"""Decisions that the recorded code took by a tensor's elements."""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tape_engine as te
from tests.helpers import close, g_of
from tests.tape_engine.program.common import F64, draw, follows, freeze, snapshot, unchanged

Tensor = torch.Tensor
HERE = Path(__file__).name


# -- guards --------------------------------------------------------------------------------------------------


def branch_if(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x * 3


def branch_item(x: Tensor) -> Tensor:
    k = int(x[0].sign().item())
    return x * k


def branch_bool(x: Tensor) -> Tensor:
    return x.exp() if bool((x > 0).all()) else x


def branch_float(x: Tensor) -> Tensor:
    return x * float(x.sum() > 0)


def branch_any(x: Tensor) -> Tensor:
    return x.exp() if torch.any(x > 0) else x


def branch_tolist(x: Tensor) -> Tensor:
    return x * (x > 0).tolist()[0]  # type: ignore[no-any-return]


def branch_equal(x: Tensor) -> Tensor:
    return x * 2 if torch.equal(x, x.abs()) else x


def branch_allclose(x: Tensor) -> Tensor:
    return x * 2 if torch.allclose(x, x.abs()) else x


def branch_argmax(x: Tensor) -> Tensor:
    return x[int(torch.sign(x[0]))] * 2


def branch_while(x: Tensor) -> Tensor:
    y = x * 4
    while (y.abs() > 3).any():
        y = y / 2
    return y


BRANCHES = [
    branch_if, branch_item, branch_bool, branch_float, branch_any, branch_tolist, branch_equal, branch_allclose,
    branch_argmax,
]  # fmt: skip


def up(*signs: float) -> Tensor:
    return torch.tensor(signs, dtype=F64) * (1 + torch.rand(len(signs), dtype=F64))


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda f: f.__name__)
def test_guards(branch: Callable[[Tensor], Tensor]) -> None:
    n, w = torch.zeros(()), draw(3)

    def function(x: Tensor) -> Tensor:
        n.add_(1)
        y = branch(x * 1.0)
        w.mul_(2.0)
        return y * torch.ones(3, dtype=F64)

    x = up(1, 1, 1)
    program = freeze(function, [x])
    same = up(1, 1, 1)
    close(program(same), branch(same) * torch.ones(3, dtype=F64))
    program.step(same, seed=torch.ones(3, dtype=F64))
    other = up(-1, -1, -1)
    program_inputs = (other, n, w)
    before = snapshot(*program_inputs)
    for call in (lambda: program(other), lambda: program.step(other, seed=torch.ones(3, dtype=F64))):
        with pytest.raises(te.GuardError) as caught:
            call()  # type: ignore[no-untyped-call]
        text = str(caught.value)
        line = next(i for i, s in enumerate(_source(branch), branch.__code__.co_firstlineno) if GUARDED.search(s))
        assert f"{HERE}:{line}" in text, text
        assert isinstance(caught.value, RuntimeError)
        unchanged(before, *program_inputs)
    close(program(same), branch(same) * torch.ones(3, dtype=F64))  # and it goes on


GUARDED = re.compile(r"^\s+(if|k =|return x(\.exp\(\) if|\[int| \* (float|\(x|2 if)))")


def _source(function: Any) -> list[str]:
    return inspect.getsourcelines(function)[0]


def test_a_guard_tells_line_and_both_values() -> None:
    x = torch.tensor([2.0, 1.0])
    with te.record() as tape:
        k = int(x[0].item())
        y = x * k
    program = tape.program(inputs=x, outputs=y)
    with pytest.raises(te.GuardError) as caught:
        program(torch.tensor([5.0, 1.0]))
    text = str(caught.value)
    assert "2.0" in text
    assert "5.0" in text
    assert "k = int(x[0].item())" in text
    assert f"{HERE}:" in text


def test_a_loop_that_runs_as_often() -> None:
    x = up(1, 1, 1)
    program = freeze(branch_while, [x])
    close(program(x.flip(0)), branch_while(x.flip(0)))
    with pytest.raises(te.GuardError):
        program(x * 4)


def test_a_list_with_nan_in_it() -> None:
    x = torch.tensor([float("nan"), 1.0])
    with te.record() as tape:
        x.tolist()
        y = x * 2
    program = tape.program(inputs=x, outputs=y)
    assert program(x.clone())[1] == 2
    with pytest.raises(te.GuardError):
        program(torch.tensor([float("nan"), 2.0]))


def test_a_guard_of_nan() -> None:
    x = torch.tensor([float("nan"), 1.0])
    with te.record() as tape:
        x.sum().item()
        y = x * 2
    program = tape.program(inputs=x, outputs=y)
    assert program(x)[1] == 2
    with pytest.raises(te.GuardError):
        program(torch.ones(2))


SIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "nonzero": lambda x: x[(x > 0).nonzero().squeeze(1)] * 2,
    "mask": lambda x: x[x > 0] * 2,
    "mask, then a reduction": lambda x: x[x > 0].sum() * 2,
    "masked_select": lambda x: torch.masked_select(x, x > 0).exp(),
    "where": lambda x: x[torch.where(x > 0)[0]].exp(),
    "unique": lambda x: torch.unique((x > 0) * torch.arange(5)) * x.sum(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, (x > 0).long() + 1).exp(),
    "mask of two": lambda x: x[None].expand(2, 5)[:, x > 0].exp(),
    "argwhere": lambda x: x[torch.argwhere(x > 0)[:, 0]] * 2,
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_depend_on_the_elements(name: str) -> None:
    function, n = SIZED[name], torch.zeros(())

    def counting(x: Tensor) -> Tensor:
        n.add_(1)
        return function(x)

    x = up(1, -1, 1, -1, 1)
    program = freeze(counting, [x])
    n.zero_()
    like = up(1, 1, -1, 1, -1)  # another place, the same size
    wanted = function(like)
    seed = torch.rand_like(wanted)
    close(program(like), wanted)
    close(program.step(like, seed=seed), wanted)
    tracked = like.clone().requires_grad_()
    close(g_of(like), torch.autograd.grad(function(tracked), tracked, seed)[0])
    assert n == 2
    for signs in ((1, 1, 1, 1, 1), (1, -1, -1, -1, -1), (-1, -1, -1, -1, -1)):
        other = up(*signs)
        before = snapshot(other, n)
        for call in (lambda: program(other), lambda: program.step(other, seed=seed)):  # noqa: B023
            with pytest.raises(te.GuardError) as caught:
                call()  # type: ignore[no-untyped-call]
            assert f"{HERE}:" in str(caught.value)
        unchanged(before, other, n)
    close(program(like), wanted)


def test_masked_assignment_needs_no_guard() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1.0
        y[x > 0] = 0.0
        return y.square().sum()

    program = freeze(function, [up(1, -1, 1)])
    follows(program, function, [up(-1, -1, 1)])
    follows(program, function, [up(-1, -1, -1)])


def test_a_guard_after_batch_norm_comes_before_its_running_statistics() -> None:
    net = nn.BatchNorm1d(3).double()
    x = draw(5, 3).abs()

    def function(x: Tensor) -> Tensor:
        y = net(x)
        return y.sum() if x.sum() > 0 else -y.sum()  # type: ignore[no-any-return]

    program = freeze(function, [x])
    buffers = list(net.buffers())
    before = snapshot(x, *buffers)
    with pytest.raises(te.GuardError):
        program(-x)
    with pytest.raises(te.GuardError):
        program.step(-x)
    unchanged(before, x, *buffers)


def test_classes_may_change_between_replays() -> None:
    """What torch asks of a tensor's elements only to refuse them is no decision of the recorded code."""
    x, y = draw(3, 5), torch.tensor([0, 2, 1])
    program = freeze(lambda x, y: (F.one_hot(y, 5) * x).sum(), [x, y])
    for classes in ([4, 4, 0], [1, 1, 1]):
        y = torch.tensor(classes)
        close(program(x, y), x[torch.arange(3), y].sum())
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        program(x, torch.tensor([0, 5, 1]))


FUNCTIONS: Any = F  # one_hot is looked up at the call, as users do; its annotations know neither `input` nor mistakes

BAD_CLASSES: list[Any] = [
    lambda y: F.one_hot(y, 2),
    lambda y: F.one_hot(-y, 5),
    lambda y: F.one_hot(y.double(), 5),
    lambda y: FUNCTIONS.one_hot(),
    lambda y: FUNCTIONS.one_hot(y, "a"),
    lambda y: FUNCTIONS.one_hot(3, 5),
]


@pytest.mark.parametrize("bad", BAD_CLASSES)
def test_classes_that_torch_refuses(bad: Any) -> None:
    y = torch.tensor([0, 2, 1])
    with pytest.raises((RuntimeError, TypeError)) as alone:
        bad(y)
    with te.record() as tape, pytest.raises(type(alone.value)) as heard:
        bad(y)
    assert str(heard.value) == str(alone.value)
    assert not [node for node in tape.nodes if node.op.name == "scatter"]


def test_classes_in_a_vectorised_function_and_by_keyword() -> None:
    y = torch.tensor([0, 2, 1])
    wanted = F.one_hot(y, 5), F.one_hot(y)
    with te.record():
        got = [torch.func.vmap(lambda each: F.one_hot(each, 5))(y), FUNCTIONS.one_hot(input=y, num_classes=5)]
        largest = F.one_hot(y)
        got += [F.one_hot(y[:0], 4), F.one_hot(y[0], 5)]
    for each, w in zip(got, [wanted[0], wanted[0], wanted[0][:0, :4], wanted[0][0]], strict=True):
        assert torch.equal(each, w)
    assert torch.equal(largest, wanted[1])


# -- decisions outside a block -------------------------------------------------------------------------------


def positive_sum(Z: Tensor) -> bool:
    return bool(Z.sum() > 0)


OUTSIDE: dict[str, Callable[[Tensor], bool]] = {
    "bool": positive_sum,
    "float": lambda Z: float(Z.sum()) == 3.0,
    "item": lambda Z: Z[0, 0].item() > 0,
    "int": lambda Z: int(Z.sum()) > 0,
    "tolist": lambda Z: (Z > 0).tolist()[0][0],
    "mask": lambda Z: bool(((Z > 0) & (Z < 10)).all()),
    "argmax": lambda Z: int(Z.flatten().argmax()) == 1,
    "count": lambda Z: (Z > 0).sum().item() == 2,
    "equal": lambda Z: torch.equal(Z, Z.abs()),
    "allclose": lambda Z: torch.allclose(Z, Z.abs()),
    "no_grad": torch.no_grad()(positive_sum),
    "detached": lambda Z: bool(Z.detach().mean() > 0),
    "float of a mask": lambda Z: bool((Z > 0).float().mean() > 0.5),
    "kept and not used": lambda Z: bool(te.relu(Z).max() > 0.5),
    "contains": lambda Z: 1.0 in Z,
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_decisions_outside_a_block_are_guards(name: str) -> None:
    decide = OUTSIDE[name]

    def function(X: Tensor) -> Tensor:
        Z = te.lin(X, w, b)
        out: Tensor = Z.square().sum() if decide(Z) else Z.sum()
        return out

    w, b = torch.eye(2), torch.zeros(2)
    X = torch.tensor([[1.0, 2.0]])
    C = function(X)
    program = te.global_tape().program(inputs=X, outputs=C)
    close(program(X.clone()), torch.tensor(5.0))
    for call in (program, program.step):
        with pytest.raises(te.GuardError, match=f"{HERE}:"):
            call(-X)
    assert g_of(w) is None
    close(program.step(X), torch.tensor(5.0))


def test_a_decision_by_a_parameter_or_a_value_not_on_the_way_is_a_guard() -> None:
    w, v, b = torch.ones(2, 1), torch.ones(2, 1), torch.zeros(1)
    X = torch.ones(3, 2)
    Z = te.lin(X, w, b)
    C = te.lin(X, v, b) if Z.sum() > 0 else X
    del Z
    C = C * 2 if v.norm() < 2 else C
    program = te.global_tape().program(inputs=X, outputs=C)
    close(program(X * 2), X.sum(1, keepdim=True) * 4)
    with pytest.raises(te.GuardError):
        program(-X)
    v.mul_(3)
    with pytest.raises(te.GuardError):
        program(X)


def test_printing_a_loss_outside_a_block_decides_nothing() -> None:
    w, b = torch.ones(2, 1), torch.zeros(1)
    for _ in range(3):
        X = draw(3, 2, dtype=torch.float32)
        C = te.lin(X, w, b).square().mean()
        assert f"{C:.3f}"
        assert f"{C.item()} {float(C)} {C.tolist()}"
    program = te.global_tape().program(inputs=X, outputs=C)
    other = draw(3, 2, dtype=torch.float32)
    close(program(other), (other @ w).square().mean(), 1e-5)


def test_a_loop_that_decides_and_never_sweeps_keeps_a_bounded_number() -> None:
    X, w, b = torch.ones(3, 2), torch.ones(2, 1), torch.zeros(1)
    right = torch.zeros((), dtype=torch.long)
    kept: list[weakref.ref[Tensor]] = []
    C = X.sum()
    for _ in range(300):
        Z = te.lin(X, w, b)
        kept.append(weakref.ref(Z))
        right = right + (Z > 0).sum()
        C = Z.square().mean()
        assert float(C) > 0
    tape = te.global_tape()
    assert right == 900
    gc.collect()
    assert sum(ref() is not None for ref in kept) == 1
    assert len(tape) < 100
    assert len(tape.decisions) < 40


def test_decisions_that_were_given_up_refuse_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tape_engine.recorder.decisions.MOST", 10)
    monkeypatch.setattr("tape_engine.recorder.decisions.FEW", 2)
    w, b = torch.ones(2, 1), torch.zeros(1)
    X = torch.ones(3, 2)
    Z = te.lin(X, w, b)
    for _ in range(10):
        Z = Z * 2 if Z.sum() > 0 else Z
    with pytest.raises(te.NotRecordedError, match="more decisions"):
        te.global_tape().program(inputs=X, outputs=Z)
    C = te.lin(X, w, b)
    close(te.global_tape().program(inputs=X, outputs=C)(X), X.sum(1, keepdim=True))
