"""In-place writes and shared storage: the gradient is that of the code as it ran, whoever reads what afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tape_engine as te
from tape_engine import places, regions
from tests.helpers import Tensor, agree, close, g_of, grad_of, plain, reference

F = torch.nn.functional


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(shape, dtype=dtype)


def numerical(f: Callable[..., Tensor], *tensors: Tensor, h: float = 1e-5) -> list[Tensor]:
    """Central differences of a scalar function, element by element; each run has fresh copies."""
    found = []
    for k, t in enumerate(tensors):
        g = torch.zeros_like(plain(t))
        for i in range(t.numel()):
            ends = []
            for sign in (1, -1):
                copies = [plain(each) for each in tensors]
                copies[k].view(-1)[i] += sign * h
                ends.append(float(f(*copies).detach()))
            g.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
        found.append(g)
    return found


# Each body takes two (3, 3) leaves, which it may not write to, and returns a scalar.
BODIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def body(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    BODIES[f.__name__] = f
    return f


@body
def a_write_and_the_new_value_read(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    y.add_(w)
    y *= w
    return (y * y).sum()


@body
def an_old_value_that_a_later_rule_reads(x: Tensor, w: Tensor) -> Tensor:
    y = torch.sin(x)
    z = y * w  # reads y
    y.mul_(3)
    return (z + y).sum()


@body
def a_write_whose_own_rule_reads_the_old_value(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y.pow_(2)
    y.mul_(y)
    y.sin_()
    return y.sum()


@body
def writes_whose_rule_reads_the_result(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y.exp_()
    z = y.tanh_()
    z.sigmoid_()
    y.mul_(2)
    return y.sum()


@body
def a_view_written_then_the_base_read(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    v = y[1]
    v.mul_(w[0])
    return (y * w).sum()


@body
def a_base_written_then_the_view_read(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    v = y[1]
    y.mul_(w)
    return (v * v).sum()


@body
def two_overlapping_views(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    a, b = y[:2], y[1:]
    a.mul_(w[:2])
    b.add_(w[1:] * a[1])
    a.sin_()
    return (a * b).sum() + y.prod()


@body
def a_view_of_a_view_of_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    v = y.t()[1:].reshape(2, 3)[0]
    u = y.t()[1:][0]
    u.mul_(w[0])
    return (v * u).sum() + (y * y).sum()


@body
def a_buffer_filled_slice_by_slice(x: Tensor, w: Tensor) -> Tensor:
    buffer = torch.zeros(3, 3, dtype=x.dtype)
    for i in range(3):
        buffer[i] = x[i] * w[2 - i]
    for i in range(3):
        buffer[:, i] += buffer[i] * x[:, 0]
    return (buffer * buffer).sum()


@body
def an_uninitialised_buffer(x: Tensor, w: Tensor) -> Tensor:
    buffer = torch.empty(2, 3, 3, dtype=x.dtype)
    buffer[0].copy_(x)
    buffer[1] = w
    return (buffer[0] @ buffer[1]).pow(2).sum()


@body
def a_state_updated_in_a_loop(x: Tensor, w: Tensor) -> Tensor:
    state = torch.zeros(3, dtype=x.dtype)
    seen = []
    for row in x:
        state.mul_(0.5).add_(row @ w)
        seen.append(state.clone())
        state.tanh_()
    return torch.stack(seen).pow(2).sum() + state.sum()


@body
def advanced_indices(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    y[torch.tensor([0, 2])] = w[:2] * 3
    y[:, [1, 2]] += w[:, :2]
    y[y.detach() > 1] = 0.5
    y[torch.tensor([0, 1]), torch.tensor([1, 1])] *= 2
    return (y * y).sum()


@body
def writes_of_numbers(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    z = y * y
    y.zero_()
    z[0] = 7
    z[1:, 0].fill_(2.0)
    y += x
    return (y * z).sum()


@body
def scatters(x: Tensor, w: Tensor) -> Tensor:
    index = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 1]])
    y = x * 1
    y.scatter_add_(1, index, w)
    y.index_add_(0, torch.tensor([0, 2]), w[:2])
    y.index_copy_(0, torch.tensor([1]), w[:1] * 2)
    y.masked_fill_(torch.eye(3, dtype=torch.bool), 0.3)
    y.index_fill_(1, torch.tensor([2]), 4.0)
    return (y * y).sum()


@body
def the_same_tensor_on_both_sides(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y += y
    y *= y
    y -= y.mean()
    y[0] = y[1]
    y[2] += y[1] * y[0]
    return (y * w).sum()


@body
def a_swap_through_views(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y[0], y[1] = y[1].clone(), y[0].clone()
    y[1], y[2] = y[2], y[1]  # both views of what is being written
    return (y * w.exp()).sum()


@body
def shapes_changed_in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y.t_()
    v = y[0]
    y.unsqueeze_(0)
    y.mul_(2)
    y.squeeze_(0)
    y.transpose_(0, 1)
    return (y * w).sum() + (v * v).sum()


@body
def the_out_argument(x: Tensor, w: Tensor) -> Tensor:
    out = torch.empty(3, 3, dtype=x.dtype)
    if x.requires_grad:  # torch.autograd refuses out=: the same, written plainly
        y = x * w
        z = torch.sin(y)
        return (z * y).sum() + torch.matmul(x, w)[0].sum()
    torch.mul(x, w, out=out)
    y = out.clone()
    torch.sin(out, out=out)
    row = torch.zeros(2, 3, dtype=x.dtype)
    torch.mv(w.t(), x[0], out=row[1])
    return (out * y).sum() + row.sum()


@body
def several_out_arguments(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    if x.requires_grad:
        return (y.max(1).values * w[0]).sum()
    values, indices = torch.empty(3, dtype=x.dtype), torch.empty(3, dtype=torch.int64)
    torch.max(y, 1, out=(values, indices))
    return (values * w[0]).sum()


@body
def a_view_that_is_not_contiguous(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    d = y.diagonal()
    d.mul_(w[0])
    y.t()[0].add_(d)
    u = y.unfold(1, 2, 1)
    return (u * u).sum() + (d * w[1]).sum()


@body
def strided_views(x: Tensor, w: Tensor) -> Tensor:
    y = (x * w).contiguous()
    v = y.as_strided((2, 2), (4, 2), 1)
    v.mul_(3)
    y[0].sin_()
    return (v * v).sum() + y.sum() + y.view(-1)[::2].prod()


@body
def expanded_views_read_after_a_write(x: Tensor, w: Tensor) -> Tensor:
    y = x[0] * w[0]
    e = y.expand(4, 3)
    y.mul_(w[1])
    return (e * e).sum()


@body
def split_and_unbound_views(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    z = y * 1
    for row, factor in zip(y.clone().unbind(0), w.unbind(0), strict=True):
        z = z + row * factor
    a, b, c = z.tensor_split(3)
    return (a * b + c).pow(2).sum()


@body
def chunks_written_in_turn(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    for i in range(3):
        part = y.narrow(1, i, 1)
        part.mul_(w[:, i : i + 1])
        if i:
            part.add_(y.narrow(1, i - 1, 1))
    return (y * y).sum()


@body
def foreach_writes(x: Tensor, w: Tensor) -> Tensor:
    a, b = x * 2, w * 3
    if x.requires_grad:
        return ((a + w) * 0.5).pow(2).sum() + ((b + x) * 0.5).sum()
    torch._foreach_add_([a, b], [w, x])
    torch._foreach_mul_([a, b], 0.5)
    return a.pow(2).sum() + b.sum()


@body
def fused_writes(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    y.addcmul_(x, w, value=0.5).addcdiv_(w, x * x + 2)
    y.addmm_(x, w, beta=0.3)
    y.lerp_(w, 0.25)
    y[0].addmv_(x, w[0])
    y.clamp_(-1.5, 1.5)
    return (y * y).sum()


@body
def activations_in_place(x: Tensor, w: Tensor) -> Tensor:
    y = F.relu(x * w, inplace=True)
    y = F.leaky_relu_(y - 0.5)
    y = F.elu(y, inplace=True)
    y = F.silu(y, inplace=True)
    return F.hardtanh(y * 2, inplace=True).pow(2).sum()


@body
def complex_views(x: Tensor, w: Tensor) -> Tensor:
    z = torch.complex(x, w) * 1
    z.real.mul_(2)
    torch.view_as_real(z)[..., 1].add_(x)
    z[0] = z[1].conj()
    return (z * z.conj()).real.sum() + z.imag.pow(3).sum()


@body
def a_write_under_no_grad(x: Tensor, w: Tensor) -> Tensor:
    y = x * 3
    with torch.no_grad():
        y.add_(1)
        y.mul_(2)
    return (y * y * w).sum()


@body
def a_write_of_a_view_under_no_grad(x: Tensor, w: Tensor) -> Tensor:
    y = x * 3
    with torch.no_grad():
        y[0].add_(1)
        y[1] = 5.0
    return (y * y * w).sum()


@body
def a_constant_buffer_that_becomes_a_function(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        buffer = x * 2
    buffer = buffer.detach()
    first = buffer * w
    buffer.add_(w)
    buffer[0] = x[0]
    return (first + buffer * buffer).sum()


@body
def casts_in_a_write(x: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros(3, 3, dtype=torch.float32)
    y.copy_(x)
    y[0] = w[0]
    return (y.double() * w).sum()


@body
def a_write_of_an_integer_tensor(x: Tensor, w: Tensor) -> Tensor:
    count = torch.zeros(3, dtype=torch.int64)
    for i in range(3):
        count[i] = i + 1
    count += 1
    y = x * count
    y += count
    return (y * w).sum()


@body
def views_made_and_dropped(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    for i in range(3):
        for j in range(3):
            y[i, j] *= (i + j) * 0.5 + w[j, i]
    return (y * y).sum()


@body
def reshape_that_is_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    flat, copy = y.reshape(9), y.t().reshape(9)
    y.add_(1)
    flat[::2].mul_(2)
    return (flat * copy).sum() + (y * flat.view(3, 3).t()).sum()


@body
def contiguous_that_is_itself(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    same, also = y.contiguous(), y.to(torch.float64)
    y.sin_()
    return (same * also * w).sum()


def same_as_the_constant_buffer(x: Tensor, w: Tensor) -> Tensor:
    buffer = (x * 2).detach()
    after = torch.cat([x[:1], (buffer + w)[1:]])
    return (buffer * w + after * after).sum()


#: The same functions without a write, where torch.autograd refuses and the body cuts gradients on purpose.
WITHOUT_WRITES = {"a_constant_buffer_that_becomes_a_function": same_as_the_constant_buffer}

# bodies in which torch.autograd refuses what was overwritten, or has no derivative; held against differences
BY_DIFFERENCES = {
    "an_old_value_that_a_later_rule_reads",
    "the_same_tensor_on_both_sides",
    "a_write_whose_own_rule_reads_the_old_value",
    "writes_whose_rule_reads_the_result",
    "two_overlapping_views",
    "a_base_written_then_the_view_read",
    "activations_in_place",
    "a_state_updated_in_a_loop",
    "a_buffer_filled_slice_by_slice",
    "strided_views",
    "views_made_and_dropped",
    "fused_writes",
    "chunks_written_in_turn",
    "writes_of_numbers",
    "split_and_unbound_views",
    "reshape_that_is_a_view",
    "a_view_that_is_not_contiguous",
    "advanced_indices",
    "a_swap_through_views",
}


def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.rand(3, 3, dtype=torch.float64, generator=generator) * 1.5 + 0.2 for _ in range(2))
    return x * torch.tensor([1.0, -1.0, 1.0]), w


def wanted_gradients(name: str) -> list[Tensor | None]:
    if name in BY_DIFFERENCES:
        return list(numerical(BODIES[name], *leaves()))
    return reference(WITHOUT_WRITES.get(name, BODIES[name]), *leaves())


@pytest.mark.parametrize("name", BODIES)
def test_gradients_through_writes(name: str) -> None:
    f = BODIES[name]
    x, w = leaves()
    expected = f(plain(x), plain(w))
    with te.record():
        C = f(x, w)
    assert torch.equal(plain(C), expected)
    te.backward(C)
    agree([x, w], wanted_gradients(name), 1e-6 if name in BY_DIFFERENCES else 1e-10)


def torch_takes(name: str) -> bool:
    try:
        reference(BODIES[name], *leaves())
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in sorted(BY_DIFFERENCES) if torch_takes(name)])
def test_torch_agrees_where_it_does_not_refuse(name: str) -> None:
    f = BODIES[name]
    wanted = reference(f, *leaves())
    x, w = leaves()
    with te.record():
        C = f(x, w)
    te.backward(C)
    agree([x, w], wanted)


@pytest.mark.parametrize("name", [name for name in BODIES if name != "casts_in_a_write"])  # float32: too coarse
def test_second_derivatives_through_writes(name: str) -> None:
    f = BODIES[name]
    x, w = leaves()
    with te.record():
        C = f(x, w)
        D = sum_of_squares(te.grad(C, [x, w], record=True))
    te.backward(D)
    cuts = any(word in name for word in ("no_grad", "constant", "detached"))
    if cuts:  # its gradient is no derivative, so differences tell nothing
        copies = [t.requires_grad_() for t in leaves()]
        wanted = WITHOUT_WRITES.get(name, f)(*copies)
        found = torch.autograd.grad(wanted, copies, create_graph=True)
        agree([x, w], torch.autograd.grad(sum_of_squares(found), copies, allow_unused=True), 1e-8)
        return

    def squared(x: Tensor, w: Tensor) -> Tensor:
        with te.record():
            C = f(x, w)
        return sum_of_squares(te.grad(C, [x, w]))

    agree([x, w], numerical(squared, *leaves()), 1e-5)


def sum_of_squares(tensors: Sequence[Tensor | None]) -> Tensor:
    found = [(t * t).sum() for t in tensors if t is not None]
    assert found
    return sum(found[1:], found[0])


@pytest.mark.parametrize("name", BODIES)
def test_writes_outside_a_block(name: str) -> None:
    """The same bodies on recorded values, on the global tape."""
    f = BODIES[name]
    x, w = leaves()
    eye = torch.eye(3, dtype=torch.float64)
    C = f(te.lin(x, eye), te.lin(w, eye))
    assert torch.equal(plain(C), f(plain(x), plain(w)))
    te.backward(C)
    agree([x, w], wanted_gradients(name), 1e-6 if name in BY_DIFFERENCES else 1e-10)


# -- leaves that are written to --------------------------------------------------------------------


def test_a_leaf_written_in_the_block_has_the_gradient_of_what_it_holds() -> None:
    x, w = rand(3), rand(3)
    before = plain(x)
    with te.record():
        y = x * w
        x.mul_(3)
        C = (y + x * x).sum()
    te.backward(C)
    close(w.g, before)
    close(x.g, 2 * plain(x))


def test_a_leaf_written_outside_a_block_before_the_sweep() -> None:
    X, w, Y = rand(4, 3), rand(3, 2), rand(4, 2)
    wanted = reference(lambda X, w: F.mse_loss(X @ w, Y), X, w)
    C = te.mse(te.lin(X, w), Y)
    w.add_(1)
    X[0] = 0.0
    te.backward(C)
    agree([X, w], wanted)


@pytest.mark.parametrize("how", ["no_grad", "data", "optimizer"])
def test_a_parameter_stepped_before_the_sweep_is_right_or_refused(how: str) -> None:
    X, Y = rand(4, 3), rand(4, 2)
    w = torch.nn.Parameter(rand(3, 2))
    wanted = reference(lambda X, w: F.mse_loss(X @ w, Y), X, w)
    C = te.mse(te.lin(X, w), Y)
    w.grad = torch.ones_like(w)
    if how == "no_grad":
        with torch.no_grad():
            w.sub_(0.5 * w.grad)
    elif how == "data":
        w.data.sub_(0.5 * w.grad)
    else:
        torch.optim.SGD([w], lr=0.5).step()
    try:
        te.backward(C)
    except te.OverwrittenError:
        assert g_of(X) is None
        return
    agree([X, w], wanted)


def test_the_ordinary_step_between_two_recordings() -> None:
    X, w, b, Y = rand(20, 3), rand(3, 1), rand(1), rand(20)
    copies = [plain(t).requires_grad_() for t in (w, b)]
    for _ in range(5):
        C = te.mse(te.relu(te.lin(X, w, b)), Y)
        te.backward(C)
        w -= 0.1 * w.g
        b.sub_(0.1 * b.g)
        loss = F.mse_loss(torch.relu(X @ copies[0] + copies[1]).squeeze(-1), Y)
        for t, g in zip(copies, torch.autograd.grad(loss, copies), strict=True):
            with torch.no_grad():
                t -= 0.1 * g
        close(C, loss.detach())
    close(w, copies[0].detach())
    close(b, copies[1].detach())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("block", [False, True])
def test_an_optimizer_whose_grad_is_bridged(optimizer: Any, block: bool) -> None:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    twin = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    twin.load_state_dict(net.state_dict())
    X, Y = rand(16, 4), rand(16, 1)
    mine, theirs = optimizer(net.parameters(), lr=0.01), optimizer(twin.parameters(), lr=0.01)

    def step() -> Tensor:
        loss = F.mse_loss(net(X), Y)
        te.backward(loss)
        for p in net.parameters():
            p.grad = grad_of(p)
        mine.step()
        return loss

    for _ in range(4):
        if block:
            with te.record():
                loss = step()
        else:
            with te.record():
                loss = F.mse_loss(net(X), Y)
            te.backward(loss)
            for p in net.parameters():
                p.grad = grad_of(p)
            mine.step()
        theirs.zero_grad()
        other = F.mse_loss(twin(X), Y)
        other.backward()  # type: ignore[no-untyped-call]
        theirs.step()
        close(loss, other.detach())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        close(p, q.detach())


@pytest.mark.parametrize("parameter", [False, True])
def test_a_leaf_written_under_no_grad_collects_from_both_sides(parameter: bool) -> None:
    def f(w: Tensor, x: Tensor) -> Tensor:
        y = (w * x).sum()
        with torch.no_grad():
            w.add_(1)
            w[0] = 3.0
        return y + (w * x * 2).sum()

    x = rand(3)
    w: Any = torch.nn.Parameter(rand(3)) if parameter else rand(3)
    wanted = reference(lambda w: f(w, plain(x)), w)
    with te.record():
        C = f(w, x)
    te.backward(C)
    close(w.g, 3 * plain(x))
    close(wanted[0], 3 * plain(x))


def test_two_steps_in_one_block() -> None:
    X, w, Y = rand(8, 3), rand(3, 1), rand(8, 1)
    copy = plain(w)
    with te.record():
        for _ in range(3):
            C = F.mse_loss(X @ w, Y)
            te.backward(C, wrt=[w])
            with torch.no_grad():
                w -= 0.1 * w.g
    for _ in range(3):
        copy -= 0.1 * (2 * X.t() @ (X @ copy - Y) / 8)
    close(w, copy)


# -- aliases that the recorder did not see being made ----------------------------------------------


def test_views_made_before_the_block_follow_a_write_to_their_base() -> None:
    def f(flat: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat.mul_(w)
        return (a * b).sum()

    flat, w = rand(6), rand(6)
    copy, w_copy = plain(flat), plain(w).requires_grad_()
    (wanted,) = torch.autograd.grad(f(copy, w_copy, copy[:3], copy[3:]), w_copy)
    a, b = flat[:3], flat[3:]
    with te.record():
        C = f(flat, w, a, b)
    try:
        te.backward(C)
    except te.TapeError:
        return
    close(w.g, wanted)


def test_a_write_through_a_view_made_before_the_block() -> None:
    flat, w = rand(6), rand(3)
    a = flat[:3]
    copy, w_copy = plain(flat), plain(w).requires_grad_()
    copy[:3].mul_(w_copy)
    (wanted,) = torch.autograd.grad((copy * copy).sum(), w_copy)
    with te.record():
        a.mul_(w)
        C = (flat * flat).sum()
    te.backward(C)
    close(w.g, wanted)


def test_two_leaves_of_one_storage() -> None:
    flat = rand(6)
    a, b = flat[:3], flat[3:]
    with te.record():
        C = (a * b).sum() + (flat * flat).sum()
    te.backward(C)
    close(a.g, plain(b))
    close(b.g, plain(a))
    close(flat.g, 2 * plain(flat))


# -- writes that the recorder cannot see -----------------------------------------------------------


def unseen_thread(t: Tensor) -> None:
    def write() -> None:
        t.add_(1)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()


def unseen_numpy(t: Tensor) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.detach().numpy()[...] += 1


def unseen_after_close(t: Tensor) -> None:
    with torch.no_grad():
        t.detach().add_(1)


@pytest.mark.parametrize("unseen", [unseen_thread], ids=lambda f: f.__name__)
@pytest.mark.parametrize("target", ["leaf", "intermediate", "output that its rule reads"])
def test_an_unseen_write_of_what_a_rule_reads_is_refused(unseen: Callable[[Tensor], None], target: str) -> None:
    x, w = rand(3), rand(3)
    with te.record():
        y = torch.exp(x)
        z = y * w
        C = z.sum()
        unseen({"leaf": w, "intermediate": y, "output that its rule reads": y}[target])
    with pytest.raises(te.OverwrittenError) as caught:
        te.backward(C)
    text = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert "test_aliases.py:" in text
    assert "z = y * w" in text or "y = torch.exp(x)" in text
    assert "fix: " in text
    assert g_of(x) is None
    assert g_of(w) is None


def test_an_unseen_write_that_no_rule_reads_harms_nothing() -> None:
    x, w = rand(3), rand(3)
    with te.record():
        y = x + w
        C = (y + 2).sum()
        unseen_thread(y)
    te.backward(C)
    close(x.g, torch.ones(3).double())


def test_reading_on_after_an_unseen_write_is_refused() -> None:
    x = rand(3)
    with te.record():
        y = x * 2
        unseen_thread(y)
        C = (y * y).sum()
    with pytest.raises(te.OverwrittenError, match="could not see"):
        te.backward(C)


@pytest.mark.parametrize("write", ["data", "detach", "data of a view", "set_data"])
@pytest.mark.parametrize("where", ["block", "after block", "global"])
def test_a_write_past_autograd_is_right_or_refused(write: str, where: str) -> None:
    """``.data`` hides a write from torch.autograd, which then is silently wrong."""

    def do(t: Tensor) -> None:
        if write == "data":
            t.data.add_(1)
        elif write == "detach":
            t.detach().add_(1)
        elif write == "data of a view":
            t.data[1:].mul_(2)
        else:
            t.data = t.data + 1

    x, w = rand(3, 3), rand(3, 3)
    wanted = reference(lambda x, w: torch.sin(x @ w).sum(), x, w)
    if where == "global":
        C = torch.sin(te.lin(x, w)).sum()
        do(w)
    else:
        with te.record():
            C = torch.sin(x @ w).sum()
            if where == "block":
                do(w)
        if where == "after block":
            do(w)
    try:
        te.backward(C)
    except te.OverwrittenError:
        return
    agree([x, w], wanted)


def test_running_statistics_are_overwritten_by_batch_norm_without_a_mark() -> None:
    norm = torch.nn.BatchNorm1d(3).double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_var.uniform_(0.5, 2)
    before = plain(norm.running_mean), plain(norm.running_var)
    x = rand(6, 3)
    after = plain(before[0]), plain(before[1])
    F.batch_norm(x, *after, training=True)

    def of(x: Tensor) -> Tensor:
        first, second, third = (
            F.batch_norm(x, plain(mean), plain(var), training=training)
            for (mean, var), training in ((before, False), (before, True), (after, False))
        )
        return (first * second * third).sum()

    wanted = reference(of, x)
    with te.record():
        norm.eval()
        first = norm(x)
        norm.train()
        second = norm(x)
        norm.eval()
        C = (first * second * norm(x)).sum()
    close(C, of(x))
    te.backward(C)
    agree([x], wanted)
    close(norm.running_mean, after[0])
    close(norm.running_var, after[1])


# -- what a write spares ---------------------------------------------------------------------------


def test_a_write_beside_what_a_rule_reads_spares_it() -> None:
    x = rand(6)
    with te.record():
        y = x * 2
        a, b = y[:3], y[3:]
        z = a * a  # reads a
        b.mul_(5)
        C = z.sum() + b.sum()
    te.backward(C)
    close(x.g, torch.cat([8 * plain(x)[:3], torch.full((3,), 10.0).double()]))


def test_many_writes_beside_each_other_keep_no_copies() -> None:
    x = rand(64, 8)
    with te.record() as tape:
        buffer = torch.zeros(64, 8, dtype=torch.float64)
        for i in range(64):
            buffer[i] = torch.sin(x[i])
        C = (buffer * buffer).sum()
    te.backward(C)
    agree([x], reference(lambda x: torch.sin(x).pow(2).sum(), x))
    assert len(tape) < 64 * 8


def test_values_that_a_write_ended_have_no_g() -> None:
    x = rand(3)
    with te.record():
        y = x * 2
        z = y * y
        y.add_(1)
        C = z.sum()
    te.backward(C)
    assert g_of(y) is None  # what y holds now, C does not depend on
    close(x.g, 8 * plain(x))


def test_wrt_an_intermediate_that_was_written_to() -> None:
    x = rand(3)
    with te.record():
        y = x * 2
        y.add_(1)
        C = (y * y).sum()
    te.backward(C, wrt=[y])
    close(y.g, 2 * plain(y))


def test_a_stale_view_as_root_and_in_wrt() -> None:
    x, w = rand(3), rand(3)
    with te.record():
        y = x * 2
        v = y[1:]
        y.mul_(w)
    te.backward(v, torch.ones(2).double(), wrt=[x, w])
    close(x.g, torch.cat([torch.zeros(1).double(), 2 * plain(w)[1:]]))
    with te.record():
        y = x * 2
        v = y[1:]
        y.mul_(w)
        C = (v * v).sum()
    te.backward(C, wrt=[v, y])
    close(v.g, 2 * plain(v))
    close(y.g, torch.cat([torch.zeros(1).double(), 2 * plain(v)]))


def test_a_failing_write_changes_nothing() -> None:
    x, w = rand(3), rand(4)
    with te.record() as tape:
        y = x * 2
        v = y[:2]
        before, depth = plain(y), len(tape)
        for bad in (lambda: y.add_(w), lambda: v.copy_(w), lambda: y.mul_("a"), lambda: torch.add(x, w, out=y)):
            with pytest.raises((RuntimeError, TypeError)):
                bad()
        assert len(tape) == depth
        assert torch.equal(plain(y), before)
        C = (y * v[0]).sum()
    te.backward(C)
    agree([x], reference(lambda x: (x * 2 * (x * 2)[0]).sum(), x))


def test_reading_a_stale_view_in_a_failing_call_changes_nothing() -> None:
    x, w = rand(3), rand(5)
    with te.record() as tape:
        y = x * 2
        v = y[1:]
        y.mul_(3)
        depth = len(tape)
        with pytest.raises(RuntimeError):
            v + w
        with pytest.raises(te.ShapeError):
            te.mse(v, w)
        assert len(tape) == depth
        C = (v * v).sum()
    te.backward(C)
    agree([x], reference(lambda x: (x * 6)[1:].pow(2).sum(), x))


# -- random programs of writes ---------------------------------------------------------------------


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[0],
    lambda t: t[1:],
    lambda t: t[..., 0],
    lambda t: t.t() if t.ndim == 2 else t.flip(0),
    lambda t: t[::2],
    lambda t: t.unsqueeze(0),
    lambda t: t.reshape(-1),
    lambda t: t.diagonal() if t.ndim == 2 else t[-1:],
    lambda t: t.squeeze(),
    lambda t: t.narrow(0, 0, 1),
    lambda t: t.view_as(t),
    lambda t: t * 1.0,
]
WRITES: list[Callable[[Tensor, Tensor], Any]] = [
    lambda t, s: t.mul_(s),
    lambda t, s: t.add_(s * 0.5),
    lambda t, s: t.sin_(),
    lambda t, s: t.copy_(s.expand_as(t)),
    lambda t, s: t.zero_(),
    lambda t, s: t.mul_(0.5),
    lambda t, s: t.fill_(0.25),
    lambda t, s: t.tanh_(),
    lambda t, s: t.sub_(t.mean()),
    lambda t, s: t.addcmul_(t, t, value=0.1),
    lambda t, s: t.pow_(2),
    lambda t, s: t.exp_().mul_(0.2),
]

command = st.one_of(
    st.tuples(st.just("view"), st.integers(0, len(VIEWS) - 1), st.integers(0, 99)),
    st.tuples(st.just("write"), st.integers(0, len(WRITES) - 1), st.integers(0, 99)),
    st.tuples(st.just("use"), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("drop"), st.just(0), st.integers(0, 99)),
)


def run_commands(commands: list[tuple[str, int, int]], x: Tensor, s: Tensor) -> Tensor:
    pool = [x * 1.0, x * 0.0]
    total = torch.zeros((), dtype=x.dtype)
    for turn, (kind, which, i) in enumerate(commands):
        t = pool[i % len(pool)]
        if kind == "view" and t.ndim and t.numel():
            pool.append(VIEWS[which](t))
        elif kind == "write" and t.numel():
            WRITES[which](t, s[turn % 3])
        elif kind == "use":
            total = total + (torch.sin(t) * (turn + 1)).sum() * pool[which % len(pool)].sum()
        elif kind == "drop" and len(pool) > 2:
            pool.pop(i % len(pool))
    return total + sum((k + 1) * (t * t).sum() for k, t in enumerate(pool))


def check_commands(commands: list[tuple[str, int, int]], seed: int, way: str = "block") -> None:
    generator = torch.Generator().manual_seed(seed)
    start = [
        torch.rand(2, 3, dtype=torch.float64, generator=generator) + 0.3,
        torch.rand(3, dtype=torch.float64, generator=generator) + 0.4,
    ]
    x, s = map(plain, start)
    expected = run_commands(commands, *map(plain, start))
    if way == "block":
        with te.record():
            C = run_commands(commands, x, s)
    else:  # plain torch on recorded values, outside a block
        C = run_commands(commands, entered(x), entered(s))
    assert torch.equal(plain(C), expected)
    te.backward(C)
    direction = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in start]
    ends = []
    for h in (1e-6, -1e-6):
        ends.append(float(run_commands(commands, *[plain(t) + h * d for t, d in zip(start, direction, strict=True)])))
    slope = (ends[0] - ends[1]) / 2e-6
    told = sum(float((grad_of(t) * d).sum()) for t, d in zip((x, s), direction, strict=True) if g_of(t) is not None)
    if abs(slope) < 1e5:
        assert told == pytest.approx(slope, rel=1e-4, abs=1e-3 + 1e-9 * abs(float(expected)))


@te.op
def entered(x: Tensor) -> Tensor:
    return x * 1


@entered.rule
def entered_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return g


@pytest.mark.parametrize("way", ["block", "global"])
@given(commands=st.lists(command, min_size=1, max_size=14), seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_random_programs_of_writes(way: str, commands: list[tuple[str, int, int]], seed: int) -> None:
    check_commands(commands, seed, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["block", "global"])
@given(commands=st.lists(command, min_size=1, max_size=40), seed=st.integers(0, 10**6))
@settings(max_examples=600)
def test_more_random_programs_of_writes(way: str, commands: list[tuple[str, int, int]], seed: int) -> None:
    check_commands(commands, seed, way)


# -- the two operations of the room ----------------------------------------------------------------


# -- conjugated and negated views ------------------------------------------------------------------------


def writes_through_a_conjugated_view(x: Tensor) -> Tensor:
    y = x.clone()
    z = y.conj()
    z[2] *= 2j
    z[1] = x[0] * 3j
    return (y * z).abs().sum() + (y * y).real.sum()


def writes_through_the_imaginary_part_of_a_conjugated_view(x: Tensor) -> Tensor:
    y = x.clone()
    z = y.conj()
    z.imag.mul_(x.real)  # negated, seen from y
    z.real[1] = x[0].abs()
    return (y * y * x).abs().sum() + (z * x).real.sum()


def conjugated_and_negated_views_read_after_a_write_to_their_base(x: Tensor) -> Tensor:
    y = x.clone()
    z = y.conj()
    w = z.imag
    y.mul_(x)
    y[0] = x[2] * 3
    return (w * x.real).sum() + (z * x).abs().sum() + (z * z).imag.sum()


def writes_through_an_adjoint_matrix(x: Tensor) -> Tensor:
    y = x.clone().view(2, 2)
    z = y.mH
    z[0, 1] *= x[1]
    z.add_(x.view(2, 2) * 1j)
    v = y.t()
    v[1].mul_(2j)
    return (y @ z * x.view(2, 2)).real.sum()


def writes_through_a_conjugated_view_under_no_grad(x: Tensor) -> Tensor:
    y = x * x
    with torch.no_grad():
        y.conj().mul_(2j)
    return (y * y).real.sum()


CONJUGATED = [
    writes_through_a_conjugated_view,
    writes_through_the_imaginary_part_of_a_conjugated_view,
    conjugated_and_negated_views_read_after_a_write_to_their_base,
    writes_through_an_adjoint_matrix,
    writes_through_a_conjugated_view_under_no_grad,
]


@pytest.mark.parametrize("f", CONJUGATED, ids=lambda f: f.__name__)
def test_conjugated_views(f: Callable[[Tensor], Tensor]) -> None:
    x, other = rand(4, dtype=torch.complex128), rand(4, dtype=torch.complex128)
    with te.record() as tape:
        C = f(x)
    te.backward(C, keep=True)
    close(x.g, reference(f, x)[0], 1e-12)
    close(tape.program(inputs=(x,), outputs=C)(other), f(other), 1e-12)


# -- writes through a detached alias: the contents change, and the gradient passes over them, as in torch --------


def added_to_a_detached_alias(x: Tensor) -> Tensor:
    y = x * 2
    y.detach().add_(1)
    return (y * x).sum()


def a_view_of_a_detached_alias_written(x: Tensor) -> Tensor:
    y = x * 2
    v = y[1:]
    y.detach()[0] = 5
    return (y * x).sum() + (v * v).sum()


def a_mask_written_into_data(x: Tensor) -> Tensor:
    y = x * 2
    y.data[y.data > 0] = 0
    return (y * x).sum()


def a_leaf_read_and_scaled_in_its_data(x: Tensor) -> Tensor:
    a = (x * 2).sum()
    x.data.mul_(3)
    return a + (x * x).sum()


def stop_gradient_written(x: Tensor) -> Tensor:
    y = x * 2
    (te.stop_gradient(y) if te.current_tape().strong else y.detach()).add_(1)
    return (y * x).sum()


def a_detached_alias_of_a_view_written(x: Tensor) -> Tensor:
    y = x * 2
    v, flat = y[1:3], y.view(2, 2)
    y[:2].detach().mul_(3)
    return (y * x).sum() + (v * v).sum() + (flat * flat).sum()


def a_row_of_data_written(x: Tensor) -> Tensor:
    y = x.view(2, 2) * 2
    y[0].data.zero_()
    return (y * x.view(2, 2)).sum()


def written_after_its_detached_alias(x: Tensor) -> Tensor:
    y = x * 2
    d = y.detach()
    d.add_(1)
    y.mul_(2)
    return (y * x).sum() + (d * 3).sum()


def written_after_an_alias_with_a_gradient_of_its_own(x: Tensor) -> Tensor:
    y = x * 2
    d = y.detach()
    d.add_(x * 5)
    y.mul_(2)
    return (y * 3).sum() + (d * 7).sum()


def written_after_a_detached_alias_of_a_view(x: Tensor) -> Tensor:
    y = x * 2
    d = y[1:].detach()
    d[0].add_(1)
    d.mul_(2)
    y.mul_(2)
    return (y * x * d.sum()).sum()


DETACHED = [
    a_detached_alias_of_a_view_written,
    a_row_of_data_written,
    written_after_its_detached_alias,
    written_after_an_alias_with_a_gradient_of_its_own,
    written_after_a_detached_alias_of_a_view,
    added_to_a_detached_alias,
    a_view_of_a_detached_alias_written,
    a_mask_written_into_data,
    a_leaf_read_and_scaled_in_its_data,
    stop_gradient_written,
]


@pytest.mark.parametrize("f", DETACHED, ids=lambda f: f.__name__)
def test_writes_through_a_detached_alias(f: Callable[[Tensor], Tensor]) -> None:
    as_torch(f, rand(4))


def as_torch(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Asserts that the gradient of ``f(x)`` is torch's."""
    wanted = reference(f, x)[0]
    mine = plain(x)
    with te.record():
        C = f(mine)
    te.backward(C)
    close(mine.g, wanted, 1e-12)


