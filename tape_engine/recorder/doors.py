"""What a user opens: named operations (the first door), ``te.record()``, pauses, scopes, cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from .. import aliases, collector, exits, heap, modules, registry
from ..errors import DTypeError, message
from ..names import call_site, user_frame
from ..registry import Op
from ..tape import Tape, bound, current_tape, pop_tape, push_tape, values_by_tensor
from .listening import listen, listen_to, mark, rest_leaves
from .mode import Mode, mode_of, quietly
from .moved import read_views, set_data
from .shortcut import Shortcut, left_out
from .state import current_tape_is_global, detaching, state, tensors_in, values_alone
from .streams import Streams
from .strict import refuse_without_rule
from .taken import Taken, enter, operands_note
from .writing import as_constants, begin, join_views, read, stays_closed, undo, write

__all__ = ["pause", "record", "scope", "stop_gradient"]

Tensor = torch.Tensor


def _call(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What calling an `Op` does: run its body unheard, then record one node."""
    if state.quiet or state.opening:
        return op.forward(*args, **kwargs)
    with quietly():
        try:
            args, kwargs = op.bind(args, kwargs)
        except TypeError as error:
            fix = f"{op.name}({', '.join(op.parameters)})"
            raise DTypeError(message(f"{op.name}: {error}.", where=call_site(user_frame()), fix=fix)) from None
        if op.check is not None:
            op.check(*args, **kwargs)
        tape = current_tape()
        taken = Taken(op, tape, args, kwargs)
        if tape.strict and not state.paused:
            refuse_without_rule(op, taken.inputs)
        drawing = op.differentiable and (op.grad is None or tape.streams is not None)
        before = torch.get_rng_state() if drawing else None
        try:
            if before is not None and tape.streams is not None:
                with tape.streams.draw(args, kwargs):
                    result = op.forward(*args, **kwargs)
            else:
                result = op.forward(*args, **kwargs)
        except Exception as error:
            undo(tape, taken.length)
            error.add_note(operands_note(op, args, kwargs))
            raise
        if any(made is given for made in tensors_in(result) for given in taken.tensors):
            result = _apart(result, taken.tensors)
        made = tensors_in(result)
        if not made:
            raise DTypeError(
                message(
                    f"{op.name} returned {type(result).__name__}: an operation returns a tensor or a tuple of tensors.",
                    where=call_site(user_frame()),
                )
            )
        if state.paused:
            as_constants(made)
            return result
        if stays_closed(tape, op, taken.inputs, made):
            return result
        node = enter(taken, made)
        node.note_form(result)
        with aliases.unheard():
            node.random = before is not None and not torch.equal(before, torch.get_rng_state())
        if op is cut_op:
            node.outputs[0].constant = node.outputs[0].detached = True
        join_views(node.outputs, made, taken.inputs, taken.tensors)
        if not tape.strong:
            listen(tape, node)
    return result


registry.on_call(_call)


def _apart(result: Any, given: Sequence[Tensor]) -> Any:
    """`result` with an alias in the place of a tensor that was also an argument: a value of its own."""
    if isinstance(result, Tensor):
        return result.view_as(result) if any(result is tensor for tensor in given) else result
    if isinstance(result, (tuple, list)):
        return type(result)([_apart(each, given) for each in result])
    return result


