"""The checks of a gradient rule, one function each; `test_rules` runs them over the whole table.

Each check takes one operation and one sample, drawn plain, with strides, or with one tensor in two
places, and compares the rule's gradients, un-broadcast and cast by this file's own few lines, with

- `check_autograd`: ``torch.autograd``, at kinks too;
- `check_differences`: central finite differences in float64, where the sample is at no kink;
- `check_second`: ``torch.autograd`` a second time, through the rule, for the gradient of the gradient;
- `check_recorded`: the engine itself: recorded (strict), swept, and the sweep recorded and swept again.

Arguments whose data the rule claims not to read are handed to it as bare descriptions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

import tape_engine as te
from tape_engine.registry import Op, Spec
from tape_engine.tape import Value
from tests.tape_engine.rule_calls import EXACT, SEED, Call, differentiable, each_tensor, mapped

Tensor = torch.Tensor
aten = torch.ops.aten


# -- the rule's gradients, and the references --------------------------------------------------------


def as_tuple(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def run_rule(call: Call, g: tuple[Any, ...], out: Any) -> dict[int, Tensor]:
    """What the rule gives for each leaf (by id): contributions summed, un-broadcast, cast."""
    op, names = call.op, call.op.rule_parameters
    assert op.grad is not None
    assert op.saves is not None

    def described(name: str, given: Any) -> Any:
        if not names or name in op.saves:  # type: ignore[operator]
            return given
        return mapped(given, Value, Tensor)

    args = [described(names[i + 2], a) if names else a for i, a in enumerate(call.args)]
    kwargs = {name: described(name, a) for name, a in call.kwargs.items()}
    handed_out = described(names[1], out) if names else out
    given = g if isinstance(out, (tuple, list)) else g[0]
    watched = list(each_tensor([*call.args, call.kwargs, out, g]))
    before = [t._version for t in watched]
    returned = as_tuple(op.grad(given, handed_out, *args, **kwargs))
    assert [t._version for t in watched] == before, "the rule wrote to what it was given"

    slots = call.slots()
    if len(returned) != len(slots):
        slots = [s for s in slots if isinstance(s, Tensor)]
    assert len(returned) == len(slots), f"{len(returned)} gradients for {len(slots)} tensors"
    may_sum = op.broadcasts or (op.broadcasts is None and joint_shape(slots) == as_tuple(out)[0].shape)
    total: dict[int, Tensor] = {}
    for contribution, slot in zip(returned, slots, strict=True):
        if not differentiable(slot) or contribution is None:
            continue
        if contribution.shape != slot.shape:
            assert may_sum, f"a gradient of {contribution.shape} for {slot.shape}"
            contribution = unbroadcast(contribution, slot.shape)
        if contribution.is_complex() and not slot.is_complex():
            contribution = contribution.real
        contribution = contribution.to(slot.dtype)
        total[id(slot)] = total[id(slot)] + contribution if id(slot) in total else contribution
    return total


def joint_shape(slots: list[Any]) -> torch.Size | None:
    """What broadcasting the tensors gives; ``None`` where they do not broadcast."""
    try:
        shape: torch.Size = torch.broadcast_shapes(*[s.shape for s in slots if isinstance(s, Tensor)])  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return shape


def unbroadcast(g: Tensor, shape: torch.Size) -> Tensor:
    while g.ndim > len(shape):
        g = g.sum(0)
    for dim, size in enumerate(shape):
        if size == 1 and g.shape[dim] != 1:
            g = g.sum(dim, keepdim=True)
    assert g.shape == shape
    return g


def seeds(outs: tuple[Any, ...], reached: list[bool]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(SEED + 1)
    made = [Spec(tuple(o.shape), o.dtype, 0.2, 1.5).draw(generator) if differentiable(o) else None for o in outs]
    return tuple(m if r else None for m, r in zip(made, reached, strict=True))


def torch_reaches(outs: tuple[Any, ...]) -> list[bool]:
    """To which outputs torch lets a gradient come."""
    known = [has_gradient(o) for o in outs]
    return known if any(known) else [differentiable(o) for o in outs]


def with_grad(call: Call) -> tuple[Call, dict[int, Tensor]]:
    """The call on leaves that require a gradient; and those, by the id of what they stand for."""
    refused: set[int] = set()
    while True:
        made = {id(t): t.detach().requires_grad_() for t in call.leaves if id(t) not in refused}
        args, kwargs = mapped([call.args, call.kwargs], lambda t: made.get(id(t), t), Tensor)  # noqa: B023
        tracked = Call(call.op, args, kwargs, call.kinked)
        try:
            outs = [o for o in as_tuple(tracked.forward()) if has_gradient(o)]
            if outs and made:
                torch.autograd.grad(outs, list(made.values()), [torch.ones_like(o) for o in outs], allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            named = re.search(r"to argument '(\w+)'|derivative for '\w+ (\w+)' is not implemented", str(error))
            if named is None and re.search("derivative for '\\w+' is not implemented", str(error)):
                refused = {id(t) for t in call.leaves}
                continue
            if named is None or call.op.is_named:
                raise
            name = named[1] or named[2]
            place = call.op.parameters.index(name)
            refused.add(id(call.args[place] if place < len(call.args) else call.kwargs[name]))
            continue
        return tracked, made


def has_gradient(out: Any) -> bool:
    """Whether torch lets a gradient come to this output, and knows what to do with it."""
    return differentiable(out) and out.requires_grad and "NotImplemented" not in type(out.grad_fn).__name__


def close(ours: Tensor | None, theirs: Tensor | None, what: str, tolerance: float) -> None:
    if ours is None or theirs is None:
        for one in (ours, theirs):
            assert one is None or not one.any(), f"{what}: one has a gradient, the other none:\n{ours}\n{theirs}"
        return
    assert torch.allclose(ours.detach(), theirs.detach(), rtol=tolerance, atol=tolerance, equal_nan=True), (
        f"{what} differs:\n{ours}\n{theirs}"
    )


def patterns(outs: tuple[Any, ...], reached: list[bool]) -> list[list[bool]]:
    """Every output reached; then each alone, where there are several."""
    several = sum(reached) > 1 and len(outs) <= 3
    return [reached, *([[i == j for j in range(len(outs))] for i, r in enumerate(reached) if r] if several else [])]


# -- the checks --------------------------------------------------------------------------------------


def check_autograd(call: Call) -> None:
    """The rule's gradients equal those of ``torch.autograd``."""
    if call.kinked and call.op.is_named:
        return  # at a kink the article's convention holds, not what the body's torch operations would give
    out = call.forward()
    tracked, made = with_grad(call)
    theirs = as_tuple(tracked.forward())
    reached = torch_reaches(theirs)
    for pattern in patterns(theirs, reached) if call.op.forward not in TORCH_NEEDS_FIRST else [reached]:
        g = seeds(as_tuple(out), pattern)
        pairs = [(o, s) for o, s in zip(theirs, g, strict=True) if s is not None and has_gradient(o)]
        if not pairs:
            continue
        expected = torch.autograd.grad(
            [o for o, _ in pairs], list(made.values()), [s for _, s in pairs], allow_unused=True, retain_graph=True
        )
        with torch.no_grad():
            ours = run_rule(call, g, out)
        for place, (leaf, e) in enumerate(zip(made, expected, strict=True)):
            close(ours.get(leaf), e, f"gradient {place}", 1e-9 if call.exact else 1e-4)


