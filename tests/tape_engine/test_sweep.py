"""The reverse sweep: what it writes, what it leaves alone, what it refuses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tape_engine as te
from tests.helpers import Tensor, agree, close, error_text, g_of, grad_of, plain, reference, the, unshared

F = torch.nn.functional


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(shape, dtype=dtype)


class Heard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the torch operations that run inside it, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Holds a block to leave the tapes, the tensors and their ``.g`` as they were."""
    tape, depth = te.current_tape(), len(te.current_tape())
    before = [(t, plain(t), g_of(t), None if g_of(t) is None else plain(t.g)) for t in tensors]
    yield
    gc.collect()
    assert te.current_tape() is tape
    assert len(tape) == depth
    for t, contents, g, g_contents in before:
        assert torch.equal(plain(t), contents)
        assert g_of(t) is g
        assert g is None or (g_contents is not None and torch.equal(plain(g), g_contents))


def counted(name: str, factor: float = 2.0) -> tuple[Any, list[str]]:
    """A named operation ``factor · x`` that notes each evaluation of its rule."""
    calls: list[str] = []

    def forward(x: Tensor) -> Tensor:
        return x * factor

    made = te.op(name=name)(forward)

    @made.rule
    def counted_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        calls.append(name)
        return g * factor

    return made, calls


# -- .g on everything ------------------------------------------------------------------------------


def test_every_value_that_C_depends_on_has_g() -> None:
    X, w, b, Y = rand(6, 3), rand(3, 2), rand(2), rand(6, 2)
    with te.record() as tape:
        Z = X @ w + b
        A = torch.tanh(Z)
        S = A.sum(0)
        C = (S * S).sum() + F.mse_loss(A, Y)
        aside = Z * 3
    te.backward(C)
    for t in (X, w, b, Y, Z, A, S, C):
        assert grad_of(t).shape == t.shape
        assert grad_of(t).dtype == t.dtype
        assert grad_of(t).device == t.device
        assert grad_of(t).layout == torch.strided
        assert type(grad_of(t)) is Tensor
        assert not grad_of(t).requires_grad
    assert g_of(aside) is None
    assert grad_of(C).item() == 1.0
    wanted = reference(
        lambda X, w, b, Y: (torch.tanh(X @ w + b).sum(0) ** 2).sum() + F.mse_loss(torch.tanh(X @ w + b), Y), X, w, b, Y
    )
    agree([X, w, b, Y], wanted)
    assert len(tape) > 0


def test_integers_and_booleans_have_none() -> None:
    x = rand(4)
    with te.record():
        i = torch.tensor([2, 0])
        m = x > 0
        C = (x[i] * 2).sum() + torch.where(m, x, x * 3).sum() + (x * m).sum()
    te.backward(C)
    assert g_of(i) is None
    assert g_of(m) is None
    agree([x], reference(lambda x: (x[[2, 0]] * 2).sum() + torch.where(x > 0, x, x * 3).sum() + (x * (x > 0)).sum(), x))


def test_g_is_written_not_added() -> None:
    x = rand(3)
    for _ in range(3):
        te.backward(te.relu(x).sum())
        assert torch.equal(x.g, (x > 0).double())


def test_sweeping_the_same_loss_twice_gives_the_same() -> None:
    x, w = rand(4, 3), rand(3, 2)
    with te.record():
        Z = torch.sigmoid(x @ w)
        C = (Z**3).mean()
    te.backward(C)
    first = [plain(grad_of(t)) for t in (x, w, Z)]
    te.backward(C)
    for t, g in zip((x, w, Z), first, strict=True):
        assert torch.equal(t.g, g)


def test_a_leaf_as_root() -> None:
    x = torch.tensor(3.0)
    U = te.relu(x)
    te.backward(x)
    assert grad_of(x).item() == 1.0
    assert g_of(U) is None


def test_g_of_no_value_hides_behind_python_s_attributes() -> None:
    x = rand(3)
    assert not hasattr(x, "g")
    te.backward(te.relu(x).sum(), wrt=[x])
    assert x.__dict__["g"] is x.g


# -- sums ------------------------------------------------------------------------------------------


def test_a_value_used_several_times_collects_the_sum() -> None:
    x = rand(3)
    with te.record():
        y = x * x + x * torch.exp(x) + x[0] - x.sum() * x.prod()
        C = (y * y).sum()
    te.backward(C)

    def same(x: Tensor) -> Tensor:
        y = x * x + x * torch.exp(x) + x[0] - x.sum() * x.prod()
        return (y * y).sum()

    agree([x], reference(same, x))


def test_the_same_tensor_in_every_place() -> None:
    for of in (
        lambda x: x @ x @ x,
        lambda x: torch.stack([x, x, x]),
        lambda x: torch.cat([x, x], 1),
        lambda x: torch.addmm(x, x, x),
    ):
        x = rand(3, 3)
        with te.record():
            C = of(x).pow(2).sum()
        te.backward(C)
        agree([x], reference(lambda x, of=of: of(x).pow(2).sum(), x))
    x = rand(3, 3)
    te.backward(te.lin(x, x).sum())
    agree([x], reference(lambda x: (x @ x).sum(), x))
    U = rand(4)
    te.backward(te.mse(U, U))
    assert not U.g.any()


def test_a_tensor_used_a_thousand_times() -> None:
    x = rand(2)
    with te.record():
        total = torch.zeros(2, dtype=torch.float64)
        for i in range(1000):
            total = total + x * (i + 1)
        C = total.sum()
    te.backward(C)
    close(x.g, torch.full((2,), 500500.0, dtype=torch.float64))


def test_contributions_are_summed_without_spoiling_one_that_is_shared() -> None:
    # add's rule hands the same g to both sides: adding into it in place would spoil the other
    a, b = rand(3), rand(3)
    with te.record():
        s = a + b
        t = a * 2
        C = (s + t + a).sum()
    te.backward(C)
    assert a.g.tolist() == [4.0] * 3
    assert b.g.tolist() == [1.0] * 3
    assert s.g.tolist() == [1.0] * 3
    unshared(a.g, b.g, s.g, t.g)


@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [
        ((3, 4), (4,)),
        ((3, 4), (1, 4)),
        ((3, 4), (3, 1)),
        ((3, 4), ()),
        ((2, 1, 4), (3, 1)),
        ((1,), (5, 3)),
        ((0, 3), (3,)),
        ((1, 3), (0, 3)),
        ((), ()),
    ],
)
@pytest.mark.parametrize(
    "op", [torch.add, torch.mul, torch.sub, torch.div, torch.maximum, torch.pow], ids=lambda f: f.__name__
)
def test_broadcast_dimensions_are_summed(
    op: Callable[..., Tensor], of_a: tuple[int, ...], of_b: tuple[int, ...]
) -> None:
    a, b = rand(*of_a).abs() + 0.5, rand(*of_b).abs() + 0.5
    with te.record():
        y = op(a, b)
        C = (y * y).sum()
    te.backward(C)
    for t in (a, b):
        assert t.g.shape == t.shape
    agree([a, b], reference(lambda a, b: (op(a, b) ** 2).sum(), a, b))


