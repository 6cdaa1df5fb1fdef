"""``te.check``: the gradients of a recorded tensor held against ``torch.autograd`` and finite differences.

The tape is run again twice: as it was recorded, for ``torch.autograd``, and in float64, for finite differences.
Where a gradient is wrong, each node is checked by itself, going back, with the ``g`` that reached it: the first
whose rule fails is to blame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import DTypeError, MissingRuleError, NotRecordedError, RuleError, message
from ..names import call_site, local_name, located, names_of, user_frame
from ..sweep import root_of
from ..tape import Node, Value, bound, describe
from ..walk import Sweep
from .again import Again, Unknown
from .case import SEED, apart
from .compare import compare, worst
from .reports import CallReport, Fault, GradientReport
from .ways import reference, seeds, unit_of

__all__ = ["check"]

BETWEEN = "every rule is right by itself: what differs lies between the nodes, a write that was not seen for example"

Tensor = torch.Tensor

#: Of a larger tensor this many elements are moved one by one, and all of them together in some directions.
ELEMENTS = 16
DIRECTIONS = 2
#: No more than this many replays a check go into elements.
REPLAYS = 1000


def check(C: Tensor, *wrt: Tensor) -> GradientReport:
    """Holds the gradients of `C` against ``torch.autograd`` and finite differences, and names the rule to blame.

    The operations that `C` was computed by are run again, apart from everything: under ``torch.autograd`` in the
    dtypes in which they were recorded, and in float64 with each tensor moved a little, element by element (of more
    than 16 elements: of some, and of all of them along random directions). What is constant to the sweep (under
    ``torch.no_grad()``, `te.stop_gradient`) stays as it was. Random operations draw anew, the same in every run.
    Nothing changes: no ``.g``, no ``.grad``, no tape, no random stream.

    Args:
        C: a recorded tensor, whose tape may have been swept. Of more than one element, the gradients are those of
            a weighted sum of them.
        *wrt: the tensors whose gradients are checked, leaves or intermediates; by default every leaf that `C`
            depends on.

    Returns:
        A report that is true when all agree; ``print`` it. Where they do not, it names the first node, going back
        from `C`, whose rule is wrong, with its line.

    Raises:
        NotRecordedError: if no tape knows `C`, or a leaf of its tape is gone.
        OverwrittenError: if a leaf was changed since.
        DTypeError: if `C` is not floating or complex, or what is given in `wrt` no tensor.
    """
    with apart():
        for each in wrt:
            if not isinstance(each, Tensor):
                raise DTypeError(
                    message(
                        f"te.check takes tensors after the first, not {type(each).__name__}.",
                        where=call_site(user_frame()),
                        fix="te.check(C, w, b)",
                    )
                )
        root, node = root_of(C, "te.check")
        exact = Again(root, node, double=False)
        aims = _aims(exact, wrt)
        if not aims:
            name = local_name(user_frame(), C) or "the tensor"
            raise NotRecordedError(
                message(
                    f"te.check: {name} depends on no floating tensor that is alive, so it has no gradient to check.",
                    where=call_site(user_frame()),
                    operands=[(name, describe(C))],
                    fix="give the tensors: te.check(C, w)",
                )
            )
        report = GradientReport(f"check of {local_name(user_frame(), C) or 'the tensor'} {describe(C)}")
        (seed,) = (
            seeds([exact.held[exact.root]], [True]) if C.numel() != 1 else (torch.ones_like(exact.held[exact.root]),)
        )
        assert seed is not None
        try:
            # the recorded tape itself, or where something random was drawn, what is drawn now
            swept = exact.sweep(seed) if exact.random else Sweep(root, node, seed).run()
        except (RuleError, MissingRuleError) as error:
            report.faults.append(Fault("", "error", f"the sweep stops: {error}"))
            return report
        if exact.random:
            report.notes.append("something random was recorded: the gradients are those of other numbers, drawn now")
        sides = [_collected(swept, [exact.twins[v] for v in vs] if exact.random else vs) for _, vs in aims]
        _against_torch(exact, aims, sides, seed, report)
        _against_differences(root, node, exact, aims, seed, report)
        if report.faults:
            _blame(root, node, exact, report)
        if not wrt:  # what the loss does not reach was not asked for
            for (name, _), mine in zip(aims, sides, strict=True):
                if mine is None:
                    report.agrees.pop(name, None)
        return report


# -- what is compared ----------------------------------------------------------------------------------------------


def _aims(again: Again, wrt: Sequence[Tensor]) -> list[tuple[str, list[Value]]]:
    """A name for each tensor that is checked, with the recorded values that stand for it."""
    titles = names_of(again.source.values())
    by_holder: dict[int, list[Value]] = {}
    for value in again.twins:
        holder = value.holder
        if holder is not None and value.differentiable:
            by_holder.setdefault(id(holder), []).append(value)
    if not wrt:
        found = []
        for values in by_holder.values():
            leaves = [v for v in values if again.twins[v].leaf]
            if leaves:
                found.append((titles.get(id(leaves[0]), leaves[0].name or "leaf"), leaves))
        return found
    aims = []
    for i, tensor in enumerate(wrt):
        now = bound(tensor)
        values = by_holder.get(id(tensor), [])
        leaves = [v for v in values if again.twins[v].leaf]
        chosen = leaves if now is None or now.leaf or now not in values else [now]
        name = local_name(user_frame(), tensor) or (titles.get(id(chosen[0])) if chosen else None)
        aims.append((name or f"tensor {i}", chosen))
    return aims


def _collected(swept: Sweep, values: Sequence[Value]) -> Tensor | None:
    """The sum of a sweep's gradients over the values of one tensor."""
    found = [swept.gradients[value] for value in values if value in swept.gradients]
    return sum(found[1:], found[0]) if found else None


