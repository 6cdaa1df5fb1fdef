"""The arguments of a node as JSON, and back.

Numbers, strings, true, false and null stand for themselves, and a list for a list. Everything else is an object
of one key that says what it is: ``{"value": 3}``, ``{"tuple": [1, 2]}``, ``{"float": "nan"}``,
``{"complex": [0.0, 1.0]}``, ``{"dtype": "float32"}``, ``{"slice": [0, null, 2]}``…
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...tape import Value
from .checked import Place, integer, listed, refuse, shown, text

__all__ = ["Decoder", "Unknown", "dtype_of", "encoded"]

DTYPES = {
    str(each).removeprefix("torch."): each
    for each in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64,
        torch.complex32, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
        torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    )
}  # fmt: skip
LAYOUTS = {"strided": torch.strided}
MEMORY_FORMATS = {
    str(each).removeprefix("torch."): each
    for each in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
NAMED: dict[str, dict[str, Any]] = {"dtype": DTYPES, "layout": LAYOUTS, "memory_format": MEMORY_FORMATS}
FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

DEEPEST = 64  # lists within lists: as many as a tensor has dimensions
WIDEST = (1 << 64) - 1


class Unknown(Exception):
    """An argument of a kind that a file cannot hold."""


def encoded(argument: Any, index: Callable[[Value], int], depth: int = 0) -> Any:
    """An argument as JSON; values by their index.

    Raises:
        Unknown: for one of a kind that a file cannot hold.
    """
    kind = type(argument)
    if depth > DEEPEST:
        raise Unknown("lists nested too deep")
    if argument is None or kind is bool:
        return argument
    if kind is int:
        if abs(argument) > WIDEST:
            raise Unknown("a number of more than 64 bits")
        return argument
    if kind is float:
        return argument if math.isfinite(argument) else {"float": str(argument)}
    if kind is str:
        if len(argument) > 4096 or not argument.isprintable():
            raise Unknown("a string that is long, or cannot be printed")
        return argument
    if kind is Value:
        return {"value": index(argument)}
    if kind is list:
        return [encoded(each, index, depth + 1) for each in argument]
    if kind in (tuple, torch.Size):
        return {"tuple": [encoded(each, index, depth + 1) for each in argument]}
    if kind is complex:
        return {"complex": [encoded(argument.real, index), encoded(argument.imag, index)]}
    if kind is slice:
        return {"slice": [encoded(each, index, depth + 1) for each in (argument.start, argument.stop, argument.step)]}
    if argument is ...:
        return {"ellipsis": True}
    if kind is dict and all(type(key) is str for key in argument):
        return {"dict": [[key, encoded(each, index, depth + 1)] for key, each in argument.items()]}
    if kind in (torch.dtype, torch.layout, torch.memory_format):
        word = kind.__name__
        found = next((name for name, each in NAMED[word].items() if each is argument), None)
        if found is not None:
            return {word: found}
    if kind is torch.device:
        return {"device": str(argument)}
    raise Unknown(f"{kind.__module__}.{kind.__qualname__}")


class Decoder:
    """Arguments from JSON.

    Args:
        values: those of the file.
        device: says which device here stands for a recorded one.
    """

    def __init__(self, values: list[Value], device: Callable[[Any, Place], torch.device]) -> None:
        self.values = values
        self.device = device
        self.read: list[Value] = []  # the values met, in order

    def value(self, thing: Any, place: Place) -> Value:
        """The value of an index."""
        return self.values[integer(thing, place, 0, len(self.values) - 1)]

    def decoded(self, thing: Any, place: Place, depth: int = 0) -> Any:
        """The argument that stands at a place of the file."""
        kind = type(thing)
        if kind is str:
            return text(thing, place, empty=True)
        if kind is int:
            return integer(thing, place, -WIDEST, WIDEST)
        if thing is None or kind is bool:
            return thing
        if kind is float:
            return _finite(thing, place)
        if depth > DEEPEST:
            refuse(place, "nested too deep.")
        if kind is list:
            return [self.decoded(each, (*place, i), depth + 1) for i, each in enumerate(thing)]
        if kind is not dict or len(thing) != 1:
            refuse(place, f"no argument: {shown(thing)}.")
        ((word, held),) = thing.items()
        place = (*place, str(word)[:40])
        if word == "value":
            found = self.value(held, place)
            self.read.append(found)
            return found
        if word == "tuple":
            return tuple([self.decoded(each, (*place, i), depth + 1) for i, each in enumerate(listed(held, place))])
        return self.word(word, held, place, depth)

    def word(self, word: str, held: Any, place: Place, depth: int) -> Any:
        """An argument of a rarer kind."""
        if word == "float":
            return _named(held, FLOATS, place)
        if word == "complex":
            parts = [self.decoded(each, (*place, i), DEEPEST) for i, each in enumerate(listed(held, place, 2))]
            if not all(type(each) is float for each in parts):
                refuse(place, "a complex number is two floats.")
            return complex(*parts)
        if word == "slice":
            listed(held, place, 3)
            return slice(*[self.decoded(each, (*place, i), depth + 1) for i, each in enumerate(held)])
        if word == "ellipsis":
            return ...
        if word == "dict":
            pairs = [listed(each, (*place, i), 2) for i, each in enumerate(listed(held, place))]
            return {
                text(key, (*place, i), empty=True): self.decoded(each, (*place, i), depth + 1)
                for i, (key, each) in enumerate(pairs)
            }
        if word == "device":
            return self.device(held, place)
        if word not in NAMED:
            refuse(place, "no argument of a kind that is known here.")
        return _named(held, NAMED[word], place)


def dtype_of(thing: Any, place: Place) -> torch.dtype:
    """The dtype of a name."""
    found: torch.dtype = _named(thing, DTYPES, place)
    return found


def _named(thing: Any, every: dict[str, Any], place: Place) -> Any:
    if type(thing) is not str or thing not in every:
        refuse(place, f"{shown(thing)} is none of {', '.join(every)}.")
    return every[thing]


def _finite(thing: float, place: Place) -> float:
    if not math.isfinite(thing):
        refuse(place, "a number beyond what a float holds.")
    return thing
