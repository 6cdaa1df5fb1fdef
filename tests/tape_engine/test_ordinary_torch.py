"""What PyTorch users rely on, inside a block: as torch.autograd has it, or refused by name; never silently wrong."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, stateless
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, TensorDataset

import tape_engine as te
from tests.helpers import Overloads, close, g_of, grad_of, plain

Tensor = torch.Tensor
Function = Callable[..., Any]
F64 = torch.float64


def real(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def follows_autograd(function: Function, *inputs: Tensor, tol: float = 1e-10, block: Function = te.record) -> None:
    """The value and the gradients are those of torch.autograd on the same random stream."""
    start = torch.get_rng_state()
    tracked = [plain(t).requires_grad_(t.is_floating_point() or t.is_complex()) for t in inputs]
    expected = function(*tracked)
    asked = [t for t in tracked if t.requires_grad]
    wanted: Any = torch.autograd.grad(expected, asked, allow_unused=True)
    after = torch.get_rng_state()
    torch.set_rng_state(start)
    with block():
        result = function(*inputs)
    assert torch.equal(torch.get_rng_state(), after), "the random stream differs"
    assert torch.equal(plain(result), plain(expected)), "the result differs"
    te.backward(result)
    assert torch.equal(torch.get_rng_state(), after), "the sweep has drawn random numbers"
    for t, reference in zip([t for t in inputs if t.is_floating_point() or t.is_complex()], wanted, strict=True):
        found = g_of(t)
        if reference is None or found is None:
            assert found is None or not found.any()
            assert reference is None or not reference.any(), "a gradient is missing"
        else:
            close(found, reference, tol)


# -- optimizers ----------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "a schedule": lambda p: torch.optim.SGD(p, lr=0.2),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(plain(mine), plain(other), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_read_grad(name: str) -> None:
    """Six steps on a model with batch norm and dropout, with clipped gradients, against the same by torch.autograd."""
    ours = network()
    theirs = copy.deepcopy(ours)
    models = {"ours": ours, "theirs": theirs}
    optimizers = {key: OPTIMIZERS[name](model.parameters()) for key, model in models.items()}
    schedules = {key: torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for key, each in optimizers.items()}
    for _ in range(6):
        x, y = real(8, 4), torch.randint(3, (8,))
        start = torch.get_rng_state()
        for key, model in models.items():
            torch.set_rng_state(start)
            optimizers[key].zero_grad()
            if key == "ours":
                with te.record():
                    loss = F.cross_entropy(model(x), y)
                te.backward(loss)
                for p in model.parameters():
                    p.grad = g_of(p)
            else:
                torch.autograd.backward(F.cross_entropy(model(x), y))
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            nn.utils.clip_grad_value_(model.parameters(), 0.2)
            optimizers[key].step()
            if name == "a schedule":
                schedules[key].step()
    same_state(ours, theirs)


def test_an_optimizer_that_calls_the_loss() -> None:
    """LBFGS evaluates the closure several times a step."""
    ours = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    theirs = copy.deepcopy(ours)
    x, y = real(9, 3), real(9, 1)

    def by_tape() -> Any:
        with te.record():
            loss = F.mse_loss(ours(x), y)
        te.backward(loss)
        for p in ours.parameters():
            p.grad = g_of(p)
        return loss

    def by_torch() -> Any:
        optimizer.zero_grad()
        loss = F.mse_loss(theirs(x), y)
        torch.autograd.backward(loss)
        return loss

    optimizers: list[Any] = [
        torch.optim.LBFGS(each.parameters(), lr=0.5, max_iter=6, line_search_fn="strong_wolfe")
        for each in (ours, theirs)
    ]
    mine, optimizer = optimizers
    for _ in range(3):
        mine.step(by_tape)
        optimizer.step(by_torch)
    same_state(ours, theirs)


def test_gradients_gathered_over_several_batches() -> None:
    ours = nn.Linear(3, 2).double()
    theirs = copy.deepcopy(ours)
    for p in ours.parameters():
        vars(p).pop("g", None)
    for _ in range(3):
        x = real(4, 3)
        with te.record():
            loss = ours(x).square().mean()
        te.backward(loss, wrt=list(ours.parameters()), accumulate=True)
        torch.autograd.backward(theirs(x).square().mean())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(g_of(p), q.grad)


# -- functions with a backward of their own --------------------------------------------------------------


def applied(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class Scaled(torch.autograd.Function):
    """Several inputs, one a number; a backward unlike the derivative, which reads `needs_input_grad`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, k: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.k = k
        return a * b * k

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        a, b = ctx.saved_tensors
        return (
            (g[0] * b * 10 if ctx.needs_input_grad[0] else None),
            (g[0] * a if ctx.needs_input_grad[1] else None),
            None,
        )


