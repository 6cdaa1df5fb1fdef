"""`te.replayable`: a function that records itself on its first call, and replays afterwards."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import (
    DTypeError,
    GuardError,
    InputError,
    MissingRuleError,
    NotRecordedError,
    TapeError,
    TapeWarning,
    message,
)
from ..names import call_site, user_frame
from ..recorder import is_quiet, quietly, record
from ..recorder.state import state
from ..sweep import backward
from ..tape import Tape, current_tape
from .again import is_recorded
from .profile import Profile
from .program import Program, freeze
from .reach import Facts, difference, facts_of, told

__all__ = ["Replayable", "replayable"]

Tensor = torch.Tensor

KEYS = 16  # kinds of call that are known at a time
BRANCHES = 8  # programs for one of them: one for each way that its decisions have come out
AGAIN = 10  # how often in a row it may record before it warns


@dataclass
class _Made:
    """What the function did on one way through it.

    Attributes:
        program: ``None`` for what cannot be replayed: then the function is run as it is.
        shape: what it returned, with an `_Output` where a tensor stood.
        swept: whether the first tensor that it returned is the first output of the program.
    """

    program: Program | None
    shape: Any
    swept: bool


@dataclass(frozen=True)
class _Output:
    """A tensor in what a function returned: an output of the program, an input, or a live tensor itself."""

    place: int
    of: str = "outputs"
    tensor: Tensor | None = None


@dataclass
class _Entry:
    """The programs of one kind of call."""

    made: list[_Made] = field(default_factory=list)
    pins: list[Any] = field(default_factory=list)


class Replayable:
    """A function, method or module that is recorded once for each kind of call, and replayed after.

    Calling it gives what the function gives; `step` runs the sweep as well. It is recorded anew for other shapes,
    dtypes, devices, Python values, training flags, modes of torch, and where a decision that it took by a tensor's
    elements comes out differently. What it does besides torch (``print``, counting in Python) is done when it
    records alone. Inside ``te.record()`` the function itself is run, and recorded.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._lock = threading.RLock()  # recording is one thread's at a time, and a function may call itself
        self._in_a_row = 0  # recordings since the last replay
        self._last: Facts | None = None
        self._parameters = _parameters(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, by a replay if this kind of call is known.

        Raises:
            Whatever the function raises, when it is run or recorded.
        """
        if current_tape().strong or is_quiet() or state.paused:
            return self._function(*args, **kwargs)
        return self._run(args, kwargs, None)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As a call, with the sweep from the first tensor that is returned: writes ``.g`` on all that it read.

        The keywords ``seed`` and ``accumulate`` are those of `Program.step`, unless the function has such
        parameters itself.

        Raises:
            As a call; ShapeError, DTypeError and MissingRuleError as `Program.step`.
        """
        options: dict[str, Any] = {
            k: kwargs.pop(k) for k in ("seed", "accumulate") if k in kwargs and k not in self._parameters
        }
        return self._run(args, kwargs, options)

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """`Program.profile` of the program that replays this kind of call; the function itself is not run.

        The keywords ``seed``, ``sweep`` and ``repeats`` are those of `Program.profile`, unless the function has such
        parameters itself.

        Raises:
            NotRecordedError: for a kind of call that was not recorded yet, or cannot be replayed.
            ShapeError, DTypeError: as `Program.profile`.
        """
        names = ("seed", "sweep", "repeats")
        options: dict[str, Any] = {k: kwargs.pop(k) for k in names if k in kwargs and k not in self._parameters}
        with quietly():
            facts = facts_of(self._function, args, kwargs, named=False)
        for each in self._known(tuple(facts.key), []):
            if each.program is not None:
                try:
                    return each.program.profile(*facts.inputs, **options)
                except (GuardError, InputError):  # another way through the function
                    continue
        name = getattr(self, "__name__", "the function")
        what = f"{name}.profile: this kind of call has no recording that could be replayed."
        raise NotRecordedError(message(what, where=call_site(user_frame()), fix=f"call {name}(...) once, before"))

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else _Bound(self, owner)

    def __repr__(self) -> str:
        count = sum(len(entry.made) for entry in list(self._entries.values()))
        return f"<replayable {getattr(self, '__name__', self._function)}: {count} program{'s'[: count != 1]}>"

    @property
    def programs(self) -> list[Program]:
        """The programs that were recorded so far, the one used last at the end."""
        with self._lock:
            return [each.program for entry in self._entries.values() for each in entry.made if each.program]

    # -- replaying ---------------------------------------------------------------------------------------------

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any] | None) -> Any:
        with quietly():
            facts = facts_of(self._function, args, kwargs, named=False)
            key = tuple(facts.key)
        tried: list[_Made] = []
        failed: GuardError | InputError | None = None
        while True:
            for each in self._known(key, tried):
                tried.append(each)
                try:
                    result = self._replay(each, args, kwargs, facts.inputs, options)
                except GuardError as error:
                    if each.program is None:
                        raise
                    failed = error
                    continue
                except InputError as error:  # memory shared in another way, say: the function decides what is right
                    failed = error
                    continue
                self._in_a_row = 0
                return result
            with self._lock:
                if not self._known(key, tried):  # else another thread has recorded this kind of call meanwhile
                    return self._record(key, args, kwargs, options, failed)

    def _known(self, key: tuple[Any, ...], tried: list[_Made]) -> list[_Made]:
        """What was made for one kind of call, beside what was tried already."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return []
            self._entries.move_to_end(key)
            return [each for each in entry.made if not any(each is other for other in tried)]

    def _replay(
        self, made: _Made, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], options: Any
    ) -> Any:
        if made.program is None:
            if options is not None:
                raise self._no_step()
            return self._function(*args, **kwargs)
        if options is None:
            outputs = made.program(*inputs)
        elif not made.swept:
            raise self._no_step()
        else:
            outputs = made.program.step(*inputs, **options)
        return _filled(made.shape, outputs, inputs)

    def _no_step(self) -> MissingRuleError:
        name = getattr(self, "__name__", "the function")
        what = f"{name}.step: a sweep begins at the first tensor that {name} returns, which it did not compute."
        fix = f"return the loss first, or call {name}(...) itself"
        return MissingRuleError(message(what, where=call_site(user_frame()), fix=fix))

    # -- recording -----------------------------------------------------------------------------------------------

    def _record(
        self,
        key: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any] | None,
        failed: GuardError | InputError | None,
    ) -> Any:
        with self._lock:
            with quietly():
                facts = facts_of(self._function, args, kwargs, named=True)
            self._tell(facts, failed)
            with record() as tape:
                result = self._function(*args, **kwargs)
            made, tensors = self._freeze(tape, result, facts.inputs)
            joined = is_recorded(facts.inputs, [], tape.token.marked)
            if made.program is not None and not joined:
                joined = is_recorded([], made.program._given.live, tape.token.marked)
            self._enter(key, made, facts)
            if options is not None:
                if made.program is None or not made.swept:
                    raise self._no_step()
                wrt = made.program.targets(facts.inputs)
                if not wrt:
                    raise self._no_step()
                backward(tensors[0], wrt=wrt, keep=True, **options)
            if joined and options is None:
                return result
            with quietly(), torch.no_grad():  # as a replay gives them: the caller's own, and on no tape
                outputs = tuple([t.as_subclass(Tensor).detach().clone() for t in tensors])
            return _filled(made.shape, outputs, facts.inputs)

    def _freeze(self, tape: Tape, result: Any, inputs: list[Tensor]) -> tuple[_Made, list[Tensor]]:
        """The program of a recording, and the tensors that it returns."""
        tensors: list[Tensor] = []
        held = {id(t): t for t in tape.held}
        shape = _shaped(result, tensors, inputs, held)
        swept = isinstance(first := _first(shape), _Output) and first.of == "outputs"
        if not tensors:
            return _Made(None, shape, False), tensors
        try:
            program = freeze(tape, inputs, tuple(tensors))
        except TapeError as error:
            name = getattr(self, "__name__", "a function")
            text = f"{name} cannot be replayed, and is run as it is: {error}"
            warnings.warn(text, TapeWarning, stacklevel=5)
            return _Made(None, shape, False), tensors
        return _Made(program, shape, swept), tensors

    def _enter(self, key: tuple[Any, ...], made: _Made, facts: Facts) -> None:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(pins=_pins(facts.reached, self._entries, key))
            if len(self._entries) > KEYS:
                self._entries.popitem(last=False)
        entry.made.insert(0, made)
        del entry.made[BRANCHES:]

    # -- telling -------------------------------------------------------------------------------------------------

    def _tell(self, facts: Facts, failed: GuardError | InputError | None) -> None:
        """Warns where a function records again and again, which costs more than running it."""
        self._in_a_row += 1
        last, self._last = self._last, told(facts)
        if self._in_a_row < AGAIN or last is None:
            return
        self._in_a_row = 0
        name = getattr(self, "__name__", "a function")
        fix = "give tensors that lie alike" if isinstance(failed, InputError) else "give what changes as a tensor"
        what = "how its tensors lie in memory" if isinstance(failed, InputError) else "a decision in it"
        cause = difference(last, facts) if failed is None else f"{what}: {failed.args[0]}"
        warnings.warn(
            message(
                f"{name} was recorded {AGAIN} times in a row without a replay. What changes is {cause}",
                where=call_site(user_frame()),
                fix=f"{fix}, or call the function without te.replayable",
            ),
            TapeWarning,
            stacklevel=5,
        )


class _Bound:
    """A replayable method of one object."""

    def __init__(self, replayable: Replayable, owner: Any) -> None:
        self._replayable = replayable
        self.__self__ = owner
        self.__func__ = replayable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._replayable(self.__self__, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """`Replayable.step` of the method."""
        return self._replayable.step(self.__self__, *args, **kwargs)

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """`Replayable.profile` of the method."""
        return self._replayable.profile(self.__self__, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replayable, name)


def replayable(function: Callable[..., Any]) -> Replayable:
    """Makes a function, a method or a module one that is recorded once and replayed after.

    Tensors among its arguments, also inside tuples, lists and dictionaries, are inputs; every other tensor that it
    reads (parameters, closures, attributes) is live. ``function(*args)`` gives what it returns;
    ``function.step(*args)`` runs the sweep from the first tensor that it returns as well, and writes ``.g`` on all
    that it read.

    Raises:
        DTypeError: if `function` is not callable.
    """
    if not callable(function):
        raise DTypeError(
            message(
                f"te.replayable takes a function, not {type(function).__name__}.",
                where=call_site(user_frame()),
                fix="write @te.replayable above a def",
            )
        )
    return Replayable(function)


def _parameters(function: Callable[..., Any]) -> set[str]:
    code = getattr(function, "__code__", None)
    return set() if code is None else set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _pins(reached: list[Any], entries: OrderedDict[tuple[Any, ...], _Entry], key: tuple[Any, ...]) -> list[Any]:
    """What holds an entry to the things whose identity it tells: with one of them it goes."""

    def drop(_: Any) -> None:
        entries.pop(key, None)

    pins: list[Any] = []
    for each in reached:
        try:
            pins.append(weakref.ref(each, drop))
        except TypeError:
            pins.append(each)
    return pins


def _shaped(result: Any, tensors: list[Tensor], inputs: list[Tensor], held: dict[int, Tensor]) -> Any:
    """What a function returned, with an `_Output` for each tensor; those that it computed are added to `tensors`."""
    if isinstance(result, Tensor):
        place = next((i for i, each in enumerate(inputs) if each is result), None)
        if place is not None:
            return _Output(place, "inputs")
        if id(result) in held:
            return _Output(0, "live", result)
        tensors.append(result)
        return _Output(len(tensors) - 1)
    if isinstance(result, (tuple, list)):
        return _like(result, [_shaped(each, tensors, inputs, held) for each in result])
    if isinstance(result, dict):
        return {key: _shaped(each, tensors, inputs, held) for key, each in result.items()}
    return result


def _filled(shape: Any, outputs: Any, inputs: list[Tensor]) -> Any:
    if isinstance(shape, _Output):
        return shape.tensor if shape.of == "live" else (outputs if shape.of == "outputs" else inputs)[shape.place]
    if isinstance(shape, (tuple, list)):
        return _like(shape, [_filled(each, outputs, inputs) for each in shape])
    if isinstance(shape, dict):
        return {key: _filled(each, outputs, inputs) for key, each in shape.items()}
    return shape


def _like(original: Any, items: list[Any]) -> Any:
    kind = type(original)
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def _first(shape: Any) -> Any:
    """The first tensor in what a function returned."""
    if isinstance(shape, _Output):
        return shape
    inside = shape.values() if isinstance(shape, dict) else shape if isinstance(shape, (tuple, list)) else ()
    return next((found for each in inside if (found := _first(each)) is not None), None)
