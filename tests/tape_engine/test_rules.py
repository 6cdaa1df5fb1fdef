"""Every rule on the table, checked by the samples that it carries; and the checks, by rules that are wrong.

The checks themselves are in `rule_checks`. At the end whole computations, as a user writes them, go
through the recorder, the rules and the sweep, and once more through the recorded sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine import registry
from tape_engine.registry import Op, declare, ops, rule, sample, spec
from tape_engine.rules import bounds
from tape_engine.rules.common import Overloads, rule_name
from tests.tape_engine import rule_checks as checks
from tests.tape_engine.computations import COMPUTATIONS, attention_reference, bags_reference
from tests.tape_engine.rule_calls import calls

Tensor = torch.Tensor
aten = torch.ops.aten
F = torch.nn.functional

OPS = [
    each
    for each in registry.ops()
    if each.grad is not None and (not each.is_named or each.forward.__module__.startswith("tape_engine."))
]

#: Rules without samples of their own, and the test here that checks them instead.
ELSEWHERE = {
    aten._embedding_bag_forward_only.default: "bags",  # torch's autograd does not take it
    aten.linalg_eig.default: "linalg_eig",  # its loss must not depend on the phases of the vectors
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: "attention",  # torch has no second derivative
}


def title(op: Op) -> str:
    return op.name if op.is_named else str(op.forward).removeprefix("aten.")


@pytest.mark.parametrize("op", OPS, ids=title)
def test_rule(op: Op) -> None:
    for number, each in enumerate(op.samples):
        for variant, call in calls(op, each):
            if variant == "strided" and not checks.takes_strides(call):
                continue
            for check in checks.checks_of(op, variant):
                try:
                    check(call)
                except Exception as error:
                    where = f"{title(op)}, sample {number}, {variant}, {check.__name__}"
                    raise AssertionError(f"{where}:\n{error}") from error


def test_every_rule_carries_samples() -> None:
    assert {op.forward for op in OPS if not op.samples} == set(ELSEWHERE)
    assert set(ELSEWHERE.values()) <= {name for name, *_ in COMPUTATIONS}


def test_no_operation_is_both_ruled_and_declared() -> None:
    assert [title(op) for op in OPS if not op.differentiable] == []


def test_a_rule_is_named_after_its_operation_or_says_what_it_is_a_rule_of() -> None:
    assert [title(op) for op in OPS if not op.grad.__name__.endswith("_grad")] == []  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["no_such_operation.default", "add.NoSuchOverload", "matmul.default"])
def test_a_rule_for_what_this_torch_lacks_or_takes_apart_is_left_out(name: str) -> None:
    """Releases differ in what is an operation: `cholesky` is none after 2.13, and `ldexp` was none up to 2.8."""
    packet, _, overload = name.partition(".")
    target = getattr(getattr(Overloads(), packet), overload)
    before = ops()

    def grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g

    assert rule(target, samples=[sample(spec(3))])(grad) is grad
    declare(target)
    assert ops() == before
    assert rule_name(target) == f"{packet}_grad"
    assert Overloads().mm.default is torch.ops.aten.mm.default


#: x, the lower and the upper bound, then for each its share of the gradient, read off torch 2.14.
SINCE_2_14 = """
    0 0 0   1  0  0     0 0 1   .5 .5 0     0 1 0   0 0 1     0 1 1   0 1 0     0 2 1   0 0 1     1 0 0   0 0 1
    1 0 1   .5 0  .5    1 0 2   1  0  0     1 1 0   0 0 1     1 1 1   1 0 0     1 1 2   .5 .5 0   1 2 0   0 0 1
    1 2 1   0  0  1     1 2 2   0  1  0     2 0 1   0 0 1     2 0 2   .5 0 .5   2 1 1   0 0 1     2 2 1   0 0 1
    0 nan nan 1 0 0     1 nan 1 1  0  0     1 1 nan 1 0 0     nan 0 1 1 0 0     nan 1 0 1 0 1
"""


def test_clamps_and_ties_since_2_14(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever torch is at hand: the table is that of the release that changed it."""
    monkeypatch.setattr(bounds, "SHARED", True)
    numbers = torch.tensor([float(each) for each in SINCE_2_14.split()], dtype=torch.float64).reshape(-1, 6)
    x, low, high = numbers[:, :3].unbind(1)
    g = torch.ones_like(x)
    for found, wanted in zip(bounds.clamp_tensor_grad(g, None, x, low, high), numbers[:, 3:].unbind(1), strict=True):
        assert torch.equal(found, wanted)
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    one, g = torch.ones_like(x), torch.ones_like(x)
    assert bounds.clamp_grad(g, None, x, 1.0, 2.0).tolist() == [0, 0, 0]
    assert bounds.clamp_min_grad(g, None, x, 1.0).tolist() == [0, 0, 1]
    assert bounds.clamp_max_grad(g, None, x, 1.0).tolist() == [1, 0, 0]
    larger, smaller = [[0, 0.5, 1], [1, 0.5, 0]], [[1, 0.5, 0], [0, 0.5, 1]]
    for grad, shares in [
        (bounds.fmax_grad, larger),
        (bounds.fmin_grad, smaller),
        (bounds.clamp_min_tensor_grad, larger),
        (bounds.clamp_max_tensor_grad, smaller),
    ]:
        assert [each.tolist() for each in grad(g, None, x, one)] == shares
    assert [each.tolist() for each in bounds.clamp_tensor_grad(g, None, x, one)[:2]] == larger


