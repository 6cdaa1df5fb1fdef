"""``te.check_rule``: a gradient rule held against finite differences and ``torch.autograd``, call by call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import DTypeError, MissingRuleError, RuleError, TapeError, message
from ..exits import close_exits, open_exits
from ..names import call_site, user_frame
from ..recorder import recording, rule_to_add
from ..registry import Op, Spec, records
from ..sweep import grad
from ..tape import Tape, Value, describe, pop_tape, push_tape
from .case import SEED, Case, apart, case_of, differentiable, sow
from .compare import compare, ours, reference, seeds
from .reports import CallReport, Fault, RuleReport

__all__ = ["check_rule"]

Tensor = torch.Tensor


def check_rule(op: Any, *args: Any, **kwargs: Any) -> RuleReport:
    """Checks the gradient rule of `op`, and says which argument is wrong, where, and by how much.

    The rule is held against central finite differences in float64, element by element (of more than 128 elements:
    of those, and of all of them along random directions), and against ``torch.autograd`` where that knows the
    operation. At a kink the one-sided differences bound what the gradient may be. It is also looked at whether the
    rule writes to what it is given, gives the same twice, takes ``None`` for an output that the loss does not reach,
    reads data that its code does not show, and what its second derivative is, through a recorded sweep.

    Args:
        op: a named operation, an ATen overload, or a torch function.
        *args, **kwargs: the operation's arguments. Floating tensors are copied in float64 and complex ones in
            complex128; nothing of the caller's changes, torch's random generators neither. Without arguments
            the operation's registered samples are taken.

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