class Sorted(torch.autograd.Function):
    """Two outputs, of which one has no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Any:
        values, places = a.sort()
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)
        return values, places

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        (places,) = ctx.saved_tensors
        return torch.zeros_like(g[0]).scatter(-1, places, g[0] * 3)


class Apart(torch.autograd.Function):
    """The newer form, with `setup_context`; no gradient for the second input."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a.sin() * b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        _, b = ctx.saved_tensors
        return g[0] * b * 7, None


class Unreached(torch.autograd.Function):
    """Gradients of outputs that the loss does not reach come as None."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return a * 2, a * 3

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return sum(each * 11 for each in g if each is not None)


class FromOutput(torch.autograd.Function):
    """What the backward reads is the output."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        out = a.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        (out,) = ctx.saved_tensors
        return g[0] * out * out


class Several(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: float, *tensors: Tensor) -> Any:
        return sum(tensors) * k

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return None, g[0], 2 * g[0]


class Flat(torch.autograd.Function):
    """It returns a view."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.view(-1)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return g[0].view(3, 4) * 2


FUNCTIONS: dict[str, Function] = {
    "several inputs": lambda x, y: applied(Scaled, x * 1, y, 2.0).sum(),
    "one that needs none": lambda x, y: applied(Scaled, x, torch.ones(3, 4, dtype=F64), 2.0).sum() + y.sum(),
    "a detached one": lambda x, y: applied(Scaled, x, y.detach(), 2.0).sum(),
    "an output without a gradient": lambda x, y: (applied(Sorted, x)[0] * y).sum() + applied(Sorted, x)[1].sum(),
    "a context set up apart": lambda x, y: applied(Apart, x, y).sum(),
    "an output out of reach": lambda x, y: applied(Unreached, x * y)[1].sum(),
    "what it returned": lambda x, y: (applied(FromOutput, x) * y).sum(),
    "as many as are given": lambda x, y: applied(Several, 3.0, x, y).square().sum(),
    "a view": lambda x, y: (applied(Flat, x * y) ** 2).sum(),
    "one within another": lambda x, y: applied(FromOutput, applied(Scaled, x, y, 0.1)).sum(),
    "under no_grad": lambda x, y: (unrecorded(x) * y).sum(),
}


def unrecorded(x: Tensor) -> Any:
    with torch.no_grad():
        return applied(FromOutput, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_s_own_backward(name: str) -> None:
    follows_autograd(FUNCTIONS[name], real(3, 4), real(3, 4))


# -- modules -------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def parametrized() -> nn.Module:
    layer = nn.Linear(4, 4).double()
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def trained(make: Callable[[], nn.Module], x: Tensor, *, mode: bool = True, calls: int = 2) -> None:
    """A module by itself: parameters, buffers and the input against torch.autograd, `calls` times."""
    ours = make().train(mode)
    theirs = copy.deepcopy(ours)
    for _ in range(calls):
        start = torch.get_rng_state()
        x_ = plain(x).requires_grad_()
        wanted = theirs(x_).square().sum()
        for q in theirs.parameters():
            q.grad = None
        torch.autograd.backward(wanted)
        torch.set_rng_state(start)
        with te.record():
            loss = ours(x).square().sum()
        assert torch.equal(plain(loss), wanted.detach())
        te.backward(loss)
        close(g_of(x), x_.grad)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            close(g_of(p), q.grad)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert torch.equal(plain(a), plain(b))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4), nn.AlphaDropout(0.2)).double(),
    "batch norm": lambda: nn.BatchNorm1d(4).double(),
    "batch norm that averages": lambda: nn.BatchNorm1d(4, momentum=None).double(),
    "batch norm of the batch": lambda: nn.BatchNorm1d(4, track_running_stats=False).double(),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(0, (2, 3)), nn.InstanceNorm1d(3, track_running_stats=True)
    ).double(),
    "a parametrized weight": parametrized,
    "random leaks": lambda: nn.RReLU(),
    "frozen statistics": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval()).double(),
}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_in_both_modes(name: str, mode: bool) -> None:
    trained(MODULES[name], real(6, 4), mode=mode)


def test_functional_call_with_recorded_weights() -> None:
    """The weights that are put in are values as others: the gradient passes to what they were made of."""
    layer = nn.Linear(4, 3).double()

    def run(x: Tensor, w: Tensor) -> Any:
        given = {"weight": w.sin(), "bias": w.sum(1)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            old = stateless.functional_call(layer, given, (x,))
        return (torch.func.functional_call(layer, given, (x,)) * old).sum()

    follows_autograd(run, real(5, 4), real(3, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    """With dropout inside: what is computed again draws the same mask."""
    layer = nn.Linear(4, 4).double()

    def part(t: Tensor) -> Tensor:
        return F.dropout(layer(t).sin(), 0.5)

    def run(x: Tensor) -> Any:
        return checkpoint(part, x, use_reentrant=reentrant).square().sum()

    chain: Any = checkpoint_sequential
    x = real(3, 4)
    if not reentrant:
        follows_autograd(run, x)
        follows_autograd(lambda t: chain([part, part], 2, t, use_reentrant=False).sum(), real(3, 4))
        return
    # Torch's own has no torch.autograd.grad; the other one draws the same numbers.
    tracked, start = plain(x).requires_grad_(), torch.get_rng_state()
    wanted = run(tracked)
    torch.autograd.backward(wanted)
    references = [tracked.grad, *[p.grad for p in layer.parameters()]]
    for each in (x, plain(x).requires_grad_()):
        layer.zero_grad()
        torch.set_rng_state(start)
        with warnings.catch_warnings(record=True) as caught, te.record():
            warnings.simplefilter("always")
            loss = run(each)
        assert torch.equal(plain(loss), plain(wanted))
        assert loss.requires_grad is each.requires_grad
        assert len(caught) == (not each.requires_grad)  # torch's own: as without a recording
        te.backward(loss)
        for t, reference in zip([each, *layer.parameters()], references, strict=True):
            close(g_of(t), reference)
        assert all(p.grad is None for p in layer.parameters())


def test_torch_s_own_backward_through_a_recorded_checkpoint() -> None:
    w = real(3, 3).requires_grad_()
    x = real(3).requires_grad_()
    with te.record():
        loss = checkpoint(lambda t: (t @ w).sin().exp(), x, use_reentrant=False).sum()
        torch.autograd.backward(loss)
    te.backward(loss)
    for t in (x, w):
        close(g_of(t), t.grad)


def test_checkpoint_replayed() -> None:
    """A replay draws a mask of its own, the same in both directions."""
    layer = nn.Linear(4, 4).double()

    def run(t: Tensor) -> Any:
        return checkpoint(lambda u: F.dropout(layer(u).sin(), 0.5), t, use_reentrant=True).square().sum()

    x = real(3, 4).requires_grad_()
    with te.record() as tape:
        loss = run(x)
    program = tape.program(inputs=x, outputs=loss)
    y = real(3, 4)
    torch.manual_seed(5)
    got = program.step(y)
    torch.manual_seed(5)
    layer.zero_grad()
    tracked = plain(y).requires_grad_()
    wanted = run(tracked)
    torch.autograd.backward(wanted)
    close(got, wanted.detach())
    close(g_of(y), tracked.grad)
    for p in layer.parameters():
        close(g_of(p), p.grad)


def test_forward_hooks_take_part() -> None:
    layer = nn.Linear(4, 3).double()
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, out: out.tanh())
    follows_autograd(lambda x: layer(x).sum(), real(2, 4))


@pytest.mark.parametrize("where", ["value", "leaf", "before the block", "post accumulate", "module", "module, before"])
def test_hooks_on_gradients_warn(where: str) -> None:
    """Torch's backward calls them; a sweep does not, and says so."""
    x, layer = real(3).requires_grad_(), nn.Tanh()
    if where.startswith("module"):
        register = layer.register_full_backward_pre_hook if "before" in where else layer.register_full_backward_hook
        register(lambda *args: None)

    leaf: Any = x
    if where == "before the block":
        leaf.register_hook(lambda g: g * 2)

    def run() -> Tensor:
        y: Any = layer(x * 2)
        if where == "value":
            y.register_hook(lambda g: g * 2)
        elif where == "leaf":
            leaf.register_hook(lambda g: g * 2)
        elif where == "post accumulate":
            leaf.register_post_accumulate_grad_hook(lambda t: None)
        return y.sum()  # type: ignore[no-any-return]

    with te.record(), pytest.warns(te.TapeWarning, match="calls no hook"):
        loss = run()
    te.backward(loss)
    close(g_of(x), 2 * (1 - torch.tanh(2 * plain(x)) ** 2))