def test_the_operations_of_the_common_architectures_have_rules_or_are_declared() -> None:
    """The functional overloads that an MLP, a CNN, an LSTM and a transformer reach, checked while recording."""
    torch.manual_seed(3)
    with te.record(strict=True) as tape:
        for forward, *tensors in (make() for _, make in COMPUTATIONS):
            forward(*tensors)
    assert len(tape) > 300


# -- the tester is tested ------------------------------------------------------------------------------


def made(forward: Callable[..., Any], wrong: Callable[..., Any], *samples: registry.Sample, **kwargs: Any) -> Op:
    """An operation with a wrong rule, on no table."""
    op = Op(forward, name="made", samples=samples, **kwargs)
    op.rule(wrong)
    return op


def failures(op: Op) -> set[str]:
    """The checks that fail, each with the variant on which it did."""
    found = set()
    for each in op.samples:
        for variant, call in calls(op, each):
            for check in checks.checks_of(op, variant):
                try:
                    check(call)
                except Exception:
                    found.add(f"{check.__name__.removeprefix('check_')} {variant}")
    return found


def product(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def matrix_product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


PLAIN = {"autograd plain", "differences plain", "second plain", "recorded plain"}


def test_a_right_rule_passes() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return g * w.conj(), g * x.conj()

    pair, numbers = (spec(2, 3), spec(2, 3)), (spec(2, 3), spec(2, 3, dtype=torch.complex128))
    assert failures(made(product, grad, sample(*pair), sample(*numbers), sample(spec(3), spec(2, 3)))) == set()


def test_a_rule_off_by_a_factor_fails_every_check() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return g * w, 2 * g * x

    found = failures(made(product, grad, sample(spec(2, 3), spec(2, 3))))
    assert found >= PLAIN | {"autograd strided", "autograd twice", "differences twice"}


def test_a_transposed_gradient_fails_every_check() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return g @ w, x.t() @ g

    assert failures(made(matrix_product, grad, sample(spec(3, 3), spec(3, 3)))) >= PLAIN


def test_a_missing_conjugate_fails_where_numbers_are_complex() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return g * w, g * x

    assert failures(made(product, grad, sample(spec(2), spec(2)))) == set()
    numbers = spec(2, dtype=torch.complex128)
    assert failures(made(product, grad, sample(numbers, numbers))) >= PLAIN


def test_a_rule_that_is_right_once_fails_the_second_derivative() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor) -> Any:
        return 3 * g * x.detach() ** 2

    op = made(lambda x: x**3, grad, sample(spec(4)))
    assert failures(op) == {"second plain", "recorded plain"}


def test_a_wrong_side_of_a_kink_fails_against_autograd() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor) -> Any:
        return torch.where(x >= 0, g, 0)

    away, at = sample(spec(3)), sample(spec(3, values=[-1.0, 0.0, 1.0]))
    assert failures(made(aten.relu.default, grad, away)) <= {"recorded plain"}
    assert "autograd plain" in failures(made(aten.relu.default, grad, away, at))


def test_a_rule_that_goes_by_memory_fails_with_strides() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor) -> Any:
        return 2 * g * x.as_strided(x.shape, [3, 1])

    assert failures(made(lambda x: x**2, grad, sample(spec(2, 3)))) == {"autograd strided"}


def test_a_rule_that_forgets_the_same_tensor_twice_fails() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return (g * w, None) if x is w else (g * w, g * x)

    found = failures(made(product, grad, sample(spec(2, 3), spec(2, 3))))
    assert found >= {"autograd twice", "differences twice", "second twice"}
    assert not found & (PLAIN | {"autograd strided"})


def test_a_rule_that_writes_to_what_it_was_given_fails() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        right = g * w, g * x
        g.mul_(2)
        return right

    assert "autograd plain" in failures(made(product, grad, sample(spec(2, 3), spec(2, 3))))


