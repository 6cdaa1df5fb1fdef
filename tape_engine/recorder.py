"""The recorder: the one place where the engine listens to torch.

Three doors lead onto a tape, and behind each the same function (`write`) makes the node:

- a **named operation** (``te.lin(X, w, b)``) records itself, on the current tape;
- inside ``with te.record():`` a dispatch mode hears **every torch operation** of the thread. It stands
  below torch's own autograd and composites: what it hears are ATen overloads;
- outside such a block a recorded tensor is a `Recorded`: torch's tensor under another class name, which
  sends the **plain torch operations** applied to it through the same mode onto the global tape, so
  that none of them cuts a gradient in silence.

An in-place write is recorded as what it computes: ``x.add_(y)`` is ``add(x, y)``, whose output `x` holds
from then on. `aliases` follows the other tensors that look into the same storage.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch._C import DisableTorchFunctionSubclass
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from . import aliases, exits, modules, registry
from .errors import DTypeError, MissingRuleError, message
from .names import call_site, local_name, user_frame
from .plans import MISSING, Plan, plan_of
from .registry import Op
from .tape import (
    Kept,
    Node,
    Tape,
    Token,
    Value,
    bind,
    bound,
    current_tape,
    describe,
    pop_tape,
    push_tape,
    rebind,
    unbind,
    values_by_tensor,
    version_of,
)

__all__ = ["Recorded", "forget_leaves", "pause", "quietly", "record", "recording", "scope", "stop_gradient"]

Tensor = torch.Tensor


class _State(threading.local):
    """What the recorder of this thread is doing."""

    def __init__(self) -> None:
        self.quiet = 0  # inside the body of a named operation, a rule, a replay: nothing is heard
        self.detaching = 0  # inside a detach() of the user's
        self.paused = 0  # inside te.pause(): heard, and left out
        self.opening = False  # named operations run their bodies, which are heard
        self.linking = False  # inside a sweep that is recorded: every binding counts, closed or not
        self.grad_mode = True  # torch's grad mode where the recording began: a change of it is a cut
        self.scope: tuple[str, ...] = ()


_state = _State()

SWEPT = "belongs to a tape that was already swept"
UNSEEN = "was changed by a write that the recorder could not see"
OUTSIDE = "was computed by torch operations outside the recording"


# -- which value does a tensor hold? ---------------------------------------------------------------------


def read(tensor: Tensor, tape: Tape) -> Value:
    """The value that `tensor` holds now; a new leaf if no tape knows it."""
    entry = values_by_tensor.get(id(tensor))
    if entry is None:
        above = None if tensor._base is None else values_by_tensor.get(id(tensor._base))
        if above is not None and above[2] is not None and not _state.linking:
            return _reread(tensor, above[1].constant, tape)  # a view made outside of a base written to since
        return _leaf(tensor, tape)
    _, value, node, counts = entry
    if _state.linking:
        return value
    if value.stale:
        return _reread(tensor, value.constant, tape)
    unchanged = version_of(tensor) in counts
    if node is None:
        if unchanged and value.shape == tensor.shape and value.dtype == tensor.dtype:
            tape.hold(tensor)
            return value
        # written to between two recordings
        return _leaf(tensor, tape, name=value.name, closed=UNSEEN if value.closed == UNSEEN else "")
    if not unchanged:
        return _leaf(tensor, tape, closed=UNSEEN)
    if tensor.dtype != value.dtype or tensor.shape != value.shape:
        return _leaf(tensor, tape)  # x.data = y
    if (
        tensor.requires_grad
        and tensor.is_leaf
        and value.holder is not tensor
        or value.constant
        and tensor.requires_grad
    ):
        return _leaf(tensor, tape)  # a new beginning: nn.Parameter(x), x.detach().requires_grad_()
    if node.tape is not tape.token:
        if not value.differentiable or _is_update(value, node):
            # no gradient passes, or an optimizer wrote to a parameter: a leaf, so that a counter or a statistic does not chain one step to the next
            leaf = _leaf(tensor, tape, name=value.name)
            leaf.constant = value.constant
            return leaf
        if node.closed:
            # To go on from a closed tape would keep every step of a loop alive, to stop there would cut the
            # gradient in silence: a leaf stands for the value, and the sweep that reaches it says so.
            stand_in = Value(tensor)
            stand_in.name = value.name or local_name(user_frame(), tensor)
            stand_in.closed = SWEPT
            return stand_in
    return value


def _is_update(value: Value, node: Node | None) -> bool:
    """Whether a value is what writes under ``no_grad`` made of a leaf: the leaf itself, as torch sees it."""
    if node is None or not node.cut:
        return False
    while node is not None and node.cut:
        place = next((i for i, j in node.mutates if j == value.index), -1)
        if place < 0:
            return False
        value, node = node.inputs[place], node.sources[place]
    return value.leaf


def _leaf(tensor: Tensor, tape: Tape, *, closed: str = "", name: str | None = None) -> Value:
    value = Value(tensor)
    value.name = name or modules.parameter_name(tensor) or local_name(user_frame(), tensor)
    value.closed = closed or (OUTSIDE if tensor.grad_fn is not None else "")
    bind(tensor, value, None)
    aliases.join(tensor, value)
    tape.hold(tensor)
    return value


def _reread(tensor: Tensor, constant: bool, tape: Tape) -> Value:
    """The value of a view whose base was written to: read off what the base holds now."""
    if tensor._base is None:
        return _leaf(tensor, tape, closed=UNSEEN)
    base, whole = _in_units_of(tensor, tensor._base, read(tensor._base, tape), tape)
    if not aliases.covers(base, tensor):
        return _leaf(tensor, tape, closed=UNSEEN)
    place = aliases.place_of(tensor, base)
    value = write(tape, aliases.read_view, (whole, *place), {}, [whole], [None], [tensor]).outputs[0]
    value.constant = constant
    aliases.share(value, whole)
    return value


def _in_units_of(tensor: Tensor, base: Tensor, whole: Value, tape: Tape) -> tuple[Tensor, Value]:
    """`base` in the numbers that `tensor` consists of: the pairs of reals of a complex base, for a real view."""
    if not base.is_complex() or tensor.is_complex():
        return base, whole
    pairs = torch.view_as_real(base.resolve_conj() if base.is_conj() else base)
    return pairs, write(tape, _AS_REAL, (whole,), {}, [whole], [None], [pairs]).outputs[0]


_AS_REAL = registry.find(torch.ops.aten.view_as_real.default)
_AS_COMPLEX = registry.find(torch.ops.aten.view_as_complex.default)


def _tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for each in result for tensor in _tensors_in(each)]
    return []


def _gaps(result: Any) -> tuple[int, ...]:
    """The places in a returned tuple where None stands."""
    return tuple(i for i, each in enumerate(result) if each is None) if isinstance(result, (tuple, list)) else ()


# -- writing a node ----------------------------------------------------------------------------------------


def write(
    tape: Tape,
    op: Op,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Sequence[Value],
    kept: Sequence[Kept | None],
    made: Sequence[Tensor],
    *,
    cut: bool = False,
) -> Node:
    """Records one operation; afterwards the tensors `made` hold its outputs.

    `args` and `kwargs` have values in the place of tensors; `inputs` are those values in order, and `kept`
    the cells of those whose data the gradient rule reads.
    """
    frame = user_frame()
    path = modules.path()
    node = Node(
        op,
        args,
        kwargs,
        tuple(inputs),
        None if frame is None else frame.f_code,
        0 if frame is None else frame.f_lasti,
        _state.scope + path if path else _state.scope,
    )
    ref = weakref.ref(node)
    outputs = []
    for index, tensor in enumerate(made):
        value = Value(tensor, constant=cut)
        value.index = index
        value._node = ref
        bind(tensor, value, node)
        outputs.append(value)
    node.outputs = tuple(outputs)
    if cut:
        node.cut = True
    elif op.reads_output:
        # An alias instead of the tensor itself: the tensor keeps the node alive, the node must not keep it.
        node.saved = (*kept, *[v.keep(t.detach()) for v, t in zip(outputs, made, strict=True)])
    else:
        node.saved = tuple(kept)
    tape.append(node)
    return node


class _Taken:
    """The arguments of a call with values in the place of tensors.

    Attributes:
        args, kwargs: the arguments.
        inputs: the values, in order.
        tensors: the tensors that hold them.
        kept: the cells of those that the rule reads, made before the call: it may write to them.
    """

    __slots__ = ("args", "inputs", "kept", "kwargs", "length", "op", "tape", "tensors")

    def __init__(self, op: Op, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.op = op
        self.tape = tape
        self.length = tape.length
        self.inputs: list[Value] = []
        self.tensors: list[Tensor] = []
        self.kept: list[Kept | None] = []
        self.args = tuple([self.take(a, op.reads_argument(i)) for i, a in enumerate(args)])
        self.kwargs = {k: self.take(a, op.reads_argument(k)) for k, a in kwargs.items()} if kwargs else kwargs

    def value_of(self, tensor: Tensor) -> Value:
        """The value of a tensor that the call writes to, which it may have been given as an argument or not."""
        places = [i for i, given in enumerate(self.tensors) if given is tensor]
        return self.inputs[places[0]] if places else read(tensor, self.tape)

    def undo(self) -> None:
        """After a failed call: views that were read off their bases for it will be read off again."""
        for node in self.tape.rewind(self.length):
            for value in node.outputs:
                value.stale = True

    def take(self, argument: Any, keep: bool) -> Any:
        if isinstance(argument, Tensor):
            entry = values_by_tensor.get(id(argument))
            if (  # what a chain of operations does most: read what the same tape has just made
                entry is not None
                and entry[2] is not None
                and entry[2].tape is self.tape.token
                and not entry[1].stale
                and version_of(argument) in entry[3]
                and entry[1].dtype is argument.dtype
                and not entry[1].constant
                and entry[1].holder is argument
            ):
                value = entry[1]
            else:
                value = read(argument, self.tape)
            self.inputs.append(value)
            self.tensors.append(argument)
            self.kept.append(value.keep(argument) if keep else None)
            return value
        kind = type(argument)
        if kind is list or kind is tuple:
            return kind([self.take(each, keep) for each in argument])
        return argument


def _is_cut() -> bool:
    return _state.grad_mode and not torch.is_grad_enabled()


def _refuse_without_rule(op: Op, inputs: Sequence[Value]) -> None:
    """`strict=True`: an operation through which a gradient should pass must have a registered rule."""
    if op.grad is None and op.differentiable and any(v.differentiable for v in inputs) and not _is_cut():
        raise MissingRuleError(
            message(
                f"{op.name} has no registered gradient rule, and this recording is strict.",
                where=call_site(user_frame()),
                operands=[(name, describe(v)) for name, v in zip(op.parameters, inputs, strict=False)],
                fix=rule_to_add(op),
            )
        )


def rule_to_add(op: Op) -> str:
    """The lines by which a user would register a rule for `op`."""
    target = op.name if op.is_named else f"torch.ops.{op.forward}"
    return f"@te.rule({target}) on def {op.name}_grad(g, out, {', '.join(op.parameters)}): ..."


# -- the first door: named operations ------------------------------------------------------------------------


def _call(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What calling an `Op` does: run its body unheard, then record one node."""
    if _state.quiet or _state.opening:
        return op.forward(*args, **kwargs)
    with quietly():
        args, kwargs = op.bind(args, kwargs)
        if op.check is not None:
            op.check(*args, **kwargs)
        tape = current_tape()
        taken = _Taken(op, tape, args, kwargs)
        if tape.strict and not _state.paused:
            _refuse_without_rule(op, taken.inputs)
        before = torch.get_rng_state() if op.grad is None and op.differentiable else None
        try:
            result = op.forward(*args, **kwargs)
        except Exception as error:
            taken.undo()
            error.add_note(_operands_note(op, args, kwargs))
            raise
        if any(made is given for made in _tensors_in(result) for given in taken.tensors):
            result = _apart(result, taken.tensors)
        made = _tensors_in(result)
        if not made:
            raise DTypeError(
                message(
                    f"{op.name} returned {type(result).__name__}: an operation returns a tensor or a tuple of tensors.",
                    where=call_site(user_frame()),
                )
            )
        if _state.paused:
            _as_constants(made)
            return result
        node = write(tape, op, taken.args, taken.kwargs, taken.inputs, taken.kept, made, cut=_is_cut())
        node.outputs_tuple = not isinstance(result, Tensor)
        node.gaps = _gaps(result)
        node.random = before is not None and not torch.equal(before, torch.get_rng_state())
        if op is _stop:
            node.outputs[0].constant = True
        _join_views(node.outputs, made, taken)
        if not tape.strong:
            _listen(tape, node)
    return result


