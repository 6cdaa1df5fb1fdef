"""The arguments of a node against the schema of its operation: as many as it takes, each of its type."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...registry import Op
from ...tape import Value
from .allowed import takes
from .checked import LARGEST, Place, refuse, shown

__all__ = ["check_arguments"]

PLAIN: dict[str, tuple[type, ...]] = {
    "Tensor": (Value, int, float, bool, complex),  # a number stands for a tensor of one element
    "int": (int, bool),
    "float": (float, int),
    "bool": (bool,),
    "number": (int, float, bool, complex),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
    "Device": (torch.device,),
}


def check_arguments(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], place: Place) -> None:
    """Refuses arguments that the operation does not take."""
    wanted = takes(op)
    if wanted is None:
        _check_call(op, args, kwargs, place)
        return
    by_place = [each for each in wanted if not each[3]]
    if len(args) > len(by_place):
        refuse((*place, "args"), f"{op.name} takes {len(by_place)} arguments by their place, not {len(args)}.")
    types = {name: kind for name, kind, _, _ in wanted}
    given = {each[0] for each in by_place[: len(args)]}
    for i, (argument, (name, kind, _, _)) in enumerate(zip(args, by_place, strict=False)):
        if not _fits(argument, kind):
            refuse((*place, "args", i), f"{op.name} takes a {kind} as {name}, not {_told(argument)}.")
    for name, argument in kwargs.items():
        if name not in types or name in given:
            refuse((*place, "kwargs"), f"{op.name} takes no {shown(name)} here.")
        if not _fits(argument, types[name]):
            refuse((*place, "kwargs", name), f"{op.name} takes a {types[name]}, not {_told(argument)}.")
    missing = [name for name, _, needed, _ in wanted if needed and name not in given and name not in kwargs]
    if missing:
        refuse(place, f"{op.name} needs {', '.join(missing)}.")


def _check_call(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], place: Place) -> None:
    """The same for an operation of the user's: whether its function can be called so."""
    for name in kwargs:
        if not name.isidentifier() or keyword.iskeyword(name):
            refuse((*place, "kwargs"), f"{shown(name)} is no name of an argument.")
    if op.signature is not None:
        try:
            op.signature.bind(*args, **kwargs)
        except TypeError as error:
            refuse(place, f"{op.name}({', '.join(op.parameters)}): {error}.")


def _fits(argument: Any, kind: str) -> bool:
    if kind.startswith("Optional["):
        return argument is None or _fits(argument, kind[9:-1])
    if kind.startswith("List["):
        return type(argument) in (list, tuple) and all(_fits(each, kind[5:-1]) for each in argument)
    if type(argument) is int and not -LARGEST - 1 <= argument <= LARGEST:
        return False
    return type(argument) in PLAIN.get(kind, ())


def _told(argument: Any) -> str:
    return "a value" if isinstance(argument, Value) else shown(argument)
