"""What a backend generates: the text of a replay function, and how copies of the function are made that can run."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch

from ...tape import Value
from ..buffers import buffer, placed, rotating
from ..lifetimes import Stretch

__all__ = ["Like", "Name", "Run", "Source", "names_in"]

#: A name, and the call that makes what it stands for.
Run = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass
class Source:
    """The text of a replay function, and what it needs to run.

    Attributes:
        text: the function's source.
        constants: names for what every copy of the function shares (torch calls, parameters, live tensors).
        buffers, results: names for what each copy has for itself: memory that is written to on each replay, and
            sources of memory for what the caller gets.
        places: in which memory each buffer lies.
        views: what is run once for each copy, in order: its name, and the call.
    """

    text: str
    code: CodeType
    constants: dict[str, Any]
    buffers: dict[str, Value]
    results: dict[str, Value]
    places: dict[Value, Stretch]
    views: list[Run] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """The bytes of the buffers of a copy; those that are not needed at one time share memory."""
        return sum(each.size for each in set(self.places.values()))

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
                space[name] = rotating(value, copy=copy)
            for name, call, args, kwargs in self.views:
                space[name] = call(
                    *[_filled(each, space) for each in args], **{k: _filled(v, space) for k, v in kwargs.items()}
                )
        return FunctionType(self.code, space, self.code.co_name)


@dataclass(frozen=True)
class Name:
    """A name in the function's space, in the arguments of what is run when a copy is made."""

    name: str


@dataclass(frozen=True)
class Like:
    """Some tensor of a value's description, in the arguments of what is run when a copy is made."""

    value: Value


def names_in(arguments: Any) -> list[str]:
    """The names among arguments, and in the lists among them."""
    if isinstance(arguments, Name):
        return [arguments.name]
    return [name for each in arguments for name in names_in(each)] if isinstance(arguments, (list, tuple)) else []


def _filled(argument: Any, space: dict[str, Any]) -> Any:
    if isinstance(argument, Name):
        return space[argument.name]
    if isinstance(argument, Like):
        return buffer(argument.value)
    if type(argument) in (list, tuple):
        return type(argument)([_filled(each, space) for each in argument])
    return argument
