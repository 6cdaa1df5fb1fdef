"""Memory: results belong to the caller, are found again once dropped, and share nothing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import tape_engine as te
from tape_engine.program.buffers import buffer, rotating
from tape_engine.tape import Value
from tests.helpers import close, g_of, plain, unshared
from tests.tape_engine.program.common import F64, draw, freeze

Tensor = torch.Tensor


def loss(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).tanh().square().sum()


def made() -> tuple[te.Program, Tensor]:
    """A program with a result of every sort: a view, a kept intermediate, an input, a parameter."""
    x, w = draw(4, 3), draw(3, 2)
    with te.record() as tape:
        h = x @ w
        C = h.tanh().square().sum()
        part = h[1:, 1]
    return tape.program(inputs=x, outputs=(C, h, part, x, w)), w


# -- results belong to the caller ----------------------------------------------------------------------------


def test_no_result_of_twenty_replays_changes() -> None:
    program, w = made()
    kept: list[tuple[Tensor, Tensor]] = []
    for turn in range(20):
        x = draw(4, 3)
        results = program.step(x) if turn % 3 else program(x)
        gs = [g for g in (g_of(x), g_of(w)) if g is not None]
        for t in (*results, *gs):
            kept.append((t, plain(t)))
        if turn % 3:
            unshared(*results, *gs, x, w)
        w.add_(0.1)
    for t, contents in kept:
        assert torch.equal(t, contents)


@pytest.mark.parametrize("backend", ["python", "native"])
@pytest.mark.parametrize("before", [0, 1])
def test_memory_of_a_replay_under_inference_mode_serves_later_ones(backend: str, before: int) -> None:
    x, w = draw(4, 3), draw(3, 2)
    with te.record() as tape:
        h = x @ w
        C = h.tanh().square().sum()
    program = tape.program(inputs=x, outputs=(C, h), backend=backend)
    kept: list[Any] = [program.step(x) for _ in range(before)]
    with torch.inference_mode():
        program.step(x)
        program(x)
    del w.g  # type: ignore[attr-defined]
    for _ in range(4):
        results = program.step(x)
        kept.append([*results, g_of(w)])
        assert not any(t.is_inference() for t in (*results, g_of(x), g_of(w)))
        scale = torch.ones_like(results[1], requires_grad=True)
        (results[1] * scale).sum().backward()  # torch takes it for its own gradient
        close(scale.grad, results[1])
        kept.pop()  # so that the memory is found again


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda t: t.view(-1),
    "slice": lambda t: t[1:],
    "transpose": lambda t: t.t(),
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "numpy": lambda t: t.numpy(),
    "numpy slice": lambda t: t.numpy()[1:],
    "dlpack": lambda t: numpy.from_dlpack(t),
    "torch dlpack": lambda t: torch.utils.dlpack.from_dlpack(t),
    "memoryview": lambda t: memoryview(t.numpy()),  # type: ignore[arg-type]
    "storage": lambda t: t.untyped_storage(),
    "in a list": lambda t: [t],
    "in a dict": lambda t: {"a": (t,)},
    "attribute": lambda t: type("Held", (), {"t": t})(),
    "closure": lambda t: lambda: t,
    "alias": lambda t: torch.ops.aten.alias(t),
    "subclass": lambda t: t.as_subclass(torch.nn.Parameter),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "generator": lambda t: iter([t]),
}


def contents(held: Any) -> Any:
    """A copy of what is held, from which a change can be told."""
    if isinstance(held, Tensor):
        return plain(held).tolist()
    if isinstance(held, numpy.ndarray):
        return held.tolist()
    if isinstance(held, memoryview):
        return held.tolist()
    if isinstance(held, torch.UntypedStorage):
        return list(held)
    if isinstance(held, (list, tuple)):
        return [contents(each) for each in held]
    if isinstance(held, dict):
        return {k: contents(v) for k, v in held.items()}
    if hasattr(held, "t"):
        return contents(held.t)
    return contents(held())


@pytest.mark.parametrize("name", [n for n in HOLDS if n != "generator"])
@pytest.mark.parametrize("what", ["result", "g"])
def test_what_the_caller_made_of_a_result_does_not_change(name: str, what: str) -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w], wrt=[w])
    seed = draw(4, 2)
    held = []
    for _ in range(5):
        out: Tensor | None = program.step(draw(4, 3), seed=seed)
        t = out if what == "result" else g_of(w)
        assert t is not None
        kept = HOLDS[name](t)
        held.append((kept, contents(kept)))
        del out, t, kept
        w.g = None  # type: ignore[attr-defined]
    for kept, before in held:
        assert contents(kept) == before


def test_a_result_that_autograd_saved_does_not_change() -> None:
    """The caller goes on with torch.autograd, and drops the result: autograd still needs it."""
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w])
    v = draw(4, 2).requires_grad_()
    results, losses = [], []
    for _ in range(4):
        out = program(draw(4, 3))
        results.append(plain(out))
        losses.append((out * v).sum())
        del out
    for wanted, mine in zip(results, losses, strict=True):
        (got,) = torch.autograd.grad(mine, v)
        close(got, wanted)


def test_a_result_that_a_thread_holds_does_not_change() -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w])
    seen: list[bool] = []
    go = threading.Event()

    def keep(t: Tensor, before: Tensor) -> None:
        go.wait()
        seen.append(torch.equal(t, before))

    threads = []
    for _ in range(4):
        out = program(draw(4, 3))
        threads.append(threading.Thread(target=keep, args=(out, plain(out))))
        threads[-1].start()
        del out
    program(draw(4, 3))
    go.set()
    for thread in threads:
        thread.join()
    assert all(seen)


def test_a_result_that_a_tape_holds_does_not_change() -> None:
    """The caller records with the result, and drops it: the tape still needs it."""
    x, w, v = draw(4, 3), draw(3, 2), draw(4, 2)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w])
    sums, results = [], []
    for _ in range(3):
        out = program(draw(4, 3))
        results.append(plain(out))
        with te.record():
            sums.append((out * v).sum())
        del out
    for wanted, mine in zip(results, sums, strict=True):
        te.backward(mine, wrt=[v])
        close(g_of(v), wanted)


def test_results_come_clean() -> None:
    """What the caller did to a result before dropping it does not come back with the next one."""
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w])

    def spoil(t: Tensor, how: int) -> None:
        if how == 0:
            t.g = draw(4, 2)  # type: ignore[attr-defined]
            t.mine = 3  # type: ignore[attr-defined]
        elif how == 1:
            t.requires_grad_()
            (t * 2).sum().backward()  # type: ignore[no-untyped-call]
        elif how == 2:
            t.t_()
        elif how == 3:
            t.resize_(2, 2)
        elif how == 4:
            t.unsqueeze_(0)
        elif how == 5:
            t.data = draw(7)
        elif how == 6:
            t.fill_(float("nan"))
        elif how == 7:
            t.set_()  # type: ignore[call-overload]
        elif how == 8:
            t.__class__ = torch.nn.Parameter
        elif how == 9:
            te.backward(te.mse(te.relu(t), draw(4, 2)))
        elif how == 10:
            t.register_hook(lambda g: g) if t.requires_grad else t.requires_grad_().register_hook(lambda g: g * 0)  # type: ignore[no-untyped-call]

    for how in range(11):
        for call in (program, lambda x: program.step(x, seed=torch.ones(4, 2, dtype=F64))):
            spoil(call(draw(4, 3)), how)
            x = draw(4, 3)
            out = call(x)
            assert type(out) is Tensor, how
            assert not vars(out), (how, vars(out))
            assert not out.requires_grad, how
            assert out.grad is None, how
            assert out.is_leaf, how
            close(out, (x @ w).tanh())
            del out


def test_a_result_goes_in_again() -> None:
    w = draw(3, 3) / 2
    program = freeze(lambda x, w: (x @ w).tanh(), [draw(3, 3)], [w])
    x = mine = draw(3, 3)
    for _ in range(12):
        x, mine = program(x), (mine @ w).tanh()
        close(x, mine)
    seed = draw(3, 3)
    for _ in range(5):
        out = program.step(seed, seed=seed)
        close(out, (seed @ w).tanh())
        seed = g_of(w)  # type: ignore[assignment]
        close(seed, plain(seed))


# -- memory is found again -----------------------------------------------------------------------------------


def test_memory_is_used_again_once_dropped() -> None:
    x, w = draw(64, 64), draw(64, 64)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w], wrt=[w])
    seed = torch.ones(64, 64, dtype=F64)
    places, of_g = [], []
    for _ in range(10):
        out = program.step(x, seed=seed)
        places.append(out.data_ptr())
        of_g.append(g_of(w).data_ptr())  # type: ignore[union-attr]
        del out
    assert len(set(places)) == 1
    assert len(set(of_g)) <= 2  # the last one is still on w when the next is made
    kept = [program(x) for _ in range(10)]
    assert len({t.data_ptr() for t in kept}) == 10


def test_kept_results_do_not_grow_the_ring_for_good() -> None:
    """Who keeps a hundred results and drops them, leaves no hundred buffers behind."""
    x, w = draw(8, 8), draw(8, 8)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w])
    kept = [program(x) for _ in range(100)]
    refs = [weakref.ref(t) for t in kept]
    del kept
    gc.collect()
    program(x)
    assert sum(ref() is not None for ref in refs) <= 4


def test_a_dropped_program_leaves_nothing() -> None:
    x, w = draw(8, 8), draw(8, 8)
    program: te.Program | None = freeze(loss, [x], [w])
    assert program is not None
    program.step(x)
    gone = weakref.ref(program)
    tape = weakref.ref(program.tape)
    del program
    gc.collect()
    assert gone() is None
    assert tape() is None


def test_inputs_are_not_kept() -> None:
    x, w = draw(8, 8), draw(8, 8)
    program = freeze(loss, [x], [w])
    given = draw(8, 8)
    program.step(given)
    gone = weakref.ref(given)
    del given
    gc.collect()
    assert gone() is None


def test_a_loop_of_replays_holds_its_memory() -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(loss, [x], [w])

    def loop(steps: int) -> int:
        for _ in range(steps):
            fresh = draw(4, 3)
            program.step(fresh)
            w.sub_(0.01 * g_of(w))  # type: ignore[operator]
            program(fresh)
        gc.collect()
        return len(gc.get_objects())

    first = loop(20)
    assert abs(loop(200) - first) < 50


# -- copy=False ----------------------------------------------------------------------------------------------


def test_copy_false_writes_to_the_same_memory() -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w], copy=False)
    seed = torch.ones(4, 2, dtype=F64)
    first = program.step(x, seed=seed)
    of_w = g_of(w)
    x = draw(4, 3)
    second = program.step(x, seed=seed)
    assert second.data_ptr() == first.data_ptr()
    assert g_of(w).data_ptr() == of_w.data_ptr()  # type: ignore[union-attr]
    close(first, (x @ w).tanh())
    unshared(first, g_of(w), g_of(x), x, w)


def test_copy_false_gives_the_same_numbers() -> None:
    x, w = draw(4, 3), draw(3, 2)
    with te.record() as tape:
        h = x @ w
        C = h.square().sum()
    ours = tape.program(inputs=x, outputs=(C, h, x), copy=False)
    theirs = tape.program(inputs=x, outputs=(C, h, x))
    for _ in range(4):
        x = draw(4, 3)
        for a, b in zip(ours.step(x), theirs(x), strict=True):
            close(a, b)
        w -= 0.1 * w.g  # type: ignore[attr-defined]


def test_copy_false_accumulates() -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(loss, [x], [w], wrt=[w], copy=False)
    program.step(x)
    one = plain(g_of(w))
    program.step(x, accumulate=True)
    close(g_of(w), 2 * one)
    program.step(x, accumulate=True)
    close(g_of(w), 3 * one)


# -- .g shares memory with nothing ---------------------------------------------------------------------------


GS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, w: x + w,
    "the same g for both": lambda x, w: (x + w).view_as(x),
    "g passed through views": lambda x, w: (x.t() + w.t()).t(),
    "linear in one": lambda x, w: x * w,
    "expanded": lambda x, w: x.sum() + w.sum(),
    "stacked": lambda x, w: torch.stack([x, w]),
    "the seed itself": lambda x, w: (x * 1.0).add_(w),
}


@pytest.mark.parametrize("name", GS)
def test_g_shares_memory_with_nothing(name: str) -> None:
    function = GS[name]
    x, w = draw(3, 3), draw(3, 3)
    program = freeze(function, [x], [w])
    for _ in range(3):
        x = draw(3, 3)
        out = function(x, w)
        seed = torch.rand_like(out)
        got = program.step(x, seed=seed)
        gs = [g_of(x), g_of(w)]
        assert all(g is not None for g in gs)
        unshared(got, seed, x, w, *gs)
        for g in gs:
            g.fill_(1e9)  # type: ignore[union-attr]
        again = program.step(x, seed=seed)  # no kept buffer was hurt
        close(again, out)
        assert not any((g_of(t) == 1e9).any() for t in (x, w))  # type: ignore[union-attr]


def test_spoilt_results_hurt_no_kept_buffer() -> None:
    program, w = made()
    x = draw(4, 3)
    wanted = [plain(t) for t in program(x)]
    for _ in range(3):
        for t in program.step(x):
            t.fill_(float("nan"))
    for t, before in zip(program.step(x), wanted, strict=True):
        close(t, before)
    assert not w.isnan().any()
    assert not x.isnan().any()


# -- the parts themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "transposed", "expanded", "overlapping", "empty", "0-d", "channels last"])
def test_buffer_fits_its_value(layout: str) -> None:
    t = {
        "dense": draw(3, 4),
        "transposed": draw(3, 4).t(),
        "expanded": draw(3, 1).expand(3, 4),
        "overlapping": draw(6).unfold(0, 3, 1),
        "empty": draw(0, 4),
        "0-d": draw(),
        "channels last": draw(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }[layout]
    made = buffer(Value(t))
    assert made.shape == t.shape
    assert made.dtype == t.dtype
    made.copy_(t)  # every element has a place of its own
    assert torch.equal(made, t)
    if layout in ("dense", "transposed", "channels last"):
        assert made.stride() == t.stride()


def test_rotating_gives_each_holder_its_own() -> None:
    take = rotating(Value(draw(3)))
    kept = [take() for _ in range(6)]
    assert len({t.data_ptr() for t in kept}) == 6
    del kept
    single = take()
    place = single.data_ptr()
    del single
    single = take()
    again = single.data_ptr()
    assert again == place


def test_rotating_without_copies_is_one() -> None:
    take = rotating(Value(draw(3)), copy=False)
    assert len({take().data_ptr() for _ in range(3)}) == 1
