"""Functions of torch.compile: recorded as they were written where a tape listens, and compiled where none does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import tape_engine as te
from tests.helpers import close, grad_of, plain

Tensor = torch.Tensor
Function = Callable[..., Any]

pytestmark = pytest.mark.slow  # the compiler takes seconds to load


class Compiler:
    """A backend that runs each graph by plain calls of torch, and counts the graphs and how often they run."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w).square().sum()


def reference(function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [plain(t).clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def listed(given: list[Any]) -> Tensor:
    return layer(given[0], given[1])


def named(given: dict[str, Any]) -> Tensor:
    return layer(given["x"], given["w"])


def stops_between(x: Tensor, w: Tensor) -> Tensor:
    z = x * 2
    torch._dynamo.graph_break()
    return layer(z, w)


WAYS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "arguments": lambda made, x, w: made(layer)(x, w),
    "a list": lambda made, x, w: made(listed)([x, w]),
    "a dict": lambda made, x, w: made(named)({"x": x, "w": w}),
    "a closure": lambda made, x, w: made(lambda x: layer(x, w))(x),
    "what another function reads": lambda made, x, w: made(lambda x: (lambda z: layer(z, w))(x * 1))(x),
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("known", ["a leaf", "a result"])
def test_outside_a_block_a_compiled_function_that_reads_what_listens_is_recorded_as_written(
    known: str, way: str, fullgraph: bool
) -> None:
    compiler = Compiler()
    x, w = real(4, 3), real(3, 2)
    wanted_x, wanted_w = reference(lambda x, w: layer(x, w * 3 if known == "a result" else w), x, w)
    with te.record():
        W = w * 3
    C = WAYS[way](lambda f: torch.compile(f, backend=compiler, fullgraph=fullgraph), x, W if known == "a result" else w)
    assert not compiler.runs
    te.backward(C)
    close(grad_of(w), wanted_w)
    if way != "what another function reads":  # of which nothing was heard before it met what listens
        close(grad_of(x), wanted_x)


def test_what_was_compiled_stays_compiled_for_plain_tensors_and_nothing_is_compiled_again() -> None:
    compiler = Compiler()
    compiled = torch.compile(layer, backend=compiler)
    x, w = real(4, 3), real(3, 2)
    compiled(real(4, 3), real(3, 2))
    assert (compiler.graphs, compiler.runs) == (1, 1)
    with te.record() as tape:
        C = layer(x, w)
    for turn in range(3):
        outside = compiled(x, w)  # recorded
        assert compiler.runs == 1 + turn
        a, b = real(4, 3), real(3, 2)
        close(compiled(a, b), layer(a, b))
        assert (compiler.graphs, compiler.runs) == (1, 2 + turn)
        te.backward(outside)
        close(grad_of(w), reference(layer, x, w)[1])
        assert type(w) is not Tensor, "the block's tape still waits"
    program = tape.program(inputs=(x, w), outputs=C)
    program.step(x, w)
    compiled(real(4, 3), real(3, 2))
    te.backward(C)
    compiled(x, w)  # nothing listens any more
    assert (compiler.graphs, compiler.runs) == (1, 6)


def test_a_function_first_called_on_what_listens_is_compiled_when_it_is_called_on_plain_tensors() -> None:
    compiler = Compiler()
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    x, w = real(4, 3), real(3, 2)
    with te.record():
        W = w * 2
    compiled(x, W)
    assert not compiler.graphs
    compiled(real(4, 3), real(3, 2))
    assert (compiler.graphs, compiler.runs) == (1, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(torch.tanh(self.first(x)))
        return made


@pytest.mark.parametrize("way", ["torch.compile", "module.compile", "within a function"])
def test_a_compiled_module_whose_parameters_listen_is_recorded_and_before_and_after_it_is_compiled(way: str) -> None:
    compiler = Compiler()
    module, x = Net(), real(5, 3)
    wanted = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    if way == "torch.compile":
        compiled: Function = torch.compile(module, backend=compiler)
    elif way == "module.compile":
        module.compile(backend=compiler)
        compiled = module
    else:
        compiled = torch.compile(module.__call__, backend=compiler)
    compiled(x)
    assert compiler.runs == 1
    with te.record():
        C = module(real(5, 3)).sum()
    again = compiled(x).sum()
    assert compiler.runs == 1
    te.backward(again)
    for p, g in zip(module.parameters(), wanted, strict=True):
        close(grad_of(p), g)
    te.backward(C)
    compiled(x)
    assert compiler.runs == 2


def test_a_compiled_function_that_stops_in_between_is_recorded_behind_the_stop_too() -> None:
    compiler = Compiler()
    compiled = torch.compile(stops_between, backend=compiler)
    x, w = real(4, 3), real(3, 2)
    with te.record():
        W = w * 2
    C = compiled(x, W)
    te.backward(C)
    close(grad_of(w), reference(lambda x, w: layer(x * 2, w * 2), x, w)[1])


def test_in_a_pause_a_compiled_function_of_what_listens_is_not_recorded() -> None:
    compiled = torch.compile(layer, backend=Compiler())
    x, w = real(4, 3), real(3, 2)
    with te.record():
        W = w * 2
    with te.pause():
        paused = compiled(x, W)
    C = (W * paused).sum()
    te.backward(C)
    close(grad_of(w), torch.full((3, 2), 2.0, dtype=torch.float64) * plain(paused))


_FIRST = """
import sys, torch, tape_engine as te
x, w = torch.ones(2, 3), torch.ones(3, 2)
assert "torch._dynamo" not in sys.modules
graphs = []
def backend(graph, example):
    graphs.append(graph)
    return graph.forward
def f(x, w):
    return (x @ w).sum()
{block}
    W = w * 2
    {inside}
{outside}
te.backward(C)
assert torch.equal(w.g, torch.full((3, 2), 4.0)), w.g
assert not graphs
torch.compile(f, backend=backend)(x.clone(), torch.ones(3, 2))
assert len(graphs) == 1
print("right")
"""

_CALL = "C = torch.compile(f, backend=backend)(x, W)"


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_compiler_that_is_loaded_when_something_listens_already_leaves_it_as_written(where: str) -> None:
    code = _FIRST.format(block="with te.record():", **{"inside": "", "outside": "", where: _CALL})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr


def test_a_function_of_torch_s_compiler_runs_as_it_was_written_while_a_block_is_open() -> None:
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    w = torch.rand(3, 3, dtype=torch.float64)
    compiled = torch.compile(lambda x: torch.tanh(x @ w).sum(), backend=backend)
    for rows in (4, 5, 6):  # a second shape would make the sizes symbolic
        x = torch.rand(rows, 3, dtype=torch.float64)
        with te.record() as outer:
            with te.record():
                pass
            C = compiled(x)
        te.backward(C)
        leaf = plain(x).clone().requires_grad_()
        torch.tanh(leaf @ plain(w)).sum().backward()  # type: ignore[no-untyped-call]
        close(grad_of(x), leaf.grad)
        assert len(outer) == 3
    assert not graphs
    compiled(plain(x).clone())
    assert len(graphs) == 1, "after the block it is compiled again"