def test_a_hook_that_torch_calls_is_registered_as_ever() -> None:
    """The warning changes nothing for torch's own backward."""
    x = real(3).requires_grad_()
    with te.record(), warnings.catch_warnings():
        warnings.simplefilter("ignore", te.TapeWarning)
        y: Any = x * 2
        handle = y.register_hook(lambda g: g * 5)
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    close(x.grad, torch.full((3,), 10.0, dtype=F64))
    handle.remove()


# -- dtypes --------------------------------------------------------------------------------------------

MIXED: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "float16": (lambda x: (x.sin() * x).sum(), (torch.randn(5).half(),)),
    "bfloat16": (lambda x: (x.exp() * x).sum(), (torch.randn(5).bfloat16(),)),
    "bfloat16 layers": (
        lambda x, w: F.layer_norm(x @ w, (3,)).relu().sum(),
        (torch.randn(4, 3).bfloat16(), torch.randn(3, 3).bfloat16()),
    ),
    "half and single": (lambda x, y: (x * y).sum(), (torch.randn(5).half(), torch.randn(5))),
    "single and double": (lambda x, y: (x * y + y).sum(), (torch.randn(5), real(5))),
    "a number of no dimension": (lambda x, y: (x * y).sum(), (torch.randn(5), real())),
    "integers": (lambda x, i: (x * i + i.float().sum()).sum(), (torch.randn(5), torch.arange(5))),
    "booleans": (lambda x, b: (x * b).sum() + x[b].prod(), (torch.randn(5), torch.arange(5) > 2)),
    "bytes": (lambda x, i: (x * i).sum(), (torch.randn(5), torch.arange(5, dtype=torch.uint8))),
    "casts": (lambda x: x.half().float().double().sum() + x.to(torch.bfloat16).sum().double(), (torch.randn(5),)),
    "a cast to integers": (lambda x: x.sum() + x.long().sum(), (torch.randn(5),)),
    "complex and real": (lambda x, z: (x * z).abs().sum(), (real(5), real(5, dtype=torch.complex128))),
    "complex products": (lambda z: (z @ z.mH).real.sum() + (z**2).imag.sum(), (real(3, 3, dtype=torch.complex128),)),
    "complex64": (lambda z: torch.view_as_real(z.exp()).sum(), (torch.randn(4, dtype=torch.complex64),)),
    "parts": (lambda x, y: torch.complex(x, y).angle().sum() + torch.polar(x.abs(), y).real.sum(), (real(4), real(4))),
    "promotion by where": (lambda x, y: torch.where(x > 0, x, y).sum(), (torch.randn(5), real(5))),
    "promotion by cat": (lambda x, y: torch.cat([x, y]).prod(), (torch.randn(3), real(3))),
    "a write across dtypes": (lambda x: torch.zeros(5, dtype=F64).copy_(x).mul_(x).sum(), (torch.randn(5),)),
}


