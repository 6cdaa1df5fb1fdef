"""Custom ``torch.autograd.Function``: one node a call, whose rule is the function's own ``backward``.

The forward runs once, as the user's code would run it, on a context of our own making (`contexts`). What that was
given (saved tensors, attributes, random masks) is what ``backward`` finds in the sweep. Torch itself calls the function
as well, inside a twin of it (`_twin_of`), which has the same forward and hands the same context to the same
backward: so the result has the ``requires_grad``, the ``grad_fn`` and the errors of the code without a recording.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import aliases, exits, regions
from ..errors import TapeWarning, message
from ..names import call_site, user_frame
from ..registry import Op
from ..tape import Node, Tape, Value, bind, bound, current_tape, unbind, unwritten
from .called import is_freezing, record_call
from .contexts import Call, Run, Saved, by_input, call_in, context_of, no_gradient_lost, sets_up_apart
from .inplace import Sparing, settle
from .listening import Recorded, listen
from .mode import quietly
from .several import beside
from .state import ONCE, current_tape_is_global, is_cut, state, tensors_in
from .taken import Taken, operands_note
from .writing import ALIAS, hold, join_views, read, stays_closed, undo, write

__all__ = ["FunctionOp"]

Tensor = torch.Tensor
_Function = torch.autograd.Function


# -- recording -----------------------------------------------------------------------------------------------


class FunctionOp(Op):
    """The operation that a custom function is on a tape; the last argument of its nodes is a `Run` or a `Call`."""

    def __init__(self, cls: Any) -> None:
        reference = weakref.ref(cls)  # the table of operations must not keep the class alive

        def forward(*args: Any) -> Any:
            return exits.plain_apply(reference())(*args[:-1])

        super().__init__(forward, name=cls.__name__, broadcasts=True)
        own = list(inspect.signature(cls.forward).parameters)
        self._own = tuple(own if sets_up_apart(cls) else own[1:])

        def function_grad(g: Any, out: Any, *args: Any) -> Any:
            return _gradients(g, args)

        function_grad.__name__ = f"{cls.__name__}_grad"
        self.rule(function_grad)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = call_in(args)
        result = call.function.apply(*args[:-1])  # recorded again, if something listens
        call.listed(result)
        return result

    @property
    def parameters(self) -> tuple[str, ...]:
        return self._own

    def _note_reads(self) -> None:
        """Its rule reads what is in the context, and nothing of its arguments."""
        self._reads_all = self.reads_output = False
        self.argument_reads = ()

    def bare(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[:-1], call_in(args))


_ops: weakref.WeakKeyDictionary[type, FunctionOp] = weakref.WeakKeyDictionary()


def _op_of(cls: Any) -> FunctionOp:
    found = _ops.get(cls)
    if found is None:
        found = _ops[cls] = FunctionOp(cls)
    return found


def _twin_of(cls: Any) -> Any:
    """What torch applies in the place of a function: it takes a `Run` besides, whose context it uses."""
    of_torch = cls._backward_cls
    made = vars(of_torch).get("_twin")
    if made is None:
        kind: Any = type(_Function)
        made = of_torch._twin = kind(cls.__name__, (_Twin,), {"__module__": cls.__module__})
        made._backward_cls = of_torch  # of which the grad_fn of a result is to be
    return made


class _Twin(_Function):
    @staticmethod
    def forward(ctx: Any, run: Run, *args: Any) -> Any:
        own = run.ctx
        result = run.call.forward(own, args)
        ctx.run = run
        ctx._forward_cls = _Twin  # whose backward torch calls
        ctx.set_materialize_grads(False)
        if own.dirty_tensors is not None:
            ctx.mark_dirty(*own.dirty_tensors)
        if own.non_differentiable is not None:
            ctx.mark_non_differentiable(*own.non_differentiable)
        made = result if isinstance(result, tuple) else (result,)
        run.own = [(name, each) for name, each in vars(own).items() if any(each is t for t in made if t is not None)]
        ctx.save_for_backward(*(own.to_save or ()), *[each for _, each in run.own])
        return result

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        run: Run = ctx.run
        own, saved = run.ctx, ctx.saved_tensors
        count = len(saved) - len(run.own)
        own._lent = saved[:count]
        for (name, _), each in zip(run.own, saved[count:], strict=True):
            setattr(own, name, each)
        values = [each.value if isinstance(each, Saved) else None for each in own._saved] + run.values
        for each, value in zip(saved, values, strict=False):
            held = bound(each) if isinstance(each, Tensor) else value
            if value is not None and held is not value and (held is None or held.leaf):
                bind(each, value, value.node)  # torch makes another tensor of an output that it has saved
        try:
            return (None, *run.call.backward(own, g))
        finally:
            own._lent = None
            for name, alias in run.own:
                setattr(own, name, alias)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        own = ctx.run.ctx
        own._lent = own.saved_for_forward
        try:
            return ctx.run.call.function.jvp(own, *tangents[1:])
        finally:
            own._lent = None


def _listens(args: tuple[Any, ...]) -> bool:
    """Whether a call of a function with these arguments is to be recorded."""
    if state.quiet or state.paused or state.opening:
        return False
    return not current_tape_is_global() or state.linking or any(isinstance(each, Recorded) for each in args)


def _apply(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``cls.apply(*args, **kwargs)``, recorded if something listens."""
    plain = exits.plain_apply(cls)
    if not _listens(args):
        return plain(*args, **kwargs)
    if cls.__module__ == "torch.utils.checkpoint":
        if cls.__name__ == "CheckpointFunction":
            return _checkpointed(*args)
        with quietly():  # keeps the arguments for torch's own backward (up to 2.11), and computes nothing
            return plain(*args, **kwargs)
    if torch._C._are_functorch_transforms_active():
        _warn_of_transforms(cls)
        return plain(*args, **kwargs)
    if sets_up_apart(cls):
        given = inspect.signature(cls.forward).bind(*args, **kwargs)
        given.apply_defaults()
        args, kwargs = given.args, given.kwargs
    if kwargs:
        return plain(*args, **kwargs)  # torch refuses them
    with quietly():
        return _record(cls, args)


