"""Every rule on the table, checked by the samples that it carries; and the checks, by rules that are wrong.

The checks themselves are in `rule_checks`. At the end whole computations, as a user writes them, go
through the recorder, the rules and the sweep, and once more through the recorded sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tape_engine import rule_checks as checks

import tape_engine as te
from tape_engine import registry
from tape_engine.registry import Op, sample, spec

Tensor = torch.Tensor
aten = torch.ops.aten
F = torch.nn.functional

OPS = [each for each in registry.ops() if each.grad is not None]

#: Rules without samples of their own, and the test here that checks them instead.
ELSEWHERE = {
    aten.linalg_eig.default: "linalg_eig",  # its loss must not depend on the phases of the vectors
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: "attention",  # torch has no second derivative
}


def title(op: Op) -> str:
    return op.name if op.is_named else str(op.forward).removeprefix("aten.")


@pytest.mark.parametrize("op", OPS, ids=title)
def test_rule(op: Op) -> None:
    for number, each in enumerate(op.samples):
        for variant, call in checks.calls(op, each):
            if not checks.takes_strides(call):
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
        for variant, call in checks.calls(op, each):
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


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def of_module(module: torch.nn.Module, *inputs: Tensor, loss: Callable[[Any], Tensor] | None = None) -> tuple[Any, ...]:
    """A module as a function of its inputs and parameters."""
    module = module.double()
    names = [name for name, _ in module.named_parameters()]
    parameters = [p.detach().clone() for p in module.parameters()]

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors[len(inputs) :], strict=True))
        out = torch.func.functional_call(module, given, tensors[: len(inputs)])
        return loss(out) if loss else (out * out).sum()

    return run, *inputs, *parameters


def perceptron() -> tuple[Any, ...]:
    layers = torch.nn
    net = layers.Sequential(layers.Linear(4, 6), layers.Tanh(), layers.LayerNorm(6), layers.GELU(), layers.Linear(6, 3))
    labels = torch.tensor([0, 2, 1, 2, 0])
    return of_module(net, rand(5, 4), loss=lambda out: F.cross_entropy(out, labels, label_smoothing=0.1))


def plain_perceptron() -> tuple[Any, ...]:
    def run(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        hidden = (x @ w + b).clamp(min=0.0)
        scores = hidden @ v - 0.5 * hidden.mean(1, keepdim=True)
        chosen = scores.log_softmax(1)[torch.arange(5), torch.tensor([0, 1, 2, 0, 1])]
        return -chosen.mean() + 1e-2 * (w**2).sum() / 2 + (3 - v).abs().sum()

    return run, rand(5, 4), rand(4, 6), rand(6), rand(6, 3)


def in_place() -> tuple[Any, ...]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        z = x * 2
        z.add_(y).mul_(x)
        z[1] = y[0] ** 2
        z[:, 2:].sub_(x[:, :2])
        z.transpose(0, 1)[0].exp_()
        return (z.sigmoid_() * y).sum()

    return run, rand(3, 4), rand(3, 4)


def convolutional() -> tuple[Any, ...]:
    layers = torch.nn
    net = layers.Sequential(
        layers.Conv2d(2, 4, 3, padding=1),
        layers.BatchNorm2d(4, track_running_stats=False),
        layers.SiLU(),
        layers.MaxPool2d(2),
        layers.Conv2d(4, 4, 2, bias=False, groups=2),
        layers.GroupNorm(2, 4),
        layers.Upsample(scale_factor=2, mode="bilinear"),
        layers.ConvTranspose2d(4, 2, 2, stride=2),
        layers.AdaptiveAvgPool2d(1),
        layers.Flatten(),
    )
    return of_module(net, rand(2, 2, 6, 6))


def attention() -> tuple[Any, ...]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (causal * F.scaled_dot_product_attention(q, k, v, scale=0.7)).sum()

    return run, rand(1, 2, 3, 4), rand(1, 2, 3, 4), rand(1, 2, 3, 4)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    causal = (q @ k.mT * 0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    return (causal * ((q @ k.mT * 0.7).softmax(-1) @ v)).sum()


def transformer() -> tuple[Any, ...]:
    block = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
    return of_module(block.train(), rand(2, 3, 4))


def recurrent() -> tuple[Any, ...]:
    return of_module(torch.nn.LSTM(3, 4), rand(3, 2, 3), loss=lambda out: (out[0] ** 2).sum() + out[1][1].sum())


def gated() -> tuple[Any, ...]:
    return of_module(torch.nn.GRU(3, 4, 2), rand(3, 2, 3), loss=lambda out: (out[0] ** 2).sum())


def indexed() -> tuple[Any, ...]:
    def run(x: Tensor, table: Tensor) -> Tensor:
        rows = F.embedding(torch.tensor([1, 3, 1]), table)
        best = torch.topk(x, 2, dim=1)
        spread = torch.zeros(3, 5, dtype=x.dtype).scatter_add(1, best.indices, best.values * rows[:, :2])
        spread[spread > 1] = 0.5
        wide = torch.cat([spread, x.gather(1, best.indices), x.index_select(1, torch.tensor([0, 0]))], 1)
        return (torch.stack(wide.chunk(3, 1)[:2]).sort(0).values ** 2).sum() + wide[:, ::2].amax(1).prod()

    return run, rand(3, 4), rand(4, 4)


def summed() -> tuple[Any, ...]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        a = torch.einsum("ij,kj->ik", x, y) / x.norm(dim=1, keepdim=True)
        b = x.std(0) + y.var(unbiased=False) + x.logsumexp(1).sum() + x.cumsum(1).prod(1).sum()
        return a.sum() * b.sum() + F.cosine_similarity(x, y).sum() + (x.cumprod(1) * y).sum() + x.logcumsumexp(0).sum()

    return run, rand(3, 4), rand(3, 4)


def complex_numbers() -> tuple[Any, ...]:
    def run(x: Tensor, z: Tensor) -> Tensor:
        turned = torch.fft.fft(x * z.exp()) @ z.mH.unsqueeze(-1)
        return (turned * turned.conj()).real.sum() + z.abs().sum() + torch.fft.irfft(torch.fft.rfft(x) * z[:3]).sum()

    return run, rand(4), rand(4, dtype=torch.complex128)


def decompositions() -> tuple[Any, ...]:
    def run(x: Tensor, b: Tensor) -> Tensor:
        s = x @ x.mT + torch.eye(3, dtype=x.dtype)
        factor = torch.linalg.cholesky(s)
        values, vectors = torch.linalg.eigh(s)
        u, sizes, vh = torch.linalg.svd(x, full_matrices=False)
        q, r = torch.linalg.qr(x)
        whole = torch.cholesky_solve(b, factor).sum() + torch.logdet(s) + (vectors * values).sin().sum()
        return whole + (u @ sizes.sqrt().diag() @ vh * q).sum() + r.abs().sum() + torch.linalg.inv(s)[0, 1]

    return run, rand(3, 3), rand(3, 2)


def eigenvalues() -> tuple[Any, ...]:
    def run(x: Tensor) -> Tensor:
        values, vectors = torch.linalg.eig(x)
        # of the vectors only the projectors v w*, which no phase changes
        projector = vectors[:, :1] @ torch.linalg.inv(vectors)[:1]
        return (values * values.conj()).real.sum() + (projector * projector.conj()).real.sum()

    return run, rand(3, 3)


def spectra() -> tuple[Any, ...]:
    def run(x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.mT).log().sum() + torch.linalg.svdvals(x).prod() + torch.linalg.det(x) ** 2

    return run, rand(3, 3)


COMPUTATIONS: list[tuple[str, Callable[[], tuple[Any, ...]]]] = [
    ("perceptron", perceptron),
    ("plain perceptron", plain_perceptron),
    ("in place", in_place),
    ("convolutional", convolutional),
    ("attention", attention),
    ("transformer", transformer),
    ("recurrent", recurrent),
    ("gated", gated),
    ("indexed", indexed),
    ("summed", summed),
    ("complex numbers", complex_numbers),
    ("decompositions", decompositions),
    ("linalg_eig", eigenvalues),
    ("spectra", spectra),
]

REFERENCES = {"attention": attention_reference}


@pytest.mark.parametrize(("name", "make"), COMPUTATIONS, ids=[name for name, _ in COMPUTATIONS])
def test_computation(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    """Recorded and swept, and the sweep recorded and swept: as torch.autograd has both, strict throughout."""
    torch.manual_seed(3)
    run, *tensors = make()
    leaves = [t.clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(REFERENCES.get(name, run)(*leaves), leaves, create_graph=True)
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
    assert "mkldnn_rnn_layer" in {node.op.name for node in tape.nodes} or not torch.backends.mkldnn.is_available()
    for ours, theirs in zip(te.grad(loss, parameters), expected, strict=True):
        checks.close(ours, theirs, "gradient", 1e-4)


def test_a_dropout_mask_is_the_same_forward_and_backward() -> None:
    x = torch.ones(200, dtype=torch.float64)
    with te.record(strict=True):
        out = F.dropout(x, 0.4)
    (found,) = te.grad(out, x, torch.ones_like(out))
    assert found is not None
    assert torch.equal(found, out)
    assert 0 < int((found == 0).sum()) < 200
