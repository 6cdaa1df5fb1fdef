"""Reading values off tensors, and writing nodes onto a tape: what the three doors have in common.

`read` tells which value a tensor holds, `Taken` (`taken`) puts values in the place of the tensors of a call, and
`write` makes the node and binds its outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .. import aliases, modules, regions, registry
from ..errors import NotRecordedError, message
from ..names import call_site, local_name, user_frame
from ..places import read_view, write_view
from ..registry import Op
from ..tape import Kept, Node, Tape, Value, bind, bind_output, bound, rebind, values_by_tensor, version_of
from ..warned import warn_of_hook
from .asked import ends_there, to_be_asked, updated
from .saved import before_cut, in_backward, unpacked
from .state import DETACH, OUTSIDE, PARTED, RESHAPED, SWEPT, UNKNOWN, UNSEEN, call, is_cut, state

__all__ = [
    "ALIAS",
    "AS_COMPLEX",
    "AS_REAL",
    "as_constants",
    "as_stored",
    "begin",
    "call",
    "hold",
    "in_units_of",
    "join_views",
    "outputs_of",
    "read",
    "reshaped",
    "settle",
    "stays_closed",
    "turned",
    "undo",
    "write",
]

Tensor = torch.Tensor


def read(tensor: Tensor, tape: Tape) -> Value:
    """The value that `tensor` holds now; a new leaf if no tape knows it."""
    binding = values_by_tensor.get(id(tensor))
    if binding is None:
        above = None if tensor._base is None else values_by_tensor.get(id(tensor._base))
        if above is not None and above.node is not None and not state.linking:
            return _reread(tensor, above.value.constant, tape)  # a view made outside of a base written to since
        return _saved(tensor, tape) or _leaf(tensor, tape)
    value, node = binding.value, binding.node
    if (
        node is not None
        and node.tape is tape.token
        and tape.strong
        and not (value.stale or value.constant)
        and (value._tensor is binding or value._tensor() is tensor)
        and version_of(tensor) in binding.versions
        and tensor.dtype is value.dtype
        and tensor.shape == value.shape
    ):
        return value  # what the same block has just made
    if state.linking:
        return value
    if value.stale:
        again = _reread(tensor, value.constant, tape)
        if not value.constant and again.node is not None:
            again = _as_of_old(tensor, value, again, tape)
        if not tape.strong:  # which lets go of the node by which the tensor came to look there
            again.chosen = value.chosen if value.chosen >= 0 else _looked(node)
        return again
    unchanged = version_of(tensor) in binding.versions
    if node is None:
        if unchanged and value.shape == tensor.shape and value.dtype == tensor.dtype:
            tape.hold(tensor)
            return value
        # written to between two recordings
        return _leaf(tensor, tape, name=value.name, closed=value.closed if value.closed in UNKNOWN else "")
    if not unchanged:
        if node.tape is not tape.token and (not value.differentiable or is_update(value, node)):
            leaf = _leaf(tensor, tape, name=value.name)  # a buffer that was loaded, or written by a replay
            leaf.constant = value.constant
            return leaf
        return _leaf(tensor, tape, closed=UNSEEN)
    if tensor.dtype != value.dtype or tensor.shape != value.shape:
        return _leaf(tensor, tape)  # x.data = y
    if tensor.requires_grad and (value.constant or (value.holder is not tensor and not _computed(tensor))):
        saved = _saved(tensor, tape)
        if saved is not None:
            return saved
        # a new beginning: nn.Parameter(x), x.detach().requires_grad_()
        return _leaf(tensor, tape) if node.tape is not tape.token else begin(tensor, value, tape)
    if node.tape is not tape.token:
        as_leaf = is_update(value, node) or (node.closed and value.begins)
        if not value.differentiable or node.rule == "none" or as_leaf:
            # No gradient passes (a factory's tensor, a counter), an optimizer wrote to a parameter, or it was made
            # in the block that was swept: a leaf, so that a statistic does not chain one step to the next.
            leaf = _leaf(tensor, tape, name=value.name)
            leaf.constant = value.constant
            return leaf
        if node.closed:
            # To go on from a closed tape would keep every step of a loop alive, to stop there would cut the
            # gradient in silence: a leaf stands for the value, and the sweep that reaches it says so.
            stand_in = Value(tensor)
            stand_in.name = value.name or local_name(user_frame(), tensor)
            stand_in.closed = SWEPT
            if aliases.join(tensor, stand_in):  # a write that follows must find what a rule keeps of it
                tape.token.watch(stand_in, aliases.sample_of(tensor))
            return stand_in
    return value


def _as_of_old(tensor: Tensor, value: Value, again: Value, tape: Tape) -> Value:
    """What a view holds that was read off its base as `again`, and held `value` before a write.

    Where the base was detached in place, and torch does not ask anew, its gradient is what it was before.
    """
    base = None if tensor._base is None else bound(tensor._base)
    if to_be_asked(tape, tensor, value):
        if is_cut() or state.detaching:  # nor does torch ask now
            again.written = value.written
    elif base is not None and ends_there(base):
        over = hold(tape, tensor, value, again).outputs[0]
        over.constant = False
        aliases.share(over, again)
        return over
    return again


def hold(tape: Tape, tensor: Tensor, old: Value, new: Value) -> Node:
    """Records that `tensor`, which held `old`, holds what `new` is, and the gradient passes over that."""
    node = write(tape, _COPY, (old, new), {}, [old, new], [None, None], [tensor], cut=True)
    node.mutates = ((0, 0),)
    return node


def _saved(tensor: Tensor, tape: Tape) -> Value | None:
    """What torch's own backward reads through `tensor`: the value that autograd had saved."""
    original = unpacked(tensor)
    value = None if original is None else read(original, tape)
    if value is None and in_backward(tensor) and not tensor.is_leaf:
        value = before_cut(tensor)
        if value is None:
            return _leaf(tensor, tape)  # closed, as nobody knows from what it was computed
    if value is not None:
        bind(tensor, value, value.node)
    return value


