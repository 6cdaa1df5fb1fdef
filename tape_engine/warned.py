"""What is said of values that leave the recording's sight: legal, and probably not meant, or refused."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch.overrides import handle_torch_function

from . import modules
from .errors import NotRecordedError, TapeWarning, message
from .names import _HERE, call_site, user_frame
from .tape import Node, Value, bound, describe

__all__ = ["placed", "refuse_by_python", "warn_of_exit", "warn_of_hook", "warn_of_list", "warn_of_thread"]

Tensor = torch.Tensor


def _passing(*tensors: Tensor) -> Value | None:
    """The first value of `tensors` through which a gradient could pass, computed on a tape that waits."""
    for tensor in tensors:
        value = bound(tensor)
        node = None if value is None else value.node
        if value is None or node is None or node.closed or node.cut or not value.differentiable:
            continue
        if _reaches(node):
            return value
    return None


#: So many nodes are looked at before it is taken for granted that a gradient would find its way.
LOOKED_AT = 256


def _reaches(node: Node) -> bool:
    """Whether a gradient would find its way from `node` to a leaf: not from what a factory or ``detach()`` made."""
    stack, seen = [node], {node}
    while stack and len(seen) < LOOKED_AT:
        node = stack.pop()
        if node.cut or not node.op.differentiable:
            continue
        for value, source in zip(node.inputs, node.sources, strict=True):
            if not value.differentiable:
                continue
            if source is None:
                return True
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return bool(stack)


def warn_of_exit(tensor: Tensor, name: str) -> None:
    """Warns that a recorded value leaves for code through which no gradient can be followed."""
    value = _passing(tensor)
    if value is None:
        return
    call, then = ("pickling", "") if name == "__reduce_ex__" else (f".{name}()", f".{name}()")
    warnings.warn(
        message(
            f"{call} hands {value.name or 'a recorded value'} to code that the recorder cannot follow: what is "
            "computed from it there is a constant to the sweep.",
            where=call_site(user_frame()),
            operands=[(value.name or "value", describe(value))],
            fix=f"te.stop_gradient(...){then}, or .detach() before it, says that this is meant",
        ),
        TapeWarning,
        stacklevel=3,
    )


def refuse_by_python(tensor: Tensor, name: str) -> None:
    """Refuses to have a function of Python write to what may have a gradient, as torch does."""
    value = _passing(tensor)
    if value is None:
        return
    raise NotRecordedError(
        message(
            f".{name}() writes to {value.name or 'a recorded value'} what a function of Python gives for each element, "
            "through which no gradient can be followed.",
            where=call_site(user_frame()),
            operands=[(value.name or "value", describe(value))],
            fix=f"write it in operations of torch; .clone().detach().{name}(...) gives a constant",
        )
    )


def warn_of_hook(tensor: Tensor | None, what: str, stacklevel: int) -> None:
    """Warns that a call by torch's own backward was asked for, which no sweep makes."""
    frame = user_frame()
    value = None if tensor is None else bound(tensor)
    name = (None if value is None else value.name) or "value"
    warnings.warn(
        message(
            f"{what} a call by torch's own backward: te.backward calls no hook.",
            where=call_site(frame),
            operands=[] if value is None else [(name, describe(value))],
            fix="change the gradient after the sweep, or in the rule of an operation of your own (te.op)",
        ),
        TapeWarning,
        stacklevel=stacklevel,
    )


def warn_of_thread(title: str, tensors: Iterable[Tensor]) -> bool:
    """Warns that another thread than the one that records computes with one of `tensors`, if a gradient could pass."""
    known = _passing(*tensors)
    if known is None:
        return False
    warnings.warn(
        message(
            f"{title} runs in another thread than the one that records: what it makes of "
            f"{known.name or 'a recorded value'} is a constant to the sweep.",
            where=call_site(user_frame()),
            operands=[(known.name or "value", describe(known))],
            fix="open te.record() in this thread as well: the gradient passes from one tape to the other",
        ),
        TapeWarning,
        stacklevel=3,
    )
    return True


def _warn_of_module(module: torch.nn.Module) -> None:
    warn_of_hook(None, f"a backward hook of {type(module).__name__} asks for", stacklevel=5)


modules.on_backward_hook(_warn_of_module)


def warn_of_list(title: str, tensors: Iterable[Tensor], stacklevel: int = 5) -> None:
    """Warns that `title` takes the numbers out of `tensors`, if a gradient could pass through one of them."""
    known = _passing(*tensors)
    if known is None:
        return
    warnings.warn(
        message(
            f"{title} takes the numbers out of the tensors in a list: what is computed from them there is a "
            "constant to the sweep.",
            where=call_site(user_frame()),
            operands=[(known.name or "value", describe(known))],
            fix="torch.stack(...) of the list keeps the gradient; .detach() of each says that this is meant",
        ),
        TapeWarning,
        stacklevel=stacklevel,
    )


def placed(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """What shows a warning, so that one of torch's stands where it does without a recording.

    In a block torch is called from a line of this package, and takes that for the line of who called it. So the warning
    is given anew, at the line that called us, whose module's filters are asked, and which remembers what was shown.
    """

    def _showwarnmsg(msg: Any) -> None:
        ours = None
        if msg.filename.startswith(_HERE) and not issubclass(msg.category, TapeWarning):
            ours = _frame_at(msg.filename, msg.lineno)
        caller = None if ours is None else _caller(ours)
        if ours is None or caller is None:
            original(msg)
            return
        ours.f_globals.get("__warningregistry__", {}).clear()  # else a line of ours would warn once for all callers
        names = caller.f_globals
        warnings.warn_explicit(
            msg.message,
            msg.category,
            caller.f_code.co_filename,
            caller.f_lineno,
            module=names.get("__name__") or "<unknown>",
            registry=names.setdefault("__warningregistry__", {}),
            source=msg.source,
        )

    return _showwarnmsg


def _frame_at(filename: str, line: int) -> FrameType | None:
    """The innermost frame that stands at a line."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_lineno != line or frame.f_code.co_filename != filename):
        frame = frame.f_back
    return frame


def _caller(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that is not the engine's, from one of ours outwards."""
    while frame is not None:
        if (
            frame.f_code is handle_torch_function.__code__
        ):  # called by a function that asks for modes, and then us for it
            frame = frame.f_back
        elif not frame.f_code.co_filename.startswith(_HERE):
            return frame
        frame = None if frame is None else frame.f_back
    return None
