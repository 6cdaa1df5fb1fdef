"""The CUDA graph backend, with a stand-in for the graph: it calls again what was captured, in the same memory.

What a GPU does with the calls is torch's; here is what the backend adds: memory of its own for inputs, live tensors by
address, captures that change nothing, results that are copied out, and what it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tape_engine as te
from tape_engine.program.backends import cudagraph
from tests.helpers import close, g_of, plain
from tests.tape_engine.program.common import draw, follows, freeze

Tensor = torch.Tensor


class StandIn:
    """A graph for the CPU: it keeps the call, and writes what a later one returns where the first one's results lie."""

    captures = 0
    replays = 0

    def capture(self, run: Callable[[], Any], generators: Sequence[torch.Generator]) -> Any:
        StandIn.captures += 1
        self.run = run
        for _ in range(2):  # as a CUDA graph warms up
            run()
        self.results = run()
        return self.results

    def replay(self) -> None:
        StandIn.replays += 1
        for mine, made in zip(self.results, self.run(), strict=True):
            for a, b in zip(mine, made, strict=True):
                if a is not b:
                    a.copy_(b)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(cudagraph, "make_graph", StandIn)
    monkeypatch.setattr(cudagraph, "DEVICE", "cpu")
    StandIn.captures = StandIn.replays = 0
    return StandIn


def loss(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w).pow(2).sum()


def test_replays_follow_torch(graphs: type[StandIn]) -> None:
    x, w = draw(5, 3), draw(3, 4)
    program = freeze(loss, [x], [w], backend="cudagraph")
    for _ in range(3):
        follows(program, loss, [draw(5, 3)], [w])
        w += 0.5
    assert graphs.captures == 2  # of the forward pass, and of the step
    assert graphs.replays == 6
    assert "backend cudagraph" in str(program)
    assert "captured at the first replay" in str(program)


def test_a_live_tensor_that_moved_is_captured_anew(graphs: type[StandIn]) -> None:
    x, w = draw(5, 3), draw(3, 4)
    program = freeze(loss, [x], [w], backend="cudagraph")
    program.step(x)
    program.step(x)
    assert graphs.captures == 1
    w.data = draw(3, 4)
    follows(program, loss, [x], [w])
    assert graphs.captures == 3  # the step anew, and the forward pass
    w.data = draw(4, 3).t()  # another layout
    follows(program, loss, [x], [w])
    assert graphs.captures == 5


def test_a_capture_draws_nothing_and_writes_nothing() -> None:
    net, twin = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()

    def function(net: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(net(x), 0.5).sum()

    program = freeze(lambda x: function(net, x), [draw(6, 3)], backend="cudagraph")
    for mine, other in zip(net.buffers(), twin.buffers(), strict=True):
        other.copy_(mine)
    for _ in range(3):
        x = draw(6, 3)
        torch.manual_seed(5)
        wanted = function(twin, x)
        drawn = torch.get_rng_state()
        torch.manual_seed(5)
        close(program.step(x), wanted.detach())
        assert torch.equal(torch.get_rng_state(), drawn)
        for mine, other in zip(net.buffers(), twin.buffers(), strict=True):
            close(mine, other)


def test_results_belong_to_the_caller_unless_copies_are_not_wanted() -> None:
    x = draw(3)
    program = freeze(lambda x: (x * x).exp().sum(), [x], backend="cudagraph")
    first, g = program.step(x), g_of(x)
    kept = first.clone(), plain(g)
    program.step(draw(3))
    close(first, kept[0])
    close(g, kept[1])
    program = freeze(lambda x: (x * x).exp().sum(), [x], backend="cudagraph", copy=False)
    assert program.step(x).data_ptr() == program.step(x).data_ptr()


def test_what_was_given_may_change_afterwards() -> None:
    x = draw(3)
    program = freeze(lambda x: (x * x).exp().sum(), [x], backend="cudagraph")
    program.step(x)
    follows(program, lambda x: (x * x).exp().sum(), [draw(3)])
    assert program(x.clone()).item() == pytest.approx((x * x).exp().sum().item())


def writes_to_its_input(x: Tensor) -> Tensor:
    return x.mul_(2).sum()


@te.op
def seen(x: Tensor) -> Tensor:
    return x * float(x.sum())


@seen.rule
def seen_grad(g, out, x):  # type: ignore[no-untyped-def]
    return g


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.exp() if x.sum() > -1e9 else x, r"waits for a value"),
        (lambda x: x[x > -1e9].sum(), r"the shape of what index returns depends on elements|waits for a value"),
        (seen, r"seen is Python code"),
        (writes_to_its_input, r"the recorded code writes to an input"),
    ],
)
def test_refusals(function: Callable[[Tensor], Tensor], why: str) -> None:
    with pytest.raises(
        te.BackendError, match=rf"cannot be captured as a CUDA graph: (.*{why})[\s\S]*fix: backend='auto'"
    ):
        freeze(function, [draw(3)], backend="cudagraph")


def test_a_refusal_names_the_line() -> None:
    with pytest.raises(te.BackendError, match=r"test_cudagraph\.py:\d+"):
        freeze(lambda x: x.exp() if x.sum() > -1e9 else x, [draw(3)], backend="cudagraph")


def test_tensors_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(3)
    program = freeze(lambda x: x.sin().sum(), [x], backend="python")
    monkeypatch.setattr(cudagraph, "DEVICE", "cuda")
    assert cudagraph.refusal(program._frozen, with_sweep=True) == ("it works on tensors on cpu", None)
    with pytest.raises(te.BackendError, match=r"runs on a GPU, and this program on cpu[\s\S]*fix: record on a GPU"):
        freeze(lambda x: x.sin().sum(), [x], backend="cudagraph")


def test_threads_have_graphs_of_their_own(graphs: type[StandIn]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    program = freeze(lambda x: torch.tanh(x * 3).sum(), [draw(50)], backend="cudagraph")
    given = [draw(50) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(program, given))
    for x, y in zip(given, found, strict=True):
        close(y, torch.tanh(x * 3).sum())
    assert 1 <= graphs.captures <= 4
