"""lin, relu and mse: the article's values and gradients, by every way that leads onto a tape."""

from __future__ import annotations

import copy
import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine import data
from tests.article import VERSIONS, closed_form
from tests.helpers import Tensor, agree, close, g_of, grad_of, plain, reference, unshared

Ways = Callable[[Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor]]
MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


# -- the ways --------------------------------------------------------------------------------------


def paired(Z: Tensor, Y: Tensor) -> Tensor:
    return Y.unsqueeze(-1) if Y.ndim == Z.ndim - 1 else Y


def on_global_tape(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Z = te.lin(X, w, b)
    U = te.relu(Z)
    C = te.mse(U, Y)
    return Z, U, C


def named_in_block(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with te.record():
        return on_global_tape(X, w, b, Y)


def plain_torch(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with te.record():
        Z = X @ w if b is None else X @ w + b
        U = Z.clamp_min(0.0)
        C = (U - paired(U, Y)).pow(2).mean()
    return Z, U, C


def functional(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with te.record():
        Z = torch.nn.functional.linear(X, w.t())
        if b is not None:
            Z = Z + b
        U = torch.relu(Z)
        C = torch.nn.functional.mse_loss(U, paired(U, Y))
    return Z, U, C


def plain_after_named(X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Z = te.lin(X, w, b)
    U = Z.clamp_min(0.0)  # plain torch on a recorded value, outside a block
    C = ((U - paired(U, Y)) ** 2).mean()
    return Z, U, C


#: clamp_min, as opposed to relu, gives at the bound what this release of torch gives.
CLAMPED: list[Ways] = [plain_torch, plain_after_named]
WAYS: list[Ways] = [on_global_tape, named_in_block, plain_torch, functional, plain_after_named]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)


def draw(
    n: int, d: int, m: int, bias: int | None, flat_Y: bool = False, dtype: torch.dtype = torch.float64
) -> list[Any]:
    X, w = torch.randn(n, d, dtype=dtype), torch.randn(d, m, dtype=dtype)
    b = None if bias is None else torch.randn(bias, dtype=dtype)
    Y = torch.randn(n, dtype=dtype) if flat_Y else torch.randn(n, m, dtype=dtype)
    return [X, w, b, Y]


def hold_against_article(way: Ways, X: Tensor, w: Tensor, b: Tensor | None, Y: Tensor, tol: float = 1e-10) -> None:
    copies = [None if t is None else plain(t) for t in (X, w, b, Y)]
    X0, w0, b0, Y0 = copies
    assert X0 is not None
    assert w0 is not None
    assert Y0 is not None
    Z, U, C = way(X, w, b, Y)
    te.backward(C)
    for version in VERSIONS:
        wanted = version(X0, w0, b0, Y0)
        close(C, wanted.C, tol)
        for name, t in (("X", X), ("w", w), ("b", b), ("Z", Z), ("U", U)):
            if t is not None:
                close(g_of(t), getattr(wanted, name), tol)
    close(g_of(C), torch.ones_like(plain(C)))
    unshared(*[g for t in (X, w, b, Z, U, C, Y) if t is not None and (g := g_of(t)) is not None], plain(X))


# -- the article's gradients -----------------------------------------------------------------------


@ways
@pytest.mark.parametrize(
    ("n", "d", "m", "bias", "flat_Y"),
    [
        (7, 5, 1, 1, True),
        (7, 5, 1, 1, False),
        (7, 5, 4, 4, False),
        (7, 5, 4, 1, False),
        (7, 5, 4, None, False),
        (1, 1, 1, 1, True),
        (1, 1, 1, None, False),
        (3, 200, 50, 50, False),
        (64, 784, 1, 1, True),
    ],
)
def test_gradients_are_the_article_s(way: Ways, n: int, d: int, m: int, bias: int | None, flat_Y: bool) -> None:
    hold_against_article(way, *draw(n, d, m, bias, flat_Y))


@ways
def test_gradients_in_float32(way: Ways) -> None:
    X, w, b, Y = draw(32, 20, 3, 3, dtype=torch.float32)
    hold_against_article(way, X, w, b, Y, tol=1e-4)


def at_the_kink() -> list[Tensor]:
    X, w, b, Y = draw(12, 4, 3, 3)
    X[::3] = 0.0
    b.zero_()  # every third row gives exactly 0
    X[1], w[:, 0], Y[1] = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([0.5, 0.5, 0.25, 0.25]), 3.0
    assert ((X @ w + b) == 0).sum() > 12
    return [X, w, b, Y]


@pytest.mark.parametrize("way", [way for way in WAYS if way not in CLAMPED], ids=lambda f: f.__name__)
def test_rows_exactly_at_the_kink(way: Ways) -> None:
    X, w, b, Y = at_the_kink()
    hold_against_article(way, X, w, b, Y)
    assert not plain(X.g)[::3].any()


@pytest.mark.parametrize("way", CLAMPED, ids=lambda f: f.__name__)
def test_clamp_min_at_its_bound_is_torch_s(way: Ways) -> None:
    X, w, b, Y = at_the_kink()
    wanted = reference(lambda X, w, b, Y: ((X @ w + b).clamp_min(0.0) - Y).pow(2).mean(), X, w, b, Y)
    te.backward(way(X, w, b, Y)[2])
    agree([X, w, b, Y], wanted)  # up to 2.13 the gradient passes at the bound, from 2.14 on it does not


@ways
def test_every_row_closed_and_every_row_open(way: Ways) -> None:
    for shift in (-100.0, 100.0):
        X, w, b, Y = draw(6, 3, 2, 2)
        b += shift
        hold_against_article(way, X, w, b, Y)


@ways
def test_non_contiguous_operands(way: Ways) -> None:
    X = torch.randn(5, 7, dtype=torch.float64).t()
    w = torch.randn(10, 8, dtype=torch.float64)[::2, ::2]
    Y = torch.randn(4, 7, dtype=torch.float64).t()
    b = torch.randn(8, dtype=torch.float64)[1::2]
    hold_against_article(way, X, w, b, Y)


@ways
def test_an_expanded_bias_and_target(way: Ways) -> None:
    X, w, _, _ = draw(5, 3, 4, None)
    hold_against_article(
        way, X, w, torch.tensor(0.3, dtype=torch.float64).expand(4), torch.tensor(1.5, dtype=torch.float64).expand(5, 4)
    )


def real_digits() -> tuple[Tensor, Tensor]:
    """300 digits of MNIST where they are at hand, otherwise of those that scikit-learn carries."""
    if not MNIST.exists():
        digits = data.digits()
        return digits.images[:300].double(), digits.labels[:300]
    with gzip.open(MNIST / "t10k-images-idx3-ubyte.gz") as file:
        pixels = torch.frombuffer(bytearray(file.read(16 + 300 * 784)[16:]), dtype=torch.uint8)
    with gzip.open(MNIST / "t10k-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read(8 + 300)[8:]), dtype=torch.uint8)
    return pixels.reshape(300, 784).double() / 255, labels


@ways
def test_gradients_of_300_real_digits(way: Ways) -> None:
    X, labels = real_digits()
    Y = labels.to(torch.float64)
    assert X.shape[0] == 300
    assert Y.unique().numel() == 10
    assert 0.1 < X.mean() < 0.4
    D = X.shape[1]
    w = torch.randn(D, 1, dtype=torch.float64) / math.sqrt(D)
    hold_against_article(way, X, w, torch.full((1,), 0.1, dtype=torch.float64), Y)
    hold_against_article(
        way,
        plain(X),
        torch.randn(D, 10, dtype=torch.float64),
        torch.randn(10).double(),
        torch.eye(10).double()[labels.long()],
    )


def test_an_nn_linear() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU()).double()
    X, Y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    with te.record():
        Z = net[0](X)
        U = net[1](Z)
        C = torch.nn.functional.mse_loss(U, Y)
    te.backward(C)
    wanted = closed_form(X, plain(net[0].weight).t(), plain(net[0].bias), Y)
    close(grad_of(net[0].weight), wanted.w.t())
    close(grad_of(net[0].bias), wanted.b)
    close(grad_of(X), wanted.X)
    close(Z.g, wanted.Z)
    close(U.g, wanted.U)


@pytest.mark.parametrize("lead", [(2,), (3, 2), (1, 1), (0,)])
@pytest.mark.parametrize("bias", [4, 1, None])
def test_lin_with_leading_dimensions(lead: tuple[int, ...], bias: int | None) -> None:
    X = torch.randn(*lead, 5, 3, dtype=torch.float64)
    w = torch.randn(3, 4, dtype=torch.float64)
    operands = [X, w] if bias is None else [X, w, torch.randn(bias, dtype=torch.float64)]
    seed = torch.randn(*lead, 5, 4, dtype=torch.float64)
    wanted = reference(lambda X, w, b=None: ((X @ w if b is None else X @ w + b) * seed).sum(), *operands)
    Z = te.lin(*operands)
    assert Z.shape == (*lead, 5, 4)
    te.backward(Z, seed)
    for t, reference_g in zip(operands, wanted, strict=True):
        close(grad_of(t), reference_g)


def test_complex_lin() -> None:
    X, w, b = (torch.randn(*s, dtype=torch.complex128) for s in ((5, 3), (3, 2), (2,)))
    seed = torch.randn(5, 2, dtype=torch.complex128)
    copies = [plain(t).requires_grad_() for t in (X, w, b)]
    wanted = torch.autograd.grad(copies[0] @ copies[1] + copies[2], copies, seed)
    te.backward(te.lin(X, w, b), seed)
    agree([X, w, b], list(wanted))


@pytest.mark.parametrize("n", [0, 1])
def test_zero_size_operands(n: int) -> None:
    X, w, b = torch.randn(n, 3), torch.randn(3, 2), torch.randn(2)
    te.backward(te.lin(X, w, b).sum())
    assert grad_of(X).shape == (n, 3)
    assert grad_of(w).shape == (3, 2)
    assert grad_of(b).tolist() == [n, n]
    X, w = torch.randn(4, 0), torch.randn(0, 2)
    te.backward(te.lin(X, w).sum())
    assert grad_of(X).shape == (4, 0)
    assert grad_of(w).shape == (0, 2)


# -- conventions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_relu_is_zero_at_zero(dtype: torch.dtype) -> None:
    Z = torch.tensor([-1.0, -0.0, 0.0, 1e-4, 2.0], dtype=dtype)
    U = te.relu(Z)
    assert U.dtype == dtype
    te.backward(U, torch.full_like(plain(U), 3.0))
    assert grad_of(Z).tolist() == [0.0, 0.0, 0.0, 3.0, 3.0]
    assert grad_of(Z).dtype == dtype


def test_relu_lets_nan_and_infinities_through() -> None:
    Z = torch.tensor([float("nan"), float("inf"), -float("inf")])
    U = te.relu(Z)
    torch.testing.assert_close(plain(U), torch.relu(plain(Z)), equal_nan=True)
    te.backward(U, torch.ones(3))
    assert grad_of(Z).tolist()[1:] == [1.0, 0.0]


def test_the_gradient_of_mse_leads_downhill() -> None:
    U, Y = torch.tensor([3.0]), torch.tensor([1.0])
    te.backward(te.mse(U, Y))
    assert grad_of(U).tolist() == [4.0]  # 2 (U - Y) / N: the derivation's sign
    assert grad_of(Y).tolist() == [-4.0]


def test_mse_averages_over_all_elements() -> None:
    U, Y = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    wanted = 2 * (U - Y) / 24
    C = te.mse(U, Y)
    close(C, torch.nn.functional.mse_loss(plain(U), plain(Y)))
    te.backward(C)
    close(grad_of(U), wanted)
    close(grad_of(Y), -wanted)


FITTING = [
    ((5, 1), (5,)),
    ((5, 1), (5, 1)),
    ((5,), (5,)),
    ((4, 3), (4, 3)),
    ((), ()),
    ((1, 1), (1,)),
    ((2, 3, 4), (2, 3, 4)),
    ((1,), (1,)),
]


@pytest.mark.parametrize(("of_U", "of_Y"), FITTING)
def test_mse_takes_these_pairs(of_U: tuple[int, ...], of_Y: tuple[int, ...]) -> None:
    U, Y = torch.randn(of_U, dtype=torch.float64), torch.randn(of_Y, dtype=torch.float64)
    wanted = reference(lambda U, Y: (U.reshape(-1) - Y.reshape(-1)).pow(2).mean(), U, Y)
    C = te.mse(U, Y)
    assert C.shape == ()
    te.backward(C)
    close(grad_of(U), wanted[0])
    close(grad_of(Y), wanted[1])


SHAPES = [
    (),
    (1,),
    (5,),
    (1, 1),
    (5, 1),
    (1, 5),
    (5, 5),
    (5, 1, 1),
    (1, 5, 1),
    (2, 5, 1),
    (5, 2),
    (2, 5),
    (0,),
    (0, 1),
    (1, 0),
]


@pytest.mark.parametrize("of_U", SHAPES)
@pytest.mark.parametrize("of_Y", SHAPES)
def test_mse_refuses_every_other_pair(of_U: tuple[int, ...], of_Y: tuple[int, ...]) -> None:
    U, Y = torch.randn(of_U), torch.randn(of_Y)
    fits = of_U == of_Y or (len(of_U) == 2 and of_U[1] == 1 and of_Y == (of_U[0],))
    if fits:
        assert te.mse(U, Y).shape == ()
        return
    with pytest.raises(te.ShapeError) as caught:
        te.mse(U, Y)
    assert isinstance(caught.value, ValueError)
    assert len(te.global_tape()) == 0
    text = str(caught.value)
    assert str(of_U) in text
    assert str(of_Y) in text


@pytest.mark.parametrize(
    ("X", "w", "b"),
    [
        ((5, 3), (4, 2), None),
        ((3,), (3, 2), None),
        ((), (3, 2), None),
        ((5, 3), (3,), None),
        ((5, 3), (), None),
        ((5, 3), (2, 3, 2), None),
        ((5, 3), (3, 2), (3,)),
        ((5, 3), (3, 2), (2, 1)),
        ((5, 3), (3, 2), (1, 2)),
        ((5, 3), (3, 2), (5, 2)),
        ((5, 3), (3, 2), ()),
        ((5, 3), (3, 2), (0,)),
        ((2, 3), (3, 2), (2, 2)),
    ],
)
def test_lin_refuses_what_does_not_fit(X: tuple[int, ...], w: tuple[int, ...], b: tuple[int, ...] | None) -> None:
    with pytest.raises(te.ShapeError) as caught:
        te.lin(torch.randn(X), torch.randn(w), None if b is None else torch.randn(b))
    text = str(caught.value)
    for shape in (X, w, b):
        assert shape is None or str(shape) in text
    assert "fix: " in text
    assert len(te.global_tape()) == 0


# -- one call, one node ----------------------------------------------------------------------------


def test_each_call_is_one_node() -> None:
    X, w, b, Y = draw(4, 3, 1, 1, True)
    for block in (False, True):
        if block:
            with te.record() as tape:
                C = on_global_tape(X, w, b, Y)
        else:
            tape = te.global_tape()
            C = on_global_tape(X, w, b, Y)
        assert [node.op.name for node in tape.nodes] == ["lin", "relu", "mse"]
        assert [node.rule for node in tape.nodes] == ["lin_grad", "relu_grad", "mse_grad"]
        assert len(tape) == 3
        assert len(tape.values) == 7
        del C


def test_keywords_and_order() -> None:
    X, w, b, Y = draw(4, 3, 1, 1, True)
    wanted = closed_form(*map(plain, (X, w, b, Y)))
    C = te.mse(Y=Y, U=te.relu(Z=te.lin(b=b, X=X, w=w)))
    te.backward(C)
    close(X.g, wanted.X)
    close(w.g, wanted.w)
    close(b.g, wanted.b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_are_those_of_plain_torch_to_the_bit(dtype: torch.dtype) -> None:
    X, w, b, Y = draw(33, 17, 5, 5, dtype=dtype)
    Z, U, C = plain_torch(*map(plain, (X, w, b, Y)))
    for got, wanted in zip(on_global_tape(X, w, b, Y), (Z, U, C), strict=True):
        assert torch.equal(plain(got), plain(wanted))


def test_operands_that_require_grad_keep_torch_s_own_gradient() -> None:
    X, w, b, Y = draw(6, 3, 2, 2)
    w.requires_grad_()
    b.requires_grad_()
    _, _, C = on_global_tape(X, w, b, Y)
    assert C.requires_grad
    C.backward()
    te.backward(C)
    close(w.g, w.grad)
    close(b.g, b.grad)
    wanted = closed_form(*map(plain, (X, w, b, Y)))
    close(w.g, wanted.w)
    assert not w.g.requires_grad


def test_the_target_has_a_gradient_too() -> None:
    X, w, b, Y = draw(6, 3, 1, 1, True)
    wanted = reference(lambda X, w, b, Y: (torch.relu(X @ w + b).squeeze(-1) - Y).pow(2).mean(), X, w, b, Y)
    te.backward(on_global_tape(X, w, b, Y)[2])
    agree([X, w, b, Y], wanted)


def test_integer_targets_pair_too() -> None:
    U, Y = torch.randn(5, 1), torch.arange(5)
    C = te.mse(U, Y)
    assert C.dtype == torch.float32
    te.backward(C)
    close(grad_of(U), 2 * (plain(U) - Y.reshape(5, 1)) / 5, 1e-5)
    assert g_of(Y) is None


def test_operations_may_be_copied_and_have_help() -> None:
    for op in (te.lin, te.relu, te.mse):
        assert op.__doc__
        assert "Raises" in op.__doc__
        assert copy.copy(op) is not None
        assert op.samples
        assert op.formula


def test_half_precision_linear() -> None:
    X, w, b = torch.randn(4, 3).bfloat16(), torch.randn(3, 2).bfloat16(), torch.randn(2).bfloat16()
    te.backward(te.lin(X, w, b), torch.ones(4, 2, dtype=torch.bfloat16))
    for t in (X, w, b):
        assert grad_of(t).dtype == torch.bfloat16
        assert grad_of(t).shape == t.shape
