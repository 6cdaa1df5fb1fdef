"""The second door: a dispatch mode that hears every torch operation of the thread.

It stands below torch's own autograd and composites: what it hears are ATen overloads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass, _is_torch_function_mode_enabled
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ..plans import BATCH_NORM, plan_of, plans_by_id
from ..tape import Tape, Value, bind, current_tape, rebind, unbind, values_by_tensor, version_of
from .decisions import decided
from .inplace import record_write, unrecorded
from .plain import record_plain
from .saved import is_unpacking, saved_unheard
from .shortcut import left_out
from .state import DETACH, LIFT, VIEW_DTYPE, state, tensors_in, without_vectors
from .strict import refuse_without_rule
from .taken import Taken, enter
from .unshared import record_update
from .writing import call, join_views, read, stays_closed, undo, write

__all__ = ["Mode", "mode_of", "quietly", "recording"]

Tensor = torch.Tensor


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears the ATen overloads that this thread runs, and records them on one tape."""

    recast = -1  # the last view(dtype), until torch makes the alias of what it gave that it hands out in its place;
    count = 0  # the count of writes that this will share

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard against torch.compile around each call takes longer than the call

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tape = self.tape
        if _is_torch_function_mode_enabled():  # run by torch itself: they hear the user alone
            with DisableTorchFunction():
                return self.__torch_dispatch__(func, types, args, kwargs)
        plan = plans_by_id.get(id(func))
        if plan is not None and plan.plain and not (kwargs or state.deaf) and tape is current_tape():
            return record_plain(tape, plan, args)
        kwargs = kwargs or {}
        if state.quiet or (tape.strong and tape is not current_tape()):
            return func(*args, **kwargs)
        if state.values_alone:
            args = without_vectors(func, args)
        if plan is None or func is BATCH_NORM:
            plan = plan_of(func, args)
        if state.paused:
            return unrecorded(func, plan, args, kwargs)
        random = plan.draws(args)
        if random and tape.streams is not None and not tape.streams.drawing:
            with tape.streams.draw(args, kwargs):
                return self.__torch_dispatch__(func, types, args, kwargs)
        if plan.updates and not kwargs and (result := record_update(tape, plan, args)) is not NotImplemented:
            return result
        if plan.writes:
            return record_write(tape, func, plan, args, kwargs)
        if func is DETACH and not state.detaching:  # autograd saves an output: it is the same value
            value = saved_unheard(args[0], tape) or (None if is_unpacking(args[0]) else read(args[0], tape))
            result = call(plan.call, args, kwargs, lazily=False)
            if value is None:
                return result  # it is known by what torch makes of it
            bind(result, value, value.node)
            if value.node is not None and value.node.seq == self.recast:
                value._tensor, self.recast = weakref.ref(result), -1
                rebind(result, self.count)
            return result
        taken = Taken(plan.op, tape, args, kwargs)
        if tape.strict:
            refuse_without_rule(plan.op, taken.inputs)
        if func is LIFT:
            return _lift(tape, func, args[0])
        try:
            result = call(func, args, kwargs, lazily=taken.complex)
        except BaseException:
            undo(tape, taken.length)
            raise
        made = tensors_in(result)
        if plan.views and any(tensor is given for tensor in made for given in taken.tensors):
            return result  # nothing was done: it is the argument itself
        if (made or plan.guard) and not stays_closed(tape, plan.op, taken.inputs, made):
            node = enter(taken, made)
            node.random = random
            node.note_form(result)
            if plan.views:
                join_views(node.outputs, made, taken.inputs, taken.tensors)
                if func is DETACH or func is VIEW_DTYPE:
                    node.outputs[0].constant = node.outputs[0].detached = True
                    if (given := values_by_tensor.get(id(args[0]))) is not None:
                        rebind(made[0], *given.versions)  # up to 2.8 torch detaches twice: the first is of no count yet
                if func is VIEW_DTYPE:
                    self.recast, self.count = node.seq, version_of(taken.tensors[0])
            if plan.guard:
                node.result = result
                if not tape.strong:
                    decided(tape, node)
        return result


class Around(Mode):  # type: ignore[no-untyped-call]
    """A `Mode` for a block that stands inside modes of the user's: these hear what the code runs, and nothing else."""

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tape, depth = self.tape, torch._C._len_torch_dispatch_stack()
        if depth == 0 or state.quiet or (tape.strong and tape is not current_tape()):
            return super().__torch_dispatch__(func, types, args, kwargs)
        state.around = [torch._C._pop_torch_dispatch_stack(None) for _ in range(depth)][::-1]
        state.deaf += 1  # past the quick way, which calls torch by itself
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            state.deaf -= 1
            modes, state.around = state.around, []
            for mode in modes:
                torch._C._push_on_torch_dispatch_stack(mode)


def mode_of(tape: Tape) -> Mode:
    """The mode by which `tape` hears torch from now on."""
    depth = torch._C._len_torch_dispatch_stack()
    alone = all(isinstance(torch._C._get_dispatch_stack_at(i), Mode) for i in range(depth))
    return Mode(tape) if alone else Around(tape)


def _lift(tape: Tape, func: OpOverload, fresh: Tensor) -> Any:
    """``torch.tensor(…)``: the tensor is made anew on each run of the code, so its first contents are kept."""
    unbind(fresh)
    original = fresh.clone()
    value = Value(original)
    tape.hold(original)
    value.constant = True
    bind(original, value, None)
    result = call(func, (fresh,), {}, lazily=False)
    write(tape, plan_of(func).op, (value,), {}, [value], [None], [result])
    return result


class quietly:
    """A context in which nothing is recorded: the body of an operation, a rule, a replay."""

    def __enter__(self) -> None:
        self.guard = DisableTorchFunctionSubclass()
        self.guard.__enter__()
        self.shortcut = left_out()
        self.shortcut.__enter__()
        self.mode = None
        depth = torch._C._len_torch_dispatch_stack()
        if depth and isinstance(torch._C._get_dispatch_stack_at(depth - 1), Mode):
            self.mode = torch._C._pop_torch_dispatch_stack(None)  # else each operation would pay the detour
        state.quiet += 1
        state.deaf += 1

    def __exit__(self, *error: object) -> None:
        state.quiet -= 1
        state.deaf -= 1
        if self.mode is not None:
            torch._C._push_on_torch_dispatch_stack(self.mode)
        self.shortcut.__exit__()
        self.guard.__exit__(None, None, None)


@contextmanager
def recording(tape: Tape, *, sweep: bool = False, opening: bool = False) -> Iterator[None]:
    """A context in which every torch operation is recorded on `tape`, whatever happens around it.

    With ``sweep=True`` for a sweep that is recorded: it runs under ``no_grad`` without being cut, and what
    the rules are given is linked to the values that it stands for. With ``opening=True`` a named operation
    is recorded as the torch operations of its body.
    """
    before = state.quiet, state.deaf, state.grad_mode, state.linking, state.opening
    state.quiet, state.deaf, state.opening = 0, state.paused, opening
    if sweep:
        state.grad_mode, state.linking = False, True
    try:
        with mode_of(tape):
            yield
    finally:
        state.quiet, state.deaf, state.grad_mode, state.linking, state.opening = before
