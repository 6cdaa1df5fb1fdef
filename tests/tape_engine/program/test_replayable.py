"""`te.replayable` against the plain function and torch.autograd, call after call."""

from __future__ import annotations

import copy
import gc
import re
import threading
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tape_engine as te
from tests.helpers import close, each_tensor, g_of, plain, reference
from tests.tape_engine.program.common import F32, F64, draw

Tensor = torch.Tensor
Pair = namedtuple("Pair", "left right")


def count(replayable: Any) -> int:
    """How many programs were recorded."""
    return len(replayable.programs)


def same(got: Any, wanted: Any) -> None:
    """Asserts two results equal, tensors to rounding, with their containers."""
    assert type(got) is type(wanted) or isinstance(got, Tensor)
    if isinstance(wanted, Tensor):
        close(got, wanted)
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key in wanted:
            same(got[key], wanted[key])
    elif isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            same(a, b)
    else:
        assert got == wanted


# -- results and gradients -----------------------------------------------------------------------------------


def test_calls_and_steps_give_what_the_function_and_autograd_give() -> None:
    w, b = draw(3, 2), draw(2)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ w + b).tanh() - y).square().mean()

    fast = te.replayable(function)
    for turn in range(4):
        x, y = draw(5, 3), draw(5, 2)
        close(fast(x, y), function(x, y))
        close(fast.step(x, y), function(x, y))
        wanted = reference(lambda x, y, w, b: ((x @ w + b).tanh() - y).square().mean(), x, y, w, b)
        for tensor, g in zip((x, y, w, b), wanted, strict=True):
            close(g_of(tensor), g)
        with torch.no_grad():
            w -= 0.1 * g_of(w)  # type: ignore[operator]
        assert count(fast) == 1, turn


def test_the_first_step_gives_what_later_ones_give() -> None:
    w, x = draw(4), draw(4)
    fast = te.replayable(lambda x: (x * w).exp().sum())
    close(fast.step(x), (x * w).exp().sum())
    first = [plain(g_of(t)) for t in (x, w)]
    fast.step(x)
    for tensor, g, other in zip((x, w), first, (w, x), strict=True):
        close(g_of(tensor), g)
        close(g, other * (x * w).exp())
    assert count(fast) == 1
    fast.step(x, accumulate=True)
    close(g_of(w), 2 * first[1])


def test_step_takes_a_seed_at_the_first_call_and_later() -> None:
    w, x, seed = draw(3), draw(3), draw(3)
    fast = te.replayable(lambda x: x * w)
    for _ in range(2):
        fast.step(x, seed=seed)
        close(g_of(x), seed * w)
        close(g_of(w), seed * x)
    with pytest.raises(te.ShapeError, match="seed"):
        fast.step(x)


def test_results_are_the_callers_and_on_no_tape() -> None:
    w = draw(3)
    fast = te.replayable(lambda x: (x * w, x[:2]))
    kept = []
    for turn in range(4):
        x = torch.full((3,), float(turn), dtype=F64)
        product, part = fast(x)
        kept.append((product, part))
        part.add_(5)
        close(x, torch.full((3,), float(turn), dtype=F64))
        with pytest.raises(te.NotRecordedError):
            te.backward(product.sum())
    for turn, (product, part) in enumerate(kept):
        close(product, turn * w)
        close(part, torch.full((2,), turn + 5.0, dtype=F64))
    assert type(w) is Tensor


def test_containers_in_and_out() -> None:
    def function(pair: Any, *more: Tensor, options: dict[str, Any], flag: bool = False) -> Any:
        left, right = pair
        total = left + right * options["scale"] + sum(options["others"])
        for each in more:
            total = total + each
        return {"sum": total.sum(), "parts": [total, (right.exp(), None)], "flag": flag, "pair": Pair(left, right * 2)}

    fast = te.replayable(function)
    for turn in range(3):
        pair = (draw(3), draw(3))
        options: dict[str, Any] = {"scale": draw(3), "others": [draw(3), draw(3)]}
        same(fast(pair, draw(3) * 0, options=options), function(pair, torch.zeros(3, dtype=F64), options=options))
        assert count(fast) == 1, turn
    same(fast(Pair(*pair), options=options), function(Pair(*pair), options=options))
    same(fast(pair, options=options, flag=True), function(pair, options=options, flag=True))
    assert count(fast) == 3
    fast.step(pair, options=options)
    close(g_of(options["others"][1]), torch.ones(3, dtype=F64))
    close(g_of(options["scale"]), pair[1])