def _looked(node: Node | None) -> int:
    """Where in the order of recording ``reshape`` (or ``view``) gave the view that `node` made; -1 if none did."""
    while node is not None and node.op.forward is not _VIEW:
        schema = getattr(node.op.forward, "_schema", None)
        looks = schema is not None and any(each.alias_info is not None for each in schema.returns)
        node = node.sources[0] if looks and node.sources else None
    return -1 if node is None else node.seq


def is_update(value: Value, node: Node | None) -> bool:
    """Whether a value is what writes under ``no_grad`` made of a leaf: the leaf itself, as torch sees it."""
    return node is not None and node.cut and updated(value, node).leaf


def reshaped(node: Node, place: int, old: Value, tensor: Tensor) -> None:
    """What `node` made at `place` under ``no_grad``, and `tensor` holds, has not the shape or dtype of `old` before it.

    A leaf begins again. What was computed gets the gradient of the new contents, as torch has it: where that fits.
    """
    new, met = node.outputs[place], updated(old, old.node)
    extra = len(new.shape) - len(old.shape)
    fits = extra >= 0 and all(a in (b, 1) for a, b in zip(old.shape, new.shape[extra:], strict=True))
    if fits and old.dtype == new.dtype and not met.begins:
        return
    if not met.begins:
        new.constant = not old.differentiable or met.node is None or met.node.rule == "none"
        if not new.constant:
            new.closed, new.name = RESHAPED, old.name or local_name(user_frame(), tensor)
            return  # on the way to what it was, a sweep finds it
    node.mutates = tuple([pair for pair in node.mutates if pair[1] != place])


def _leaf(tensor: Tensor, tape: Tape, *, closed: str = "", name: str | None = None) -> Value:
    try:
        value = Value(tensor)
    except RuntimeError as error:
        _refuse_nested(tensor, error)
        raise
    value.name = name or modules.parameter_name(tensor) or local_name(user_frame(), tensor)
    value.closed = closed or (OUTSIDE if _computed(tensor) else "")
    bind(tensor, value, None)
    if aliases.join(tensor, value):
        tape.token.watch(value, aliases.sample_of(tensor))
    tape.hold(tensor)
    if tape.strong and (tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)):
        warn_of_hook(tensor, "a hook on its gradient asks for", stacklevel=2)
    group = value._aliases
    if tape.strong and not value.closed and group is not None and len(group.members) > 1:
        return _written_by_another(tensor, value, tape)
    return value


