"""The CUDA graph backend: a whole step captured once, and launched with one call from then on.

On a GPU the calls of a small step cost more than its arithmetic. A CUDA graph holds the kernels of the calls with the
addresses that they work on. So what a replay is given is copied to memory of the graph's own, the live tensors are read
where they lie (and the step is captured anew when one of them lies elsewhere), and results are copied out of it.

A graph cannot wait for the processor: a decision on a value, an operation whose result has a shape that depends on
elements, Python code and tensors on the CPU cannot be captured; `refusal` says which it is. Nothing that is captured
can raise after it has written, so all that a replay checks is checked before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...names import located
from ...tape import Node, Value, address_of
from ..buffers import buffer, rotating
from ..data import VIEWS, Frozen, sized_by_elements
from ..guards import default_generator, generators_of
from ..passes import drop_dead
from .source import Source

__all__ = ["DEVICE", "Captured", "CudaGraph", "Graph", "refusal"]

Tensor = torch.Tensor

WARM_UPS = 2  # runs before a capture: libraries set themselves up in them, which cannot be captured

_capturing = threading.Lock()  # of two captures at a time, each would see the other's calls


class Graph(Protocol):
    """What the backend needs of a CUDA graph."""

    def capture(self, run: Callable[[], Any], generators: Sequence[torch.Generator]) -> Any:
        """Captures what `run` does; returns what it returns, in memory that each replay writes anew."""

    def replay(self) -> None:
        """Does it again."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Any], generators: Sequence[torch.Generator]) -> Any:
        for each in generators:  # torch's own one is known to the graph; a user's draws on from where it stands, too
            self._graph.register_generator_state(each)
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        self._graph.replay()


#: What makes a graph, and the kind of device that it is for.
make_graph: Callable[[], Graph] = CudaGraph
DEVICE = "cuda"


def refusal(frozen: Frozen, *, with_sweep: bool) -> tuple[str, str | None] | None:
    """Why a program cannot be captured, and the user's line that it is for; ``None`` if it can be."""
    for node in drop_dead(frozen, with_sweep=with_sweep):
        why = _uncapturable(node)
        if why:
            return why, located(node)
    written = {frozen.canonical(leaf) for leaf, _ in frozen.writes}
    if any(value is not None and frozen.canonical(value) in written for value in frozen.inputs):
        return "the recorded code writes to an input", None
    rim = [*(v for v in frozen.inputs if v is not None), *frozen.live, *((frozen.seed,) if with_sweep else ())]
    made = [v for node in (*frozen.forward, *frozen.backward) for v in node.outputs]
    places = {v.device.type for v in (*rim, *made)} - {DEVICE}
    if places:
        return f"it works on tensors on {' and '.join(sorted(places))}", None
    return None


def _uncapturable(node: Node) -> str:
    if node.result is not None:
        return f"{node.op.name.strip('_')} waits for a value"
    if sized_by_elements(node):
        return f"the shape of what {node.op.name} returns depends on elements"
    if node.op.is_named and node.op not in VIEWS:
        return f"{node.op.name} is Python code"
    return ""


@dataclass
class _Step:
    """What was captured, and for which addresses of the live tensors."""

    graph: Graph
    results: list[Tensor]
    live: list[tuple[int, tuple[int, ...]]]


class Captured:
    """A copy of a replay function as a graph: memory for what it is given, and the capture."""

    def __init__(self, frozen: Frozen, source: Source, *, with_sweep: bool, copy: bool) -> None:
        self._run = source.function(copy=False)  # results lie in one place; they are copied out of it
        self._copy = copy
        self._live = [tensor for _, tensor in frozen.read_anew]
        self._written = [
            frozen.live[value] for leaf, _ in frozen.writes if (value := frozen.canonical(leaf)) in frozen.live
        ]
        self._inputs = [_memory(value, tensor) for value, tensor in zip(frozen.inputs, frozen.given, strict=True)]
        if with_sweep:
            self._inputs.append(buffer(frozen.seed))
        wanted = [frozen.canonical(v) for v in frozen.outputs]
        gradients = [frozen.canonical(g) for _, g in frozen.gradients] if with_sweep else []
        self._outputs = len(wanted)
        self._takes = [rotating(value) for value in (*wanted, *gradients)]
        self._own = generators_of(node for node in frozen.forward if node.random)
        devices = {value.device for node in frozen.forward if node.random for value in node.outputs}
        self._generators = [*self._own, *map(default_generator, devices)]
        self._step: _Step | None = None

    def __call__(self, *arguments: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Replays on `arguments`; captures first, if nothing was yet or a live tensor has moved."""
        for mine, tensor in zip(self._inputs, arguments, strict=True):
            mine.copy_(tensor)
        live = [(address_of(tensor), tensor.stride()) for tensor in self._live]
        if self._step is None or self._step.live != live:
            self._step = self._captured(live)
        self._step.graph.replay()
        found = self._step.results
        if self._copy:
            found = [take().copy_(result) for take, result in zip(self._takes, found, strict=True)]
        return tuple(found[: self._outputs]), tuple(found[self._outputs :])

    def _captured(self, live: list[tuple[int, tuple[int, ...]]]) -> _Step:
        graph = make_graph()
        with _capturing, _undisturbed(self._written, self._generators, self._inputs):
            outputs, gradients = graph.capture(lambda: self._run(*self._inputs), self._own)
        return _Step(graph, [*outputs, *gradients], live)


def _memory(value: Value | None, like: Tensor) -> Tensor:
    """Memory for an input, which lies as the recorded one did."""
    return torch.empty_like(like) if value is None else buffer(value)


@contextmanager
def _undisturbed(
    written: Sequence[Tensor], generators: Sequence[torch.Generator], inputs: Sequence[Tensor]
) -> Iterator[None]:
    """Puts back what the runs before a capture changed: live tensors that are written to, and random streams."""
    before = [(tensor, tensor.clone()) for tensor in (*written, *inputs)]
    states = [(each, each.get_state()) for each in generators]
    try:
        yield
    finally:
        for tensor, content in before:
            tensor.copy_(content)
        for generator, state in states:
            generator.set_state(state)