def test_an_argument_that_is_returned_is_returned_itself() -> None:
    w = draw(3)

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x.mul_(2)
        return x, w, x + w

    fast = te.replayable(function)
    for _ in range(3):
        x = draw(3)
        before = x.clone()
        a, b, c = fast(x)
        assert a is x
        assert b is w
        close(x, before * 2)
        close(c, before * 2 + w)
    assert count(fast) == 1


def test_a_tensor_twice_and_a_parameter_as_an_argument() -> None:
    w, x, y = draw(3), draw(3), draw(3)

    def function(a: Tensor, b: Tensor) -> Tensor:
        return (a * a.exp() + b * w).sum()

    fast = te.replayable(function)
    for a, b in ((x, x), (w, x), (x, y), (w, w), (y, y), (x, w)) * 2:
        for t in (w, x, y):
            t.__dict__.pop("g", None)
        close(fast(a, b), function(a, b))
        fast.step(a, b)
        held = {id(t): t.detach().clone().requires_grad_() for t in (a, b, w)}
        out = (held[id(a)] * held[id(a)].exp() + held[id(b)] * held[id(w)]).sum()
        for t in (a, b, w):
            close(g_of(t), torch.autograd.grad(out, held[id(t)], retain_graph=True)[0])


# -- what records anew -----------------------------------------------------------------------------------------


def test_shapes_dtypes_and_values_record_anew_and_come_back() -> None:
    def function(x: Tensor, power: float = 2.0, name: str = "sum") -> Tensor:
        return getattr(x**power, name)()  # type: ignore[no-any-return]

    fast = te.replayable(function)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((draw(3),), {}), ((draw(2, 3),), {}), ((draw(3, dtype=F32),), {}), ((draw(3), 3.0), {}),
        ((draw(3),), {"name": "mean"}), ((torch.randn(3, dtype=torch.complex128),), {}), ((draw(3), 3), {}),
    ]  # fmt: skip
    for _ in range(3):
        for args, kwargs in calls:
            close(fast(*args, **kwargs), function(*args, **kwargs), 1e-6)
    assert count(fast) == len(calls)


def test_training_flags_of_any_module_record_anew() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.Dropout(0.5)).double()
    twin = copy.deepcopy(net)
    fast = te.replayable(lambda x: net(x).square().mean())
    for training in (True, False, True, True, False):
        net[1].train(training)
        twin[1].train(training)
        for _ in range(2):
            x = draw(6, 4)
            torch.manual_seed(3)
            wanted = twin(x).square().mean()
            after = torch.rand(1)
            torch.manual_seed(3)
            close(fast(x), wanted.detach())
            assert torch.equal(torch.rand(1), after)
            for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
                close(a, b)
    assert count(fast) == 2


def test_what_a_closure_a_global_or_an_attribute_holds_is_looked_at() -> None:
    class Model:
        def __init__(self) -> None:
            self.w = draw(3)
            self.scale = 2.0
            self.steps = [1, 2]

        @te.replayable
        def __call__(self, x: Tensor) -> Tensor:
            return (x * self.w).sum() * self.scale * self.steps[1] + bias

    bias, model, other = draw(1)[0], Model(), Model()
    x = draw(3)

    def check() -> None:
        for each in (model, other):
            close(type(each).__call__(each, x), (x * each.w).sum() * each.scale * each.steps[1] + bias)

    check()
    model.w = draw(3)
    check()
    model.scale = 3.0
    check()
    other.steps[1] = 5
    check()
    bias = draw(1)[0]
    check()
    model.w.mul_(2)
    made = count(Model.__call__)
    check()
    assert count(Model.__call__) == made