@pytest.mark.parametrize("name", MIXED)
def test_dtypes(name: str) -> None:
    function, inputs = MIXED[name]
    tol = 1e-2 if any(t.dtype in (torch.half, torch.bfloat16) for t in inputs) or name == "casts" else 1e-6
    follows_autograd(function, *[plain(t) for t in inputs], tol=tol)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """Layers in bfloat16, the loss in float32: each parameter's gradient in the parameter's own dtype."""
    ours = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    theirs = copy.deepcopy(ours)
    x, y = torch.randn(6, 8), torch.randint(4, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.cross_entropy(theirs(x), y)
    torch.autograd.backward(wanted)
    if inside:
        with te.record(), torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(ours(x), y)
    else:
        with torch.autocast("cpu", torch.bfloat16), te.record():
            loss = F.cross_entropy(ours(x), y)
    assert torch.equal(plain(loss), wanted.detach())
    te.backward(loss)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert q.grad is not None
        close(g_of(p), q.grad, 2e-2)


def test_sparse_gradients_are_right_or_refused() -> None:
    """`sparse=True` asks torch for a sparse gradient; on a tape there are dense ones, with the same elements."""
    table = nn.Embedding(6, 3, sparse=True).double()
    twin = copy.deepcopy(table)
    places = torch.tensor([1, 4, 1])
    with te.record():
        loss = table(places).square().sum()
    te.backward(loss)
    torch.autograd.backward(twin(places).square().sum())
    assert twin.weight.grad is not None
    found = grad_of(table.weight)
    close(found.to_dense() if found.is_sparse else found, twin.weight.grad.to_dense())


# -- contexts and tools ----------------------------------------------------------------------------------


def under_a_dtype(x: Tensor) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        return (x * torch.ones(3, 4) * torch.tensor(0.5)).sum()
    finally:
        torch.set_default_dtype(before)


def under_a_device(x: Tensor) -> Any:
    with torch.device("cpu"):
        return (x * torch.linspace(0, 1, 4)).sum()


def with_another_stream(x: Tensor) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        noise = torch.randn(3, 4, dtype=F64)
    return (x * noise * torch.rand(4)).sum()


def with_a_generator(x: Tensor) -> Any:
    return (x * torch.rand(3, 4, generator=torch.Generator().manual_seed(2))).sum()


def by_loader(x: Tensor) -> Any:
    total = x.sum() * 0
    for (rows,) in DataLoader(TensorDataset(x), batch_size=2, shuffle=True):
        total = total + rows.square().sum() * len(rows)
    return total


def by_vmap(x: Tensor) -> Any:
    return torch.func.vmap(lambda row: (row * row.sum()).sin())(x).sum()


def by_jacobian(x: Tensor) -> Any:
    return torch.func.jacrev(lambda t: t.sin() * t.sum())(x[0]).square().sum() + x.sum()


def by_forward_mode(x: Tensor) -> Any:
    return torch.func.jvp(lambda t: (t**3).sum(), (x,), (torch.ones_like(x),))[1]


def by_script(x: Tensor) -> Any:
    jit: Any = torch.jit
    traced = jit.trace(lambda t: t.sin() * t, torch.ones(3, 4, dtype=F64), check_trace=False)
    return traced(x).sum()


def by_enabled_grad(x: Tensor) -> Any:
    with torch.no_grad():
        scale = x.sum()
        with torch.enable_grad():
            y = x * scale
    return y.sum()


def by_clones(x: Tensor) -> Any:
    return (x * x.clone() * x.detach().clone()).sum()


def by_named_modules(x: Tensor) -> Any:
    net = nn.ModuleDict({"a": nn.Tanh(), "b": nn.Softmax(-1)})
    return sum(module(x)[0].prod() for module in net.values())


def by_map(x: Tensor) -> Any:
    return torch.stack(list(map(torch.sin, x.unbind(1)))).max(0).values.sum()


def by_meshgrid(x: Tensor) -> Any:
    a, b = torch.meshgrid(x[0], x[1], indexing="ij")
    return (a * b + torch.cartesian_prod(x[0], x[1]).sum()).sum()


ORDINARY = [
    under_a_dtype, under_a_device, with_another_stream, with_a_generator, by_loader, by_vmap, by_jacobian,
    by_forward_mode, by_script, by_enabled_grad, by_clones, by_named_modules, by_map, by_meshgrid,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own forward mode calls it
@pytest.mark.parametrize("function", ORDINARY, ids=lambda each: each.__name__)
def test_code_as_it_is(function: Function) -> None:
    follows_autograd(function, real(3, 4))


def test_copies_and_files_of_what_was_recorded() -> None:
    """A copy, a pickle and a file hold the elements; the parameters stay parameters."""
    layer = nn.Linear(3, 2).double()
    with te.record():
        y = layer(real(4, 3))
        loss = y.sum()
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    file = io.BytesIO()
    torch.save({"state": layer.state_dict(), "y": y.detach()}, file)
    file.seek(0)
    saved = torch.load(file)
    for twin in twins:
        assert type(twin.weight) is nn.Parameter
        assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(saved["state"]["weight"], plain(layer.weight))
    assert torch.equal(saved["y"], plain(y))
    te.backward(loss)
    assert g_of(layer.weight) is not None
    assert all(g_of(twin.weight) is None for twin in twins)


# -- exceptions and threads ------------------------------------------------------------------------------


class OwnError(Exception):
    """Of the user's."""


@pytest.mark.parametrize("where", ["block", "module", "function", "no_grad", "scope", "nested", "checkpoint"])
def test_an_exception_passes_through_and_leaves_all_in_order(where: str) -> None:
    raised = OwnError(where)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            raise raised

    class Module(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            raise raised

    def fail(t: Tensor) -> Any:
        if where == "module":
            return nn.Sequential(nn.Tanh(), Module())(t)
        if where == "function":
            return applied(Fails, t)
        if where == "no_grad":
            with torch.no_grad():
                raise raised
        if where == "scope":
            with te.scope("here"):
                raise raised
        if where == "nested":
            with te.record():
                raise raised
        if where == "checkpoint":
            return checkpoint(Module(), t, use_reentrant=False)
        raise raised

    x = real(3)
    depths = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    with te.record() as tape:
        y = x * 2
        with pytest.raises(OwnError) as caught:
            fail(y)
        assert caught.value is raised
        assert torch.is_grad_enabled()
        before = len(tape)
        z = (y * y).sum()
        assert [node.scope for node in tape.nodes[before:]] == [(), ()]
    assert (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()) == depths
    te.backward(z)
    close(g_of(x), 8 * x)
    del caught  # torch up to 2.11 leaves the hooks of a checkpoint that failed while the traceback is there
    raised.__traceback__ = None


def test_models_trained_in_several_threads_at_once() -> None:
    """Each with a tape, a module tree and a generator of its own, as they are one after the other."""

    def train(seed: int, found: dict[int, list[Tensor]]) -> None:
        generator = torch.Generator().manual_seed(seed)
        layer, norm = models[seed]
        for _ in range(5):
            x = torch.randn(6, 4, dtype=F64, generator=generator)
            with te.record():
                loss = norm(layer(x)).tanh().square().sum()
            te.backward(loss)
            with torch.no_grad():
                for p in (*layer.parameters(), *norm.parameters()):
                    p.sub_(0.1 * grad_of(p))
        found[seed] = [plain(t) for t in (*layer.state_dict().values(), *norm.state_dict().values())]

    fresh = {seed: (nn.Linear(4, 3).double(), nn.BatchNorm1d(3).double()) for seed in range(6)}
    models = copy.deepcopy(fresh)
    alone: dict[int, list[Tensor]] = {}
    for seed in range(6):
        train(seed, alone)
    models = copy.deepcopy(fresh)
    together: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.keys() == alone.keys()
    for seed in range(6):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], together[seed], strict=True))


