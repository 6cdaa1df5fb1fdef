"""Every operation on the table, replayed on other values than it was recorded with; and the calls that replay it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine import registry
from tape_engine.program.calls import Call, call_of
from tape_engine.registry import Op, Sample, Spec
from tests.helpers import each_tensor, g_of, plain
from tests.tape_engine.program.common import freeze

Tensor = torch.Tensor
aten = torch.ops.aten
SEED = 11

OPS = [each for each in registry.ops() if each.samples]

#: Where torch's own gradient is wrong, as finite differences tell: it keeps g where `src` was written; it reads the
#: noise that was given, not that which was drawn.
TORCH_ERRS = {aten.as_strided_scatter.default, aten.rrelu_with_noise_functional.default}

#: Whose further outputs are notes for its own backward, parts of which nobody writes.
NOTES = {aten._ctc_loss.default, aten._ctc_loss.Tensor, aten.mkldnn_rnn_layer.default}

#: Whose output is memory that nobody wrote.
UNDEFINED = {aten.empty_like.default, aten.new_empty.default}


def title(op: Op) -> str:
    return str(op.forward).removeprefix("aten.") if not op.is_named else op.name


def floating(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def mapped(structure: Any, change: Callable[[Any], Any], kind: type) -> Any:
    """Nested arguments with every object of `kind` changed."""
    if isinstance(structure, kind):
        return change(structure)
    if isinstance(structure, (list, tuple)):
        return type(structure)(mapped(item, change, kind) for item in structure)
    if isinstance(structure, dict):
        return {name: mapped(item, change, kind) for name, item in structure.items()}
    return structure


def drawn(op: Op, sample: Sample, shift: int, constants: dict[int, Tensor]) -> tuple[Any, Any, list[Tensor]]:
    """A call's arguments, floating ones by generator `shift`, the others always the same; and its floating tensors."""
    made: list[Tensor] = []
    place = 0

    def make(s: Spec) -> Tensor:
        nonlocal place
        place += 1
        generator = torch.Generator().manual_seed(SEED + 100 * place + shift)
        if s.dtype.is_floating_point or s.dtype.is_complex:
            t = s.draw(generator)
            made.append(t)
            return t
        return constants.setdefault(place, s.draw(generator))

    args, kwargs = mapped([sample.args, sample.kwargs], make, Spec)
    return (*op.bind(args, kwargs), made)


def run(op: Op, args: Any, kwargs: Any) -> list[Tensor]:
    return each_tensor(op(*args, **kwargs) if op.is_named else op.forward(*args, **kwargs))


def autograd_on(op: Op, args: Any, kwargs: Any, floats: list[Tensor], seed: Tensor, place: int) -> list[Tensor | None]:
    """What torch.autograd gives; raises where torch has no derivative of the operation."""
    swap = {id(t): t.detach().clone().requires_grad_() for t in floats}
    args, kwargs = mapped([args, kwargs], lambda t: swap.get(id(t), t), Tensor)
    out = run_plain(op, args, kwargs)[place]
    return list(torch.autograd.grad(out, [swap[id(t)] for t in floats], seed, allow_unused=True))


def run_plain(op: Op, args: Any, kwargs: Any) -> list[Tensor]:
    torch.manual_seed(SEED)
    return each_tensor(op.forward(*args, **kwargs))


def swept_on(op: Op, args: Any, kwargs: Any, floats: list[Tensor], seed: Tensor, place: int) -> list[Tensor | None]:
    """What recording the call again and sweeping gives."""
    torch.manual_seed(SEED)
    with te.record():
        out = run(op, args, kwargs)[place]
    return list(te.grad(out, floats, seed))


def check(op: Op, sample: Sample) -> None:
    constants: dict[int, Tensor] = {}
    args, kwargs, recorded = drawn(op, sample, 0, constants)
    torch.manual_seed(SEED)
    with te.record() as tape:
        outputs = run(op, args, kwargs)
    for place in [i for i, out in enumerate(outputs) if floating(out)][:3]:
        # A different output first: the sweep goes from the first.
        if place and op.forward in NOTES:
            break
        order = [outputs[place], *outputs[:place], *outputs[place + 1 :]][: 1 if op.forward in NOTES else None]
        program = tape.program(inputs=recorded, outputs=tuple(order))
        for shift in (1, 2):
            args, kwargs, floats = drawn(op, sample, shift, constants)
            expected = run_plain(op, args, kwargs)
            torch.manual_seed(SEED)
            got = program(*floats)
            wanted = [expected[place], *expected[:place], *expected[place + 1 :]][: len(order)]
            all_same(got, wanted, "forward")
            if not program._frozen.gradients:
                continue
            seed = Spec(tuple(got[0].shape), got[0].dtype, 0.2, 1.5).draw(torch.Generator().manual_seed(shift))
            torch.manual_seed(SEED)
            again = program.step(*floats, seed=seed)
            all_same(again, wanted, "forward of step")
            gradients = [g_of(t) for t in floats]
            all_same(gradients, swept_on(op, args, kwargs, floats, seed, place), f"{place} against the sweep:")
            if op.is_named or op.forward in TORCH_ERRS or place:
                continue  # torch lets no gradient through some further outputs (the mean of a normalisation)
            try:
                torchs = autograd_on(op, args, kwargs, floats, seed, place)
            except (RuntimeError, NotImplementedError):
                continue  # torch has no derivative here; that ours is right is the rules' own test
            all_same(gradients, torchs, f"{place} against torch.autograd:")


