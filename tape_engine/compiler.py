"""Torch's compiler beside a recording: what a tape hears runs as it was written.

Of what ``torch.compile`` makes of a function, no mode hears the operations, and no tensor is asked for its class. While
a block is open, the compiler is told to leave everything as it was written. Outside a block that would be too much: a
tape may live long, and what it does not know is to be as fast as ever. But there a tensor to which a tape listens is of
another class, and what was compiled for plain tensors would be compiled anew for it. So the compiler is asked only when
it is about to compile. If what it reads listens, that call runs as it was written, with all that it calls; nothing is
kept of it, and the next call on plain tensors finds its compiled code where it was.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

__all__ = ["follow", "give_up", "hold", "spare"]

_spared: tuple[type, ...] = ()
_followed = False  # whether the compiler is asked
_held = False  # whether a block is open
_stance: Any = None  # in which the compiler leaves functions as they were written, while a block is open
_plain_compile: Any = None  # torch's own torch.compile, until it has loaded the compiler


class _Listening(BaseException):  # no Exception: of those the compiler makes errors of its own
    """What is being compiled reads a tensor to which a tape listens."""


def spare(kind: type) -> None:
    """The recorder says here which class stands for a tensor to which a tape listens."""
    global _spared
    _spared = (*_spared, kind)


def hold() -> None:
    """A block opens: from now on everything runs as it was written."""
    global _held
    _held = True
    follow()
    _hold_stance()


def give_up() -> None:
    """The last block is closed."""
    global _held, _stance
    _held = False
    if _stance is not None:
        _stance.__exit__(None, None, None)
        _stance = None


def _hold_stance() -> None:
    global _stance
    if _stance is None and "torch._dynamo" in sys.modules:
        _stance = torch.compiler.set_stance("force_eager")


def follow() -> None:
    """From now on the compiler is asked what it reads; it is not loaded for that (it takes seconds)."""
    global _followed, _plain_compile
    if _followed:
        return
    if "torch._dynamo" not in sys.modules:
        if _plain_compile is None:
            _plain_compile = torch.compile
            torch.compile = _loading(_plain_compile)
        return
    _followed = True
    if _plain_compile is not None:
        torch.compile = _plain_compile
    from torch._dynamo.convert_frame import CatchErrorsWrapper
    from torch._dynamo.variables.builder import VariableBuilder

    frames: Any = CatchErrorsWrapper
    values: Any = VariableBuilder
    frames.__call__ = _as_written(frames.__call__)
    values.wrap_tensor = _reading(values.wrap_tensor)


def _loading(original: Any) -> Any:
    """`original`, ``torch.compile``: it loads the compiler, which is followed from its first function on."""

    @functools.wraps(original)
    def compile(*args: Any, **kwargs: Any) -> Any:
        importlib.import_module("torch._dynamo")
        follow()
        if _held:  # the block was opened before there was anything to tell
            _hold_stance()
        return original(*args, **kwargs)

    return compile


def _reading(original: Any) -> Any:
    def wrap_tensor(self: Any, value: Any) -> Any:
        if isinstance(value, _spared):
            raise _Listening
        return original(self, value)

    return wrap_tensor


def _as_written(original: Any) -> Any:
    """The compiler's way into a frame, which is gone only where it has nothing yet for what the frame is given."""
    types: Any = importlib.import_module("torch._dynamo.types")

    @functools.wraps(original)
    def convert(self: Any, frame: Any, *args: Any) -> Any:
        try:
            if _reads_at_once(frame):
                raise _Listening
            return original(self, frame, *args)
        except _Listening:
            _count_no_more()
            # This frame and all beneath it, and no later one of the same code.
            skip = types.FrameExecStrategy(types.FrameAction.SKIP, types.FrameAction.SKIP)
            return types.ConvertFrameReturn(frame_exec_strategy=skip, apply_to_code=False)

    return convert


def _count_no_more() -> None:
    """With ``fullgraph=True`` torch (from 2.13 on) counts, and raises an error where nothing was compiled."""
    count: Any = getattr(torch._C._dynamo.eval_frame, "set_fullgraph_compiled_frame_count", None)
    if count is not None:
        count(-1)


def _reads_at_once(frame: Any) -> bool:
    """Whether an argument of a frame listens, or a parameter of one: then there is nothing to try."""
    for each in frame.f_locals.values():
        if isinstance(each, torch.nn.Module):
            if any(isinstance(p, _spared) for p in each.parameters()):
                return True
        elif isinstance(each, _spared):
            return True
    return False
