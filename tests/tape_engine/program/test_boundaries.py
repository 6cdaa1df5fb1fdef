"""Code that leaves the recorder's sight, and contexts around a replay: right, or refused, never silently wrong."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tape_engine as te
from tests.helpers import agree, close, g_of, plain, reference
from tests.tape_engine.program.common import F32, F64, draw, follows, freeze, is_view, out_kernel, ran

Tensor = torch.Tensor


def right_or_refused(function: Callable[[Tensor], Tensor], *, swept: bool = True) -> None:
    """A replay on other values gives what running the code gives; or something on the way says it cannot."""
    x = draw(3).abs()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own, of torch.tensor(tensor)
            warnings.simplefilter("error", te.TapeWarning)
            program = freeze(function, [x])
    except (te.TapeError, te.TapeWarning):
        return
    for x in (draw(3).abs(), -draw(3).abs()):
        mine = plain(x)
        state = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with te.record():
                wanted = plain(function(mine))
        torch.set_rng_state(state)
        try:
            got = program.step(x) if swept else program(x)
        except te.TapeError:
            return
        close(got, wanted)
        close(x, mine)


def by_data(x: Tensor) -> Tensor:
    return (x * x.data).sum()


def by_data_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.data.mul_(3)
    return y.sum()


def branch_on_data(x: Tensor) -> Tensor:
    return (x * 2).sum() if x.data.sum() > 0 else x.sum()


def branch_on_detached(x: Tensor) -> Tensor:
    return (x * 2).sum() if x.detach().sum() > 0 else x.sum()


def by_deepcopy(x: Tensor) -> Tensor:
    return (copy.deepcopy(x.detach()) * x).sum()


def by_torch_tensor(x: Tensor) -> Tensor:
    return (torch.tensor(x) * x).sum()


def by_new_tensor(x: Tensor) -> Tensor:
    return (x.new_tensor(x.detach()) * x).sum()


def by_as_tensor(x: Tensor) -> Tensor:
    return (torch.as_tensor(x) * x).sum()


def by_numpy(x: Tensor) -> Tensor:
    return (torch.from_numpy((x * 1.0).numpy() * 2) * x).sum()


def by_tolist(x: Tensor) -> Tensor:
    return (torch.tensor(x.tolist(), dtype=F64) * x).sum()


def by_numbers(x: Tensor) -> Tensor:
    return torch.stack([x[i] * float(x[i]) for i in range(3)]).sum()


def by_iteration(x: Tensor) -> Tensor:
    total = x[0] * 0
    for element in x:
        total = total + element * element
    return total


def by_max_of_python(x: Tensor) -> Tensor:
    return max(x) * x.sum()  # type: ignore[no-any-return]


def by_sorted(x: Tensor) -> Tensor:
    return sorted(x)[0] * x.sum()  # type: ignore[no-any-return]


def by_contains(x: Tensor) -> Tensor:
    return x.sum() if x[0] in x.abs() else -x.sum()


def by_format(x: Tensor) -> Tensor:
    return x.sum() * len(f"{float(x[0]):.1f}")


def by_set(x: Tensor) -> Tensor:
    y = torch.empty(0, dtype=F64)
    y.set_(x * 2)  # type: ignore[call-overload]
    return y.sum()


def by_resize(x: Tensor) -> Tensor:
    y = (x * 2).resize_(2)
    return y.sum()


def by_autograd(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (g,) = torch.autograd.grad((leaf**3).sum(), leaf)
    return (g * x).sum()


def by_autograd_of_autograd(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (g,) = torch.autograd.grad((leaf.sin() * leaf).sum(), leaf, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), leaf)
    return (h * x).sum()


def by_autograd_of_what_was_computed(x: Tensor) -> Tensor:
    leaf = (x * 2).detach().requires_grad_()
    (g,) = torch.autograd.grad((leaf**3).sum(), leaf, create_graph=True)
    return (g * x).sum()


def by_a_parameter(x: Tensor) -> Tensor:
    weight = torch.nn.Parameter(x * 2)
    return (weight * x).sum()


def by_a_layer_of_the_moment(x: Tensor) -> Tensor:
    layer = torch.nn.Linear(3, 1, bias=False, dtype=F64)
    layer.weight = torch.nn.Parameter((x * 2)[None])
    return layer(x).sum()  # type: ignore[no-any-return]


def by_setting_data(x: Tensor) -> Tensor:
    y = x * 1
    y.data = x * 2
    return (y * x).sum()


def by_setting_data_of_another_shape(x: Tensor) -> Tensor:
    y = torch.zeros(1, dtype=F64)
    y.data = x * 2
    return (y * x).sum()


def by_detached_numpy(x: Tensor) -> Tensor:
    return (torch.from_numpy((x * 2).detach().numpy()) * x).sum()


def by_numpy_of_an_input(x: Tensor) -> Tensor:
    return x.sum() * float(x.detach().numpy().max())


def by_functional_grad(x: Tensor) -> Tensor:
    return (torch.func.grad(lambda t: (t**3).sum())(x) * x).sum()  # type: ignore[no-any-return]


def by_vmap(x: Tensor) -> Tensor:
    return torch.vmap(lambda t: t * t.sin())(x).sum()  # type: ignore[no-any-return]


def by_sweep_that_is_not_recorded(x: Tensor) -> Tensor:
    y = (x**3).sum()
    (g,) = te.grad(y, x)
    assert g is not None
    return (g * 2).sum()


def by_backward_that_is_not_recorded(x: Tensor) -> Tensor:
    h = x * 1.0
    te.backward((h**3).sum(), keep=True)
    return (h.g * 2).sum()  # type: ignore[attr-defined,no-any-return]


def by_step_of_another_program(x: Tensor) -> Tensor:
    inner = freeze(lambda t: (t**3).sum(), [draw(3)])
    h = x * 1.0
    inner.step(h)
    return (h.g * 2).sum()  # type: ignore[attr-defined,no-any-return]


def by_negative_view(x: Tensor) -> Tensor:
    z = torch.complex(x, 2 * x).conj()
    return (z.imag * x).sum()


def by_checkpoint(x: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda t: t.sin().square(), x, use_reentrant=False).sum()  # type: ignore[no-any-return]


CODE = [
    by_data, by_data_in_place, branch_on_data, branch_on_detached, by_deepcopy, by_torch_tensor,
    by_new_tensor, by_as_tensor, by_numpy, by_tolist, by_numbers, by_iteration, by_max_of_python, by_sorted,
    by_contains, by_format, by_set, by_resize, by_autograd, by_autograd_of_autograd, by_autograd_of_what_was_computed,
    by_a_parameter, by_a_layer_of_the_moment, by_setting_data, by_setting_data_of_another_shape, by_detached_numpy,
    by_numpy_of_an_input, by_functional_grad,
    by_vmap, by_sweep_that_is_not_recorded, by_backward_that_is_not_recorded, by_step_of_another_program,
    by_negative_view, by_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("function", CODE, ids=lambda f: f.__name__)
def test_right_or_refused(function: Callable[[Tensor], Tensor]) -> None:
    right_or_refused(function, swept=False)


@pytest.mark.parametrize("swept", [False, True], ids=["call", "step"])
def test_a_whole_step_of_training_inside_the_block(swept: bool) -> None:
    """Forward, torch's own backward and the update, all recorded: a replay trains as running the code does."""

    def train(x: Tensor, net: nn.Linear) -> Tensor:
        loss = net(x).square().mean()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= 0.1 * g  # type: ignore[misc]
        return loss.detach()  # type: ignore[no-any-return]

    ours = nn.Linear(3, 2).double()
    theirs = copy.deepcopy(ours)
    x = draw(4, 3)
    try:
        with te.record() as tape:
            out = train(x, ours)
        program = tape.program(inputs=x, outputs=out)
        train(x, theirs)
        for _ in range(3):
            x = draw(4, 3)
            close(program(x), train(x, theirs))
    except te.TapeError:
        return
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(plain(a), plain(b))


