"""Large gradients are written to where they lie, where nobody else has them: never where somebody does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tape_engine as te
from tape_engine import walk
from tape_engine.registry import find

Tensor = torch.Tensor
aten = torch.ops.aten
SIZE = 160  # of matrices with more elements than `walk._LARGE`

assert SIZE * SIZE > walk._LARGE


def large() -> Tensor:
    return torch.randn(SIZE, SIZE)


# -- rules that write to the gradient that they are given ------------------------------------------------------

#: Calls of operations whose rules may do so, with which gradients are wanted, and whether it can.
SPENT: dict[str, tuple[Any, Callable[[], tuple[Any, ...]], dict[str, Any], tuple[bool, ...], bool]] = {
    "relu": (aten.relu.default, lambda: (large(),), {}, (True,), True),
    "gelu": (aten.gelu.default, lambda: (large(),), {}, (True,), True),
    "gelu, tanh": (aten.gelu.default, lambda: (large(),), {"approximate": "tanh"}, (True,), True),
    "mul, left": (aten.mul.Tensor, lambda: (large(), large()), {}, (True, False), True),
    "mul, right": (aten.mul.Tensor, lambda: (large(), large()), {}, (False, True), True),
    "mul, both": (aten.mul.Tensor, lambda: (large(), large()), {}, (True, True), False),
    "mul, number": (aten.mul.Tensor, lambda: (large(), 3.0), {}, (True,), True),
    "mul, row": (aten.mul.Tensor, lambda: (large(), torch.randn(SIZE)), {}, (True, False), True),
    "mul, to a row": (aten.mul.Tensor, lambda: (torch.randn(SIZE), large()), {}, (True, False), True),
    "mul, mask": (aten.mul.Tensor, lambda: (large(), large() > 0), {}, (True, False), False),
    "mul, float64": (
        aten.mul.Tensor,
        lambda: (large(), torch.tensor(2.0, dtype=torch.float64)),
        {},
        (True, False),
        False,
    ),
}


@pytest.mark.parametrize("name", SPENT)
def test_a_rule_that_spends_its_gradient_gives_what_it_gives_otherwise(name: str) -> None:
    overload, make, kwargs, needs, can = SPENT[name]
    op, args = find(overload), make()
    out = overload(*args, **kwargs)
    g = torch.randn_like(out)
    before = g.clone()
    assert op.grad is not None
    assert op.spent is not None
    expected = op.grad(g, out, *args, **kwargs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = op.spent(needs, g, out, *args, **kwargs)
    if not can:
        assert found is None
        assert torch.equal(g, before)
        return
    assert found is not None
    for need, ours, rule_s in zip(needs, found, expected, strict=False):
        if need:
            assert torch.equal(ours, rule_s)
            assert ours.data_ptr() == g.data_ptr()


def test_another_rule_for_the_operation_does_not_spend() -> None:
    assert find(aten.relu.default).spent is not None
    te.rule(aten.relu.default)(lambda g, out, x: g * 2)
    assert find(aten.relu.default).spent is None


# -- programs -------------------------------------------------------------------------------------------------


@te.op
def kept(x: Tensor) -> Tensor:
    return (x * x / 2).clone()


@kept.rule
def kept_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return x  # where g is 1: the tensor itself that the tape keeps


CONSTANT = torch.ones(SIZE, SIZE)


def copying(rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An operation that copies, with a rule of its own."""

    def copy(x: Tensor) -> Tensor:
        return x.clone()

    made = te.op(copy)
    made.rule(rule)
    return made


constant = copying(lambda g, out, x: CONSTANT)
passed = copying(lambda g, out, x: g)
seen = copying(lambda g, out, x: g.view(-1).view(g.shape))  # another tensor on the same memory
ones = copying(lambda g, out, x: g.new_ones(()).expand(SIZE, SIZE).detach())  # nobody else's, and of one element


