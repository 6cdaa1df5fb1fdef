"""Recording what programs do most: an operation that makes one tensor or view of others, and does nothing else.

It is `Taken` and `write` in one, written out, with their calls put in place: what is saved here is saved at every
operation of a program (`tests/benchmarks` has the figures). Whatever is out of the ordinary (a list of tensors, a
write, a keyword argument) goes through those.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch

from .. import modules
from ..names import user_frame
from ..plans import Plan
from ..tape import Kept, Node, Tape, Value, bind, values_by_tensor
from .state import state
from .writing import ALIAS, call, join_views, read, refuse_without_rule, stays_closed, undo

__all__ = ["record_plain"]

Tensor = torch.Tensor

_WITHOUT: dict[str, Any] = {}  # the keyword arguments of a call that has none


def record_plain(tape: Tape, plan: Plan, args: tuple[Any, ...]) -> Tensor:
    """The result of ``plan.call(*args)``, recorded on `tape`; `plan` is plain.

    It is called by `Mode.__torch_dispatch__`, and that by torch: the user's frame lies beyond.
    """
    op, token, length = plan.op, tape.token, tape.length
    reads = op.reads_places(len(args))
    inputs: list[Value] = []
    sources: list[Node | None] = []
    saved: list[Kept | None] = []
    only_tensors, is_complex = True, False
    for i, argument in enumerate(args):
        if not isinstance(argument, Tensor):
            only_tensors = False
            continue
        value, source = None, None
        binding = values_by_tensor.get(id(argument))
        if binding is not None:
            value, source = binding.value, binding.node
            try:
                unchanged = argument._version in binding.versions
            except RuntimeError:  # an inference tensor, whose writes nobody counts
                unchanged = True
            if not unchanged or value.stale or value.dtype is not argument.dtype:
                value = None
            elif source is None:  # a leaf
                if value.shape == argument.shape:
                    tape.hold(argument)
                else:
                    value = None
            elif source.tape is not token or value.constant or value._tensor() is not argument:
                value = None  # not what the same tape has just made
        if value is None:
            value = read(argument, tape)
            source = value.node
        if value.dtype.is_complex:
            is_complex = True
        inputs.append(value)
        sources.append(source)
        if reads[i]:
            cell = None if value._kept is None else value._kept()
            saved.append(value.keep(argument) if cell is None else cell)
        else:
            saved.append(None)
    if tape.strict:
        refuse_without_rule(op, inputs)
    try:
        result: Tensor = call(plan.call, args, _WITHOUT, lazily=True) if is_complex else plan.call(*args)
    except BaseException:
        undo(tape, length)
        raise
    given = args
    if plan.views and any(result is each for each in given):
        return result  # nothing was done: it is the argument itself
    if not tape.strong and stays_closed(tape, op, inputs, [result]):
        return result

    read_values = tuple(inputs)
    args = read_values if only_tensors else _refilled(args, inputs)
    frame = user_frame(sys._getframe(2))
    code, lasti = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
    node = Node(op, args, _WITHOUT, read_values, tuple(sources), code, lasti, modules.path())
    value = Value(result)
    value._node = weakref.ref(node)
    bind(result, value, node)
    node.outputs = (value,)
    if state.grad_mode and not torch.is_grad_enabled():
        value.constant = node.cut = True
    else:
        if op.reads_output:
            saved.append(value.keep(ALIAS(result), own=True))  # below autograd: the count is not shared
        node.saved = tuple(saved)
    if plan.views:
        join_views(node.outputs, (result,), inputs, [each for each in given if isinstance(each, Tensor)])
    if tape.strong:
        node.tape = token
        tape._nodes.append(node)
    else:
        tape.append(node)
    return result


def _refilled(args: tuple[Any, ...], inputs: list[Value]) -> tuple[Any, ...]:
    """`args` with values in the place of tensors."""
    values = iter(inputs)
    return tuple([next(values) if isinstance(argument, Tensor) else argument for argument in args])
