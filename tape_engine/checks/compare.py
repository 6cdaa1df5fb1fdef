"""A rule's gradients held against finite differences and against ``torch.autograd``.

Central differences decide where the operation is smooth: of a rule that agrees with them the difference to torch
is only told. At a kink the two one-sided differences bound what a gradient may be; there an operation of torch has
to give what torch gives, and a named one what lies between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import RuleError
from .case import SEED, Case, differentiable
from .hints import hints, shape_hints
from .reports import CallReport, Fault
from .ways import Differences, Reference, ours, unit_of

__all__ = ["compare", "worst"]

Tensor = torch.Tensor

#: Of a larger argument this many elements are looked at one by one, and all of them together in some directions.
ELEMENTS = 128
DIRECTIONS = 2


# -- held against each other ---------------------------------------------------------------------------------


@dataclass
class Compared:
    """The elements of one argument that were looked at, for one choice of ``g``."""

    expected: Tensor
    wrong: Tensor
    off: float = 0.0
    kinks: list[tuple[tuple[int, ...], float, float, float]] = field(default_factory=list)
    unknown: int = 0
    as_torch: int = 0


def compare(case: Case, choices: Sequence[Sequence[Tensor | None]], known: Reference, report: CallReport) -> None:
    """Adds to `report` what is right and wrong of the rule for each choice of ``g``."""
    slopes = Differences(case, choices)
    told: set[tuple[str, str]] = {(fault.argument, fault.kind) for fault in report.faults}
    for which, g in enumerate(choices):
        try:
            gradients, faults, returned = ours(case, g)
        except Exception as error:
            report.faults.append(_raised(case, g, error))
            return
        torchs = known.gradients(g)
        found: list[Compared | None] = [None] * len(gradients)
        for place, gradient in enumerate(gradients):
            floats = differentiable(case.inputs[place])
            none = (
                floats
                and not case.node.op.is_named
                and any(known.known)
                and not known.known[place]
                and returned[place] is None
            )
            if none:
                told_none = f"{case.names[place]}: no gradient, as torch has none for it either"
                report.notes += [] if told_none in report.notes else [told_none]
                report.apart.add(case.names[place])
            elif floats:
                found[place] = _against_differences(case, slopes, which, place, gradient, torchs[place])
        for fault in faults:
            if (fault.argument, fault.kind) not in told:
                place = case.names.index(fault.argument)
                there, gave = found[place], returned[place]
                shown = tuple(shape_hints(gave, there.expected)) if there is not None and gave is not None else ()
                report.faults.append(Fault(fault.argument, fault.kind, fault.what, hints=shown))
                told.add((fault.argument, fault.kind))
        expected = [None if each is None else each.expected for each in found]
        for place, (gradient, one) in enumerate(zip(gradients, found, strict=True)):
            name = case.names[place]
            if one is None or gradient is None or (name, "value") in told:
                continue
            if bool(one.wrong.any()):
                given = "" if all(s is not None for s in g) else f", with g of output {_given(g)} alone"
                clues = hints(place, gradient, one.expected, one.wrong, expected, case.inputs, case.names, case.outputs)
                report.faults.append(worst(name, gradient, one.expected, one.wrong, given, tuple(clues)))
                told.add((name, "value"))
                report.agrees.pop(name, None)
                continue
            _note(case, report, place, gradient, one, torchs[place])
            if which == 0:
                report.agrees[name] = _agreement(one, gradient, torchs[place])


def _given(g: Sequence[Tensor | None]) -> str:
    return ", ".join(str(i) for i, s in enumerate(g) if s is not None)


def _raised(case: Case, g: Sequence[Tensor | None], error: Exception) -> Fault:
    """The fault of a rule that raised: that it reads what its code does not show, perhaps."""
    if isinstance(error, RuleError):
        return Fault("", "count", str(error).partition("\n")[0])
    named = getattr(case.node.op.grad, "__name__", "the rule")
    try:
        case.rule(g, whole=True)
    except Exception:  # it raises whatever it is given: the first error tells
        absent = "" if all(s is not None for s in g) else f" where g of output {_given(g)} alone is given"
        return Fault("", "error", f"{named} raised {type(error).__name__}{absent}: {error}")
    what = f"{named} reads the data of an argument in a way that its code does not show"
    clue = "name the argument outright in the rule: only what its code names is kept until the sweep"
    return Fault("", "hidden", f"{what} ({type(error).__name__}: {error})", hints=(clue,))


def worst(name: str, got: Tensor, expected: Tensor, wrong: Tensor, given: str, clues: tuple[str, ...]) -> Fault:
    """The fault of a gradient with wrong elements: it tells the one that is furthest off."""
    error = (got - expected).abs()
    # what is NaN or infinite on one side alone is furthest off
    error = torch.where(wrong & ~error.isfinite(), torch.full_like(error, float("inf")), error)
    error = torch.where(wrong, error, torch.full_like(error, -1.0))
    flat = int(error.reshape(-1).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape)) if got.ndim else ()
    largest = float(error.reshape(-1)[flat])
    scale = expected[wrong].abs()
    ratio = (
        float((error[wrong] / scale)[scale > 0].nan_to_num(float("inf")).max()) if bool((scale > 0).any()) else math.inf
    )
    e, a = expected[index].item(), got[index].item()
    place = "" if not index else f" at {list(index)}"
    relative = f", relative {ratio:.2g}" if math.isfinite(ratio) else ""
    count = f"{int(wrong.sum())} of {int((~expected.isnan() | wrong).sum())}"
    what = (
        f"wrong in {count} elements of {tuple(got.shape)}{given}; "
        f"most{place}: expected {e:.6g}, the rule gives {a:.6g} (off by {largest:.2g}{relative})"
    )
    return Fault(name, "value", what, index, e, a, largest, ratio, clues)


def _note(case: Case, report: CallReport, place: int, got: Tensor, one: Compared, torchs: Tensor | None) -> None:
    name = case.names[place]
    for index, before, after, gives in one.kinks[:1]:
        at = f"{name}{list(index)}" if index else name
        more = f" (and at {len(one.kinks) - 1} more)" if len(one.kinks) > 1 else ""
        told = f"a kink at {at}{more}: slope {before:.6g} before and {after:.6g} after, the rule gives {gives:.6g}"
        if told not in report.notes:
            report.notes.append(told)
    if one.unknown:
        told = f"{name}: the differences at {one.unknown} elements are not finite, and tell nothing"
        if told not in report.notes:
            report.notes.append(told)
    if one.as_torch:
        report.apart.add(name)
        told = f"{name}: torch.autograd agrees with the rule, finite differences do not at {one.as_torch} elements"
        if told not in report.notes:
            report.notes.append(told)
    if (
        torchs is not None
        and not one.kinks
        and not one.as_torch
        and not one.unknown
        and not _near(got, torchs, 1e-6).all()
    ):
        told = f"{name}: torch.autograd gives something else; finite differences agree with the rule"
        if told not in report.notes:
            report.notes.append(told)


def _agreement(one: Compared, got: Tensor, torchs: Tensor | None) -> str:
    count = int((~one.expected.isnan()).sum())
    told = f"{count} of {got.numel()} elements" if count < got.numel() else f"{count} element{'s' * (count != 1)}"
    told = f"agrees with finite differences ({told}, to {one.off:.0e})"
    return told + ("" if torchs is None else " and torch.autograd")


def _near(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Where two gradients agree, relative to the largest; NaN agrees with NaN, and infinity with itself."""
    finite = b.abs()[b.isfinite()] if b.numel() else b.abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.isclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance * max(scale, 1e-4), equal_nan=True)