def check_differences(call: Call, eps: float = 1e-6) -> None:
    """The rule's gradients equal central finite differences of the forward, in real and imaginary part."""
    if call.kinked or not call.exact:
        return
    tracked, _ = with_grad(call)
    reached = torch_reaches(as_tuple(tracked.forward()))
    with torch.no_grad():
        out = call.forward()
        if not all(o.dtype in EXACT for o in as_tuple(out) if differentiable(o)):
            return
        g = seeds(as_tuple(out), reached)
        ours = run_rule(call, g, out)

        def loss() -> float:
            outs = as_tuple(call.forward())
            return sum(float((s.conj() * o).real.sum()) for s, o in zip(g, outs, strict=True) if s is not None)

        for place, leaf in enumerate(call.leaves):
            found = torch.zeros_like(leaf, memory_format=torch.contiguous_format)
            for index in torch.ones(leaf.shape).nonzero().tolist():
                old = leaf[tuple(index)].clone()
                for unit in (1, 1j) if leaf.is_complex() else (1,):
                    leaf[tuple(index)] = old + eps * unit
                    up = loss()
                    leaf[tuple(index)] = old - eps * unit
                    found[tuple(index)] += unit * (up - loss()) / (2 * eps)
                    leaf[tuple(index)] = old
            close(ours.get(id(leaf)), found, f"gradient {place}, by differences,", 2e-5)


def check_second(call: Call) -> None:
    """The gradient of a product with the rule's gradients equals that with torch's, for leaves and g alike."""
    if call.kinked:
        return
    tracked, made = with_grad(call)
    theirs = tracked.forward()
    outs = as_tuple(theirs)
    g = tuple(s if s is None else s.requires_grad_() for s in seeds(outs, torch_reaches(outs)))
    pairs = [(o, s) for o, s in zip(outs, g, strict=True) if s is not None and has_gradient(o)]
    if not pairs:
        return
    wanted = [*made.values(), *[s for _, s in pairs]]
    try:
        expected = torch.autograd.grad(
            [o for o, _ in pairs], list(made.values()), [s for _, s in pairs], allow_unused=True, create_graph=True
        )
        target = second(expected, wanted)
    except RuntimeError as error:
        if not any(each in str(error) for each in NO_SECOND):
            raise
        return
    ours = run_rule(tracked, g, theirs)
    try:
        result = second([ours.get(id(t)) for t in made.values()], wanted)
    except RuntimeError as error:  # the rule's kernel, where torch itself takes another way
        if "is not implemented" not in str(error):
            raise
        return
    for place, (o, t) in enumerate(zip(result, target, strict=True)):
        close(o, t, f"second gradient {place}", 1e-8 if call.exact else 1e-4)