def in_between(see: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A program in which a gradient arrives at two values, and one of them is added to before the other is passed."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        a, b = x * 1.0, w * 2.0
        r = torch.relu(a) * 2.0
        return ((see(a) + b) ** 2).sum() + (r * r).sum()

    return function


#: Of two matrices, a number: `plain` for torch, where it has other operations for ours.
PROGRAMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor] | None]] = {
    "one gradient of two": (in_between(lambda a: a), None),
    "one gradient of two, seen through a view": (in_between(seen), in_between(lambda a: a)),
    "an element for all": (
        lambda x, w: (lambda y: (ones(torch.relu(y)) + ones(y) + torch.relu(y)).sum())(x * w),
        lambda x, w: (lambda y: (torch.relu(y) + y + torch.relu(y)).sum())(x * w),
    ),
    "residual": (lambda x, w: ((x + torch.relu(x @ w)) ** 2).sum(), None),
    "gradient shared by a sum": (lambda x, w: (lambda y: (torch.relu(y) + y + F.gelu(y)).sum())(x * w), None),
    "twice the same": (lambda x, w: (lambda y: torch.relu(y + y) * 3.0)(x @ w).sum(), None),
    "sums and products": (lambda x, w: x.sum() + (x * w).sum() + torch.relu(x).mean(), None),
    "expanded": (lambda x, w: (x.sum(0, keepdim=True).expand(SIZE, SIZE) * w).sum() + x.sum(), None),
    "transposed": (lambda x, w: (torch.relu(x.t()).t() @ w + F.gelu(x)).sum(), None),
    "views": (lambda x, w: torch.relu(x.view(-1)).sum() + (x.reshape(SIZE // 2, -1) * 2.0).sum() + (x * w).sum(), None),
    "mask": (lambda x, w: F.gelu((x @ w) * (w > 0).float() * 2.0).sum(), None),
    "a saved tensor": (lambda x, w: kept(x * w).sum() + (x * w).sum(), lambda x, w: ((x * w) ** 2 / 2 + x * w).sum()),
    "a saved tensor, read after": (
        lambda x, w: (lambda y: (kept(y) + torch.relu(y) * 2.0).sum())(x * w),
        lambda x, w: (lambda y: (y * y / 2 + torch.relu(y) * 2.0).sum())(x * w),
    ),
    "a constant": (
        lambda x, w: (lambda y: constant(torch.relu(y)).sum() + constant(y).sum() + y.sum())(x * w),
        lambda x, w: (lambda y: torch.relu(y).sum() + y.sum() + y.sum())(x * w),
    ),
    "passed on": (
        lambda x, w: (lambda y: (passed(torch.relu(y)) + passed(y) + y * 2.0).sum())(x * w),
        lambda x, w: (lambda y: (torch.relu(y) + y + y * 2.0).sum())(x * w),
    ),
    "seen through a view": (
        lambda x, w: (lambda y: (torch.relu(seen(y)) * 2.0 + seen(y) + torch.relu(y)).sum())(x * w),
        lambda x, w: (lambda y: (torch.relu(y) * 2.0 + y + torch.relu(y)).sum())(x * w),
    ),
}


@pytest.mark.parametrize("all_of_them", [False, True], ids=["wrt", "every .g"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_have_torch_s_gradients_as_often_as_they_are_swept(name: str, all_of_them: bool) -> None:
    torch.manual_seed(0)
    function, plain = PROGRAMS[name]
    x, w = large(), large() / SIZE
    leaves = [each.clone().requires_grad_() for each in (x, w)]
    expected = torch.autograd.grad((plain or function)(*leaves), leaves)
    copies = [each.clone() for each in (x, w)]
    with te.record() as tape:
        C = function(x, w)
    contents = [(each, each.clone()) for value in tape.values if (each := value.tensor) is not None]
    for _ in range(2):
        te.backward(C, wrt=None if all_of_them else [x, w], keep=True)
        for ours, theirs in zip((x.g, w.g), expected, strict=True):  # type: ignore[attr-defined]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for now, then in zip((x, w), copies, strict=True):
        assert torch.equal(now, then)
    for now, then in contents:
        assert torch.equal(now, then)
    assert torch.equal(CONSTANT, torch.ones(SIZE, SIZE))


def test_a_seed_stays_as_it_is() -> None:
    x, seed = large(), large()
    before = seed.clone()
    with te.record():
        y = torch.relu(x)
    te.backward(y, seed, wrt=[x])
    assert torch.equal(seed, before)
    assert torch.equal(x.g, before * (x > 0))  # type: ignore[attr-defined]


def test_intermediate_gradients_are_each_their_own() -> None:
    x, w = large(), large() / SIZE
    with te.record():
        h = x @ w
        a = torch.relu(h)
        b = a * 2.0
        C = (b + h).sum()
    te.backward(C)
    ones = torch.ones(SIZE, SIZE)
    assert torch.equal(b.g, ones)  # type: ignore[attr-defined]
    assert torch.equal(a.g, ones * 2)  # type: ignore[attr-defined]
    assert torch.equal(h.g, ones + 2 * (h > 0))  # type: ignore[attr-defined]


def test_what_a_function_of_torch_has_saved_is_not_written_to() -> None:
    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x / 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return x  # type: ignore[no-any-return]

    x = large()
    with te.record():
        h = x * 2.0
        C = (Saving.apply(torch.relu(h)) + h).sum()  # type: ignore[no-untyped-call]
    for _ in range(2):
        te.backward(C, wrt=[x], keep=True)
        torch.testing.assert_close(x.g, 4 * x * (x > 0) + 2)  # type: ignore[attr-defined]


def test_memory_is_written_to_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    may = walk._may_be_written

    def may_be_written(g: Tensor) -> bool:
        asked.append(may(g))
        return asked[-1]

    monkeypatch.setattr(walk, "_may_be_written", may_be_written)
    x, w = large(), large() / SIZE
    with te.record():
        C = ((x + torch.relu(x @ w) * 2.0) ** 2).sum()
    te.backward(C, wrt=[x, w])
    assert asked == [True, True]  # relu's, which it has alone, and the sum at x; the product's is that of x as well


def test_what_torch_s_own_graph_holds_is_not_written_to() -> None:
    graphs = []

    @te.op
    def graphed(x: Tensor) -> Tensor:
        return x.clone()

    @graphed.rule
    def graphed_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            held = torch.ones(SIZE, SIZE, requires_grad=True) * 1.0
            graphs.append(held * held)  # which saves `held`
        return held

    x = large()
    with te.record():
        h = x * 2.0
        C = (graphed(torch.relu(h)) + h).sum()
    te.backward(C, wrt=[x])
    torch.testing.assert_close(x.g, 2.0 * (x > 0) + 2)  # type: ignore[attr-defined]
    graphs[0].sum().backward()  # type: ignore[no-untyped-call]  # torch says so if what it has saved was written to


def test_a_conjugate_is_not_left_out() -> None:
    x, w = torch.complex(large(), large()), torch.complex(large(), large())
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(((leaf * w) ** 2).abs().sum(), leaf)
    with te.record():
        C = ((x * w) ** 2).abs().sum()
    (found,) = te.grad(C, [x])
    torch.testing.assert_close(found, expected)


# -- memory that others have, though torch counts one tensor of it ----------------------------------------------

OTHERS_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "NumPy's": lambda x: torch.from_numpy(x.numpy()),
    "DLPack's": torch.from_dlpack,  # type: ignore[attr-defined]
    "a class's": lambda x: Wrapping(x),
}


class Wrapping(Tensor):
    """A tensor that does with another, which it holds, what is asked of it."""

    held: Any

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        made: Wrapping = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        made = func(*[each.held if isinstance(each, Wrapping) else each for each in args], **(kwargs or {}))
        return Wrapping(made) if isinstance(made, Tensor) else made


@pytest.mark.parametrize("name", OTHERS_MEMORY)
@pytest.mark.parametrize("added", [False, True])
def test_memory_of_others_is_not_written_to(name: str, added: bool) -> None:
    own = torch.full((SIZE, SIZE), 2.0)

    @te.op
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    @doubled.rule
    def doubled_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return OTHERS_MEMORY[name](own)

    x = large()
    with te.record():
        C = doubled(x).sum() + doubled(x).sum() if added else doubled(torch.relu(x)).sum()
    (g,) = te.grad(C, (x,))
    assert g is not None
    g = g.held if isinstance(g, Wrapping) else g
    assert torch.equal(own, torch.full_like(own, 2.0))
    assert torch.equal(g, torch.full_like(x, 4.0) if added else (x > 0) * 2.0)


def test_what_a_rule_remembers_weakly_is_not_written_to() -> None:
    cache: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()

    @te.op
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    @doubled.rule
    def doubled_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        found = cache.get("two")
        if found is None:
            found = cache["two"] = torch.full_like(x, 2.0)
        return found

    x, y = large(), large()
    with te.record():
        C = doubled(torch.relu(x)).sum() + doubled(torch.relu(y)).sum()
    for g, each in zip(te.grad(C, (x, y)), (x, y), strict=True):
        assert g is not None
        assert torch.equal(g, (each > 0) * 2.0)


def test_an_inference_tensor_of_a_rule_is_not_written_to() -> None:
    @te.op
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    @doubled.rule
    def doubled_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return g * 2

    x = large()
    with te.record():
        h = torch.relu(x)
        C = doubled(h).sum() + doubled(h).sum() + doubled(torch.relu(x)).sum()
    (g,) = te.grad(C, (x,))
    assert g is not None
    assert torch.equal(g, (x > 0) * 6.0)
