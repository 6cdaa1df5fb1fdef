"""Custom functions in a program: each replay calls the forward anew, and the backward with what that forward kept.

An integer tensor without elements (`Call.handle`) carries the context from one to the other: to the program it is one
value more that the forward makes, and of each replay its own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import RuleError
from ..registry import Op
from ..tape import Node, Value, current_tape
from .contexts import Call, by_input, call_in, context_of, no_gradient_lost, values_in
from .mode import quietly
from .writing import read, write

__all__ = ["CalledBack", "called_again", "freezing", "is_freezing", "record_call"]

Tensor = torch.Tensor


# -- in a program --------------------------------------------------------------------------------------------


class _Freezing(threading.local):
    active = False


_freezing = _Freezing()


def is_freezing() -> bool:
    """Whether this thread is freezing a tape."""
    return _freezing.active


@contextmanager
def freezing() -> Iterator[None]:
    """A context in which a recorded sweep notes that a function's backward is to be called, and does not call it."""
    _freezing.active = True
    try:
        yield
    finally:
        _freezing.active = False


def called_again(node: Node) -> Node:
    """For a program: the node of a function that calls its forward anew, and makes the handle of its context."""
    call = call_in(node.args)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        ctx = context_of(call.function, call.needs)
        given = tuple([each.clone() if i in call.dirty else each for i, each in enumerate(args)])
        result = call.forward(ctx, given)
        listed = call.listed(result)
        ctx._saved = tuple(ctx.to_save or ())
        ctx.to_save = ctx.dirty_tensors = ctx.non_differentiable = ctx.saved_for_forward = None
        handle = torch.empty(0, dtype=torch.int64)
        handle.ctx = ctx  # type: ignore[attr-defined]
        return (*[each for i, each in enumerate(listed) if isinstance(call.outputs[i], Value)], handle)

    made = copy.copy(node)
    made.op = Op(forward, name=node.op.name)
    made.args = node.args[:-1]
    made.outputs = (*node.outputs, call.handle)
    made.outputs_tuple, made.gaps = True, ()
    return made


def record_call(call: Call, g: list[Tensor | None], args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Records on the current tape that the backward is called, with the context of the forward before it."""
    places = [i for i, each in enumerate(args[:-1]) if isinstance(each, Value) and each.differentiable]
    wanted = [i for i in places if call.missing is None or i not in call.missing]
    reached = [each is not None for each in g]
    values = [args[i] for i in wanted]

    def backward(handle: Any, arguments: Any, results: Any, gradients: list[Tensor]) -> tuple[Tensor, ...]:
        left = iter(gradients)
        with no_gradient_lost(call.title):
            found = call.backward(handle.ctx, [next(left) if here else None for here in reached])
        if any(found[i] is not None for i in places if i not in wanted):
            raise RuleError(f"the backward of {call.title} gives a gradient where it gave None when it was recorded")
        return tuple([_fitting(found[i], value) for i, value in zip(wanted, values, strict=True)])

    if not wanted:
        return tuple([None] * len(list(values_in(args[:-1]))))
    tape = current_tape()
    with quietly():
        gradients = [each for each in g if each is not None]
        of_g = [read(each, tape) for each in gradients]
        around = list(values_in(args[:-1]))
        results = [each for each in call.outputs if isinstance(each, Value)]
        inputs = [call.handle, *around, *results, *of_g]
        made = [torch.zeros(v.shape, dtype=v.dtype, device=v.device) for v in values]
        node = write(
            tape,
            CalledBack(backward, name=f"{call.title}_backward"),
            (call.handle, around, results, of_g),
            {},
            inputs,
            [None] * len(inputs),
            made,
        )
        node.outputs_tuple = True
    left = iter(made)
    found = [next(left) if i in wanted else None for i in range(len(args) - 1)]
    return by_input(found, args)


class CalledBack(Op):
    """The call of a function's backward, in a program."""

    def __init__(self, forward: Callable[..., Any], *, name: str) -> None:
        super().__init__(forward, name=name)
        self.differentiable = False


def _fitting(g: Any, value: Value) -> Tensor:
    """A gradient of the shape, dtype and device of its value; zero for None."""
    if g is None:
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    g = g.sum_to_size(value.shape)
    if g.is_complex() and not value.dtype.is_complex:
        g = g.real
    found: Tensor = g.to(value.device, value.dtype)
    return found
