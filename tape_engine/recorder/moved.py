"""Memory of another that a tensor is given in the place of its own: ``x.data = y`` and ``x.set_(y)``.

Torch still takes the tensor for what it was: views of it that were made before are views of it, although they look
into the memory that it had, and their writes are counted together. So a write to one of them has a gradient that goes
by what torch takes them for, and contents that go by where they lie: where that is not the same, a sweep says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from .. import aliases, regions, registry
from ..names import local_name, user_frame
from ..places import offset_of, stride_of
from ..tape import (
    Binding,
    Node,
    Tape,
    Value,
    ancestors,
    bind,
    bound,
    rebind,
    unbind,
    values_by_tensor,
    version_of,
)
from .asked import to_be_asked
from .state import DETACH, MOVED, PARTED
from .writing import call, hold, read, reshaped, write

__all__ = ["given_memory", "part", "read_views", "set_data"]

Tensor = torch.Tensor

_DETACH = registry.find(DETACH)


def read_views(tensor: Tensor, value: Value, tape: Tape, *, detached: bool = False) -> None:
    """Reads the views of `tensor`, which holds `value`, that a write has left to be read: before it is something else.

    They have the memory that it looks into now, and their gradient goes on to what it is now. Where it is `detached`,
    that holds for those that torch does not ask anew; the gradient of the others ends there.
    """
    stale = aliases.stale_views(tensor, value)
    for view in (*stale, *aliases.written_views(tensor, value)) if detached else stale:
        held = bound(view)
        if held is None or held.constant or not (detached and to_be_asked(tape, view, held)):
            read(view, tape)
        else:
            held.stale = True


def set_data(tape: Tape, original: Any, tensor: Tensor, other: Tensor) -> None:
    """``x.data = y``: x holds what y holds, and the gradient of x passes over that, as in torch."""
    old, new = read(tensor, tape), read(other, tape)
    read_views(tensor, old, tape)
    aliases.protect(tensor, old)  # a rule that needs the old contents looks for them in `tensor`
    before = tensor.shape, stride_of(tensor), offset_of(tensor)
    original(tensor, other)
    if (old.shape, old.dtype) == (new.shape, new.dtype):
        node = hold(tape, tensor, old, new)
    else:
        node = write(tape, _DETACH, (new,), {}, [new, old], [None, None], [tensor], cut=True)
        node.mutates = ((1, 0),)
    made = node.outputs[0]
    made.constant, made.detached = old.constant, True
    if node.op is _DETACH:
        reshaped(node, 0, old, tensor)
    aliases.share(made, new)
    aliases.count_together(made, old)
    if before != (tensor.shape, stride_of(tensor), offset_of(tensor)):  # torch goes by where they lie now
        if tensor._base is not None and old.differentiable:
            made.closed, made.name = PARTED, old.name or local_name(user_frame(), tensor)
        _close([view for view in aliases.parted_from(tensor) if view._base is tensor], 0)


def given_memory(tape: Tape, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.set_(...)``: x is another tensor from then on, and none that may have a gradient if a tape knows its memory.

    Nor may it have one if it was computed: torch has no derivative of that either.
    Torch makes tensors so that it reads from files: those are leaves.
    """
    target = args[0]
    held = bound(target)
    node = None if held is None else held.node
    lost = held is not None and held.differentiable and node is not None and node.rule not in ("none", "cut")
    if held is not None:
        read_views(target, held, tape)
        aliases.protect(target, held)
        held.stale = True  # the tensor is no longer what was made or read
    result = call(func, args, kwargs, lazily=False)
    unbind(target)
    storage = regions.storage_of(target)
    if lost or (storage and any(_differentiable_in(each, storage) for each in list(values_by_tensor.values()))):
        value = Value(target)
        value.closed = MOVED
        bind(target, value, None)
        aliases.join(target, value)
    elif held is not None:
        value = read(target, tape)
    else:
        return result
    rebind(target, version_of(target) + 1)
    if held is not None:
        aliases.count_together(value, held)
    return result


def _differentiable_in(binding: Binding, storage: int) -> bool:
    """Whether a tensor with this storage holds a value that can have a gradient."""
    tensor, node = binding(), binding.node
    if tensor is None or not binding.value.differentiable or (node is not None and node.rule == "none"):
        return False
    return regions.storage_of(tensor) == storage


def part(tensor: Tensor, node: Node, pending: int) -> None:
    """After `node` wrote to `tensor`, closes what torch takes for a view of it, or it for a view of, in other memory.

    Torch's gradient goes by what was written, and the contents do not.
    """
    apart = aliases.parted_from(tensor)
    if apart and not any(v.leaf and v.differentiable for each in ancestors(node) for v in each.inputs):
        return  # nor is there a gradient
    _close(apart, pending)


def _close(apart: list[Tensor], pending: int) -> None:
    """Has no gradient pass into what `apart` hold."""
    for other in apart:
        held = bound(other)
        if held is not None and held.differentiable:
            lost = Value(other)
            lost.closed, lost.name = PARTED, held.name or local_name(user_frame(), other)
            bind(other, lost, None)
            aliases.share(lost, held)
            rebind(other, version_of(other) + pending)