def _against_differences(
    case: Case, slopes: Differences, which: int, place: int, got: Tensor | None, torchs: Tensor | None
) -> Compared:
    """The elements of an input's gradient held against differences; `got` is missing where its shape was wrong."""
    x = case.inputs[place]
    expected = torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device)
    one = Compared(expected, torch.zeros(x.shape, dtype=torch.bool, device=x.device))
    if x.numel() == 0:
        return one
    for index in _elements(x.shape):
        total = complex(0)
        for unit in (1.0, 1j) if x.is_complex() else (1.0,):
            total += unit * slopes.at(place, index, unit)[which]
        expected[index] = torch.tensor(total if x.is_complex() else total.real, dtype=x.dtype)
    if got is None:
        return one
    tolerance = max(1e-5, 4 * slopes.eps ** (2 / 3))
    finite = expected[expected.isfinite()].abs()
    floor = tolerance * (float(finite.max()) if finite.numel() else 0.0) + 20 * slopes.noise[which]
    looked = ~expected.isnan()
    miss = (got - expected).abs() > floor + tolerance * expected.abs()
    miss |= ~expected.isfinite() | ~got.isfinite()
    tried = torch.zeros_like(looked)
    for index in _elements(x.shape):
        tried[index] = True
    for index in (miss & tried).nonzero().tolist():
        _settle(case, slopes, which, place, tuple(index), got, torchs, one, floor)
    if slopes.eps > 1e-10 and torchs is not None:  # too coarse for differences: torch has the finer eye
        one.wrong |= ~_near(got, torchs, 50 * slopes.eps) & ~_near(
            got.nan_to_num(), torchs.nan_to_num(), 50 * slopes.eps
        )
        one.expected = torch.where(one.wrong, torchs, one.expected)
    good = looked & ~one.wrong & expected.isfinite() & got.isfinite() & ~miss
    if bool(good.any()):
        one.off = float((got - expected).abs()[good].max() / max(float(expected.abs()[good].max()), 1e-6))
    as_torch = torchs is not None and bool(_near(got, torchs, 1e-6).all())
    if x.numel() > ELEMENTS and not as_torch and not bool(one.wrong.any()):
        _along_directions(slopes, which, place, got, one)
    return one