def test_a_custom_operation_that_broadcasts() -> None:
    @te.op
    def product(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    @product.rule
    def product_grad(g: Tensor, out: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return g * b, g * a

    a, b = rand(2, 1, 4), rand(3, 1)
    te.backward(product(a, b), seed := rand(2, 3, 4))
    agree([a, b], reference(lambda a, b: (a * b * seed).sum(), a, b))


# -- the seed --------------------------------------------------------------------------------------


def test_a_seed_weighs_the_elements() -> None:
    x = rand(3, 2)
    with te.record():
        y = torch.sin(x)
    seed = rand(3, 2)
    te.backward(y, seed)
    close(x.g, seed * torch.cos(x))
    close(grad_of(y), seed)
    unshared(grad_of(x), grad_of(y), seed)


def test_seeds_of_every_kind() -> None:
    x = rand(3)
    with te.record():
        y = x + 0
        z = y.view(3, 1)
    kinds = [rand(3, 1), rand(3).expand(3, 3).t()[:, :1], torch.ones((), dtype=torch.float64).expand(3, 1), plain(z)]
    for seed in kinds:
        before = plain(seed)
        te.backward(z, seed, keep=True)
        close(x.g, before.reshape(3))
        close(z.g, before)
        unshared(x.g, y.g, z.g)
        assert torch.equal(seed, before)
        assert all(g.untyped_storage().data_ptr() != seed.untyped_storage().data_ptr() for g in (x.g, y.g, z.g))


def test_the_loss_itself_may_be_the_seed() -> None:
    x = rand(3)
    with te.record():
        y = x * 2
    te.backward(y, y)
    close(x.g, 2 * plain(y))
    unshared(x.g, y.g, y)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_element_needs_no_seed(shape: tuple[int, ...]) -> None:
    x = rand(4)
    with te.record():
        C = x.sum().reshape(shape)
    te.backward(C)
    assert x.g.tolist() == [1.0] * 4
    assert C.g.shape == shape
    te.backward(C, torch.full(shape, 3.0).double())
    assert x.g.tolist() == [3.0] * 4


def test_a_seed_of_another_dtype_is_cast() -> None:
    x = rand(3)
    with te.record():
        y = x * 2
    te.backward(y, torch.tensor([1, 2, 3]))
    assert x.g.tolist() == [2.0, 4.0, 6.0]
    assert x.g.dtype == torch.float64


def test_a_loss_of_no_elements_needs_a_seed_too() -> None:
    x = rand(0)
    with te.record():
        y = x * 2
    with pytest.raises(te.ShapeError):
        te.backward(y)
    te.backward(y, torch.zeros(0).double())
    assert x.g.shape == (0,)


def test_a_jacobian_row_by_row() -> None:
    x = rand(3)
    with te.record():
        y = torch.stack([x.sum(), x.prod(), (x * x)[1], x[0] / x[2]])
    rows = [te.grad(y, x, seed=row)[0] for row in torch.eye(4, dtype=torch.float64)]

    def of(x: Tensor) -> Tensor:
        return torch.stack([x.sum(), x.prod(), (x * x)[1], x[0] / x[2]])

    close(torch.stack([row for row in rows if row is not None]), torch.autograd.functional.jacobian(of, plain(x)))  # type: ignore[no-untyped-call]


# -- wrt -------------------------------------------------------------------------------------------


def test_wrt_writes_on_those_alone() -> None:
    X, w, b = rand(4, 3), rand(3, 2), rand(2)
    Z = te.lin(X, w, b)
    U = te.relu(Z)
    C = te.mse(U, rand(4, 2))
    te.backward(C, wrt=[w, Z], keep=True)
    assert g_of(X) is g_of(b) is g_of(U) is g_of(C) is None
    some = plain(w.g), plain(Z.g)
    te.backward(C)
    close(some[0], w.g)
    close(some[1], Z.g)
    assert g_of(X) is not None


@pytest.mark.parametrize("how", [lambda w: w, lambda w: [w], lambda w: (w,), lambda w: [w, w]])
def test_wrt_takes_a_tensor_or_a_sequence(how: Callable[[Tensor], Any]) -> None:
    X, w = rand(4, 3), rand(3, 2)
    te.backward(te.lin(X, w).sum(), wrt=how(w))
    close(w.g, X.sum(0).unsqueeze(-1).expand(3, 2).contiguous())
    assert g_of(X) is None


def test_wrt_may_be_empty() -> None:
    x = rand(3)
    op, calls = counted("double")
    te.backward(op(x).sum(), wrt=[])
    assert g_of(x) is None
    assert calls == []


def test_wrt_the_loss_itself() -> None:
    x = rand(3)
    op, calls = counted("double")
    C = op(x)
    seed = rand(3)
    te.backward(C, seed, wrt=C)
    close(C.g, seed)
    unshared(C.g, seed)
    assert calls == []
    assert g_of(x) is None


@pytest.mark.parametrize("recorded", [False, True])
def test_a_tensor_that_C_does_not_depend_on_is_left_without_g(recorded: bool) -> None:
    x, other = rand(3), rand(3)
    C = te.relu(x).sum()
    kept = te.relu(other) if recorded else None
    other.g = torch.ones(3)
    te.backward(C, wrt=[x, other])
    assert not hasattr(other, "g")
    assert hasattr(x, "g")
    del kept


def test_integer_tensors_of_wrt_are_left_without_g() -> None:
    x = rand(3)
    i: Any = torch.tensor([0, 2])
    with te.record():
        C = (x[i] * i).sum()
    i.g = torch.ones(1)
    te.backward(C, wrt=[i, x])
    assert g_of(i) is None
    close(x.g, torch.tensor([0.0, 0.0, 2.0]).double())
    assert te.grad(C, [i]) == (None,)


def test_constants_of_wrt_are_left_without_g_as_they_are_without_wrt() -> None:
    x = rand(3)
    with te.record():
        with torch.no_grad():
            d = x * 2
        C = (x * d).sum()
    te.backward(C)
    assert g_of(d) is None
    d.g = torch.ones(1)
    te.backward(C, wrt=[d, x])
    assert g_of(d) is None


def test_wrt_spends_nothing_on_what_they_do_not_need() -> None:
    a, b, c = rand(3), rand(3), rand(3)
    (op_a, of_a), (op_b, of_b), (op_c, of_c), (op_top, of_top) = (counted(name) for name in "abcd")
    C = op_top(op_a(a) + op_b(b) + op_c(op_c(c))).sum()
    te.backward(C, wrt=[b], keep=True)
    assert (of_a, of_b, of_c, of_top) == ([], ["b"], [], ["d"])
    middle = op_b(b)
    D = (op_a(middle) * op_c(a)).sum()
    of_b.clear()
    of_top.clear()
    te.backward(D, wrt=[middle], keep=True)
    assert (of_a, of_b, of_c, of_top) == (["a"], [], [], [])


def test_wrt_one_operand_computes_one_product() -> None:
    X, w, b, Y = rand(8, 5), rand(5, 3), rand(3), rand(8, 3)
    products = {}
    for name, wrt in (("all", None), ("w", [w]), ("b", [b]), ("X", [X]), ("nothing", [rand(1)])):
        C = te.mse(te.lin(X, w, b), Y)
        with Heard() as heard:
            te.backward(C, wrt=wrt)
        products[name] = sum(each in ("mm", "matmul", "addmm") for each in heard.names)
        if name == "w":
            assert "sum" not in heard.names
        if name == "nothing":
            assert not {"mul", "div", "sub", "sum", "mm"} & set(heard.names)
    assert products == {"all": 2, "w": 1, "b": 0, "X": 1, "nothing": 0}


def test_wrt_in_plain_torch_computes_one_product() -> None:
    X, w = rand(8, 5), rand(5, 3)
    for wrt, count in ((None, 2), ([w], 1), ([X], 1)):
        with te.record():
            C = (X @ w).sum()
        with Heard() as heard:
            te.backward(C, wrt=wrt)
        assert heard.names.count("mm") == count


def test_what_does_not_lead_to_C_is_not_swept() -> None:
    x = rand(3)
    op, calls = counted("double")
    with te.record():
        aside = op(x)
        C = (x * 3).sum()
    te.backward(C)
    assert calls == []
    assert g_of(aside) is None


def test_wrt_removes_an_old_g_only_after_the_sweep_succeeded() -> None:
    @te.op
    def broken(x: Tensor) -> Tensor:
        return x * 2

    @broken.rule
    def broken_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        raise ValueError("no")

    x, other = rand(3), rand(3)
    C = broken(x).sum()
    other.g = torch.ones(3)
    with unchanged(x, other), pytest.raises(te.RuleError):
        te.backward(C, wrt=[x, other])


# -- accumulate, keep, grad ------------------------------------------------------------------------


def test_accumulate_adds_to_the_g_that_is_there() -> None:
    X, w = rand(8, 3), rand(3, 1)
    Y = rand(8)
    for rows in (slice(0, 3), slice(3, 8)):
        te.backward(
            te.mse(te.lin(X[rows], w), Y[rows]),
            torch.tensor((rows.stop - rows.start) / 8).double(),
            accumulate=True,
            wrt=[w],
        )
    agree([w], reference(lambda w: ((X @ w).squeeze(-1) - Y).pow(2).mean(), w))


def test_accumulate_leaves_the_tensor_that_was_there_as_it_was() -> None:
    x = rand(3)
    te.backward(te.relu(x).sum())
    old, contents = x.g, plain(x.g)
    te.backward(te.relu(x).sum(), accumulate=True)
    close(x.g, 2 * contents)
    assert torch.equal(old, contents)
    unshared(old, x.g)


def test_accumulate_keeps_what_C_does_not_depend_on() -> None:
    x, other = rand(3), rand(3)
    other.g = torch.full((3,), 5.0)
    te.backward(te.relu(x).sum(), wrt=[x, other], accumulate=True)
    assert other.g.tolist() == [5.0] * 3


def test_accumulate_refuses_a_g_that_does_not_fit() -> None:
    x, y = rand(3), rand(3)
    C = (te.relu(x) * te.relu(y)).sum()
    x.g, y.g = torch.ones(3).double(), torch.ones(4, 5)
    with unchanged(x, y), pytest.raises(te.ShapeError):
        te.backward(C, accumulate=True)
    y.g = "not a tensor"
    with pytest.raises(te.TapeError):
        te.backward(C, accumulate=True)


def test_accumulated_gradients_keep_dtype() -> None:
    x = rand(3, dtype=torch.float32)
    x.g = torch.ones(3, dtype=torch.float64)
    te.backward(te.relu(x).sum(), accumulate=True)
    assert x.g.dtype == torch.float32


def test_keep_goes_on_with_the_same_tape() -> None:
    x = rand(3)
    U = te.relu(x)
    C = U.sum()
    tape = te.global_tape()
    te.backward(C, keep=True)
    assert te.global_tape() is tape
    D = (U * C).sum()
    te.backward(D)
    agree([x], reference(lambda x: (torch.relu(x) * torch.relu(x).sum()).sum(), x))
    assert te.global_tape() is not tape


def test_a_sweep_of_the_global_tape_starts_a_new_one() -> None:
    x = rand(3)
    C = te.relu(x).sum()
    old = te.global_tape()
    assert len(old) == 2
    te.backward(C)
    assert te.global_tape() is not old
    assert len(te.global_tape()) == 0
    assert len(old) == 2  # it can still be drawn
    del C
    gc.collect()
    assert len(old) == 0


def test_what_was_swept_lives_as_long_as_C() -> None:
    x = rand(3)
    Z = te.relu(x)
    C = Z.sum()
    node = weakref.ref(te.global_tape().nodes[0])
    te.backward(C)
    del Z
    gc.collect()
    assert node() is not None
    del C
    gc.collect()
    assert node() is None


def test_going_on_from_a_swept_tape_is_refused_with_two_ways_out() -> None:
    x = rand(3)
    C = te.relu(x).sum()
    te.backward(C)
    D = C * 2
    with unchanged(x, C, D), pytest.raises(te.SweptError, match="already swept") as caught:
        te.backward(D)
    assert isinstance(caught.value, RuntimeError)
    assert "te.stop_gradient(C)" in str(caught.value)
    te.backward(te.stop_gradient(C) * te.relu(x).sum())
    close(x.g, plain(C) * (x > 0))


def test_going_on_from_a_swept_tape_as_a_constant() -> None:
    x, y = rand(3), rand(3)
    C = te.relu(x).sum()
    te.backward(C)
    D = (C * te.relu(y)).sum()
    with pytest.raises(te.SweptError, match=r"te.stop_gradient"):  # also where the way to y is open
        te.backward(D, wrt=[y])
    te.backward((te.stop_gradient(C) * te.relu(y)).sum(), wrt=[y])
    close(y.g, plain(C) * (y > 0))


@pytest.mark.parametrize("asks", ["grad", "backward"])
def test_a_gradient_that_a_swept_tape_hides_is_refused_not_missing(asks: str) -> None:
    x, y = rand(3), rand(3)
    C = te.relu(x).sum()
    te.backward(C)
    del x.g
    D = (C * te.relu(y)).sum()
    with pytest.raises(te.SweptError):
        te.grad(D, [x, y]) if asks == "grad" else te.backward(D, wrt=[y, x])
    assert g_of(x) is None
    assert g_of(y) is None


def test_two_losses_of_one_block() -> None:
    x = rand(3)
    with te.record():
        y = torch.exp(x)
        A, B = y.sum(), (y * y).sum()
    te.backward(A)
    agree([x], reference(lambda x: torch.exp(x).sum(), x))
    te.backward(B)
    agree([x], reference(lambda x: (torch.exp(x) ** 2).sum(), x))


def test_a_sweep_inside_the_block_lets_the_recording_go_on() -> None:
    x = rand(3)
    with te.record() as tape:
        y = torch.exp(x)
        A = y.sum()
        te.backward(A)
        assert te.current_tape() is tape
        first = x.g
        B = (y * 2).sum() + A
        te.backward(B)
    close(first, torch.exp(x))
    close(x.g, 3 * torch.exp(x))


def test_grad_returns_a_tuple_and_writes_nothing() -> None:
    X, w, other = rand(4, 3), rand(3, 2), rand(1)
    X.g = old = torch.ones(1)
    C = te.lin(X, w).sum()
    tape = te.global_tape()
    with unchanged(X, w, other, C):
        found = te.grad(C, (w, other, X, w), keep=True)
        assert isinstance(found, tuple)
        assert len(found) == 4
        assert found[1] is None
        close(found[0], plain(X).sum(0).unsqueeze(-1).expand(3, 2).contiguous())
        close(found[2], plain(w).sum(1).expand(4, 3).contiguous())
        assert X.g is old
    assert te.global_tape() is tape
    assert [g.shape for g in te.grad(C, w) if g is not None] == [(3, 2)]
    assert te.global_tape() is not tape  # as te.backward
    assert X.g is old
    assert g_of(w) is None


def test_grad_gives_the_same_as_backward() -> None:
    X, w, b, Y = rand(6, 3), rand(3, 2), rand(2), rand(6, 2)
    Z = te.lin(X, w, b)
    U = te.relu(Z)
    C = te.mse(U, Y)
    values = [X, w, b, Z, U, Y, C]
    found = te.grad(C, values, keep=True)
    te.backward(C)
    for t, g in zip(values, found, strict=True):
        assert g is not None
        assert torch.equal(t.g, g)
    unshared(*[g for g in found if g is not None], *[t.g for t in values])


def test_gradients_of_grad_share_no_memory() -> None:
    a, b = rand(3), rand(3)
    with te.record():
        s = a + b
        t = s.view(1, 3)
    seed = rand(1, 3)
    found = te.grad(t, [a, b, s, t], seed=seed)
    unshared(seed, a, b, s, *[g for g in found if g is not None])
    for g in found:
        close(None if g is None else g.reshape(3), seed.reshape(3))


# -- no two .g share memory ------------------------------------------------------------------------


def test_no_two_g_share_memory_with_each_other_or_any_value() -> None:
    X, w, b = rand(5, 5), rand(5, 5), rand(5)
    with te.record():
        Z = X @ w
        A = Z + b
        B = Z.view(25)
        D = B.reshape(5, 5)
        E = D.t()
        G = A - E
        H = G + 0
        J = H.expand(2, 5, 5)
        K = J[0]
        L = torch.stack([K, J[1]])
        M, N = L.unbind()
        P = M.clone() + N.contiguous()
        S = P.sum(0)
        C = S.sum()
    te.backward(C)
    values = [X, w, b, Z, A, B, D, E, G, H, J, K, L, M, N, P, S, C]
    assert all(v.g.shape == v.shape for v in values)
    places = [v.g.untyped_storage().data_ptr() for v in values]
    assert len(set(places)) == len(places)
    assert not set(places) & {v.untyped_storage().data_ptr() for v in values}
    unshared(*[v.g for v in values])


@pytest.mark.parametrize("returned", ["g", "x", "out", "view of g", "view of x", "expanded", "one tensor twice"])
def test_whatever_a_rule_returns(returned: str) -> None:
    @te.op
    def pair(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @pair.rule
    def pair_grad(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        one = {
            "g": g,
            "x": x,
            "out": out,
            "view of g": g.view(3, 1).view(3),
            "view of x": x.view(1, 3)[0],
            "expanded": g[:1].expand(3),
            "one tensor twice": g * 2,
        }[returned]
        return one, one

    x, y = rand(3), rand(3)
    out = pair(x, y)
    seed = rand(3)
    te.backward(out, seed)
    for t in (x, y, out):
        assert t.g.is_contiguous()
    unshared(x.g, y.g, out.g, seed, x, y, out)


def test_writing_into_a_g_changes_nothing_else() -> None:
    x, y = rand(3), rand(3)
    with te.record():
        z = x + y
        C = z.sum()
    te.backward(C)
    x.g.fill_(100.0)
    assert y.g.tolist() == z.g.tolist() == [1.0] * 3
    te.backward(C)
    assert x.g.tolist() == [1.0] * 3


# -- record=True: gradients of gradients -----------------------------------------------------------


def cubic(x: Tensor) -> Tensor:
    return (x**3 + torch.sin(x) * x).sum()


def network(x: Tensor) -> Tensor:
    return torch.sigmoid(torch.tanh(x.reshape(2, 2) @ x.reshape(2, 2)) + x[:2]).pow(2).mean()


def attention(x: Tensor) -> Tensor:
    m = x.reshape(2, 2)
    return (torch.softmax(m @ m.t(), -1) @ m).logsumexp(-1).sum()


def indexed(x: Tensor) -> Tensor:
    return (torch.cat([x[1:], x[:1]]) * torch.exp(x) / (1 + x * x)).sum() + x.norm()


FUNCTIONS = [cubic, network, attention, indexed]


def autograd_derivatives(f: Callable[[Tensor], Tensor], x: Tensor, order: int) -> list[Tensor]:
    here = plain(x).requires_grad_()
    value, found = f(here), []
    for _ in range(order):
        (g,) = torch.autograd.grad(value, here, create_graph=True)
        found.append(g.detach())
        value = (g * g).sum()
    return found


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_third_derivatives_in_a_block(f: Callable[[Tensor], Tensor]) -> None:
    x = rand(4)
    found = []
    with te.record():
        value = f(x)
        for _ in range(3):
            g = the(te.grad(value, x, record=True))
            found.append(g)
            value = (g * g).sum()
    for got, wanted in zip(found, autograd_derivatives(f, x, 3), strict=True):
        close(got, wanted, 1e-8)


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_third_derivatives_after_a_block(f: Callable[[Tensor], Tensor]) -> None:
    x = rand(4)
    with te.record():
        value = f(x)
    for wanted in autograd_derivatives(f, x, 3):
        te.backward(value, record=True)
        close(x.g, wanted, 1e-8)
        value = (x.g * x.g).sum()


def test_third_derivatives_by_the_last_sweep_with_backward() -> None:
    x = rand(4)
    with te.record():
        value = cubic(x)
    g = the(te.grad(value, x, record=True))
    h = the(te.grad((g * g).sum(), x, record=True))
    te.backward((h * h).sum())
    close(x.g, autograd_derivatives(cubic, x, 3)[-1], 1e-8)


def named_article(X: Tensor, w: Tensor, b: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Z = te.lin(X, w, b)
    U = te.relu(Z)
    return Z, U, te.mse(U, Y)


def plain_article(X: Tensor, w: Tensor, b: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Z = X @ w + b
    U = torch.relu(Z)
    return Z, U, F.mse_loss(U, Y)


@pytest.mark.parametrize("block", [False, True])
def test_second_derivatives_of_the_named_operations(block: bool) -> None:
    X, w, b, Y = rand(5, 3), rand(3, 2), rand(2), rand(5, 2)
    leaves = [plain(t).requires_grad_() for t in (X, w, b, Y)]
    Z, U, C = plain_article(*leaves)
    gX, gw, gZ, gU = torch.autograd.grad(C, [leaves[0], leaves[1], Z, U], create_graph=True)
    wanted = torch.autograd.grad((gw**2).sum() + (gX**3).sum() + (gZ * Z).sum() + (gU**2).sum() + C, leaves)
    if block:
        with te.record():
            Z, U, C = named_article(X, w, b, Y)
            te.backward(C, record=True)
            D = (w.g**2).sum() + (X.g**3).sum() + (Z.g * Z).sum() + (U.g**2).sum() + C
    else:
        Z, U, C = named_article(X, w, b, Y)
        te.backward(C, record=True)
        D = (w.g**2).sum() + (X.g**3).sum() + (Z.g * Z).sum() + (U.g**2).sum() + C
    te.backward(D)
    agree([X, w, b, Y], list(wanted))


def test_a_gradient_penalty_step() -> None:
    X, w, Y = rand(6, 3), rand(3, 1), rand(6)
    C = te.mse(te.lin(X, w), Y)
    gX = the(te.grad(C, [X], record=True))
    total = C + te.mse(gX, torch.zeros(6, 3).double())
    te.backward(total)
    X_, w_ = plain(X).requires_grad_(), plain(w).requires_grad_()
    C_ = ((X_ @ w_).squeeze(-1) - Y).pow(2).mean()
    (g_,) = torch.autograd.grad(C_, X_, create_graph=True)
    wanted = torch.autograd.grad(C_ + g_.pow(2).mean(), [X_, w_])
    agree([X, w], list(wanted))


def test_a_hessian_vector_product() -> None:
    x, v = rand(4), rand(4)
    with te.record():
        g = the(te.grad(network(x), x, record=True))
        product = (g * v).sum()
    te.backward(product)
    hessian = torch.autograd.functional.hessian(network, plain(x))  # type: ignore[no-untyped-call]
    close(x.g, hessian @ v, 1e-9)


def test_second_derivative_through_the_seed() -> None:
    x, v = rand(3), rand(3)
    with te.record():
        y = torch.sin(x)
        g = the(te.grad(y, x, seed=v, record=True))
        C = (g * g).sum()
    te.backward(C)
    agree([x, v], reference(lambda x, v: ((v * torch.cos(x)) ** 2).sum(), x, v))


def test_recorded_gradients_where_the_second_is_zero() -> None:
    x = rand(3)
    with te.record():
        y = (x * 3).sum()
        g = the(te.grad(y, x, record=True))
        C = (g * x).sum()
    te.backward(C)
    assert x.g.tolist() == [3.0] * 3


def test_accumulating_a_recorded_sweep_keeps_the_connection() -> None:
    x = rand(3)
    x.g = torch.ones(3).double()
    U = te.relu(x)
    C = (U**3).sum()
    te.backward(C, record=True, accumulate=True)
    close(x.g, 1 + 3 * torch.relu(plain(x)) ** 2)
    te.backward((x.g * x.g).sum())
    agree([x], reference(lambda x: ((1 + 3 * torch.relu(x) ** 2) ** 2).sum(), x))


def test_unrecorded_gradients_are_constants_of_the_next_sweep() -> None:
    x = rand(3)
    U = te.relu(x)
    C = (U**3).sum()
    te.backward(C, keep=True)
    D = te.mse(U, plain(x.g))
    first = plain(x.g)
    te.backward(D)
    agree([x], reference(lambda x: (torch.relu(x) - first).pow(2).mean(), x))


def test_no_two_g_of_a_recorded_sweep_share_memory() -> None:
    a, b = rand(3), rand(3)
    s = te.relu(a) + b
    t = s.view(3, 1)
    seed = rand(3, 1)
    te.backward(t, seed, record=True)
    unshared(a.g, b.g, s.g, t.g, seed, a, b, s)


def test_recorded_sweeps_under_no_grad_are_recorded() -> None:
    x = rand(3)
    with te.record():
        C = (x**3).sum()
    with torch.no_grad():
        g = the(te.grad(C, x, record=True))
    h = the(te.grad((g * g).sum(), x))
    close(h, 2 * 3 * plain(x) ** 2 * 6 * plain(x))


# -- what cuts the gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["global", "block", "after"])
def test_stop_gradient(where: str) -> None:
    x = rand(3)
    if where == "block":
        with te.record():
            y = torch.exp(x)
            C = (te.stop_gradient(y) * x).sum()
    else:
        if where == "after":
            with te.record():
                y = torch.exp(x)
        else:
            y = te.relu(x)
        C = (te.stop_gradient(y) * te.lin(x.unsqueeze(0), torch.eye(3).double())).sum()
    te.backward(C)
    close(x.g, plain(y))
    assert g_of(y) is None


def test_stop_gradient_of_a_leaf_and_its_contents() -> None:
    x = rand(3)
    s = te.stop_gradient(x)
    assert torch.equal(plain(s), plain(x))
    C = (te.relu(x) * s).sum()
    te.backward(C)
    close(x.g, plain(x) * (plain(x) > 0))
    assert g_of(s) is None


@pytest.mark.parametrize("cut", ["detach", "data", "no_grad", "pause", "detach_", "requires_grad_"])
def test_what_cuts_the_gradient_in_a_block(cut: str) -> None:
    x = rand(3)
    with te.record():
        y = torch.exp(x)
        if cut == "detach":
            z = y.detach() * 2
        elif cut == "data":
            z = y.data * 2
        elif cut == "detach_":
            z = (y * 2).detach_()
        elif cut == "requires_grad_":
            z = (y.detach().requires_grad_() * 2).detach()
        elif cut == "pause":
            with te.pause():
                z = y * 2
        else:
            with torch.no_grad():
                z = y * 2
        C = (z * x).sum() + y.sum()
    te.backward(C)
    close(x.g, 3 * torch.exp(plain(x)))
    close(grad_of(y), torch.ones(3).double())


@pytest.mark.parametrize("cut", ["detach", "data", "no_grad", "pause"])
def test_what_cuts_the_gradient_outside_a_block(cut: str) -> None:
    x = rand(3)
    y = te.relu(x)
    if cut == "detach":
        z = y.detach() * 2
    elif cut == "data":
        z = y.data * 2
    elif cut == "pause":
        with te.pause():
            z = te.relu(y)
            z = z + y
        assert len(te.global_tape()) == 1
    else:
        with torch.no_grad():
            z = y * 2
    C = (z * y).sum()
    te.backward(C)
    close(x.g, 2 * torch.relu(plain(x)))


def test_torch_s_own_requires_grad_false_is_no_cut() -> None:
    x = rand(3)
    with torch.no_grad(), te.record():
        C = (x * x).sum()
    te.backward(C)
    close(x.g, 2 * plain(x))


def test_no_grad_inside_a_block_that_began_under_no_grad() -> None:
    x = rand(3)
    with torch.no_grad(), te.record():
        with torch.enable_grad(), torch.no_grad():
            z = x * 2
        C = (x * z).sum()
    te.backward(C)
    assert x.g is not None


def test_the_root_is_a_constant() -> None:
    x = rand(3)
    with te.record():
        C = (x * x).sum().detach()
    with pytest.raises(te.NotRecordedError, match="constant"):
        te.backward(C)
    assert g_of(x) is None


def test_enable_grad_inside_no_grad_records_again() -> None:
    x = rand(3)
    with te.record(), torch.no_grad():
        z = x * 2
        with torch.enable_grad():
            C = (z * x).sum()
    te.backward(C)
    close(x.g, 2 * plain(x))


def test_writes_under_no_grad_let_the_gradient_pass_as_in_torch() -> None:
    def inside(x: Tensor) -> Tensor:
        y = x * 3
        with torch.no_grad():
            y += 1
            y[0] = 7.0
        return (y * y).sum()

    x = rand(3)
    with te.record():
        C = inside(x)
    te.backward(C)
    # torch.autograd refuses: it saved y for y * y after the write, and lets the gradient over the write
    agree([x], reference(inside, x))


# -- dtypes ----------------------------------------------------------------------------------------


def test_gradients_have_their_values_dtype_through_casts() -> None:
    x, w = rand(3, dtype=torch.float32), rand(3)
    with te.record():
        y = x.double() * w
        z = y.half().float()
        C = (z * x).sum()
    te.backward(C)
    for t in (x, w, y, z):
        assert t.g.dtype == t.dtype


def test_type_promotion() -> None:
    a, b = rand(3, dtype=torch.float32), rand(3)
    with te.record():
        C = (a * b + a.to(torch.bfloat16) * a).sum()
    te.backward(C)
    agree([a, b], reference(lambda a, b: (a * b + a.to(torch.bfloat16) * a).sum(), a, b), 1e-2)


def test_complex_values() -> None:
    def f(z: Tensor, x: Tensor) -> Tensor:
        return (
            (z * z.conj() * x + torch.exp(z) * 2j).abs().sum()
            + torch.view_as_real(z).pow(2).sum()
            + (z.real * z.imag).sum()
        )

    z, x = rand(3, dtype=torch.complex128), rand(3)
    with te.record():
        C = f(z, x)
    te.backward(C)
    assert z.g.is_complex()
    assert not z.g.is_conj()
    agree([z, x], reference(f, z, x))


def test_a_complex_loss_takes_a_complex_seed() -> None:
    z = rand(2, dtype=torch.complex128)
    with te.record():
        w = z * z
    seed = rand(2, dtype=torch.complex128)
    te.backward(w, seed)
    copy = plain(z).requires_grad_()
    close(z.g, torch.autograd.grad(copy * copy, copy, seed)[0])


# -- several outputs -------------------------------------------------------------------------------


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "max values": lambda x: x.max(1).values.pow(2).sum(),
    "max over min": lambda x: (x.max(1)[0] / (x.min(1).values + 9)).sum(),
    "topk": lambda x: (x.topk(2, dim=1).values * torch.tensor([1.0, 3.0])).sum(),
    "sort": lambda x: (x.sort(1)[0] * torch.arange(4.0)).sum(),
    "one of split": lambda x: x.split(2, dim=1)[1].pow(3).sum(),
    "all of split": lambda x: sum((i + 1) * part.exp().sum() for i, part in enumerate(x.split([1, 2, 1], dim=1))),
    "one of unbind": lambda x: x.unbind(0)[2].pow(2).sum(),
    "chunk": lambda x: (x.chunk(2, 1)[0] * x.chunk(2, 1)[1]).sum(),
    "gather by topk": lambda x: x.gather(1, x.topk(2, dim=1).indices).pow(2).sum(),
    "var and mean": lambda x: (torch.var_mean(x, 1)[0] + torch.var_mean(x, 1)[1] ** 2).sum(),
    "tensor_split": lambda x: x.tensor_split(3, dim=1)[0].pow(2).sum() + x.tensor_split(3, dim=1)[2].sum(),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_operations_of_several_outputs(name: str) -> None:
    x = rand(3, 4)
    f = OUTPUTS[name]
    with te.record():
        C = f(x)
    te.backward(C)
    agree([x], reference(f, x))


def test_unreached_outputs_come_to_the_rule_as_none() -> None:
    seen = []

    @te.op
    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * 2, x.sum(), x.argmax()

    @both.rule
    def both_grad(g: Any, out: Any, x: Tensor) -> Tensor:
        seen.append([each is None for each in g])
        first = torch.zeros_like(x) if g[0] is None else g[0] * 2
        return first if g[1] is None else first + g[1]

    x = rand(3)
    a, s, i = both(x)
    assert i.dtype == torch.int64
    te.backward(a.sum(), keep=True)
    assert x.g.tolist() == [2.0] * 3
    te.backward(s, keep=True)
    assert x.g.tolist() == [1.0] * 3
    te.backward(a.sum() + s)
    assert x.g.tolist() == [3.0] * 3
    assert seen == [[False, True, True], [True, False, True], [False, False, True]]
    assert g_of(i) is None


# -- errors, and that they change nothing ----------------------------------------------------------


def test_a_tensor_on_no_tape() -> None:
    lost = torch.tensor(3.0)
    with unchanged(lost), pytest.raises(te.NotRecordedError) as caught:
        te.backward(lost)
    assert isinstance(caught.value, ValueError)
    assert error_text(caught, __file__) == (
        "te.backward: lost is on no tape, so there is nothing to sweep.\n"
        "  at LINE\n"
        "  lost    ()  float32\n"
        "  fix: compute lost inside `with te.record():`, or with named operations such as te.mse"
    )
    with pytest.raises(te.NotRecordedError, match=r"te\.grad: lost is on no tape"):
        te.grad(lost, lost)


def test_a_loss_of_several_elements_without_a_seed() -> None:
    X, w = rand(4, 3), rand(3, 2)
    scores = te.lin(X, w)
    with unchanged(X, w, scores), pytest.raises(te.ShapeError) as caught:
        te.backward(scores)
    assert error_text(caught, __file__) == (
        "scores has 8 elements; its gradient needs a seed of the same shape.\n"
        "  at LINE\n"
        "  scores    (4, 2)  float64\n"
        "  fix: te.backward(scores, torch.ones_like(scores)), or sweep from a sum or a mean of scores"
    )
    te.backward(scores, torch.ones_like(scores))  # the fix
    assert X.g.shape == (4, 3)


def test_a_seed_of_another_shape() -> None:
    X, w = rand(4, 3), rand(3, 2)
    scores = te.lin(X, w)
    with unchanged(X, w, scores), pytest.raises(te.ShapeError) as caught:
        te.backward(scores, torch.ones(4, 1))
    assert error_text(caught, __file__) == (
        "the seed has another shape than scores.\n"
        "  at LINE\n"
        "  scores    (4, 2)  float64\n"
        "  seed      (4, 1)  float32\n"
        "  fix: give a seed of shape (4, 2)"
    )


@pytest.mark.parametrize("seed", [2.0, 1, "one", [1.0], None])
def test_a_seed_that_is_no_tensor(seed: Any) -> None:
    C = te.relu(rand(3)).sum()
    if seed is None:
        te.backward(C, None)
        return
    with pytest.raises(te.DTypeError) as caught:
        te.backward(C, seed)
    assert isinstance(caught.value, TypeError)


def test_a_complex_seed_for_a_real_loss() -> None:
    x = rand(3)
    C = te.relu(x)
    with unchanged(x, C), pytest.raises(te.TapeError):
        te.backward(C, rand(3, dtype=torch.complex128))


@pytest.mark.parametrize("wrt", [3, "w", [1.0], {"w": 1}, [None]])
def test_wrt_that_is_no_tensor(wrt: Any) -> None:
    x = rand(3)
    C = te.relu(x).sum()
    with unchanged(x, C), pytest.raises(te.DTypeError, match="wrt takes a tensor or a sequence of tensors"):
        te.backward(C, wrt=wrt)


@pytest.mark.parametrize("C", [3.0, None, "C", [torch.ones(1)]])
def test_a_loss_that_is_no_tensor(C: Any) -> None:
    with pytest.raises(te.DTypeError, match=r"te\.backward takes a recorded tensor"):
        te.backward(C)


def test_an_integer_loss() -> None:
    x = rand(3)
    with te.record():
        count = (x > 0).sum()
    with unchanged(x, count), pytest.raises(te.DTypeError, match=r"torch\.int64"):
        te.backward(count)


def rule_returning(returned: Callable[..., Any]) -> Any:
    @te.op
    def scale(x: Tensor, y: Tensor, factor: float = 2.0) -> Tensor:
        return x * y * factor

    @scale.rule
    def scale_grad(g: Tensor, out: Tensor, x: Tensor, y: Tensor, factor: float) -> Any:
        return returned(g, out, x, y)

    return scale


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda g, out, x, y: g, "returned 1 gradient"),
        (lambda g, out, x, y: (g, g, g, g), "returned 4 gradients for 2"),
        (lambda g, out, x, y: (), "returned 0 gradients for 2"),
        (lambda g, out, x, y: (g, g[:2]), "for y"),
        (lambda g, out, x, y: (g.sum(), g), "for x"),
        (lambda g, out, x, y: (g, g.reshape(3, 1)), "for y"),
        (lambda g, out, x, y: (g, 3.0), "float"),
        (lambda g, out, x, y: ("g", g), "str"),
        (lambda g, out, x, y: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda g, out, x, y: g @ x.nonsense, "AttributeError"),
        (lambda g, out, x, y: (g.reshape(5), g), "RuntimeError"),
    ],
)
def test_a_rule_that_is_off_is_named_with_its_argument(returned: Callable[..., Any], says: str) -> None:
    scale = rule_returning(returned)
    left, right = rand(3), rand(3)
    C = scale(left, right)
    left.g = torch.ones(3)
    with unchanged(left, right, C), pytest.raises(te.RuleError) as caught:
        te.backward(C, torch.ones(3))
    text = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert "scale_grad" in text
    assert says in text
    assert "C = scale(left, right)" in text
    assert "test_sweep.py:" in text


def test_the_text_of_a_rule_error() -> None:
    scale = rule_returning(lambda g, out, x, y: (g, g[:2]))
    left, right = rand(3), rand(3)
    C = scale(left, right)
    line = scale_line = 0
    import inspect

    frame = inspect.currentframe()
    assert frame is not None
    scale_line = frame.f_lineno - 6
    with pytest.raises(te.RuleError) as caught:
        te.backward(C, torch.ones(3))
    del line
    assert str(caught.value) == (
        "the rule scale_grad of scale returned a gradient of shape (2,) for y, which has shape (3,).\n"
        f"  at test_sweep.py:{scale_line}    C = scale(left, right)\n"
        "  x    (3,)  float64\n"
        "  y    (3,)  float64\n"
        "  fix: return for y a gradient of shape (3,)"
    )


def test_operands_are_named_right_beside_other_arguments() -> None:
    @te.op
    def mix(x: Tensor, factor: float, others: list[Tensor], mode: str, y: Tensor | None = None) -> Tensor:
        return x * factor

    @mix.rule
    def mix_grad(g: Tensor, out: Tensor, x: Tensor, factor: float, others: Any, mode: str, y: Tensor | None) -> Any:
        return g, g[:1], g[:1], g[:1]

    x, a, b, y = rand(3), rand(1), rand(1), rand(2)
    C = mix(x, 2.0, [a, b], "up", y)
    with pytest.raises(te.RuleError) as caught:
        te.backward(C, torch.ones(3))
    assert "returned a gradient of shape (1,) for y, which has shape (2,)" in str(caught.value)
    rows = [line.split() for line in str(caught.value).splitlines() if line.endswith("float64")]
    assert (rows[0][0], rows[-1][0]) == ("x", "y")
    assert rows[-1][1] == "(2,)"
    assert "factor" not in str(caught.value)
    assert "mode" not in str(caught.value)


def test_a_rule_may_not_rely_on_broadcasting_where_the_operation_does_not() -> None:
    @te.op(broadcasts=False)
    def shift(x: Tensor) -> Tensor:
        return x + 1

    @shift.rule
    def shift_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g.expand(2, 3)

    x = rand(3)
    with pytest.raises(te.RuleError, match=r"shift_grad .*\(2, 3\) for x"):
        te.backward(shift(x), torch.ones(3))


def test_an_error_in_a_recorded_sweep_leaves_the_tape_as_it_was() -> None:
    scale = rule_returning(lambda g, out, x, y: 1 / 0)
    with te.record() as tape:
        x = rand(3) * 1
        y = scale(torch.exp(x), x)
        C = torch.sin(y).sum()
        depth = len(tape)
        for sweep in (lambda: te.backward(C, record=True), lambda: te.grad(C, x, record=True)):
            with pytest.raises(te.RuleError):
                sweep()
            assert len(tape) == depth
    assert g_of(x) is None


def test_an_error_in_the_middle_of_a_sweep_changes_no_g() -> None:
    scale = rule_returning(lambda g, out, x, y: 1 / 0)
    a, b = rand(3), rand(3)
    for t in (a, b):
        t.g = torch.full((3,), 9.0)
    C = (te.relu(a) * scale(b, b)).sum()
    for options in ({}, {"accumulate": True}, {"keep": True}, {"record": True}, {"wrt": [a, b]}):
        with unchanged(a, b, C), pytest.raises(te.RuleError):
            te.backward(C, **options)
    with unchanged(a, b, C), pytest.raises(te.RuleError):
        te.grad(C, [a, b])
    te.backward(C, wrt=[a])  # what does not need the broken rule still works
    assert a.g.tolist() != [9.0] * 3


def test_the_state_is_sound_after_an_error() -> None:
    scale = rule_returning(lambda g, out, x, y: 1 / 0)
    x = rand(3)
    with pytest.raises(te.RuleError):
        te.backward(scale(x, x).sum())
    U = te.relu(x)
    te.backward(U.sum())
    assert torch.equal(x.g, (x > 0).double())
    with te.record() as tape:
        y = x * 2
    assert len(tape) == 1
    del y


def test_an_operation_without_a_rule_that_torch_cannot_differentiate() -> None:
    @te.op
    def through_numpy(x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().copy()) * 2

    x = rand(3)
    C = through_numpy(x).sum()
    with unchanged(x, C), pytest.raises(te.MissingRuleError) as caught:
        te.backward(C)
    assert isinstance(caught.value, NotImplementedError)
    text = str(caught.value)
    assert "through_numpy" in text
    assert "C = through_numpy(x).sum()" in text
    assert "through_numpy_grad" in text


# -- long tapes ------------------------------------------------------------------------------------


def test_a_chain_of_20_000_nodes_is_swept_without_recursion() -> None:
    x = rand(2)
    with te.record() as tape:
        y = x
        for _ in range(20_000):
            y = y + x
        C = y.sum()
    te.backward(C)
    assert x.g.tolist() == [20_001.0] * 2
    assert len(tape) == 20_001


def test_the_work_of_a_sweep_grows_with_the_tape_and_no_faster() -> None:
    counts = []
    for length in (500, 2000):
        x = rand(2)
        with te.record():
            y = x
            for _ in range(length):
                y = torch.sin(y) + x
            C = y.sum()
        with Heard() as heard:
            te.backward(C)
        counts.append(len(heard.names))
    assert counts[1] <= 4.1 * counts[0]


def test_a_wide_fan_out_and_a_wide_fan_in() -> None:
    x = rand(3)
    with te.record():
        C = torch.stack([torch.sin(x * i) for i in range(300)]).sum()
    te.backward(C)
    agree([x], reference(lambda x: torch.stack([torch.sin(x * i) for i in range(300)]).sum(), x), 1e-9)


# -- random expression graphs ----------------------------------------------------------------------


UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.sin,
    torch.tanh,
    torch.sigmoid,
    torch.neg,
    lambda t: t * 0.7,
    lambda t: 1.5 - t,
    lambda t: t**2 * 0.1,
    lambda t: t.abs(),
    lambda t: torch.exp(t * 0.1),
    lambda t: t.t(),
    lambda t: t[[1, 0, 2]],
    lambda t: t.flip(0),
    lambda t: t - t.mean(0),
    lambda t: torch.softmax(t, 1),
    lambda t: t.reshape(9).reshape(3, 3),
    lambda t: t[1].expand(3, 3).clone(),
    lambda t: t.cumsum(0) * 0.3,
    lambda t: torch.cat([t[1:], t[:1]]),
    lambda t: t.clamp(-1.0, 1.0),
    lambda t: t.sum(1, keepdim=True) * 0.2 + torch.zeros(3, 3).double(),
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    lambda a, b: a @ b * 0.3,
    lambda a, b: a / (b * b + 1),
    torch.maximum,
    lambda a, b: torch.where(a > b, a, b * 2),
    lambda a, b: a + b[0],
    lambda a, b: a * b[:, :1],
    lambda a, b: torch.addmm(a, b, b, alpha=0.2),
    lambda a, b: torch.lerp(a, b, 0.3),
]
INPLACE: list[Callable[[Tensor, Tensor], Any]] = [
    lambda a, b: a.add_(b),
    lambda a, b: a.mul_(b * 0.5),
    lambda a, b: a[0].sub_(b[1]),
    lambda a, b: a.t()[1].copy_(b[2]),
    lambda a, b: a.sin_(),
    lambda a, b: a[1:].mul_(0.5),
    lambda a, b: a.diagonal().add_(b[0]),
    lambda a, b: a.diagonal(1).mul_(b[0, :2]),
    lambda a, b: a.__setitem__((slice(None), 1), b[0]),
    lambda a, b: a.exp_().mul_(0.1),
    lambda a, b: a[:2, 1:].tanh_(),
    lambda a, b: a.masked_fill_(b.detach() > 1, 0.5),
    lambda a, b: a.__setitem__(a.detach() > 1, 0.3),
]

step = st.one_of(
    st.tuples(st.just("unary"), st.integers(0, len(UNARY) - 1), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("binary"), st.integers(0, len(BINARY) - 1), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("inplace"), st.integers(0, len(INPLACE) - 1), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("view"), st.integers(0, 3), st.integers(0, 99), st.just(0)),
)
VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.t(),
    lambda t: t.view(3, 3),
    lambda t: t.transpose(0, 1),
    lambda t: t[0:3],
]


def run_steps(steps: list[tuple[str, int, int, int]], leaves: list[Tensor]) -> Tensor:
    pool = [leaf * 1.0 for leaf in leaves]
    for kind, which, i, j in steps:
        a, b = pool[i % len(pool)], pool[j % len(pool)]
        if kind == "unary":
            pool.append(UNARY[which](a))
        elif kind == "binary":
            pool.append(BINARY[which](a, b))
        elif kind == "view":
            pool.append(VIEWS[which](a))
        elif a is not b:
            INPLACE[which](a, b * 1.0)
    return sum((k + 1) * t.sum() for k, t in enumerate(pool))


@te.op
def entered(x: Tensor) -> Tensor:
    return x * 1


@entered.rule
def entered_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return g


ways = pytest.mark.parametrize("way", ["block", "global"])


@ways
@given(steps=st.lists(step, min_size=1, max_size=12), seed=st.integers(0, 10**6))
@settings(max_examples=50)
def test_random_expression_graphs(way: str, steps: list[tuple[str, int, int, int]], seed: int) -> None:
    check_random_graph(steps, seed, way)


@pytest.mark.slow
@ways
@given(steps=st.lists(step, min_size=1, max_size=40), seed=st.integers(0, 10**6))
@settings(max_examples=400)
def test_more_random_expression_graphs(way: str, steps: list[tuple[str, int, int, int]], seed: int) -> None:
    check_random_graph(steps, seed, way)


@ways
@given(steps=st.lists(step, min_size=1, max_size=8), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_second_derivatives_of_random_graphs(way: str, steps: list[tuple[str, int, int, int]], seed: int) -> None:
    steps = [each for each in steps if each[0] != "inplace"]
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(3, 3, dtype=torch.float64, generator=generator) for _ in range(2)]
    copies = [plain(t).requires_grad_() for t in leaves]
    found = torch.autograd.grad(run_steps(steps, copies), copies, create_graph=True)
    D_ = sum((g * g).sum() for g in found) + sum((t * t).sum() for t in copies)
    wanted = torch.autograd.grad(D_, copies)
    if way == "block":
        with te.record():
            C = run_steps(steps, leaves)
            te.backward(C, record=True)
            D = sum((grad_of(t) ** 2).sum() for t in leaves) + sum((t * t).sum() for t in leaves)
    else:
        C = run_steps(steps, [entered(t) for t in leaves])
        te.backward(C, record=True)
        D = sum((grad_of(t) ** 2).sum() for t in leaves) + sum((t * t).sum() for t in leaves)
    te.backward(D)
    if all(bool(g.isfinite().all()) for g in wanted):
        agree(leaves, list(wanted), 1e-7)


def check_random_graph(steps: list[tuple[str, int, int, int]], seed: int, way: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(3, 3, dtype=torch.float64, generator=generator) for _ in range(2)]
    copies = [plain(t).requires_grad_() for t in leaves]
    try:
        wanted_C = run_steps(steps, copies)
        wanted = torch.autograd.grad(wanted_C, copies, allow_unused=True)
    except RuntimeError:
        wanted = None  # an in-place write that torch.autograd refuses: below, the engine keeps the old value
    if way == "block":
        with te.record():
            C = run_steps(steps, leaves)
    else:  # plain torch on recorded values, outside a block
        C = run_steps(steps, [entered(t) for t in leaves])
    plainly = run_steps(steps, [plain(t) for t in leaves])
    assert torch.equal(plain(C), plainly) or (C.isnan() and plainly.isnan())
    te.backward(C)
    if not bool(C.isfinite()):
        return
    if wanted is not None:
        agree(leaves, list(wanted), 1e-8)
    else:  # against central differences along one direction
        direction = [torch.randn(3, 3, dtype=torch.float64, generator=generator) for _ in leaves]
        h = 1e-6
        up = run_steps(steps, [plain(t) + h * d for t, d in zip(leaves, direction, strict=True)])
        down = run_steps(steps, [plain(t) - h * d for t, d in zip(leaves, direction, strict=True)])
        slope = float(up - down) / (2 * h)
        told = sum(float((grad_of(t) * d).sum()) for t, d in zip(leaves, direction, strict=True) if g_of(t) is not None)
        assert told == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("record", [False, True])
def test_a_constant_that_a_rule_returns_stays_its_own(record: bool) -> None:
    """Neither do gradients of two sweeps share its memory, nor does a write to one of them change it."""
    slope = torch.ones(3, dtype=torch.float64)

    @te.op
    def shifted(x: Tensor) -> Tensor:
        return x + 1

    @shifted.rule
    def shifted_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return slope

    x, y = rand(3), rand(3)
    for leaf in (x, y):
        te.backward(shifted(leaf), torch.ones(3, dtype=torch.float64), record=record)
    unshared(grad_of(x), grad_of(y), slope)


# -- nothing is done that nobody reads -------------------------------------------------------------------


def _swept(net: torch.nn.Module, x: Tensor) -> tuple[Heard, list[Any]]:
    """A net's parameters with their ``.g``, held against torch.autograd, and what ran in the sweep."""
    parameters: list[Any] = list(net.parameters())
    expected = torch.autograd.grad(net(x).square().sum(), parameters)
    with te.record():
        C = net(x).square().sum()
    with Heard() as heard:
        te.backward(C, wrt=parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        close(grad_of(parameter), gradient)
    return heard, parameters


def test_the_gradients_of_weights_are_not_copied() -> None:
    layers = [torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)]
    heard, parameters = _swept(torch.nn.Sequential(*layers).double(), rand(6, 5))
    assert "clone" not in heard.names
    unshared(*[grad_of(each) for each in parameters])


@pytest.mark.parametrize("bias", [True, False])
def test_of_a_picture_that_is_data_no_gradient_is_computed(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tape_engine.rules.common import kernels

    masks: list[list[bool]] = []
    kernel = kernels.convolution_backward

    def noted(*args: Any) -> Any:
        masks.append(list(args[-1]))
        return kernel(*args)

    monkeypatch.setattr(kernels, "convolution_backward", noted)
    convolutions = [torch.nn.Conv2d(3, 4, 3, bias=bias), torch.nn.Tanh(), torch.nn.Conv2d(4, 2, 2, bias=bias)]
    _swept(torch.nn.Sequential(*convolutions).double(), rand(2, 3, 6, 6))
    assert masks == [[True, True, bias], [False, True, bias]]


# -- what was computed elsewhere, with wrt -----------------------------------------------------------------------


def test_a_state_carried_over_from_a_swept_tape_cuts_no_gradient_in_silence() -> None:
    """As torch: the gradient of the second step passes through the first one as well."""
    w, x = torch.nn.Parameter(torch.randn(3, 3)), torch.randn(3)
    with te.record():
        h = torch.tanh(w @ x)
        C = h.sum()
    te.backward(C, wrt=w)
    with te.record():
        later = torch.tanh(w @ h)
        loss = later.sum()
    with pytest.raises(te.SweptError, match="h, which belongs to a tape that was already swept"):
        te.backward(loss, wrt=w)
    with te.record():
        loss = torch.tanh(w @ h.detach()).sum()
    te.backward(loss, wrt=w)
    expected = torch.autograd.grad(torch.tanh(w @ h.detach()).sum(), w)[0]
    assert torch.allclose(w.g, expected)  # type: ignore[attr-defined]


def test_what_a_swept_tape_made_of_other_parameters_is_passed_over() -> None:
    """As in torch, where the graph behind ``fake`` is gone and nobody asks for it: a critic's step."""
    w, v, x = torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.randn(3, 3)), torch.randn(3)
    with te.record():
        fake = torch.tanh(w @ x)
        C = fake.sum()
    te.backward(C, wrt=w)
    with te.record():
        loss = torch.tanh(v @ fake).sum()
    te.backward(loss, wrt=v)
    expected = torch.autograd.grad(torch.tanh(v @ fake.detach()).sum(), v)[0]
    assert torch.allclose(v.g, expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize("of_the_same", [True, False])
def test_what_torch_alone_computed_of_what_is_asked_for_is_refused(of_the_same: bool) -> None:
    w, v = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(3))
    y = torch.tanh(w * 2)
    asked = w if of_the_same else v
    with te.record():
        loss = (asked * y).sum()
    if of_the_same:
        with pytest.raises(te.TapeError, match="y, which was computed by torch operations outside the recording"):
            te.backward(loss, wrt=w)
    else:
        te.backward(loss, wrt=v)
        assert torch.allclose(v.g, y)  # type: ignore[attr-defined]


@pytest.mark.parametrize("write", ["zero_", "fill_", "uniform_", "bernoulli_", "gt_"])
def test_a_gradient_passes_over_a_write_under_no_grad_that_has_none(write: str) -> None:
    def computed(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        h = x * 2
        with torch.no_grad():
            getattr(h, write)(*([0.5] if write in ("fill_", "gt_") else []))
        return (h * x).sum()

    x = rand(3).requires_grad_()
    (expected,) = torch.autograd.grad(computed(x), x)
    with te.record():
        C = computed(x)
    (g,) = te.grad(C, (x,))
    assert g is not None
    assert torch.equal(g, expected)


# -- nodes of several outputs ------------------------------------------------------------------------------


def test_a_rule_of_several_outputs_is_not_asked_where_no_gradient_arrives() -> None:
    asked = []

    @te.op
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x * 3

    @two.rule
    def two_grad(g: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        asked.append(g)
        return g[0] * 2 + g[1] * 3

    @te.op
    def lost(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return a + b + x

    @lost.rule
    def lost_grad(g: Tensor, out: Tensor, a: Tensor, b: Tensor, x: Tensor) -> tuple[Any, ...]:
        return None, None, g

    x = rand(3)
    with te.record():
        C = lost(*two(x), x).sum()
    te.backward(C, wrt=x)
    assert not asked
    assert torch.equal(x.g, torch.ones(3, dtype=torch.float64))


def test_a_none_among_the_outputs_is_one_among_their_gradients() -> None:
    @te.op
    def three(x: Tensor) -> tuple[Any, ...]:
        return x * 2, None, x * 3

    @three.rule
    def three_grad(g: tuple[Any, ...], out: tuple[Any, ...], x: Tensor) -> Tensor:
        assert g[1] is out[1] is None
        found: Tensor = g[0] * 2 + g[2] * 3
        return found

    x = rand(3)
    with te.record():
        a, _, b = three(x)
        C = (a * a + b).sum()
    te.backward(C, wrt=x)
    close(x.g, 8 * x + 3, 1e-12)


def test_a_list_of_one_output_is_given_to_its_rule_as_such() -> None:
    @te.op
    def listed(x: Tensor) -> tuple[Tensor]:
        return (x * 2,)

    @listed.rule
    def listed_grad(g: tuple[Tensor], out: tuple[Tensor], x: Tensor) -> Tensor:
        (only,), (made,) = g, out
        assert made.shape == x.shape
        return only * 2

    x = rand(3)
    with te.record():
        (y,) = listed(x)
        C = (y * y).sum()
    te.backward(C, wrt=x)
    close(x.g, 8 * x, 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_tensors_given_by_keyword_reach_a_rule_of_several_outputs(masked: bool) -> None:
    q, k, v, mask = rand(1, 2, 5, 4), rand(1, 2, 5, 4), rand(1, 2, 5, 4), rand(5, 5)

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        made: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if masked else None, scale=0.7)
        return (made**2).sum()

    expected = reference(function, q, k, v, mask)[: 3 + masked]
    with te.record():
        C = function(q, k, v, mask)
    te.backward(C)
    for each, g in zip((q, k, v, mask), expected, strict=False):
        close(each.g, g, 1e-9)