def test_overlap_is_never_missed() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = [
        base,
        base[0],
        base[1:3],
        base[:, 0],
        base[:, 3:],
        base[::2, ::2],
        base.t()[2],
        base.view(-1)[5:7],
        base[2:2],
        base[3, 5],
    ]
    for a in views:
        for b in views:
            addresses = [set() if t.numel() == 0 else {t.data_ptr() + 4 * k for k in _offsets(t)} for t in (a, b)]
            if addresses[0] & addresses[1]:
                assert regions.overlap(a, b)


def _offsets(t: Tensor) -> list[int]:
    return places.positions(tuple(t.shape), t.stride(), 0, t.device).tolist()


# -- a complex view of real memory -------------------------------------------------------------------


def _conjugated(x: Tensor) -> Tensor:
    y = x.clone().view(2, 2)
    z = torch.view_as_complex(y).conj()
    z.mul_(2j)
    return y * z.imag[:, None]


def _read_again(x: Tensor) -> Tensor:
    y = x.clone()
    z = torch.view_as_complex(y.view(2, 2))
    y[1] = y[0] * 2
    y.mul_(3)
    return z.conj().abs() * z.angle()


def _filled(x: Tensor) -> Tensor:
    y = torch.zeros(3, 2, 2, dtype=torch.float64)
    z = torch.view_as_complex(y)
    z[1] = torch.view_as_complex(x.view(2, 2))
    z[0] += z[1].conj()
    z.t()[1].mul_(1j)
    return y.exp()


