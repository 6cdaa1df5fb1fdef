"""What code asks of how a tensor lies in memory, and no operation tells.

``x.contiguous()`` is `x` itself where that lies in order, and a copy elsewhere; ``x.stride()`` and
``x.is_contiguous()`` decide something in Python; ``x.as_strided(...)`` reads by strides what others read by place.
It is noted on the value: a program that depends on it demands inputs that lie as the recorded ones did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import exits
from ..names import called_by_user
from ..tape import Value, current_tape, next_in_sequence
from .mode import quietly
from .state import current_tape_is_global, state
from .writing import read

__all__ = ["asks", "by_layout", "chooses", "demand", "note_asked", "note_chosen"]

Tensor = torch.Tensor

#: What gives a tensor itself or a copy, whichever its strides (or a lazy conjugation) ask for.
CHOOSING = ("contiguous", "to", "resolve_conj", "resolve_neg")

#: What tells the strides of a tensor, or goes by them.
ASKING = ("stride", "is_contiguous", "storage_offset", "as_strided", "as_strided_", "as_strided_copy")

#: The same, as functions; by which a recorded tensor is asked outside a block.
chooses = {getattr(Tensor, name) for name in CHOOSING} | {torch.resolve_conj, torch.resolve_neg}
asks = {getattr(owner, name) for owner in (Tensor, torch) for name in ASKING if hasattr(owner, name)}


_TO = Tensor.to
_RESOLVE_CONJ = {Tensor.resolve_conj, torch.resolve_conj}


def _listens() -> bool:
    return not (state.quiet or current_tape_is_global())


@exits.unheard
def by_layout(function: Any, tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether `function` gave `tensor` itself because of how that lies, and not of its dtype or device alone."""
    if function is _TO:
        return kwargs.get("memory_format") is not None
    return tensor.is_complex() or function not in _RESOLVE_CONJ


@exits.unheard
def note_chosen(tensor: Tensor) -> None:
    """The code asked for a tensor that lies in some order, and got `tensor` itself, which does."""
    with quietly():
        value = read(tensor, current_tape())
        if value.chosen < 0:
            value.chosen = next_in_sequence()
        _keep(value)


@exits.unheard
def note_asked(tensor: Tensor) -> None:
    """The code asked how `tensor` lies."""
    with quietly():
        demand(read(tensor, current_tape()))


def demand(value: Value) -> None:
    """What is recorded holds for the strides that a value has."""
    value.asked = True
    _keep(value)


def _keep(value: Value) -> None:
    tape = current_tape()
    if tape.strong:
        tape.asked.append(value)


def _choosing(original: Callable[..., Any]) -> Any:
    def choosing(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = original(tensor, *args, **kwargs)
        if made is tensor and _listens() and by_layout(original, tensor, kwargs):
            note_chosen(tensor)
        return made

    return choosing


def _asking(original: Callable[..., Any]) -> Any:
    def asking(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _listens() and called_by_user():
            note_asked(tensor)
        return original(tensor, *args, **kwargs)

    return asking


for _names, _wrapper in ((CHOOSING, _choosing), (ASKING, _asking)):
    for _name in _names:
        for _owner in (Tensor, torch):
            if hasattr(_owner, _name):
                exits.more.append((_owner, _name, _wrapper))