def _samples(ops: Sequence[Op]) -> list[tuple[Op, Sequence[Any], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(SEED)
    calls = [
        (op, [_drawn(each, generator) for each in s.args], {k: _drawn(v, generator) for k, v in s.kwargs.items()})
        for op in ops
        for s in op.samples
    ]
    bound = [(op, *op.bind(tuple(args), kwargs)) for op, args, kwargs in calls]
    kept = [call for call in bound if any(differentiable(t) for t in _tensors(call[1], call[2]))]
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


def _given(
    target: Any, ops: Sequence[Op], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[Op, Sequence[Any], dict[str, Any]]]:
    """The call that was asked for, under the overload that torch takes for it."""
    if not any(differentiable(t) for t in _tensors(args, kwargs)):
        raise DTypeError(
            message(
                f"te.check_rule: none of the arguments of {ops[0].name} is a floating or complex tensor, "
                "so there is no gradient to check.",
                where=call_site(user_frame()),
                operands=[(f"argument {i}", describe(t)) for i, t in enumerate(_tensors(args, kwargs))],
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
            target(*_cloned(args), **{name: _cloned(each) for name, each in kwargs.items()})
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


def _cloned(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.detach().clone()
    return type(argument)(_cloned(a) for a in argument) if type(argument) in (list, tuple) else argument


def _contents(argument: Any) -> Any:
    """A recorded argument with the tensors back in the place of values."""
    if isinstance(argument, Value):
        return argument.holder
    return type(argument)(_contents(a) for a in argument) if type(argument) in (list, tuple) else argument


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for each in (*args, *kwargs.values()):
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            found += _tensors(each, {})
    return found


# -- one call --------------------------------------------------------------------------------------------------


def _check_call(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> CallReport:
    notes = []
    try:
        case = case_of(op, args, kwargs)
    except (RuntimeError, NotImplementedError) as error:
        case = case_of(op, args, kwargs, double=False)
        notes.append(f"checked as given: in float64 the operation raises {_first_line(error)}")
    report = CallReport(_call_in_words(case), notes=notes)
    known = reference(case)
    reached = known.reached or [differentiable(out) for out in case.outputs]
    if not _repeatable(case, reached):
        report.faults.append(
            Fault("", "purity", f"{op.name} gives something else on each call with the same arguments and seed")
        )
        return report
    choices = [seeds(case.outputs, reached)]
    if 1 < sum(reached) <= 4:
        choices += [seeds(case.outputs, [i == j for j in range(len(reached))]) for i, r in enumerate(reached) if r]
    _check_manners(case, choices[0], report)
    compare(case, choices, known, report)
    if not report.faults:
        _check_in_part(case, choices[0], report)
    if not report.faults:
        _check_second(case, choices[0], report)
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or type(a) is type(b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _repeatable(case: Case, reached: Sequence[bool]) -> bool:
    again = case.forward(case.inputs)
    same = len(again) == len(case.outputs)
    return same and all(_same(a, b) for a, b, r in zip(again, case.outputs, reached, strict=True) if r)


def _check_manners(case: Case, g: Sequence[Tensor | None], report: CallReport) -> None:
    """Whether the rule writes to what it is given, and gives the same when it is asked again."""
    watched = [
        *zip(case.names, case.inputs, strict=True),
        *[("the output" if len(case.outputs) == 1 else f"output {i}", t) for i, t in enumerate(case.outputs)],
        *[("g" if len(g) == 1 else f"g of output {i}", t) for i, t in enumerate(g) if t is not None],
    ]
    before = [tensor.clone() for _, tensor in watched]
    counts = [tensor._version for _, tensor in watched]
    named = getattr(case.node.op.grad, "__name__", "the rule")
    try:
        first = [_cloned(each) for each in case.in_order(case.rule(g))]
    except Exception:  # `compare` tells of it
        return
    for (name, tensor), old, count in zip(watched, before, counts, strict=True):
        if tensor._version != count or not _same(tensor, old):
            tensor.copy_(old)
            what = f"{named} writes to {name}; a rule must leave what it is given as it was"
            report.faults.append(Fault(name if name in case.names else "", "write", what, hints=("write to a .clone()",)))
    if report.faults:
        return
    with_others = [t + 0.125 if differentiable(t) else t for t in case.inputs]
    try:
        case.forward(with_others)  # what the forward leaves behind must not reach the rule
    except Exception:  # outside of the domain, perhaps
        case.forward(case.inputs)
    sow(SEED + 1)
    try:
        again = case.in_order(case.rule(g))
        same = all(map(_same, first, again))
    except Exception:
        same = False
    doubled = [None if each is None else 2 * each for each in g]
    fixed = same and any(isinstance(f, Tensor) and bool(f.any()) for f in first)
    if fixed and all(map(_same, first, case.in_order(case.rule(doubled)))):
        what = f"{named} gives the same whatever g is; a rule multiplies g by its own factor"
        report.faults.append(Fault("", "linear", what, hints=("write g * ... in front of each gradient",)))
    if not same:
        what = f"{named} gives something else when it is called again with the same arguments"
        clue = "compute what it needs from g, the output and the arguments: it must not remember a call or draw numbers"
        report.faults.append(Fault("", "purity", what, hints=(clue,)))


def _check_in_part(case: Case, g: Sequence[Tensor | None], report: CallReport) -> None:
    """Whether the rule gives the same for each argument alone: the sweep leaves out what nobody asked for."""
    whole = ours(case, g)[0]
    count = len(case.inputs)
    for place in range(count if count > 1 else 0):
        if not differentiable(case.inputs[place]):
            continue
        needs = tuple(i == place for i in range(count))
        try:
            part = case.in_order(case.rule(g, needs=needs))[place]
            part = torch.zeros_like(case.inputs[place]) if part is None else case.fitted(part, place)
            same = whole[place] is not None and torch.allclose(part, whole[place], equal_nan=True)  # type: ignore[arg-type]
        except Exception:
            same = False
        if not same:
            what = "the rule gives something else where it is asked for this gradient alone"
            clue = "make its return one tuple of expressions that do not depend on each other's side effects"
            report.faults.append(Fault(case.names[place], "part", what, hints=(clue,)))


# -- the second derivative ---------------------------------------------------------------------------------------


def _check_second(case: Case, g: Sequence[Tensor | None], report: CallReport) -> None:
    """The slope of the rule's gradients against the recorded sweep of the recorded sweep."""
    places = [i for i, t in enumerate(case.inputs) if differentiable(t)]
    first = ours(case, g)[0]
    weights = seeds([first[i] for i in places], [True] * len(places))  # type: ignore[misc]
    try:
        second = _recorded_twice(case, places, g, weights)
    except (TapeError, NotImplementedError, RuntimeError) as error:
        report.second = f"not available: {_first_line(error)}"
        return
    generator = torch.Generator().manual_seed(SEED + 2)
    coarse = max(1e-5, 10 * case.eps ** (2 / 3))
    unsettled = False
    for place, found in zip(places, second, strict=True):
        x = case.inputs[place]
        if x.numel() == 0 or case.names[place] in report.apart:
            continue
        direction = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) + 0.5
        if x.is_complex():
            direction = direction * (1 + 0.5j)
        step = case.eps ** (1 / 3)
        slopes = [_slope(case, places, g, weights, place, direction, step, -step)]
        slopes += [_slope(case, places, g, weights, place, direction, step / 8, -step / 8)]
        mine = float((found.conj() * direction).real.sum()) if found is not None else 0.0
        scale = max(abs(slopes[0]), sum(float(f.abs().sum()) for f in first if f is not None) * 1e-3)
        if all(math.isfinite(s) for s in slopes) and abs(slopes[0] - slopes[1]) <= 100 * coarse * scale:
            if min(abs(mine - s) for s in slopes) > 30 * coarse * scale:
                sides = [_slope(case, places, g, weights, place, direction, by, 0.0) for by in (step / 8, -step / 8)]
                if abs(sides[0] - sides[1]) > 0.01 * max(map(abs, sides)):  # a kink of the gradient itself
                    unsettled = True
                    continue
                what = f"the second derivative is wrong: along a direction {slopes[0]:.6g} is expected, the sweep of the sweep gives {mine:.6g}"
                clue = "does the rule detach something, leave torch, or read a number off a tensor?"
                shown = (clue,)
                error = abs(mine - slopes[0])
                report.faults.append(
                    Fault(case.names[place], "second", what, None, slopes[0], mine, error, error / max(abs(slopes[0]), 1e-300), shown)
                )
        else:
            unsettled = True
    wrong = any(fault.kind == "second" for fault in report.faults)
    report.second = "differs" if wrong else "not compared: the gradient is not smooth here" if unsettled else "agrees"


def _slope(
    case: Case, places: list[int], g: Any, weights: Any, place: int, direction: Tensor, here: float, there: float
) -> float:
    """How the weighted sum of the rule's gradients changes along a direction, between two places on it."""

    def total(by: float) -> list[Tensor | None]:
        moved = list(case.inputs)
        moved[place] = moved[place] + by * direction
        return ours(Case(case.node, moved, case.forward(moved)), g)[0]

    try:
        up, down = total(here), total(there)
    except RuntimeError:  # outside of what the operation takes
        return math.nan
    found = 0.0
    for weight, i in zip(weights, places, strict=True):
        a, b = up[i], down[i]
        if a is not None and b is not None:
            found += float((weight.conj() * (a - b)).real.sum()) / (here - there)
    return found


def _recorded_twice(
    case: Case, places: list[int], g: Sequence[Tensor | None], weights: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradient of the weighted sum of gradients, by a sweep of a recorded sweep."""
    node = case.node
    leaves = [t.detach().clone() for t in case.inputs]
    contents = iter(leaves)
    args = [_refilled(each, contents) for each in node.args]
    kwargs = {name: _refilled(each, contents) for name, each in node.kwargs.items()}
    tape = Tape(strong=True)
    push_tape(tape)
    open_exits()  # so that a rule's own detach() is heard
    try:
        with torch.enable_grad(), recording(tape):
            sow(SEED)
            result = node.op(*args, **kwargs) if node.op.is_named else node.op.forward(*args, **kwargs)
            outs = _tensors([result] if isinstance(result, Tensor) else result, {})
            asked = [leaves[i] for i in places]
            loss = _dotted(list(zip(g, outs, strict=True)))
            first = grad(loss, asked, record=True)
            parts = [(w, f) for w, f in zip(weights, first, strict=True) if f is not None]
            if not parts:
                return tuple(None for _ in places)
            try:
                return grad(_dotted(parts), asked)
            except TapeError as error:
                if _constant(error):
                    return tuple(None for _ in places)
                raise
    finally:
        close_exits()
        pop_tape(tape)


def _constant(error: TapeError) -> bool:
    return "is a constant" in str(error) and not isinstance(error, RuleError)


def _refilled(argument: Any, contents: Iterator[Tensor]) -> Any:
    if isinstance(argument, Value):
        return next(contents)
    return type(argument)([_refilled(a, contents) for a in argument]) if type(argument) in (list, tuple) else argument


def _dotted(pairs: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    """The sum of the real parts of products."""
    parts = [(w.conj() * t).sum() for w, t in pairs if w is not None]
    total: Any = sum(each.real if each.is_complex() else each for each in parts)
    return total  # type: ignore[no-any-return]