def _tolerance(dtype: torch.dtype, nodes: int) -> float:
    """How far two orders of summing may lie apart, relative to the largest element."""
    return float(max(1e-9, torch.finfo(dtype).eps * 100 * max(nodes, 16) ** 0.5))


def _against_torch(
    exact: Again, aims: list[tuple[str, list[Value]]], sides: list[Tensor | None], seed: Tensor, report: GradientReport
) -> None:
    wanted = [exact.twins[v] for _, values in aims for v in values]
    try:
        found = iter(exact.torch_gradients(wanted, seed))
    except Unknown as error:
        told = str(error).partition("\n")[0]
        report.notes.append(f"torch.autograd does not know the way: {told}; finite differences alone tell")
        return
    for (name, values), mine in zip(aims, sides, strict=True):
        theirs: Tensor | None = None
        for _ in values:
            g = next(found)
            if g is not None:
                theirs = g if theirs is None else theirs + g
        if mine is None and theirs is None:
            report.agrees[name] = "not reached, as torch.autograd says too"
            continue
        like = mine if mine is not None else theirs
        assert like is not None
        got = torch.zeros_like(like) if mine is None else mine
        expected = torch.zeros_like(like) if theirs is None else theirs
        scale = float(expected.abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
        tolerance = _tolerance(got.dtype, len(exact.nodes))
        wrong = ~torch.isclose(got, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        if bool(wrong.any()):
            fault = worst(name, got, expected, wrong, " against torch.autograd", ())
            report.faults.append(_swept(fault))
        else:
            off = float((got - expected).abs().nan_to_num(0, 0, 0).max()) / max(scale, 1e-300) if got.numel() else 0.0
            report.agrees[name] = f"{tuple(got.shape)} agrees with torch.autograd (to {off:.0e})"


def _swept(fault: Fault) -> Fault:
    return Fault(**{**vars(fault), "what": fault.what.replace("the rule gives", "the sweep gives")})


# -- finite differences, in float64 ------------------------------------------------------------------------------


def _against_differences(
    root: Value,
    node: Node | None,
    exact: Again,
    aims: list[tuple[str, list[Value]]],
    seed: Tensor,
    report: GradientReport,
) -> None:
    try:
        double = Again(root, node, double=True)
    except (RuntimeError, NotImplementedError) as error:
        told = str(error).partition("\n")[0]
        report.notes.append(f"the tape does not run in float64, so differences are coarse: {told}")
        double = exact
    (seed,) = [seed.to(double.held[double.root].dtype)]
    swept = double.sweep(seed)
    budget = max(2, REPLAYS // max(1, len(aims) * max(1, len(double.nodes) // 100)))
    for name, values in aims:
        if name in {fault.argument for fault in report.faults}:
            continue
        twins = [double.twins[value] for value in values]
        mine = _collected(swept, twins)
        if not twins:
            report.agrees[name] = "C does not depend on it"
            continue
        fault, told = _along(double, name, twins, mine, seed, budget)
        if fault is None:
            before = report.agrees.get(name)
            report.agrees[name] = f"{before} and {told}" if before else f"agrees with {told}"
        else:
            by_torch = report.agrees.pop(name, None)
            report.faults.append(Fault(**{**vars(fault), "kind": "value" if by_torch is None else "differences"}))


def _along(
    again: Again, name: str, twins: list[Value], mine: Tensor | None, seed: Tensor, budget: int
) -> tuple[Fault | None, str]:
    """One tensor moved, element by element and along random directions."""
    x = again.held[twins[0]]
    got = torch.zeros_like(x) if mine is None else mine
    count = x.numel()
    generator = torch.Generator().manual_seed(SEED + 3)
    limit = min(ELEMENTS, budget)
    chosen = range(count) if count <= limit else sorted(torch.randperm(count, generator=generator)[:limit].tolist())
    eps = again.case(again.nodes[-1]).eps if again.nodes else torch.finfo(x.dtype).eps
    steps = [eps ** (1 / 3) * each for each in (1, 1 / 16, 8)]
    outer = float((seed.abs() * again.held[again.root].abs()).sum())
    scale = float(got.abs().nan_to_num(0, 0, 0).max()) if count else 0.0
    expected = torch.full_like(x, float("nan"))
    wrong = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    crossed = 0
    for flat in chosen:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape)) if x.ndim else ()
        slope = complex(0)
        bad = False
        for unit in (1.0, 1j) if x.is_complex() else (1.0,):
            direction = unit_of(x, index, unit)
            product = float((got.conj() * direction).real.sum())
            found, fits, kinked = _slope(again, twins, direction, seed, steps, product, scale, outer * eps, eps)
            slope += unit * found
            bad |= not fits
            crossed += kinked
        expected[index] = torch.tensor(slope if x.is_complex() else slope.real, dtype=x.dtype)
        wrong[index] = bad
    if bool(wrong.any()):
        return _swept(worst(name, got, expected, wrong, " against finite differences", ())), ""
    for _ in range(DIRECTIONS if count > limit else 0):
        direction = (torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.5).to(x.device, x.dtype)
        product = float((got.conj() * direction).real.sum())
        size = float((got.abs() * direction.abs()).square().sum().sqrt())
        found, fits, kinked = _slope(again, twins, direction, seed, steps, product, size, outer * eps, eps)
        crossed += kinked
        if not fits:
            what = f"wrong along a random direction: finite differences give {found:.6g}, the sweep gives {product:.6g}"
            error = abs(found - product)
            return Fault(name, "value", what, None, found, product, error, error / max(abs(found), 1e-300)), ""
    told = (
        f"finite differences ({len(chosen)} of {count} elements"
        if count > limit
        else "finite differences (all elements"
    )
    told += f", {DIRECTIONS} directions" if count > limit else ""
    return None, told + (f"; {crossed} at a kink)" if crossed else ")")


def _slope(
    again: Again,
    twins: list[Value],
    direction: Tensor,
    seed: Tensor,
    steps: list[float],
    product: float,
    scale: float,
    noise: float,
    eps: float,
) -> tuple[float, bool, bool]:
    """The slope along a direction, whether `product` is it, and whether it is only at a kink.

    Steps that cross a kink lead astray, so the shorter and the longer one are asked too.
    """
    first = float("nan")
    tolerance = max(3e-5, 10 * eps ** (2 / 3))
    for step in steps:
        up = again.slope(dict.fromkeys(twins, step * direction), seed)
        down = again.slope(dict.fromkeys(twins, -step * direction), seed)
        middle = (up - down) / (2 * step)
        first = middle if first != first else first
        floor = tolerance * scale + 50 * noise / step
        if abs(middle - product) <= floor + tolerance * abs(middle):
            return middle, True, False
        after, before = up / step, -down / step
        bend = abs(after - before)
    # a kink right here: the slopes differ on both sides, however short the step
    low, high = min(after, before), max(after, before)
    at_kink = bend > 0.05 * max(abs(after), abs(before)) and low - floor <= product <= high + floor
    not_finite = first != first or abs(first) == float("inf")
    return first, at_kink or not_finite, at_kink or not_finite


# -- whose fault it is ---------------------------------------------------------------------------------------------


def _blame(root: Value, node: Node | None, exact: Again, report: GradientReport) -> None:
    """Checks every node by itself, going back, with the ``g`` that the sweep brings to it."""
    try:
        again = Again(root, node, double=True)
    except (RuntimeError, NotImplementedError):
        again = exact
    (seed,) = seeds([again.held[again.root]], [True])
    assert seed is not None
    swept = again.sweep(seed)
    conventions: list[str] = []
    for each in reversed(again.nodes):
        if each.cut or each.op.grad is None or not each.op.differentiable:
            continue
        g = [swept.gradients.get(value) for value in each.outputs]
        if all(one is None for one in g):
            continue
        case = again.case(each)
        one = CallReport(f"{each.rule} of {each.op.name}, at {located(each) or 'an unknown line'}")
        compare(case, [g], reference(case), one)
        constants = {name for name, v in zip(case.names, each.inputs, strict=True) if not v.differentiable}
        one.faults = [fault for fault in one.faults if fault.argument not in constants]
        one.agrees = {}
        if one.faults:
            report.blamed.append(one)
        conventions += [f"{each.op.name}, at {located(each)}: {note}" for note in one.notes if "kink" in note]
    if report.blamed:
        return
    if conventions:
        # every rule is right by itself: what differs is what a gradient is at a kink
        report.notes += [f"the difference to torch.autograd is one of convention: {note}" for note in conventions[:3]]
        for fault in report.faults:
            report.agrees[fault.argument] = "differs from torch.autograd at a kink alone"
        report.faults = []
        return
    as_torch = [fault for fault in report.faults if fault.kind == "differences"]
    for fault in as_torch:
        report.faults.remove(fault)
        report.agrees[fault.argument] = "agrees with torch.autograd"
        report.notes.append(f"finite differences give something else, every rule being as torch has it: {fault}")
    if report.faults:
        report.notes.append(BETWEEN)
