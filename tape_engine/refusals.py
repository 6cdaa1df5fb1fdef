"""What a sweep refuses by name: values into which no gradient may pass, and contents that are not those recorded."""

from __future__ import annotations

import torch

from . import recorder
from .errors import NotRecordedError, OverwrittenError, RuleError, SweptError, TapeError, message
from .names import located
from .tape import Node, Value, describe

__all__ = ["closed_error", "failed_error", "overwritten_error", "reshaped_error"]


def overwritten_error(node: Node, value: Value) -> OverwrittenError:
    """What says that the contents of a value, which the rule of `node` reads, are not those recorded."""
    return OverwrittenError(
        message(
            f"{value.name or 'a value'} that the rule of {node.op.name} reads "
            "was changed by a write that the recorder could not see.",
            where=located(node),
            operands=[(value.name or "value", describe(value))],
            fix="write to it inside te.record(), or to a copy of it: .clone()",
        )
    )


def reshaped_error(value: Value, holder: torch.Tensor) -> NotRecordedError:
    """What says that a leaf was read in two shapes, and has no one gradient."""
    name = value.name or "a leaf"
    return NotRecordedError(
        message(
            f"{name} was read, given another shape, and read again: its gradient has no one shape.",
            operands=[(f"{name}, before", describe(value)), (f"{name}, now", describe(holder))],
            fix=f"leave {name} as it is, and reshape what is computed from it",
        )
    )


def failed_error(node: Node, g: list[torch.Tensor | None], error: Exception) -> RuleError:
    """What is raised when the rule of `node` raised `error`."""
    title = getattr(node.op.grad, "__name__", "borrowed rule")
    return RuleError(
        message(
            f"the rule {title} of {node.op.name} raised {type(error).__name__}: {error}",
            where=located(node),
            operands=_described(node, g),
        )
    )


def _described(node: Node, g: list[torch.Tensor | None]) -> list[tuple[str, str]]:
    rows = [("g", describe(each)) for each in g if each is not None]
    return rows + [(name, describe(v)) for name, v in zip(node.input_names, node.inputs, strict=True)]


def closed_error(value: Value, where: str | None) -> TapeError:
    """What says that no gradient may pass into a value."""
    kinds = {recorder.SWEPT: SweptError, recorder.UNSEEN: OverwrittenError, recorder.UNFOLLOWED: OverwrittenError}
    kind = kinds.get(value.closed, NotRecordedError)
    name = value.name or "a value"
    return kind(
        message(
            f"the gradient reaches {name}, which {value.closed}.",
            where=where,
            operands=[(value.name or "value", describe(value))],
            fix=_way_around(value),
        )
    )


def _way_around(value: Value) -> str:
    name = value.name or "it"
    if value.closed == recorder.SWEPT:
        return f"pass keep=True to the first sweep, or go on from te.stop_gradient({name})"
    if value.closed == recorder.SWEEP:
        return "pass record=True to that sweep"
    if value.closed == recorder.IN_TURN:
        return "give it copies of what it reads: .clone()"
    if value.closed == recorder.OVERLAPPED:
        return "write to a copy of it: .clone()"
    if value.closed == recorder.RESHAPED:
        return "give the new contents to a tensor of their own, or a reshape of them to this one"
    if value.closed == recorder.PARTED:
        return "copy the elements instead: x.copy_(y)"
    if value.closed == recorder.MOVED:
        return "copy the elements instead: x.copy_(...), or take a view"
    if value.closed == recorder.UNFOLLOWED:
        return "copy one of the two before that: .clone()"
    if value.closed == recorder.ONCE:
        return f"write that backward in differentiable operations, or go on from {name}.detach()"
    if value.closed == recorder.OUTSIDE:
        return f"compute {name} inside `with te.record():`, or go on from {name}.detach()"
    return f"write to {name} inside the recording, or to a copy of it: .clone()"