def test_a_rule_that_returns_too_few_or_misshapen_gradients_fails() -> None:
    def short(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return (g * w,)

    def misshapen(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return (g @ w.t()).sum(0), x.t() @ g

    assert failures(made(product, short, sample(spec(2, 3), spec(2, 3)))) >= {"autograd plain", "recorded plain"}
    found = failures(made(matrix_product, misshapen, sample(spec(2, 3), spec(3, 4))))
    assert found >= {"autograd plain", "recorded plain"}


def test_a_rule_that_asks_a_description_for_data_fails() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return g * w, g * x

    op = made(product, grad, sample(spec(2, 3), spec(2, 3)))
    op.saves = frozenset({"x"})  # as if the rule did not read w
    assert "autograd plain" in failures(op)


def test_a_gradient_that_is_declared_away_fails() -> None:
    def grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        return g * w, None

    assert failures(made(product, grad, sample(spec(2, 3), spec(2, 3)))) >= PLAIN


# -- whole computations ----------------------------------------------------------------------------------


def unfused(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """With attention as torch computes it by parts: of its fused kernel torch has no second derivative."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return run(*tensors)


#: The same computation by other operations, where torch has no second derivative of these.
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "attention": lambda run, *tensors: attention_reference(*tensors),
    "bags": lambda run, *tensors: bags_reference(*tensors),
}


@pytest.mark.parametrize(("name", "make"), COMPUTATIONS, ids=[name for name, _ in COMPUTATIONS])
def test_computation(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    """Recorded and swept, and the sweep recorded and swept: as torch.autograd has both, strict throughout."""
    torch.manual_seed(3)
    run, *tensors = make()
    leaves = [t.clone().requires_grad_() for t in tensors]
    reference: Callable[..., Tensor] = REFERENCES.get(name, unfused)
    first = torch.autograd.grad(reference(run, *leaves), leaves, create_graph=True)
    weights = [torch.randn(t.shape, dtype=t.dtype) for t in tensors]
    total = checks.dotted(list(zip(weights, first, strict=True)))
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    with te.record(strict=True):
        ours = te.grad(run(*tensors), tensors, record=True)
        assert all(each is not None for each in ours)
        again = te.grad(checks.dotted([(w, g) for w, g in zip(weights, ours, strict=True) if g is not None]), tensors)
    for place in range(len(tensors)):
        checks.close(ours[place], first[place], f"gradient {place}", 1e-9)
        checks.close(again[place], second[place], f"second gradient {place}", 1e-7)


def test_a_determinant_has_its_gradient_where_it_is_zero() -> None:
    x = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    with te.record(strict=True):
        det = torch.linalg.det(x)
    (found,) = te.grad(det, x)
    assert found is not None
    assert torch.allclose(found, torch.tensor([[4.0, -2.0], [-2.0, 1.0]], dtype=torch.float64), atol=1e-6)


def test_the_fused_layer_of_an_lstm_in_float32() -> None:
    torch.manual_seed(3)
    layer = torch.nn.LSTM(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad((layer(x)[0] ** 2).sum(), parameters)
    with te.record(strict=True) as tape:
        loss = (layer(x)[0] ** 2).sum()
    assert "mkldnn_rnn_layer" in {node.op.name for node in tape.nodes} or not torch._C._has_mkldnn
    for ours, theirs in zip(te.grad(loss, parameters), expected, strict=True):
        checks.close(ours, theirs, "gradient", 1e-4)


def test_the_mask_of_attention_has_its_gradients() -> None:
    """The fused kernel gives none; nor has it a second one, which is taken here of the formula written out."""
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 5, 5))
    mask = torch.randn(3, 5, dtype=torch.float64)
    by = [torch.randn(t.shape, dtype=t.dtype) for t in (q, k, v, mask)]
    leaves = [t.clone().requires_grad_() for t in (q, k, v, mask)]
    out = (leaves[0] @ leaves[1].mT / 2 + leaves[3]).softmax(-1) @ leaves[2]
    first = torch.autograd.grad((out**2).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(checks.dotted(list(zip(by, first, strict=True))), leaves)
    with te.record(strict=True) as tape:
        loss = (F.scaled_dot_product_attention(q, k, v, mask) ** 2).sum()
        ours = te.grad(loss, [q, k, v, mask], record=True)
        again = te.grad(
            checks.dotted([(w, g) for w, g in zip(by, ours, strict=True) if g is not None]), [q, k, v, mask]
        )
    assert "_scaled_dot_product_flash_attention_for_cpu" in {node.op.name for node in tape.nodes}
    for place in range(4):
        checks.close(ours[place], first[place], f"gradient {place}", 1e-9)
        checks.close(again[place], second[place], f"second gradient {place}", 1e-8)


def test_a_dropout_mask_is_the_same_forward_and_backward() -> None:
    x = torch.ones(200, dtype=torch.float64)
    with te.record(strict=True):
        out = F.dropout(x, 0.4)
    (found,) = te.grad(out, x, torch.ones_like(out))
    assert found is not None
    assert torch.equal(found, out)
    assert 0 < int((found == 0).sum()) < 200