#: How torch says that it has no second derivative, where it has none or stumbles over an empty or missing tensor.
NO_SECOND = (
    "not implemented",
    "is not differentiable",
    "cannot reshape tensor of 0 elements",
    "Expected a proper Tensor but got None",
)


def check_recorded(call: Call) -> None:
    """Recorded, swept, and the sweep recorded and swept again, the rules give what torch's autograd gives."""
    if (call.kinked and call.op.is_named) or (call.op.forward in MISCOMPUTED and call.leaves[0].is_complex()):
        return
    tracked, made = with_grad(call)
    theirs = as_tuple(tracked.forward())
    g = seeds(theirs, [has_gradient(o) for o in theirs])
    pairs = [(o, s) for o, s in zip(theirs, g, strict=True) if s is not None]
    if not pairs:
        return
    leaves = [t for t in call.leaves if id(t) in made]
    expected: tuple[Tensor | None, ...] = torch.autograd.grad(
        [o for o, _ in pairs], list(made.values()), [s for _, s in pairs], allow_unused=True, create_graph=True
    )
    try:
        unknown = call.kinked or call.op.forward in ONCE | TORCH_ERRS_TWICE
        target = None if unknown else second(expected, list(made.values()))
    except RuntimeError as error:
        if not any(each in str(error) for each in NO_SECOND):
            raise
        target = None
    weights = [
        Spec(tuple(t.shape), t.dtype).draw(torch.Generator().manual_seed(SEED + 2 + i)) for i, t in enumerate(leaves)
    ]
    second_ours: tuple[Tensor | None, ...] | None = None
    with te.record(strict=True):
        outs = as_tuple(call.op(*call.args, **call.kwargs) if call.op.is_named else call.forward())
        loss = dotted([(s, o) for s, o in zip(g, outs, strict=True) if s is not None])
        ours = te.grad(loss, leaves, record=target is not None)
        again = [
            (w, o)
            for w, o, e in zip(weights, ours, expected, strict=True)
            if o is not None and e is not None and e.requires_grad
        ]
        if again and target is not None:
            second_ours = te.grad(dotted(again), leaves)
    for place, (o, e) in enumerate(zip(ours, expected, strict=True)):
        close(o, e, f"swept gradient {place}", 1e-9 if call.exact else 1e-4)
    if second_ours is not None and target is not None:
        for place, (o, t) in enumerate(zip(second_ours, target, strict=True)):
            close(o, t, f"swept second gradient {place}", 1e-8 if call.exact else 1e-4)


def dotted(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the real products of pairs of tensors."""
    parts = [(w.conj() * t).sum() for w, t in pairs]
    return sum((p.real if p.is_complex() else p).to(torch.float64) for p in parts)  # type: ignore[return-value]


def second(first: Any, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    loss = torch.zeros((), dtype=torch.float64)
    for place, f in enumerate(first):
        if f is not None and f.requires_grad:
            weight = Spec(tuple(f.shape), f.dtype).draw(torch.Generator().manual_seed(SEED + 2 + place))
            loss = loss + (weight.conj() * f).real.sum()
    if not loss.requires_grad:
        return tuple(None for _ in wanted)
    return torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)


#: Where torch's own gradient is wrong, as finite differences tell.
TORCH_ERRS = {
    aten.as_strided_scatter.default,  # it keeps g where `src` was written, and drops it elsewhere
    aten.rrelu_with_noise_functional.default,  # it reads the noise given, not the noise drawn
}

#: Where torch's own second derivative is wrong, as finite differences tell.
TORCH_ERRS_TWICE = {aten._weight_norm_interface.default}  # it takes the norms for constants

#: Differentiable once, as in torch: their backward kernels have no rule.
ONCE = {
    getattr(aten, name).default
    for name in (
        "grid_sampler_2d grid_sampler_3d _ctc_loss _cdist_forward _pdist_forward multi_margin_loss "
        "multilabel_margin_loss_forward mkldnn_rnn_layer"
    ).split()
} | {aten._ctc_loss.Tensor}

#: What torch computes wrongly, the forward itself, under any dispatch mode when the numbers are complex.
MISCOMPUTED = {aten.linalg_pinv.atol_rtol_tensor}

#: Where torch drops the gradients of the further outputs unless the first has one.
TORCH_NEEDS_FIRST = {aten.native_group_norm.default}

CHECKS = (check_autograd, check_differences, check_second, check_recorded)


def takes_strides(call: Call) -> bool:
    """Whether the operation can take these strides: a view of them may not exist."""
    if call.op.name in ("read_view", "write_view"):
        return False  # their arguments tell a place in a storage, which is another with other strides
    try:
        with_grad(call)
    except RuntimeError as error:
        if any(each in str(error) for each in ("view", "with stride 1", "contiguous")):
            return False
        raise
    return True


def checks_of(op: Op, variant: str) -> list[Callable[[Call], None]]:
    if op.forward in TORCH_ERRS:
        return [] if variant == "strided" else [check_differences]
    return [check_autograd] if variant == "strided" else list(CHECKS)
