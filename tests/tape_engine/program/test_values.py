"""What a program may compute, take and return: dtypes, strides, views, constants, second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tape_engine as te
from tests.helpers import agree, close, error_text, g_of, plain, reference, unshared
from tests.tape_engine.program.common import C128, F32, F64, draw, follows, freeze

Tensor = torch.Tensor


# -- what a program may compute ------------------------------------------------------------------------------


def softmax_attention(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w @ x.t()).softmax(-1) @ x


def slices(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros(4, 3, dtype=F64)
    for i in range(4):
        out[i] = x[i] * w[0]
    return out.square().sum()


def constants(x: Tensor, w: Tensor) -> Tensor:
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    return (x * scale + torch.arange(3, dtype=F64) - torch.eye(3, dtype=F64)[1]).square().sum() + w.sum() * 0


def constant_written(x: Tensor, w: Tensor) -> Tensor:
    total = torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    for row in x:
        total += row * w[0]
    return total.square().sum()


def cut(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.std()
    return ((x - x.mean().detach()) / scale @ w).square().sum()


def stopped(x: Tensor, w: Tensor) -> Tensor:
    return (x * x.detach() @ w).sum() + w.detach().sum() * w.sum()


def fan_out(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return (h * h + h).sum() + h.sum()


def views(x: Tensor, w: Tensor) -> Tensor:
    return (x.reshape(-1)[2:8].view(2, 3) @ w).t().flatten().cumsum(0).square().sum()


def detached_output_used(x: Tensor, w: Tensor) -> Tensor:
    y = x.alias() if hasattr(x, "alias") else x.view_as(x)
    return (y @ w).exp().sum()


FUNCTIONS = [
    softmax_attention, slices, constants, constant_written, cut, stopped, fan_out, views, detached_output_used,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions(function: Callable[..., Tensor]) -> None:
    x, w = draw(4, 3), draw(3, 3)
    program = freeze(function, [x], [w])
    for _ in range(2):
        x = draw(4, 3)
        seed = None if function(x, w).numel() == 1 else draw(4, 3)
        follows(program, function, [x], [w], seed=seed)
        w += 0.1


def test_pause_makes_a_constant_of_what_it_gave() -> None:
    """What the block gave is not recorded: a replay reads the tensor that it left, and lets no gradient through it."""
    x, w = draw(3), draw(3)
    with te.record() as tape:
        with te.pause():
            scale = w * 2
        y = (x * scale).sum()
    program = tape.program(inputs=x, outputs=y)
    x = draw(3)
    close(program.step(x), (x * scale).sum())
    close(g_of(x), plain(scale))
    assert g_of(w) is None


def test_an_input_changed_under_pause() -> None:
    """The recording does not know what the block did to the input: a replay is right, or refuses."""
    x = draw(3)
    try:
        with te.record() as tape:
            a = x * 2
            with te.pause():
                x.mul_(3)
            y = (a + x).sum()
        program = tape.program(inputs=x, outputs=y)
        other = draw(3)
        mine = plain(other)
        got = program(other)
    except te.TapeError:
        return
    close(got, (mine * 2 + mine * 3).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, C128, torch.complex64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).tanh() * 2 + x[:, :2]
        return (h * h.conj()).sum().real if h.is_complex() else (h * h).sum()

    x, w = draw(4, 3, dtype=dtype), draw(3, 2, dtype=dtype)
    program = freeze(function, [x], [w])
    tol = {torch.float16: 2e-2, torch.bfloat16: 1e-1, F32: 1e-4, torch.complex64: 1e-4}.get(dtype, 1e-10)
    follows(program, function, [draw(4, 3, dtype=dtype)], [w], tol=tol)
    assert g_of(w) is not None
    assert g_of(w).dtype == dtype  # type: ignore[union-attr]


def test_mixed_dtypes() -> None:
    def function(x: Tensor, k: Tensor, w: Tensor) -> Tensor:
        return (x.float() * k * (k > 2)).sum() + (w.double() ** 2).sum()

    x, k, w = draw(4), torch.arange(4), draw(3, dtype=F32)
    program = freeze(function, [x, k], [w])
    x, k = draw(4), torch.tensor([3, 1, 5, 2])
    close(program.step(x, k), function(x, k, w), 1e-6)
    agree([x, w], [r for r in reference(function, x, k, w) if r is not None], 1e-6)


def test_zero_size_and_0d() -> None:
    def function(x: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return (x * s).sum() + (x @ w).sum() + s * s

    x, s, w = draw(0, 3), draw(), draw(3, 2)
    program = freeze(function, [x, s], [w])
    follows(program, function, [draw(0, 3), draw()], [w])


def test_output_of_size_zero() -> None:
    x, w = draw(0, 3), draw(3, 2)
    program = freeze(lambda x, w: x @ w, [x], [w])
    follows(program, lambda x, w: x @ w, [draw(0, 3)], [w], seed=draw(0, 2))


def reshaped(x: Tensor, w: Tensor) -> Tensor:
    return (x.reshape(-1) * w.reshape(-1)[:12]).sum()


def flattened(x: Tensor, w: Tensor) -> Tensor:
    return (x.flatten().cumsum(0)[:3] * w[0]).sum()


def split_up(x: Tensor, w: Tensor) -> Tensor:
    return x.unflatten(1, (3, 1)).squeeze(-1).matmul(w).square().sum()  # type: ignore[no-any-return,no-untyped-call]


def joined_dims(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([x.contiguous().view(-1), w.contiguous().view(-1)]).square().sum()


def heads(x: Tensor, w: Tensor) -> Tensor:
    q = (x @ w).reshape(2, 2, 3).transpose(0, 1).reshape(2, 6)
    return q.softmax(-1).square().sum()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "flipped order": lambda t: torch.cat([t, t])[: len(t)],
    "offset": lambda t: torch.cat([t, t])[len(t) :],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [reshaped, flattened, split_up, joined_dims, heads], ids=lambda f: f.__name__)
def test_inputs_of_other_strides(function: Callable[..., Tensor], layout: str) -> None:
    x, w = draw(4, 3), draw(4, 3) if function is reshaped else draw(3, 3)
    program = freeze(function, [x], [w])
    change = LAYOUTS[layout]
    x = change(draw(4, 3))
    with torch.no_grad():
        wanted = function(x, w)
    wanted_g = reference(function, plain(x).contiguous(), w)
    close(program.step(x), wanted)
    close(program(x), wanted)
    agree([x, w], wanted_g)
    program = freeze(function, [x], [w])  # and the other way round
    follows(program, function, [draw(4, 3)], [w])


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_live_tensors_of_other_strides(layout: str) -> None:
    x, w = draw(4, 3), draw(3, 3)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w.reshape(9).view(3, 3)).square().sum()

    program = freeze(function, [x], [w])
    w.data = LAYOUTS[layout](draw(3, 3))
    x = draw(4, 3)
    close(program.step(x), function(x, w))
    agree([x, w], reference(function, x, plain(w).contiguous()))


def test_views_of_other_strides_written_through() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1.0
        y.view(-1)[1:5].mul_(2)
        y[:, 1].add_(1)
        return y

    program = freeze(function, [draw(3, 2)])
    x = draw(2, 3).t()
    close(program(x), function(plain(x).contiguous()))


# -- outputs that are no results of an operation, or several ------------------------------------------------


def test_several_outputs() -> None:
    x, w = draw(4, 3), draw(3, 2)
    with te.record() as tape:
        h = x @ w
        loss = h.square().sum()
        most = h.argmax(1)
    program = tape.program(inputs=x, outputs=(loss, h, most))
    x = draw(4, 3)
    for got in (program(x), program.step(x)):
        assert isinstance(got, tuple)
        close(got[0], (x @ w).square().sum())
        close(got[1], x @ w)
        assert torch.equal(got[2], (x @ w).argmax(1))
    agree([x, w], reference(lambda x, w: (x @ w).square().sum(), x, w))


def test_a_tuple_of_one_output_stays_a_tuple() -> None:
    x = draw(3)
    with te.record() as tape:
        y = x.sum()
    got = tape.program(inputs=x, outputs=(y,))(x)
    assert isinstance(got, tuple)
    assert len(got) == 1


def test_outputs_that_are_inputs_and_leaves() -> None:
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = (x * w).sum()
    program = tape.program(inputs=x, outputs=(y, x, w, y))
    x = draw(3)
    for got in (program(x), program.step(x)):
        close(got[0], (x * w).sum())
        close(got[1], x)
        close(got[2], w)
        close(got[3], (x * w).sum())
        unshared(*got, x, w, *[g for g in (g_of(x), g_of(w)) if g is not None])


def test_the_input_itself_as_the_first_output() -> None:
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = x * w
    program = tape.program(inputs=x, outputs=(x, y))
    x, seed = draw(3), draw(3)
    got = program.step(x, seed=seed)
    close(got[0], x)
    close(g_of(x), seed)
    unshared(x, seed, *got, g_of(x))


def test_outputs_that_are_views() -> None:
    x, w = draw(3, 4), draw(3, 4)
    with te.record() as tape:
        of_input, of_live = x[1], w.t()
        h = x * w
        of_result = h[:, 1:3]
        wide = x[0].expand(2, 4)
        y = h.sum() + of_input.sum() * 0 + of_live.sum() * 0
    program = tape.program(inputs=x, outputs=(y, of_input, of_live, h, of_result, wide))
    x = draw(3, 4)
    for got in (program(x), program.step(x)):
        for t, wanted in zip(got, [(x * w).sum(), x[1], w.t(), x * w, (x * w)[:, 1:3], x[0].expand(2, 4)], strict=True):
            close(t, wanted)
        unshared(*[t for t in got if t is not got[5]], x, w)


def test_an_output_whose_elements_overlap() -> None:
    x = draw(6)
    program = freeze(lambda x: x.unfold(0, 3, 1), [x])
    x, seed = draw(6), draw(4, 3)
    follows(program, lambda x: x.unfold(0, 3, 1), [x], seed=seed)


def test_an_output_written_to_afterwards_holds_what_the_tensor_holds() -> None:
    x = draw(3, 2)
    with te.record() as tape:
        h = x * 2
        row = h[0]
        h.mul_(10)
        y = h.sum()
    program = tape.program(inputs=x, outputs=(y, row, h))
    close(row, 20 * x[0])
    x = draw(3, 2)
    y, row, h = program(x)
    close(h, 20 * x)
    close(row, 20 * x[0])


def test_a_complex_output_with_its_conjugate() -> None:
    x = draw(3, dtype=C128)

    def function(x: Tensor) -> Tensor:
        return (x * 2).conj()

    program = freeze(function, [x])
    x, seed = draw(3, dtype=C128), draw(3, dtype=C128)
    follows(program, function, [x], seed=seed)
    follows(program, function, [x.conj()], seed=seed)
    follows(freeze(function, [x.conj()]), function, [x], seed=seed)


def test_inputs_with_a_negative_bit() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x.reshape(-1) * w.reshape(-1)).exp().sum()

    w = draw(3, 2)
    program = freeze(function, [draw(3, 2)], [w])
    z = torch.complex(draw(3, 2), draw(3, 2))
    x = z.conj().imag
    assert x.is_neg()
    close(program.step(x), function(plain(x), w))
    agree([x, w], reference(function, x.clone(), w))


def test_complex_parts() -> None:
    def function(x: Tensor) -> Tensor:
        z = torch.view_as_complex(x)
        return torch.view_as_real(z * z.conj().imag).square().sum() + (z.mH @ z).abs().sum()

    program = freeze(function, [draw(3, 4, 2)])
    follows(program, function, [draw(3, 4, 2)])


def test_a_program_without_inputs() -> None:
    w = draw(3)
    with te.record() as tape:
        y = w.square().sum()
    program = tape.program(outputs=y)
    close(program(), w.square().sum())
    w.add_(1)
    close(program.step(), w.square().sum())
    close(g_of(w), 2 * plain(w))


def test_nothing_to_sweep() -> None:
    x = torch.arange(3)
    with te.record() as tape:
        y = x.sum()
    program = tape.program(inputs=x, outputs=y)
    assert program(torch.tensor([1, 2, 5])) == 8
    with pytest.raises(te.TapeError) as caught:
        program.step(x)
    error_text(caught, __file__)


# -- second derivatives: a recorded sweep inside a program ---------------------------------------------------


def test_a_gradient_inside_a_program() -> None:
    def penalty(x: Tensor, w: Tensor) -> Tensor:
        (g,) = te.grad((x @ w).tanh().sum(), x, record=True)
        assert g is not None
        return g.square().sum()

    def plainly(x: Tensor, w: Tensor) -> Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad((x @ w).tanh().sum(), x, create_graph=True)
        return g.square().sum()

    x, w = draw(4, 3), draw(3, 2)
    program = freeze(penalty, [x], [w])
    for _ in range(2):
        x = draw(4, 3)
        close(program.step(x), plainly(x, w).detach())
        copies = [plain(t).requires_grad_() for t in (x, w)]
        agree([x, w], list(torch.autograd.grad(plainly(*copies), copies)))
        w += 0.1


def test_backward_inside_a_program() -> None:
    x = draw(3)
    with te.record() as tape:
        y = (x**3).sum()
        te.backward(y, record=True)
        z = (x.g * x).sum()  # type: ignore[attr-defined]
    program = tape.program(inputs=x, outputs=z)
    x = draw(3)
    close(program.step(x), (3 * x**3).sum())
    close(g_of(x), 9 * plain(x) ** 2)


def test_a_step_of_gradient_descent_inside_a_program() -> None:
    """The gradient of the loss after one inner step, through the step."""
    x, w = draw(6, 3), draw(3)

    def outer(x: Tensor, w: Tensor, grad: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        inner = (x @ w).sin().square().mean()
        return (x @ (w - 0.5 * grad(inner, w))).sin().square().mean()

    def ours(inner: Tensor, w: Tensor) -> Tensor:
        (g,) = te.grad(inner, w, record=True)
        assert g is not None
        return g

    program = freeze(lambda x, w: outer(x, w, ours), [x], [w])
    x = draw(6, 3)
    tracked = plain(w).requires_grad_()
    theirs = outer(x, tracked, lambda C, w: torch.autograd.grad(C, w, create_graph=True)[0])
    (wanted,) = torch.autograd.grad(theirs, tracked)
    close(program.step(x), theirs.detach())
    close(g_of(w), wanted)