def test_what_another_thread_makes_of_a_recorded_value_is_said() -> None:
    w = real(3)
    made: list[Tensor] = []

    def started(work: Callable[[Tensor], Tensor]) -> list[str]:
        with warnings.catch_warnings(record=True) as told, te.record():
            warnings.simplefilter("always")
            y = w * 2
            thread = threading.Thread(target=lambda: made.append(work(y)))
            thread.start()
            thread.join()
            assert thread.run.__func__ is threading.Thread.run  # type: ignore[attr-defined]
            loss = (made.pop() * y).sum()
        te.backward(loss)
        return [str(each.message) for each in told if each.category is te.TapeWarning]

    def with_a_block(y: Tensor) -> Tensor:
        with te.record():
            return y.exp()

    (text,) = started(lambda y: y.exp() + y.sin())
    assert "exp runs in another thread than the one that records" in text
    assert "test_ordinary_torch.py" in text
    close(g_of(w), 2 * ((2 * w).exp() + (2 * w).sin()))  # what the other thread made is a constant
    for silent in (lambda y: y.detach() * 2, lambda y: real(3), lambda y: (y > 0).double()):
        assert started(silent) == []
    assert started(with_a_block) == []
    close(g_of(w), 2 * (2 * w).exp() * (1 + 2 * w))  # its tape and this one join
    assert threading.Thread.start.__module__ == "threading"


