"""The third door: plain torch operations on a recorded tensor, outside a block.

While a tape waits for its sweep, the tensors it knows stand under another class name, `Recorded`, which sends
the operations applied to them through the dispatch mode onto the global tape: none of them cuts a gradient in
silence. Leaves (inputs, parameters) get their own class back when their tape has been swept.

Once a tape is frozen, its leaves only rest: training with plain torch beside its program must not pay for it. What
requires torch's own gradient listens no more, for what is computed from it shows that (`grad_fn`), and a sweep that
reaches it says so. The others still hear what would otherwise be cut in silence: operations without such an operand.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._C import DisableTorchFunctionSubclass

from .. import aliases, compiler, exits
from ..names import called_by_user
from ..tape import DIFFERENTIABLE, Node, Tape, Token, Value, bound, current_tape, next_in_sequence, values_by_tensor
from ..warned import refuse_by_python, warn_of_exit, warn_of_list
from .decisions import observe_from, record_tolist
from .layouts import asks, by_layout, chooses, note_asked, note_chosen
from .mode import quietly, recording
from .shortcut import on_listening
from .state import SWEPT, current_tape_is_global, detaching, is_cut, state, tensors_in, values_alone
from .writing import read

__all__ = [
    "DETACHES",
    "Recorded",
    "RecordedParameter",
    "as_plain",
    "forget_leaves",
    "listen",
    "listen_to",
    "mark",
    "rest_leaves",
]

Tensor = torch.Tensor


_TORCH_S_OWN = (torch.nn.Parameter,)


class Recorded(Tensor):
    """A tensor that some tape knows: torch's own, but for the operations applied to it being recorded."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        foreign = [each for each in types if not issubclass(each, (Recorded, *_TORCH_S_OWN)) and each is not Tensor]
        if foreign:  # a tensor class of the user's: it has the say, and what it runs is recorded
            with recording(current_tape()) if current_tape_is_global() and not state.quiet else nullcontext():
                return foreign[0].__torch_function__(func, foreign, args, kwargs)
        with DisableTorchFunctionSubclass():
            asked = func in asks and not (state.quiet or state.paused) and current_tape_is_global()
            if asked and called_by_user():
                note_asked(args[0])
            if func in _NUMBERS and not state.deaf and exits.by_constructor():
                warn_of_list("a constructor", args[:1], stacklevel=3)
            if state.quiet or state.paused or func in _PLAIN or not current_tape_is_global():
                return func(*args, **kwargs)
            if func in _EXITS:
                warn_of_exit(args[0], func.__name__)
                with quietly():
                    aliases.expose(args[0])
                return func(*args, **kwargs)
            if func in _BY_PYTHON:
                refuse_by_python(args[0], func.__name__)
                return func(*args, **kwargs)
            if func in _NEW and len(args) > 1 and isinstance(args[1], (list, tuple)):
                warn_of_list(f".{func.__name__}", exits.tensors_within(args[1]), stacklevel=3)
            if func is Tensor.new_tensor and not state.deaf and len(args) > 1 and isinstance(args[1], Tensor):
                with recording(current_tape()):  # as torch.tensor(x): a copy through which no gradient passes
                    copied: Tensor = detaching(lambda each: func(args[0], each, *args[2:], **kwargs), args[1])
                return copied
            if _writes(func) and _leaves_only(args, kwargs):
                return _update_leaf(func, args, kwargs)
            rests = _rest(args, kwargs)
            if rests and torch.is_grad_enabled() and not _writes(func) and _shows(args, kwargs):
                return func(*args, **kwargs)
            if (func in DETACHES or is_cut()) and not (kwargs or _writes(func)) and _all_swept(args):
                return func(*args)  # no gradient, and no decision, has to do with it: a running total of losses
            tape = current_tape()
            if func is _TOLIST:
                listed = func(*args, **kwargs)
                with quietly():
                    record_tolist(tape, args[0], listed)
                return listed
            depth = _observed(args, kwargs)
            if depth >= DEEPEST:
                tape.forgotten = next_in_sequence()  # what is decided by the result is not heard
                return func(*args, **kwargs)
            with recording(tape), values_alone() if func in _OF_VALUES else nullcontext():
                result: Any = detaching(func, args[0]) if func in DETACHES else func(*args, **kwargs)
            if getattr(func, "__name__", "") == "as_subclass" and bound(result) is None:
                with quietly():
                    read(result, tape)  # another alias than the one that the mode has heard of
            if func in chooses and result is args[0] and by_layout(func, result, kwargs):
                note_chosen(result)
            if func in DETACHES:  # a constant, but writes to it are writes to the same memory
                in_parameter = sys._getframe(1).f_code is torch.nn.Parameter.__new__.__code__
                result.__class__ = type(args[0]) if in_parameter else Recorded  # nn.Parameter(x) insists on it
            touched = [*tensors_in(result), *tensors_in(args), *tensors_in(list(kwargs.values()))]
            for tensor in (*touched, *[tensor._base for tensor in touched if tensor._base is not None]):
                value = bound(tensor)
                if value is not None and (value.closed or not value.leaf):
                    mark(tensor, tape)  # what it made, and what it wrote to
            for tensor in () if func in DETACHES else tensors_in(result):
                value = bound(tensor)
                if value is not None and value.detached and value.dtype in DIFFERENTIABLE:  # view(dtype)
                    tensor.__class__ = _LISTENING.get(type(tensor), type(tensor))
                else:
                    observe(tensor, depth)
            for tensor in tensors_in(result) if rests else ():
                value = bound(tensor)
                if value is not None and not value.leaf:
                    value.rests = 1
            return result

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        with as_plain(self):
            return repr(self)

    def __format__(self, spec: str) -> str:
        with as_plain(self):
            return format(self, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not (state.quiet or state.paused) and current_tape_is_global():
            warn_of_exit(self, "__reduce_ex__")
        with as_plain(self):
            return self.__reduce_ex__(protocol)


def _listens(argument: Any) -> bool:
    return isinstance(argument, Recorded) and not (state.quiet or state.paused) and current_tape_is_global()


exits.on_plain(_listens, lambda func, args, kwargs: Recorded.__torch_function__(func, (Recorded,), args, kwargs))

compiler.spare(Recorded)


class RecordedParameter(Recorded, torch.nn.Parameter):
    """A module's parameter, while a tape knows it."""


#: What a tensor's class becomes while a tape listens to it.
_LISTENING: dict[type, type] = {Tensor: Recorded, torch.nn.Parameter: RecordedParameter}
_OWN = {listening: plain for plain, listening in _LISTENING.items()}


on_listening(*_LISTENING.values())

#: Errors and listings call them what the user does.
Recorded.__name__, RecordedParameter.__name__ = "Tensor", "Parameter"


@contextmanager
def as_plain(tensor: Tensor) -> Iterator[None]:
    """`tensor` under torch's own class: printed, copied and written to files as what it is."""
    kind = type(tensor)
    with quietly():
        tensor.__class__ = _OWN[kind]
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
        "untyped_storage storage numpy __repr__ __format__ __len__ __hash__ __array__ __dlpack__ is_inference "
        "is_signed is_shared is_pinned get_device backward retain_grad requires_grad_ register_hook _is_view is_conj "
        "is_neg nelement ndimension __setstate__ __reduce_ex__ __deepcopy__"
    ).split()
    if hasattr(Tensor, name)
}