def _checkpointed(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
    """``checkpoint(function, *args, use_reentrant=True)``: what it runs is recorded like any other code.

    Torch's own backward of it would leave the gradients of parameters in ``.grad``, and none on the tape. As torch
    has it, the result requires a gradient only where an argument does.
    """
    from torch.utils.checkpoint import check_backward_validity

    check_backward_validity(args)
    result = function(*args)
    if not any(isinstance(each, Tensor) and each.requires_grad for each in args):
        with quietly():
            for tensor in tensors_in(result):
                if tensor._base is None:
                    torch._C.TensorBase.detach_(tensor)
    return result


def _record(cls: Any, args: tuple[Any, ...]) -> Any:
    tape, op = current_tape(), _op_of(cls)
    taken = Taken(op, tape, args, {})
    needs = tuple([isinstance(each, Value) and each.differentiable for each in taken.args])
    run = Run(Call(cls, needs), context_of(cls, needs))
    wholes = {id(t): read(t._base, tape) for t in taken.tensors if t._base is not None and bound(t._base) is not None}
    before = torch.get_rng_state() if tape.streams is not None else None
    spare = Sparing(taken) if _may_write(cls) else None
    try:
        with (
            nullcontext() if before is None else tape.streams.draw(args, {}),
            nullcontext() if spare is None else spare,
        ):
            result = exits.plain_apply(_twin_of(cls))(run, *args)
    except Exception as error:
        undo(tape, taken.length)
        error.add_note(operands_note(op, args, {}))
        raise
    listed = result if isinstance(result, tuple) else (result,)
    made = [each for each in listed if isinstance(each, Tensor)]
    cut = is_cut()
    if stays_closed(tape, op, taken.inputs, made):
        _note_outputs(run, listed, [Value(each) for each in made])
        return result
    if not made:
        return result  # torch has nothing to do with it
    last = run.call if cut else run
    node = write(
        tape,
        op,
        (*taken.args, last),
        {},
        taken.inputs,
        [None] * len(taken.inputs),
        made,
        sources=taken.sources,
        cut=cut,
    )
    node.outputs_tuple = isinstance(result, tuple)
    node.gaps = tuple(i for i, each in enumerate(listed) if not isinstance(each, Tensor))
    with aliases.unheard():
        node.random = before is not None and not torch.equal(before, torch.get_rng_state())
    _note_outputs(run, listed, node.outputs)
    plain = [(v, t) for v, t in zip(node.outputs, made, strict=True) if not any(t is each for each in taken.tensors)]
    join_views([v for v, _ in plain], [t for _, t in plain], taken.inputs, taken.tensors)
    _follow_writes(tape, node, run, taken, args, made, wholes, [] if spare is None else spare.spared)
    for tensor in run.ctx.non_differentiable or ():
        value = bound(tensor)
        if value in node.outputs:
            value.constant = True
    with aliases.unheard():
        _keep(run, node, taken, made)
    if not tape.strong:
        listen(tape, node)
    return result


def _note_outputs(run: Run, listed: tuple[Any, ...], values: Sequence[Value]) -> None:
    left = iter(values)
    run.call.outputs = tuple([next(left) if isinstance(each, Tensor) else each for each in listed])
    run.call.single = len(listed) == 1


def _follow_writes(
    tape: Tape,
    node: Node,
    run: Run,
    taken: Taken,
    args: tuple[Any, ...],
    made: list[Tensor],
    wholes: dict[int, Value],
    spared: list[Any],
) -> None:
    """What ``ctx.mark_dirty`` says of the arguments that the function has written to."""
    dirty = run.ctx.dirty_tensors
    if not dirty:
        return
    given = [each for each in args if isinstance(each, Tensor)]
    if any(sum(regions.shares(each, other) for other in given) > 1 for each in dirty):
        how = "gives a function memory that it writes to in more than one argument"
        tape.disordered = how, "give it copies: .clone()", call_site(user_frame())
    spared = beside(spared, dirty)
    run.call.dirty = tuple(i for i, each in enumerate(args) if any(each is t for t in dirty))
    written = [(i, t) for i, t in enumerate(made) if any(t is each for each in dirty)]
    before = [taken.inputs[next(i for i, t in enumerate(taken.tensors) if t is tensor)] for _, tensor in written]
    node.mutates = tuple((taken.inputs.index(old), place) for (place, _), old in zip(written, before, strict=True))
    all_wholes = [
        None if t._base is None else wholes[id(t)] if id(t) in wholes else read(t._base, tape) for _, t in written
    ]
    settle(tape, node, [i for i, _ in written], [t for _, t in written], before, all_wholes, spared, pending=0)
    for tensor in dirty if node.cut else ():  # of which torch returns a detached alias
        alias = next((i for i, t in enumerate(made) if regions.same_place(t, tensor)), -1)
        if alias < 0 or made[alias] is tensor:
            continue
        old, new = taken.value_of(tensor), node.outputs[alias]
        new.detached = True
        whole = wholes.get(id(tensor))
        if tensor._base is not None and unwritten(tensor._base):
            whole = bound(tensor._base)  # with what the tensors before this one have written there
        copied, apart = hold(tape, tensor, old, new), (None, made[alias])
        settle(tape, copied, [0], [tensor], [old], [whole], [*spared, apart], pending=0)


def _keep(run: Run, node: Node, taken: Taken, made: list[Tensor]) -> None:
    """Puts what the function has saved into cells, and lets its context hold no tensor that holds the node."""
    ctx = run.ctx
    if node.cut:
        return
    outputs = {id(tensor): value for tensor, value in zip(made, node.outputs, strict=True)}
    inputs = {id(t): v for t, v in zip(taken.tensors, taken.inputs, strict=True) if bound(t) is v and unwritten(t)}

    def saved(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        value = outputs.get(id(each))
        if value is not None:  # an alias: the tensor keeps the node alive, the node must not keep it
            return Saved(node, value, value.keep(ALIAS(each)))
        value = inputs.get(id(each))
        if value is None:
            value = Value(each, constant=True)
            aliases.join(each, value)
        return Saved(node, value, value.keep(each))

    given = ctx.to_save
    ctx._saved = tuple([saved(each) for each in given]) if isinstance(given, tuple) else ()
    ctx.to_save = ctx.dirty_tensors = ctx.non_differentiable = ctx.saved_for_forward = None
    run.values = [outputs[id(each)] for _, each in run.own]
    run.own = [(name, ALIAS(each)) for name, each in run.own]
    for name, alias in run.own:
        setattr(ctx, name, alias)


def _may_write(cls: Any) -> bool:
    """Whether a function may write to its arguments, by what its code names."""
    return any(
        code is None or "mark_dirty" in code.co_names
        for each in (cls.forward, cls.setup_context)
        for code in [getattr(inspect.unwrap(each), "__code__", None)]
    )


def _warn_of_transforms(cls: Any) -> None:
    warnings.warn(
        message(
            f"{cls.__name__} is applied inside a transform of torch.func: the operations of its forward are recorded, "
            "and a sweep through them does not use its backward.",
            where=call_site(user_frame()),
            fix="apply it outside torch.func, or make it an operation with a rule: te.op",
        ),
        TapeWarning,
        stacklevel=4,
    )


exits.on_function(_apply)


# -- the sweep -----------------------------------------------------------------------------------------------


def _gradients(g: Any, args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The rule of every custom function: for each input the gradient that its own backward gives."""
    run = args[-1]
    call = run.call
    each_g = list(g) if isinstance(g, tuple) else [g]
    if is_freezing():
        return record_call(call, each_g, args)
    if not state.linking or state.quiet:
        with no_gradient_lost(call.title):
            return by_input(call.backward(run.ctx, each_g), args)
    tape, user = current_tape(), call.function.vjp if call.function.vjp is not _Function.vjp else call.function.backward
    length = tape.length
    once = getattr(user, "__code__", None) is _ONCE
    for (_, alias), value in zip(run.own, run.values, strict=True):
        bind(alias, value, value.node)
    before, state.grad_mode = state.grad_mode, True  # as torch does where a gradient is to be differentiated again
    try:
        with no_gradient_lost(call.title), quietly() if once else torch.enable_grad():
            found = call.backward(run.ctx, each_g)
            if once:
                found = [_closed(each) if isinstance(each, Tensor) else each for each in found]
    finally:
        state.grad_mode = before
        for _, alias in run.own:  # which would else keep the node alive
            unbind(alias)
    for ref in tape._nodes[length:]:
        node = ref if isinstance(ref, Node) else ref()
        if node is not None:
            node.context = call.title
    return by_input(found, args)


_ONCE = once_differentiable(lambda ctx: None).__code__


def _closed(g: Tensor) -> Tensor:
    """A gradient that cannot be differentiated again, as a sweep that reaches it says."""
    made = ALIAS(g)
    value = Value(made)
    value.closed = ONCE
    bind(made, value, None)
    return made
