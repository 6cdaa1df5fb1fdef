"""Functions that are recorded as their parts are recorded as what the long way hears, and compute the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import tape_engine as te
from tape_engine.recorder import parts, shortcut
from tests.helpers import Overloads

from .test_shortcut import told

Tensor = torch.Tensor


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def labels(count: int, classes: int) -> Tensor:
    return torch.arange(count) % classes


def recurrent(
    layers: int, *, batch: int = 2, batch_first: bool = False, dropout: float = 0.0, train: bool = True,
    directions: int = 1, dtype: torch.dtype = torch.float32, transposed: bool = False, turned: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of an LSTM of width 5 on inputs of width 3, over 4 places."""
    x = leaf(batch, 4, 3, dtype=dtype) if batch_first != transposed else leaf(4, batch, 3, dtype=dtype)
    wide = [3, *[5 * directions] * (layers - 1)]
    weights = [
        leaf(*shape, dtype=dtype)
        for size in wide
        for _ in range(directions)
        for shape in ((20, size), (20, 5), (20,), (20,))
    ]
    hx = tuple(leaf(layers * directions, batch, 5, dtype=dtype) for _ in range(2))
    if turned:
        hx = tuple(leaf(batch, layers, 5, dtype=dtype).transpose(0, 1) for _ in range(2))
    given = x.transpose(0, 1) if transposed else x
    return given, hx, weights, True, layers, dropout, train, directions == 2, batch_first


#: Calls that are taken apart, by name; each makes its function and its arguments anew.
TAKEN: dict[str, Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "linear": lambda: (F.linear, (leaf(5, 3), leaf(4, 3), leaf(4)), {}),
    "linear, by keyword": lambda: (F.linear, (leaf(5, 3),), {"weight": leaf(4, 3), "bias": leaf(4)}),
    "linear, no bias": lambda: (F.linear, (leaf(5, 3), leaf(4, 3)), {}),
    "linear, bias None": lambda: (F.linear, (leaf(5, 3), leaf(4, 3), None), {}),
    "linear, transposed": lambda: (F.linear, (leaf(3, 5).t(), leaf(3, 4).t(), leaf(4)), {}),
    "linear, three dimensions": lambda: (F.linear, (leaf(2, 5, 3), leaf(4, 3), leaf(4)), {}),
    "linear, four dimensions": lambda: (F.linear, (leaf(2, 1, 5, 3), leaf(4, 3), leaf(4)), {}),
    "linear, float64": lambda: (F.linear, tuple(leaf(*s, dtype=torch.float64) for s in ((5, 3), (4, 3), (4,))), {}),
    "conv1d": lambda: (F.conv1d, (leaf(2, 3, 8), leaf(4, 3, 3), leaf(4), (2,), (1,), (1,), 1), {}),
    "conv2d": lambda: (F.conv2d, (leaf(2, 3, 8, 8), leaf(4, 3, 3, 3), leaf(4), (1, 1), (1, 1), (1, 1), 1), {}),
    "conv2d, groups": lambda: (F.conv2d, (leaf(2, 4, 6, 6), leaf(4, 2, 3, 3), None, (1, 2), (0, 1), (2, 1), 2), {}),
    "conv3d": lambda: (F.conv3d, (leaf(1, 2, 4, 4, 4), leaf(3, 2, 2, 2, 2), None, (1,) * 3, (0,) * 3, (1,) * 3, 1), {}),
    "count": lambda: (Tensor.add_, (torch.tensor(3), 1), {}),
    "batch_norm": lambda: (F.batch_norm, (leaf(6, 3), torch.zeros(3), torch.ones(3), leaf(3), leaf(3), True), {}),
    "batch_norm, images": lambda: (
        F.batch_norm,
        (leaf(2, 3, 4, 4), torch.rand(3), torch.rand(3)),
        {"weight": leaf(3), "bias": leaf(3), "training": True, "momentum": 0.3, "eps": 1e-3},
    ),
    "layer_norm": lambda: (F.layer_norm, (leaf(2, 5, 3), (3,), leaf(3), leaf(3), 1e-5), {}),
    "layer_norm, two dimensions": lambda: (F.layer_norm, (leaf(2, 5, 3), (5, 3), leaf(5, 3), leaf(5, 3)), {}),
    "cross_entropy": lambda: (F.cross_entropy, (leaf(6, 4), labels(6, 4)), {}),
    "cross_entropy, sum": lambda: (F.cross_entropy, (leaf(6, 4), labels(6, 4)), {"reduction": "sum"}),
    "cross_entropy, none": lambda: (F.cross_entropy, (leaf(6, 4), labels(6, 4)), {"reduction": "none"}),
    "cross_entropy, ignoring": lambda: (F.cross_entropy, (leaf(6, 4), labels(6, 4)), {"ignore_index": 2}),
    "dropout": lambda: (F.dropout, (leaf(6, 4),), {}),
    "dropout, transposed": lambda: (F.dropout, (leaf(4, 6).t(), 0.25, True), {}),
    "lstm": lambda: (torch.lstm, recurrent(1), {}),
    "lstm, three layers": lambda: (torch.lstm, recurrent(3), {}),
    "lstm, by batch": lambda: (torch.lstm, recurrent(2, batch_first=True), {}),
    "lstm, by batch of one": lambda: (torch.lstm, recurrent(2, batch=1, batch_first=True), {}),
    "lstm that does not train": lambda: (torch.lstm, recurrent(2, dropout=0.5, train=False), {}),
    "lstm, transposed": lambda: (torch.lstm, recurrent(2, transposed=True), {}),
}

