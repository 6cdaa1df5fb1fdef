"""Recording what programs do most: an operation that makes tensors or views of others, and does nothing else.

It is `Taken` and `write` in one, written out, with their calls put in place: what is saved here is saved at every
operation of a program (`tests/benchmarks` has the figures). Whatever is out of the ordinary (a list of tensors as
an argument, a write, a keyword argument) goes through those.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..aliases import look
from ..modules import path
from ..names import _is_user_file, user_frame
from ..plans import Plan
from ..tape import (
    Binding,
    Kept,
    Node,
    Tape,
    Value,
    address_of,
    dense,
    exposed,
    forget,
    layout_of,
    next_in_sequence,
    values_by_tensor,
    version_of,
    versions_of,
)
from .state import state
from .strict import refuse_without_rule
from .taken import BARE
from .writing import ALIAS, call, join_views, read, stays_closed, undo

__all__ = ["record_plain"]

Tensor = torch.Tensor

_WITHOUT: dict[str, Any] = {}  # the keyword arguments of a call that has none
_UNWRITTEN = (0,)
_BARE = BARE | {list, tuple}  # no plain operation is given tensors in a list
_FLOAT = torch.float32
_contents_of = torch._C.TensorBase.data.__get__  # type: ignore[attr-defined]
_binding_of = values_by_tensor.get
_grad_enabled = torch.is_grad_enabled
_frame = sys._getframe
_new_node, _new_value, _new_kept = Node.__new__, Value.__new__, Kept.__new__
_ref = weakref.ref


def record_plain(tape: Tape, plan: Plan, args: tuple[Any, ...], func: Any = None, frame: Any = None) -> Any:
    """The result of ``plan.call(*args)``, recorded on `tape`; `plan` is plain.

    `func` is what the user called, where it is heard above torch's autograd. `frame` is the user's; if it is not given,
    this is called by the mode that hears the call, and that by torch: the user's frame lies beyond.
    """
    op, token, strong, length = plan.op, tape.token, tape.strong, len(tape._nodes)
    inputs: list[Value] = []
    sources: list[Node | None] = []
    saved: list[Kept | None] = []
    leaves = tape._leaves
    is_complex = keeps = False
    run = plan.quick if func is None else func
    reads: Sequence[bool] = op.argument_reads
    if len(reads) < len(args):
        reads = op.reads_places(len(args))
    for argument, is_read in zip(args, reads):  # noqa: B905 - told to be strict or not, zip takes longer
        kind = type(argument)
        if kind is not Tensor:
            if kind in _BARE or not isinstance(argument, Tensor):
                continue
            if func is None:
                run = plan.call
        value = None
        binding = _binding_of(id(argument))
        if binding is not None:
            value, source = binding.value, binding.node
            try:
                unchanged = argument._version in binding.versions
            except RuntimeError:  # an inference tensor, whose writes nobody counts
                unchanged = True
            if not unchanged or value.stale:
                value = None
            elif source is None:  # a leaf; what a block has looked at once it hears the changes of
                if not (strong and id(argument) in leaves):
                    if value.dtype is not argument.dtype or value.shape != argument.shape:
                        value = None
                    elif strong:
                        leaves[id(argument)] = argument
            elif (
                source.tape is not token
                or value.constant
                or not (strong and (value._tensor is binding or value._tensor() is argument))
            ):
                value = None  # not what the same block has just made
        if value is None:
            value = read(argument, tape)
            source = value.node
        if value.dtype is not _FLOAT and value.dtype.is_complex:
            is_complex = True
        inputs.append(value)
        sources.append(source)
        if is_read:
            cell = None if value._kept is None else value._kept()
            if cell is None:
                cell = Kept(argument)
                value._kept = _ref(cell)
            saved.append(cell)
            keeps = True
        else:
            saved.append(None)
    if tape.strict:
        refuse_without_rule(op, inputs)
    try:
        if is_complex and func is None:
            result: Any = call(plan.call, args, _WITHOUT, lazily=True)
        else:
            result = run(*args)
    except BaseException:
        undo(tape, length)
        raise
    views, single = plan.views, plan.single
    if views and any(result is each for each in args):
        return result  # nothing was done: it is the argument itself
    if not strong and stays_closed(tape, op, inputs, (result,) if single else _tensors(result)):
        return result

    read_values = tuple(inputs)
    if frame is None:
        frame = _frame(2)
        if not _is_user_file.get(frame.f_code.co_filename):
            frame = user_frame(frame)
    code, lasti = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
    call_args = read_values if len(read_values) == len(args) else _refilled(args, inputs)
    node = _new_node(Node)  # what `Node` does, in place
    node.op = op
    node.args = call_args
    node.inputs = read_values
    node.sources = tuple(sources)
    node.seq = next_in_sequence()
    node._code = code
    node._lasti = lasti
    scope = path()
    if scope:
        node.scope = scope
    node.tape = token
    cut = not _grad_enabled() and state.grad_mode
    if single:
        binding = Binding(result, forget)  # what `bind` does, with one weak reference for the value's as well
        binding.value = node._outputs = value = _new_value(Value)  # what `Value` does, in place
        if (  # all lie alike, element after element, and so does what is made of them: torch need not be asked
            plan.pointwise
            and inputs
            and id(strides := inputs[0].strides) in dense
            and (len(inputs) == 1 or (inputs[1].strides is strides and (len(inputs) == 2 or _lie_alike(inputs))))
        ):
            like = inputs[0]
            value.shape, value.strides, value.device = like.shape, strides, like.device
        else:
            value.shape, value.strides = layout_of(result)
            value.device = result.device
        value.dtype = result.dtype
        value._tensor = binding
        binding.node = node
        if views and inputs:  # torch's own backward conjugates numbers, too
            binding.versions = version_of(result), version_of(args[0])  # they share a count once torch hands it out
        else:
            binding.versions = _UNWRITTEN if func is not None else versions_of(result)
        binding.key = key = id(result)
        values_by_tensor[key] = binding
        value._node = _ref(node)
        if cut:
            value.constant = True
        else:
            node.ordinary = True
            if is_complex or (value.dtype is not _FLOAT and value.dtype.is_complex):
                node.complex = True
            if op.reads_output:
                if exposed:
                    kept = Kept(_contents_of(result), own=True)
                else:  # what `Kept` does, in place
                    kept = _new_kept(Kept)
                    kept.tensor, kept.own = _contents_of(result), True
                value._kept = _ref(kept)
                saved.append(kept)
                keeps = True
                if func is not None and result.requires_grad:
                    tape.unheard[address_of(result)] = node  # autograd has saved it, if it does
    else:
        made, ref = _tensors(result), _ref(node)
        outputs: list[Value] = []
        for each in made:
            binding = Binding(each, forget)  # as above
            binding.value = value = _new_value(Value)
            value.shape, value.strides = layout_of(each)
            value.dtype, value.device = each.dtype, each.device
            value._tensor, value._node = binding, ref
            if outputs:
                value.index = len(outputs)
            binding.node = node
            binding.versions = (version_of(each), version_of(args[0])) if views else versions_of(each)
            binding.key = key = id(each)
            values_by_tensor[key] = binding
            outputs.append(value)
            if cut:
                value.constant = True
            elif op.reads_output:
                wanted = op.reads_output_at(value.index, len(made))
                saved.append(value.keep(ALIAS(each), own=True) if wanted else None)
                keeps = True
        node.outputs = tuple(outputs)
    if cut:
        node.cut = True
    elif keeps:
        node.saved = tuple(saved)
    if not single:
        node.note_form(result)
    if views and not (plan.looks and look(_ref(node), inputs[0])):
        made = (result,) if single else _tensors(result)
        join_views(node.outputs, made, inputs, [each for each in args if isinstance(each, Tensor)])
    if strong:
        tape._nodes.append(node)
    else:
        tape.append(node)
    return result


def _lie_alike(inputs: list[Value]) -> bool:
    """Whether all values have the same strides, which of each shape are an object of their own."""
    return all(value.strides is inputs[0].strides for value in inputs)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result that is a tuple or list of them."""
    return tuple([each for each in result if each is not None])


def _refilled(args: tuple[Any, ...], inputs: list[Value]) -> tuple[Any, ...]:
    """`args` with values in the place of tensors."""
    values = iter(inputs)
    return tuple([a if type(a) in _BARE or not isinstance(a, Tensor) else next(values) for a in args])
