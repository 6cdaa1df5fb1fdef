"""The arguments of a call, taken before it: values in the place of tensors, and what its rule will read of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import message
from ..names import call_site, user_frame
from ..registry import Op
from ..tape import Kept, Node, Tape, Value, describe
from .state import is_cut
from .writing import read, write

__all__ = ["BARE", "Taken", "enter", "operands_note"]

Tensor = torch.Tensor

#: Types of arguments of an overload that are no tensors, and have none in them.
BARE = {int, float, bool, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format}


class Taken:
    """The arguments of a call with values in the place of tensors.

    Attributes:
        args, kwargs: the arguments.
        inputs: the values, in order.
        sources: the nodes that made them, ``None`` for leaves.
        tensors: the tensors that hold them.
        kept: the cells of those that the rule reads, made before the call: it may write to them.
        complex: whether one of them is complex.
    """

    __slots__ = ("args", "complex", "inputs", "kept", "kwargs", "length", "op", "sources", "tape", "tensors")

    def __init__(self, op: Op, tape: Tape, args: Any, kwargs: dict[str, Any], unread: tuple[int, ...] = ()) -> None:
        self.op = op
        self.tape, self.length = tape, tape.length
        self.complex = False
        self.inputs: list[Value] = []
        self.sources: list[Node | None] = []
        self.tensors: list[Tensor] = []
        self.kept: list[Kept | None] = []
        take, reads = self.take, op.reads_places(len(args))
        if unread:
            reads = [each and place not in unread for place, each in enumerate(reads)]
        taken = []
        for argument, keep in zip(args, reads, strict=False):
            taken.append(argument if type(argument) in BARE else take(argument, keep))
        self.args = tuple(taken)
        self.kwargs = {k: take(a, op.reads_argument(k)) for k, a in kwargs.items()} if kwargs else kwargs

    def value_of(self, tensor: Tensor) -> Value:
        """The value of a tensor that the call writes to, which it may have been given as an argument or not."""
        places = [i for i, given in enumerate(self.tensors) if given is tensor]
        return self.inputs[places[0]] if places else read(tensor, self.tape)

    def take(self, argument: Any, keep: bool) -> Any:
        """`argument` with values in the place of tensors; those are noted."""
        if isinstance(argument, Tensor):
            value = read(argument, self.tape)
            self.note(argument, value, keep)
            if value.dtype.is_complex:
                self.complex = True
            return value
        kind = type(argument)
        if kind is list or kind is tuple:
            return kind([self.take(each, keep) for each in argument])
        return argument

    def note(self, tensor: Tensor, value: Value, keep: bool = False) -> None:
        """Notes `value`, which `tensor` holds, among the inputs."""
        self.inputs.append(value)
        self.sources.append(None if value._node is None else value._node())
        self.tensors.append(tensor)
        self.kept.append(value.keep(tensor) if keep else None)


def enter(taken: Taken, made: Sequence[Tensor]) -> Node:
    """Records the call whose arguments were `taken`, and which made the tensors `made`."""
    t = taken
    return write(t.tape, t.op, t.args, t.kwargs, t.inputs, t.kept, made, sources=t.sources, cut=is_cut())


def operands_note(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What is noted on an error that the body of an operation raised."""
    names = [*op.parameters, *("" for _ in args)]
    pairs = [*zip(names, args, strict=False), *kwargs.items()]
    shown = [(name, describe(each)) for name, each in pairs if isinstance(each, Tensor)]
    return message(f"in the operation {op.name}, called", where=call_site(user_frame()), operands=shown)
