"""A replay inside another recording: the frozen nodes are run one by one, and recorded like any other code.

So a gradient passes through a program, masks that were drawn stay what they were, effects stay effects, and
a recording with programs in it can be frozen itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._C import DisableTorchFunctionSubclass

from .. import recorder
from ..errors import NotRecordedError, message
from ..names import located
from ..recorder import Recorded, demand, listen_to, read, recording, scope
from ..regions import same_storage, storage_of
from ..tape import Node, Value, bound, current_tape
from .buffers import laid
from .data import DETACH, LIFT, Frozen
from .guards import check_guard, check_shape
from .passes import laid_out

__all__ = ["is_heard", "is_recorded", "run_recorded"]

Tensor = torch.Tensor


def is_recorded(inputs: Sequence[Tensor], live: Sequence[tuple[Value, Tensor]], own: Mapping[int, Any]) -> bool:
    """Whether a tape would record a plain torch operation on these tensors now."""
    return not recorder.is_quiet() and is_heard(inputs, live, own)  # quiet: in the body of a named operation, or a rule


def is_heard(inputs: Sequence[Tensor], live: Sequence[tuple[Value, Tensor]], own: Mapping[int, Any]) -> bool:
    """Whether a tape would record an operation on these tensors where anything is recorded at all.

    `own` are the leaves that listen on behalf of the frozen tape: what it read is not recorded elsewhere by that.
    """
    if current_tape().strong:
        return True
    listening = [t for t in inputs if isinstance(t, Recorded)] + [t for _, t in live if isinstance(t, Recorded)]
    return bool(listening) and any(_listens(t, own) for t in listening)


def _listens(tensor: Recorded, own: Mapping[int, Any]) -> bool:
    """Whether plain operations on `tensor` are recorded, be it a leaf on behalf of another tape alone."""
    value = bound(tensor)
    return value is None or not value.leaf or bool(value.closed) or value.marks > (id(value) in own)


def run_recorded(frozen: Frozen, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a replay that is recorded on the current tape.

    Raises:
        GuardError: where a decision comes out differently; nothing was written then.
    """
    tape = current_tape()
    length = len(tape)
    held: dict[Value, Tensor] = {v: t for v, t in frozen.leaves.items() if t is not None}
    held.update((leaf, leaf.holder) for leaf, _ in frozen.writes if leaf.holder is not None)
    for value, holder in frozen.leaves.items():
        place = next((i for i, given in enumerate(frozen.given) if given is holder), None)
        if place is not None:
            held[value] = inputs[place]
    try:
        # What the block around records by itself; outside of one, an operation at a time is listened to.
        with scope("program"), nullcontext() if tape.strong else recording(tape), DisableTorchFunctionSubclass():
            targets = dict(held)
            for value in frozen.lying:
                demand(read(held[value], tape))
            for value in laid_out(frozen, frozen.nodes):
                held[value] = laid(held[value], value.strides)
            for node in frozen.nodes:
                _run(node, held)
            outputs = _own([held[value] for value in frozen.outputs], [*inputs, *targets.values()])
            for leaf, after in frozen.writes:
                tensor, content = targets[leaf], held[after]
                with torch.no_grad() if tensor.requires_grad else nullcontext():
                    tensor.copy_(
                        content.clone() if content is not tensor and same_storage(content, tensor) else content
                    )
    except BaseException:
        tape.rewind(length)
        raise
    listen_to(outputs, tape)
    return outputs


def _own(outputs: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, which belong to the caller: copies of those that lie in memory of `given`, or of another one."""
    seen = {storage_of(tensor) for tensor in given} - {0}
    found = []
    for tensor in outputs:
        found.append(tensor.clone() if storage_of(tensor) in seen else tensor)
        seen.add(storage_of(found[-1]))
    return tuple(found)


def _run(node: Node, held: dict[Value, Tensor]) -> None:
    given = [_content(value, held) for value in node.inputs]
    contents = iter(given)
    args = _refilled(node.args, contents)
    kwargs = {name: _refilled(each, contents) for name, each in node.kwargs.items()}
    if node.op.forward is LIFT:
        held[node.outputs[0]] = args[0].clone()
        return
    with torch.no_grad() if node.cut else nullcontext():
        if node.op.forward is DETACH:
            result: Any = recorder.detaching(DETACH, args[0])  # the user's own, and no alias of autograd's
        else:
            result = (node.op if node.op.is_named and node.result is None else node.op.forward)(*args, **kwargs)
    if node.result is not None:
        check_guard(result, node.result, located(node))
        return
    made = [result] if isinstance(result, Tensor) else [each for each in result if isinstance(each, Tensor)]
    for value, tensor in zip(node.outputs, made, strict=True):
        if value.shape != tensor.shape:
            check_shape(tensor, value.shape, located(node))
        held[value] = tensor
        again = bound(tensor)
        if value.constant and again is not None and not any(tensor is each for each in given):
            again.constant = True
    if node.cut and node.mutates:
        _pass_over(node, made, held)


def _pass_over(node: Node, made: list[Tensor], held: dict[Value, Tensor]) -> None:
    """Has the gradient pass over a write under ``no_grad``, recorded again, as it did when it was recorded first."""
    value = bound(made[0])
    again = None if value is None else value.node
    if again is None or not again.cut or len(again.outputs) != len(node.outputs):
        return
    for old in node.inputs[len(again.inputs) :]:  # what is no argument: a tensor that the write was to
        read_again = read(_content(old, held), current_tape())
        again.inputs, again.sources = (*again.inputs, read_again), (*again.sources, read_again.node)
    again.mutates = node.mutates
    for mine, theirs in zip(again.outputs, node.outputs, strict=True):
        mine.constant = theirs.constant


def _content(value: Value, held: dict[Value, Tensor]) -> Tensor:
    found = held.get(value)
    if found is None:
        raise NotRecordedError(message("a tensor that the program reads is gone.", fix="keep it, or record again"))
    return found


def _refilled(argument: Any, contents: Iterator[Tensor]) -> Any:
    if isinstance(argument, Value):
        return next(contents)
    if type(argument) in (list, tuple):
        return type(argument)([_refilled(each, contents) for each in argument])
    return argument