def test_parameters_updated_loaded_and_exchanged() -> None:
    net = nn.Linear(3, 1).double()
    fast = te.replayable(lambda x: net(x).square().mean())
    x = draw(5, 3)
    opt = torch.optim.Adam(net.parameters(), lr=0.1)

    def check() -> None:
        with torch.no_grad():
            close(fast(x), net(x).square().mean())
        close(fast.step(x), net(x).square().mean().detach())
        wanted = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
        for p, g in zip(net.parameters(), wanted, strict=True):
            close(g_of(p), g)

    check()
    made = count(fast)
    for _ in range(3):
        for p in net.parameters():
            p.grad = g_of(p)
        opt.step()
        check()
    net.load_state_dict({"weight": draw(1, 3), "bias": draw(1)})
    check()
    net.weight.data = draw(1, 3)
    check()
    assert count(fast) == made
    net.weight = nn.Parameter(draw(1, 3))
    check()
    net.register_forward_hook(lambda module, args, out: out * 2)
    check()


def test_modes_of_torch_record_anew() -> None:
    w = draw(3, dtype=F32)
    fast = te.replayable(lambda x: x.reshape(1, 3) @ w.reshape(3, 1))
    x = draw(3, dtype=F32)
    wanted = x @ w
    close(fast(x)[0, 0], wanted, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert fast(x).dtype == torch.bfloat16
    assert fast(x).dtype == F32
    with torch.no_grad():
        close(fast(x)[0, 0], wanted, 1e-6)
    assert count(fast) == 3


def test_a_branch_records_anew_and_both_ways_are_kept() -> None:
    n = torch.zeros(())

    @te.replayable
    def function(x: Tensor) -> Tensor:
        n.add_(1)
        y = torch.nn.functional.dropout(x, 0.5)
        return y * 2 if x.sum() > 0 else y * 3

    for turn, sign in enumerate((1, -1, 1, -1, -1, 1)):
        x = sign * torch.rand(8, dtype=F64)
        torch.manual_seed(turn)
        wanted = torch.nn.functional.dropout(x, 0.5) * (2 if sign > 0 else 3)
        after = torch.rand(2)
        torch.manual_seed(turn)
        close(function(x), wanted)
        assert torch.equal(torch.rand(2), after)
        assert n == turn + 1
    assert count(function) == 2


def test_a_bounded_number_is_kept() -> None:
    fast = te.replayable(lambda x: x.sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", te.TapeWarning)
        for size in range(1, 60):
            close(fast(torch.ones(size)), torch.tensor(float(size)))
    assert count(fast) <= 16


# -- warnings and errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda f, i: f(torch.ones(i + 1)), r"x: a tensor \(\d+,\)  float32 before, a tensor \(\d+,\)  float32 now"),
        (lambda f, i: f(torch.ones(2), rate=i / 10), r"rate: [01]\.\d before, [01]\.\d now"),
        (lambda f, i: f(torch.ones(2), more=[1] * i), r"the length of more"),
        (lambda f, i: f(torch.ones(2) * i, decides=True), r"a decision in it: .*comes out differently"),
    ],
)
def test_recording_again_and_again_warns_and_names_what_changes(call: Callable[..., Any], told: str) -> None:
    def function(x: Tensor, rate: float = 1.0, more: Any = (), decides: bool = False) -> Tensor:
        return x.sum() * (float(x[0]) if decides else rate)

    fast = te.replayable(function)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turn in range(12):
            call(fast, turn)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert issubclass(caught[0].category, te.TapeWarning)
    assert re.search(told, text), text
    assert "function was recorded 10 times in a row" in text
    assert "fix: " in text


def test_replays_in_between_do_not_warn() -> None:
    fast = te.replayable(lambda x: x.sum())
    for size in range(1, 20):
        fast(torch.ones(size))
        fast(torch.ones(size))


def test_what_a_function_raises_comes_out_and_nothing_is_kept() -> None:
    w = draw(3)

    @te.replayable
    def function(x: Tensor, bad: bool) -> Tensor:
        if bad:
            raise KeyError("mine")
        return (x * w).sum()

    x = draw(3)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            function(x, True)
        assert te.current_tape() is te.global_tape()
        close(function(x, False), (x * w).sum())
    with pytest.raises(TypeError):
        function(x)
    assert count(function) == 1
    with pytest.raises(RuntimeError):
        function(draw(4), False)
    with pytest.raises(te.DTypeError):
        te.replayable(3)  # type: ignore[arg-type]


def test_a_function_that_returns_no_tensor_is_run_as_it_is() -> None:
    w = torch.zeros(3)

    @te.replayable
    def function(x: Tensor) -> float:
        w.add_(x)
        return float(w.sum())

    for turn in range(1, 4):
        assert function(torch.ones(3)) == 3 * turn
    with pytest.raises(te.MissingRuleError, match=r"function\.step"):
        function.step(torch.ones(3))