def _written_by_another(tensor: Tensor, value: Value, tape: Tape) -> Value:
    """What `tensor`, first read here and no view to torch, holds: an alias of it may have been written to before.

    It is as if it had been read before that write as well: its contents are read off the alias, and its gradient
    passes over the write.
    """
    for ref in [*value._aliases.members]:
        held = ref()
        node = None if held is None else held.node
        if node is None or node.tape is not tape.token:  # at first all that there is of a counter, at each step
            continue
        other = held.tensor
        if other is None or not regions.overlap(other, tensor):
            continue
        if node.op.forward is not write_view and all(place != held.index for _, place in node.mutates):
            continue
        alike = as_stored(tensor, other) is tensor and tensor.dtype == other.dtype
        if alike and regions.contains(other, tensor):
            args: tuple[Any, ...] = (held, value, *regions.place_of(tensor, other))
            past = write(tape, read_view, (held, *args[2:]), {}, args[:2], [None, None], [tensor], cut=True)
        elif alike and regions.contains(tensor, other):
            args = (value, held, *regions.place_of(other, tensor))
            past = write(tape, write_view, args, {}, args[:2], [None, None], [tensor], cut=True)
        else:
            how = "a write to another tensor that has some of its memory"
            tape.unfollowed = how, call_site(user_frame())
            continue
        past.mutates = ((past.inputs.index(value), 0),)
        made = past.outputs[0]
        made.constant, made.detached, made.name = value.constant, value.detached, value.name
        aliases.share(made, held)
        value = made
    return value


def _computed(tensor: Tensor) -> bool:
    """Whether torch's own graph leads to `tensor`: it has a ``grad_fn``.

    A view whose memory was written to gets another one when it is asked for it, which torch cannot make down here.
    """
    base = tensor._base
    return tensor.requires_grad and (tensor.grad_fn is not None if base is None else base.requires_grad)


def _refuse_nested(tensor: Tensor, error: RuntimeError) -> None:
    """Says so, where a tensor could not be described because it is nested."""
    if tensor.is_nested:
        raise NotRecordedError(
            message(
                "a nested tensor of strided layout has no one shape, and cannot be recorded.",
                where=call_site(user_frame()),
                fix="torch.nn.utils.rnn.pad_sequence([...]) and a mask",
            )
        ) from error


def settle(tensor: Tensor, value: Value) -> None:
    """From now on `tensor` holds a leaf of the contents, and keeps nothing of what they were computed from."""
    leaf = Value(tensor)
    leaf.name, leaf.constant, leaf.detached = value.name, value.constant, value.detached
    bind(tensor, leaf, None)
    aliases.join(tensor, leaf)


def begin(tensor: Tensor, value: Value, tape: Tape) -> Value:
    """What `tensor` holds as the beginning of a gradient: made of `value`, so that a replay makes it too."""
    begun = write(tape, _DETACH, (value,), {}, [value], [None], [tensor], cut=True).outputs[0]
    begun.constant = False
    begun.detached = value.detached or value.holder is not tensor  # nn.Parameter(x): an alias of x
    begun.name = value.name
    aliases.share(begun, value)
    return begun


def _reread(tensor: Tensor, constant: bool, tape: Tape) -> Value:
    """The value of a view whose base was written to: read off what the base holds now."""
    if tensor._base is None:
        return _leaf(tensor, tape, closed=UNSEEN)
    if regions.parted(tensor):
        return _leaf(tensor, tape, closed=PARTED)
    base, whole = in_units_of(tensor, tensor._base, read(tensor._base, tape), tape)
    raw = as_stored(tensor, base)
    if not regions.contains(base, part := regions.in_reals(raw, base)):
        return _leaf(tensor, tape, closed=UNSEEN)
    place = regions.place_of(part, base)
    value = write(tape, read_view, (whole, *place), {}, [whole], [None], [part]).outputs[0]
    if part is not raw:
        value = write(tape, AS_COMPLEX, (value,), {}, [value], [None], [raw]).outputs[0]
    value = turned(tape, value, tensor, base, tensor)
    value.constant = constant
    aliases.share(value, whole)
    return value


def in_units_of(tensor: Tensor, base: Tensor, whole: Value, tape: Tape) -> tuple[Tensor, Value]:
    """`base` in the numbers that `tensor` consists of: the pairs of reals of a complex base, for a real view."""
    if not base.is_complex() or tensor.is_complex():
        return base, whole
    pairs = torch.view_as_real(base.resolve_conj() if base.is_conj() else base)
    return pairs, write(tape, AS_REAL, (whole,), {}, [whole], [None], [pairs]).outputs[0]


def as_stored(tensor: Tensor, base: Tensor) -> Tensor:
    """`tensor`, or a view of it that is conjugated and negated as `base` is: it shows what its storage holds."""
    if tensor.is_conj() != base.is_conj():
        tensor = torch.conj(tensor)
    return torch._neg_view(tensor) if tensor.is_neg() != base.is_neg() else tensor