def _unfollowed(x: Tensor) -> Tensor:
    y = x.clone().view(2, 2)
    z = torch.view_as_complex(y)
    with torch.no_grad():
        z.mul_(2)
    return y * z.real[:, None]


@pytest.mark.parametrize("function", [_conjugated, _read_again, _filled, _unfollowed])
def test_a_write_through_a_complex_view_of_reals(function: Callable[[Tensor], Tensor]) -> None:
    x = rand(4)
    with te.record():
        C = function(x).sum()
    te.backward(C)
    assert torch.equal(C, function(plain(x)).sum())
    agree([x], reference(lambda x: function(x).sum(), x))


# -- one memory in two dtypes ------------------------------------------------------------------------

RECAST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def recast(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    RECAST[f.__name__] = f
    return f


@recast
def the_complex_one_written(y: Tensor, w: Tensor) -> Tensor:
    y.view(torch.complex128).mul_(1j)
    return (y * w).sum()


@recast
def the_real_one_written(y: Tensor, w: Tensor) -> Tensor:
    c = y.view(torch.complex128)
    y.mul_(w)
    return (y * w).sum() * c.abs().sum()


@recast
def a_part_written(y: Tensor, w: Tensor) -> Tensor:
    c = y[2:6].view(torch.complex128)
    c.mul_(1j)
    y[0] = w[3]
    return (y * w).sum()


@recast
def more_than_the_part_written(y: Tensor, w: Tensor) -> Tensor:
    c = y[2:6].view(torch.complex128)
    y.mul_(w)
    return (y * w).sum() * c.abs().sum()


@recast
def a_view_of_each(y: Tensor, w: Tensor) -> Tensor:
    v, c = y[1:], y.view(torch.complex128)
    c[1:].mul_(1j)
    return (v * v * w[1:]).sum()


@recast
def bits_flipped(y: Tensor, w: Tensor) -> Tensor:
    y.view(torch.int64).bitwise_xor_(-(2**63))
    return (y * w).sum()


@recast
def reals_of_a_complex_one(y: Tensor, w: Tensor) -> Tensor:
    z = torch.complex(y, w)
    z.view(torch.float64)[3] = 5
    z.mul_(2)
    return (z.view(torch.float64)[:8] * w).sum() + (z * z).abs().sum()


@recast
def three_dtypes(y: Tensor, w: Tensor) -> Tensor:
    c = y.view(torch.complex128)
    bits = c.view(torch.int64)
    bits.bitwise_and_(-(2**40))
    y.mul_(w)
    return c.real.sum() + (y * w).sum() + (bits > 0).sum()


@recast
def without_gradient(y: Tensor, w: Tensor) -> Tensor:
    c = y.view(torch.complex128)
    with torch.no_grad():
        c.mul_(1j)
    return (y * w).sum()


@recast
def a_new_beginning(y: Tensor, w: Tensor) -> Tensor:
    c = y.view(torch.complex128).requires_grad_()
    return (c * c).abs().sum() + (y * w).sum()


@pytest.mark.parametrize("outside", [False, True], ids=["in the block", "after it"])
@pytest.mark.parametrize("name", RECAST)
def test_a_view_of_another_dtype_is_an_alias_without_gradient(name: str, outside: bool) -> None:
    f = RECAST[name]
    x, w = rand(8), rand(8)

    def whole(x: Tensor, w: Tensor) -> Tensor:
        return f(x * 2, w * 3)

    with te.record() as tape:
        found = (x * 2, w * 3) if outside else whole(x, w)
    C: Any = f(*found) if outside else found
    assert torch.equal(plain(C), whole(plain(x), plain(w)))
    te.backward(C)
    agree([x, w], reference(whole, x, w))
    if not outside:
        program = tape.program(inputs=(x, w), outputs=C)
        x, w = rand(8), rand(8)
        close(program.step(x, w), whole(plain(x), plain(w)))
        agree([x, w], reference(whole, x, w))


def test_a_write_that_another_dtype_cannot_follow() -> None:
    """Seven numbers are no whole number of pairs: the gradient is right, as none passes there; a replay is refused."""
    x = rand(7)

    def f(x: Tensor) -> Tensor:
        y = x * 2
        c = y[:6].view(torch.complex128)
        y.mul_(3)
        return y.sum() + c.abs().sum()

    with te.record() as tape:
        C = f(x)
    with pytest.raises(te.NotRecordedError, match=r"not so that the write can be followed(.|\n)*\.clone\(\)"):
        tape.program(inputs=x, outputs=C)
    te.backward(C)
    agree([x], reference(f, x))


@pytest.mark.parametrize("view", [torch.real, torch.view_as_real])
def test_a_view_that_torch_gives_another_grad_fn_after_a_write(view: Callable[[Tensor], Tensor]) -> None:
    """Torch makes that when it is asked for it, and fails where no gradient is kept."""
    x = rand(4).requires_grad_()
    before = view(torch.complex(x, x))
    before._base.mul_(2)
    with te.record():
        with torch.no_grad():
            before.clone()
        h = view(torch.complex(x, x))
        with torch.no_grad():
            h.mul_(2)
            seen = h.detach() + before
        C = (h * seen).sum()
    te.backward(C, wrt=[x])
    close(g_of(x), torch.autograd.grad((view(torch.complex(x, x)) * plain(seen)).sum(), x)[0])
    with pytest.raises(te.NotRecordedError, match="computed by torch operations outside"), te.record():
        te.backward((before * 2).sum())


@pytest.mark.parametrize("write", ["relu_", "exp_", "sin_"])
@pytest.mark.parametrize(
    "look", [lambda d: d.reshape(-1), lambda d: d[0], lambda d: d.t()[1:], lambda d: d.view(4)[1:]]
)
def test_a_view_of_a_detached_alias_is_a_constant_after_a_write_too(look: Any, write: str) -> None:
    def f(x: Tensor) -> Tensor:
        h = x * 1.0
        v = look(h.detach())
        getattr(h, write)()
        return (h * 2).sum() + (v * 3).sum()

    as_torch(f, rand(2, 2))