def test_blocks_of_coroutines_that_take_turns() -> None:
    x = real(3)

    async def part(k: int) -> Tensor:
        with te.record():
            y = (x * k).sin()
            await asyncio.sleep(0)
            return y.sum()

    async def together() -> list[Tensor]:
        return [*await asyncio.gather(part(1), part(2), part(3))]

    for k, loss in enumerate(asyncio.run(together()), 1):
        te.backward(loss)
        close(g_of(x), k * (k * x).cos())
    assert te.current_tape() is te.global_tape()
    assert torch._C._len_torch_dispatch_stack() == 0


class Heard(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_a_function_mode_hears_the_user_s_code_and_no_sweep() -> None:
    w = real(3)
    with te.record():
        loss = (w * 2).exp().sum()
    with Heard() as heard:
        te.backward(loss, keep=True)
        te.grad(loss, w, keep=True)
    assert heard.names == []
    with torch.device("meta"):  # such a mode as well: what the rules make is where the values are
        (g,) = te.grad(loss, w, keep=True)
    assert g is not None
    close(g, 2 * (2 * w).exp())


def test_lazy_modules_in_a_block() -> None:
    layers = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).double()
    x = real(5, 3)
    with te.record():
        loss = layers(x).pow(3).sum()
    te.backward(loss)
    twin = copy.deepcopy(layers)
    wanted = torch.autograd.grad(twin(plain(x)).pow(3).sum(), list(twin.parameters()))
    for p, reference in zip(layers.parameters(), wanted, strict=True):
        close(g_of(p), reference)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("where", ["block", "after", "given", "view"])
