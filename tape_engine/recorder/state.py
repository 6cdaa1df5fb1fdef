"""What the recorder of each thread is doing, and the words it uses for what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import DispatchKey, _SetExcludeDispatchKeyGuard

from ..plans import VECTORS
from ..tape import current_tape

__all__ = [
    "DETACH",
    "IN_TURN",
    "LIFT",
    "MOVED",
    "ONCE",
    "OUTSIDE",
    "OVERLAPPED",
    "PARTED",
    "RESHAPED",
    "SWEEP",
    "SWEPT",
    "TENSORS",
    "UNFOLLOWED",
    "UNKNOWN",
    "UNSEEN",
    "VIEW_DTYPE",
    "call",
    "current_tape_is_global",
    "detaching",
    "is_cut",
    "is_quiet",
    "opened",
    "state",
    "tensors_in",
    "values_alone",
    "without_vectors",
]

Tensor = torch.Tensor

#: The classes of tensors that are torch's own, and those in their place while a tape listens.
TENSORS: set[Any] = {Tensor, torch.nn.Parameter}


class _State(threading.local):
    """What the recorder of this thread is doing."""

    def __init__(self) -> None:
        self.quiet = 0  # inside the body of a named operation, a rule, a replay: nothing is heard
        self.paused = 0  # inside te.pause(): heard, and left out
        self.deaf = 0  # the sum of the two
        self.detaching = 0  # inside a detach() of the user's
        self.opening = False  # named operations run their bodies, which are heard
        self.values_alone = 0  # inside a function that asks for the values of a decomposition, and not for the vectors
        self.around: list[Any] = []  # modes of the user's around a block, while the recorder is at its own work
        self.linking = False  # inside a sweep that is recorded: every binding counts, closed or not
        self.grad_mode = True  # torch's grad mode where the recording began: a change of it is a cut


state = _State()


SWEPT = "belongs to a tape that was already swept"


UNSEEN = "was changed by a write that the recorder could not see"


UNFOLLOWED = "has some memory in common with a tensor that was written to, and not so that the write can be followed"


OVERLAPPED = "was computed in place by a write to elements several of which lie in one place, in no known order"
IN_TURN = "was computed in place by an operation on lists that reads for one item what it writes for another"


OUTSIDE = "was computed by torch operations outside the recording"
SWEEP = "was given by a sweep that is not recorded"
MOVED = "was given its memory by set_, which is no operation"
ONCE = "was given by a backward that is marked as once_differentiable"
PARTED = "is a view of other memory than its base has since x.data = y or set_, or the base of such a view"
RESHAPED = "was computed, and given contents of another shape or dtype since, without its gradient"

#: Of what is closed for one of these reasons nobody knows from what it was computed.
UNKNOWN = {OVERLAPPED, IN_TURN, UNSEEN, UNFOLLOWED, MOVED, PARTED, RESHAPED, ONCE}


LIFT = torch.ops.aten.lift_fresh.default


DETACH = torch.ops.aten.detach.default
VIEW_DTYPE = torch.ops.aten.view.dtype


def current_tape_is_global() -> bool:
    """Whether no block is open on this thread."""
    return not current_tape().strong


def is_cut() -> bool:
    """Whether ``torch.no_grad()`` was entered since the recording began."""
    return state.grad_mode and not torch.is_grad_enabled()


def is_quiet() -> bool:
    """Whether this thread is inside the body of an operation, a rule or a replay."""
    return bool(state.quiet)


@contextmanager
def opened() -> Iterator[None]:
    """A context in which a named operation is recorded as the torch operations of its body."""
    before, state.opening = state.opening, True
    try:
        yield
    finally:
        state.opening = before


def detaching(original: Any, tensor: Tensor) -> Tensor:
    """A ``detach()`` of the user's, which is a cut."""
    state.detaching += 1
    try:
        result: Tensor = original(tensor)
    finally:
        state.detaching -= 1
    return result


def without_vectors(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a decomposition as torch would give them without a recording; the rule makes the vectors."""
    asked = VECTORS.get(func)
    if asked is None or (torch.is_grad_enabled() and args[0].requires_grad):
        return args
    return (args[0], args[1] if len(args) > 1 else asked[0], asked[1])


@contextmanager
def values_alone() -> Iterator[None]:
    """A context in which decompositions are asked for their values alone."""
    state.values_alone += 1
    try:
        yield
    finally:
        state.values_alone -= 1


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, lazily: bool) -> Any:
    """What a call gives; `lazily` for one that reads complex numbers.

    Torch hides lazy conjugation from what runs below a mode, and its own composites rely on it (pinv).
    """
    if state.around:
        return _heard(func, args, kwargs, lazily)
    if lazily:
        with _SetExcludeDispatchKeyGuard(DispatchKey.Conjugate, False):
            return func(*args, **kwargs)
    return func(*args, **kwargs)


def _heard(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], lazily: bool) -> Any:
    """What a call gives, which the modes around a block hear: it is the user's."""
    modes, state.around = state.around, []
    deaf, state.deaf = state.deaf, state.paused + state.quiet
    for mode in modes:
        torch._C._push_on_torch_dispatch_stack(mode)
    try:
        return call(func, args, kwargs, lazily=lazily)
    finally:
        for _ in modes:
            torch._C._pop_torch_dispatch_stack(None)
        state.around, state.deaf = modes, deaf


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors in a result or argument, also inside tuples and lists, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for each in result for tensor in tensors_in(each)]
    return []
