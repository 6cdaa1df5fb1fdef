"""Custom ``torch.autograd.Function``: one run of its forward, its own backward; the same in a replay."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._C import DisableTorchFunctionSubclass
from torch.autograd.function import once_differentiable

import tape_engine as te
from tests.helpers import close, g_of, plain

Tensor = torch.Tensor
Function = Callable[..., Any]
F64 = torch.float64


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def applied(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def reference(function: Function, inputs: list[Tensor], seed: int) -> tuple[Tensor, list[Tensor | None]]:
    """The value and the gradients as torch.autograd gives them, from this seed on."""
    torch.manual_seed(seed)
    tracked = [plain(t).requires_grad_() for t in inputs]
    result = function(*[t * 1 for t in tracked])
    torch.autograd.backward(result)
    return plain(result), [t.grad for t in tracked]


def agree(tensors: list[Tensor], wanted: list[Tensor | None]) -> None:
    for t, reference in zip(tensors, wanted, strict=True):
        found = g_of(t)
        if found is None or reference is None:
            assert found is None or not found.any()
            assert reference is None
        else:
            close(found, reference)


def follows(function: Function, *inputs: Tensor, like: Function | None = None, replay: bool = True) -> None:
    """Swept twice and replayed, it gives what torch.autograd gives of it, or of `like`."""
    value, wanted = reference(like or function, list(inputs), 1)
    for tracked in (False, True):
        given = [plain(t).requires_grad_(tracked) for t in inputs]
        torch.manual_seed(1)
        with te.record() as tape:
            result = function(*[t * 1 for t in given])
        assert torch.equal(plain(result), value)
        assert result.requires_grad is tracked
        for _ in range(2):
            for t in given:
                vars(t).pop("g", None)
            te.backward(result, keep=True)
            agree(given, wanted)
        if tracked and like is None:
            torch.autograd.backward(result)
            for t, expected in zip(given, wanted, strict=True):
                close(t.grad, expected)
        if not (tracked or not replay):
            replays(tape, given, result, like or function)


def replays(tape: te.Tape, given: list[Tensor], result: Tensor, function: Function) -> None:
    program = tape.program(inputs=tuple(given), outputs=result)
    for seed in (1, 7):
        fresh = [real(*t.shape) for t in given]
        value, wanted = reference(function, fresh, seed)
        torch.manual_seed(seed)
        close(program.step(*fresh), value)
        agree(fresh, wanted)
        torch.manual_seed(seed)
        close(program(*fresh), value)


# -- functions -------------------------------------------------------------------------------------------


class Hundredfold(torch.autograd.Function):
    """A backward that nothing but itself gives."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a * 2

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        (a,) = ctx.saved_tensors
        return g[0] * 100 * a


class Masked(torch.autograd.Function):
    """It draws a mask, and uses the same one backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        mask = (torch.rand_like(a) < 0.5).to(a)
        ctx.save_for_backward(mask)
        return a * mask

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return g[0] * mask


class MaskedAttribute(Masked):
    """The mask is an attribute of the context."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.mask = mask = (torch.rand_like(a) < 0.5).to(a)
        return a * mask

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return g[0] * ctx.mask


class Tripled(torch.autograd.Function):
    """It writes to its input, and says so."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        a.mul_(3)
        ctx.mark_dirty(a)
        return a

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return g[0] * 5


class TripledApart(torch.autograd.Function):
    """The same without a write."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a * 3

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return g[0] * 5


class DirtyAndSaved(torch.autograd.Function):
    """It saves what it has written, and writes to the second of three arguments alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, k: float) -> Any:
        b.add_(a).mul_(k)
        ctx.mark_dirty(b)
        ctx.save_for_backward(a, b)
        ctx.k = k
        return a * b, b

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        a, b = ctx.saved_tensors
        g_b = g[0] * a + g[1]
        return g[0] * b + g_b * ctx.k, g_b * ctx.k * 2, None


class Mixed(torch.autograd.Function):
    """Tensors, None, a number and a mask; None for what is not reached; it saves an input and an output."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, tag: int) -> Any:
        return a.sin(), None, b * a, tag, a > 0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, b, _ = inputs
        ctx.save_for_backward(a, None, b, output[0])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[4])

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        a, nothing, b, s = ctx.saved_tensors
        assert nothing is None
        assert (g[1], g[3], g[4]) == (None, None, None)
        g_a = 0 if g[0] is None else g[0] * s * 7
        if g[2] is None:
            return g_a, None, None
        return g_a + g[2] * b, g[2] * a, None