# -- contexts around a replay --------------------------------------------------------------------------------


def product(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).relu() @ w.t()).square().sum()


def test_under_autocast() -> None:
    """A replay computes in the recorded dtypes, whatever stands around it."""
    x, w = draw(4, 3, dtype=F32), draw(3, 2, dtype=F32)
    program = freeze(product, [x], [w])
    wanted = product(x, w)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(program(x), wanted, 1e-5)
            close(program.step(x), wanted, 1e-5)
        agree([x, w], reference(product, x, w), 1e-5)


def test_first_replay_under_autocast() -> None:
    """What is made once, at the first replay, is not made in the dtypes of what stands around that."""

    def function(x: Tensor) -> Tensor:
        table = torch.arange(9, dtype=F32).reshape(3, 3) / 7
        return (x @ (table @ table)).square().sum()

    program = freeze(function, [draw(4, 3, dtype=F32)])
    x = draw(4, 3, dtype=F32)
    wanted = function(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(program(x), wanted, 1e-5)
        close(program.step(x), wanted, 1e-5)
    spy = ran(lambda: program(x))
    assert not [o for o in spy.heard if not is_view(o) and not o._schema.is_mutable and out_kernel(o)]


def test_autocast_inside_the_block() -> None:
    x, w = draw(4, 3, dtype=F32), draw(3, 2, dtype=F32)

    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = x @ w
        assert h.dtype == torch.bfloat16
        return h.float().square().sum()

    program = freeze(function, [x], [w])
    follows(program, function, [draw(4, 3, dtype=F32)], [w], tol=2e-2)


def test_under_another_default_dtype() -> None:
    def function(x: Tensor) -> Tensor:
        return x * torch.arange(3.0).double() + torch.zeros(3) + torch.full((3,), 2.0) + torch.rand(3) * 0

    x = draw(3)
    program = freeze(function, [x])
    wanted = function(x)
    torch.set_default_dtype(F64)
    try:
        close(program(x), wanted)
        close(program.step(x, seed=torch.ones(3, dtype=F64)), wanted)
    finally:
        torch.set_default_dtype(F32)
    close(program(x), wanted)


def test_under_a_default_device() -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(lambda x, w: product(x, w) + torch.ones(2, dtype=F64).sum(), [x], [w])
    wanted = product(x, w) + 2
    with torch.device("meta"):
        got = program.step(x)
    assert got.device.type == "cpu"
    close(got, wanted)
    close(program(x), wanted)


def test_under_deterministic_algorithms() -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(product, [x], [w])
    torch.use_deterministic_algorithms(True)
    try:
        close(program.step(x), product(x, w))
    finally:
        torch.use_deterministic_algorithms(False)


def test_under_a_saved_tensor_hook_and_anomaly_mode() -> None:
    x, w = draw(4, 3).requires_grad_(), draw(3, 2).requires_grad_()
    program = freeze(product, [x], [w])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        close(program.step(x), product(x, w).detach())


def test_in_another_thread_than_it_was_made_in() -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(product, [x], [w])
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(program.step(x)))
    thread.start()
    thread.join()
    close(found[0], product(x, w))
    agree([x, w], reference(product, x, w))


