"""Long loops hold their memory level, and long tapes are swept and freed."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tape_engine as te
from tape_engine import aliases
from tape_engine.tape import Node, Value, values_by_tensor
from tests.helpers import Tensor, close, grad_of, plain, reference, the

F = torch.nn.functional


def rand(*shape: int) -> Any:
    return torch.randn(shape, dtype=torch.float64)


# -- loops -----------------------------------------------------------------------------------------
# Each makes what it needs, and returns one turn of itself.


def trains_and_adds_up_detached_losses() -> Callable[[], None]:
    X, w, total, average = rand(4, 3), nn.Parameter(rand(3)), torch.zeros((), dtype=torch.float64), 0.0

    def turn() -> None:
        nonlocal total, average
        with te.record():
            C = (X @ w).pow(2).sum()
        te.backward(C)
        total = total + C.detach()
        with torch.no_grad():
            average = average + C

    return turn


def trains_with_named_operations() -> Callable[[], None]:
    X, w, b, Y = rand(4, 3), rand(3, 1), rand(1), rand(4)

    def turn() -> None:
        nonlocal w, b
        C = te.mse(te.relu(te.lin(X, w, b)), Y)
        te.backward(C)
        w -= 0.01 * w.g
        b -= 0.01 * b.g

    return turn


def trains_parameters_with_an_optimizer() -> Callable[[], None]:
    X, Y = rand(4, 3), rand(4, 1)
    w, b = nn.Parameter(rand(3, 1)), nn.Parameter(rand(1))
    optimizer = torch.optim.SGD([w, b], lr=0.01, momentum=0.9)

    def turn() -> None:
        te.backward(te.mse(te.lin(X, w, b), Y))
        for p in (w, b):
            p.grad = grad_of(p)
        optimizer.step()

    return turn


def records_and_never_sweeps() -> Callable[[], None]:
    X, w, b, Y = rand(4, 3), rand(3, 1), rand(1), rand(4)

    def turn() -> None:
        C = te.mse(te.relu(te.lin(X, w, b)), Y)
        float(C + (w**2).sum())

    return turn


def evaluates_under_no_grad() -> Callable[[], None]:
    X, w, b, Y = rand(4, 3), rand(3, 1), rand(1), rand(4)

    def turn() -> None:
        with torch.no_grad():
            float(te.mse(te.relu(te.lin(X, w, b)), Y))

    return turn


def adds_up_the_losses() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4)
    total: Tensor | float = 0.0

    def turn() -> None:
        nonlocal total
        C = te.mse(te.lin(X, w), Y)
        te.backward(C)
        total = total + C

    return turn


def adds_up_the_losses_in_place() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4)
    total = torch.zeros((), dtype=torch.float64)

    def turn() -> None:
        nonlocal total
        C = te.mse(te.lin(X, w), Y)
        te.backward(C)
        total += C

    return turn


def adds_up_losses_of_blocks() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4, 1)
    total = torch.zeros((), dtype=torch.float64)

    def turn() -> None:
        nonlocal total
        with te.record():
            C = F.mse_loss(X @ w, Y)
        te.backward(C)
        total = total + C

    return turn


def keeps_a_running_state() -> Callable[[], None]:
    X, w = rand(4, 3), rand(3, 3)
    state = torch.zeros(4, 3, dtype=torch.float64)

    def turn() -> None:
        nonlocal state
        out = te.relu(te.lin(X + 0.1 * te.stop_gradient(state), w))
        te.backward(out.sum())
        state = te.stop_gradient(out) * 0.5

    return turn


def sweeps_with_grad() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4)

    def turn() -> None:
        nonlocal w
        g = the(te.grad(te.mse(te.lin(X, w), Y), [w]))
        assert g is not None
        w = w - 0.01 * plain(g)

    return turn


def steps_in_place_with_grad() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4)

    def turn() -> None:
        g = the(te.grad(te.mse(te.lin(X, w), Y), [w]))
        w.sub_(0.01 * g)

    return turn


def takes_second_derivatives() -> Callable[[], None]:
    x = rand(3)

    def turn() -> None:
        y = (te.relu(x) ** 3).sum()
        g = the(te.grad(y, x, record=True))
        assert g is not None
        te.backward((g * g).sum())

    return turn


def penalises_gradients_with_backward() -> Callable[[], None]:
    x, w = rand(2, 3), rand(3, 1)

    def turn() -> None:
        C = te.lin(x, w).pow(2).sum()
        te.backward(C, record=True)
        te.backward(C + (x.g**2).sum())

    return turn


def sweeps_with_keep() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4)

    def turn() -> None:
        te.backward(te.mse(te.lin(X, w), Y), keep=True)

    return turn


def accumulates() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4)

    def turn() -> None:
        te.backward(te.mse(te.lin(X, w), Y), accumulate=True, wrt=[w])

    return turn


def records_blocks_of_a_module() -> Callable[[], None]:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    X, Y = rand(4, 3), rand(4, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001)

    def turn() -> None:
        with te.record():
            C = F.mse_loss(net(X), Y)
        te.backward(C)
        for p in net.parameters():
            p.grad = grad_of(p)
        optimizer.step()

    return turn


def records_blocks_and_never_sweeps() -> Callable[[], None]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).double()
    X = rand(4, 3)

    def turn() -> None:
        with te.record():
            y = net(X)
            y.add_(1)
            y[0].mul_(2)

    return turn


def takes_batches_by_slicing() -> Callable[[], None]:
    X, w, Y = rand(64, 3), rand(3, 1), rand(64)
    at = 0

    def turn() -> None:
        nonlocal at, w
        at = (at + 4) % 64
        te.backward(te.mse(te.lin(X[at : at + 4], w), Y[at : at + 4]))
        w = w - 0.01 * w.g

    return turn


def writes_into_one_buffer() -> Callable[[], None]:
    x = rand(8, 3)
    buffer = torch.zeros(8, 3, dtype=torch.float64)

    def turn() -> None:
        with te.record():
            buffer.zero_()
            for i in range(3):
                buffer[i] = torch.sin(x[i]) + buffer[i - 1]
            C = (buffer * buffer).sum()
        te.backward(C)

    return turn


def counts_and_averages_in_place() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4, 1)
    count, average = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.float64)

    def turn() -> None:
        with te.record():
            C = F.mse_loss(X @ w, Y)
            count.add_(1)
            with torch.no_grad():
                average.mul_(0.9).add_(0.1 * C)
        te.backward(C)

    return turn


def raises_and_goes_on() -> Callable[[], None]:
    X, w = rand(4, 3), rand(2, 1)

    def turn() -> None:
        with suppress(te.ShapeError):
            te.lin(X, w)
        try:
            with te.record():
                y = X * 2
                raise KeyError
        except KeyError:
            pass
        with suppress(te.ShapeError):
            te.backward(y)

    return turn


def keeps_the_last_loss() -> Callable[[], None]:
    X, w, Y = rand(4, 3), rand(3, 1), rand(4)
    best: Tensor | None = None

    def turn() -> None:
        nonlocal best
        C = te.mse(te.lin(X, w), Y)
        te.backward(C)
        if best is None or best >= C:
            best = C

    return turn


LOOPS: list[Callable[[], Callable[[], None]]] = [
    trains_with_named_operations,
    trains_and_adds_up_detached_losses,
    trains_parameters_with_an_optimizer,
    records_and_never_sweeps,
    evaluates_under_no_grad,
    adds_up_the_losses,
    adds_up_the_losses_in_place,
    adds_up_losses_of_blocks,
    keeps_a_running_state,
    sweeps_with_grad,
    steps_in_place_with_grad,
    takes_second_derivatives,
    penalises_gradients_with_backward,
    sweeps_with_keep,
    accumulates,
    records_blocks_of_a_module,
    records_blocks_and_never_sweeps,
    takes_batches_by_slicing,
    writes_into_one_buffer,
    counts_and_averages_in_place,
    raises_and_goes_on,
    keeps_the_last_loss,
]


#: Lists of weak references are cleaned at powers of two, that of the global tape past 1024.
SLACK = {"tape": 1100, "members": 40, "marked": 40}


def census() -> dict[str, int]:
    """How many of the engine's things are alive."""
    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]
    return {
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in kinds),
        "nodes": kinds.count(Node),
        "values": kinds.count(Value),
        "bound": len(values_by_tensor),
        "groups": len(aliases._by_storage),
        "members": sum(len(group.members) for group in aliases._by_storage.values()),
        "tape": len(te.global_tape()._nodes),
        "marked": len(te.global_tape().token.marked),
    }


