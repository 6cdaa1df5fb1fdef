"""``te.check_rule``: a gradient rule held against finite differences and ``torch.autograd``, call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DTypeError, MissingRuleError, message
from ..names import call_site, user_frame
from ..recorder import recording, rule_to_add
from ..registry import Op, Spec, records
from ..tape import Tape, Value, describe, pop_tape, push_tape
from .case import SEED, Case, apart, case_of, copied, differentiable, first_line, tensors_in
from .compare import compare
from .manners import check_in_part, check_manners, repeatable
from .reports import CallReport, Fault, RuleReport
from .second import check_second
from .ways import reference, seeds

__all__ = ["check_rule"]

Tensor = torch.Tensor

#: An operation with its arguments.
Call = tuple[Op, Sequence[Any], dict[str, Any]]


def check_rule(op: Any, *args: Any, **kwargs: Any) -> RuleReport:
    """Checks the gradient rule of `op`, and says which argument is wrong, where, and by how much.

    The rule is held against central finite differences in float64, element by element (of more than 128 elements:
    of those, and of all of them along random directions), and against ``torch.autograd`` where that knows the
    operation. At a kink the one-sided differences bound what the gradient may be. It is also looked at whether the
    rule writes to what it is given, gives the same twice, takes ``None`` for an output that the loss does not reach,
    reads data that its code does not show, and what its second derivative is, through a recorded sweep.

    Args:
        op: a named operation, an ATen overload, or a torch function.
        *args: the operation's arguments. Floating tensors are copied in float64 and complex ones in complex128;
            nothing of the caller's changes, torch's random generators neither. Without arguments the operation's
            registered samples are taken.
        **kwargs: further arguments of the operation.

    Returns:
        A report that is true when the rule is right; ``print`` it.

    Raises:
        MissingRuleError: for an operation without a rule, with the code to add.
        DTypeError: for what is no operation, without arguments and samples, without a floating tensor to
            differentiate with respect to, or where a named operation does not take these arguments.
    """
    with apart():
        found = [each for each in records(op) if each.grad is not None]
        if not found:
            raise _without_rule(records(op)[0])
        calls = _given(op, found, args, kwargs) if args or kwargs else _samples(found)
        named = dict.fromkeys(getattr(each.grad, "__name__", "its rule") for each, _, _ in calls)
        report = RuleReport(f"{', '.join(named)} of {calls[0][0].name}")
        report.calls = [_check_call(each, given, keywords) for each, given, keywords in calls]
        return report


# -- which calls ---------------------------------------------------------------------------------------------


def _without_rule(op: Op) -> MissingRuleError:
    why = "has no registered gradient rule" if op.differentiable else "is declared to have no gradient, and no rule"
    return MissingRuleError(
        message(f"te.check_rule: {op.name} {why}.", where=call_site(user_frame()), fix=rule_to_add(op))
    )


def _samples(ops: Sequence[Op]) -> list[Call]:
    generator = torch.Generator().manual_seed(SEED)
    calls = [
        (op, [_drawn(each, generator) for each in s.args], {k: _drawn(v, generator) for k, v in s.kwargs.items()})
        for op in ops
        for s in op.samples
    ]
    bound: list[Call] = [(op, *op.bind(tuple(args), kwargs)) for op, args, kwargs in calls]
    kept = [call for call in bound if any(differentiable(t) for t in tensors_in([call[1], call[2]]))]
    if not kept:
        name = ops[0].name
        raise DTypeError(
            message(
                f"te.check_rule: {name} has no samples, and no arguments were given.",
                where=call_site(user_frame()),
                fix=f"te.check_rule({name}, {', '.join(ops[0].parameters) or '*args'}), with tensors of your own",
            )
        )
    return kept


def _drawn(argument: Any, generator: torch.Generator) -> Any:
    if isinstance(argument, Spec):
        return argument.draw(generator)
    return type(argument)(_drawn(a, generator) for a in argument) if type(argument) in (list, tuple) else argument


def _given(target: Any, ops: Sequence[Op], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """The call that was asked for, under the overload that torch takes for it."""
    if not any(differentiable(t) for t in tensors_in([args, kwargs])):
        raise DTypeError(
            message(
                f"te.check_rule: none of the arguments of {ops[0].name} is a floating or complex tensor, "
                "so there is no gradient to check.",
                where=call_site(user_frame()),
                operands=[(f"argument {i}", describe(t)) for i, t in enumerate(tensors_in([args, kwargs]))],
                fix="give a floating tensor: x.to(torch.float64)",
            )
        )
    op = ops[0]
    if op.is_named:
        try:
            return [(op, *op.bind(args, kwargs))]
        except TypeError as error:
            raise DTypeError(
                message(
                    f"te.check_rule: {op.name} does not take these arguments: {error}.",
                    where=call_site(user_frame()),
                    fix=f"te.check_rule({op.name}, {', '.join(op.parameters)})",
                )
            ) from None
    if isinstance(target, torch._ops.OpOverload):
        return [(op, *_in_schema_order(op, args, kwargs))]
    tape = Tape(strong=True)
    push_tape(tape)
    try:
        with recording(tape):
            target(*copied(args), **{name: copied(each) for name, each in kwargs.items()})
    finally:
        pop_tape(tape)
    for node in tape.nodes:
        if node.op in ops:
            if any(value.holder is None for value in node.inputs):  # a number that torch made a tensor of
                return [(node.op, *_in_schema_order(node.op, args, kwargs))]
            given = [_contents(each) for each in node.args]
            return [(node.op, given, {name: _contents(each) for name, each in node.kwargs.items()})]
    ran = ", ".join(dict.fromkeys(node.op.name for node in tape.nodes)) or "nothing"
    raise MissingRuleError(
        message(
            f"te.check_rule: torch runs this call of {ops[0].name} as {ran}, which its rule is not for.",
            where=call_site(user_frame()),
            fix=f"check the rule of what runs: te.check_rule(torch.ops.aten.{ran.partition(',')[0]}.default, ...)",
        )
    )


def _in_schema_order(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as torch hands them on: by place where they have one, defaults in between filled in."""
    schema: Any = op.forward._schema  # type: ignore[attr-defined]
    left = dict(kwargs)
    given = list(args)
    for argument in schema.arguments[len(args) :]:
        if argument.kwarg_only or not left.keys() & {a.name for a in schema.arguments if not a.kwarg_only}:
            break
        given.append(left.pop(argument.name, argument.default_value))
    return given, left