def test_strided_nested_tensors_are_refused_by_line(where: str) -> None:
    a, b = real(2, 3), real(4, 3)
    given = torch.nested.nested_tensor([a, b])

    def run() -> Any:
        if where == "given":
            return given * 2
        if where == "view":
            sizes = given._nested_tensor_size(), given._nested_tensor_strides(), given._nested_tensor_storage_offsets()
            return torch._nested_view_from_buffer(torch.cat([a, b]).flatten(), *sizes)
        return torch.nested.as_nested_tensor([y, b])

    with te.record():
        y = a * 2
        if where != "after":
            with pytest.raises(te.TapeError, match=r"nested tensor of strided layout(.|\n)*at test_ordinary_torch.py"):
                run()
        loss = y.sum()
    if where == "after":
        with pytest.raises(te.TapeError, match="nested tensor of strided layout"):
            run()
    te.backward(loss)


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("name", ["apply_", "map_"])
def test_what_python_writes_element_by_element_is_refused(name: str, block: bool) -> None:
    w = real(3)

    def write(t: Tensor) -> Any:
        more = (lambda a: a * 3,) if name == "apply_" else (torch.ones(3, dtype=F64), lambda a, b: a * 3)
        return getattr(t, name)(*more)

    with te.record() as tape:
        y = w * 2
        if block:
            with pytest.raises(te.TapeError, match=rf"{name}\(\) writes to(.|\n)*at test_ordinary_torch.py"):
                write(y)
            close(write(y.clone().detach()), w * 6)
            with pytest.raises(te.TapeError, match=name):
                tape.program(inputs=w, outputs=y)
    if not block:
        with pytest.raises(te.TapeError, match=rf"{name}\(\) writes to"):
            write(y)
    te.backward(y.sum())
    close(g_of(w), torch.full_like(w, 2))


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "asarray": lambda y: torch.asarray(y, copy=True),
    "asarray, another dtype": lambda y: torch.asarray(y, dtype=torch.complex128).real,
    "as_tensor": lambda y: torch.as_tensor(y, dtype=torch.complex128).real,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_outside_a_block_are_followed(name: str) -> None:
    w = real(3)
    with te.record():
        y = w * 2
    te.backward((COPIES[name](y) * y).sum())
    close(g_of(w), 8 * w)


def test_what_leaves_outside_a_block_is_said() -> None:
    w = real(3)
    with te.record():
        y = w * 2
    dlpack: Any = torch.utils.dlpack
    for leave in (
        lambda: torch.tensor([y[0], y[1]]),
        lambda: torch.as_tensor([[y[0]], [y[1]]]),
        lambda: dlpack.to_dlpack(y),
        lambda: pickle.dumps(y),
    ):
        with pytest.warns(te.TapeWarning, match=r"at test_ordinary_torch.py"):
            leave()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        torch.as_tensor([])
        pickle.dumps(y.detach())
    moved: Any = torch.empty(0, dtype=F64)
    moved.set_(y)
    with pytest.raises(te.TapeError, match="given its memory by set_"):
        te.backward((moved * y).sum())


@pytest.mark.slow
def test_torch_s_compiler_may_first_be_imported_inside_a_block() -> None:
    # Checkpoints and optimizers import it, and it looks at torch's functions: at those that a block has wrapped too.
    code = """
import sys, torch, tape_engine as te
from torch.utils.checkpoint import checkpoint
m, X = torch.nn.Linear(3, 2), torch.randn(4, 3)
assert "torch._dynamo" not in sys.modules
with te.record():
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    C = checkpoint(m, X, use_reentrant=False).sum()
te.backward(C)
assert "torch._dynamo" in sys.modules
print(m.bias.g.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[4.0, 4.0]"


# -- what torch itself looks up --------------------------------------------------------------------------

DEFAULT_DEVICE = """
import torch, tape_engine as te
with te.record():
    pass
for block in (te.record, te.pause):
    with block(), torch.device("meta"):
        made = torch.tensor([1.0]), torch.as_tensor([1.0]), torch.asarray([1.0])
    assert all(each.device.type == "meta" for each in made), made
