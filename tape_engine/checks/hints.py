"""What a wrong gradient looks like: a factor, a sign, a transpose, a neighbour's gradient, a sum left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

__all__ = ["hints", "shape_hints"]

Tensor = torch.Tensor

TOLERANCE = 1e-4


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients are the same where both are known (NaN marks what was not compared)."""
    if a.shape != b.shape:
        return False
    known = ~(a.isnan() | b.isnan())
    a, b = a[known], b[known]
    return a.numel() > 0 and bool((a - b).abs().max() <= TOLERANCE * max(float(b.abs().max()), 1e-12))


def hints(
    place: int,
    got: Tensor,
    expected: Tensor,
    wrong: Tensor,
    others: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    names: Sequence[str],
    out: Sequence[Tensor],
) -> Iterator[str]:
    """What is recognised about the gradient `got` of the argument at `place`.

    Args:
        place: which of the inputs it belongs to.
        got: what the rule gives, of the input's shape.
        expected: what it should be; NaN where that is not known.
        wrong: where the two differ.
        others: what is expected for each of the inputs, ``None`` where that is not known.
        inputs: the contents of the inputs.
        names: what they are called.
        out: the contents of the outputs.
    """
    known = ~expected.isnan()
    if not bool(got[known].any()):
        yield "the rule gives no gradient here, and there is one"
        return
    if not bool(expected[known].any()):
        yield "there is no gradient here, and the rule gives one"
        return
    factor = _factor(got, expected, known)
    if factor is not None:
        yield from _factor_told(factor, inputs, names, out)
        return
    for i, other in enumerate(others):
        if i != place and other is not None and alike(got, other):
            yield f"this is the gradient of {names[i]}: are the two in the wrong order?"
            return
    for order in itertools.permutations(range(got.ndim)) if 2 <= got.ndim <= 4 else ():
        if order != tuple(range(got.ndim)) and alike(got.permute(order), expected):
            yield "it is transposed" if got.ndim == 2 else f"its dimensions are in another order: permute{order}"
            return
    for dim in range(got.ndim):
        if alike(got.flip(dim), expected):
            yield f"its elements run the other way along dimension {dim}"
            return
    if got.is_complex() and alike(got.abs(), expected.abs()):
        yield "only the phase is wrong: a holomorphic rule multiplies g by the conjugate of the derivative"
        return
    yield from _region(wrong, inputs[place], known)


def _factor(got: Tensor, expected: Tensor, known: Tensor) -> complex | None:
    """The number by which `got` is `expected` everywhere, if there is one."""
    e, a = expected[known], got[known]
    if not bool(torch.isfinite(torch.view_as_real(a) if a.is_complex() else a).all()) or e.numel() < 1:
        return None
    factor = complex((e.conj() * a).sum() / (e.conj() * e).sum())
    if not bool(((a - factor * e).abs() <= TOLERANCE * a.abs().max()).all()):
        return None
    # of a single element every wrong gradient is a multiple: then only a telling factor is told
    return factor if e.numel() > 1 or abs(factor - round(factor.real)) < TOLERANCE * abs(factor) else None


def _factor_told(
    factor: complex, inputs: Sequence[Tensor], names: Sequence[str], out: Sequence[Tensor]
) -> Iterator[str]:
    if abs(factor.imag) > TOLERANCE * abs(factor):
        yield f"the rule gives {factor:.6g} times what it should everywhere"
        return
    real = factor.real
    if abs(real + 1) < TOLERANCE:
        yield "the sign is wrong everywhere"
        return
    yield f"the rule gives {real:.6g} times what it should everywhere"
    for name, tensor in [*zip(names, inputs, strict=True), *(("the output", each) for each in out)]:
        counts = [(tensor.numel(), "elements of")]
        counts += [(n, f"elements along dimension {i} of") for i, n in enumerate(tensor.shape)]
        for count, of in counts:
            if count > 2 and abs(abs(real) / count - 1) < TOLERANCE:
                yield f"{count} is the number of {of} {name}: is the division of a mean missing?"
                return
            if count > 2 and abs(abs(real) * count - 1) < TOLERANCE:
                yield f"1/{count} is one over the number of {of} {name}: is it divided where the forward sums?"
                return


def _region(wrong: Tensor, x: Tensor, known: Tensor) -> Iterator[str]:
    """Where the wrong elements lie, if the sign of the argument tells."""
    if x.is_complex() or not bool(wrong.any()) or bool(wrong[known].all()):
        return
    for words, where in (("negative", x < 0), ("positive", x > 0), ("zero", x == 0), ("not zero", x != 0)):
        if bool(where[known].any()) and torch.equal(wrong[known], where[known]):
            yield f"wrong exactly where the argument is {words}"
            return


def shape_hints(contribution: Tensor, expected: Tensor | None) -> Iterator[str]:
    """What would give a gradient of another shape the right one."""
    if expected is None or expected.isnan().all():
        return
    shape = expected.shape
    if contribution.ndim == 2 and contribution.mT.shape == shape and alike(contribution.mT, expected):
        yield "its transpose is right"
        return
    for count in range(1, contribution.ndim + 1):
        for dims in itertools.combinations(range(contribution.ndim), count):
            summed = contribution.sum(dims)
            if summed.shape == shape and alike(summed, expected):
                yield f"a sum is missing: .sum({dims[0] if count == 1 else dims}) of it is right"
                return
            kept = contribution.sum(dims, keepdim=True)
            if kept.shape == shape and alike(kept, expected):
                yield f"a sum is missing: .sum({dims[0] if count == 1 else dims}, keepdim=True) of it is right"
                return
    if contribution.numel() == expected.numel() and alike(contribution.reshape(shape), expected):
        yield f"its elements are right: .reshape{tuple(shape)}"
