"""In-place writes to memory that nobody else looks into: counters, masks that were just drawn, running statistics.

A layer with statistics does two such writes at each call. They are what `inplace` makes of them, written out for the
case that there is nobody to tell and nothing to keep; in any other `NotImplemented` is returned, and it does them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..aliases import alone, share
from ..modules import path
from ..names import user_frame
from ..plans import Plan
from ..tape import Kept, Node, Tape, Value, bind_output
from .inplace import completed, overlaps
from .state import call, is_cut
from .strict import refuse_without_rule
from .writing import ALIAS, read

__all__ = ["record_statistics", "record_update"]

Tensor = torch.Tensor
_contents_of = torch._C.TensorBase.data.__get__  # type: ignore[attr-defined]


def record_update(tape: Tape, plan: Plan, args: tuple[Any, ...], function: Any = None, pending: int = 1) -> Any:
    """``x.add_(1)``: a write to the first argument, the only tensor; returns that, or NotImplemented.

    `function` is what runs it, if that is not the overload; `pending` is how many writes torch has yet to count: inside
    the dispatcher, this one.
    """
    tensor, op = args[0], plan.op
    if not tape.strong or plan.restrides or (op.argument_reads and op.argument_reads[0]):
        return NotImplemented
    for argument in args[1:]:
        if isinstance(argument, (Tensor, list, tuple)):
            return NotImplemented
    old = read(tensor, tape)
    if not alone(tensor, old):
        return NotImplemented
    if tape.strict:
        refuse_without_rule(op, [old])
    if overlaps(old):
        return NotImplemented
    source = old.node
    result = call(function or plan.call, args, {}, lazily=False)
    node = _node(op, (old, *completed(args, {}, plan)[1:]), (old,), (source,))
    node.cut, node.random, node.mutates = is_cut(), plan.random, ((0, 0),)
    node._outputs = new = bind_output(tensor, node, weakref.ref(node), pending)
    if node.cut:
        new.constant = old.constant
    elif op.reads_output:
        node.saved = (None, new.keep(ALIAS(tensor)))
    node.note_form(result)
    _follow(old, new)
    tape.append(node)
    return result


def record_statistics(tape: Tape, plan: Plan, args: tuple[Any, ...], function: Any) -> Any:
    """Batch norm in training, of input, weight, bias, and the mean and variance that it moves on; or NotImplemented.

    `function` is what runs it.
    """
    op, given, written = plan.op, args[:5], args[3:5]
    inputs = [read(each, tape) for each in given]
    before = inputs[3:]
    reads = zip(inputs[:3], given, op.argument_reads, strict=False)
    kept = [value.keep(each) if is_read else None for value, each, is_read in reads]
    if not tape.strong or written[0] is written[1] or overlaps(before[0]) or overlaps(before[1]):
        return NotImplemented
    if not (alone(written[0], before[0]) and alone(written[1], before[1])):
        return NotImplemented
    if tape.strict:
        refuse_without_rule(op, inputs)
    sources = tuple([None if value._node is None else value._node() for value in inputs])
    made = function(*args)
    node = _node(op, (*inputs, *args[5:]), tuple(inputs), sources)
    ref, cut = weakref.ref(node), is_cut()
    outputs = [bind_output(each, node, ref) for each in made] + [bind_output(each, node, ref, 1) for each in written]
    for index, value in enumerate(outputs):
        value.index = index
        value.constant = cut or index >= 3  # no gradient passes through statistics
    node.outputs, node.outputs_tuple = tuple(outputs), True
    node.mutates = (3, 3), (4, 4)
    moved = outputs[3:]
    if cut:
        node.cut = True
        for old, new in zip(before, moved, strict=True):
            new.constant = old.constant
    else:
        node.ordinary = True
        cells: list[Kept | None] = []
        for value, each in zip(outputs, made, strict=False):
            wanted = op.reads_output_at(value.index, 5)
            cells.append(value.keep(_contents_of(each), own=True) if wanted else None)
        node.saved = (*kept, None, None, *cells, None, None)
    for old, new in zip(before, moved, strict=True):
        _follow(old, new)
    tape.append(node)
    return made


def _node(op: Any, args: tuple[Any, ...], inputs: tuple[Value, ...], sources: tuple[Node | None, ...]) -> Node:
    frame = user_frame()
    code, lasti = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
    return Node(op, args, {}, inputs, sources, code, lasti, path())


def _follow(old: Value, new: Value) -> None:
    """What a write leaves as it was."""
    if old.detached:
        new.detached = True
    if old._node is None:
        new.name = old.name
    if old._aliases is not None:
        share(new, old)