class record:
    """``with te.record() as tape:`` records every torch operation of this thread on a new tape.

    Args:
        strict: an operation without a registered rule raises `MissingRuleError` at once, where
            otherwise it would borrow its rule from ``torch.func.vjp``.

    After the block the tape remains. Plain torch operations on its values are recorded on the global
    tape then, so that a gradient still finds its way through them. Once it is frozen (`tape.program`), what is
    computed from a leaf that requires torch's own gradient is not, and a sweep that reaches it says so.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._open: list[tuple[Tape, Mode, Shortcut, bool, int]] = []

    def __enter__(self) -> Tape:
        heap.settle_heap()
        aliases.forget_exposed()
        tape = Tape(strong=True, strict=self.strict)
        tape.streams = Streams()
        mode, shortcut = mode_of(tape), Shortcut(tape)
        self._open.append((tape, mode, shortcut, state.grad_mode, modules.listen()))
        state.grad_mode = torch.is_grad_enabled()
        exits.open_exits()
        push_tape(tape)
        mode.__enter__()  # type: ignore[no-untyped-call]
        shortcut.__enter__()
        collector.hold_off()
        return tape

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tape, mode, shortcut, state.grad_mode, length = self._open.pop()
        collector.wait_for(tape.token, tape.length)
        shortcut.__exit__(kind, error, trace)
        with _taken_off(mode):
            mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        pop_tape(tape)
        exits.close_exits()
        modules.stop_listening(length)
        with quietly():
            tape.streams.end()
            swept = tape.token.closed_at  # what a sweep inside the block has closed listens no more
            if tape.length and tape._nodes[-1].seq >= swept:
                listen_to(tape.held, tape)
                for holder in _still_held(tape, swept):
                    mark(holder, tape)
            if tape.frozen == tape.length:  # nothing was recorded since
                rest_leaves(tape.token)


def _still_held(tape: Tape, since: int) -> list[Tensor]:
    """The tensors that hold what nodes of `tape` have made from `since` on: few, of many."""
    token = tape.token
    if len(values_by_tensor) < tape.length:
        bindings = list(values_by_tensor.values())
    else:
        made = [tensor for node in tape.nodes for value in node.outputs if (tensor := value.holder) is not None]
        bindings = [each for tensor in made if (each := values_by_tensor.get(id(tensor))) is not None]
    nodes = [(each, each.node) for each in bindings]
    held = [each for each, node in nodes if node is not None and node.tape is token and node.seq >= since]
    return [tensor for each in held if (tensor := each()) is not None]


@contextmanager
def _taken_off(mode: Mode) -> Iterator[None]:
    """A context in which `mode` is the innermost of this thread.

    It need not be: blocks of two coroutines, or of two generators, may close in the order in which they were opened.
    """
    above = []
    while (depth := torch._C._len_torch_dispatch_stack()) and torch._C._get_dispatch_stack_at(depth - 1) is not mode:
        above.append(torch._C._pop_torch_dispatch_stack(None))
    yield
    for each in reversed(above):
        torch._C._push_on_torch_dispatch_stack(each)


@contextmanager
def pause() -> Iterator[None]:
    """A context in which nothing is recorded: its results are constants to the sweep."""
    state.paused += 1
    state.deaf += 1
    try:
        with left_out():
            yield
    finally:
        state.paused -= 1
        state.deaf -= 1


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Names the group of the nodes recorded inside, in print and picture; scopes may be nested.

    Raises:
        DTypeError: if `name` is not a string.
    """
    if not isinstance(name, str) or name == "":  # type: ignore[redundant-expr]
        raise DTypeError(
            message(f"te.scope takes the name of a group, a string: not {name!r}.", where=call_site(user_frame()))
        )
    length = modules.open_scope(name)
    try:
        yield
    finally:
        modules.close_scope(length)


@registry.op(name="stop_gradient", formula="stop gradient")
def cut_op(x: Tensor) -> Tensor:
    return x.detach()


cut_op.differentiable = False


def stop_gradient(x: Tensor) -> Tensor:
    """`x` as a constant to the sweep: an alias of the same elements, through which no gradient passes.

    Raises:
        DTypeError: if `x` is not a tensor.
    """
    if not isinstance(x, Tensor):
        raise DTypeError(
            message(f"te.stop_gradient takes a tensor, not {type(x).__name__}.", where=call_site(user_frame()))
        )
    result: Tensor = cut_op(x)
    return result


def _hears() -> bool:
    """Whether this thread records in a block now."""
    return not (state.quiet or state.paused or current_tape_is_global())


def _record_guard(tensor: Tensor, kind: str) -> None:
    op = guard_ops[kind]
    with quietly(), aliases.unheard(tensor):
        tape = current_tape()
        taken = Taken(op, tape, (tensor,), {})
        write(tape, op, taken.args, {}, taken.inputs, taken.kept, []).result = op.forward(tensor)


def _elements(tensor: Tensor) -> str:
    """What tells the elements of a tensor from others, in a few letters."""
    octets = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return f"elements {hashlib.blake2b(octets.numpy().data, digest_size=6).hexdigest()}"


guard_ops = {"tolist": Op(Tensor.tolist, name="tolist"), "elements": Op(_elements, name="elements")}
for _op in guard_ops.values():
    _op.differentiable = False


def _record_set(original: Any, tensor: Tensor, other: Tensor) -> None:
    if bound(tensor) is None and bound(other) is None:
        original(tensor, other)
        return
    with quietly():
        set_data(current_tape(), original, tensor, other)


def _record_parameter(original: Any, cls: Any, data: Tensor, *rest: Any) -> Any:
    """``nn.Parameter(x)`` of a computed x: the beginning of a gradient, whose contents a replay makes anew."""
    made = original(cls, data, *rest)
    held = bound(data)
    if held is not None and held.node is not None:
        with quietly():
            tape = current_tape()
            begin(made, read(data, tape), tape)
    return made


def _record_cut(tensor: Tensor) -> None:
    with quietly():
        tape = current_tape()
        taken = Taken(cut_op, tape, (tensor,), {})
        read_views(tensor, taken.inputs[0], tape, detached=True)
        made = write(tape, cut_op, taken.args, {}, taken.inputs, taken.kept, [tensor]).outputs[0]
        made.constant = True
        aliases.share(made, taken.inputs[0])  # whose contents a rule may read: a write that follows must find it


def _note_unfollowed(what: str) -> None:
    current_tape().unfollowed = what, call_site(user_frame())


exits.on_exit(
    _hears,
    _record_guard,
    _record_cut,
    detaching,
    _record_set,
    _record_parameter,
    quietly,
    _note_unfollowed,
    values_alone,
)
