"""The source of a replay function: its lines, and what they need to run. Every backend gives one."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

import torch

from ...tape import Node, Value
from ..buffers import buffer, placed, rotating
from ..lifetimes import Stretch
from ..passes import Recomputed

__all__ = ["Like", "Name", "Run", "Source", "Unit", "function_code"]

#: A name, and the call that makes what it stands for.
Run = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Unit:
    """Lines of a replay function that are timed as one.

    Attributes:
        kind: what they are: ``call`` (an operation of torch), ``guard``, ``segment`` and ``rows`` (operations that the
            native backend runs as one, ``rows`` by blocks of rows), ``compiled`` (what torch's compiler made one),
            ``layout`` (a leaf that is copied if it does not lie as it did), ``result`` (a copy that the caller gets),
            ``effect`` (a write to a tensor of the caller's).
        start, stop: from which line on, and up to which, counted without the function's first.
        nodes: the nodes that they run.
        reads, writes: the values that they read from memory and write to it, each once; none for a view. (A leaf that
            lies as recorded is not written.)
        part: the value whose bytes are written, where it is only a part of those.
    """

    kind: str
    start: int
    stop: int
    nodes: tuple[Node, ...] = ()
    reads: tuple[Value, ...] = ()
    writes: tuple[Value, ...] = ()
    part: Value | None = None


@dataclass
class Source:
    """The text of a replay function, and what it needs to run.

    Attributes:
        text: the function's source.
        constants: names for what every copy of the function shares (torch calls, parameters, live tensors).
        buffers, results: names for what each copy has for itself: memory that is written to on each replay, and
            sources of memory for what the caller gets.
        places: in which memory each buffer lies.
        views: what runs once for each copy, in order: constants, and views of kept buffers.
        head, lines: its first line, and the others.
        units: which lines belong together.
        once: how many nodes run once for each copy.
        names: what it calls each value.
        rooms: names for the memory of buffers that a replay lets go where nothing lies in it.
        anew: those of `results` whose memory is not kept for later replays.
        again: what the sweep computes again.
    """

    head: str
    lines: list[str]
    constants: dict[str, Any]
    buffers: dict[str, Value]
    results: dict[str, Value]
    places: dict[Value, Stretch]
    views: list[Run] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    once: int = 0
    names: dict[Value, str] = field(default_factory=dict)
    rooms: dict[str, Stretch] = field(default_factory=dict)
    anew: set[str] = field(default_factory=set)
    again: Recomputed = field(default_factory=lambda: Recomputed([]))

    @property
    def text(self) -> str:
        return function_text(self.head, self.lines)

    @cached_property
    def code(self) -> CodeType:
        """What Python's compiler makes of the text."""
        return function_code(self.head, self.lines, self.title)

    @property
    def title(self) -> str:
        """The name of the function."""
        return self.head.removeprefix("def ").partition("(")[0]

    @property
    def kept(self) -> int:
        """The bytes of the buffers that a copy keeps; those that are not needed at one time share memory."""
        return sum(each.size for each in {*self.places.values()} - {*self.rooms.values()})

    def drop_unread(self) -> None:
        """Leaves out of what is run for a copy that of which neither a line nor a later one reads the result."""
        read = set(self.code.co_names)
        found = []
        for each in reversed(self.views):
            if each[0] in read:
                found.append(each)
                read.update(_names_in([*each[2], *each[3].values()]))
        self.views = found[::-1]

    def function(self, *, copy: bool = True) -> Callable[..., Any]:
        """A new copy of the function, with buffers of its own; `copy` as in `rotating`."""
        space = {"__builtins__": builtins, **self.constants}
        with torch.inference_mode(False), torch.no_grad():  # what is kept must outlive the mode of the first replay
            memory = {
                each: torch.empty(each.size, dtype=torch.uint8, device=each.device).untyped_storage()
                for each in set(self.places.values())
            }
            for name, value in self.buffers.items():
                space[name] = placed(value, memory[self.places[value]])
            for name, value in self.results.items():
                space[name] = rotating(value, copy=copy, keep=name not in self.anew)
            for name, call, args, kwargs in self.views:
                space[name] = call(
                    *[_filled(each, space) for each in args], **{k: _filled(v, space) for k, v in kwargs.items()}
                )
            for name, each in self.rooms.items():
                space[name] = memory[each]
                memory[each].resize_(0)
        return FunctionType(self.code, space, self.code.co_name)


@dataclass(frozen=True)
class Name:
    """A name in the function's space, in the arguments of what is run when a copy is made."""

    name: str


@dataclass(frozen=True)
class Like:
    """Some tensor of a value's description, in the arguments of what is run when a copy is made."""

    value: Value


def _names_in(arguments: Any) -> list[str]:
    """The names among arguments, and in the lists among them."""
    if isinstance(arguments, Name):
        return [arguments.name]
    return [name for each in arguments for name in _names_in(each)] if isinstance(arguments, (list, tuple)) else []


def _filled(argument: Any, space: dict[str, Any]) -> Any:
    if isinstance(argument, Name):
        return space[argument.name]
    if isinstance(argument, Like):
        return buffer(argument.value)
    if type(argument) in (list, tuple):
        return type(argument)([_filled(each, space) for each in argument])
    return argument


def function_code(head: str, lines: Sequence[str], title: str) -> CodeType:
    """The code of a function, as ``FunctionType`` takes it."""
    module = compile(function_text(head, lines), f"<program.{title}>", "exec")
    return next(each for each in module.co_consts if isinstance(each, CodeType))


def function_text(head: str, lines: Sequence[str]) -> str:
    """The text of a function."""
    return f"{head}\n" + "\n".join(f"    {line}" if line else "" for line in lines) + "\n"
