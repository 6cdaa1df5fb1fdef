"""The inductor backend: torch's own compiler for what a list of operations can hand it, calls of torch for the rest.

The operations of a program, forward and back, are a straight line. Each run of them that torch's compiler can take
becomes an ``torch.fx`` graph of ATen operations, which it fuses and compiles: no Python is traced, and nothing guarded.
Random operations (a compiler draws other numbers than torch), decisions, operations whose result has a shape that
depends on elements, and Python code stay where they are, as calls.
"""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule
from torch.fx import Node as Step

from ...tape import Node, Value
from ..buffers import buffer, laid, strides_of
from ..calls import GRAD_MODE
from ..data import Frozen, sized_by_elements
from .python import _Writer
from .source import Source

__all__ = ["COMPILER", "Told", "generate", "missing"]

Tensor = torch.Tensor

#: Which of torch's compilers is used, by the name that ``torch.compile(backend=...)`` has for it.
COMPILER = "inductor"

LEAST = 2  # operations that are worth being compiled


@dataclass
class Told:
    """What was compiled, for `print(program)`."""

    nodes: int = 0
    parts: int = 0
    torch: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.nodes} operations in {self.parts} parts compiled by {COMPILER}, {self.torch} calls of torch; "
            f"ready in {self.seconds:.2f} s"
        )


def missing(device: torch.device) -> tuple[str, str] | None:
    """What torch's compiler lacks on this machine, and what would help; ``None`` if it is all there."""
    if COMPILER != "inductor":
        return None
    if device.type == "cpu":
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        except Exception:  # whatever it looks for, it is not there
            return "a C++ compiler, and none was found", "install one (on Debian and Ubuntu: apt install g++)"
        return None
    from torch.utils._triton import has_triton

    return None if has_triton() else ("triton, which is not installed or does not know this GPU", "pip install triton")


def generate(frozen: Frozen, *, with_sweep: bool) -> tuple[Source, Told]:
    """The function that replays a frozen tape, with what was compiled."""
    writer = _Inductor(frozen, with_sweep)
    return writer.write(), writer.told


class _Inductor(_Writer):
    def __init__(self, frozen: Frozen, with_sweep: bool) -> None:
        super().__init__(frozen, with_sweep)
        self.told = Told()
        self.items: list[Node | list[Node]] = []
        self.taken: set[Node] = set()  # what is compiled

    def _results(self, wanted: set[Value]) -> set[Value]:
        self.items = self._parted()
        self.taken = {node for item in self.items if isinstance(item, list) for node in item}
        everything = self.nodes
        self.nodes = [node for node in everything if node not in self.taken]
        mine = super()._results(wanted)
        self.nodes = everything
        return mine

    def order(self) -> list[list[Node]]:
        return [item if isinstance(item, list) else [item] for item in self.items]

    def makes(self, node: Node) -> bool:
        return node not in self.taken and super().makes(node)

    def _parted(self) -> list[Node | list[Node]]:
        """The nodes in their order, with lists of those that are compiled together; what runs once comes first."""
        items: list[Node | list[Node]] = [node for node in self.nodes if node in self.folded]
        part: list[Node] = []
        for node in [*(node for node in self.nodes if node not in self.folded), None]:
            if node is not None and self._compiles(node):
                part.append(node)
                continue
            items += [part] if len(part) >= LEAST else part
            items += [node] if node is not None else []
            part = []
        return items

    def _compiles(self, node: Node) -> bool:
        forward = node.op.forward
        if not isinstance(forward, OpOverload) or forward.namespace != "aten" or forward in GRAD_MODE:
            return False
        if node.random or node.result is not None or sized_by_elements(node) or node.mutates:
            return False
        return not any(self.frozen.canonical(v) in self.loose for v in (*node.inputs, *node.outputs))

    def _nodes(self) -> None:
        start = time.perf_counter()
        for place, item in enumerate(self.items):
            if isinstance(item, list):
                self.part(item, place)
            else:
                self.told.torch += item not in self.folded
                self.node(item)
        self.told.seconds = time.perf_counter() - start

    def part(self, nodes: list[Node], place: int) -> None:
        """The line that runs a compiled part."""
        canonical = self.frozen.canonical
        made = dict.fromkeys(canonical(v) for node in nodes for v in node.outputs)
        given = [v for v in dict.fromkeys(canonical(v) for node in nodes for v in node.inputs) if v not in made]
        mine = set(nodes)
        wanted = [v for v in made if v in self.kept or any(r not in mine for r in self.readers.get(v, ()))]
        if not wanted:
            return
        start = len(self.lines)
        arguments = ", ".join(self.name(v) for v in given)
        function = self.unused("compiled")
        self.space[function] = Compiled(nodes, given, wanted, canonical)
        names = [self.name(v, "v") for v in wanted]
        looking: set[Value] = set(given)  # what lies in memory that was given
        for node in nodes:
            if self.way(node).view and any(canonical(v) in looking for v in node.inputs):
                looking.update(canonical(v) for v in node.outputs)
        for name, value in zip(names, wanted, strict=True):
            self.locals[value] = name
            if value in looking:
                self.life.view(value, given)
            else:
                self.life.make(value)
            self.life.touch(value)
        self.lines.append(f"{', '.join(names)}, = {function}({arguments})")
        self.unit("compiled", start, nodes, given, wanted)
        self.told.nodes += len(nodes)
        self.told.parts += 1
        self.tick()


class Compiled:
    """Nodes as one compiled function from values to values."""

    def __init__(
        self,
        nodes: Sequence[Node],
        given: Sequence[Value],
        wanted: Sequence[Value],
        canonical: Callable[[Value], Value],
    ) -> None:
        self._strides = [strides_of(value) for value in given]
        module = GraphModule({}, graph_of(nodes, given, wanted, canonical))
        self._run = _compile(module, [buffer(value).zero_() for value in given])

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The wanted values; the compiled function takes tensors that lie as those did that it was compiled for."""
        each = [laid(_plain(tensor), strides) for tensor, strides in zip(tensors, self._strides, strict=True)]
        found: Sequence[Tensor] = self._run(*each)
        return found


def _plain(tensor: Tensor) -> Tensor:
    """A tensor of torch's own class: a leaf that a tape listens to is of another one."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def _compile(module: GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about torch, while it loads its compiler
        from torch._dynamo.backends.registry import lookup_backend

        compiler: Any = lookup_backend(COMPILER)
        run: Callable[..., Any] = compiler(module, examples)
    return run


def graph_of(
    nodes: Sequence[Node], given: Sequence[Value], wanted: Sequence[Value], canonical: Callable[[Value], Value]
) -> Graph:
    """The nodes as a graph of ``torch.fx``, which takes the values `given` and returns those `wanted`."""
    graph = Graph()
    steps: dict[Value, Step] = {value: graph.placeholder(f"given_{i}") for i, value in enumerate(given)}

    def of(argument: Any) -> Any:
        if isinstance(argument, Value):
            return steps[canonical(argument)]
        if type(argument) in (list, tuple):
            return type(argument)([of(each) for each in argument])
        return argument

    for node in nodes:
        kwargs = {name: of(each) for name, each in node.kwargs.items()}
        step = graph.call_function(node.op.forward, tuple(of(each) for each in node.args), kwargs)
        if not node.outputs_tuple:
            steps[canonical(node.outputs[0])] = step
            continue
        for i, value in enumerate(node.returned([canonical(v) for v in node.outputs])):
            if value is not None:
                steps[value] = graph.call_function(operator.getitem, (step, i))
    graph.output(tuple(steps[value] for value in wanted))
    graph.lint()
    return graph
