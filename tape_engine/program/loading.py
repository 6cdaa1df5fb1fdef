"""`load`: a program from a file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from ..errors import DTypeError, TapeWarning, message
from ..names import call_site, user_frame
from ..recorder import quietly
from ..registry import Op
from .file import Table, check_shapes, opened_file, path_of, read
from .program import Program

__all__ = ["draft", "load"]


def load(
    path: str | PathLike[str],
    ops: Op | Sequence[Op] | Mapping[str, Op] = (),
    *,
    device: torch.device | str | None = None,
) -> Program:
    """The program of a file that `Program.save` wrote; its parameters come along, as ``program.params``.

    It replays what was recorded, forward and back, to the same numbers. Nothing of the file is taken on trust and
    no code of it is run: it consists of torch's own operations, named in a table, of ours, and of those in `ops`.

    Args:
        path: the file.
        ops: the named operations of one's own that the program runs, or a mapping of their names to them.
        device: where the tensors are put, and what is recorded for another device runs. By default where they
            were; what was on a device that is not here comes to the CPU, and a `TapeWarning` says so.

    Raises:
        LoadError: for a file that is damaged, cut off, hostile, or of another version, naming the place in it; for
            an operation that is not given.
        PathError: for a file that is not there, or cannot be read.
        DTypeError: for what is no path, no device, or no operation.
    """
    return _load(path, Table(_ops(ops)), _Devices(device))


def draft(path: str | PathLike[str]) -> Program:
    """The program of a file to be looked at: operations of the user's that it names need not be given."""
    return _load(path, Table((), draft=True), _Devices("cpu"))


def _load(path: Any, table: Table, devices: _Devices) -> Program:
    with opened_file(path_of(path, "te.load")) as (header, payload), quietly():
        found = read(header, payload, table, devices)
        check_shapes(found.nodes)
        program = Program(found.frozen.tape, found.frozen, copy=found.copy, shared=found.shared)
    devices.tell()
    return program


def _ops(ops: Any) -> Sequence[Op] | Mapping[str, Op]:
    given = [ops] if isinstance(ops, Op) else ops
    each: Any = list(given.values()) if isinstance(given, Mapping) else given
    wrong = next((one for one in each if not isinstance(one, Op)), None) if isinstance(each, (list, tuple)) else ops
    if not isinstance(each, (list, tuple)) or wrong is not None:
        raise DTypeError(
            message(
                f"te.load: ops takes named operations, or a mapping of names to them: not {type(wrong).__name__}.",
                where=call_site(user_frame()),
                fix="te.load(path, ops=[scale]), where scale = te.op(function)",
            )
        )
    return given


class _Devices:
    """Which device here stands for one that was recorded."""

    def __init__(self, device: torch.device | str | None) -> None:
        try:
            self._all = None if device is None else torch.empty(0, device=device).device
        except (RuntimeError, TypeError, AssertionError) as error:
            what = f"te.load: {device!r} is no device that is here: {str(error).partition(chr(10))[0]}"
            raise DTypeError(message(what, where=call_site(user_frame()), fix='device="cpu"')) from None
        self._missing: dict[str, None] = {}

    def __call__(self, name: str) -> torch.device:
        if self._all is not None:
            return self._all
        wanted = torch.device(name)
        if wanted.type == "cpu" or name in self._missing:
            return torch.device("cpu")
        there = getattr(torch, wanted.type)
        if there.is_available() and (wanted.index or 0) < there.device_count():
            return wanted
        self._missing[name] = None
        return torch.device("cpu")

    def tell(self) -> None:
        """Warns of what came to the CPU unasked."""
        if self._missing:
            what = f"the program was saved on {', '.join(self._missing)}, which is not here: it is loaded onto the CPU."
            fix = 'te.load(path, device="cpu") says that this is meant'
            warnings.warn(message(what, where=call_site(user_frame()), fix=fix), TapeWarning, stacklevel=4)