def mixed(*reached: int) -> Function:
    def run(a: Tensor, b: Tensor) -> Any:
        made = applied(Mixed, a, b, 3)
        assert made[1] is None
        assert made[3] == 3
        return sum((made[i] ** 2).sum() for i in reached) + (made[4] * a).sum()

    return run


class Through(torch.autograd.Function):
    """It returns an input, a view of one, and the other input."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        ctx.save_for_backward(a)
        return a, b.view(-1)[1:], b

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        (a,) = ctx.saved_tensors
        return g[0] * a * 3, torch.cat([g[1].new_zeros(1), g[1]]).view(2, 2) * 2 + g[2]


def through(a: Tensor, b: Tensor) -> Any:
    one, two, three = applied(Through, a, b)
    return (one**2).sum() + (two**3).sum() + (three * 2).sum()


class Outer(torch.autograd.Function):
    """It applies another one, forward and backward, and takes a tuple."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, pair: Any) -> Any:
        ctx.save_for_backward(a)
        return applied(TripledApart, a) * pair[0]

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return applied(TripledApart, g[0]) * ctx.saved_tensors[0], None


class Asking(torch.autograd.Function):
    """It computes only what is asked for: plain tensors are asked for as those that require a gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        assert ctx.needs_input_grad == (True, False, False)
        ctx.b = b
        return a * b

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return (g[0] * ctx.b if ctx.needs_input_grad[0] else None), None, None


FUNCTIONS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "it draws": (lambda x: (applied(Masked, x) * torch.rand_like(x)).sum(), (real(3, 4),)),
    "its mask is an attribute": (lambda x: applied(MaskedAttribute, x).square().sum(), (real(3, 4),)),
    "it writes": (lambda x: (applied(Tripled, x) ** 2).sum(), (real(3),)),
    "it saves what it has written": (
        lambda a, b: sum((t * t).sum() for t in applied(DirtyAndSaved, a, b, 0.5)) + b.sin().sum(),
        (real(3), real(3)),
    ),
    "mixed, the first": (mixed(0), (real(3), real(3))),
    "mixed, the second": (mixed(2), (real(3), real(3))),
    "mixed, both": (mixed(0, 2), (real(3), real(3))),
    "inputs handed through": (through, (real(3), real(2, 2))),
    "one within another": (lambda a, b: applied(Outer, a, (b, 2)).sum() + b.sum(), (real(3), real(3))),
    "what it asks for": (
        lambda a, b: applied(Asking, a, b.detach(), torch.arange(3)).sum() + b.sum(),
        (real(3), real(3)),
    ),
    "twice in a row": (lambda x: applied(Hundredfold, applied(Hundredfold, x)).sum(), (real(3),)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_swept_and_replayed(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    follows(function, *inputs)


# -- writes to arguments, which torch refuses where something else had saved them ------------------------


def after_a_reader(tripled: Function) -> Function:
    def run(x: Tensor) -> Any:
        y = x * 2
        z = y.sin()
        return (z * tripled(y)).sum()

    return run


def of_a_view(x: Tensor) -> Any:
    y = x * 2
    z = y.sin()
    applied(Tripled, y[1:])
    return (z * y * y).sum()


def of_a_view_apart(x: Tensor) -> Any:
    y = x * 2
    z = y.sin()
    y = torch.cat([y[:1], applied(TripledApart, y[1:])])
    return (z * y * y).sum()


def of_a_base(x: Tensor) -> Any:
    y = x * 2
    v = y[1:]
    s = v.sin()
    applied(Tripled, y)
    return (v * s).sum()


def of_a_base_apart(x: Tensor) -> Any:
    y = x * 2
    s = y[1:].sin()
    return (applied(TripledApart, y)[1:] * s).sum()


@pytest.mark.parametrize(
    ("function", "like"),
    [
        (after_a_reader(lambda t: applied(Tripled, t)), after_a_reader(lambda t: applied(TripledApart, t))),
        (of_a_view, of_a_view_apart),
        (of_a_base, of_a_base_apart),
    ],
    ids=["after a reader", "of a view", "of a base"],
)
def test_a_function_that_writes(function: Function, like: Function) -> None:
    """Without `requires_grad`, as torch itself refuses to write over what its own rules have saved."""
    inputs = [real(4)]
    value, wanted = reference(like, inputs, 1)
    given = [plain(t) for t in inputs]
    with te.record() as tape:
        result = function(*given)
    assert torch.equal(plain(result), value)
    te.backward(result, keep=True)
    agree(given, wanted)
    replays(tape, given, result, like)


def test_a_leaf_that_is_written_to() -> None:
    """As `x.mul_(3)` does: the leaf holds what was written, and its `.g` is that of what it holds."""
    x = real(3)
    before = plain(x)
    with te.record():
        loss = (applied(Tripled, x) ** 2).sum()
    close(x, before * 3)
    te.backward(loss)
    close(g_of(x), 2 * plain(x))


def test_what_it_saved_is_written_to_afterwards() -> None:
    x = real(3)
    with te.record():
        y = x * 2
        loss = applied(Hundredfold, y).sum()
        y.add_(1)
    te.backward(loss)
    close(g_of(x), 200 * 2 * plain(x))


def test_a_write_that_nobody_saw_is_named() -> None:
    x = real(3)
    with te.record():
        loss = applied(Hundredfold, x).sum()
    with DisableTorchFunctionSubclass():
        x.add_(1)
    with pytest.raises(te.OverwrittenError, match=r"the backward of Hundredfold reads(.|\n)*test_functions.py"):
        te.backward(loss)
    assert g_of(x) is None


# -- one run, and one context of each ---------------------------------------------------------------------


def counting() -> Any:
    class Counted(torch.autograd.Function):
        """It counts its runs, and scales by the count."""

        runs = 0

        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            Counted.runs += 1
            ctx.count = count = Counted.runs
            return a * count

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            return g[0] * ctx.count

    return Counted


def test_a_state_of_its_own() -> None:
    """Neither the sweep nor freezing runs the forward; each replay does, once a call."""
    counted = counting()
    x = real(3)
    with te.record() as tape:
        loss = (applied(counted, x) * applied(counted, x)).sum()
    te.backward(loss, keep=True)
    close(g_of(x), 2 * 1 * 2 * plain(x))
    program = tape.program(inputs=x, outputs=loss)
    assert counted.runs == 2
    for first in (3, 5):
        y = real(3)
        close(program.step(y), (first * y * (first + 1) * y).sum())
        close(g_of(y), 2 * first * (first + 1) * y)
    assert counted.runs == 6


def test_a_backward_runs_once_a_sweep() -> None:
    calls: list[bool] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            return a * 2

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return g[0] * 2

    x = real(3)
    with te.record() as tape:
        loss = applied(Noted, x).sum()
    te.backward(loss, keep=True)
    assert calls == [False]
    program = tape.program(inputs=x, outputs=loss)
    assert calls == [False]
    program.step(x)
    assert calls == [False, False]
    with te.record():
        loss = applied(Noted, x).sum()
        te.grad(loss, x, record=True)
    assert calls == [False, False, True]  # as torch has it with create_graph


def test_what_it_returns_beside_tensors_is_a_guard() -> None:
    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Any:
            return a * 2, bool(a.sum() > 0)

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            return g[0] * 2

    x = torch.ones(3, dtype=F64)
    with te.record() as tape:
        y, positive = applied(Told, x)
        loss = y.sum()
    assert positive is True
    program = tape.program(inputs=x, outputs=loss)
    close(program(2 * x), (4 * x).sum())
    with pytest.raises(te.GuardError, match="Told"):
        program(-plain(x))
    with pytest.raises(te.GuardError, match="Told"):
        program(-x)  # recorded, as x is


def test_nothing_is_left_behind() -> None:
    """The context goes with the tape, by reference counts alone: nothing of it is a cycle."""

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            out = a.exp()
            ctx.save_for_backward(a, out)
            ctx.out = out
            return out

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            return g[0] * ctx.out

    left: list[weakref.ref[Any]] = []

    def run() -> None:
        x = real(3)
        with te.record() as tape:
            y = applied(Both, x)
            loss = y.sum()
        te.backward(loss)
        left.extend(weakref.ref(each) for each in (x, y, tape, tape.nodes[0], tape.nodes[0].args[-1].ctx))

    gc.disable()
    try:
        run()
        assert [each() for each in left] == [None] * len(left)
    finally:
        gc.enable()


def test_a_program_keeps_no_context() -> None:
    x = real(3)
    with te.record() as tape:
        y = applied(Masked, x * 1)
        loss = y.sum()
    ctx = weakref.ref(tape.nodes[1].args[-1].ctx)
    program = tape.program(inputs=x, outputs=loss)
    program.step(real(3))
    del tape, y, loss
    gc.collect()
    assert ctx() is None


def test_replays_from_several_threads() -> None:
    x = real(50)
    with te.record() as tape:
        loss = (applied(Masked, x * 1) * x).sum()
    program = tape.program(inputs=x, outputs=loss)
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(30):
            y = torch.rand(50, dtype=F64) + 0.5
            value = program.step(y)
            g: Any = g_of(y)
            mask = g != 0
            if not (torch.allclose(g, 2 * y * mask) and torch.allclose(value, (y * y * mask).sum())):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_program_inside_a_recording() -> None:
    x = real(5)
    with te.record() as tape:
        out = applied(Masked, x * 1) * x
    program = tape.program(inputs=x, outputs=out)
    y = torch.rand(5, dtype=F64) + 0.5
    with te.record() as outer:
        loss = program(y).sum()
    te.backward(loss, keep=True)
    g: Any = g_of(y)
    close(g, 2 * y * (g != 0))
    again = outer.program(inputs=y, outputs=loss)
    z = torch.rand(5, dtype=F64) + 0.5
    again.step(z)
    g = g_of(z)
    close(g, 2 * z * (g != 0))


# -- where it is applied ----------------------------------------------------------------------------------


def test_outside_a_block() -> None:
    x = real(4)
    with te.record():
        y = x * 2
    loss = applied(Hundredfold, y).sum() + y.sum()
    te.backward(loss)
    close(g_of(x), 200 * 2 * plain(x) + 2)
    x = real(4)
    z = applied(Hundredfold, te.relu(x))
    te.backward((z * z).sum())
    close(g_of(x), 2 * 2 * 100 * plain(x).relu() ** 2)


def test_in_a_module_with_frozen_and_live_parameters() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(real(4))

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = applied(Hundredfold, x * self.w)
            return made

    module, x = Scale(), real(4)
    with te.record() as tape:
        loss = module(x).sum()
    assert tape.nodes[1].scope == ("Scale",)
    te.backward(loss)
    close(g_of(module.w), 100 * (x * module.w.detach()) * x)


def test_under_no_grad_and_in_a_pause() -> None:
    def cut(x: Tensor) -> Any:
        with torch.no_grad():
            y = applied(Hundredfold, x)
        return (y * x).sum()

    follows(cut, real(3))
    x = real(3)
    with te.record():
        with te.pause():
            y = applied(Hundredfold, x)
        loss = (y * x).sum()
    te.backward(loss)
    close(g_of(x), 2 * plain(x))


def test_under_a_transform_of_torch_func_it_warns() -> None:
    class Mapped(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a: Tensor) -> Tensor:
            return a * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            return g[0] * 100

    with pytest.warns(te.TapeWarning, match="Mapped is applied inside a transform"), te.record():
        torch.vmap(Mapped.apply)(real(3, 4))


def test_print_tells_the_arguments_alone() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, k: float) -> Tensor:
            return a * k

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            return g[0], None

    x = real(2)
    with te.record() as tape:
        applied(Scaled, x, 3.0)
    assert "= Scaled(a (2,), 3.0)  " in str(tape)
    assert tape.nodes[0].params == {"k": 3.0}


# -- second derivatives -----------------------------------------------------------------------------------


class Cubed(torch.autograd.Function):
    """It saves its input and its output, and has the output as an attribute too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x**3
        ctx.save_for_backward(x, out)
        ctx.out = out
        return out

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        x, out = ctx.saved_tensors
        return g[0] * (2 * x * x + out / x * 0.5 + ctx.out * x)