registry.on_call(_call)


def _apart(result: Any, given: Sequence[Tensor]) -> Any:
    """`result` with an alias in the place of a tensor that was also an argument: a value of its own."""
    if isinstance(result, Tensor):
        return result.view_as(result) if any(result is tensor for tensor in given) else result
    if isinstance(result, (tuple, list)):
        return type(result)([_apart(each, given) for each in result])
    return result


def _operands_note(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    names = [*op.parameters, *("" for _ in args)]
    pairs = [*zip(names, args, strict=False), *kwargs.items()]
    shown = [(name, describe(each)) for name, each in pairs if isinstance(each, Tensor)]
    return message(f"in the operation {op.name}, called", where=call_site(user_frame()), operands=shown)


def _join_views(outputs: Sequence[Value], made: Sequence[Tensor], taken: _Taken) -> None:
    """Enters outputs that share an input's storage among its aliases."""
    for value, tensor in zip(outputs, made, strict=True):
        for owner, given in zip(taken.inputs, taken.tensors, strict=True):
            if aliases.same_storage(tensor, given):
                aliases.share(value, owner)
                rebind(tensor, version_of(given))
                break


def _as_constants(made: Sequence[Tensor]) -> None:
    for tensor in made:
        bind(tensor, Value(tensor, constant=True), None)


# -- the second door: every torch operation of a block --------------------------------------------------------


class _Mode(TorchDispatchMode):
    """Hears the ATen overloads that this thread runs, and records them on one tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard against torch.compile around each call takes longer than the call

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tape = self.tape
        if _state.quiet or (tape.strong and tape is not current_tape()):
            return func(*args, **kwargs)
        plan = plan_of(func, args)
        if _state.paused:
            return _unrecorded(func, plan, args, kwargs)
        if plan.writes:
            return _record_write(tape, func, plan, args, kwargs)
        taken = _Taken(plan.op, tape, args, kwargs)
        if tape.strict:
            _refuse_without_rule(plan.op, taken.inputs)
        if func is _LIFT:
            return _lift(tape, func, args[0])
        if func is _DETACH and not _state.detaching:  # autograd saves an output: it is the same value
            result = func(*args, **kwargs)
            entry = values_by_tensor.get(id(args[0]))
            bind(result, taken.inputs[0], None if entry is None else entry[2])
            return result
        try:
            result = func(*args, **kwargs)
        except BaseException:
            taken.undo()
            raise
        made = [result] if isinstance(result, Tensor) else _tensors_in(result)
        if plan.views and any(tensor is given for tensor in made for given in taken.tensors):
            return result  # nothing was done: it is the argument itself
        if made or plan.guard:
            node = write(tape, plan.op, taken.args, taken.kwargs, taken.inputs, taken.kept, made, cut=_is_cut())
            if plan.random:
                node.random = True
            if not isinstance(result, Tensor):
                node.outputs_tuple = True
                node.gaps = _gaps(result)
            if plan.views:
                _join_views(node.outputs, made, taken)
                if func is _DETACH:
                    node.outputs[0].constant = True
            if plan.guard:
                node.result = result
        return result


_LIFT = torch.ops.aten.lift_fresh.default
_DETACH = torch.ops.aten.detach.default


def _lift(tape: Tape, func: OpOverload, fresh: Tensor) -> Any:
    """``torch.tensor(…)``: the tensor is made anew on each run of the code, so its first contents are kept."""
    unbind(fresh)
    original = fresh.clone()
    value = Value(original)
    tape.hold(original)
    bind(original, value, None)
    result = func(fresh)
    write(tape, plan_of(func).op, (value,), {}, [value], [None], [result])
    return result


def _unrecorded(func: OpOverload, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Inside te.pause(): what a rule needs is kept before a write, results are constants."""
    written = _written(plan, args, kwargs)
    for tensor in written:
        value = bound(tensor)
        if value is not None:
            aliases.protect(tensor, value)
    result = func(*args, **kwargs)
    for tensor in written:
        for neighbour in aliases.neighbours(tensor):
            unbind(neighbour)
        unbind(tensor)
    if not plan.writes and func is not _LIFT:
        _as_constants(_tensors_in(result))
    return result


def _written(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    found: list[Tensor] = []
    for key in plan.writes:
        given = kwargs.get(key) if isinstance(key, str) else (args[key] if key < len(args) else None)
        found += _tensors_in(given)
    return found


def _completed(args: tuple[Any, ...], kwargs: dict[str, Any], plan: Plan) -> tuple[Any, ...]:
    """The arguments with those defaults of theirs that the functional twin may not have."""
    left = plan.defaults[len(args) :]
    if kwargs or MISSING in left:
        return args
    return (*args, *left)


def _record_write(tape: Tape, func: OpOverload, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that writes to its arguments, recorded as its functional twin."""
    given_args = tuple(a for i, a in enumerate(_completed(args, kwargs, plan)) if i not in plan.outs)
    given_kwargs = {name: a for name, a in kwargs.items() if name not in plan.outs}
    # What the rule will read is kept here, so that what is about to be overwritten gets its copy below.
    taken = _Taken(plan.op, tape, given_args, given_kwargs)
    if tape.strict:
        _refuse_without_rule(plan.op, taken.inputs)
    written = _written(plan, args, kwargs)
    before = [taken.value_of(tensor) for tensor in written]
    wholes = [None if tensor._base is None else read(tensor._base, tape) for tensor in written]
    spared = [each for tensor, value in zip(written, before, strict=True) for each in aliases.protect(tensor, value)]
    result = func(*args, **kwargs)
    fresh = [t for t in _tensors_in(result) if not any(t is w for w in written)]
    made = [*fresh, *written]
    node = write(tape, plan.op, taken.args, taken.kwargs, taken.inputs, taken.kept, made, cut=_is_cut())
    node.random = plan.random
    node.outputs_tuple = len(made) > 1 or not isinstance(result, Tensor)
    node.mutates = tuple(
        (next((i for i, v in enumerate(taken.inputs) if v is old), -1), len(fresh) + k) for k, old in enumerate(before)
    )
    aliases.refresh(spared)
    untouched = {id(tensor) for _, tensor in spared}
    for k, (tensor, old) in enumerate(zip(written, before, strict=True)):
        new = node.outputs[len(fresh) + k]
        # Under no_grad torch lets the gradient of a tensor pass over a write as if it had not been.
        new.constant = old.constant if node.cut else plan.statistics
        new.name = old.name if old.leaf else None
        aliases.share(new, old)
        rebind(tensor, version_of(tensor) + 1)
        _spread(tape, tensor, new, wholes[k], untouched, node.cut)
    return result


def _spread(tape: Tape, tensor: Tensor, new: Value, whole: Value | None, untouched: set[int], cut: bool) -> None:
    """What a write to `tensor` means to the other tensors that look into its storage."""
    neighbours = [t for t in aliases.neighbours(tensor) if id(t) not in untouched]
    base, of_base = tensor, new
    if whole is not None and tensor._base is not None:
        target, old = _in_units_of(tensor, tensor._base, whole, tape)
        if aliases.covers(target, tensor):
            base = tensor._base
            of_base = _write_base(tape, tensor, new, target, old, cut)
    for other in neighbours:
        if other is base:
            continue
        held = bound(other)
        if other._base is base:
            if held is not None:
                held.stale = True  # read off the base when it is next needed
        elif aliases.covers(base, other):
            _read_off(tape, base, of_base, other, held)
        else:
            lost = Value(other)
            lost.closed = UNSEEN
            bind(other, lost, None)
        rebind(other, version_of(other) + 1)


def _write_base(tape: Tape, tensor: Tensor, new: Value, target: Tensor, old: Value, cut: bool) -> Value:
    """Records what a write to the view `tensor` makes of its base; returns the base's new value."""
    base = tensor._base
    assert base is not None
    place = aliases.place_of(tensor, target)
    made = base if target is base else target
    node = write(tape, aliases.write_view, (old, new, *place), {}, [old, new], [None, None], [made], cut=cut)
    if cut:
        node.mutates = ((0, 0),)
    node.outputs[0].constant = old.constant and (cut or new.constant)
    if target is not base:
        pairs = node.outputs[0]
        node = write(tape, _AS_COMPLEX, (pairs,), {}, [pairs], [None], [base])
        node.outputs[0].constant = pairs.constant
    aliases.share(node.outputs[0], new)
    rebind(base, version_of(base) + 1)
    return node.outputs[0]


def _read_off(tape: Tape, base: Tensor, of_base: Value, other: Tensor, held: Value | None) -> None:
    """Records what `other`, which is no view of `base`, holds after a write to that."""
    place = aliases.place_of(other, base)
    past = of_base.constant and held is not None and not held.constant
    # A write through a detached alias changes the contents; the gradient passes over it, as in torch.
    inputs = [of_base, held] if past and held is not None else [of_base]
    node = write(tape, aliases.read_view, (of_base, *place), {}, inputs, [None] * len(inputs), [other], cut=past)
    if past:
        node.mutates = ((1, 0),)
    node.outputs[0].constant = held is not None and held.constant
    aliases.share(node.outputs[0], of_base)


# -- the third door: plain torch operations on a recorded tensor, outside a block ---------------------------------


class Recorded(Tensor):
    """A tensor that some tape knows: torch's own, but for the operations applied to it being recorded."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        foreign = [each for each in types if not issubclass(each, Recorded)]
        if foreign:  # a tensor class of the user's: it has the say, and what it runs is recorded
            with recording(current_tape()) if current_tape_is_global() and not _state.quiet else nullcontext():
                return foreign[0].__torch_function__(func, foreign, args, kwargs)
        with DisableTorchFunctionSubclass():
            if _state.quiet or _state.paused or func in _PLAIN or not current_tape_is_global():
                return func(*args, **kwargs)
            if func in _EXITS:
                exits.warn_of_exit(args[0], func.__name__)
                return func(*args, **kwargs)
            if _writes(func) and _leaves_only(args, kwargs):
                return _update_leaf(func, args, kwargs)
            tape = current_tape()
            with recording(tape):
                result = _detach(func, args[0]) if func in _DETACHES else func(*args, **kwargs)
            if func in _DETACHES:  # a constant, but writes to it are writes to the same memory
                in_parameter = sys._getframe(1).f_code is torch.nn.Parameter.__new__.__code__
                result.__class__ = type(args[0]) if in_parameter else Recorded  # nn.Parameter(x) insists on it
            touched = [*_tensors_in(result), *_tensors_in(args), *_tensors_in(list(kwargs.values()))]
            for tensor in (*touched, *[tensor._base for tensor in touched if tensor._base is not None]):
                value = bound(tensor)
                if value is not None and not value.leaf:
                    _mark(tensor, tape)  # what it made, and what it wrote to
            return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with _as_plain(self):
            return repr(self)

    def __format__(self, spec: str) -> str:
        with _as_plain(self):
            return format(self, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _as_plain(self):
            return self.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with _as_plain(self):
            copied: Tensor = self.__deepcopy__(memo)  # type: ignore[no-untyped-call]
            return copied


class RecordedParameter(Recorded, torch.nn.Parameter):
    """A module's parameter, while a tape knows it."""


#: What a tensor's class becomes while a tape listens to it.
_LISTENING: dict[type, type] = {Tensor: Recorded, torch.nn.Parameter: RecordedParameter}


#: Errors and listings call them what the user does.
Recorded.__name__, RecordedParameter.__name__ = "Tensor", "Parameter"


@contextmanager
def _as_plain(tensor: Tensor) -> Iterator[None]:
    """`tensor` under torch's own class: printed, copied and written to files as what it is."""
    kind = type(tensor)
    with quietly():
        tensor.__class__ = next(plain for plain, listening in _LISTENING.items() if kind is listening)
        try:
            yield
        finally:
            tensor.__class__ = kind


#: Writes whose names do not end in one underscore.
_WRITES = {
    f"__i{name}__" for name in "add sub mul truediv div floordiv mod pow and or xor lshift rshift matmul".split()
}


def _writes(func: Any) -> bool:
    """Whether a function of torch writes to its first argument."""
    name = getattr(func, "__name__", "")
    return name in _WRITES or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


#: What asks something of a tensor without computing: never recorded.
_PLAIN = {
    getter.__get__
    for name in (
        "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cuda is_sparse is_quantized is_meta "
        "is_nested itemsize nbytes names _version _base output_nr is_mps is_xpu is_cpu retains_grad _backward_hooks"
    ).split()
    if (getter := getattr(Tensor, name, None)) is not None
} | {
    getattr(Tensor, name)
    for name in (
        "size dim numel stride storage_offset is_contiguous is_floating_point is_complex element_size data_ptr "
        "untyped_storage storage type_as numpy tolist item __repr__ __format__ __len__ __bool__ __float__ __int__ "
        "__index__ __hash__ __contains__ __array__ __dlpack__ is_inference is_signed is_shared is_pinned "
        "get_device backward retain_grad requires_grad_ register_hook _is_view is_conj is_neg nelement ndimension "
        "__setstate__ __reduce_ex__ __deepcopy__ as_subclass"
    ).split()
    if hasattr(Tensor, name)
}


#: What hands a tensor's memory to code that nothing can follow.
_EXITS = {getattr(Tensor, name) for name in exits.LEAVING}
_PLAIN -= _EXITS
_DETACHES = {Tensor.detach, torch.detach, Tensor.data.__get__}


def current_tape_is_global() -> bool:
    return not current_tape().strong


def _leaves_only(args: Any, kwargs: Any) -> bool:
    """Whether every tensor of a call is a leaf: then an in-place write makes it another leaf."""
    found = [bound(t) for t in (*_tensors_in(args), *_tensors_in(list(kwargs.values())))]
    return all(value is None or value.leaf for value in found)


def _update_leaf(func: Any, args: Any, kwargs: Any) -> Any:
    """``w -= lr * w.g`` on a leaf: the next recording reads what it holds then, as after ``opt.step()``."""
    value = bound(args[0]) if args and isinstance(args[0], Tensor) else None
    spared = [] if value is None else aliases.protect(args[0], value)
    result = func(*args, **kwargs)
    aliases.refresh(spared)
    return result


def _mark(tensor: Tensor, tape: Tape) -> None:
    """From now on plain torch operations on `tensor` are recorded."""
    value = bound(tensor)
    if value is None or not value.differentiable:
        return
    kind = type(tensor)
    if kind in _LISTENING:
        tensor.__class__ = _LISTENING[kind]
    if value.leaf and isinstance(tensor, Recorded):
        marked = tape.token.marked
        if not marked:  # whatever happens to the tape and its nodes, the listening ends with them
            weakref.finalize(tape.token, _forget, marked)
        known = marked.get(id(value))
        if known is not None and known() is value:
            return
        value.marks += 1
        marked[id(value)] = weakref.ref(value)
        if len(marked) & (len(marked) - 1) == 0:
            for key in [key for key, ref in marked.items() if ref() is None]:
                del marked[key]


def _listen(tape: Tape, node: Node) -> None:
    for value in (*node.inputs, *node.outputs):
        holder = value.holder
        if holder is not None and bound(holder) is value:
            _mark(holder, tape)


def listen_to(tensors: Sequence[Tensor], tape: Tape) -> None:
    """From now on plain torch operations on `tensors`, outside a block, are recorded on the global tape."""
    if current_tape_is_global():
        for tensor in tensors:
            _mark(tensor, tape)


def forget_leaves(token: Token | None) -> None:
    """Ends the listening on a tape's leaves: their recording is over (they are inputs and parameters)."""
    if token is not None:
        _forget(token.marked)


def _forget(marked: dict[int, weakref.ref[Value]]) -> None:
    for value in (v for ref in marked.values() if (v := ref()) is not None):
        value.marks -= 1
        holder = value.holder
        if value.marks == 0 and holder is not None and isinstance(holder, Recorded):
            holder.__class__ = next(plain for plain, listening in _LISTENING.items() if type(holder) is listening)
    marked.clear()


# -- what a user opens and closes -----------------------------------------------------------------------------------


class quietly:
    """A context in which nothing is recorded: the body of an operation, a rule, a replay."""

    def __enter__(self) -> None:
        self.guard = DisableTorchFunctionSubclass()
        self.guard.__enter__()
        self.mode = None
        depth = torch._C._len_torch_dispatch_stack()
        if depth and isinstance(torch._C._get_dispatch_stack_at(depth - 1), _Mode):
            self.mode = torch._C._pop_torch_dispatch_stack(None)  # else each operation would pay the detour
        _state.quiet += 1

    def __exit__(self, *error: object) -> None:
        _state.quiet -= 1
        if self.mode is not None:
            torch._C._push_on_torch_dispatch_stack(self.mode)
        self.guard.__exit__(*error)


@contextmanager
def recording(tape: Tape, *, sweep: bool = False, opening: bool = False) -> Iterator[None]:
    """A context in which every torch operation is recorded on `tape`, whatever happens around it.

    With ``sweep=True`` for a sweep that is recorded: it runs under ``no_grad`` without being cut, and what
    the rules are given is linked to the values that it stands for. With ``opening=True`` a named operation
    is recorded as the torch operations of its body.
    """
    before = _state.quiet, _state.grad_mode, _state.linking, _state.opening
    _state.quiet, _state.opening = 0, opening
    if sweep:
        _state.grad_mode, _state.linking = False, True
    try:
        with _Mode(tape):
            yield
    finally:
        _state.quiet, _state.grad_mode, _state.linking, _state.opening = before


class record:
    """``with te.record() as tape:`` records every torch operation of this thread on a new tape.

    Args:
        strict: an operation without a registered rule raises `MissingRuleError` at once, where
            otherwise it would borrow its rule from ``torch.func.vjp``.

    After the block the tape remains. Plain torch operations on its values are recorded on the global
    tape then, so that a gradient still finds its way through them.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._open: list[tuple[Tape, _Mode, bool]] = []

    def __enter__(self) -> Tape:
        tape = Tape(strong=True, strict=self.strict)
        mode = _Mode(tape)
        self._open.append((tape, mode, _state.grad_mode))
        _state.grad_mode = torch.is_grad_enabled()
        modules.listen()
        exits.open_exits()
        push_tape(tape)
        mode.__enter__()
        return tape

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tape, mode, _state.grad_mode = self._open.pop()
        mode.__exit__(kind, error, trace)
        pop_tape(tape)
        exits.close_exits()
        modules.stop_listening()
        with quietly():
            open_still = [node for node in tape.nodes if not node.closed]
            if open_still:
                listen_to(tape.held, tape)
            for node in open_still:
                for value in node.outputs:
                    holder = value._tensor()
                    if holder is not None and bound(holder) is value:
                        _mark(holder, tape)


@contextmanager
def pause() -> Iterator[None]:
    """A context in which nothing is recorded: its results are constants to the sweep."""
    _state.paused += 1
    try:
        yield
    finally:
        _state.paused -= 1


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Names the group of the nodes recorded inside, in print and picture; scopes may be nested.

    Raises:
        DTypeError: if `name` is not a string.
    """
    if not isinstance(name, str) or not name:
        raise DTypeError(
            message(f"te.scope takes the name of a group, a string: not {name!r}.", where=call_site(user_frame()))
        )
    before = _state.scope
    _state.scope = (*before, name)
    try:
        yield
    finally:
        _state.scope = before


@registry.op(name="stop_gradient", formula="stop gradient")
def _stop(x: Tensor) -> Tensor:
    return x.detach()


_stop.differentiable = False


def stop_gradient(x: Tensor) -> Tensor:
    """`x` as a constant to the sweep: an alias of the same elements, through which no gradient passes.

    Raises:
        DTypeError: if `x` is not a tensor.
    """
    if not isinstance(x, Tensor):
        raise DTypeError(
            message(f"te.stop_gradient takes a tensor, not {type(x).__name__}.", where=call_site(user_frame()))
        )
    result: Tensor = _stop(x)
    return result


# -- what the dispatcher does not hear ----------------------------------------------------------------------------------


def _hears() -> bool:
    """Whether this thread records in a block now."""
    return not (_state.quiet or _state.paused or current_tape_is_global())


def _record_tolist(tensor: Tensor, result: Any) -> None:
    with quietly():
        tape = current_tape()
        taken = _Taken(_tolist, tape, (tensor,), {})
        write(tape, _tolist, taken.args, {}, taken.inputs, taken.kept, []).result = result


_tolist = Op(Tensor.tolist, name="tolist")
_tolist.differentiable = False


def _record_cut(tensor: Tensor) -> None:
    with quietly():
        tape = current_tape()
        taken = _Taken(_stop, tape, (tensor,), {})
        write(tape, _stop, taken.args, {}, taken.inputs, taken.kept, [tensor]).outputs[0].constant = True


def _detach(original: Any, tensor: Tensor) -> Tensor:
    """A ``detach()`` of the user's, which is a cut."""
    _state.detaching += 1
    try:
        result: Tensor = original(tensor)
    finally:
        _state.detaching -= 1
    return result


exits.on_exit(_hears, _record_tolist, _record_cut, _detach)