# -- methods, recordings, recursion, threads -----------------------------------------------------------------------


def test_methods_and_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2).double()

        @te.replayable
        def loss(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            """Its loss."""
            return self.inner(x).square().mean() * scale  # type: ignore[no-any-return]

    one, two = Net(), Net()
    assert Net.loss.__doc__ == "Its loss."
    for _ in range(2):
        for net in (one, two):
            x = draw(4, 3)
            close(net.loss(x), net.inner(x).square().mean().detach())
            close(net.loss.step(x, scale=2.0), 2 * net.inner(x).square().mean().detach())
            wanted = torch.autograd.grad(2 * net.inner(x).square().mean(), net.inner.weight)[0]
            close(g_of(net.inner.weight), wanted)
    assert count(Net.loss) == 4
    gone = weakref.ref(two)
    del two, net
    gc.collect()
    assert gone() is None
    assert count(Net.loss) == 2
    module = te.replayable(one.inner)
    for _ in range(2):
        close(module(x), one.inner(x).detach())


def test_inside_a_recording_it_is_recorded() -> None:
    w = draw(3)
    fast = te.replayable(lambda x: (x * w).tanh())
    x = draw(3)
    fast(x)
    with te.record() as tape:
        y = (x * 2).exp()
        c = fast(y).sum()
    te.backward(c)
    wanted = reference(lambda x, w: ((x * 2).exp() * w).tanh().sum(), x, w)
    close(g_of(x), wanted[0])
    close(g_of(w), wanted[1])
    program = tape.program(inputs=x, outputs=c)
    other = draw(3)
    close(program(other), ((other * 2).exp() * w).tanh().sum())


def test_a_recorded_argument_keeps_its_gradient_at_every_call() -> None:
    w, b = draw(3, 3), draw(3)
    fast = te.replayable(lambda z: (z * z).sum())
    for _ in range(3):
        x = draw(2, 3)
        c = fast(te.lin(x, w, b))
        te.backward(c)
        close(g_of(x), 2 * (x @ w + b) @ w.t())


def test_recursion_and_one_inside_another() -> None:
    @te.replayable
    def power(x: Tensor, n: int) -> Tensor:
        return x if n == 0 else x * power(x, n - 1) + x * 0

    @te.replayable
    def outer(x: Tensor) -> Tensor:
        return power(x, 3).sum() + power(x, 2).sum()  # type: ignore[no-any-return]

    for _ in range(2):
        x = draw(3)
        close(outer(x), (x**4).sum() + (x**3).sum())
        close(power(x, 2), x**3)
        outer.step(x)
        close(g_of(x), 4 * x**3 + 3 * x**2)


def test_eight_threads_each_get_their_own() -> None:
    w = draw(5, 5)
    fast = te.replayable(lambda x: ((x @ w).tanh().sum(), x * 2))
    failures: list[str] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        start.wait()
        for turn in range(60):
            x = torch.randn(1 + number % 3, 5, dtype=F64, generator=generator)
            c, twice = fast.step(x) if turn % 2 else fast(x)
            if abs(float(c - (x @ w).tanh().sum())) > 1e-10 or not torch.equal(twice, x * 2):
                failures.append(f"{number} at {turn}")
            if turn % 2 and not torch.allclose(x.g, (1 - (x @ w).tanh() ** 2) @ w.t()):  # type: ignore[attr-defined]
                failures.append(f"{number} at {turn}: .g")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
    assert count(fast) == 3


def test_results_agree_with_each_tensor_of_the_plain_function() -> None:
    lstm = nn.LSTM(3, 4).double()
    fast = te.replayable(lambda x: lstm(x))
    for _ in range(2):
        x = draw(5, 2, 3)
        for a, b in zip(each_tensor(fast(x)), each_tensor(lstm(x)), strict=True):
            close(a, b.detach())


def test_another_default_device_records_anew() -> None:
    fast = te.replayable(lambda x: (x * 1, torch.zeros(3)))
    x = draw(3)
    fast(x)
    with torch.device("meta"):
        assert fast(x)[1].device.type == "meta"
    assert fast(x)[1].device.type == "cpu"
    assert len(fast.programs) == 2