def squared_gradient(x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(applied(Cubed, x * 1).sin().sum(), x, create_graph=True)
    return (g**2).sum()


def test_second_derivatives() -> None:
    x = real(4)
    tracked = plain(x).requires_grad_()
    wanted = squared_gradient(tracked)
    torch.autograd.backward(wanted)
    with te.record():
        (g,) = te.grad(applied(Cubed, x * 1).sin().sum(), x, record=True)
        assert g is not None
        loss = (g**2).sum()
    close(loss, wanted.detach())
    te.backward(loss)
    close(g_of(x), tracked.grad)


def test_second_derivatives_by_torch_in_a_block() -> None:
    x = real(4).requires_grad_()
    tracked = plain(x).requires_grad_()
    wanted = squared_gradient(tracked)
    torch.autograd.backward(wanted)
    with te.record():
        loss = squared_gradient(x)
    te.backward(loss)
    close(g_of(x), tracked.grad)
    torch.autograd.backward(loss)
    close(x.grad, tracked.grad)


def test_a_recorded_sweep_through_it_is_not_replayed() -> None:
    x = real(4)
    with te.record() as tape:
        (g,) = te.grad(applied(Cubed, x * 1).sum(), x, record=True)
        assert g is not None
        loss = (g**2).sum()
    with pytest.raises(te.NotRecordedError, match="the backward of Cubed"):
        tape.program(inputs=x, outputs=loss)


def test_once_differentiable() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *g: Any) -> Any:
            return g[0] * 2 * ctx.saved_tensors[0]

    x = real(3)
    with te.record():
        (g,) = te.grad(applied(Once, x).sum(), x, record=True)
        assert g is not None
        close(g, 2 * x)
        loss = (g * x).sum()
    with pytest.raises(te.NotRecordedError, match="once_differentiable"):
        te.backward(loss)
    follows(lambda t: applied(Once, t).sum(), real(3))


