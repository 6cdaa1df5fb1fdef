"""What a write to one tensor means to the others that look into its storage: its base, views, detached aliases.

A view's write is carried to its base, and what others hold is read off that: at once, or, of views of the base, when
they are next read.
"""

from __future__ import annotations

import torch

from .. import aliases, regions, registry
from ..places import read_view, write_view
from ..tape import Tape, Value, bind, bound, rebind, version_of
from .asked import note_write, updated
from .state import UNFOLLOWED, VIEW_DTYPE
from .writing import AS_COMPLEX, AS_REAL, as_stored, in_units_of, turned, write

__all__ = ["spread"]

Tensor = torch.Tensor

_VIEW_DTYPE = registry.find(VIEW_DTYPE)


def spread(
    tape: Tape, tensor: Tensor, new: Value, whole: Value | None, untouched: set[int], cut: bool, pending: int
) -> None:
    """What a write to `tensor` means to the other tensors that look into its storage."""
    neighbours = [t for t in aliases.neighbours(tensor) if id(t) not in untouched]
    base, of_base = tensor, new
    detached = (new if whole is None else whole).detached
    moved = new.aliases is not None and bool(new.aliases.kin)  # whether what are views to torch may lie elsewhere
    if whole is not None and tensor._base is not None and not (moved and regions.parted(tensor)):
        target, old = in_units_of(tensor, tensor._base, whole, tape)
        if regions.contains(target, regions.in_reals(as_stored(tensor, target), target)):
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
        held, above = bound(other), other._base
        # Torch refuses other writes to what such a view looks into.
        begun = detached and held is not None and not held.constant and _begun(held, above)
        if above is not None and id(above) in bases and not (begun or (moved and regions.parted(other))):
            if held is not None:
                note_write(other, held, pending)
                held.stale = True  # read off the base, which is followed here too, when it is next needed
            rebind(other, version_of(other) + pending)
            continue
        part, of_part = seen[other.dtype]
        if regions.contains(part, other) and as_stored(other, part) is other and not (held is not None and held.stale):
            _read_off(tape, part, of_part, other, held, detached or begun)
        elif any(other is each for each in wider):
            _write_off(tape, part, of_part, other, detached)
        else:
            lost = Value(other)
            lost.closed, lost.constant = UNFOLLOWED, held is not None and held.constant
            bind(other, lost, None)
            if held is not None:
                aliases.share(lost, held)
        rebind(other, version_of(other) + pending)


def _begun(value: Value, base: Tensor | None) -> bool:
    """Whether a view of `base` was made under ``no_grad``, or of such a view: its gradient does not go on to the base.

    It ends there, or, where the base requires one, begins there anew, as torch has it.
    """
    while value.holder is not base:
        value = updated(value, value.node)
        node = value.node
        if value.constant or node is None or node.cut:
            return value.constant or (node is not None and value.begins)
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
    stored = as_stored(tensor, target)  # a conjugated view writes the conjugate of what it shows
    part = turned(tape, new, tensor, target, stored)
    reals = regions.in_reals(stored, target)
    if reals is not stored:
        part = write(tape, AS_REAL, (part,), {}, [part], [None], [reals]).outputs[0]
    place = regions.place_of(reals, target)
    node = write(tape, write_view, (old, part, *place), {}, [old, part], [None, None], [target], cut=cut)
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
    place = regions.place_of(other, base)
    above = None if other._base is None else bound(other._base)
    constant = held is not None and (held.constant or (above is not None and above.constant))  # a view of one is one
    apart = detached or (held is not None and (held.detached or (above is None and updated(held, held.node).leaf)))
    past = held is not None and (of_base.constant or apart) and not constant
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
    return same and bound(wide) is not None and not regions.contains(part, wide) and regions.contains(wide, part)


def _write_off(tape: Tape, part: Tensor, of_part: Value, wide: Tensor, detached: bool) -> None:
    """Records what `wide` holds after a write to `part`, which has some of its memory and is no view of it."""
    held = bound(wide)
    assert held is not None
    past = (of_part.constant or detached or held.detached) and not held.constant
    place = regions.place_of(part, wide)
    node = write(tape, write_view, (held, of_part, *place), {}, [held, of_part], [None, None], [wide], cut=past)
    if past:
        node.mutates = ((0, 0),)
    node.outputs[0].constant, node.outputs[0].detached = held.constant, held.detached
    aliases.share(node.outputs[0], of_part)
