"""The inductor backend: what it hands to torch's compiler, what stays a call, and that a replay means the same.

Most run with a compiler of torch's that needs no C++ compiler (`aot_eager`: the graph as it was handed over).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tape_engine as te
from tape_engine.program.backends import inductor
from tests.helpers import close, g_of, plain
from tests.tape_engine.program.common import draw, follows, freeze

Tensor = torch.Tensor


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "COMPILER", "aot_eager")


def layers(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    hidden = torch.relu(x @ w + b)
    return F.mse_loss(hidden.softmax(1), y) + hidden.max(0)[0].sum()


@pytest.mark.usefixtures("bare")
def test_replays_follow_torch() -> None:
    x, y, w, b = draw(5, 3), draw(5, 4), draw(3, 4), draw(4)
    program = freeze(layers, [x, y], [w, b], backend="inductor")
    for _ in range(2):
        follows(program, layers, [draw(5, 3), draw(5, 4)], [w, b])
        w += 0.5  # live
    follows(program, layers, [draw(3, 5).t(), draw(5, 4)], [w, b])  # laid otherwise in memory
    assert "compiled by aot_eager" in str(program)
    assert "backend inductor" in str(program)
    assert "compiled(" in program.code


@pytest.mark.usefixtures("bare")
def test_random_operations_stay_calls_of_torch() -> None:
    def function(x: Tensor) -> Tensor:
        return F.dropout(torch.sin(x) * 2, 0.5).exp().sum()

    x = draw(4, 5)
    program = freeze(function, [x], backend="inductor")
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    wanted = function(leaf)
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(3)
    close(program.step(x), wanted.detach())
    close(g_of(x), leaf.grad)
    assert "bernoulli" in program.code


@pytest.mark.usefixtures("bare")
def test_a_changed_decision_is_refused_before_anything_is_written() -> None:
    count = torch.zeros(())

    def function(x: Tensor) -> Tensor:
        count.add_(1)
        y = torch.tanh(x * 2)
        return (y * y).sum() if y.sum() > 0 else y.sum()

    x = torch.ones(3)
    program = freeze(function, [x], backend="inductor")
    assert count == 1
    program.step(x)
    assert count == 2
    before = plain(g_of(x))
    with pytest.raises(te.GuardError):
        program.step(-x)
    assert count == 2
    close(g_of(x), before)


@pytest.mark.usefixtures("bare")
def test_running_statistics_are_written() -> None:
    net, twin = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    program = freeze(lambda x: net(x).pow(3).sum(), [draw(6, 3)], backend="inductor")
    for mine, other in zip(net.buffers(), twin.buffers(), strict=True):
        other.copy_(mine)
    x = draw(6, 3)
    close(program.step(x), twin(x).pow(3).sum().detach())
    for mine, other in zip(net.buffers(), twin.buffers(), strict=True):
        close(mine, other)


@pytest.mark.usefixtures("bare")
def test_results_belong_to_the_caller() -> None:
    x = draw(3, 4)
    program = freeze(lambda x: ((y := torch.sin(x) * 2).sum(), y.t(), y), [x], backend="inductor")
    first = program.step(x)
    held = (*first, x.g)  # type: ignore[attr-defined]
    kept = [t.clone() for t in held]
    program.step(draw(3, 4))
    for got, wanted in zip(held, kept, strict=True):
        close(got, wanted)
    places = [t.untyped_storage().data_ptr() for t in held]
    assert len(set(places)) == len(places)


def test_without_a_cpp_compiler_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(te.BackendError, match=r"the inductor backend needs a C\+\+ compiler[\s\S]*fix: install one"):
        freeze(lambda x: (x * 2).sin().sum(), [draw(3)], backend="inductor")


@pytest.mark.slow
def test_with_a_cpp_compiler_or_an_error_that_names_it() -> None:
    def function(x: Tensor) -> Tensor:
        return (torch.sin(x) * x).sum()

    x = draw(4, 3)
    if inductor.missing(torch.device("cpu")):
        with pytest.raises(te.BackendError, match=r"C\+\+ compiler"):
            freeze(function, [x], backend="inductor")
    else:
        program = freeze(function, [x], backend="inductor")
        follows(program, function, [draw(4, 3)])
        assert "compiled by inductor" in str(program)
