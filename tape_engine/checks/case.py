"""One operation with the contents of its values, and the three ways to its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..gradients import fitted, in_order, refill
from ..recorder import quietly
from ..registry import Op
from ..specialise import specialise
from ..tape import Node, Value

__all__ = [
    "DOUBLE",
    "SEED",
    "Case",
    "apart",
    "case_of",
    "copied",
    "differentiable",
    "doubled",
    "first_line",
    "precision",
    "reads_of",
    "run",
    "sow",
    "tensors_in",
]

Tensor = torch.Tensor

#: What every generator starts from before a forward, so that a random operation draws the same each time.
SEED = 20

#: The dtypes in which a check is run instead of the given ones.
DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


def differentiable(t: Any) -> bool:
    """Whether `t` is a tensor of floating or complex numbers."""
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors in a result or argument, also inside tuples, lists and dicts, in order."""
    if isinstance(result, Tensor):
        return [result]
    inside = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [tensor for each in inside for tensor in tensors_in(each)]


def doubled(argument: Any) -> Any:
    """An argument in double precision: tensors as copies, the dtypes among the params too."""
    if isinstance(argument, Tensor):
        made = argument.detach().to(DOUBLE.get(argument.dtype, argument.dtype))
        return made.clone() if made.data_ptr() == argument.data_ptr() else made
    if isinstance(argument, torch.dtype):
        return DOUBLE.get(argument, argument)
    if type(argument) in (list, tuple):
        return type(argument)(doubled(each) for each in argument)
    return argument


def copied(argument: Any) -> Any:
    """An argument with copies of its tensors."""
    if isinstance(argument, Tensor):
        return argument.detach().clone()
    if type(argument) in (list, tuple):
        return type(argument)(copied(each) for each in argument)
    return argument


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def precision(tensors: Sequence[Any]) -> float:
    """The coarsest rounding among floating tensors: 2.2e-16 for float64."""
    return max((torch.finfo(t.dtype).eps for t in tensors if differentiable(t)), default=torch.finfo(torch.float64).eps)


def _on_gpu() -> bool:
    """Whether this process uses a GPU: asking anything else of it would make it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def apart() -> Iterator[None]:
    """A context that records nothing and leaves torch's generators and modes as they were."""
    devices = range(torch.cuda.device_count()) if _on_gpu() else ()
    with quietly(), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
        yield


def sow(seed: int) -> None:
    """Seeds the generators; those of a GPU only if it is in use, as torch would seed it later otherwise."""
    torch.default_generator.manual_seed(seed)
    if _on_gpu():
        torch.cuda.manual_seed_all(seed)


def run(node: Node, tensors: Sequence[Tensor], seed: int = SEED) -> tuple[list[Tensor], Any]:
    """The forward of `node` on other contents: its tensors, and the result as it was returned."""
    contents = iter(tensors)
    args = [refill(each, contents) for each in node.args]
    kwargs = {name: refill(each, contents) for name, each in node.kwargs.items()}
    sow(seed)
    with torch.enable_grad():  # as where it was recorded: some operations leave out what their rule reads without it
        result = node.op.forward(*args, **kwargs)
    return tensors_in(result), result


def reads_of(node: Node) -> tuple[bool, ...]:
    """For each input, then each output, whether the rule reads its data."""
    keyed: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    inputs = [node.op.reads_argument(key) for key, argument in keyed for _ in _values_in(argument)]
    count = len(node.outputs)
    return (*inputs, *[node.op.reads_output_at(place, count) for place in range(count)])


def _values_in(argument: Any) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for each in argument:
            yield from _values_in(each)


@dataclass
class Case:
    """One node with the contents of its inputs, one tensor for each place, and of its outputs."""

    node: Node
    inputs: list[Tensor]
    outputs: list[Tensor]

    @property
    def names(self) -> list[str]:
        return self.node.input_names

    @property
    def eps(self) -> float:
        return precision([*self.inputs, *self.outputs])

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return run(self.node, inputs)[0]

    def rule(self, g: Sequence[Tensor | None], *, needs: tuple[bool, ...] | None = None, whole: bool = False) -> Any:
        """What the rule returns, as it returned it, given what the sweep would give it.

        With `needs` the rule is run without the gradients that are not needed, as the sweep does; with `whole`
        it is given the data of every argument, also of those that it seems not to read.
        """
        node = self.node
        tensors = [*self.inputs, *self.outputs]
        values = [*node.inputs, *node.outputs]
        handed = [
            tensor if read or whole else value
            for tensor, value, read in zip(tensors, values, reads_of(node), strict=True)
        ]
        contents = iter(handed[: len(self.inputs)])
        args = [refill(each, contents) for each in node.args]
        kwargs = {name: refill(each, contents) for name, each in node.kwargs.items()}
        out = node.returned(handed[len(self.inputs) :])
        assert node.op.grad is not None
        rule = node.op.grad if needs is None else specialise(node.op.grad, needs)
        return rule(node.returned(list(g)), out, *args, **kwargs)

    def in_order(self, returned: Any) -> list[Tensor | None]:
        return list(in_order(returned, self.node))

    def fitted(self, contribution: Tensor, place: int) -> Tensor:
        return fitted(contribution, self.node.inputs[place], self.node)


def case_of(op: Op, args: Sequence[Any], kwargs: dict[str, Any], double: bool = True) -> Case:
    """The case of one call, on copies of its tensors: in float64 and complex128, or as they are."""
    change: Callable[[Any], Any] = doubled if double else copied
    tensors: list[Tensor] = []
    values: list[Value] = []

    def take(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            values.append(Value(argument))
            return values[-1]
        return type(argument)(take(each) for each in argument) if type(argument) in (list, tuple) else argument

    given = [take(change(each)) for each in args]
    named = {name: take(change(each)) for name, each in kwargs.items()}
    node = Node(op, tuple(given), named, tuple(values), (None,) * len(values))
    outputs, result = run(node, tensors)
    outputs = [each.clone() if any(each is t for t in tensors) else each.detach() for each in outputs]
    node.outputs = tuple(Value(each) for each in outputs)
    node.outputs_tuple = not isinstance(result, Tensor)
    node.gaps = tuple(i for i, each in enumerate(result) if each is None) if node.outputs_tuple else ()
    return Case(node, tensors, outputs)