def _contents(argument: Any) -> Any:
    """A recorded argument with the tensors back in the place of values."""
    if isinstance(argument, Value):
        return argument.holder
    return type(argument)(_contents(a) for a in argument) if type(argument) in (list, tuple) else argument


# -- one call --------------------------------------------------------------------------------------------------


def _check_call(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> CallReport:
    notes = []
    try:
        case = case_of(op, args, kwargs)
    except (RuntimeError, NotImplementedError) as error:
        case = case_of(op, args, kwargs, double=False)
        notes.append(f"checked as given: in float64 the operation raises {first_line(error)}")
    report = CallReport(_call_in_words(case), notes=notes)
    known = reference(case)
    reached = known.reached or [differentiable(out) for out in case.outputs]
    if not repeatable(case, reached):
        report.faults.append(
            Fault("", "purity", f"{op.name} gives something else on each call with the same arguments and seed")
        )
        return report
    choices = [seeds(case.outputs, reached)]
    if 1 < sum(reached) <= 4:
        choices += [seeds(case.outputs, [i == j for j in range(len(reached))]) for i, r in enumerate(reached) if r]
    check_manners(case, choices[0], report)
    compare(case, choices, known, report)
    if not report.faults:
        check_in_part(case, choices[0], report)
    if not report.faults:
        check_second(case, choices[0], report)
    return report


def _call_in_words(case: Case) -> str:
    tensors = iter(case.inputs)
    node = case.node

    def told(argument: Any) -> str:
        if isinstance(argument, Value):
            tensor = next(tensors)
            plain = tensor.dtype == torch.float64
            return f"{tuple(tensor.shape)}" if plain else f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}"
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(told(each) for each in argument)}]"
        return repr(argument).removeprefix("torch.")

    names = [*node.op.parameters, *(f"argument {i}" for i in range(len(node.args)))]
    parts = [f"{name} {told(each)}" for name, each in zip(names, node.args, strict=False)]
    parts += [f"{name} {told(each)}" for name, each in node.kwargs.items()]
    return f"{node.op.name}({', '.join(parts)})"
