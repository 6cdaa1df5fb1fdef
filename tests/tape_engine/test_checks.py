"""te.check_rule and te.check: wrong rules are found and named, right ones pass, and nothing of the caller's changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine import registry
from tape_engine.registry import Op

Tensor = torch.Tensor
aten = torch.ops.aten


def made(forward: Callable[..., Any], grad: Callable[..., Any], **kwargs: Any) -> Op:
    """An operation with a rule, on no table."""
    op = Op(forward, name="made", **kwargs)
    op.rule(grad)
    return op


def product(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def matrices(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x * x


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=dtype)


GENERATOR = torch.Generator().manual_seed(5)  # what stands in this file's tables is the same in every run
X, W = drawn(4, 3), drawn(4, 3)
SQUARE = drawn(3, 3)
Z = drawn(3, dtype=torch.complex64)
LARGE = drawn(40, 50)
calls_seen: list[int] = []


# -- wrong rules, each with what has to be said of it ------------------------------------------------------


def factor(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * w, 3 * g * x


def sign(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return -g * w, g * x


def swapped(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * x, g * w


def transposed(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g @ w.t(), (x.t() @ g).t()


def not_transposed(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g @ w.t(), g.t() @ x  # the transpose of a gradient whose shape is not square


def no_mean(g: Tensor, out: Tensor, x: Tensor) -> Any:
    return (2 * g * x,)


def mean_of_a_sum(g: Tensor, out: Tensor, x: Tensor) -> Any:
    return (2 * g * x / 12,)


def no_conjugate(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * w.conj(), g * x


def absent(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * w, None


def too_many(g: Tensor, out: Tensor, x: Tensor) -> Any:
    return 2 * g * x


def negative(g: Tensor, out: Tensor, x: Tensor) -> Any:
    return (torch.where(x < 0, 0.5 * g, g),)


def backwards(g: Tensor, out: Tensor, x: Tensor) -> Any:
    return ((2 * g * x).flip(1),)


def one_element(g: Tensor, out: Tensor, x: Tensor) -> Any:
    found = 2 * g * x
    found[17, 23] += 0.25
    return (found,)


def no_sum(g: Tensor, out: Tensor, x: Tensor, b: Tensor) -> Any:
    return g, g


def too_few(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return (g * w,)


def other_shape(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * w, g.sum(0)


def writes_g(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    x_g = g * w
    return x_g, g.mul_(x)


def writes_argument(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    w_g = g * x
    return x.copy_(g * w), w_g


def remembers(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    calls_seen.append(1)
    return g * w * (len(calls_seen) % 2), g * x


def draws(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * w, g * x + 0.1 * torch.rand(x.shape)


def without_g(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return w.clone(), x.clone()


def raises(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * w, g * x.nowhere  # type: ignore[attr-defined]


def single(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * w, (g * x).float()


def hidden(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    return g * w, g * locals()["x"]


def detached(g: Tensor, out: Tensor, x: Tensor) -> Any:
    return (3 * g * x.detach() ** 2,)


def undefined(g: tuple[Tensor, Tensor], out: Any, x: Tensor) -> Any:
    return (g[0] * x.cos() + g[1] * 2 * x,)


def second_output(g: tuple[Tensor | None, Tensor | None], out: Any, x: Tensor) -> Any:
    first, second = (torch.zeros_like(x) if each is None else each for each in g)
    return (first * x.cos() + second * x,)


def in_part(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
    twice = x.clone()
    _ = twice.mul_(2)  # what is left out where only w is asked for: nobody reads it
    return g * w, g * twice / 2


def off_by_one(g: Tensor, out: Tensor, x: Tensor) -> Any:
    return (2 * g * x + 1,)


def infinite(g: Tensor, out: Tensor, x: Tensor) -> Any:
    return (2 * g * x / torch.ones_like(x).sub(1).where(x == x.max(), torch.ones_like(x)),)


WRONG: list[tuple[Any, Any, tuple[Any, ...], str, str, str]] = [
    # forward, rule, arguments, the argument to be named, the kind of fault, and what the report says
    (product, factor, (X, W), "w", "value", "the rule gives 3 times what it should everywhere"),
    (product, sign, (X, W), "x", "value", "the sign is wrong everywhere"),
    (product, swapped, (X, W), "x", "value", "this is the gradient of w: are the two in the wrong order?"),
    (matrices, transposed, (SQUARE, SQUARE), "w", "value", "it is transposed"),
    (matrices, not_transposed, (X, drawn(3, 2)), "w", "shape", "its transpose is right"),
    (lambda x: (x * x).mean(), no_mean, (X,), "x", "value", "12 is the number of elements of x: is the division of a"),
    (lambda x: (x * x).sum(), mean_of_a_sum, (X,), "x", "value", "1/12 is one over the number of elements of x"),
    (product, no_conjugate, (Z, Z.flip(0)), "w", "value", "only the phase is wrong"),
    (product, absent, (X, W), "w", "value", "the rule gives no gradient here, and there is one"),
    (lambda x: x.sign(), too_many, (X,), "x", "value", "there is no gradient here, and the rule gives one"),
    (lambda x: x.clone(), negative, (X,), "x", "value", "wrong exactly where the argument is negative"),
    (lambda x: x * x, backwards, (X,), "x", "value", "its elements run the other way along dimension 1"),
    (lambda x: x * x, one_element, (LARGE,), "x", "value", "most at [17, 23]"),
    (lambda x, b: x + b.sum(), no_sum, (drawn(3, 4), drawn(3)), "b", "shape", "shape (3, 4)"),
    (lambda x, b: x * 2 + b[:, None], lambda g, out, x, b: (2 * g, g), (drawn(3, 4), drawn(3)),
     "b", "shape", "a sum is missing: .sum(1) of it is right"),
    (product, too_few, (X, W), "", "count", "returned 1 gradients for 2 tensor arguments"),
    (product, other_shape, (X, W), "w", "shape", "a gradient of shape (3,) for w, which has shape (4, 3)"),
    (product, writes_g, (X, W), "", "write", "writes_g writes to g; a rule must leave"),
    (product, writes_argument, (X, W), "x", "write", "writes_argument writes to x"),
    (product, remembers, (X, W), "", "purity", "gives something else when it is called again"),
    (product, draws, (X, W), "", "purity", "gives something else when it is called again"),
    (product, without_g, (X, W), "", "linear", "gives the same whatever g is"),
    (product, raises, (X, W), "", "error", "raises raised AttributeError"),
    (product, single, (X, W), "w", "precision", "computes in float32 what is given in float64"),
    (product, hidden, (X, W), "", "hidden", "reads the data of an argument in a way that its code does not show"),
    (lambda x: x**3, detached, (X,), "x", "second", "the second derivative is wrong"),
    (parts, undefined, (X,), "", "error", "where g of output 0 alone is given"),
    (parts, second_output, (X,), "x", "value", "elements of (4, 3)"),
    (product, in_part, (X, W), "w", "part", "something else where it is asked for this gradient alone"),
    (lambda x: x * x, off_by_one, (X,), "x", "value", "the rule gives"),
    (lambda x: x * x, infinite, (X,), "x", "value", "wrong in 1 of 12 elements"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[f"{i}-{each[3]}-{each[4]}" for i, each in enumerate(WRONG)])
def test_a_wrong_rule_is_found_and_named(case: tuple[Any, Any, tuple[Any, ...], str, str, str]) -> None:
    forward, grad, args, argument, kind, said = case
    report = te.check_rule(made(forward, grad), *args)
    assert not report
    assert (argument, kind) in {(fault.argument, fault.kind) for fault in report.faults}, report
    assert said in str(report)


@pytest.mark.parametrize(("rule", "right"), [(factor, "x"), (sign, "w"), (absent, "x"), (other_shape, "x")])
def test_the_right_arguments_of_a_wrong_rule_are_not_blamed(rule: Any, right: str) -> None:
    report = te.check_rule(made(product, rule), X, W)
    assert right not in {fault.argument for fault in report.faults}
    assert f"{right}: agrees with finite differences (12 elements" in str(report)


def test_a_fault_tells_the_element_and_by_how_much() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor) -> Any:
        found = 2 * g * x
        found[1, 2] = found[1, 2] + 0.5
        found[3, 0] = found[3, 0] - 2.0
        return (found,)

    (fault,) = te.check_rule(made(lambda x: x * x, grad), X).faults
    assert fault.index == (3, 0)
    assert fault.expected is not None
    assert fault.got is not None
    assert fault.got - fault.expected == pytest.approx(-2.0, abs=1e-6)
    assert fault.max_abs == pytest.approx(2.0, abs=1e-6)
    assert "wrong in 2 of 12 elements of (4, 3)" in str(fault)


# -- right rules ---------------------------------------------------------------------------------------------


def test_a_right_rule_passes_and_says_how() -> None:
    report = te.check_rule(te.lin, X, torch.randn(3, 2), torch.randn(2))
    assert report
    text = str(report)
    assert text.startswith("lin_grad of lin: right in 1 call")
    assert text.count("and torch.autograd") == 3
    assert "second derivative: agrees" in text


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (torch.ops.aten.mul.Tensor, (X, 2.0), {}),
        (torch.flip, (X, [0]), {}),
        (torch.mul, (X, W), {}),
        (torch.ops.aten.sum.dim_IntList, (X, [1]), {"keepdim": True}),
        (torch.cat, ([X, W], 1), {}),
        (torch.Tensor.mul, (X.half(), W.bfloat16()), {}),
        (torch.ops.aten.mul.Tensor, (Z, Z), {}),
        (torch.ops.aten.native_dropout.default, (X, 0.5, True), {}),
        (torch.ops.aten.gather.default, (X, 1, torch.tensor([[0, 2], [1, 1]])), {}),
        (torch.ops.aten.mm.default, (torch.zeros(0, 3), drawn(3, 2)), {}),
        (torch.ops.aten.add.Tensor, (torch.tensor(1.5), X.expand(2, 4, 3)), {"alpha": 3}),
        (torch.ops.aten.mul.Tensor, (LARGE, LARGE), {}),
        (te.mse, (drawn(5, 1), drawn(5)), {}),
    ],
    ids=(
        "a number|a torch function|two tensors|a keyword|a list|a method, narrow dtypes|complex|random|integers|"
        "no rows|expanded|large|a named operation"
    ).split("|"),
)
def test_right_rules_of_every_kind_of_target_and_argument_pass(target: Any, args: Any, kwargs: Any) -> None:
    assert te.check_rule(target, *args, **kwargs), te.check_rule(target, *args, **kwargs)


def test_a_rule_may_take_none_for_outputs_that_are_not_reached() -> None:
    def grad(g: tuple[Tensor | None, Tensor | None], out: Any, x: Tensor) -> Any:
        first, second = (torch.zeros_like(x) if each is None else each for each in g)
        return (first * x.cos() + second * 2 * x,)

    assert te.check_rule(made(parts, grad), X)


def test_what_lies_between_the_slopes_is_right_at_the_kink_of_a_named_operation() -> None:
    def rectifier(value: float) -> Op:
        return made(lambda x: x.clamp_min(0), lambda g, out, x: (g * torch.where(x == 0, value, (x > 0).to(g)),))

    at = torch.tensor([-1.0, 0.0, 2.0])
    for value in (0.0, 0.3, 1.0):
        report = te.check_rule(rectifier(value), at)
        assert report, report
        assert "a kink at x[1]: slope 0 before and" in str(report)
    for value in (-0.5, 1.5):
        report = te.check_rule(rectifier(value), at)
        assert [fault.index for fault in report.faults] == [(1,)]


def test_an_operation_of_torch_has_torchs_gradient_at_a_kink() -> None:
    @te.rule(aten.relu.default)
    def other_grad(g: Tensor, out: Tensor, x: Tensor) -> Any:
        return torch.where(x >= 0, g, 0)

    assert not te.check_rule(aten.relu.default, torch.tensor([-1.0, 0.0, 2.0]))
    assert te.check_rule(aten.relu.default, torch.tensor([-1.0, 0.5, 2.0]))


def test_a_jump_is_no_fault() -> None:
    op = made(lambda x: x.floor(), lambda g, out, x: (torch.zeros_like(x),))
    assert te.check_rule(op, torch.tensor([0.5, 1.0, 2.5]))


def test_where_the_differences_are_not_finite_torch_tells() -> None:
    op = made(lambda x: x.sqrt(), lambda g, out, x: (g / (2 * out),))
    report = te.check_rule(op, torch.tensor([0.0, 4.0]))
    assert report
    assert "not finite" in str(report)


def test_what_torch_does_not_know_is_checked_by_differences_alone() -> None:
    op = made(torch.special.bessel_j0, lambda g, out, x: (-g * torch.special.bessel_j1(x),))
    report = te.check_rule(op, torch.rand(4) + 0.5)
    assert report
    assert "torch.autograd" not in str(report)
    wrong = made(torch.special.bessel_j0, lambda g, out, x: (g * torch.special.bessel_j1(x),))
    assert "the sign is wrong everywhere" in str(te.check_rule(wrong, torch.rand(4) + 0.5))


def test_a_rule_without_a_second_derivative_says_so() -> None:
    op = made(torch.special.bessel_j0, lambda g, out, x: (-g * torch.special.bessel_j1(x),))
    report = te.check_rule(op, torch.rand(4) + 0.5)
    assert report
    assert "second derivative: not available: MissingRuleError: special_bessel_j1" in str(report)


def test_without_arguments_the_samples_are_taken() -> None:
    assert len(te.check_rule(te.lin).calls) == len(te.lin.samples)

    @te.op(samples=[te.sample(te.spec(2, 3), te.spec(2, 3)), te.sample(te.spec(3), te.spec(2, 3))])
    def times(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    times.rule(factor)
    report = te.check_rule(times)
    assert [bool(call) for call in report.calls] == [False, False]
    assert "wrong in 2 of 2 calls" in str(report)


# -- nothing of the caller's changes ---------------------------------------------------------------------------


def test_check_rule_leaves_everything_as_it_was() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.nn.Parameter(torch.randn(3))
    x.grad = torch.ones(3)
    w.g = torch.ones(3)  # type: ignore[attr-defined]
    state = torch.get_rng_state()
    before = [t.detach().clone() for t in (x, w)]
    with te.record() as tape:
        y = x * w
        length = len(tape)
        assert te.check_rule(torch.ops.aten.mul.Tensor, x, w)
        assert te.check_rule(torch.ops.aten.native_dropout.default, x, 0.5, True)
        assert not te.check_rule(made(product, writes_argument), x, w)
        assert len(tape) == length
    assert torch.equal(torch.get_rng_state(), state)
    assert len(te.global_tape()) == 0
    assert all(torch.equal(t, b) for t, b in zip((x, w), before, strict=True))
    assert (x._version, w._version) == (0, 0)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3))
    assert torch.equal(w.g, torch.ones(3))  # type: ignore[attr-defined]
    assert not hasattr(x, "g")
    assert w.grad is None
    te.backward(y.sum())
    assert torch.equal(x.g, w.detach())  # type: ignore[attr-defined]


# -- errors ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_checked_is_an_error() -> None:
    with pytest.raises(te.DTypeError, match="is not an operation"):
        te.check_rule(product, X, W)
    with pytest.raises(te.MissingRuleError, match="special_bessel_y0 has no registered gradient rule") as missing:
        te.check_rule(torch.ops.aten.special_bessel_y0.default, X)
    assert "fix: @te.rule(torch.ops.aten.special_bessel_y0.default) on def special_bessel_y0_grad" in str(missing.value)
    with pytest.raises(te.MissingRuleError, match="argmax is declared to have no gradient"):
        te.check_rule(torch.argmax, X)
    with pytest.raises(te.DTypeError, match="none of the arguments of mul is a floating or complex tensor"):
        te.check_rule(torch.mul, torch.arange(3), 2)
    op = made(product, factor)
    with pytest.raises(te.DTypeError, match="made has no samples, and no arguments were given") as none:
        te.check_rule(op)
    assert "fix: te.check_rule(made, x, w)" in str(none.value)
    with pytest.raises(te.DTypeError, match="made does not take these arguments: missing a required argument: 'w'"):
        te.check_rule(op, X)


# -- the whole table -----------------------------------------------------------------------------------------------

TABLE = [op for op in registry.ops() if op.grad is not None and op.samples]

#: Whose samples a check does not pass, and why.
APART = {
    aten.native_group_norm_backward.default: "mean and rstd are functions of the input to it, as torch passes them",
    aten.mkldnn_rnn_layer.default: "torch's kernel writes to the workspace that it is given",
    aten.scatter_reduce.two: "of a product with zeros in it the second derivative is not that of the formula",
}


def title(op: Op) -> str:
    return op.name if op.is_named else str(op.forward).removeprefix("aten.")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*beta")
@pytest.mark.parametrize("op", [op for op in TABLE if op.forward not in APART], ids=title)
def test_every_rule_on_the_table_passes_with_its_samples(op: Op) -> None:
    report = te.check_rule(op)
    assert report, report


# -- te.check --------------------------------------------------------------------------------------------------------


@te.op
def scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * w


scaled.rule(lambda g, out, x, w: (g * w, g * x))


def network(wrong: bool) -> tuple[Tensor, ...]:
    if wrong:
        scaled.rule(factor)
    x, s, w, b, y = torch.randn(5, 3), torch.randn(3), torch.randn(3, 1), torch.zeros(1), torch.randn(5)
    h = scaled(x, s)
    C = te.mse(te.relu(te.lin(h, w, b)), y)
    return C, x, s, w, b, h


def test_the_gradients_of_the_articles_layer_agree() -> None:
    C, x, s, w, b, h = network(wrong=False)
    report = te.check(C)
    assert report
    assert set(report.agrees) == {"x", "s", "w", "b", "y"}
    for tensors in ((w,), (h, s)):
        assert te.check(C, *tensors)
    te.backward(C)
    assert te.check(C, x, b), "a swept tape can be checked"


def test_a_wrong_gradient_is_told_with_the_rule_to_blame() -> None:
    C, *_ = network(wrong=True)
    report = te.check(C)
    assert not report
    assert {fault.argument for fault in report.faults} == {"s"}
    assert set(report.agrees) == {"x", "w", "b", "y"}
    (node,) = report.blamed
    assert "factor of scaled, at test_checks.py:" in node.call
    assert "h = scaled(x, s)" in node.call
    assert [fault.argument for fault in node.faults] == ["w"]
    assert "the rule gives 3 times what it should everywhere" in str(report)
    (fault,) = report.faults
    assert fault.got == pytest.approx(3 * complex(fault.expected or 0).real, rel=1e-3)


def test_the_first_wrong_rule_going_back_is_named_before_the_others() -> None:
    scaled.rule(factor)

    @te.op
    def squared(x: Tensor) -> Tensor:
        return x * x

    squared.rule(lambda g, out, x: (g * x,))
    x, w = torch.randn(4), torch.randn(4)
    C = squared(scaled(x, w)).sum()
    report = te.check(C)
    assert [each.call.split(",")[0] for each in report.blamed] == ["<lambda> of squared", "factor of scaled"]
    assert {fault.argument for fault in report.faults} == {"x", "w"}


def test_a_rule_that_torch_cannot_check_is_blamed_by_differences() -> None:
    @te.rule(aten.special_bessel_j0.default)
    def bessel_grad(g: Tensor, out: Tensor, x: Tensor) -> Any:
        return g * torch.special.bessel_j1(x)

    x = torch.rand(4) + 0.5
    with te.record():
        C = torch.special.bessel_j0(x).square().sum()
    report = te.check(C)
    assert not report
    assert "torch.autograd does not know the way" in str(report)
    assert "bessel_grad of special_bessel_j0" in report.blamed[0].call
    assert "the sign is wrong everywhere" in str(report)


def test_a_rule_that_stops_the_sweep_is_reported() -> None:
    scaled.rule(too_few)
    x, w = torch.randn(3), torch.randn(3)
    report = te.check(scaled(x, w).sum())
    assert not report
    assert "returned 1 gradients for 2 tensor arguments" in str(report)


Run = Callable[..., Tensor]


def convolutional() -> tuple[Run, list[Tensor]]:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Dropout(0.3),
        torch.nn.Linear(32, 3),
    )  # fmt: skip

    def run(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(net(x), torch.tensor([0, 2, 1, 1]))

    return run, [torch.randn(4, 1, 6, 6)]


def cuts() -> tuple[Run, list[Tensor]]:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.exp()
        return (x * scale * x.detach() + te.stop_gradient(x.sin()) * x).sum()

    return run, [torch.randn(4, requires_grad=True)]


def writes() -> tuple[Run, list[Tensor]]:
    def run(x: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros(4, 3)
        y[1:] = x[1:] * w
        y[0].add_(w).mul_(2)
        y.relu_()
        return y.square().mean()

    return run, [torch.randn(4, 3), torch.randn(3)]


def updated() -> tuple[Run, list[Tensor]]:
    def run(w: Tensor) -> Tensor:
        with torch.no_grad():
            w.sub_(0.1)
        return (w * w).sum()

    return run, [torch.randn(3, requires_grad=True)]


def complex_numbers() -> tuple[Run, list[Tensor]]:
    return lambda z: (torch.fft.fft(z) * z.conj()).abs().sum(), [torch.randn(4, dtype=torch.complex64)]


def symmetric() -> tuple[Run, list[Tensor]]:
    def run(a: Tensor) -> Tensor:
        factor: Tensor = torch.linalg.cholesky(a @ a.mT + 3 * torch.eye(3, dtype=torch.float64))
        return factor.sum()

    return run, [torch.randn(3, 3, dtype=torch.float64)]


def one_half_read() -> tuple[Run, list[Tensor]]:
    return lambda a: torch.linalg.cholesky(a).sum(), [torch.eye(3, dtype=torch.float64) * 2 + 0.1]


def several() -> tuple[Run, list[Tensor]]:
    return lambda x, y: x * y, [torch.randn(3), torch.randn(2, 3)]


def kinked() -> tuple[Run, list[Tensor]]:
    return lambda x: te.relu(x * 1.5).sum(), [torch.tensor([-1.0, 0.0, 2.0])]


def low_precision() -> tuple[Run, list[Tensor]]:
    return lambda a, b: (a @ b).tanh().sum(), [torch.randn(6, 5).bfloat16(), torch.randn(5).bfloat16()]


def noisy() -> tuple[Run, list[Tensor]]:
    return lambda x: (x * torch.randn(4) + torch.rand(4)).square().sum(), [torch.randn(4)]


def large() -> tuple[Run, list[Tensor]]:
    return lambda x, w: (x @ w).relu().mean(), [torch.randn(50, 40), torch.randn(40, 30)]


PROGRAMS = [
    convolutional, cuts, writes, updated, complex_numbers, symmetric, one_half_read, several, kinked, low_precision,
    noisy, large,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda each: each.__name__)
def test_the_gradients_of_what_a_user_writes_agree(program: Callable[[], tuple[Run, list[Tensor]]]) -> None:
    run, inputs = program()
    with te.record():
        C = run(*inputs)
    report = te.check(C)
    assert report, report
    assert len(report.agrees) >= len(inputs)
    differs = [note for note in report.notes if "finite differences give something else" in note]
    # of a symmetric matrix one half is read, and torch gives both halves their share
    assert bool(differs) == (program in (one_half_read, symmetric)), differs


@pytest.mark.parametrize("program", [convolutional, cuts, writes, noisy], ids=lambda each: each.__name__)
def test_check_leaves_everything_as_it_was(program: Callable[[], tuple[Run, list[Tensor]]]) -> None:
    run, inputs = program()
    with te.record() as tape:
        C = run(*inputs)
    leaves = [leaf for leaf in tape.held if leaf.is_floating_point()]
    before = [leaf.detach().clone() for leaf in leaves]
    versions = [leaf._version for leaf in leaves]
    state, length, text, outside = torch.get_rng_state(), len(tape), str(tape), len(te.global_tape())
    assert te.check(C)
    assert torch.equal(torch.get_rng_state(), state)
    assert (len(tape), str(tape), len(te.global_tape())) == (length, text, outside)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    assert [leaf._version for leaf in leaves] == versions
    assert all(leaf.grad is None and not hasattr(leaf, "g") for leaf in leaves)
    te.backward(C)
    assert all(hasattr(each, "g") for each in inputs)


def test_a_leaf_that_a_recorded_write_changed_is_checked_with_what_it_held() -> None:
    x = torch.tensor([1.0, 2.0])
    with te.record():
        C = (x * x).sum()
    x.add_(1)
    assert te.check(C)


def test_a_tensor_that_is_not_reached_is_said_to_be() -> None:
    x, other = torch.randn(3), torch.randn(3)
    with te.record():
        C = (x * x).sum() + 0 * other.detach().sum()
    report = te.check(C, x, other)
    assert report
    assert set(report.agrees) == {"x", "other"}


def test_what_cannot_be_checked_again_is_an_error() -> None:
    C = torch.randn(())
    with pytest.raises(te.NotRecordedError, match=r"te\.check: C is on no tape"):
        te.check(C)
    x = torch.randn(3)
    with te.record():
        C = (x * x).sum()
    with pytest.raises(te.DTypeError, match=r"te\.check takes tensors after the first, not str"):
        te.check(C, "x")  # type: ignore[arg-type]
    x.data = torch.ones(3)
    with pytest.raises(te.OverwrittenError, match=r"x that the rule of mul reads|x was changed since it was recorded"):
        te.check(C)


@pytest.mark.parametrize("twice", [False, True])
def test_statistics_that_training_has_moved_on_are_checked_as_they_became(twice: bool) -> None:
    """What they were before is kept by nobody; evaluation reads what they are then."""
    torch.manual_seed(0)
    norm, x = torch.nn.BatchNorm1d(3), torch.randn(5, 3)
    with te.record():
        y = norm(norm(x) * 2) if twice else norm(x)
        norm.eval()
        C = (norm(y * 3 + 1) * torch.arange(3)).square().sum()
    report = te.check(C)
    assert report, str(report)