def _elements(shape: torch.Size) -> Iterator[tuple[int, ...]]:
    """The indices that are looked at one by one: all, or `ELEMENTS` of them spread evenly."""
    count = shape.numel()
    chosen = range(count) if count <= ELEMENTS else [i * (count - 1) // (ELEMENTS - 1) for i in range(ELEMENTS)]
    for flat in chosen:
        index = []
        for size in reversed(shape):
            flat, left = divmod(flat, size)
            index.append(left)
        yield tuple(reversed(index))


def _settle(
    case: Case,
    slopes: Differences,
    which: int,
    place: int,
    index: tuple[int, ...],
    got: Tensor,
    torchs: Tensor | None,
    one: Compared,
    floor: float,
) -> None:
    """Tells a wrong element from a kink, and from where differences tell nothing."""
    x = case.inputs[place]
    as_torch = None if torchs is None else bool(_near(got, torchs, 1e-6)[index])
    for unit in (1.0, 1j) if x.is_complex() else (1.0,):
        direction = unit_of(x, index, unit)
        value = complex(got[index].item())
        gives = value.imag if unit == 1j else value.real
        wide = [each[which] for each in slopes.sides(place, direction, slopes.step)]
        close = [each[which] for each in slopes.sides(place, direction, slopes.step / 16)]
        loose = 100 * floor + 1e-3 * abs(gives) + 1e-9
        slope = [c for c in close if c == c and abs(c) != float("inf")]
        if len(slope) < 2:  # the edge of the domain
            one_sided = math.isfinite(gives) and any(abs(c - gives) <= loose for c in slope)
            if as_torch or one_sided:
                one.unknown += not one_sided
            elif as_torch is False:
                one.wrong[index], one.expected[index] = True, torchs[index]  # type: ignore[index]
            elif slope:
                one.wrong[index] = True
                one.expected[index] = slope[0]
            else:
                one.unknown += 1
            continue
        gap, gap_close = abs(wide[0] - wide[1]), abs(close[0] - close[1])
        smooth = gap_close <= 0.3 * gap + 40 * floor
        if smooth:
            middle = (close[0] + close[1]) / 2
            # where it bends quickly the shorter step is the better one
            if abs(gives - middle) > 20 * floor + 1e-5 * abs(middle) + abs(middle - (wide[0] + wide[1]) / 2):
                if as_torch:  # of a symmetric argument, say, of which only one half is read
                    one.as_torch += 1
                else:
                    one.wrong[index] = True
            continue
        jumps = max(map(abs, close)) > 6 * max(map(abs, wide))
        low, high = min(close), max(close)
        if jumps:
            low = high = min(close, key=abs)
        conventional = low - loose <= gives <= high + loose
        if as_torch or (conventional and (case.node.op.is_named or as_torch is None)):
            one.kinks.append((index, close[1], close[0], gives))
        else:
            one.wrong[index] = True
            one.expected[index] = torchs[index] if torchs is not None else (low + high) / 2


def _along_directions(slopes: Differences, which: int, place: int, got: Tensor, one: Compared) -> None:
    """All elements of a large argument together; where that is off, halving finds one that is wrong."""
    x = slopes.case.inputs[place]
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(DIRECTIONS):
        weights = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) + 0.5
        flat = torch.arange(x.numel(), device=x.device)
        if not _off_along(slopes, which, place, got, weights, flat):
            continue
        while len(flat) > 1:
            left, right = flat[: len(flat) // 2], flat[len(flat) // 2 :]
            flat = left if _off_along(slopes, which, place, got, weights, left) else right
        index = tuple(int(i) for i in torch.unravel_index(flat[0].cpu(), x.shape))
        if not _off_along(slopes, which, place, got, weights, flat):
            continue  # scattered below what one element shows: rounding, or kinks that were crossed
        one.wrong[index] = True
        one.expected[index] = slopes.at(place, index, 1.0)[which]
        return


def _off_along(slopes: Differences, which: int, place: int, got: Tensor, weights: Tensor, flat: Tensor) -> bool:
    direction = torch.zeros_like(weights).reshape(-1)
    direction[flat] = weights.reshape(-1)[flat]
    direction = direction.reshape(weights.shape)
    product = float((got.conj() * direction).real.sum())
    size = float((got.abs() * direction.abs()).square().sum().sqrt())
    best = min(abs(product - slopes.along(place, direction, h)[which]) for h in (slopes.step, slopes.step / 16))
    return not best <= 1e-4 * size + 300 * slopes.noise[which]