#: What hands a tensor's memory to code that nothing can follow.
_EXITS = {getattr(Tensor, name) for name in exits.LEAVING}


_PLAIN -= _EXITS


_NUMBERS = {getattr(Tensor, name) for name in exits.NUMBERS}
_NEW = {Tensor.new, Tensor.new_tensor}
_BY_PYTHON = {getattr(Tensor, name) for name in exits.BY_PYTHON}


#: What asks for singular values or eigenvalues alone; in a block by the wrappers of `exits`.
_OF_VALUES = {getattr(owner, name) for owner, name in exits.OF_VALUES}


_TOLIST = Tensor.tolist
_DATA: Any = Tensor.data  # a descriptor
DETACHES = {Tensor.detach, torch.detach, _DATA.__get__}


def _leaves_only(args: Any, kwargs: Any) -> bool:
    """Whether every tensor of a call is a leaf: then an in-place write makes it another leaf."""
    found = [bound(t) for t in (*tensors_in(args), *tensors_in(list(kwargs.values())))]
    return all(value is None or value.leaf for value in found)


def _update_leaf(func: Any, args: Any, kwargs: Any) -> Any:
    """``w -= lr * w.g`` on a leaf: the next recording reads what it holds then, as after ``opt.step()``."""
    value = bound(args[0]) if args and isinstance(args[0], Tensor) else None
    spared = [] if value is None else aliases.protect(args[0], value)
    result = func(*args, **kwargs)
    aliases.refresh(spared)
    return result


def _all_swept(args: Any) -> bool:
    """Whether what is known of the arguments of a call belongs to tapes that were swept."""
    known = [v for t in tensors_in(args) if (v := bound(t)) is not None]
    return bool(known) and all(v.closed == SWEPT or ((node := v.node) is not None and node.closed) for v in known)


