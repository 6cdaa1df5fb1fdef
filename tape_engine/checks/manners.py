"""What is asked of a rule besides the right numbers: that it is a pure function, linear in ``g``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .case import SEED, Case, copied, differentiable, precision, sow
from .reports import CallReport, Fault
from .ways import ours

__all__ = ["check_in_part", "check_manners", "repeatable"]

Tensor = torch.Tensor


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or type(a) is type(b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _alike(a: Any, b: Any) -> bool:
    """The same up to rounding, which hangs on where in memory a tensor lies."""
    if not differentiable(a) or not differentiable(b) or a.shape != b.shape:
        return _same(a, b)
    eps = precision([a, b]) ** 0.75
    return torch.allclose(a, b.to(a.dtype), rtol=eps, atol=eps, equal_nan=True)


def repeatable(case: Case, reached: Sequence[bool]) -> bool:
    """Whether the forward gives the same again, from the same seed, in the outputs that are reached."""
    again = case.forward(case.inputs)
    same = len(again) == len(case.outputs)
    return same and all(_alike(a, b) for a, b, r in zip(again, case.outputs, reached, strict=True) if r)


def check_manners(case: Case, g: Sequence[Tensor | None], report: CallReport) -> None:
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
        first = [copied(each) for each in case.in_order(case.rule(g))]
    except Exception:  # `compare` tells of it
        return
    for (name, tensor), old, count in zip(watched, before, counts, strict=True):
        if tensor._version != count or not _same(tensor, old):
            tensor.copy_(old)
            what = f"{named} writes to {name}; a rule must leave what it is given as it was"
            report.faults.append(
                Fault(name if name in case.names else "", "write", what, hints=("write to a .clone()",))
            )
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
        same = all(map(_alike, first, again))
    except Exception:
        same = False
    doubled = [None if each is None else 2 * each for each in g]
    fixed = same and any(isinstance(f, Tensor) and bool((f.abs() > 1e-6).any()) for f in first)
    if fixed and all(map(_alike, first, case.in_order(case.rule(doubled)))):
        what = f"{named} gives the same whatever g is; a rule multiplies g by its own factor"
        report.faults.append(Fault("", "linear", what, hints=("write g * ... in front of each gradient",)))
    if not same:
        what = f"{named} gives something else when it is called again with the same arguments"
        clue = "compute what it needs from g, the output and the arguments: it must not remember a call or draw numbers"
        report.faults.append(Fault("", "purity", what, hints=(clue,)))


def check_in_part(case: Case, g: Sequence[Tensor | None], report: CallReport) -> None:
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
