"""PyTorch's own operator samples (OpInfo), run through the engine and compared with ``torch.autograd``.

`cases` are the OpInfos with float64 gradients on the CPU. `check_first` and `check_second` take one sample
each, its tensors laid out in memory in one of `LAYOUTS`, and raise where the engine differs; `survey` runs
one of them over the samples of every case and sums up, operation by operation, what came of it.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

import tape_engine as te
from tape_engine.errors import MissingRuleError, TapeWarning
from tests.tape_engine.rule_calls import each_tensor, mapped

Tensor = torch.Tensor
DTYPE = torch.float64

#: How many samples of each operation the suite takes; "all" takes every one, in about ten times the time.
MOST = os.environ.get("TAPE_ENGINE_OPINFO_SAMPLES", "4")


@cache
def cases() -> list[Any]:
    """The OpInfos that have gradients in float64 on the CPU, as OpInfo itself declares them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, at import
        from torch.testing._internal.common_methods_invocations import op_db
    return [each for each in op_db if each.supports_autograd and each.supports_dtype(DTYPE, "cpu")]


def title(op: Any) -> str:
    """An OpInfo's name, with its variant: ``std_mean.unbiased``."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def samples(op: Any, seed: int) -> Iterator[Any]:
    """The first samples of an OpInfo (`MOST`), drawn from a seeded generator."""
    torch.manual_seed(seed)
    found: Iterable[Any] = op.sample_inputs("cpu", DTYPE, requires_grad=True)
    return itertools.islice(found, None if MOST == "all" else int(MOST))


# -- how a sample's tensors lie in memory ------------------------------------------------------------------


def plain(t: Tensor) -> Tensor:
    return t.clone()


def transposed(t: Tensor) -> Tensor:
    """The same elements with the dimensions in memory in the opposite order."""
    order = list(range(t.ndim))[::-1]
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def spaced(t: Tensor) -> Tensor:
    """The same elements, each second place of a larger tensor, not from its start on."""
    wide = t.new_zeros(*t.shape, 2)
    wide[..., 1] = t
    return wide[..., 1]


def expanded(t: Tensor) -> Tensor:
    """The first element along the first dimension in place of all of them, once in memory."""
    return t[:1].clone().expand(t.shape) if t.ndim and t.is_floating_point() else t.clone()


def negated(t: Tensor) -> Tensor:
    """The same elements as a view that takes the negative of what is in memory."""
    return torch._neg_view(-t) if t.is_floating_point() else t.clone()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    each.__name__: each for each in (plain, transposed, spaced, expanded, negated)
}


# -- a sample called ---------------------------------------------------------------------------------------


@dataclass
class Call:
    """A sample with fresh tensors: calling it runs the operation on them, from the same random state each time."""

    function: Callable[..., Any]
    arguments: list[Any]
    process: Callable[[Any], Any]
    leaves: list[Tensor]

    def __call__(self) -> list[Tensor]:
        """The floating outputs."""
        torch.manual_seed(1)
        given, args, kwargs = self.arguments
        out = self.function(given, *args, **kwargs)
        return [t for t in each_tensor(self.process(out)) if t.is_floating_point() or t.is_complex()]


def call_of(function: Callable[..., Any], sample: Any, layout: Callable[[Tensor], Tensor], track: bool) -> Call:
    """A sample on copies of its tensors, which require a gradient of `torch.autograd` or not."""
    made: dict[int, Tensor] = {}
    leaves: list[Tensor] = []

    def fresh(t: Tensor) -> Tensor:
        if id(t) not in made:
            made[id(t)] = layout(t.detach()) if t.layout == torch.strided else t.detach().clone()
            if t.requires_grad:
                leaves.append(made[id(t)].requires_grad_(track))
        return made[id(t)]

    arguments = mapped([sample.input, sample.args, sample.kwargs], fresh, Tensor)
    return Call(function, arguments, sample.output_process_fn_grad, leaves)


def as_it_is(op: Any) -> Callable[..., Any] | None:
    return op  # type: ignore[no-any-return]


def in_place(op: Any) -> Callable[..., Any] | None:
    """The operation's in-place variant, on a copy of its first argument; None where it has none."""
    write = op.get_inplace()
    if write is None or not op.supports_inplace_autograd:
        return None

    def written(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = x.clone()
        write(y, *args, **kwargs)
        return y

    return written


def weights(outs: list[Tensor], seed: int) -> list[Tensor]:
    """A random tensor like each, but dense, and in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(t.shape, generator=generator, dtype=torch.complex128 if t.is_complex() else DTYPE) for t in outs
    ]


def dotted(outs: Iterable[Tensor], factors: Iterable[Tensor]) -> Tensor:
    """The sum of the real products of pairs of tensors."""
    total = torch.zeros((), dtype=DTYPE)
    for out, factor in zip(outs, factors, strict=True):
        dense = out if out.layout == torch.strided else out.to_dense()
        product = (factor.conj() * dense.to(factor.dtype)).sum()
        total = total + (product.real if product.is_complex() else product)
    return total


def bent(t: Tensor) -> Tensor:
    """A curved function of each element, so that a linear operation's gradient depends on its inputs too."""
    return t + t * t / 2


def compare(ours: Tensor | None, theirs: Tensor | None, what: str, tolerance: float) -> None:
    """Asserts that both are the same, to `tolerance` of the largest element; no gradient is as good as zero.

    A tolerance is never less than a thousand roundings of the dtype.
    """
    if ours is None and theirs is None:
        return
    ours = torch.zeros_like(theirs) if ours is None else ours  # type: ignore[arg-type]
    theirs = torch.zeros_like(ours) if theirs is None else theirs
    ours, theirs = (t.detach() if t.layout == torch.strided else t.detach().to_dense() for t in (ours, theirs))
    kinds = [(t.dtype, tuple(t.shape)) for t in (ours, theirs)]
    assert kinds[0] == kinds[1], f"{what}: {kinds[0]}, as torch has it {kinds[1]}"
    if tolerance == 0:
        same = bool(((ours == theirs) | (ours != ours) & (theirs != theirs)).all())
    else:
        tolerance = max(tolerance, 1000 * torch.finfo(theirs.dtype).eps)
        finite = theirs[theirs.isfinite()].abs()
        scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
        ours, theirs = (torch.where(t.isfinite(), t, torch.nan) for t in (ours, theirs))  # inf - inf or not: no matter
        same = torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    assert same, f"{what}:\n{ours}\n  as torch has it:\n{theirs}"


# -- the comparisons ---------------------------------------------------------------------------------------


class NoReferenceError(Exception):
    """Torch itself refuses the sample, or has no gradient of it."""


@dataclass
class Reference:
    """What torch.autograd makes of a sample: the outputs that have a gradient, and the gradients."""

    call: Call
    outs: list[Tensor]
    chosen: list[bool]
    factors: list[Tensor]
    gradients: tuple[Tensor | None, ...]


def reference_of(
    op: Any, function: Callable[..., Any], sample: Any, layout: Callable[[Tensor], Tensor], *, again: bool
) -> Reference:
    """Runs a sample and its gradients with random weights through `torch.autograd`, its outputs bent for `again`.

    Raises:
        NoReferenceError: where torch refuses to, or no output has a gradient.
    """
    call = call_of(function, sample, layout, track=True)
    try:
        outs = call()
        chosen = [t.requires_grad for t in outs]
        tracked = [bent(t) if again else t for t in outs if t.requires_grad]
        factors = weights(tracked, 2)
        if not tracked:
            raise NoReferenceError("no output has a gradient")
        found = torch.autograd.grad(dotted(tracked, factors), call.leaves, allow_unused=True, create_graph=again)
    except (RuntimeError, ValueError) as error:
        raise NoReferenceError(str(error)) from error
    if title(op) in TORCH_ERRS and again:
        raise NoReferenceError("torch has the first gradient wrong")
    if title(op) in TORCH_ERRS:
        found = differences(call_of(function, sample, layout, track=False), chosen, factors)
    return Reference(call, outs, chosen, factors, found)


#: Whose gradient torch itself has wrong: `as_strided_scatter` keeps g where `src` was written, and drops it elsewhere.
TORCH_ERRS = {"as_strided_scatter"}


def differences(call: Call, chosen: list[bool], factors: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients by central finite differences, of an operation that is linear."""

    def loss() -> Tensor:
        return dotted([t for t, yes in zip(call(), chosen, strict=True) if yes], factors)

    found = []
    for leaf in call.leaves:
        g = torch.zeros(leaf.shape, dtype=leaf.dtype)
        for place in itertools.product(*map(range, leaf.shape)):
            before = leaf[place].clone()
            leaf[place] = before + 1
            above = loss()
            leaf[place] = before - 1
            g[place] = (above - loss()) / 2
            leaf[place] = before
        found.append(g)
    return tuple(found)


def check_first(op: Any, function: Callable[..., Any], sample: Any, layout: Callable[[Tensor], Tensor]) -> None:
    """Recorded strictly and swept: the results are the unrecorded ones bit for bit, every gradient is torch's."""
    theirs = reference_of(op, function, sample, layout, again=False)
    plain = call_of(function, sample, layout, track=False)()
    random_state = torch.random.get_rng_state()
    call = call_of(function, sample, layout, track=False)
    with te.record(strict=True):
        outs = call()
        assert torch.equal(torch.random.get_rng_state(), random_state), "another random stream under the recorder"
        loss = dotted([t for t, yes in zip(outs, theirs.chosen, strict=True) if yes], theirs.factors)
    te.backward(loss)
    if title(op) not in UNDEFINED:
        for out, expected in zip(outs, plain, strict=True):
            compare(out, expected, "result", 1e-12 if title(op).startswith(BY_ALIGNMENT) else 0)
    for place, (leaf, wanted) in enumerate(zip(call.leaves, theirs.gradients, strict=True)):
        compare(getattr(leaf, "g", None), wanted, f"gradient {place}", 1e-9)


def check_each_output(op: Any, function: Callable[..., Any], sample: Any, layout: Callable[[Tensor], Tensor]) -> None:
    """Each output alone is weighed: the gradients of the others are undefined, which is not zero.

    Raises:
        NoReferenceError: where there is one output alone, or torch refuses.
    """
    number = sum(reference_of(op, function, sample, layout, again=False).chosen)
    if number < 2:
        raise NoReferenceError("one output")
    for chosen in range(number):
        theirs = call_of(function, sample, layout, track=True)
        call = call_of(function, sample, layout, track=False)
        outs = theirs()
        which = [i for i, t in enumerate(outs) if t.requires_grad][chosen]
        factors = weights([outs[which]], 2)
        expected = torch.autograd.grad(dotted([outs[which]], factors), theirs.leaves, allow_unused=True)
        with te.record(strict=True):
            loss = dotted([call()[which]], factors)
        for place, (g, wanted) in enumerate(zip(te.grad(loss, call.leaves), expected, strict=True)):
            compare(g, wanted, f"gradient {place} of output {which} alone", 1e-9)


def check_second(op: Any, function: Callable[..., Any], sample: Any, layout: Callable[[Tensor], Tensor]) -> None:
    """The sweep recorded and swept again: the gradient of each weighed gradient is that of torch's double backward.

    Raises:
        NoReferenceError: where torch has no second derivative.
    """
    theirs = reference_of(op, function, sample, layout, again=True)
    tracked = [g is not None and g.requires_grad for g in theirs.gradients]
    first = [g for g, yes in zip(theirs.gradients, tracked, strict=True) if g is not None and yes]
    factors = weights(first, 3)
    expected: tuple[Tensor | None, ...] = (None,) * len(tracked)  # a gradient that depends on nothing
    try:
        if first:
            expected = torch.autograd.grad(dotted(first, factors), theirs.call.leaves, allow_unused=True)
    except RuntimeError as error:
        raise NoReferenceError(str(error)) from error
    call = call_of(function, sample, layout, track=False)
    with te.record(strict=True):
        loss = dotted([bent(t) for t, yes in zip(call(), theirs.chosen, strict=True) if yes], theirs.factors)
        once = te.grad(loss, call.leaves, record=True)
        chosen = [g for g, yes in zip(once, tracked, strict=True) if yes]
        pairs = [(g, f) for g, f in zip(chosen, factors, strict=True) if g is not None]
        again = te.grad(dotted(*zip(*pairs, strict=True)), call.leaves) if pairs else expected
    for place, (g, wanted) in enumerate(zip(once, theirs.gradients, strict=True)):
        compare(g, wanted, f"gradient {place}", 1e-9)
    for place, (g, wanted) in enumerate(zip(again, expected, strict=True)):
        compare(g, wanted, f"second gradient {place}", 1e-8)


#: What torch computes for them differs in the last bit from call to call on the same numbers, by where in memory
#: they lie (plain `torch.linalg.lstsq` of 300 systems, each twice: 50 differed).
BY_ALIGNMENT = ("linalg.", "norm.nuc", "lu", "ormqr", "pinverse", "qr", "svd", "cholesky", "triangular_solve", "geqrf")

#: Whose contents are whatever lay in memory.
UNDEFINED = "empty empty_like empty_permuted empty_strided new_empty new_empty_strided".split()


# -- every operation ---------------------------------------------------------------------------------------


@dataclass
class Survey:
    """What came of every operation: its name, with what was said where there is something to say."""

    right: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    without_reference: dict[str, str] = field(default_factory=dict)
    compared: int = 0

    @property
    def total(self) -> int:
        return len(self.right) + len(self.refused) + len(self.wrong) + len(self.without_reference)


def survey(
    check: Callable[..., None],
    variant: Callable[[Any], Callable[..., Any] | None] = as_it_is,
    layout: Callable[[Tensor], Tensor] = plain,
    seed: int = 0,
    among: Callable[[Any], bool] = lambda op: True,
) -> Survey:
    """Runs a check over the samples of every operation among the cases that has the variant.

    An operation is right if all of its samples are, but for those that torch refuses; refused if a sample met a
    missing rule; without reference if torch refuses all of its samples; wrong in any other case.
    """
    found = Survey()
    for op in cases():
        function = variant(op)
        if function is not None and among(op):
            _survey_one(found, check, op, function, layout, seed)
    return found


def _survey_one(
    found: Survey,
    check: Callable[..., None],
    op: Any,
    function: Callable[..., Any],
    layout: Callable[[Tensor], Tensor],
    seed: int,
) -> None:
    name, compared, no_reference = title(op), 0, "no samples"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of beta states and deprecated arguments
        warnings.simplefilter("error", TapeWarning)
        for number, sample in enumerate(samples(op, seed)):
            try:
                check(op, function, sample, layout)
                compared += 1
            except NoReferenceError as error:
                no_reference = str(error)
            except MissingRuleError as error:
                found.refused.setdefault(name, str(error))
            except Exception as error:  # whatever it is, it is told with the operation's name
                found.wrong.setdefault(name, f"sample {number}: {type(error).__name__}: {error}")
    found.compared += compared
    if name in found.refused or name in found.wrong:
        return
    if compared:
        found.right.append(name)
    else:
        found.without_reference[name] = no_reference