def test_beside_a_thread_that_records() -> None:
    x, w = draw(4, 3), draw(3, 2)
    program = freeze(product, [x], [w], wrt=[x])
    inputs = [draw(4, 3) for _ in range(20)]
    wanted = [(product(x, w), reference(product, x, w)[0]) for x in inputs]
    opened, done, failures = threading.Event(), threading.Event(), []
    lengths: list[int] = []

    def record() -> None:
        with te.record() as tape:
            opened.set()
            while not done.wait(0.001):
                inputs[0] * 2
            lengths.append(len({node.op.name for node in tape.nodes}))

    thread = threading.Thread(target=record)
    thread.start()
    opened.wait()
    try:
        for x, (out, g) in zip(inputs, wanted, strict=True):
            close(program.step(x), out)
            close(g_of(x), g)
            close(torch.tensor(program(x).tolist(), dtype=F64), out)
    except BaseException as error:
        failures.append(error)
    done.set()
    thread.join()
    assert not failures, failures[0]
    assert lengths == [1]


def test_after_its_tape_was_cleared() -> None:
    x, w = draw(4, 3), draw(3, 2)
    with te.record() as tape:
        y = product(x, w)
    program = tape.program(inputs=x, outputs=y)
    tape.clear()
    follows(program, product, [draw(4, 3)], [w])
    with pytest.raises(te.NotRecordedError):
        tape.program(inputs=x, outputs=y)


