"""The second derivative of a rule: a recorded sweep, swept again, against differences of what the rule gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import RuleError, TapeError
from ..exits import close_exits, open_exits
from ..gradients import refill
from ..recorder import recording
from ..sweep import grad
from ..tape import Tape, pop_tape, push_tape
from .case import SEED, Case, differentiable, first_line, sow, tensors_in
from .reports import CallReport, Fault
from .ways import ours, seeds

__all__ = ["check_second"]

Tensor = torch.Tensor


def check_second(case: Case, g: Sequence[Tensor | None], report: CallReport) -> None:
    """The slope of the rule's gradients against the recorded sweep of the recorded sweep."""
    places = [i for i, t in enumerate(case.inputs) if differentiable(t)]
    first = ours(case, g)[0]
    weights = seeds([first[i] for i in places], [True] * len(places))  # type: ignore[misc]
    try:
        second = _recorded_twice(case, places, g, weights)
    except (TapeError, NotImplementedError, RuntimeError) as error:
        report.second = f"not available: {first_line(error)}"
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
                told = f"{slopes[0]:.6g} is expected, the sweep of the sweep gives {mine:.6g}"
                what = f"the second derivative is wrong: along a direction {told}"
                clue = "does the rule detach something, leave torch, or read a number off a tensor?"
                off = abs(mine - slopes[0])
                ratio = off / max(abs(slopes[0]), 1e-300)
                fault = Fault(case.names[place], "second", what, None, slopes[0], mine, off, ratio, (clue,))
                report.faults.append(fault)
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
    args = [refill(each, contents) for each in node.args]
    kwargs = {name: refill(each, contents) for name, each in node.kwargs.items()}
    tape = Tape(strong=True)
    push_tape(tape)
    open_exits()  # so that a rule's own detach() is heard
    try:
        with torch.enable_grad(), recording(tape):
            sow(SEED)
            result = node.op(*args, **kwargs) if node.op.is_named else node.op.forward(*args, **kwargs)
            outs = tensors_in(result)
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


def _dotted(pairs: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    """The sum of the real parts of products."""
    parts = [(w.conj() * t).sum() for w, t in pairs if w is not None]
    total: Any = sum(each.real if each.is_complex() else each for each in parts)
    return total  # type: ignore[no-any-return]
