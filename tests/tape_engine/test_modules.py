"""Scopes from modules: each called module names the nodes inside it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import tape_engine as te
from tests.helpers import Tensor, grad_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.twice = nn.ModuleList([nn.Tanh(), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        for each in self.twice:
            x = each(x)
        return x * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.body = nn.Sequential(Block(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x)).sum()


def scopes(tape: te.Tape) -> list[str]:
    return ["/".join(node.scope) for node in tape.nodes]


def test_modules_make_scopes_by_themselves() -> None:
    x = torch.randn(2, 3)
    with te.record() as tape:
        Net()(x * 2)
    found = list(dict.fromkeys(scope for scope in scopes(tape)))
    assert [scope for scope in found if scope] == [
        "Net/first/first.fc",
        "Net/first/first.twice.0",
        "Net/first/first.twice.1",
        "Net/first",
        "Net/body/body.0/body.0.fc",
        "Net/body/body.0/body.0.twice.0",
        "Net/body/body.0/body.0.twice.1",
        "Net/body/body.0",
        "Net/body/body.1",
        "Net",
    ] or [scope for scope in found if scope] == [
        "Net/first/fc",
        "Net/first/twice.0",
        "Net/first/twice.1",
        "Net/first",
        "Net/body/0/fc",
        "Net/body/0/twice.0",
        "Net/body/0/twice.1",
        "Net/body/0",
        "Net/body/1",
        "Net",
    ]


def test_a_module_called_twice_makes_its_scope_twice() -> None:
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    with te.record() as tape:
        layer(torch.relu(layer(x)))
    assert scopes(tape) == ["Linear", "Linear", "", "Linear", "Linear"]


def test_scopes_of_the_user_around_those_of_modules() -> None:
    layer = nn.ReLU()
    x = torch.randn(2, 3)
    with te.record() as tape:
        with te.scope("outer"):
            layer(x)
        layer(x)
    assert scopes(tape) == ["outer/ReLU", "ReLU"]


def test_a_scope_of_the_user_inside_a_module() -> None:
    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with te.scope("part"):
                x = x * 2
            return x + 1

    with te.record() as tape:
        Inside()(torch.randn(2))
    assert [set(scope.split("/")) for scope in scopes(tape) if scope] == [{"Inside", "part"}, {"Inside"}]
    assert tape.nodes[-2].scope == ("Inside", "part")


def test_an_exception_in_a_module_closes_its_scope() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError(1)

    net, relu, x = nn.Sequential(nn.ReLU(), Fails()), nn.ReLU(), torch.randn(2)
    with te.record() as tape:
        with pytest.raises(KeyError):
            net(x)
        x * 2
        relu(x)
    assert scopes(tape) == ["Sequential/0", "", "ReLU"]


def test_modules_outside_a_block_are_not_listened_to() -> None:
    function: Any = nn.Module._call_impl
    plain = function.__code__
    layer = nn.ReLU()
    layer(torch.randn(2))
    for _ in range(3):
        with te.record():
            assert function.__code__ is not plain
            with te.record():
                layer(torch.randn(2))
            assert function.__code__ is not plain
            assert not torch_module._global_forward_pre_hooks, "with one, each call takes the long way round"
            assert not torch_module._global_forward_hooks
        assert nn.Module._call_impl is function
        assert function.__code__ is plain


def test_what_somebody_put_around_the_call_of_modules_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own: Any = nn.Module._call_impl
    calls = []

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(self).__name__)
        return own(self, *args, **kwargs)

    net, x = nn.Sequential(nn.ReLU()), torch.randn(2)
    with te.record() as before:
        net(x)
    monkeypatch.setattr(nn.Module, "_call_impl", counting)
    with te.record() as tape:
        net(x)
    assert nn.Module._call_impl is counting
    net(x)
    assert calls == ["Sequential", "ReLU"] * 2
    assert scopes(tape) == scopes(before) == ["Sequential/0"]
    monkeypatch.undo()
    with te.record() as after:
        net(x)
    assert scopes(after) == ["Sequential/0"]
    assert len(calls) == 4


def test_operations_of_a_module_s_hooks_stand_in_its_scope() -> None:
    layer, x = nn.ReLU(), torch.randn(3)
    layer.register_forward_hook(lambda module, args, result: result * 3)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with te.record() as tape:
        nn.Sequential(layer)(x) + 1
    assert scopes(tape) == ["Sequential/0"] * 3 + [""]


def test_modules_of_other_threads_leave_no_trace() -> None:
    layer, x = nn.ReLU(), torch.randn(2)
    done: list[Any] = []

    def other() -> None:
        for _ in range(20):
            nn.Sequential(nn.Linear(2, 2), nn.ReLU())(torch.randn(1, 2))
        done.append(1)

    with te.record() as tape:
        thread = threading.Thread(target=other)
        thread.start()
        for _ in range(20):
            layer(x)
        thread.join()
    assert done == [1]
    assert scopes(tape) == ["ReLU"] * 20


def test_user_s_own_hooks_run_and_are_recorded() -> None:
    layer, x = nn.ReLU(), torch.randn(3)
    layer.register_forward_hook(lambda module, args, result: result * 3)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with te.record() as tape:
        y = layer(x)
    assert torch.equal(y, torch.relu(x * 2) * 3)
    assert [node.op.name for node in tape.nodes] == ["mul", "relu", "mul"]
    te.backward(y.sum())
    assert torch.equal(grad_of(x), 6.0 * (x > 0))


def test_buffers_and_shared_parameters_have_names() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net.append(net[0])
    with te.record() as tape:
        net(torch.randn(4, 3))
    found = {value.name for value in tape.leaves if value.name}
    assert {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"} <= found
