"""Copies that torch makes without an operation: ``copy.deepcopy``, ``copy.copy``, and memory given by ``set_``.

A copy of what was computed is recorded as ``clone()`` is, a shallow one as a view: the gradient passes through. A copy
of a leaf (a parameter, an input) is another leaf, as in torch, whose contents a replay makes anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import aliases, exits
from ..registry import find
from ..tape import bound, current_tape
from .listening import Recorded, as_plain, listen
from .mode import quietly
from .state import is_cut
from .writing import read, write

__all__: list[str] = []

Tensor = torch.Tensor

_CLONE = find(torch.ops.aten.clone.default)
_ALIAS = find(torch.ops.aten.alias.default)


def _deepcopy(original: Callable[..., Tensor], tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """``copy.deepcopy(tensor)``, recorded."""
    if id(tensor) in memo:
        return original(tensor, memo)
    return _record(tensor, lambda: original(tensor, memo), shares=False)


def _shallow(tensor: Tensor) -> Tensor:
    """``copy.copy(tensor)``, recorded."""
    return _record(tensor, lambda: exits.reconstructed(tensor), shares=True)


def _record(tensor: Tensor, copied: Callable[[], Tensor], *, shares: bool) -> Tensor:
    with quietly():
        made = copied()
        tape = current_tape()
        known = bound(tensor)
        node = None if known is None else known.node
        if not tape.strong and (known is None or known.closed or node is None or node.closed):
            return made
        value = read(tensor, tape)
        cut = value.leaf or is_cut()
        node = write(tape, _ALIAS if shares else _CLONE, (value,), {}, [value], [None], [made], cut=cut)
        node.outputs[0].constant = value.constant or (cut and not value.leaf)
        if shares:
            aliases.share(node.outputs[0], value)
        if not tape.strong:
            listen(tape, node)
    return made


exits.on_copy(_deepcopy, _shallow)


def _deepcopy_outside(self: Recorded, memo: dict[int, Any]) -> Tensor:
    def original(tensor: Recorded, memo: dict[int, Any]) -> Tensor:
        with as_plain(tensor):
            copied: Tensor = tensor.__deepcopy__(memo)  # type: ignore[no-untyped-call]
            return copied

    return _deepcopy(original, self, memo)


Recorded.__deepcopy__ = _deepcopy_outside  # type: ignore[method-assign, assignment]
Recorded.__copy__ = _shallow  # type: ignore[attr-defined]
