"""In-place writes: recorded as what they compute, and followed to every tensor that sees them.

``x.add_(y)`` is recorded as ``add(x, y)``, whose output `x` holds from then on. What a rule still needs of the
old contents is copied before; a view's write is carried to its base, and from there to the other views.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from .. import aliases, registry
from ..modules import path
from ..names import call_site, user_frame
from ..places import overlapping, read_view, write_view
from ..plans import MISSING, Plan, plan_of
from ..tape import (
    Binding,
    Kept,
    Node,
    Tape,
    Value,
    bind,
    bound,
    dense,
    rebind,
    unbind,
    values_by_tensor,
    version_of,
)
from .state import LIFT, MOVED, OVERLAPPED, PARTED, UNFOLLOWED, VIEW_DTYPE, is_cut, tensors_in
from .strict import refuse_without_rule
from .taken import Taken, enter
from .writing import (
    ALIAS,
    AS_COMPLEX,
    AS_REAL,
    as_constants,
    as_stored,
    call,
    in_units_of,
    read,
    reshaped,
    stays_closed,
    turned,
    write,
)

__all__ = ["Sparing", "record_update", "record_write", "settle", "unrecorded"]

Tensor = torch.Tensor


def record_write(tape: Tape, func: OpOverload, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that writes to its arguments, recorded as its functional twin."""
    if plan.gives_memory:
        return _given_memory(func, args, kwargs)
    given_args, given_kwargs = _completed(args, kwargs, plan), kwargs
    if plan.outs:
        given_args = tuple([a for i, a in enumerate(given_args) if i not in plan.outs])
        given_kwargs = {name: a for name, a in kwargs.items() if name not in plan.outs}
    if plan.order:
        given_args = tuple([given_args[place] for place in plan.order])
    # What the rule will read is kept here, so that what is about to be overwritten gets its copy below.
    taken = Taken(plan.op, tape, given_args, given_kwargs, plan.unread)
    if tape.strict:
        refuse_without_rule(plan.op, taken.inputs)
    written = _written(plan, args, kwargs)
    before = [taken.value_of(tensor) for tensor in written]
    alone = all(aliases.alone(tensor, value) for tensor, value in zip(written, before, strict=True))
    spared: list[Any] = []
    wholes: list[Value | None] = []
    if not alone:
        wholes = [None if tensor._base is None else read(tensor._base, tape) for tensor in written]
        for tensor, value in zip(written, before, strict=True):
            spared += aliases.protect(tensor, value)
    result = call(plan.call, args, kwargs, lazily=False)
    if result is written[0]:
        fresh, made = [], written
    else:
        known = {id(tensor) for tensor in written}
        fresh = [t for t in tensors_in(result) if id(t) not in known]
        made = [*fresh, *written]
    if stays_closed(tape, plan.op, taken.inputs, made):
        for tensor in written:
            rebind(tensor, version_of(tensor) + 1)
        return result
    if plan.outs and is_cut():
        for tensor, old in zip(written, before, strict=True):
            if old.differentiable and old not in taken.inputs:
                taken.note(tensor, old)  # which the twin is not given, and the gradient passes over the write to it
    node = enter(taken, made)
    node.random = plan.random
    node.note_form(result if len(made) == 1 else made)
    inputs, first = taken.inputs, len(fresh)
    node.mutates = tuple(
        [(inputs.index(old) if old in inputs else -1, place) for place, old in enumerate(before, start=first)]
    )
    settle(
        tape,
        node,
        range(first, len(made)),
        written,
        before,
        wholes,
        spared,
        statistics=plan.statistics,
        alone=alone,
        restrides=plan.restrides,
    )
    if node.cut and (plan.outs or plan.restrides):
        for place, (tensor, old) in enumerate(zip(written, before, strict=True), start=first):
            if tensor._base is not None and old.shape != tensor.shape:
                node.outputs[place].stale = True  # as in torch: a view of its base, in its new shape
            elif (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
                reshaped(node, place, old)
    return result


def record_update(tape: Tape, plan: Plan, args: tuple[Any, ...], pending: int = 1) -> Any:
    """``x.add_(1)``: a write to the first argument, the only tensor; NotImplemented where `record_write` must do it.

    It is that, written out for what nobody else looks into, nor any rule: counters, and masks that were just drawn.
    `pending` is how many writes torch has yet to count: inside the dispatcher, this one.
    """
    tensor, op = args[0], plan.op
    if not tape.strong or plan.restrides or (op.argument_reads and op.argument_reads[0]):
        return NotImplemented
    for argument in args[1:]:
        if isinstance(argument, (Tensor, list, tuple)):
            return NotImplemented
    old = read(tensor, tape)
    if not aliases.alone(tensor, old):
        return NotImplemented
    if tape.strict:
        refuse_without_rule(op, [old])
    if _overlapping(old):
        return NotImplemented
    source = old.node
    result = call(plan.call, args, {}, lazily=False)
    cut = is_cut()
    frame = user_frame()
    code, lasti = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
    node = Node(op, (old, *_completed(args, {}, plan)[1:]), {}, (old,), (source,), code, lasti, path())
    new = Value(tensor)
    node._outputs, new._node = new, weakref.ref(node)
    bind(tensor, new, node)
    rebind(tensor, version_of(tensor) + pending)
    node.cut, node.random, node.mutates = cut, plan.random, ((0, 0),)
    if cut:
        new.constant = old.constant
    elif op.reads_output:
        node.saved = (None, new.keep(ALIAS(tensor)))
    node.note_form(result)
    if old.detached:
        new.detached = True
    if old._node is None:
        new.name = old.name
    if old._aliases is not None:
        aliases.share(new, old)
    tape.append(node)
    return result


_VIEW_DTYPE = registry.find(VIEW_DTYPE)


def _given_memory(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.set_(...)``: x is another tensor from then on, and none that may have a gradient if a tape knows its memory.

    Nor may it have one if it was computed: torch has no derivative of that either.
    Torch makes tensors so that it reads from files: those are leaves.
    """
    target = args[0]
    held = bound(target)
    node = None if held is None else held.node
    lost = held is not None and held.differentiable and node is not None and node.rule not in ("none", "cut")
    if held is not None:
        aliases.protect(target, held)
        held.stale = True  # the tensor is no longer what was made or read
    result = call(func, args, kwargs, lazily=False)
    unbind(target)
    storage = aliases.storage_of(target)
    if lost or (storage and any(_differentiable_in(each, storage) for each in list(values_by_tensor.values()))):
        value = Value(target)
        value.closed = MOVED
        bind(target, value, None)
        rebind(target, version_of(target) + 1)
        aliases.join(target, value)
    return result


def _differentiable_in(binding: Binding, storage: int) -> bool:
    """Whether a tensor with this storage holds a value that can have a gradient."""
    tensor = binding()
    return tensor is not None and binding.value.differentiable and aliases.storage_of(tensor) == storage


def settle(
    tape: Tape,
    node: Node,
    places: Sequence[int],
    written: Sequence[Tensor],
    before: Sequence[Value],
    wholes: Sequence[Value | None],
    spared: list[tuple[Kept | None, Tensor]],
    *,
    statistics: bool = False,
    pending: int = 1,
    alone: bool = False,
    restrides: bool = False,
) -> None:
    """Follows the writes of `node` to all that look into the memory of the tensors `written`.

    Their values are the outputs of `node` at `places`; `before` is what they held before, `wholes` what their bases
    held, ``None`` for a tensor that is no view. `spared` is what `aliases.protect` returned before the writes, and
    `pending` how many of them torch has yet to count: inside the dispatcher, one. `alone` says that nobody else looks
    into that memory: then `wholes` and `spared` are empty. What `restrides` alone (``t_``) changes no contents.
    """
    untouched: set[int] = set()
    if spared:
        aliases.refresh(spared, pending)
        untouched = {id(tensor) for _, tensor in spared}
    for k, (place, tensor, old) in enumerate(zip(places, written, before, strict=True)):
        new = node.outputs[place]
        if node.op.forward not in _IN_ORDER and _overlapping(old):
            tape.unfollowed = "a write to elements several of which lie in one place", call_site(user_frame())
            new.closed = "" if node.cut else OVERLAPPED
        if not tape.strong:  # which lets go of the node, if nobody reads what it wrote
            old.ended = node.seq
        # Under no_grad torch lets the gradient of a tensor pass over a write as if it had not been.
        new.constant = old.constant if node.cut else statistics
        new.name = old.name if old.leaf else None
        if old.detached:
            new.detached = True
        if not alone or old.aliases is not None:
            aliases.share(new, old)
        rebind(tensor, version_of(tensor) + pending)
        if alone:
            continue
        if not node.cut:
            _part(tensor, pending)
        if restrides and node.cut:
            for other in aliases.neighbours(tensor):
                held = bound(other)
                if other._base is tensor and held is not None:
                    held.stale = True  # as in torch: a view of what that is now, whose gradient passes over the change
                rebind(other, version_of(other) + pending)
            new.stale = tensor._base is not None  # likewise
        else:
            _spread(tape, tensor, new, wholes[k], untouched, node.cut, pending)


#: What writes the elements one after the other, and reads none of them: where several lie in one place, the last stays.
_IN_ORDER = {
    torch.ops.aten.copy.default,
    torch.ops.aten.fill.Scalar,
    torch.ops.aten.fill.Tensor,
    torch.ops.aten.zero.default,
}


def _overlapping(value: Value) -> bool:
    """Whether several elements of a value may lie in one place of memory."""
    return id(value.strides) not in dense and overlapping(value.shape, value.strides)


def _part(tensor: Tensor, pending: int) -> None:
    """After a write to `tensor`, closes what torch takes for a view of it, or it for a view of, in other memory.

    Torch's gradient goes by what was written, and the contents do not.
    """
    for other in aliases.parted_from(tensor):
        held = bound(other)
        if held is not None and held.differentiable:
            lost = Value(other)
            lost.closed = PARTED
            bind(other, lost, None)
            rebind(other, version_of(other) + pending)


def _written(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    found: list[Tensor] = []
    for key in plan.writes:
        given = kwargs.get(key) if isinstance(key, str) else (args[key] if key < len(args) else None)
        found += tensors_in(given)
    return found


def _completed(args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan) -> tuple[Any, ...]:
    """The arguments with those defaults of theirs that the functional twin may not have."""
    left = plan.defaults[len(args) :]
    if kwargs or MISSING in left:
        return args
    return (*args, *left)


def _spread(
    tape: Tape, tensor: Tensor, new: Value, whole: Value | None, untouched: set[int], cut: bool, pending: int
) -> None:
    """What a write to `tensor` means to the other tensors that look into its storage."""
    neighbours = [t for t in aliases.neighbours(tensor) if id(t) not in untouched]
    base, of_base = tensor, new
    detached = (new if whole is None else whole).detached
    if whole is not None and tensor._base is not None and not aliases.parted(tensor):
        target, old = in_units_of(tensor, tensor._base, whole, tape)
        if aliases.contains(target, aliases.in_reals(as_stored(tensor, target), target)):
            base = tensor._base
            of_base = _write_base(tape, tensor, new, target, old, cut, pending)
    seen = {base.dtype: (base, of_base)}
    for other in neighbours:
        if other.dtype not in seen and other._base is not base:
            seen[other.dtype] = _recast(tape, base, of_base, other.dtype) or (base, of_base)
    wider = [t for t in neighbours if t is not base and t._base is None and _holds(t, seen[t.dtype][0])]
    bases = {id(t) for t in (base, *neighbours)}
    for other in neighbours:
        if other is base:
            continue
        held = bound(other)
        begun = held is not None and not held.constant and _begun(held, other._base)
        if other._base is not None and id(other._base) in bases and not (begun or aliases.parted(other)):
            if held is not None:
                held.stale = True  # read off the base, which is followed here too, when it is next needed
            rebind(other, version_of(other) + pending)
            continue
        part, of_part = seen[other.dtype]
        if aliases.contains(part, other) and as_stored(other, part) is other and not (held is not None and held.stale):
            _read_off(tape, part, of_part, other, held, detached or begun)
        elif any(other is each for each in wider):
            _write_off(tape, part, of_part, other, detached)
        else:
            lost = Value(other)
            lost.closed, lost.constant = UNFOLLOWED, held is not None and held.constant
            bind(other, lost, None)
        rebind(other, version_of(other) + pending)


def _begun(value: Value, base: Tensor | None) -> bool:
    """Whether a view of `base` was made under ``no_grad``, or of such a view: its gradient does not go on to the base.

    It ends there, or, where the base requires one, begins there anew, as torch has it.
    """
    while value.holder is not base and (node := value.node) is not None:
        if value.constant or node.cut:
            return value.constant or value.begins
        if not node.inputs or value._aliases is None or node.inputs[0]._aliases is not value._aliases:
            return False
        value = node.inputs[0]
    return False


def _recast(tape: Tape, base: Tensor, of_base: Value, dtype: torch.dtype) -> tuple[Tensor, Value] | None:
    """`base`, which holds `of_base`, as its memory reads in another dtype: what ``view(dtype)`` sees, a constant."""
    if base.is_conj() or base.is_neg():
        return None
    try:
        units = base.view(dtype)
    except RuntimeError:  # its strides, or its length, do not allow that
        return None
    made = write(tape, _VIEW_DTYPE, (of_base, dtype), {}, [of_base], [None], [units]).outputs[0]
    made.constant = made.detached = True
    return units, made


def _write_base(tape: Tape, tensor: Tensor, new: Value, target: Tensor, old: Value, cut: bool, pending: int) -> Value:
    """Records what a write to the view `tensor` makes of its base; returns the base's new value."""
    base = tensor._base
    assert base is not None
    made = base if target is base else target
    stored = as_stored(tensor, target)  # a conjugated view writes the conjugate of what it shows
    part = turned(tape, new, tensor, target, stored)
    reals = aliases.in_reals(stored, target)
    if reals is not stored:
        part = write(tape, AS_REAL, (part,), {}, [part], [None], [reals]).outputs[0]
    place = aliases.place_of(reals, target)
    node = write(tape, write_view, (old, part, *place), {}, [old, part], [None, None], [made], cut=cut)
    if not tape.strong:
        old.ended = node.seq
    if cut:
        node.mutates = ((0, 0),)
    node.outputs[0].constant = old.constant and (cut or new.constant)
    if old.detached:
        node.outputs[0].detached = True
    if target is not base:
        pairs = node.outputs[0]
        node = write(tape, AS_COMPLEX, (pairs,), {}, [pairs], [None], [base])
        node.outputs[0].constant = pairs.constant
    aliases.share(node.outputs[0], new)
    rebind(base, version_of(base) + pending)
    return node.outputs[0]


def _read_off(tape: Tape, base: Tensor, of_base: Value, other: Tensor, held: Value | None, detached: bool) -> None:
    """Records what `other`, which is no view of `base`, holds after a write to that."""
    place = aliases.place_of(other, base)
    above = None if other._base is None else bound(other._base)
    constant = held is not None and (held.constant or (above is not None and above.constant))  # a view of one is one
    past = held is not None and (of_base.constant or detached or held.detached) and not constant
    # A write through a detached alias, or seen by one, changes the contents; the gradient passes over it, as in torch.
    inputs = [of_base, held] if past and held is not None else [of_base]
    node = write(tape, read_view, (of_base, *place), {}, inputs, [None] * len(inputs), [other], cut=past)
    if past:
        node.mutates = ((1, 0),)
    node.outputs[0].constant = constant
    node.outputs[0].detached = held is not None and held.detached
    aliases.share(node.outputs[0], of_base)


def _holds(wide: Tensor, part: Tensor) -> bool:
    """Whether `wide` has every place of `part`, which is not one of its views, so that a write there is one to it."""
    same = wide.dtype == part.dtype and as_stored(wide, part) is wide
    return same and bound(wide) is not None and not aliases.contains(part, wide) and aliases.contains(wide, part)


def _write_off(tape: Tape, part: Tensor, of_part: Value, wide: Tensor, detached: bool) -> None:
    """Records what `wide` holds after a write to `part`, which has some of its memory and is no view of it."""
    held = bound(wide)
    assert held is not None
    past = (of_part.constant or detached or held.detached) and not held.constant
    place = aliases.place_of(part, wide)
    node = write(tape, write_view, (held, of_part, *place), {}, [held, of_part], [None, None], [wide], cut=past)
    if past:
        node.mutates = ((0, 0),)
    node.outputs[0].constant, node.outputs[0].detached = held.constant, held.detached
    aliases.share(node.outputs[0], of_part)


def unrecorded(func: OpOverload, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Inside te.pause(): what a rule needs is kept before a write, results are constants."""
    written = _written(plan, args, kwargs)
    for tensor in written:
        value = bound(tensor)
        if value is not None:
            aliases.protect(tensor, value)
    result = call(func, args, kwargs, lazily=False)
    for tensor in written:
        for neighbour in aliases.neighbours(tensor):
            unbind(neighbour)
        unbind(tensor)
    if not plan.writes and func is not LIFT:
        as_constants(tensors_in(result))
    return result


class Sparing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears what a forward writes to, and puts copies into the cells that look there before it does."""

    def __init__(self, taken: Taken) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.taken = taken
        self.spared: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as the recorder's own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for key in plan_of(func, args).writes:
            given = kwargs.get(key) if isinstance(key, str) else args[key] if key < len(args) else None
            for tensor in tensors_in(given):
                for value, mine in zip(self.taken.inputs, self.taken.tensors, strict=True):
                    if aliases.same_storage(tensor, mine):
                        if value.aliases is None:
                            aliases.join(mine, value)
                        self.spared += aliases.protect(tensor, value)
                        break
        return func(*args, **kwargs)