#: Calls of the same functions that take the long way.
LEFT: dict[str, Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "linear, a vector": lambda: (F.linear, (leaf(3), leaf(4, 3), leaf(4)), {}),
    "linear, no bias, three dimensions": lambda: (F.linear, (leaf(2, 5, 3), leaf(4, 3)), {}),
    "linear, not contiguous": lambda: (F.linear, (leaf(3, 5, 2).transpose(0, 2), leaf(4, 3), leaf(4)), {}),
    "linear, bias of one": lambda: (F.linear, (leaf(5, 3), leaf(4, 3), leaf(1)), {}),
    "linear, a vector of weights": lambda: (F.linear, (leaf(5, 3), leaf(3)), {}),
    "linear, empty": lambda: (F.linear, (leaf(0, 3), leaf(4, 3), leaf(4)), {}),
    "linear, bfloat16": lambda: (F.linear, tuple(leaf(*s, dtype=torch.bfloat16) for s in ((5, 3), (4, 3), (4,))), {}),
    "linear, complex": lambda: (F.linear, (leaf(5, 3, dtype=torch.complex64), leaf(4, 3, dtype=torch.complex64)), {}),
    "conv2d, numbers": lambda: (F.conv2d, (leaf(2, 3, 8, 8), leaf(4, 3, 3, 3), leaf(4), 2, 1), {}),
    "conv2d, same": lambda: (F.conv2d, (leaf(2, 3, 8, 8), leaf(4, 3, 3, 3), None, 1, "same"), {}),
    "conv2d, one image": lambda: (F.conv2d, (leaf(3, 8, 8), leaf(4, 3, 3, 3), None, (1, 1), (0, 0), (1, 1), 1), {}),
    "add_ of a float": lambda: (Tensor.add_, (torch.tensor(3.0), 1), {}),
    "add_ of a tensor": lambda: (Tensor.add_, (torch.tensor(3), torch.tensor(2)), {}),
    "add_ with alpha": lambda: (Tensor.add_, (torch.tensor(3), 1), {"alpha": 2}),
    "batch_norm that does not train": lambda: (F.batch_norm, (leaf(6, 3), torch.zeros(3), torch.ones(3)), {}),
    "batch_norm without statistics": lambda: (F.batch_norm, (leaf(6, 3), None, None, leaf(3), leaf(3), True), {}),
    "batch_norm without a weight": lambda: (
        F.batch_norm,
        (leaf(6, 3), torch.zeros(3), torch.ones(3), None, None, True),
        {},
    ),
    "layer_norm without a weight": lambda: (F.layer_norm, (leaf(2, 5, 3), (3,)), {}),
    "layer_norm, a list": lambda: (F.layer_norm, (leaf(2, 5, 3), [3], leaf(3), leaf(3)), {}),
    "cross_entropy, weighted": lambda: (F.cross_entropy, (leaf(6, 4), labels(6, 4), torch.rand(4)), {}),
    "cross_entropy, smoothed": lambda: (F.cross_entropy, (leaf(6, 4), labels(6, 4)), {"label_smoothing": 0.1}),
    "cross_entropy of probabilities": lambda: (F.cross_entropy, (leaf(6, 4), torch.rand(6, 4)), {}),
    "cross_entropy, images": lambda: (F.cross_entropy, (leaf(2, 4, 3), torch.zeros(2, 3, dtype=torch.long)), {}),
    "cross_entropy of one": lambda: (F.cross_entropy, (leaf(4), torch.tensor(1)), {}),
    "dropout that does not train": lambda: (F.dropout, (leaf(6, 4), 0.5, False), {}),
    "dropout of nothing": lambda: (F.dropout, (leaf(6, 4), 0.0), {}),
    "dropout of all": lambda: (F.dropout, (leaf(6, 4), 1.0), {}),
    "dropout in place": lambda: (F.dropout, (torch.randn(6, 4), 0.5, True, True), {}),
    "lstm with dropout": lambda: (torch.lstm, recurrent(2, dropout=0.5), {}),
    "lstm, both ways": lambda: (torch.lstm, recurrent(1, directions=2), {}),
    "lstm, float64": lambda: (torch.lstm, recurrent(1, dtype=torch.float64), {}),
    "lstm, states not contiguous": lambda: (torch.lstm, recurrent(2, turned=True), {}),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What came of each call that may be taken apart."""
    results: list[Any] = []
    whole = shortcut.Shortcut._in_parts

    def in_parts(self: Any, taken: Any, types: Any, args: Any, kwargs: Any) -> Any:
        results.append(whole(self, taken, types, args, kwargs))
        return results[-1]

    monkeypatch.setattr(shortcut.Shortcut, "_in_parts", in_parts)
    return results


def parts_of(tape: te.Tape) -> list[Any]:
    """The nodes, without the tensor of no elements that batch norm makes and does not use."""
    found = [[*each] for each in told(tape.nodes) if each[0] != "empty"]
    for each in found:
        each[3] = each[3] if any(each[3]) else []  # what is saved, if anything is
    return found


@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_it_is_recorded_and_computed_as_by_the_long_way(name: str, short: list[Any]) -> None:
    torch.manual_seed(0)
    call = (TAKEN | LEFT)[name]()
    again, longer = anew(call), anew(call)
    torch.manual_seed(1)
    expected = outputs(call[0](*call[1], **call[2]))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    with te.record() as tape:
        made = outputs(again[0](*again[1], **again[2]))
    assert torch.equal(torch.get_rng_state(), state)
    assert [each is NotImplemented for each in short] == [name in LEFT]
    del short[:]
    torch.manual_seed(1)
    with te.record() as by_long, shortcut.left_out():
        other = outputs(longer[0](*longer[1], **longer[2]))
    assert not short
    assert parts_of(tape) == parts_of(by_long)
    for each, as_torch in (*zip(made, expected, strict=True), *zip(other, expected, strict=True)):
        assert torch.equal(each, as_torch)
        assert (each.stride(), each.dtype, each.requires_grad) == (
            as_torch.stride(),
            as_torch.dtype,
            as_torch.requires_grad,
        )
        assert type(each.grad_fn) is type(as_torch.grad_fn)
    for ours, theirs in zip(tensors_of(again), tensors_of(call), strict=True):  # statistics, and what was written to
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in TAKEN if name != "count"])
def test_its_gradients_are_torch_s(name: str, short: list[Any]) -> None:
    torch.manual_seed(0)
    call = TAKEN[name]()
    again = anew(call)
    torch.manual_seed(1)
    expected = outputs(call[0](*call[1], **call[2]))
    seeds = [torch.randn_like(each) for each in expected]
    wanted = [each for each in tensors_of(call) if each.requires_grad]
    theirs = torch.autograd.grad(expected, wanted, seeds)
    leaves = [each for each in tensors_of(again) if each.requires_grad]
    torch.manual_seed(1)
    with te.record():
        made = outputs(again[0](*again[1], **again[2]))
        C = torch.stack([(each * seed).sum() for each, seed in zip(made, seeds, strict=True)]).sum()
    assert short
    for ours, gradient in zip(te.grad(C, leaves), theirs, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-6)


def anew(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same call on tensors of its own, laid out alike."""
    function, args, kwargs = call
    return function, tuple(map(copied, args)), {name: copied(each) for name, each in kwargs.items()}


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [*result]


def copied(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(map(copied, argument))
    if not isinstance(argument, Tensor):
        return argument
    made = argument.detach().clone(memory_format=torch.preserve_format)
    return made.requires_grad_(argument.requires_grad)


def tensors_of(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    found: list[Tensor] = []
    for each in (*call[1], *call[2].values()):
        found += [x for x in (each if isinstance(each, (list, tuple)) else [each]) if isinstance(x, Tensor)]
    return found


# -- where others listen -----------------------------------------------------------------------------------


class Net(nn.Module):
    """All that is taken apart, once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.linear, self.layer = nn.Linear(3, 4), nn.LayerNorm(4)
        self.dropout, self.lstm = nn.Dropout(0.25), nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(self.linear(self.norm(self.conv(x)).mean((2, 3))))
        return F.cross_entropy(self.lstm(self.dropout(hidden).unsqueeze(0))[0][0], labels(len(x), 4))


def trained(listening: Callable[[], Any], *, record: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss of a net, its gradients, and its statistics."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 2, 6, 6)
    torch.manual_seed(1)
    with contextlib.ExitStack() as stack:
        if record:
            stack.enter_context(te.record())
        stack.enter_context(listening())
        loss = net(x)
    wanted = list(net.parameters())
    found = te.grad(loss, wanted) if record else torch.autograd.grad(loss, wanted)
    return loss.detach(), [each for each in found if each is not None], list(net.buffers())


class Hearing(TorchFunctionMode):
    """A function mode of the user's, which hears the functions that were called."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


OTHERS: dict[str, Callable[[], Any]] = {
    "nobody": contextlib.nullcontext,
    "a dispatch mode": Overloads,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a tangent's level": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", OTHERS)
def test_where_others_listen_it_takes_the_long_way(name: str, short: list[Any]) -> None:
    loss, gradients, statistics = trained(OTHERS[name], record=True)
    taken = [each for each in short if each is not NotImplemented]
    assert len(taken) == (8 if name == "nobody" else 0)
    del short[:]
    expected, theirs, others = trained(OTHERS[name], record=False)
    assert not short
    assert torch.equal(loss, expected)
    loose = 2e-2 if name == "autocast" else 1e-5
    for ours, gradient in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=loose, atol=loose)
    for ours, other in zip(statistics, others, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("inside", [True, False])
def test_a_function_mode_of_the_user_hears_the_function_and_not_its_parts(inside: bool) -> None:
    mode, block = Hearing(), te.record()
    with block if inside else mode, mode if inside else block:
        F.linear(leaf(5, 3), leaf(4, 3), leaf(4))
    assert mode.heard.count("linear") == 1
    assert not {"t", "addmm"} & {*mode.heard}


def test_a_transform_takes_the_long_way(short: list[Any]) -> None:
    x, w, b = torch.randn(2, 5, 3), torch.randn(4, 3), torch.randn(4)
    with te.record():
        made = torch.func.vmap(F.linear, in_dims=(0, None, None))(x, w, b)
    assert [each is NotImplemented for each in short] == [True]
    assert torch.equal(made, F.linear(x, w, b))


def test_a_tensor_class_of_the_user_is_asked(short: list[Any]) -> None:
    heard = []

    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(func.__name__)
            with torch._C.DisableTorchFunctionSubclass():
                made = func(*args, **(kwargs or {}))
            return made.as_subclass(cls) if isinstance(made, Tensor) else made

    x = torch.randn(5, 3).as_subclass(Own)
    with te.record():
        made = F.linear(x, leaf(4, 3), leaf(4))
    assert "linear" in heard
    assert isinstance(made, Own)
    assert all(each is NotImplemented for each in short)


FAILING: dict[str, Callable[[], Any]] = {
    "linear, widths": lambda: F.linear(leaf(5, 3), leaf(4, 2), leaf(4)),
    "linear, bias": lambda: F.linear(leaf(5, 3), leaf(4, 3), leaf(3)),
    "linear, dtypes": lambda: F.linear(leaf(5, 3), leaf(4, 3, dtype=torch.float64), leaf(4)),
    "conv2d, channels": lambda: F.conv2d(leaf(1, 3, 4, 4), leaf(2, 2, 3, 3), None, (1, 1), (0, 0), (1, 1), 1),
    "conv2d, dimensions": lambda: F.conv2d(leaf(1, 3, 4), leaf(2, 3, 3), None, (1,), (0,), (1,), 1),
    "conv1d of images": lambda: F.conv1d(leaf(1, 3, 4, 4), leaf(2, 3, 3, 3), None, (1, 1), (0, 0), (1, 1), 1),
    "conv2d, bias": lambda: F.conv2d(leaf(1, 3, 4, 4), leaf(2, 3, 3, 3), leaf(3), (1, 1), (0, 0), (1, 1), 1),
    "batch_norm, eps": lambda: F.batch_norm(
        leaf(4, 3), torch.zeros(3), torch.ones(3), leaf(3), leaf(3), True, 0.1, -1.0
    ),
    "batch_norm, a list": lambda: F.batch_norm([1.0], torch.zeros(1), torch.ones(1), leaf(1), leaf(1), True),  # type: ignore[arg-type]
    "batch_norm, one row": lambda: F.batch_norm(leaf(1, 3), torch.zeros(3), torch.ones(3), leaf(3), leaf(3), True),
    "batch_norm, channels": lambda: F.batch_norm(leaf(4, 3), torch.zeros(2), torch.ones(2), leaf(3), leaf(3), True),
    "layer_norm, shape": lambda: F.layer_norm(leaf(4, 3), (2,), leaf(2), leaf(2)),
    "layer_norm, None": lambda: F.layer_norm(None, (3,), leaf(3), leaf(3)),  # type: ignore[arg-type]
    "layer_norm, a bool": lambda: F.layer_norm(leaf(4, 1), (True,), leaf(1), leaf(1)),
    "layer_norm, a float": lambda: F.layer_norm(leaf(4, 3), (3.0,), leaf(3), leaf(3)),  # type: ignore[arg-type]
    "cross_entropy, a list": lambda: F.cross_entropy([[1.0]], torch.tensor([0])),  # type: ignore[arg-type]
    "cross_entropy, ignoring much": lambda: F.cross_entropy(leaf(3, 4), labels(3, 4), ignore_index=2**70),
    "cross_entropy, a list of reductions": lambda: F.cross_entropy(leaf(3, 4), labels(3, 4), reduction=["mean"]),  # type: ignore[arg-type]
    "cross_entropy, class": lambda: F.cross_entropy(leaf(3, 4), torch.tensor([0, 1, 4])),
    "cross_entropy, counts": lambda: F.cross_entropy(leaf(3, 4), torch.tensor([0, 1])),
    "cross_entropy, reduction": lambda: F.cross_entropy(leaf(3, 4), torch.tensor([0, 1, 2]), reduction="most"),
    "dropout, p": lambda: F.dropout(leaf(3, 4), 1.5),
    "dropout, a list": lambda: F.dropout([1.0]),  # type: ignore[arg-type]
    "lstm, states": lambda: torch.lstm(*given(recurrent(2), 1, recurrent(1)[1])),
    "lstm, weights": lambda: torch.lstm(*given(recurrent(2), 2, recurrent(1)[2])),
    "lstm, dtypes": lambda: torch.lstm(*given(recurrent(1), 0, leaf(4, 2, 3, dtype=torch.float64))),
}


def given(args: tuple[Any, ...], place: int, other: Any) -> tuple[Any, ...]:
    return (*args[:place], other, *args[place + 1 :])


@pytest.mark.parametrize("name", FAILING)
def test_a_call_that_fails_fails_as_torch_does(name: str) -> None:
    def failure() -> tuple[type, str] | None:
        try:
            FAILING[name]()
        except Exception as error:  # whatever torch raises
            return type(error), str(error).splitlines()[0]
        return None

    expected = failure()
    assert expected is not None or name == "batch_norm, eps"  # which torch 2.8 takes
    with te.record():
        assert failure() == expected


def test_what_a_hook_on_saved_tensors_does_is_replayed() -> None:
    x, w, count = torch.randn(2, 3), leaf(4, 3), torch.zeros(())

    def pack(saved: Tensor) -> Tensor:
        count.add_(1.0)
        return saved

    with te.record() as tape, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = F.linear(x, w)
    packed = count.item()
    assert packed > 0
    tape.program(inputs=(x,), outputs=y)(x)
    assert count.item() == 2 * packed


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_function_that_is_traced_is_traced_whole(short: list[Any]) -> None:
    layer, x = nn.Linear(3, 4), torch.randn(2, 3)
    expected = str(torch.jit.trace(layer, (x,)).graph)  # type: ignore[no-untyped-call]
    assert not short
    with te.record():
        traced = torch.jit.trace(nn.Sequential(layer, nn.Linear(4, 4)), (x,))  # type: ignore[no-untyped-call]
    assert NotImplemented in short
    assert "aten::linear" in expected
    assert str(traced.inlined_graph).count("aten::linear") == 2


def test_a_release_that_takes_it_apart_otherwise_takes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def overloads_of(function: Any, *args: Any) -> list[Any]:
        heard = shortcut._overloads_of(function, *args)
        return heard[::-1] if function is torch._C._nn.linear else heard

    assert torch._C._nn.linear in parts.are_made_so(shortcut._overloads_of)
    found = parts.are_made_so(overloads_of)
    assert torch._C._nn.linear not in found
    assert torch.conv2d in found


def test_lines_and_scopes_are_the_user_s() -> None:
    net, x = Net(), torch.randn(5, 2, 6, 6)
    with te.record() as tape:
        net(x)
    for node in tape.nodes:
        assert node.site[0].co_filename == __file__  # type: ignore[union-attr]
    scopes = {node.op.name: node.scope for node in tape.nodes}
    assert scopes["addmm"] == ("Net", "linear")
    assert scopes["native_layer_norm"] == ("Net", "layer")
    assert scopes["convolution"] == ("Net", "conv")
    assert scopes["_native_batch_norm_legit_functional"] == ("Net", "norm")
    assert scopes["nll_loss_forward"] == ("Net",)