def test_strict_and_scoped() -> None:
    x, w = draw(4, 3), draw(3, 2)
    with te.record(strict=True) as tape, te.scope("block"):
        y = product(x, w)
    follows(tape.program(inputs=x, outputs=y), product, [draw(4, 3)], [w])


def test_gradients_of_two_programs_add_up() -> None:
    x, w = draw(4, 3), draw(3, 2)
    first = freeze(product, [x], [w], wrt=[w])
    second = freeze(lambda x, w: (x @ w).exp().sum(), [x], [w], wrt=[w])
    first.step(x)
    second.step(x, accumulate=True)
    close(g_of(w), reference(lambda x, w: product(x, w) + (x @ w).exp().sum(), x, w)[1])


# -- further layers ------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: nn.LSTM(4, 5, batch_first=True), (2, 3, 4)),
    "GRU": (lambda: nn.GRU(4, 5), (3, 2, 4)),
    "RNN": (lambda: nn.RNN(4, 5), (3, 2, 4)),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (2, 3, 4)),
    "multihead": (lambda: _SelfAttention(4), (2, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "conv transpose": (lambda: nn.ConvTranspose1d(4, 2, 2), (2, 4, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 5, 5)),
    "average pool": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)), (2, 2, 6, 6)),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 3, 3)),
    "bilinear": (lambda: _Pairs(), (3, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (2, 4)),
    "prelu": (lambda: nn.PReLU(4), (2, 4)),
    "glu": (lambda: nn.GLU(), (2, 4)),
    "linear bias-free": (lambda: nn.Linear(4, 3, bias=False), (2, 3, 4)),
}


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, x, x)[0]
        return found


class _Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(4, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, x.tanh())
        return found


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, shape = LAYERS[name]
    net = make().double()
    twin = copy.deepcopy(net)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        out = net(x)
        out = out[0] if isinstance(out, tuple) else out
        return (out * torch.arange(1, out.numel() + 1, dtype=F64).reshape(out.shape).sin()).sum()  # type: ignore[no-any-return]

    x = draw(*shape)
    with te.record() as tape:
        y = loss(net, x)
    program = tape.program(inputs=x, outputs=y)
    for _ in range(2):
        x = draw(*shape)
        tracked = x.clone().requires_grad_()
        wanted = loss(twin, tracked)
        leaves = [tracked, *twin.parameters()]
        gradients = torch.autograd.grad(wanted, leaves, allow_unused=True)
        close(program.step(x), wanted.detach(), 1e-9)
        agree([x, *net.parameters()], list(gradients), 1e-8)


def test_lstm_of_float32() -> None:
    """One fused kernel on the CPU, which keeps a workspace for its backward."""
    net = nn.LSTM(4, 5)
    x = draw(3, 2, 4, dtype=F32)
    with te.record() as tape:
        y = net(x)[0].square().sum()
    program = tape.program(inputs=x, outputs=y)
    for _ in range(2):
        x = draw(3, 2, 4, dtype=F32)
        tracked = x.clone().requires_grad_()
        wanted = net(tracked)[0].square().sum()
        gradients = torch.autograd.grad(wanted, [tracked, *net.parameters()])
        close(program.step(x), wanted.detach(), 1e-4)
        agree([x, *net.parameters()], list(gradients), 1e-4)


def test_convolution_of_other_memory_formats() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    twin = copy.deepcopy(net)
    x = draw(2, 2, 5, 5)
    state = copy.deepcopy(net.state_dict())
    with te.record() as tape:
        y = net(x).square().sum()
    program = tape.program(inputs=x, outputs=y)
    net.load_state_dict(state)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = draw(2, 2, 5, 5).to(memory_format=memory_format)
        tracked = x.clone().requires_grad_()
        wanted = twin(tracked).square().sum()
        close(program.step(x), wanted.detach(), 1e-9)
        (g,) = torch.autograd.grad(wanted, tracked)
        agree([x], [g], 1e-9)
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        close(a, b)
