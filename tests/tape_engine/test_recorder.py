"""The recorder: it hears everything, and changes nothing."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tape_engine as te
from tape_engine.recorder import Recorded
from tests.helpers import Overloads, Tensor, agree, close, g_of, grad_of, plain, reference, the

F = torch.nn.functional


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(shape, dtype=dtype)


# -- what is recorded ------------------------------------------------------------------------------


def test_everything_in_a_block_is_recorded() -> None:
    X, w, b = rand(5, 3), rand(3, 2), rand(2)
    net = nn.Linear(2, 2).double()
    with te.record() as tape:
        assert te.current_tape() is tape
        Z = X @ w + b  # operators
        A = Z.tanh()  # methods
        B = torch.cat([A, A])  # functions
        C = net(B).pow(2).mean()  # modules
    assert te.current_tape() is te.global_tape()
    assert [node.op.name for node in tape.nodes] == ["mm", "add", "tanh", "cat", "t", "addmm", "pow", "mean"]
    assert len(te.global_tape()) == 0
    te.backward(C)
    agree([X, w, b], reference(lambda X, w, b: net(torch.tanh(X @ w + b).repeat(2, 1)).pow(2).mean(), X, w, b))
    assert grad_of(net.weight).shape == (2, 2)


def test_nothing_is_recorded_outside_a_block_on_unrecorded_tensors() -> None:
    x = rand(3)
    y = torch.sin(x) * 2
    assert len(te.global_tape()) == 0
    assert type(y) is Tensor
    with te.record() as tape:
        pass
    torch.cos(y)
    assert len(tape) == 0
    assert not hasattr(y, "g")


def test_code_in_other_modules_is_recorded_without_a_change() -> None:
    x = rand(4, 4)
    with te.record():
        C = torch.nn.functional.cross_entropy(x, torch.arange(4)) + torch.special.expit(x).sum()
    te.backward(C)
    agree([x], reference(lambda x: F.cross_entropy(x, torch.arange(4)) + torch.special.expit(x).sum(), x))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Sigmoid(), nn.Linear(4, 2)), (5, 6)),
    "activations": (
        lambda: nn.Sequential(
            nn.Linear(6, 6), nn.GELU(), nn.ELU(), nn.SiLU(), nn.Softplus(), nn.LeakyReLU(), nn.Tanh(), nn.Hardtanh()
        ),
        (5, 6),
    ),
    "norms": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.BatchNorm1d(6)), (5, 6)),
    "softmax": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1), nn.LogSoftmax(-1)), (5, 6)),
    "reshapes": (lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2, bias=False)), (5, 6)),
    "bilinear": (lambda: nn.ModuleDict({"a": nn.Identity()})["a"], (5, 6)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_modules(name: str, dtype: torch.dtype) -> None:
    make, shape = NETS[name]
    net = make().to(dtype)
    twin = copy.deepcopy(net)
    x = rand(*shape, dtype=dtype)
    x_ = plain(x).requires_grad_()
    expected = twin(x_).pow(2).sum()
    expected.backward()
    with te.record():
        C = net(x).pow(2).sum()
    assert torch.equal(plain(C), expected.detach())
    te.backward(C)
    tol = 1e-9 if dtype == torch.float64 else 1e-4
    close(x.g, x_.grad, tol)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        close(grad_of(p), q.grad, tol)
        assert p.grad is None
    for mine, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_module_made_inside_the_block() -> None:
    x = rand(5, 3)
    with te.record():
        torch.manual_seed(5)
        net = nn.Linear(3, 2).double()
        w = nn.Parameter(torch.full((2,), 2.0).double())
        v = torch.ones(2).double().requires_grad_()
        C = (net(x) * w * v).pow(2).sum()
    torch.manual_seed(5)
    twin = nn.Linear(3, 2).double()
    assert torch.equal(plain(net.weight), plain(twin.weight))
    te.backward(C)
    wanted = reference(lambda W, b, w, v, x: ((x @ W.t() + b) * w * v).pow(2).sum(), twin.weight, twin.bias, w, v, x)
    agree([net.weight, net.bias, w, v, x], wanted)


def test_shared_weights_and_tied_modules() -> None:
    layer = nn.Linear(3, 3).double()
    x = rand(4, 3)
    with te.record():
        C = layer(torch.tanh(layer(x))).pow(2).sum() + layer.weight.pow(2).sum()
    te.backward(C)
    C_ = layer(torch.tanh(layer(x))).pow(2).sum() + layer.weight.pow(2).sum()
    C_.backward()
    close(grad_of(layer.weight), layer.weight.grad)
    close(grad_of(layer.bias), layer.bias.grad)


def test_torch_s_own_backward_inside_a_block() -> None:
    x, w = rand(3), nn.Parameter(rand(3))
    with te.record():
        y = torch.sin(x * w).sum()
        y.backward()  # type: ignore[no-untyped-call]
        C = y * 2
    close(w.grad, plain(x) * torch.cos(plain(x) * plain(w)))
    te.backward(C)
    close(grad_of(w), 2 * plain(w.grad))


def test_torch_s_own_second_derivative_inside_a_block_is_right_or_refused() -> None:
    x = rand(3)
    x_ = plain(x).requires_grad_()
    (g_,) = torch.autograd.grad(torch.exp(x_).sum() + (x_**3).sum(), x_, create_graph=True)
    (wanted,) = torch.autograd.grad((g_ * g_).sum(), x_)
    x.requires_grad_()
    with te.record():
        (g,) = torch.autograd.grad(torch.exp(x).sum() + (x**3).sum(), x, create_graph=True)
        C = (g * g).sum()
    try:
        te.backward(C)
    except te.TapeError:
        return
    close(x.g, wanted)


# -- it changes nothing ----------------------------------------------------------------------------


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(x)
        return x * factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * 100, None


def unseen_side_effects(x: Tensor) -> Any:
    seen = []
    for row in x:
        seen.append(float(row.sum()))
    return seen, [
        len(x),
        x.shape,
        x.dtype,
        x.tolist(),
        int(x.argmax()),
        bool((x > 0).any()),
        f"{x.mean():.3f}",
        repr(x),
        str(x),
    ]


def in_place(x: Tensor) -> Any:
    y = x.clone()
    y[0] += 1
    y.t()[1].mul_(2)
    y.relu_()
    z = torch.empty(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.add(x, y, out=z)
    return y, z, y._version > 0


def views(x: Tensor) -> Any:
    y = x[1:]
    return (
        y,
        y._base is x,
        x.t().stride(),
        x.expand(2, 3, 4).stride(),
        x.view(-1).data_ptr() == x.data_ptr(),
        x.reshape(4, 3),
        x.unfold(0, 2, 1),
        x.split(2),
    )


def random_numbers(x: Tensor) -> Any:
    a = torch.rand(3)
    b = F.dropout(x, 0.5, training=True)
    c = torch.randn_like(x) + torch.randint(0, 5, (3, 4))
    d = torch.bernoulli(x.sigmoid())
    e = torch.empty(4).uniform_().normal_()
    generator = torch.Generator().manual_seed(3)
    f = torch.rand(2, generator=generator), torch.randperm(5), torch.multinomial(x.softmax(-1), 2)
    return a, b, c, d, e, f, generator.get_state(), numpy.random.rand(2).tolist(), torch.rand(1).item()


def tuples(x: Tensor) -> Any:
    best = x.max(1)
    return (
        best,
        best.values,
        best[1],
        x.topk(2),
        x.sort(),
        torch.unbind(x),
        x.chunk(3),
        torch.linalg.svd(x),
        torch.std_mean(x),
        x.aminmax(),
    )


def integers(x: Tensor) -> Any:
    i = torch.arange(4)
    m = x > 0
    return (
        i // 2,
        i << 1,
        ~m,
        m & (x < 1),
        m.sum(),
        i.bincount(),
        x[m],
        x[:, i % 2],
        m.nonzero(),
        i.float() / 3,
        x.argsort(),
        torch.where(m),
        i.unique(return_counts=True),  # type: ignore[no-untyped-call]
    )


def complexes(x: Tensor) -> Any:
    z = torch.complex(x, x.flip(0))
    return (
        z,
        z.conj(),
        z.real,
        torch.fft.fft(x),
        torch.view_as_real(z),
        z.abs(),
        z.conj().is_conj(),
        torch.linalg.eigvals(x[:, :3]),
    )


def zero_and_scalar(x: Tensor) -> Any:
    e = x[:0]
    return (
        e.sum(),
        e.mean(),
        e @ torch.ones(4, 2),
        x.sum(),
        x.sum().item(),
        torch.tensor(3.0) * x[0, 0],
        torch.zeros(0, 3).max(1),
        torch.cat([e, x]),
        x.new_zeros(()),
    )


def factories(x: Tensor) -> Any:
    return (
        torch.zeros(2),
        torch.ones_like(x),
        torch.full((2,), 3),
        torch.arange(3.0),
        torch.eye(2),
        torch.tensor([[1.0, 2.0]]),
        torch.linspace(0, 1, 5),
        x.new_tensor([1, 2]),
        torch.empty(0),
        torch.as_tensor([1, 2]),
    )


def control_flow(x: Tensor) -> Any:
    if x.sum() > 0:
        x = x * 2
    while x.norm() < 100:
        x = x * 3
    return (
        x,
        list(torch.arange(3)),
        max(x[0]),
        sorted(x[0].tolist()),
        x in [x],
        torch.equal(x, x),
        torch.allclose(x, x + 1e-9),
    )


def autograd_inside(x: Tensor) -> Any:
    p = x.clone().requires_grad_()
    y = (torch.sin(p) * p).sum()
    (g,) = torch.autograd.grad(y, p, create_graph=True)
    return p, y, g, y.requires_grad, type(y.grad_fn).__name__, p.is_leaf, torch.is_grad_enabled()


def functions_of_its_own(x: Tensor) -> Any:
    p = x.clone().requires_grad_()
    y = Custom.apply(p, 3.0)  # type: ignore[no-untyped-call]
    (g,) = torch.autograd.grad(y.sum(), p)
    return y, g, type(y.grad_fn).__name__, Custom.apply(x, 2.0)  # type: ignore[no-untyped-call]


def grad_modes(x: Tensor) -> Any:
    p = nn.Parameter(x.clone())
    with torch.no_grad():
        a = p * 2
        p.add_(1)
    with torch.inference_mode():
        b = p * 2
    return a, a.requires_grad, b, b.is_inference(), (p * 2).requires_grad, p.detach(), p.data


def layers(x: Tensor) -> Any:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2))
    out = net(x)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    net.eval()
    lstm = nn.LSTM(4, 3, batch_first=True)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    conv = nn.Conv1d(3, 2, 3)
    embedded = nn.Embedding(5, 4)(torch.tensor([[0, 3]]))
    return (
        out,
        state,
        net(x),
        lstm(x[None]),
        attention(x[None], x[None], x[None]),
        encoder(x[None]),
        encoder.eval()(x[None]),
        conv(x[None]),
        embedded,
        F.scaled_dot_product_attention(x[None], x[None], x[None]),
    )


def deep_copies(x: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return (
        copy.deepcopy(x),
        copy.copy(x),
        pickle.loads(pickle.dumps(x)),
        torch.load(buffer),
        x.numpy(force=True).tolist(),
        torch.from_numpy(numpy.asarray(x.tolist())),
    )


def autocast(x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.t(), F.linear(x, x), x.sum(), torch.softmax(x @ x.t(), -1)


def vectorised(x: Tensor) -> Any:
    return (
        torch.func.vmap(lambda r: r * r.sum())(x),
        torch.func.grad(lambda t: (t**3).sum())(x),
        torch.func.jacrev(torch.sin)(x[0]),
    )


def einsums(x: Tensor) -> Any:
    return (
        torch.einsum("ij,kj->ik", x, x),
        torch.tensordot(x, x, ([1], [1])),
        x.matmul(x.t()).det(),
        torch.linalg.solve(x @ x.t() + torch.eye(3), x),
        torch.cdist(x, x),
        torch.kron(x, x),
    )


def sparse(x: Tensor) -> Any:
    s = torch.where(x > 0, x, 0.0).to_sparse()
    return s.to_dense(), torch.sparse.mm(s, x.t()), s.coalesce().indices(), s._nnz()


def default_dtypes(x: Tensor) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return torch.zeros(2), torch.tensor(1.0), torch.arange(3) / 2
    finally:
        torch.set_default_dtype(torch.float32)


SNIPPETS: list[Callable[[Tensor], Any]] = [
    unseen_side_effects,
    in_place,
    views,
    random_numbers,
    tuples,
    integers,
    complexes,
    zero_and_scalar,
    factories,
    control_flow,
    autograd_inside,
    functions_of_its_own,
    grad_modes,
    layers,
    deep_copies,
    autocast,
    vectorised,
    einsums,
    sparse,
    default_dtypes,
]
snippets = pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda f: f.__name__)


def same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert (got.shape, got.dtype, got.layout, got.device) == (
            wanted.shape,
            wanted.dtype,
            wanted.layout,
            wanted.device,
        )
        if wanted.layout == torch.strided:
            assert got.stride() == wanted.stride()
        assert got.requires_grad == wanted.requires_grad
        assert got.is_leaf == wanted.is_leaf
        assert type(got.grad_fn) is type(wanted.grad_fn)
        assert got.is_inference() == wanted.is_inference()
        assert isinstance(got, nn.Parameter) == isinstance(wanted, nn.Parameter)
        got, wanted = plain(got), plain(wanted)
        if wanted.layout != torch.strided:
            got, wanted = got.to_dense(), wanted.to_dense()
        assert torch.equal(torch.nan_to_num(got.resolve_conj(), 77.0), torch.nan_to_num(wanted.resolve_conj(), 77.0))
        assert torch.equal(got.isnan(), wanted.isnan())
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            same(got[key], wanted[key])
    elif isinstance(wanted, (tuple, list)):
        assert type(got) is type(wanted)
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            same(a, b)
    elif isinstance(wanted, float) and math.isnan(wanted):
        assert math.isnan(got)
    else:
        assert got == wanted


def start() -> Tensor:
    torch.manual_seed(11)
    numpy.random.seed(3)
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(8))


def state_of_torch() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    ]


@pytest.fixture
def expected(snippet: Callable[[Tensor], Any]) -> tuple[Any, list[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return snippet(start()), state_of_torch()


@pytest.mark.filterwarnings("ignore")
@snippets
def test_a_block_changes_no_result(snippet: Callable[[Tensor], Any], expected: tuple[Any, list[Any]]) -> None:
    x = start()
    with te.record():
        got = snippet(x)
    assert state_of_torch() == expected[1]
    same(got, expected[0])


@pytest.mark.filterwarnings("ignore")
@snippets
def test_a_nested_and_paused_block_changes_no_result(
    snippet: Callable[[Tensor], Any], expected: tuple[Any, list[Any]]
) -> None:
    for context in (te.pause, te.record, lambda: te.scope("here")):
        x = start()
        with te.record(), context():
            got = snippet(x)
        assert state_of_torch() == expected[1]
        same(got, expected[0])


@pytest.mark.filterwarnings("ignore")
@snippets
def test_a_recorded_tensor_outside_a_block_gives_the_same_results(
    snippet: Callable[[Tensor], Any], expected: tuple[Any, list[Any]]
) -> None:
    x = start()
    with te.record():
        hold = x * 1.0  # from here on x is known to a tape that is not swept
    got = snippet(x)
    assert state_of_torch() == expected[1]
    same(got, expected[0])
    del hold
    x = start()
    hold = te.relu(x)
    got = snippet(x)
    assert state_of_torch() == expected[1]
    same(got, expected[0])
    del hold


@pytest.mark.filterwarnings("ignore")
@snippets
def test_in_the_body_of_a_named_operation_nothing_changes(
    snippet: Callable[[Tensor], Any], expected: tuple[Any, list[Any]]
) -> None:
    found = []

    @te.op
    def whole(x: Tensor) -> Tensor:
        found.append(snippet(x))
        return x * 2

    for _ in range(2):
        x = start()
        whole(x)
        assert state_of_torch() == expected[1]
    same(found[0], expected[0])
    with te.record() as tape:
        whole(start())
    same(found[2], expected[0])
    assert [node.op.name for node in tape.nodes if node.op.is_named] == ["whole"]


FAILURES: list[Callable[[Tensor], Any]] = [
    lambda x: x @ x,
    lambda x: x + torch.ones(7),
    lambda x: x.view(5, 5),
    lambda x: x[10],
    lambda x: x.nonsense,
    lambda x: torch.cat([x, x[0]]),
    lambda x: x.add_(torch.ones(9)),
    lambda x: torch.add(x, x, nonsense=1),  # type: ignore[call-overload]
    lambda x: torch.zeros(-1),
    lambda x: x.item(),
    lambda x: F.linear(x, x.t()),
    lambda x: nn.Linear(7, 2)(x),
    lambda x: torch.linalg.cholesky(x[:, :3] * 0 - torch.eye(3)),
    lambda x: x.to(torch.int64).mean(),
    lambda x: torch.tensor(["a"]),
    lambda x: x.requires_grad_().add_(1),
    lambda x: torch.empty(2, 2).copy_(x),
    lambda x: x["a"],
    lambda x: bool(x),
    lambda x: x.sum(5),
    lambda x: x.unsqueeze(0).squeeze_(9),
    lambda x: torch.stack([]),
    lambda x: x.scatter_(0, torch.tensor([[9]]), 1.0),
]


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that came to an end."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        return result


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("where", ["block", "paused", "global"])
def test_exceptions_are_torch_s_own(failure: Callable[[Tensor], Any], where: str) -> None:
    with Counting() as ended, pytest.raises(Exception) as wanted:  # type: ignore[no-untyped-call]  # noqa: PT011
        failure(start())
    x = start()
    if where == "global":
        hold = te.relu(x)
        tape, depth = te.global_tape(), len(te.global_tape())
        with pytest.raises(wanted.type) as got:
            failure(x)
        assert len(tape) - depth <= ended.count
        del hold
    else:
        with te.record() as tape:
            y = x * 1
            depth = len(tape)
            with te.pause() if where == "paused" else nullcontext(), pytest.raises(wanted.type) as got:
                failure(x)
            new = [node for node in tape.nodes[depth:] if node.op.name != "detach"]  # torch makes parameters unheard
            assert len(new) <= (0 if where == "paused" else ended.count)
            C = (y.detach() * y).sum()
        te.backward(C)
        close(x.g, plain(x))
    assert type(got.value) is wanted.type
    assert str(got.value) == str(wanted.value)


def test_an_exception_in_a_block_leaves_everything_in_order() -> None:
    x = rand(3)

    class Stopped(Exception):
        pass

    net = nn.Sequential(nn.Linear(3, 3).double())

    def fail(*args: Any) -> None:
        raise Stopped

    handle = net[0].register_forward_pre_hook(fail)

    held: list[Any] = []

    def run() -> None:
        with te.record() as tape, te.scope("outer"), torch.no_grad():
            held.extend([tape, x * 2])
            with te.pause(), te.record():
                net(x)

    with pytest.raises(Stopped):
        run()
    handle.remove()
    assert te.current_tape() is te.global_tape()
    assert len(held[0]) == 1
    with te.record() as tape:
        C = (net(x) * x).sum()
    assert [node.scope for node in tape.nodes][-1] == ()
    assert tape.nodes[0].scope[0] == "Sequential"
    te.backward(C)
    assert torch.is_grad_enabled()


def test_generators_and_returns_leave_a_block_in_order() -> None:
    def early(x: Tensor) -> Tensor:
        with te.record():
            return x * 2

    x = rand(3)
    y = early(x)
    assert te.current_tape() is te.global_tape()
    te.backward(y.sum())
    assert x.g.tolist() == [2.0] * 3

    def rows(x: Tensor) -> Any:
        with te.record() as tape:
            for row in x:
                yield row * 2, tape

    running = rows(rand(3, 2))
    next(running)
    running.close()
    assert te.current_tape() is te.global_tape()
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_user_s_own_modes_hear_the_same_operations() -> None:
    x = rand(4)
    with Overloads() as alone:
        (torch.sin(x) * x).sum()
    with Overloads() as outside, te.record() as tape:
        C = (torch.sin(x) * x).sum()
    assert outside.heard == alone.heard
    assert len(tape) == 3
    with te.record() as tape, Overloads() as inside:
        C = (torch.sin(x) * x).sum()
    assert inside.heard == alone.heard
    assert len(tape) == 3
    te.backward(C)
    agree([x], reference(lambda x: (torch.sin(x) * x).sum(), x))


def test_tensor_subclasses_of_the_user_work_beside_recorded_tensors() -> None:
    class Mine(torch.Tensor):
        pass

    mine, x = rand(3).as_subclass(Mine), rand(3)
    expected = mine * x
    U = te.relu(x)
    assert type(mine * x) is type(expected) is Mine
    assert torch.equal(plain(mine * U), plain(mine) * plain(U))
    V = te.relu(mine)
    assert torch.equal(plain(V), plain(mine).relu())


def test_a_sweep_begins_at_a_tensor_of_the_user_s_class() -> None:
    class Mine(torch.Tensor):
        pass

    mine, x = rand(3, 3).as_subclass(Mine), rand(3, 3)
    with te.record():
        y = mine @ x
        z = y.exp()
        y.add_(1)
        loss = (y * z).sum()
    assert type(loss) is Mine
    te.backward(loss)
    agree([x], reference(lambda x: ((plain(mine) @ x + 1) * (plain(mine) @ x).exp()).sum(), x))


def test_parameters_can_be_made_of_recorded_tensors() -> None:
    x, w = rand(2, 3), rand(3, 2)
    Z = te.lin(x, w)
    for t in (w, Z):
        p = nn.Parameter(t)
        assert isinstance(p, nn.Parameter)
        assert p.requires_grad
        assert torch.equal(plain(p), plain(t))
    module = nn.Linear(3, 2)
    module.weight = nn.Parameter(w.t())
    module.register_buffer("seen", Z)
    assert set(module.state_dict()) == {"weight", "bias", "seen"}
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    torch.optim.SGD([w], lr=0.1)


def test_numpy_reads_recorded_tensors() -> None:
    x = rand(3)
    U = te.relu(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert numpy.allclose(U.numpy(), plain(U).numpy())
        assert numpy.allclose(numpy.asarray(U), plain(U).numpy())
        assert numpy.allclose(numpy.array([float(v) for v in U]), plain(U).numpy())
    assert [float(v) for v in U] == plain(U).tolist()
    assert U.tolist() == plain(U).tolist()
    assert hash(U) == hash(U)
    assert U in {U: 1}
    assert isinstance(U, torch.Tensor)


# -- what leaves the tensors is never silent -------------------------------------------------------


LEAVING: list[Callable[[Tensor], Any]] = [
    lambda t: t.numpy(),
    numpy.asarray,
    lambda t: t.data_ptr(),
    lambda t: t.__dlpack__(),
    numpy.from_dlpack,
]


@pytest.mark.parametrize("leave", LEAVING, ids=["numpy", "asarray", "data_ptr", "__dlpack__", "numpy dlpack"])
@pytest.mark.parametrize("where", ["block", "after", "global"])
def test_values_that_leave_warn_or_raise(leave: Callable[[Tensor], Any], where: str) -> None:
    x = rand(3)
    if where == "global":
        y = te.relu(x)
    else:
        with te.record():
            y = x * 2
            if where == "block":
                with pytest.warns(UserWarning, match="test_recorder.py"):
                    leave(y)
                return
    with pytest.warns(UserWarning, match="test_recorder.py"):
        leave(y)


@pytest.mark.parametrize("leave", LEAVING[:3])
def test_constants_leave_without_a_warning(leave: Callable[[Tensor], Any]) -> None:
    x = rand(3)
    with te.record():
        y = (x * 2).detach()
        i = torch.arange(3) + 1
        leave(y)
        leave(i)
    leave(plain(x))
    leave(te.stop_gradient(te.relu(x)))


def test_printing_and_formatting_need_no_warning() -> None:
    x = rand(3)
    with te.record() as tape:
        y = x * 2
        texts = [str(y), repr(y), f"{y.sum():.2f}", f"{y}", str(y.shape)]
        depth = len(tape)
        C = y.sum()
        te.backward(C)
    assert all(texts)
    assert depth - len([n for n in tape.nodes if n.op.name == "detach"]) <= 3, "printing is no computation"
    U = te.relu(x)
    assert "tensor(" in repr(U)
    assert "Recorded" not in repr(U)
    assert len(te.global_tape()) == 1


# -- outside a block -------------------------------------------------------------------------------


def test_plain_operations_on_a_recorded_value_are_recorded() -> None:
    def f(x: Tensor) -> Tensor:
        y = torch.relu(x)
        parts = [
            y * 2,
            2 * y,
            1 - y,
            y / 3,
            3 / (y + 1),
            -y,
            y**2,
            2**y,
            y - 1,
            y % 3,
            abs(y),
            y @ y.t(),
            y[0] + y[:, :1],
            torch.stack([y, y])[0],
        ]
        return (
            sum(p.sum() for p in parts)
            + y.mean()
            + torch.cat([y, y]).pow(2).sum()
            + y.max()
            + (y > 1).double().mul(y).sum()
        )

    x = rand(3, 3)
    y = te.relu(x)
    parts = [
        y * 2,
        2 * y,
        1 - y,
        y / 3,
        3 / (y + 1),
        -y,
        y**2,
        2**y,
        y - 1,
        y % 3,
        abs(y),
        y @ y.t(),
        y[0] + y[:, :1],
        torch.stack([y, y])[0],
    ]
    C = (
        sum(p.sum() for p in parts)
        + y.mean()
        + torch.cat([y, y]).pow(2).sum()
        + y.max()
        + (y > 1).double().mul(y).sum()
    )
    te.backward(C)
    agree([x], reference(f, x))


def test_plain_operations_on_a_recorded_leaf_are_recorded() -> None:
    X, w, b, Y = rand(5, 3), rand(3, 2), rand(2), rand(5, 2)
    C = te.mse(te.lin(X, w, b), Y) + 0.1 * (w**2).sum() + b.abs().sum() + (X[0] * 2).sum()
    te.backward(C)
    agree(
        [X, w, b],
        reference(
            lambda X, w, b: F.mse_loss(X @ w + b, Y) + 0.1 * (w**2).sum() + b.abs().sum() + 2 * X[0].sum(), X, w, b
        ),
    )


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 2)), (5, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)), (2, 1, 6, 6)),
    "lstm": (lambda: First(nn.LSTM(4, 3, batch_first=True)), (2, 5, 4)),
    "gru": (lambda: First(nn.GRU(4, 3)), (5, 2, 4)),
    "attention": (lambda: Attends(), (2, 5, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 5, 4)),
    "encoder in eval mode": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), (2, 5, 4)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Softmax(-1)), (5, 4)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), (5, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (5, 4)),
    "bilinear": (lambda: Twice(nn.Bilinear(4, 4, 2)), (5, 4)),
    "prelu": (lambda: nn.Sequential(nn.PReLU(), nn.CELU(), nn.Mish(), nn.GLU()), (5, 4)),
}


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Twice(First):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layers_of_torch_on_recorded_values(name: str, block: bool, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(4)
    net = make().to(dtype)
    twin = copy.deepcopy(net)
    x = rand(*shape, dtype=dtype)
    x_ = plain(x).requires_grad_()
    torch.manual_seed(9)
    expected = twin(torch.relu(x_) + 0.1 * x_).pow(2).sum()
    expected.backward()
    torch.manual_seed(9)
    if block:
        with te.record():
            C = net(te.relu(x) + 0.1 * x).pow(2).sum()
    else:
        C = net(te.relu(x) + 0.1 * x).pow(2).sum()
        if "norm" in name and name != "norms":  # their weights are computed from parameters that no tape knows yet
            with pytest.raises(te.NotRecordedError, match="outside the recording"):
                te.backward(C)
            return
    close(C, expected.detach(), 1e-12 if dtype == torch.float64 else 1e-5)
    te.backward(C)
    tol = 1e-8 if dtype == torch.float64 else 2e-4
    close(x.g, x_.grad, tol)
    for (key, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert type(p) is nn.Parameter, key
        found = g_of(p)
        assert found is not None, key
        close(found, q.grad, tol)
    for mine, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        close(mine, theirs, 1e-12 if dtype == torch.float64 else 1e-5)


def test_weight_decay_on_parameters_is_recorded() -> None:
    w, b = nn.Parameter(rand(3, 2)), nn.Parameter(rand(2))
    X, Y = rand(5, 3), rand(5, 2)
    wanted = reference(lambda w, b: F.mse_loss(X @ w + b, Y) + 0.1 * w.pow(2).sum() + b.pow(2).sum(), w, b)
    C = te.mse(te.lin(X, w, b), Y) + 0.1 * w.pow(2).sum() + b.pow(2).sum()
    te.backward(C)
    agree([w, b], wanted)
    assert type(w) is nn.Parameter


def test_a_parameter_used_before_any_tape_knows_it_is_never_silently_lost() -> None:
    net = nn.Linear(3, 2).double()
    C = te.lin(rand(5, 3), net.weight.t(), net.bias).sum()  # net.weight.t() is plain torch on an unknown tensor
    with pytest.raises(te.NotRecordedError, match="outside the recording"):
        te.backward(C)
    assert g_of(net.weight) is None


def test_a_penalty_computed_before_the_parameter_is_known_is_never_silently_lost() -> None:
    w = nn.Parameter(rand(3, 2))
    penalty = (w**2).sum()
    C = te.lin(rand(4, 3), w).sum() + penalty
    with pytest.raises(te.TapeError, match="outside the recording") as caught:
        te.backward(C)
    assert "penalty" in str(caught.value)
    assert g_of(w) is None


def test_plain_operations_after_a_block_are_recorded() -> None:
    x, w = rand(3), rand(3)
    with te.record():
        y = torch.sin(x) * w
    C = (y * y).sum() + (w * 3).sum() + torch.exp(x).sum()
    te.backward(C)
    agree([x, w], reference(lambda x, w: ((torch.sin(x) * w) ** 2).sum() + 3 * w.sum() + torch.exp(x).sum(), x, w))


def test_leaves_of_two_tapes_stay_known_until_both_are_swept() -> None:
    x = rand(3)
    with te.record():
        A = (x * 2).sum()
    y = te.relu(x)
    te.backward(A)
    C = y.sum() + (x**2).sum()
    te.backward(C)
    agree([x], reference(lambda x: torch.relu(x).sum() + (x**2).sum(), x))


def test_a_leaf_of_an_unswept_value_stays_known() -> None:
    x = rand(3)
    a, b = te.relu(x), te.relu(x)
    te.backward(a.sum())
    C = b.sum() + (x**2).sum()
    try:
        te.backward(C)
    except te.SweptError:
        return
    agree([x], reference(lambda x: torch.relu(x).sum() + (x**2).sum(), x))


def test_after_a_sweep_its_leaves_are_ordinary_tensors_again() -> None:
    X, w = rand(4, 3), nn.Parameter(rand(3, 2))
    C = te.lin(X, w).sum()
    te.backward(C)
    assert type(X) is Tensor
    assert type(w) is nn.Parameter
    y = X * 2
    assert type(y) is Tensor
    assert len(te.global_tape()) == 0


def test_leaves_of_results_that_were_dropped_are_ordinary_tensors_again() -> None:
    X, w = rand(4, 3), rand(3, 2)
    te.lin(X, w)
    X * 2
    te.lin(X, w)
    assert len(te.global_tape()) == 0


def test_python_numbers_and_numpy_scalars_on_the_left() -> None:
    x = rand(3)
    y = te.relu(x)
    C = (2.0 * y + numpy.float64(3.0) * y + y * numpy.float64(2.0)).sum()
    te.backward(C)
    agree([x], reference(lambda x: (7.0 * torch.relu(x)).sum(), x))


def test_out_arguments_and_in_place_on_plain_tensors() -> None:
    x = rand(3)
    y = te.relu(x)
    out = torch.empty(3, dtype=torch.float64)
    torch.mul(y, 3, out=out)
    buffer = torch.zeros(3, dtype=torch.float64)
    buffer += y
    buffer[0] = y[1] * 5
    more = torch.zeros(2, 3, dtype=torch.float64)
    more[1].copy_(y)
    C = (out * 2).sum() + (buffer * 3).sum() + (more * more).sum()
    te.backward(C)

    def same_thing(x: Tensor) -> Tensor:
        y = torch.relu(x)
        return 6 * y.sum() + 3 * (5 * y[1] + y[1] + y[2]) + (y * y).sum()

    agree([x], reference(same_thing, x))


@pytest.mark.parametrize(
    "cast",
    [
        lambda t, like: t.type_as(like),
        lambda t, like: t.to(like),
        lambda t, like: t.to(torch.float64),
        lambda t, like: t.double(),
        lambda t, like: t.type(torch.float64),
        lambda t, like: t.type("torch.DoubleTensor"),
        lambda t, like: t.to(torch.complex128).real,
        lambda t, like: t.cfloat().abs().double(),
    ],
)
@pytest.mark.parametrize("block", [False, True])
def test_casts_are_computations(cast: Callable[[Tensor, Tensor], Tensor], block: bool) -> None:
    x, like = rand(3, dtype=torch.float32), rand(1)
    if block:
        with te.record():
            C = (cast(torch.relu(x), like) * 2).sum() + x.sum()
    else:
        y = te.relu(x)
        C = (cast(y, like) * 2).sum() + y.sum() - y.sum() + (x * 1).sum()
    te.backward(C)
    close(x.g, 2 * (plain(x) > 0).float() + 1)


def test_loops_and_conditions_over_recorded_values() -> None:
    x = rand(4)
    y = te.relu(x)
    total = 0.0
    for i, element in enumerate(y):
        if element > 0.1:
            total = total + element * i
    total = total + sum(y)
    assert isinstance(total, torch.Tensor)
    te.backward(total)

    def same_thing(x: Tensor) -> Tensor:
        y = torch.relu(x)
        return sum(v * i for i, v in enumerate(y) if v > 0.1) + y.sum()

    agree([x], reference(same_thing, x))


# -- nested blocks, pauses, scopes -----------------------------------------------------------------


def test_nested_blocks_record_on_the_innermost() -> None:
    x = rand(3)
    with te.record() as outer:
        a = x * 2
        with te.record() as inner:
            b = torch.sin(a)
            c = te.relu(b)
            assert te.current_tape() is inner
        assert te.current_tape() is outer
        C = (a * c).sum()
    assert [n.op.name for n in outer.nodes] == ["mul", "mul", "sum"]
    assert [n.op.name for n in inner.nodes] == ["sin", "relu"]
    te.backward(C)
    agree([x], reference(lambda x: (2 * x * torch.relu(torch.sin(2 * x))).sum(), x))


def test_one_recorder_object_may_be_opened_again() -> None:
    block = te.record()
    x = rand(3)
    with block as first:
        y = x * 2
        with block as second:
            z = y * 3
    assert first is not second
    assert (len(first), len(second)) == (1, 1)
    te.backward(z.sum())
    assert x.g.tolist() == [6.0] * 3


def test_tapes_of_two_blocks_join() -> None:
    x, w = rand(3), rand(3)
    with te.record():
        y = x * w
    with te.record():
        C = torch.sin(y).sum()
    te.backward(C)
    agree([x, w], reference(lambda x, w: torch.sin(x * w).sum(), x, w))


def test_pause() -> None:
    x = rand(3)
    with te.record() as tape:
        y = x * 2
        with te.pause():
            z = torch.sin(y) * te.relu(y)
            with te.pause():
                z = z + 1
            z = z * 2
        C = (y * z).sum()
    assert [n.op.name for n in tape.nodes] == ["mul", "mul", "sum"]
    te.backward(C)
    close(x.g, 2 * plain(z))


def test_writes_during_a_pause_spoil_nothing() -> None:
    x = rand(3)
    with te.record():
        y = torch.sin(x)
        z = y * y
        before = plain(y)
        with te.pause():
            y.mul_(100)
        C = z.sum() + (y * x).sum()
    te.backward(C)
    close(x.g, 2 * before * torch.cos(plain(x)) + 100 * before)


def test_scopes() -> None:
    x = rand(3)
    with te.record() as tape:
        a = x * 2
        with te.scope("block1"):
            b = torch.sin(a)
            with te.scope("inner"):
                c = te.relu(b)
            d = c + 1
        C = d.sum()
    assert [n.scope for n in tape.nodes] == [(), ("block1",), ("block1", "inner"), ("block1",), ()]
    with te.scope("outside"):
        U = te.relu(x)
    assert te.global_tape().nodes[-1].scope == ("outside",)
    with te.scope("before"), te.record() as tape:
        y = x * 2
    assert tape.nodes[0].scope == ("before",)
    del C, U, y


@pytest.mark.parametrize("name", [None, 3, "", b"a", ("a",)])
def test_a_scope_needs_a_name(name: Any) -> None:
    with pytest.raises(te.DTypeError) as caught, te.scope(name):
        pass
    assert "test_recorder.py" in str(caught.value)


# -- strict, borrowed rules ------------------------------------------------------------------------


def test_strict_refuses_an_operation_without_a_rule_at_once() -> None:
    @te.op
    def secret(x: Tensor, power: int) -> Tensor:
        return x**power

    weights = rand(3)
    with te.record(strict=True) as tape:
        doubled = weights * 2
        with pytest.raises(te.MissingRuleError) as caught:
            secret(doubled, 3)
        assert len(tape) == 1
        C = doubled.sum()
    text = str(caught.value)
    assert isinstance(caught.value, NotImplementedError)
    assert text.startswith(
        "secret has no registered gradient rule, and this recording is strict.\n  at test_recorder.py:"
    )
    assert "secret(doubled, 3)" in text
    assert "(3,)  float64" in text
    assert "@te.rule(secret) on def secret_grad(g, out, x, power): ..." in text
    te.backward(C)
    assert weights.g.tolist() == [2.0] * 3


def test_strict_lets_through_what_needs_no_rule() -> None:
    @te.op
    def secret(x: Tensor) -> Tensor:
        return x * 2

    i = torch.arange(3)
    x = rand(3)
    with te.record(strict=True):
        secret(i)  # no gradient could pass
        with torch.no_grad():
            secret(x)
        with te.pause():
            secret(x)
        y = x[i] * (x > 0) + torch.zeros(3) + x.argmax()
        y.add_(1)
    te.backward(y.sum())
    close(x.g, (plain(x) > 0).double())


def test_strict_names_an_aten_operation_and_the_way_to_add_its_rule() -> None:
    x = rand(3).abs() + 1
    with te.record() as tape:
        torch.special.zeta(x, 2.0)
    (node,) = tape.nodes
    if node.rule != "borrowed":
        pytest.skip("it has a rule by now")
    with te.record(strict=True), pytest.raises(te.MissingRuleError, match=r"torch\.ops\.aten\.special_zeta"):
        torch.special.zeta(x, 2.0)


BORROWED: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("i0e", lambda x: torch.special.i0e(x).sum()),
    ("i1", lambda x: torch.special.i1(x).pow(2).sum()),
    ("ndtri", lambda x: torch.special.ndtri(x.sigmoid()).sum()),
    ("polygamma", lambda x: torch.polygamma(1, x.abs() + 1).sum()),
    ("erfcx", lambda x: torch.special.erfcx(x).sum()),
    ("entr", lambda x: torch.special.entr(x.abs() + 0.1).sum()),
    ("log_ndtr", lambda x: torch.special.log_ndtr(x).sum()),
    ("cdist", lambda x: torch.cdist(x, x.flip(1) + 3).sum()),
    ("cholesky", lambda x: torch.linalg.cholesky(x @ x.t() + 5 * torch.eye(3).double()).sum()),
    ("eigh", lambda x: (torch.linalg.eigh(x @ x.t())[0] * torch.tensor([1.0, 2.0, 3.0])).sum()),
    ("svdvals", lambda x: torch.linalg.svdvals(x).pow(3).sum()),
    ("renorm", lambda x: torch.renorm(x, 2, 0, 1.0).pow(2).sum()),
    ("cumprod", lambda x: x.cumprod(1).sum()),
    ("logcumsumexp", lambda x: x.logcumsumexp(1).sum()),
    ("conv1d", lambda x: F.conv1d(x[None], x[:, None, :2].repeat(1, 3, 1)).pow(2).sum()),
    (
        "grid_sample",
        lambda x: F.grid_sample(
            x[None, None], x[None, :, :2, None].repeat(1, 1, 1, 2).tanh(), align_corners=False
        ).sum(),
    ),
    ("ctc-like pad", lambda x: F.pad(x[None], (1, 1), mode="reflect").pow(2).sum()),
    ("interpolate", lambda x: F.interpolate(x[None], scale_factor=2, mode="linear", align_corners=True).pow(2).sum()),
    ("pixel_shuffle", lambda x: F.pixel_shuffle(x.reshape(1, 4, 3, 1), 2).pow(2).sum()),
    ("median", lambda x: x.median(1).values.pow(2).sum() + x.median()),
    ("kthvalue", lambda x: x.kthvalue(2, 1).values.sum()),
    ("rnn", lambda x: torch.rnn_tanh_cell(x, x[:, :2] * 1, x[:2].repeat(1, 1), x[:2, :2] * 1).sum()),
]


@pytest.mark.parametrize(("name", "f"), BORROWED, ids=[name for name, _ in BORROWED])
def test_operations_with_and_without_registered_rules(name: str, f: Callable[[Tensor], Tensor]) -> None:
    x = rand(3, 4)
    with te.record():
        C = f(x)
    te.backward(C)
    agree([x], reference(f, x), 1e-8)


def test_a_borrowed_rule_says_so() -> None:
    @te.op
    def soft(x: Tensor, w: Tensor, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
        y = x * w * sharpness
        return torch.logaddexp(y, torch.zeros_like(y)), y.detach()

    x, w = rand(3), rand(3)
    with te.record() as tape:
        y, _ = soft(x, w, sharpness=3.0)
    (node,) = [n for n in tape.nodes if n.op.is_named]
    assert node.rule == "borrowed"
    assert "borrowed" in str(tape)
    C = y.sum()
    te.backward(C, wrt=[w], keep=True)
    assert g_of(x) is None
    agree([w], reference(lambda w: F.softplus(3 * plain(x) * w).sum(), w))
    g = the(te.grad(C, x, record=True))
    te.backward((g * g).sum())
    x_ = plain(x).requires_grad_()
    (g_,) = torch.autograd.grad(F.softplus(3 * x_ * plain(w)).sum(), x_, create_graph=True)
    (wanted,) = torch.autograd.grad((g_ * g_).sum(), x_)
    close(x.g, wanted)


def test_a_borrowed_rule_of_a_random_operation_is_never_silently_wrong() -> None:
    @te.op
    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand(3).double()

    x = rand(3)
    y = noisy(x)
    factor = plain(y) / plain(x)
    try:
        te.backward(y.sum())
    except te.TapeError:
        return
    close(x.g, factor)


def test_random_operations_have_the_gradient_of_the_draw_that_was_made() -> None:
    x = rand(50)
    with te.record() as tape:
        noise = torch.rand(50, dtype=torch.float64)
        y = F.dropout(x, 0.4, training=True)
        z = torch.empty(50, dtype=torch.float64).normal_()
        r = F.rrelu(x, 0.1, 0.3, training=True)
        C = (x * noise + y + x * z + r).sum()
    te.backward(C)
    mask = torch.where(plain(x) != 0, plain(y) / plain(x), 0.0)
    close(x.g, plain(noise) + mask + plain(z) + plain(r) / plain(x), 1e-9)
    assert any(node.random for node in tape.nodes)
    assert "random" in str(tape)


# -- autograd functions of the user's own ----------------------------------------------------------


class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.n = n
        indices = x.argsort()
        ctx.mark_non_differentiable(indices)
        return x**n, indices

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return g * 7 * x, None, None


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_autograd_function_uses_its_own_backward(requires_grad: bool) -> None:
    x = rand(3).requires_grad_(requires_grad)
    with te.record():
        y = Custom.apply(x * 1, 3.0)  # type: ignore[no-untyped-call]
        C = (y * y).sum()
    te.backward(C)
    close(y, 3 * plain(x))
    close(x.g, 100 * 2 * 3 * plain(x))


def test_an_autograd_function_of_several_results() -> None:
    x = rand(3)
    with te.record():
        y, i = TwoResults.apply(x, None, 2)  # type: ignore[no-untyped-call]
        C = (y * i).sum()
    te.backward(C)
    close(x.g, 7 * plain(x) * i)


def test_an_autograd_function_outside_a_block_is_never_silently_cut() -> None:
    x = rand(3)
    y = te.relu(x)
    try:
        C = Custom.apply(y, 3.0).sum()  # type: ignore[no-untyped-call]
        te.backward(C)
    except (te.TapeError, RuntimeError):
        return
    close(x.g, 100 * (plain(x) > 0).double())


# -- threads ---------------------------------------------------------------------------------------


def in_threads(*bodies: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def guarded(body: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            try:
                body()
            except BaseException as error:
                errors.append(error)

        return run

    threads = [threading.Thread(target=guarded(body)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_each_thread_has_its_own_global_tape() -> None:
    x = rand(3)
    U = te.relu(x)
    seen = []

    def other() -> None:
        assert te.current_tape() is te.global_tape()
        seen.append((len(te.global_tape()), te.global_tape()))
        te.relu(rand(2))

    in_threads(other)
    assert seen[0][0] == 0
    assert seen[0][1] is not te.global_tape()
    assert len(te.global_tape()) == 1
    del U


def test_a_block_does_not_hear_other_threads() -> None:
    x = rand(3)
    with te.record() as tape:
        y = x * 2
        in_threads(lambda: [torch.sin(rand(3)) for _ in range(10)])
        C = y.sum()
    assert [n.op.name for n in tape.nodes] == ["mul", "sum"]
    te.backward(C)


def test_recording_in_several_threads_at_once() -> None:
    shared = rand(4, 4)
    expected = plain(shared)
    results: dict[int, list[Tensor]] = {}

    def work(k: int) -> Callable[[], None]:
        def body() -> None:
            generator = torch.Generator().manual_seed(k)
            w = torch.randn(4, 2, dtype=torch.float64, generator=generator)
            net = nn.Linear(2, 2).double()
            for turn in range(25):
                with te.record() as tape, te.scope(f"thread{k}"):
                    C = (net(torch.tanh(shared @ w)) * (k + 1)).pow(2).sum()
                assert all(n.scope[0] == f"thread{k}" for n in tape.nodes)
                te.backward(C, wrt=[w, net.weight])
                D = te.mse(te.relu(te.lin(shared, w)), torch.zeros(4, 2).double())
                if turn % 2:
                    te.backward(D, wrt=[w])
                assert te.current_tape() is te.global_tape()
            with te.record():
                C = (net(torch.tanh(shared @ w)) * (k + 1)).pow(2).sum()
            te.backward(C, wrt=[w, net.weight])
            results[k] = [plain(w), plain(grad_of(w)), plain(net.weight), plain(grad_of(net.weight)), plain(net.bias)]

        return body

    in_threads(*[work(k) for k in range(6)])
    for k, (w, w_g, weight, weight_g, bias) in results.items():
        wanted = reference(
            lambda w, weight, k=k, bias=bias: ((torch.tanh(expected @ w) @ weight.t() + bias) * (k + 1)).pow(2).sum(),
            w,
            weight,
        )
        close(w_g, wanted[0])
        close(weight_g, wanted[1])
    assert torch.equal(plain(shared), expected)


def test_a_value_of_one_thread_swept_in_another() -> None:
    x = rand(3)
    box: list[Tensor] = []

    def make() -> None:
        with te.record():
            box.append(torch.sin(x).sum())

    in_threads(make)
    te.backward(box[0])
    close(x.g, torch.cos(plain(x)))


def test_scopes_and_pauses_are_of_one_thread() -> None:
    seen: list[tuple[str, ...]] = []

    def other() -> None:
        with te.record() as tape:
            rand(2) * 2
        seen.extend(n.scope for n in tape.nodes if n.op.name == "mul")

    with te.scope("mine"), te.pause():
        in_threads(other)
    assert seen == [()]


# -- what torch computes in another way where a mode listens --------------------------------------------


VALUES_ALONE: dict[str, Callable[[Tensor], Any]] = {
    "svdvals": lambda a: torch.linalg.svdvals(a),
    "eigvalsh": lambda a: torch.linalg.eigvalsh(a, UPLO="U"),
    "cond": lambda a: torch.linalg.cond(a),
    "cond of the least": lambda a: torch.linalg.cond(a, -2),
    "cond, nuclear": lambda a: torch.linalg.cond(a, "nuc"),
    "the greatest": lambda a: torch.linalg.matrix_norm(a, 2),
    "the least": lambda a: torch.linalg.norm(a, -2),
    "nuclear": lambda a: torch.norm(a, "nuc"),
    "a method": lambda a: a.norm("nuc"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("name", VALUES_ALONE)
def test_values_without_vectors_are_those_of_plain_torch(name: str, tracked: bool, dtype: torch.dtype) -> None:
    """Bit for bit: torch takes another algorithm where vectors are wanted; so does it with `requires_grad`."""
    function = VALUES_ALONE[name]
    for _ in range(4):
        a = torch.randn(7, 7, dtype=dtype).requires_grad_(tracked)
        wanted = function(a)
        for block in (True, False):
            x = plain(a).requires_grad_(tracked)
            if block:
                with te.record() as tape:
                    made = function(x)
                    loss = made.sum()
            else:
                with te.record():
                    y = x * 1
                made = function(y)
                loss = made.sum()
            assert torch.equal(plain(made), plain(wanted))
            te.backward(loss, keep=True)
            twin = plain(a).requires_grad_()
            (g,) = torch.autograd.grad(function(twin).sum(), twin)
            close(x.g, g, 1e-10 if dtype == torch.float64 else 1e-3)
            if block:
                y = torch.randn(7, 7, dtype=dtype)
                program = tape.program(inputs=x, outputs=loss)
                close(program(y), plain(function(y).sum()), 1e-10 if dtype == torch.float64 else 1e-3)


# -- copies, files ---------------------------------------------------------------------------------


def recorded_tensors() -> list[Tensor]:
    X, w, v = rand(3, 2), nn.Parameter(rand(2, 2)), rand(2)
    Z = te.lin(X, w, v)
    U = te.relu(te.lin(X, plain(w)))
    return [X, w, v, Z, U]


def copies_of(t: Tensor) -> list[Tensor]:
    buffer = io.BytesIO()
    torch.save({"t": t}, buffer)
    buffer.seek(0)
    made = [pickle.loads(pickle.dumps(t)), torch.load(buffer, weights_only=True)["t"], copy.copy(t)]
    if t.is_leaf:  # torch refuses deep copies of what autograd made
        made.append(copy.deepcopy(t))
    assert b"tape_engine" not in pickle.dumps(t)
    assert b"tape_engine" not in buffer.getvalue()
    return made


@pytest.mark.parametrize("swept", [False, True])
@pytest.mark.parametrize("index", range(5))
def test_copies_and_files_of_recorded_tensors_are_as_torch_makes_them(swept: bool, index: int) -> None:
    tensors = recorded_tensors()
    X, w, v = (plain(t).requires_grad_(isinstance(t, nn.Parameter)) for t in tensors[:3])
    wanted = copies_of([X, nn.Parameter(w), v, X @ w + v, torch.relu(X @ plain(w))][index])
    t = tensors[index]
    if swept:
        te.backward(tensors[3].sum() + tensors[4].sum())
        assert t.g is not None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        copies = copies_of(t)
    pickled = [each for each in told if "pickling hands" in str(each.message)]
    assert bool(pickled) is (index > 2 and not swept)  # what was computed leaves for a file
    for i, (copied, plainly) in enumerate(zip(copies, wanted, strict=True)):
        recorded = i > 1 and index > 2 and not swept  # a copy of what was computed is computed as well
        assert type(copied) is (Recorded if recorded else type(plainly))
        assert torch.equal(plain(copied), plain(t))
        assert copied.requires_grad == plainly.requires_grad
        assert copied.is_leaf == plainly.is_leaf


def test_models_after_a_sweep_are_saved_and_loaded_as_ever() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    with te.record():
        C = net(rand(4, 3)).sum()
    te.backward(C)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    twin = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    twin.load_state_dict(state)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(plain(p), plain(q))
        assert type(p) is nn.Parameter
    again = copy.deepcopy(net)
    assert all(type(p) is nn.Parameter for p in again.parameters())
    assert pickle.loads(pickle.dumps(net)).state_dict().keys() == state.keys()


def test_a_deep_copy_of_a_module_between_recording_and_sweep() -> None:
    net = nn.Sequential(nn.Linear(3, 2)).double()
    with te.record():
        C = net(rand(4, 3)).pow(2).sum()
    twin = copy.deepcopy(net)
    assert type(twin[0].weight) is nn.Parameter
    assert twin[0].weight.is_leaf
    assert torch.equal(plain(twin[0].weight), plain(net[0].weight))
    te.backward(C)
    assert g_of(net[0].weight) is not None
    assert g_of(twin[0].weight) is None


def test_views_saved_together_stay_together() -> None:
    x = rand(4)
    U = te.relu(x)
    v = U[:2]
    with pytest.warns(te.TapeWarning, match="pickling hands"):
        a, b = pickle.loads(pickle.dumps((U, v)))
    assert torch.equal(plain(a)[:2], plain(b))


# -- weak global tape ------------------------------------------------------------------------------


def test_results_that_are_dropped_leave_the_global_tape() -> None:
    x = rand(3)
    for _ in range(10):
        te.relu(te.relu(x) * 2)
    assert len(te.global_tape()) == 0
    U = te.relu(te.relu(x) * 2)
    assert len(te.global_tape()) == 3
    del U
    assert len(te.global_tape()) == 0


def test_the_tape_of_a_block_keeps_its_nodes_and_leaves() -> None:
    with te.record() as tape:
        x = torch.ones(3)
        y = x * torch.full((3,), 2.0)
        del x, y
    assert len(tape) == 3
    assert [n.op.name for n in tape.nodes] == ["ones", "full", "mul"]


def test_clear() -> None:
    x = rand(3)
    U = te.relu(x)
    te.global_tape().clear()
    assert len(te.global_tape()) == 0
    with te.record() as tape:
        y = x * 2
    tape.clear()
    assert len(tape) == 0
    assert tape.nodes == []
    assert tape.values == []
    te.backward((U * y).sum())  # the values still know where they came from
    agree([x], reference(lambda x: (torch.relu(x) * x * 2).sum(), x))


# -- inference mode, other devices -----------------------------------------------------------------


def test_inference_mode_works_or_says_what_is_wrong() -> None:
    x = rand(3)
    try:
        with torch.inference_mode(), te.record():
            C = (torch.sin(x) * x).sum()
        te.backward(C)
    except te.TapeError:
        return
    if g_of(x) is not None:
        agree([x], reference(lambda x: (torch.sin(x) * x).sum(), x))


def test_meta_tensors_are_recorded_too() -> None:
    x, w = torch.empty(5, 3, device="meta"), torch.empty(3, 2, device="meta")
    with te.record() as tape:
        C = torch.relu(x @ w).sum()
    assert len(tape) == 3
    te.backward(C)
    assert grad_of(w).shape == (3, 2)
    assert grad_of(w).device.type == "meta"


def test_training_batch_norm_keeps_nothing_of_its_running_statistics() -> None:
    layer, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    with te.record() as tape:
        C = (layer(x) * layer(2 * x)).sum()  # the second call writes over what the first has read
    (plain(x) * plain(2 * x)).sum().backward()
    nodes = [node for node in tape.nodes if "batch_norm" in node.op.name]
    assert len(nodes) == 2
    for node in nodes:
        kept = dict(zip(node.input_names, node.saved, strict=False))
        assert kept["input"] is not None
        assert kept["running_mean"] is None
        assert kept["running_var"] is None
    te.backward(C, wrt=[layer.weight, layer.bias])
    close(g_of(layer.weight), plain.weight.grad, 1e-5)
    close(g_of(layer.bias), plain.bias.grad, 1e-5)
    close(layer.running_var, plain.running_var, 0)


def test_a_write_under_no_grad_to_what_no_rule_reads_is_passed_over() -> None:
    x = torch.randn(3)
    with te.record():
        y = x + 1
        with torch.no_grad():
            y.div_(2)
        C = (y * 3).sum()
    te.backward(C, wrt=x)
    assert torch.equal(x.g, torch.full((3,), 3.0))  # type: ignore[attr-defined]


def test_a_counter_goes_by_its_name() -> None:
    norm = torch.nn.BatchNorm1d(3)
    with te.record() as tape:
        norm(norm(torch.randn(4, 3)))
    counts = [node for node in tape.nodes if node.op.name == "add"]
    assert [node.inputs[0].name for node in counts] == ["num_batches_tracked"] * 2
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 2