"""


def test_a_default_device_holds_after_a_recording() -> None:
    """In a process of its own: torch makes its list of functions that take a device once."""
    done = subprocess.run([sys.executable, "-c", DEFAULT_DEVICE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_functions_are_pickled_by_name_in_a_block_and_after_it() -> None:
    for block in (te.record, te.pause):
        with block():
            now = torch.tensor, torch.as_tensor, torch.norm, torch.linalg.norm, F.one_hot, Tensor.detach
            for function in now:
                assert pickle.loads(pickle.dumps(function)) is function
    assert [each.__name__ for each in now[:2]] == ["tensor", "as_tensor"]


def _scripted(x: Tensor) -> Tensor:
    return x + torch.tensor(1.0) + torch.as_tensor(2.0)


def _scripted_norms(x: Tensor) -> Tensor:
    total: Tensor = torch.norm(x) + torch.norm(x, p=1) + F.one_hot(torch.arange(3), 3).sum() + torch.linalg.norm(x)
    return total


def test_torch_jit_scripts_code_in_a_block_and_after_it() -> None:
    x = torch.ones(4)
    for block in (te.record, te.pause):
        with block(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            assert torch.equal(torch.jit.script(_scripted)(x), torch.full((4,), 4.0))
            norms = torch.jit.script(_scripted_norms)(x)
        assert torch.equal(norms, torch.tensor(11.0))
        if block is te.record:
            te.backward(norms)
            close(g_of(x), torch.full((4,), 2.0))


class _Heard(TorchFunctionMode):
    """Notes the names of what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _asking_for_layouts(x: Tensor) -> None:
    h = x * 2
    h.contiguous(), h.to(torch.float32), h.stride(), h.is_contiguous(), h.as_strided((2,), (1,))
    h.detach().numpy(), h.tolist(), h.clone().detach_(), h.norm()


def test_a_function_mode_hears_in_a_block_what_it_hears_without() -> None:
    x = real(3)
    with _Heard() as expected:
        _asking_for_layouts(x)
    with te.record(), _Heard() as inside:
        _asking_for_layouts(x)
    assert inside.names == expected.names


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x.mul_(2))
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def _writing(x: Tensor) -> Tensor:
    y = x * 2
    z = y * y.exp()
    y.add_(1)
    y[0] = 3
    y[1:].exp_()
    with torch.no_grad():
        y.detach().mul_(2)
    y.view(torch.int64).neg_()
    return (z * y).sum()


def _leaving(x: Tensor) -> Tensor:
    y = x * 2
    y.numpy(), y.tolist(), y.detach().numpy(), copy.deepcopy(y), copy.copy(y), y.data, y.contiguous(), y.stride()
    z = y.exp()
    y.data = torch.ones(4, dtype=F64)
    return (nn.Parameter(y) * z * torch.tensor([y[0], y[1], 1.0, 2.0], dtype=F64)).sum()


def _complex(x: Tensor) -> Tensor:
    z = torch.complex(x, x)
    torch.view_as_real(z).mul_(2)
    conjugated = z.conj()
    z.mul_(1j)
    return (z * conjugated).real.sum()


def _functions(x: Tensor) -> Tensor:
    y = x * 2
    z = y * y
    y = _Doubled.apply(y)  # type: ignore[no-untyped-call]
    if y.sum().item() > -1e9:
        y = F.dropout(torch.tanh(y), 0.5)
    with te.pause():
        z = z + y.mul_(2)
    return (y * z).sum()


@pytest.mark.parametrize("function", [_writing, _leaving, _complex, _functions])
@pytest.mark.parametrize("around", [False, True])
def test_a_dispatch_mode_hears_what_the_code_runs_and_nothing_else(function: Function, around: bool) -> None:
    wanted, found = Overloads(), Overloads()
    x = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    fresh = plain(x)
    torch.manual_seed(1)
    with wanted:
        reference = function(fresh)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if around:
            with found, te.record():
                C = function(x)
        else:
            with te.record(), found:
                C = function(x)
    assert found.heard == wanted.heard
    assert torch.equal(plain(C), reference)
    te.backward(C)


def test_modes_around_a_block_are_left_as_they_were() -> None:
    x = torch.ones(3)
    with Overloads() as outer, Overloads() as inner:
        with te.record():
            h = x * 2
            with pytest.raises(RuntimeError):
                h @ torch.ones(2)
            h = h.exp() * h
            C = h.sum()
        depth = torch._C._len_torch_dispatch_stack()
        C = C * 2  # on the global tape
    assert depth == 2
    assert inner.heard == outer.heard
    assert inner.heard[-1] is torch.ops.aten.mul.Tensor
    te.backward(C)
    close(g_of(x), 4 * (torch.ones(3) * 2).exp() * 3)


def test_a_thread_with_a_run_of_its_own_keeps_it() -> None:
    ran = []
    thread = threading.Thread()
    run = thread.run = lambda: ran.append(1)  # type: ignore[method-assign]
    with te.record():
        thread.start()
        thread.join()
    assert ran == [1]
    assert thread.run is run
