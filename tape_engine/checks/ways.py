"""The ways to a case's gradients: the rule, ``torch.autograd``, finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import RuleError
from .case import SEED, Case, differentiable, precision
from .reports import Fault

__all__ = ["Differences", "Reference", "ours", "reference", "seeds", "unit_of"]

Tensor = torch.Tensor


def seeds(outputs: Sequence[Tensor], reached: Sequence[bool]) -> list[Tensor | None]:
    """A gradient for each output that is reached: numbers from 0.2 to 1.5, no two alike."""
    generator = torch.Generator().manual_seed(SEED)
    found: list[Tensor | None] = []
    for out, reach in zip(outputs, reached, strict=True):
        drawn = 0.2 + 1.3 * torch.rand(out.shape, generator=generator, dtype=torch.float64)
        if out.is_complex():
            drawn = torch.complex(drawn, 0.2 + 1.3 * torch.rand(out.shape, generator=generator, dtype=torch.float64))
        found.append(drawn.to(out.device, out.dtype) if reach and differentiable(out) else None)
    return found


@dataclass
class Reference:
    """What torch knows of a case.

    Attributes:
        known: the inputs of which torch has a gradient.
        reached: the outputs from which torch lets one come; ``None`` where it knows nothing.
    """

    case: Case
    known: list[bool]
    reached: list[bool] | None

    def gradients(self, g: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Torch's gradient of each input that is known; zeros where it sees no dependence."""
        case = self.case
        if not any(self.known):
            return [None] * len(case.inputs)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() if k else t for t, k in zip(case.inputs, self.known, strict=True)]
            outs = case.forward(leaves)
            pairs = [(o, s) for o, s in zip(outs, g, strict=True) if s is not None and _has_gradient(o)]
            asked = [t for t, k in zip(leaves, self.known, strict=True) if k]
            if not pairs:
                return [torch.zeros_like(t) if k else None for t, k in zip(case.inputs, self.known, strict=True)]
            made = torch.autograd.grad([o for o, _ in pairs], asked, [s for _, s in pairs], allow_unused=True)
        found = iter(made)
        return [_or_zeros(next(found), t) if k else None for t, k in zip(case.inputs, self.known, strict=True)]


def _or_zeros(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if g is None else g


def _has_gradient(out: Tensor) -> bool:
    """Whether torch lets a gradient come to this output, and knows what to do with it."""
    return differentiable(out) and out.requires_grad and "NotImplemented" not in type(out.grad_fn).__name__


def reference(case: Case) -> Reference:
    """What torch knows of a case, tried with all inputs together, then with each alone."""
    wanted = [differentiable(t) for t in case.inputs]
    reached = _tried(case, wanted)
    if reached is not None:
        return Reference(case, wanted, reached)
    alone = [[i == j for j in range(len(wanted))] if w else None for i, w in enumerate(wanted)]
    tries = [None if one is None else _tried(case, one) for one in alone]
    known = [each is not None for each in tries]
    reached = next((each for each in tries if each is not None), None)
    if sum(known) > 1 and _tried(case, known) is None:
        known = [i == known.index(True) for i in range(len(known))]
    return Reference(case, known, reached)


def _tried(case: Case, wanted: list[bool]) -> list[bool] | None:
    """The outputs that torch reaches when these inputs require a gradient; ``None`` where it cannot."""
    if not any(wanted):
        return None
    try:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() if w else t for t, w in zip(case.inputs, wanted, strict=True)]
            outs = case.forward(leaves)
            reached = [_has_gradient(o) for o in outs]
            made = [o for o, r in zip(outs, reached, strict=True) if r]
            if not made:
                return None
            asked = [t for t, w in zip(leaves, wanted, strict=True) if w]
            torch.autograd.grad(made, asked, [torch.ones_like(o) for o in made], allow_unused=True)
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    return reached


