"""Recording what programs do most: an operation that makes one fresh tensor of others, and does nothing else.

It is `Taken` and `write` in one, written out: what is saved here is saved at every operation of a program. Whatever
is out of the ordinary (a list of tensors, a view, a write, a cut, a complex number) goes through those.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .. import modules
from ..names import user_frame
from ..plans import Plan
from ..tape import Kept, Node, Tape, Value, bind
from .state import is_cut
from .writing import call, held, refuse_without_rule, stays_closed, undo

__all__ = ["record_plain"]

Tensor = torch.Tensor

_alias = torch._C.TensorBase.detach  # torch's own: the method on Tensor is wrapped while a block is open
_WITHOUT: dict[str, Any] = {}  # the keyword arguments of a call that has none


def record_plain(tape: Tape, plan: Plan, args: tuple[Any, ...]) -> Tensor:
    """The result of ``plan.call(*args)``, recorded on `tape`; `plan` is plain."""
    op, length = plan.op, tape.length
    inputs: list[Value] = []
    sources: list[Node | None] = []
    saved: list[Kept | None] = []
    given: list[Any] = []
    is_complex = False
    for argument, keep in zip(args, op.reads_places(len(args)), strict=False):
        if isinstance(argument, Tensor):
            value, source = held(argument, tape)
            inputs.append(value)
            sources.append(source)
            saved.append(value.keep(argument) if keep else None)
            given.append(value)
            if value.dtype.is_complex:
                is_complex = True
        else:
            given.append(argument)
    if tape.strict:
        refuse_without_rule(op, inputs)
    try:
        result: Tensor = call(plan.call, args, _WITHOUT, lazily=True) if is_complex else plan.call(*args)
    except BaseException:
        undo(tape, length)
        raise
    if not tape.strong and stays_closed(tape, op, inputs, [result]):
        return result
    frame = user_frame()
    code, lasti = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
    read = tuple(inputs)
    node = Node(
        op,
        read if len(read) == len(given) else tuple(given),
        _WITHOUT,
        read,
        tuple(sources),
        code,
        lasti,
        modules.path(),
    )
    value = Value(result)
    value._node = weakref.ref(node)
    bind(result, value, node)
    node.outputs = (value,)
    if is_cut():
        value.constant = node.cut = True
    else:
        if op.reads_output:
            # An alias instead of the tensor itself: the tensor keeps the node alive, the node must not keep it.
            saved.append(value.keep(_alias(result)))
        node.saved = tuple(saved)
    tape.append(node)
    return result
