"""The same replay function with a clock between its lines, for `Program.profile`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from .source import Source, function_code

__all__ = ["clock_of", "timed"]


def timed(source: Source, clock: Callable[[], int], stamp: Callable[[int], None]) -> Source:
    """The same function, which gives the time to `stamp` before the first unit and after each."""
    text = source.text
    taken = {*source.constants, *source.buffers, *source.results, *re.findall(r"\w+", text)}
    names = []
    for name in ("clock", "stamp"):
        while name in taken:
            name += "_"
        names.append(name)
    note = f"{names[1]}({names[0]}())"
    after = {unit.stop for unit in source.units} or {len(source.lines) - 1}  # all but what returns
    body = [note]
    for i, line in enumerate(source.lines, 1):
        body.append(line)
        if i in after:
            body.append(note)
    made = replace(source, constants={**source.constants, names[0]: clock, names[1]: stamp})
    vars(made)["code"] = function_code(source.head, body, f"{source.title} with clocks")
    return made


def clock_of(device: torch.device) -> Callable[[], int]:
    """Nanoseconds from some moment on, once what was begun on `device` is done."""
    if device.type == "cpu":
        return time.perf_counter_ns
    module = torch.get_device_module(device)

    def clock() -> int:
        module.synchronize(device)
        return time.perf_counter_ns()

    return clock
