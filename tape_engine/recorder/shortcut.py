"""A shorter way through the second door, for what programs do most: ``x * w``, ``torch.tanh(x)``.

The dispatch mode hears an operation below torch's autograd. To get there takes torch about as long as a small
operation itself, and three times as long where a gradient is required, for autograd saves outputs by operations of
its own, each of which is heard as well. A function mode hears the same call above all that. Some functions are known
to be one overload of ATen, on the arguments that they are given: they run as the user called them, with the dispatch
mode left out, and are recorded as that overload. All others take the long way.

Which functions those are is not written down but found out, once a process: each is run on a small tensor while both
modes listen (`_find`). So it holds for the release of torch that is at work. A few that are made of several overloads
are taken apart here as torch does it below (`parts`).
"""

from __future__ import annotations

import operator
from sys import _getframe
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch._C import (
    DisableTorchFunctionSubclass,
    DispatchKey,
    _DisableAutocast,
    _get_function_stack_at,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch._C import _dispatch_tls_set_dispatch_key_excluded as _exclude
from torch._C._autograd import _top_saved_tensors_default_hooks as _saving_hooks
from torch._C._functorch import peek_interpreter_stack
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import modules
from ..exits import wrapped
from ..plans import Plan, plan_of
from ..registry import Op
from ..tape import Tape
from .parts import Part, are_made_so
from .plain import record_plain
from .state import DETACH, TENSORS, state

__all__ = ["Shortcut", "left_out"]

Tensor = torch.Tensor
_PYTHON = DispatchKey.Python
_listening: set[Any] = set()
_DEFAULT = {"inplace": False}  # by which ``torch.nn.functional.relu`` hands on what it was not told


def on_listening(*classes: type) -> None:
    """The room of plain operations outside a block says here which classes tensors have that listen there."""
    _listening.update(classes)
    TENSORS.update(classes)


class Shortcut(TorchFunctionMode):
    """Hears the functions of torch that this thread calls in a block, and records those that it knows."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.known = {} if state.deaf else known()  # a block in the body of an operation hears nothing
        self.apart = _apart if self.known else {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.known.get(func)
        if found is None:
            parts = self.apart.get(func)
            if parts is not None and (result := self._in_parts(parts, types, args, kwargs)) is not NotImplemented:
                return result
        elif not kwargs or kwargs == _DEFAULT:
            arity, plans, by_dims, cast = found
            if (
                len(args) == arity
                and type(args[0]) in TENSORS
                and (plan := plans.get(type(args[-1]))) is not None
                and _len_torch_dispatch_stack() == 1  # no other mode is to hear what it is made of,
                and not _len_torch_function_stack()
                and peek_interpreter_stack() is None  # no transform is to see it,
                and forward_ad._current_level < 0
                and not (cast and _is_any_autocast_enabled())  # and no argument is to be cast
                and (by_dims is None or (plan := by_dims.get((args[0].ndim, args[1].ndim))) is not None)
            ):
                _exclude(_PYTHON, True)
                try:
                    if types and types[0] in _listening:  # that class is not to be asked as well
                        with DisableTorchFunctionSubclass():
                            return record_plain(self.tape, plan, args, func)
                    return record_plain(self.tape, plan, args, func)
                finally:
                    _exclude(_PYTHON, False)
        func = wrapped.get(func, func)
        return func(*args, **kwargs) if kwargs else func(*args)

    def _in_parts(self, parts: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function that is recorded as its parts; NotImplemented where it must take the long way."""
        if (
            _len_torch_dispatch_stack() != 1
            or _len_torch_function_stack()
            or peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or _is_any_autocast_enabled()
            or _get_tracing_state() is not None  # what is traced is the function, whole
            or _saving_hooks(False) is not None  # what the user's hooks do is heard by the long way alone
            or not TENSORS.issuperset(types)
        ):
            return NotImplemented
        _exclude(_PYTHON, True)
        try:
            with DisableTorchFunctionSubclass():
                return parts(Part(self.tape, _getframe(2)), *args, **(kwargs or {}))
        finally:
            _exclude(_PYTHON, False)

    def __enter__(self) -> Shortcut:
        _push_on_torch_function_stack(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        above = []  # the blocks of two coroutines may close in the order in which they were opened
        while _len_torch_function_stack() and (top := _pop_torch_function_stack()) is not self:
            above.append(top)
        for mode in reversed(above):
            _push_on_torch_function_stack(mode)


class left_out:
    """A context in which a shortcut that is the innermost function mode hears nothing."""

    def __enter__(self) -> None:
        depth = _len_torch_function_stack()
        here = depth > 0 and type(_get_function_stack_at(depth - 1)) is Shortcut
        self.mode = _pop_torch_function_stack() if here else None

    def __exit__(self, *error: object) -> None:
        if self.mode is not None:
            _push_on_torch_function_stack(self.mode)


modules.on_asking(left_out)


# -- which functions are one overload --------------------------------------------------------------------------


class Known(NamedTuple):
    """A function that is one overload on the arguments as they are given.

    Attributes:
        arity: how many arguments it takes.
        plans: by the type of the last of them, the plan of the overload.
        by_dims: the plans by the dimensions of two tensors, of a product; else None.
        cast: whether autocast may give it arguments of another dtype.
    """

    arity: int
    plans: dict[type, Plan]
    by_dims: dict[tuple[int, ...], Plan] | None
    cast: bool


_known: dict[Any, Known] = {}
_apart: dict[Any, Any] = {}
_found_at = -1  # how many rules had been entered then

#: What is tried: a few programs use more, but what is rare may take the long way.
_UNARY = (
    "neg exp exp2 expm1 log log2 log1p sqrt rsqrt sin cos tan sinh cosh tanh asin acos atan sigmoid relu abs sign "
    "reciprocal floor erf sum mean t"
).split()
_BINARY = "add sub mul div pow maximum minimum atan2 mm mv dot matmul gt lt ge le eq ne".split()
_OPERATORS = "add sub mul truediv pow matmul gt lt ge le eq ne".split()

#: What autocast leaves alone, on every device.
_AS_GIVEN = set("neg sqrt sin cos tanh sigmoid relu abs sign floor add sub mul div maximum minimum t".split())


def known() -> dict[Any, Known]:
    """The functions that are known: found when first asked for, and again where a rule was entered since."""
    global _found_at
    if _found_at != Op.rules_entered:
        listening: Any = _len_torch_function_stack() or _len_torch_dispatch_stack() or _saving_hooks(False)
        if listening or peek_interpreter_stack() is not None:
            return {}  # whoever listens would hear what is tried
        with torch.inference_mode(False), torch.enable_grad(), _DisableAutocast():
            _find()
            _apart.update(are_made_so(_overloads_of))
        _found_at = Op.rules_entered
    return _known


def _find() -> None:
    """Tries each function on tensors of a few dimensions, and on numbers."""
    tried: dict[Any, dict[tuple[type, tuple[int, ...]], Plan | None]] = {}
    for dims in ((2, 2), (2, 1), (1, 1)):
        x, y = [torch.ones([2] * each, dtype=torch.float32, device="cpu", requires_grad=True) for each in dims]
        _try(tried, torch.nn.functional.relu, x)
        for owner in (torch, Tensor):
            for name in _UNARY:
                _try(tried, getattr(owner, name, None), x)
            for name in _BINARY:
                for other in (y, 2, 2.0):
                    _try(tried, getattr(owner, name, None), x, other)
        for name in _OPERATORS:
            for a, b in ((x, y), (x, 2), (x, 2.0), (2, x), (2.0, x)):
                _try(tried, getattr(operator, name), a, b)
        _try(tried, operator.neg, x)
    _known.clear()
    for func, ways in tried.items():
        plans: dict[type, Plan] = {}
        by_dims: dict[tuple[int, ...], Plan] | None = None
        for kind in dict.fromkeys(kind for kind, _ in ways):
            found = {dims: plan for (each, dims), plan in ways.items() if each is kind}
            good = {dims: plan for dims, plan in found.items() if plan is not None}
            if len({id(plan) for plan in good.values()}) > 1:
                by_dims = good
            if by_dims is not None or len(good) == len(found):
                plans.update(dict.fromkeys(TENSORS if kind is Tensor else (kind,), next(iter(good.values()))))
        if plans:
            cast = any(plan.op.name not in _AS_GIVEN for plan in plans.values())
            _known[func] = Known(len(next(iter(ways))[1]), plans, by_dims, cast)


def _try(tried: dict[Any, dict[tuple[type, tuple[int, ...]], Plan | None]], function: Any, *args: Any) -> None:
    """Runs a function while both modes listen, and notes what torch calls it, and which overload that was."""
    functions, overloads = _Functions(), _Overloads()
    try:
        with functions, overloads:
            function(*args)
    except (TypeError, RuntimeError):  # it takes no such arguments
        return
    if len(functions.calls) != 1:
        return
    func, given = functions.calls[0]
    plan = None
    if len(overloads.calls) == 1:
        overload, reached = overloads.calls[0]
        alike = len(given) == len(reached) and all(map(_same, given, reached))
        made = plan_of(overload)
        # An output that autograd saves must be found again: it is where the rule reads it as well.
        if alike and made.plain and made.single and not (overloads.saves and not made.op.reads_output):
            plan = made
    ways = tried.setdefault(func, {})
    ways[type(given[-1]), tuple(each.ndim if isinstance(each, Tensor) else -1 for each in given)] = plan


def _overloads_of(function: Any, *args: Any, **kwargs: Any) -> list[OpOverload]:
    """The overloads that torch runs for a function."""
    overloads = _Overloads()
    try:
        with overloads:
            function(*args, **kwargs)
    except (TypeError, RuntimeError):
        return []
    return [overload for overload, _ in overloads.calls]


def _same(given: Any, reached: Any) -> bool:
    """Whether an overload was given an argument as the function was; a number may be another object."""
    return given is reached or (type(given) is type(reached) and not isinstance(given, Tensor) and given == reached)


class _Functions(TorchFunctionMode):
    """Notes the functions that are called, with their arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args if kwargs == _DEFAULT else (*args, *(kwargs or {}))))
        return func(*args, **(kwargs or {}))


class _Overloads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the overloads that are run, with their arguments, and whether autograd saves what they made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.saves = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the compiler is loaded to guard against it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DETACH:
            self.saves = True
        else:
            self.calls.append((func, (*args, *(kwargs or {}))))
        return func(*args, **(kwargs or {}))