def turned(tape: Tape, value: Value, tensor: Tensor, base: Tensor, made: Tensor) -> Value:
    """Between what `tensor` shows and what its storage holds, as `base` shows it: conjugated or negated, as `made`."""
    if tensor.is_conj() != base.is_conj():
        value = write(tape, _CONJ, (value,), {}, [value], [None], [made]).outputs[0]
    if tensor.is_neg() != base.is_neg():
        value = write(tape, _NEG, (value,), {}, [value], [None], [made]).outputs[0]
    return value


AS_REAL = registry.find(torch.ops.aten.view_as_real.default)
_CONJ, _NEG = registry.find(torch.ops.aten._conj.default), registry.find(torch.ops.aten._neg_view.default)
_DETACH, _COPY = registry.find(DETACH), registry.find(torch.ops.aten.copy.default)
_VIEW = torch.ops.aten.view.default

AS_COMPLEX = registry.find(torch.ops.aten.view_as_complex.default)


def stays_closed(tape: Tape, op: Op, inputs: Sequence[Value], made: Sequence[Tensor]) -> bool:
    """On the global tape, what is computed from a closed value is closed: it is bound so, and makes no node.

    A sweep from it would be refused whatever the node said, and a running total must not keep every step.
    """
    if tape.strong or not op.differentiable or is_cut():
        return False
    source = next((v for v in inputs if v.closed == SWEPT), None)
    if source is None:
        return False
    for tensor in made:
        value = Value(tensor)
        value.closed, value.name = SWEPT, source.name
        bind(tensor, value, None)
    return True


def write(
    tape: Tape,
    op: Op,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Sequence[Value],
    kept: Sequence[Kept | None],
    made: Sequence[Tensor],
    *,
    sources: Sequence[Node | None] | None = None,
    cut: bool = False,
) -> Node:
    """Records one operation; afterwards the tensors `made` hold its outputs.

    `args` and `kwargs` have values in the place of tensors; `inputs` are those values in order, `kept` the
    cells of those whose data the gradient rule reads, and `sources` the nodes that made them.
    """
    if sources is None:
        sources = [v.node for v in inputs]
    frame = user_frame()
    code, lasti = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
    node = Node(op, args, kwargs, tuple(inputs), tuple(sources), code, lasti, modules.path())
    outputs = node.outputs = outputs_of(node, made)
    if cut:
        node.cut = True
        for value in outputs:
            value.constant = True
    elif op.reads_output:
        # An alias instead of the tensor itself: the tensor keeps the node alive, the node must not keep it.
        read = [op.reads_output_at(index, len(made)) for index in range(len(made))]
        cells = [v.keep(ALIAS(t)) if need else None for v, t, need in zip(outputs, made, read, strict=True)]
        node.saved = (*kept, *cells)
    else:
        node.saved = tuple(kept)
    tape.append(node)
    return node


def outputs_of(node: Node, made: Sequence[Tensor]) -> tuple[Value, ...]:
    """The values that the tensors `made` hold from now on, as outputs of `node`."""
    ref = weakref.ref(node)
    outputs: list[Value] = []
    for tensor in made:
        try:
            value = bind_output(tensor, node, ref)
        except RuntimeError as error:
            _refuse_nested(tensor, error)
            raise
        if outputs:
            value.index = len(outputs)
        outputs.append(value)
    return tuple(outputs)


#: An alias of a tensor. Torch's own method: that of Tensor is wrapped while a block is open.
ALIAS = torch._C.TensorBase.detach


def undo(tape: Tape, length: int) -> None:
    """After a failed call: views that were read off their bases for it will be read off again."""
    for node in tape.rewind(length):
        for value in node.outputs:
            value.stale = True


def join_views(
    outputs: Sequence[Value], made: Sequence[Tensor], inputs: Sequence[Value], given: Sequence[Tensor]
) -> None:
    """Enters outputs that share an input's storage among its aliases; `made` and `given` are the tensors of both."""
    for value, tensor in zip(outputs, made, strict=True):
        for owner, owning in zip(inputs, given, strict=True):
            if regions.same_storage(tensor, owning):
                aliases.share(value, owner)
                rebind(tensor, version_of(owning))
                break


def as_constants(made: Sequence[Tensor]) -> None:
    """Binds tensors as constants to the sweep, which no node made."""
    for tensor in made:
        bind(tensor, Value(tensor, constant=True), None)
