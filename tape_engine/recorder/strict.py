"""``strict=True``: what is recorded must have a registered rule."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import MissingRuleError, message
from ..names import call_site, user_frame
from ..registry import Op
from ..tape import Value, describe
from .state import is_cut

__all__ = ["refuse_without_rule", "rule_to_add"]


def refuse_without_rule(op: Op, inputs: Sequence[Value]) -> None:
    """`strict=True`: an operation through which a gradient should pass must have a registered rule."""
    if op.grad is None and op.differentiable and any(v.differentiable for v in inputs) and not is_cut():
        raise MissingRuleError(
            message(
                f"{op.name} has no registered gradient rule, and this recording is strict.",
                where=call_site(user_frame()),
                operands=[(name, describe(v)) for name, v in zip(op.parameters, inputs, strict=False)],
                fix=rule_to_add(op),
            )
        )


def rule_to_add(op: Op) -> str:
    """The lines by which a user would register a rule for `op`."""
    target = op.name if op.is_named else f"torch.ops.{op.forward}"
    return f"@te.rule({target}) on def {op.name}_grad(g, out, {', '.join(op.parameters)}): ..."