def ours(case: Case, g: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Fault], list[Tensor | None]]:
    """What the rule gives each input, fitted as the sweep does; what is wrong about it; and what it returned.

    Raises:
        RuleError: for a rule that raises, or returns another number of gradients.
    """
    returned = case.in_order(case.rule(g))
    found: list[Tensor | None] = []
    faults: list[Fault] = []
    for place, (contribution, given) in enumerate(zip(returned, case.inputs, strict=True)):
        if contribution is None or not differentiable(given):
            found.append(torch.zeros_like(given) if differentiable(given) else None)
            continue
        try:
            found.append(case.fitted(contribution, place))
        except RuleError as error:
            found.append(None)
            faults.append(Fault(case.names[place], "shape", str(error).partition("\n")[0]))
            continue
        exact = precision([*case.inputs, *g]) < 1e-15
        if exact and contribution.dtype not in (torch.float64, torch.complex128):
            told = str(contribution.dtype).removeprefix("torch.")
            what = f"the rule computes in {told} what is given in float64, and loses half of the digits or more"
            faults.append(Fault(case.names[place], "precision", what))
    return found, faults, returned


class Differences:
    """Finite differences of a case's forward, weighted by several choices of ``g`` at once."""

    def __init__(self, case: Case, choices: Sequence[Sequence[Tensor | None]]) -> None:
        self.case = case
        self.choices = choices
        self.base = case.outputs
        self.eps = case.eps
        self.step = self.eps ** (1 / 3)
        self._known: dict[tuple[int, tuple[int, ...], complex], list[float]] = {}
        self.noise = [self.eps * max(1.0, self._weight(g)) / self.step for g in choices]

    def _weight(self, g: Sequence[Tensor | None]) -> float:
        pairs = [(s, o) for s, o in zip(g, self.base, strict=True) if s is not None]
        return sum(float((s.abs() * o.abs()).nan_to_num(0, 0, 0).sum()) for s, o in pairs)

    def moved(self, place: int, direction: Tensor, by: float) -> list[Tensor]:
        moved = list(self.case.inputs)
        moved[place] = moved[place] + by * direction
        try:
            return self.case.forward(moved)
        except RuntimeError:  # outside of what the operation takes
            return [torch.full_like(out, math.nan) if differentiable(out) else out for out in self.base]

    def _contracted(self, a: Sequence[Tensor], b: Sequence[Tensor], by: float) -> list[float]:
        found = []
        for g in self.choices:
            total = 0.0
            for s, left, right in zip(g, a, b, strict=True):
                if s is not None:
                    if left.shape != right.shape:
                        return [float("nan")] * len(self.choices)
                    total += float((s.conj() * (left - right)).real.sum()) / by
            found.append(total)
        return found

    def along(self, place: int, direction: Tensor, step: float) -> list[float]:
        """The slope along `direction` for each choice of ``g``."""
        up, down = self.moved(place, direction, step), self.moved(place, direction, -step)
        return self._contracted(up, down, 2 * step)

    def at(self, place: int, index: tuple[int, ...], unit: complex) -> list[float]:
        """The slope for one element, real or imaginary part, for each choice of ``g``."""
        found = self._known.get((place, index, unit))
        if found is None:
            found = self.along(place, unit_of(self.case.inputs[place], index, unit), self.step)
            self._known[place, index, unit] = found
        return found

    def sides(self, place: int, direction: Tensor, step: float) -> tuple[list[float], list[float]]:
        """The slopes after and before the point, for each choice of ``g``."""
        after = self._contracted(self.moved(place, direction, step), self.base, step)
        before = self._contracted(self.base, self.moved(place, direction, -step), step)
        return after, before


def unit_of(x: Tensor, index: tuple[int, ...], unit: complex) -> Tensor:
    """The direction of one element, real or imaginary."""
    direction = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    direction[index] = torch.tensor(unit if x.is_complex() else unit.real, dtype=x.dtype)
    return direction
