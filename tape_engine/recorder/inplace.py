"""In-place writes: recorded as what they compute, and followed to every tensor that sees them.

``x.add_(y)`` is recorded as ``add(x, y)``, whose output `x` holds from then on. What a rule still needs of the
old contents is copied before; a view's write is carried to its base, and from there to the other views.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from .. import aliases, regions, registry
from ..names import call_site, user_frame
from ..places import overlapping, positions
from ..plans import MISSING, Plan, plan_of
from ..tape import (
    Kept,
    Node,
    Tape,
    Value,
    bound,
    dense,
    rebind,
    unbind,
    version_of,
)
from .asked import ends_there, note_write, updated
from .moved import given_memory, part
from .several import beside, expect, in_disorder
from .spreading import spread
from .state import IN_TURN, LIFT, OVERLAPPED, is_cut, tensors_in
from .strict import refuse_without_rule
from .taken import Taken, enter
from .writing import (
    as_constants,
    call,
    read,
    reshaped,
    stays_closed,
    write,
)

__all__ = ["Sparing", "completed", "overlaps", "record_write", "settle", "unrecorded"]

Tensor = torch.Tensor


def record_write(tape: Tape, func: OpOverload, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that writes to its arguments, recorded as its functional twin."""
    if plan.gives_memory:
        return given_memory(tape, func, args, kwargs)
    given_args, given_kwargs = completed(args, kwargs, plan), kwargs
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
        if len(written) > 1:
            spared = beside(spared, written)
        if plan.statistics:  # which are the last, and moved on before all others are read
            others = taken.tensors[: -len(written)]
            confused = any(regions.shares(each, tensor) for tensor in written for each in others)
        else:
            others = taken.tensors
            confused = any(regions.askew(each, t) for t in written for each in others if each is not t)
            factors = _FACTORS.get(plan.op.forward)
            if factors is not None:  # torch's products do not even look whether they write to what they read
                confused = confused or any(regions.shares(each, t) for t in written for each in others[factors:])
        if confused:
            how = "writes to memory that the same operation reads at other places"
            tape.disordered = how, "give it a copy of what it reads: .clone()", call_site(user_frame())
    disorder = in_disorder(args, written) if len(written) > 1 else ""
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
    if len(written) > 1:
        expect(written)
    if disorder:
        _note_disorder(tape, node, range(first, len(made)), disorder)
    if node.cut and (plan.outs or plan.restrides):
        for place, (tensor, old) in enumerate(zip(written, before, strict=True), start=first):
            if tensor._base is not None and old.shape != tensor.shape:
                node.outputs[place].stale = True  # as in torch: a view of its base, in its new shape
            elif (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
                reshaped(node, place, old, tensor)
    return result


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
        if not restrides and node.op.forward not in _IN_ORDER and overlaps(old):
            _note_disorder(tape, node, [place], OVERLAPPED)
        if not tape.strong:  # which lets go of the node, if nobody reads what it wrote
            old.ended = node.seq
        # Under no_grad torch lets the gradient of a tensor pass over a write as if it had not been.
        new.constant = old.constant if node.cut else statistics
        new.name = old.name if old.leaf else None
        if old.detached:
            new.detached = True
        if not alone or old.aliases is not None:
            aliases.share(new, old)
        if tensor._base is not None and tensor.is_conj():
            new = _conjugated(tape, new, tensor)
        rebind(tensor, version_of(tensor) + pending)
        if alone:
            continue
        if not node.cut and new.aliases is not None and new.aliases.kin:
            part(tensor, node, pending)
        if restrides and node.cut:
            for other in aliases.neighbours(tensor):
                held = bound(other)
                if other._base is tensor and held is not None:
                    note_write(other, held, pending)
                    held.stale = True  # as in torch: a view of what that is now, whose gradient passes over the change
                rebind(other, version_of(other) + pending)
            new.stale = tensor._base is not None  # likewise
        else:
            whole = wholes[k]
            if k and whole is not None and tensor._base is not None:
                whole = bound(tensor._base) or whole  # what the writes before this one have made of it
            spread(tape, tensor, new, whole, untouched, node.cut, pending)
            if node.cut and tensor._base is not None and not (new.constant or updated(old, old.node).begins):
                note_write(tensor, new, pending)
                if whole is not None and ends_there(whole):  # the base was detached in place
                    new.stale = True
    for cell, tensor in spared:
        if cell is None and tensor._base is not None and (held := bound(tensor)) is not None:
            note_write(tensor, held, pending)
            above = None if held.constant or regions.parted(tensor) else bound(tensor._base)
            held.stale = held.stale or (above is not None and ends_there(above))  # torch may ask anew


def _conjugated(tape: Tape, value: Value, tensor: Tensor) -> Value:
    """What `tensor`, a conjugated view that was written to, holds as `value`: as a view again, of the conjugate.

    Its other views, ``.real`` say, look into memory of that, which a replay has only if the tape tells of it.
    """
    stored = write(tape, _PHYSICALLY, (value,), {}, [value], [None], [torch.conj(tensor)]).outputs[0]
    made = write(tape, _CONJ, (stored,), {}, [stored], [None], [tensor]).outputs[0]
    made.constant, made.detached = value.constant, value.detached
    aliases.share(made, value)
    return made


_CONJ, _PHYSICALLY = registry.find(torch.ops.aten._conj.default), registry.find(torch.ops.aten._conj_physical.default)


def _note_disorder(tape: Tape, node: Node, places: Iterable[int], reason: str) -> None:
    """What `node` made at `places` depends on which of several elements it wrote, or read, first."""
    how, fix = _DISORDER[reason]
    tape.disordered = how, fix, call_site(user_frame())
    if not node.cut:
        for place in places:
            node.outputs[place].closed = reason


_DISORDER = {
    OVERLAPPED: ("writes to elements several of which lie in one place", "write to a copy of it: .clone()"),
    IN_TURN: ("reads for one item of a list what it writes for another", "give it copies of what it reads: .clone()"),
}

#: Products, with the place of the first factor among the tensors that they are given.
_FACTORS = {getattr(torch.ops.aten, name).default: 0 for name in ("mm", "bmm", "mv")}
_FACTORS |= {getattr(torch.ops.aten, name).default: 1 for name in ("addmm", "addbmm", "baddbmm", "addmv")}

#: What writes the elements one after the other, and reads none of them: where several lie in one place, the last stays.
_IN_ORDER = {
    torch.ops.aten.copy.default,
    torch.ops.aten.fill.Scalar,
    torch.ops.aten.fill.Tensor,
    torch.ops.aten.zero.default,
}


def overlaps(value: Value) -> bool:
    """Whether several elements of a value lie in one place of memory; where that is dear to tell, whether they may."""
    if not value.strides or id(value.strides) in dense or not overlapping(value.shape, value.strides):
        return False
    if value.numel() > 1 << 20:
        return True
    return bool((torch.bincount(positions(value.shape, value.strides, 0, torch.device("cpu"))) > 1).any())


def _written(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    found: list[Tensor] = []
    for key in plan.writes:
        given = kwargs.get(key) if isinstance(key, str) else (args[key] if key < len(args) else None)
        found += tensors_in(given)
    return found


def completed(args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan) -> tuple[Any, ...]:
    """The arguments with those defaults of theirs that the functional twin may not have."""
    left = plan.defaults[len(args) :]
    if kwargs or MISSING in left:
        return args
    return (*args, *left)


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
                    if regions.same_storage(tensor, mine):
                        if value.aliases is None:
                            aliases.join(mine, value)
                        self.spared += aliases.protect(tensor, value)
                        break
        return func(*args, **kwargs)