def hold_level(before: dict[str, int]) -> None:
    for what, count in census().items():
        assert count <= before[what] + SLACK.get(what, 8), f"{what}: {before[what]} before, {count} after"


@pytest.mark.parametrize("make", LOOPS, ids=lambda f: f.__name__)
def test_a_loop_holds_its_level(make: Callable[[], Callable[[], None]]) -> None:
    turn = make()
    for _ in range(40):
        turn()
    before = census()
    for _ in range(120):
        turn()
    hold_level(before)


#: The loops that most users write go on for 20,000 turns, the others for 5,000.
COMMON = {
    trains_with_named_operations,
    trains_parameters_with_an_optimizer,
    records_and_never_sweeps,
    adds_up_the_losses,
    sweeps_with_grad,
    records_blocks_of_a_module,
}


@pytest.mark.slow
@pytest.mark.parametrize("make", LOOPS, ids=lambda f: f.__name__)
def test_a_long_loop_holds_its_level(make: Callable[[], Callable[[], None]]) -> None:
    turns = 20_000 if make in COMMON else 5_000
    turn = make()
    for _ in range(turns // 10):
        turn()
    before, resident = census(), resident_bytes()
    for _ in range(turns - turns // 10):
        turn()
    hold_level(before)
    assert resident_bytes() - resident < 6 * 2**20


def resident_bytes() -> int:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
def test_the_level_holds_without_the_cycle_collector() -> None:
    turn = trains_with_named_operations()
    gc.disable()
    try:
        for _ in range(500):
            turn()
        nodes = len([each for each in gc.get_objects() if type(each) is Node])
        resident = resident_bytes()
        for _ in range(5_000):
            turn()
        assert len([each for each in gc.get_objects() if type(each) is Node]) <= nodes + 8
        assert resident_bytes() - resident < 8 * 2**20
    finally:
        gc.enable()


# -- what a swept step lets go ---------------------------------------------------------------------


def test_a_step_in_a_function_lets_its_intermediates_go() -> None:
    X, w, b, Y = rand(4, 3), rand(3, 1), rand(1), rand(4)
    seen: list[weakref.ref[Tensor]] = []

    def step() -> float:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        C = te.mse(U, Y)
        seen.extend(map(weakref.ref, (Z, U, C)))
        te.backward(C)
        return float(C)

    gc.disable()
    try:
        step()
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


def test_deleted_names_are_let_go_inside_a_running_function() -> None:
    X, w = rand(4, 3), rand(3, 1)
    Z = te.lin(X, w)
    C = Z.sum()
    te.backward(C)
    refs = weakref.ref(Z), weakref.ref(C)
    del Z, C
    assert [ref() for ref in refs] == [None, None]


def test_what_no_rule_reads_is_not_kept() -> None:
    x = rand(5, 5)
    with te.record() as tape:
        a = x + 1
        b = a.t()
        C = b.sum()
        ref = weakref.ref(a)
        del a, b
    assert ref() is None
    te.backward(C)
    close(x.g, torch.ones(5, 5).double())
    assert len(tape) == 3


def test_what_a_rule_reads_is_kept_until_the_tape_goes() -> None:
    x = rand(5, 5)
    with te.record() as tape:
        a = torch.sin(x)
        C = (a * a).sum()
        del a
    kept = [cell for node in tape.nodes for cell in node.saved if cell is not None]
    assert kept
    refs = [weakref.ref(cell) for cell in kept]
    del kept
    te.backward(C)
    close(x.g, torch.sin(2 * plain(x)))
    tape.clear()
    del C
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_the_statistics_of_a_module_keep_nothing_of_a_recording_that_was_swept() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh()).double()
    x = rand(5, 3)
    gc.disable()
    try:
        with te.record() as tape:
            C = net(x).sum()
        nodes = [weakref.ref(node) for node in tape.nodes]
        te.backward(C)
        del C, tape
        left = [ref() for ref in nodes if ref() is not None]
    finally:
        gc.enable()
    assert [node.op.name for node in left if node is not None] == ["add"], "the count of batches alone, without a past"
    before = plain(net[1].running_mean).clone()
    with te.record():
        C = net(x).sum()
    te.backward(C)
    assert not torch.equal(plain(net[1].running_mean), before)


def test_a_named_operation_keeps_only_what_its_rule_reads() -> None:
    X, w, b, Y = rand(40, 3), rand(3, 1), rand(1), rand(40)
    with te.record() as tape:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        C = te.mse(U, Y)
        ref = weakref.ref(Z)
        del Z
    assert ref() is None, "relu's rule reads U alone"
    te.backward(C)
    X_g, *_ = reference(lambda X, w, b: (torch.relu(X @ w + b).squeeze(-1) - Y).pow(2).mean(), X, w, b)
    close(X.g, X_g)
    assert len(tape) == 3


def test_a_closed_tape_is_no_garbage_cycle() -> None:
    gc.collect()
    gc.disable()
    try:
        x = rand(3)
        with te.record() as tape:
            y = x * 2
            y.add_(1)
            v = y[1:]
            v.mul_(3)
            C = (y * y).sum()
        te.backward(C)
        refs = [weakref.ref(node) for node in tape.nodes] + [weakref.ref(tape)]
        del tape, y, v, C
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()


# -- long tapes ------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        self.count += 1
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def chain(length: int) -> tuple[te.Tape, Tensor, Tensor]:
    """``y = y + x`` and, every tenth time, ``y = y * 0.9999``, whose operand its rule keeps."""
    x = rand(2)
    with te.record() as tape:
        y = x
        for i in range(length):
            y = y + x if i % 10 else y * 0.9999
        C = y.sum()
    return tape, x, C


@pytest.mark.parametrize("length", [3_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_a_long_chain_is_swept_in_linear_work_and_freed(length: int) -> None:
    tape, x, C = chain(length)
    assert len(tape) == length + 1
    with Counting() as heard:
        te.backward(C)
    slope = 1.0
    for i in range(length):
        slope = slope + 1.0 if i % 10 else slope * 0.9999
    close(grad_of(x), torch.full((2,), slope, dtype=torch.float64), 1e-9)
    assert heard.count <= 3 * length
    first = weakref.ref(tape.nodes[0])
    del tape
    assert first() is not None  # C keeps what it depends on
    del C
    gc.collect()
    assert first() is None


def test_a_long_chain_on_the_global_tape_is_freed_without_recursion() -> None:
    x = rand(2)
    y = te.relu(x)
    for _ in range(20_000):
        y = y + 1
    first = weakref.ref(te.global_tape().nodes[0])
    assert len(te.global_tape()) == 20_001
    te.backward(y.sum())
    close(x.g, (plain(x) > 0).double())
    del y
    gc.collect()
    assert first() is None


def test_a_long_chain_of_writes_is_swept_and_freed() -> None:
    x = rand(2)
    with te.record() as tape:
        y = x * 1
        for _ in range(10_000):
            y.add_(x)
        C = y.sum()
    te.backward(C)
    assert x.g.tolist() == [10_001.0] * 2
    assert len(tape) == 10_002
    del tape, C, y
    gc.collect()


def recurrence(x: Tensor, length: int) -> Tensor:
    with te.record():
        buffer = torch.zeros(length, dtype=torch.float64)
        for i in range(length):
            buffer[i] = x[i % 50] * (buffer[i - 1] if i else 1.0)
        return buffer.sum()


def test_a_recurrence_written_into_a_buffer() -> None:
    x = rand(50)
    te.backward(recurrence(x, 200))

    def same(x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for i in range(200):
            found.append(x[i % 50] * (found[-1] if i else 1.0))
        return torch.stack(found).sum()

    close(x.g, reference(same, x)[0], 1e-8)


def test_printing_and_naming_a_long_tape_is_no_trouble() -> None:
    tape, _, C = chain(4_000)
    assert len(str(tape).splitlines()) == 4_002
    assert len(tape.values) == 4_002
    del C


def test_values_are_few_bytes() -> None:
    tape, _, C = chain(2_000)
    assert sum(sys.getsizeof(v) for v in tape.values) / len(tape.values) < 300
    del C