# -- what is refused ---------------------------------------------------------------------------------------


class Rerun(torch.autograd.Function):
    """A checkpoint of the user's own: its backward runs the code again."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor) -> Any:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, g[0])
        return None, x.grad


def test_a_backward_that_leaves_gradients_on_parameters() -> None:
    """Those would be in `.grad`, where no sweep finds them; what stays inside is the function's own affair."""
    layer = nn.Linear(4, 4).double()
    x = real(3, 4)
    with te.record():
        loss = applied(Rerun, layer, x).sum()
    with pytest.raises(te.NotRecordedError, match=r"Rerun calls torch\.autograd\.backward"):
        te.backward(loss)
    assert all(p.grad is None for p in layer.parameters())
    assert torch.autograd.backward.__module__ == "torch.autograd"
    follows(lambda t: applied(Rerun, torch.sin, t).sum(), real(3))


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda g: (g, g), "returned 2 gradients, and its forward takes 1"),
        (lambda g: g[:2], r"a gradient of shape \(2,\) for a"),
    ],
    ids=["too many", "of another shape"],
)
def test_a_backward_that_does_not_fit(returned: Function, text: str) -> None:
    class Unfit(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            return a * 2

        @staticmethod
        def backward(ctx: Any, *g: Any) -> Any:
            return returned(g[0])

    x = real(3)
    with te.record():
        loss = applied(Unfit, x).sum()
    with pytest.raises(te.RuleError, match=text):
        te.backward(loss)
    assert g_of(x) is None