def all_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], what: str) -> None:
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same(a, b, f"{what} {i}")


def same(ours: Tensor | None, theirs: Tensor | None, what: str) -> None:
    if ours is None or theirs is None:
        for one in (ours, theirs):
            assert one is None or not one.any(), f"{what}: one has a gradient, the other none"
        return
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), what
    tol = 1e-9 if theirs.dtype in (torch.float64, torch.complex128) else 1e-4
    ours, theirs = plain(ours).resolve_conj(), plain(theirs).resolve_conj()
    assert torch.allclose(ours, theirs, rtol=tol, atol=tol, equal_nan=True), f"{what} differs:\n{ours}\n{theirs}"


def test_there_is_something_to_replay() -> None:
    assert len(OPS) > 250


REPLAYED = [each for each in OPS if each.forward not in UNDEFINED]


def check_all(op: Op, samples: Sequence[Sample]) -> None:
    for number, sample in enumerate(samples):
        try:
            check(op, sample)
        except Exception as error:
            raise AssertionError(f"{title(op)}, {number}: {sample}\n{type(error).__name__}: {error}") from error


@pytest.mark.parametrize("op", REPLAYED, ids=title)
def test_replays(op: Op) -> None:
    check_all(op, op.samples[:2])


@pytest.mark.slow
@pytest.mark.parametrize("op", [each for each in REPLAYED if len(each.samples) > 2], ids=title)
def test_replays_further_samples(op: Op) -> None:
    check_all(op, op.samples[2:])


# -- the way that is found -----------------------------------------------------------------------------------


def way(function: Callable[..., Any], *tensors: Tensor) -> Call:
    """How the last operation of a call is replayed."""
    with te.record() as tape:
        function(*tensors)
    return call_of(tape.nodes[-1])


X, Y = torch.rand(3, 4), torch.rand(3, 4)

QUICK: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "mm": (torch.mm, (X, Y.t()), "torch.mm"),
    "add": (torch.add, (X, Y), "torch.add"),
    "add a number": (lambda x: x + 2.5, (X,), "torch.add"),
    "add in part": (lambda x, y: torch.add(x, y, alpha=2), (X, Y), "torch.add"),
    "sum": (lambda x: x.sum(1, keepdim=True), (X,), "torch.sum"),
    "mean": (torch.mean, (X,), "torch.mean"),
    "tanh": (torch.tanh, (X,), "torch.tanh"),
    "pow": (lambda x: x**2, (X,), "torch.pow"),
    "gt": (lambda x: x > 0.5, (X,), "torch.gt"),
    "cat": (lambda x, y: torch.cat([x, y]), (X, Y), "torch.cat"),
    "clamp": (lambda x: x.clamp(0.2, 0.7), (X,), "torch.clamp"),
    "gelu": (torch.nn.functional.gelu, (X,), "torch._C._nn.gelu"),
}


@pytest.mark.parametrize("name", QUICK)
def test_the_quick_way(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The builtin of torch that writes into given memory, found without a word to the user."""
    function, tensors, title = QUICK[name]
    found = way(function, *tensors)
    assert found.title == title
    assert found.outs == ("out",)
    assert not found.view
    assert capfd.readouterr() == ("", "")


def test_views_are_views() -> None:
    for function in (torch.t, lambda x: x.view(-1), lambda x: x[1:], lambda x: x.transpose(0, 1), torch.squeeze):
        assert way(function, X).view


@pytest.mark.parametrize("order", [1, -1])
def test_a_way_serves_only_calls_of_its_kind(order: int) -> None:
    """What was found for one call is not used for another of other params, dtypes or dimensions."""
    functions: list[Callable[[Tensor], Any]] = [
        lambda x: torch.nn.functional.l1_loss(x, Y, reduction="none"),
        lambda x: torch.nn.functional.mse_loss(x, Y),
        lambda x: torch.nn.functional.mse_loss(x, Y, reduction="none"),
        lambda x: torch.nn.functional.mse_loss(x, Y, reduction="sum"),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[:, torch.tensor([0, 1])],
        lambda x: x[torch.tensor([0, 1]), torch.tensor([2, 1])],
        lambda x: x.sum(),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: x.sum((0, 1)),
        lambda x: x.long().sum(),
        lambda x: torch.div(x, Y, rounding_mode="floor"),
        lambda x: torch.div(x, Y, rounding_mode="trunc"),
        lambda x: x.to(torch.bfloat16) @ Y.t().to(torch.bfloat16),
        lambda x: torch.softmax(x, 1, dtype=torch.float64),
        lambda x: torch.softmax(x, 1),
        lambda x: x.var(1),
        lambda x: x.var(1, correction=0),
        lambda x: x.std(),
        lambda x: x.norm(),
        lambda x: x.norm(1),
        lambda x: x.norm(float("inf"), dim=1),
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        torch.nn.functional.gelu,
    ]
    for function in functions[::order]:
        program = freeze(function, [X])
        x = torch.rand(3, 4)
        got, wanted = program(x), function(x)
        assert got.dtype == wanted.dtype
        assert torch.allclose(got, wanted)


def test_no_numbers_are_drawn_and_no_tensor_is_touched_to_find_it() -> None:
    """Ways are tried on tensors of their own."""
    x = torch.rand(3, 4)
    before, state = plain(x), torch.get_rng_state()
    with te.record() as tape:
        torch.nn.functional.dropout(torch.sigmoid(x), 0.5)
        x.erfinv().lgamma()
    state = torch.get_rng_state()
    for node in tape.nodes:
        call_of(node)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