def _rest(args: Any, kwargs: Any) -> bool:
    """Whether all that is known of the arguments of a call are leaves that no tape waits for, or made of such alone."""
    known = [v for t in (*tensors_in(args), *tensors_in(list(kwargs.values()))) if (v := bound(t)) is not None]
    return any(v.rests for v in known) and all(not v.marks and (v.rests or (v.leaf and not v.closed)) for v in known)


def _shows(args: Any, kwargs: Any) -> bool:
    """Whether torch's own gradient passes through a call, so that what comes out tells where it is from."""
    return "out" not in kwargs and any(t.requires_grad for t in (*tensors_in(args), *tensors_in(list(kwargs.values()))))


#: How many operations without a gradient are heard in a row outside a block: a running count must not keep each turn.
DEEPEST = 8


def _observed(args: Any, kwargs: Any) -> int:
    """How far the values of a call lie from those that have a gradient; 0 if one of them has."""
    known = [v for t in (*tensors_in(args), *tensors_in(list(kwargs.values()))) if (v := bound(t)) is not None]
    if any(not v.observed and not v.leaf for v in known):
        return 0
    return max((v.observed for v in known), default=0)


def observe(tensor: Tensor, depth: int = 0) -> None:
    """From now on it is heard what is decided by `tensor`, which has no gradient: a mask, an index, a count."""
    binding = values_by_tensor.get(id(tensor))
    if binding is None or binding.node is None:
        return
    value = binding.value
    if depth or not value.differentiable:
        value.observed = depth + 1
        if depth:
            observe_from(binding.node)
            if any(v.constant and v.dtype.is_floating_point for v in binding.node.inputs):
                value.constant = True  # a gradient that was cut stays cut, and a sweep from here says so
        if type(tensor) in _LISTENING:
            tensor.__class__ = _LISTENING[type(tensor)]


def mark(tensor: Tensor, tape: Tape) -> None:
    """From now on plain torch operations on `tensor` are recorded."""
    value = bound(tensor)
    if value is None or value.constant or value.dtype not in DIFFERENTIABLE:
        return
    marked = tape.token.marked
    if not marked:
        exits.hear_functions()
    kind = type(tensor)
    if kind in _LISTENING:
        tensor.__class__ = kind = _LISTENING[kind]
    if (value._node is None or value.begins) and not value.closed and kind in _OWN:
        if not marked:  # whatever happens to the tape and its nodes, the listening ends with them
            weakref.finalize(tape.token, _forget, marked)
        known = marked.get(id(value))
        if known is not None and known() is value:
            return
        value.marks += 1
        marked[id(value)] = weakref.ref(value)
        if not tape.strong and len(marked) & (len(marked) - 1) == 0:
            for key in [key for key, ref in marked.items() if ref() is None]:
                del marked[key]


def listen(tape: Tape, node: Node) -> None:
    """From now on plain torch operations on what a node read and made are recorded."""
    for value in (*node.inputs, *node.outputs):
        holder = value.holder
        if holder is not None and bound(holder) is value:
            mark(holder, tape)
            if value._node is not None and not value.differentiable and not value.closed:
                observe(holder)


def listen_to(tensors: Sequence[Tensor], tape: Tape) -> None:
    """From now on plain torch operations on `tensors`, outside a block, are recorded on the global tape."""
    if current_tape_is_global():
        for tensor in tensors:
            mark(tensor, tape)


def rest_leaves(token: Token) -> None:
    """A tape is frozen: its leaves listen no more than needed."""
    resting = token.resting
    if token.marked and not resting:
        weakref.finalize(token, _wake, resting)
    for key, ref in token.marked.items():
        value = ref()
        holder = None if value is None else value.holder
        if value is not None and holder is not None and not holder.requires_grad and key not in resting:
            value.rests += 1
            resting[key] = ref
    _forget(token.marked)


def forget_leaves(token: Token | None) -> None:
    """Ends the listening on a tape's leaves: their recording is over (they are inputs and parameters)."""
    if token is not None:
        _forget(token.marked)
        _wake(token.resting)


def _forget(marked: dict[int, weakref.ref[Value]]) -> None:
    for value in (v for ref in marked.values() if (v := ref()) is not None):
        value.marks -= 1
        _listen_no_more(value)
    marked.clear()


def _wake(resting: dict[int, weakref.ref[Value]]) -> None:
    for value in (v for ref in resting.values() if (v := ref()) is not None):
        value.rests -= 1
        _listen_no_more(value)
    resting.clear()


def _listen_no_more(value: Value) -> None:
    """Gives the tensor of a leaf its own class back, if nothing listens to it."""
    holder = value.holder
    if not (value.marks or value.rests) and holder is not None and type(holder) in _OWN:
        holder.__class__ = _OWN[type(holder)]
