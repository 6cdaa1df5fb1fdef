"""The shorter way onto the tape records what the long way records, and steps aside where others listen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import tape_engine as te
from tape_engine import registry
from tape_engine.recorder import shortcut
from tape_engine.tape import Node, Value
from tests.helpers import Overloads

Tensor = torch.Tensor

#: For each function: how many arguments it takes, and the types that the last of them may have.
WAYS = [
    pytest.param(func, known, kind, id=f"{getattr(func, '__qualname__', func)} {kind.__name__}")
    for func, known in shortcut.known().items()
    for kind in known.plans
    if kind in (Tensor, int, float)
]


def shown(argument: Any) -> Any:
    if isinstance(argument, Value):
        return argument.shape, argument.strides, argument.dtype, argument.device, argument.leaf, argument.constant
    if isinstance(argument, list):
        return [shown(each) for each in argument]
    return argument


def told(nodes: list[Node]) -> list[Any]:
    """What a node is, in terms that can be compared."""
    return [
        (
            node.op.name,
            [shown(each) for each in node.args],
            [shown(each) for each in node.outputs],
            [cell is not None for cell in node.saved],
            node.cut,
            node.ordinary,
            node.complex,
            node.scope,
        )
        for node in nodes
    ]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that took the short way."""
    taken: list[Any] = []
    plain = shortcut.record_plain  # type: ignore[attr-defined]

    def record_plain(tape: Any, plan: Any, args: Any, func: Any) -> Any:
        taken.append(func)
        return plain(tape, plan, args, func)

    monkeypatch.setattr(shortcut, "record_plain", record_plain)
    return taken


def both_ways(run: Callable[[], Any]) -> tuple[list[Any], list[Any], Any, Any]:
    with te.record() as by_short:
        one = run()
    with te.record() as by_long, shortcut.left_out():
        other = run()
    return told(by_short.nodes), told(by_long.nodes), one, other


def like(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of two dimensions, laid out otherwise."""
    return {
        "as it is": lambda: tensor,
        "transposed": lambda: tensor.t().clone().t(),
        "a column of a matrix": lambda: tensor.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda: tensor[:1].expand(3, -1),
        "of one row": lambda: tensor.reshape(-1).as_strided((1, 3), (7, 1)),
        "empty": lambda: tensor[:, :0],
    }[layout]()


def first_that_works(func: Any, arity: int, kind: type, layout: str) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of dimensions that a function takes, and what it gives for them."""
    for row in (..., 0):
        x = like(torch.rand(3, 3) / 2 + 0.2, layout).requires_grad_()
        y = like(torch.rand(3, 3) / 2 + 0.2, layout)
        for left, right in ((x, y), (x, y.t()), (x, y[row]), (x[row], y[row])):
            args = (left,) if arity == 1 else (left, right if kind is Tensor else kind(2))
            try:
                return args, func(*args)
            except (RuntimeError, IndexError):
                continue
    raise AssertionError(f"{func} takes none of these")


LAYOUTS = ("as it is", "transposed", "a column of a matrix", "expanded", "of one row", "empty")


@pytest.mark.slow
@pytest.mark.parametrize(("func", "known", "kind"), WAYS)
def test_it_records_what_the_long_way_records(func: Any, known: Any, kind: type, short: list[Any]) -> None:
    for layout in LAYOUTS:
        args, plain = first_that_works(func, known.arity, kind, layout)
        del short[:]
        by_short, by_long, one, other = both_ways(lambda: func(*args))  # noqa: B023 - called at once
        assert short == [func], "or the comparison says nothing"
        assert by_short == by_long
        for made in (one, other):
            assert torch.equal(made.nan_to_num(), plain.nan_to_num())  # of nothing, a mean is NaN
            assert (made.stride(), made.dtype, made.requires_grad) == (plain.stride(), plain.dtype, plain.requires_grad)
            assert type(made.grad_fn) is type(plain.grad_fn)
        assert by_short[-1][2][0][:3] == (plain.shape, plain.stride(), plain.dtype)


DTYPES = (torch.float64, torch.bfloat16, torch.int64, torch.complex64)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)))
@pytest.mark.parametrize("name", ["add", "mul", "div", "sub", "eq", "pow"])
def test_dtypes_are_those_that_torch_gives(name: str, dtypes: tuple[torch.dtype, ...], short: list[Any]) -> None:
    func = getattr(torch, name)
    x, y = (torch.tensor([[1, 2], [3, 2]]).to(dtype) for dtype in dtypes)
    by_short, by_long, one, _ = both_ways(lambda: func(x, y))
    assert len(short) == 1
    assert by_short == by_long
    assert by_short[0][2][0][2] == one.dtype == func(x, y).dtype


@pytest.mark.parametrize("shapes", [((3, 1), (1, 4)), ((), (2, 2)), ((1, 3), (1, 3)), ((2, 3, 4), (4,))])
def test_broadcast_results_are_described_as_they_are(shapes: Any, short: list[Any]) -> None:
    x, y = (torch.rand(shape) for shape in shapes)
    with te.record() as tape:
        made = x * y
    assert len(short) == 1
    assert (tape.nodes[0].outputs[0].shape, tape.nodes[0].outputs[0].strides) == (made.shape, made.stride())


def test_one_row_with_a_stride_of_its_own_gives_torch_s_strides() -> None:
    x = torch.rand(9).as_strided((1, 3), (7, 1))
    with te.record() as tape:
        made = x * x
    assert tape.nodes[0].outputs[0].strides == made.stride()


def test_a_relu_module_takes_the_short_way_unless_it_writes(short: list[Any]) -> None:
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    with te.record() as tape:
        C = torch.nn.ReLU()(x).sum()
    assert short[0] is torch.nn.functional.relu
    assert [node.op.name for node in tape.nodes] == ["relu", "sum"]
    te.backward(C, wrt=x)
    assert torch.equal(x.g, (x > 0).to(x.dtype))  # type: ignore[attr-defined]
    del short[:]
    y = x.detach().clone()
    with te.record() as tape:
        torch.nn.ReLU(inplace=True)(y)
    assert short == []
    assert torch.equal(y, x.relu())
    assert tape.nodes[-1].mutates


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add with alpha": lambda x, y: torch.add(x, y, alpha=3),
    "x.sub with alpha": lambda x, y: x.sub(y, alpha=0.5),
    "add of the old form": lambda x, y: torch.add(x, 2, y),
    "sum in another dtype": lambda x, y: x.sum(dtype=torch.float32),
    "sum over a dimension": lambda x, y: torch.sum(x, 0),
    "mean over two": lambda x, y: x.mean((0, 1)),
    "div that rounds": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "relu into another": lambda x, y: torch.tanh(x, out=torch.empty(3, 3, dtype=torch.float64)),
    "a number first": lambda x, y: 3 - x * True,
    "a number of NumPy's": lambda x, y: x * np.float64(1.5),
    "a complex number": lambda x, y: x * 2j,
}


@pytest.mark.filterwarnings("ignore:This overload of add is deprecated")
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_another_overload(name: str) -> None:
    x, y = torch.rand(3, 3, dtype=torch.float64) + 0.1, torch.rand(3, 3, dtype=torch.float64) + 0.1
    both_ways(lambda: CALLS[name](x, y))  # at its first call an overload has no plan yet, by which it is ordinary
    by_short, by_long, one, other = both_ways(lambda: CALLS[name](x, y))
    assert by_short == by_long
    assert torch.equal(one, CALLS[name](x, y))
    assert torch.equal(other, one)


def test_a_gradient_passes_as_torch_s_does(short: list[Any]) -> None:
    x, w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True), torch.nn.Parameter(torch.randn(4, 4).double())

    def run() -> Tensor:
        h = torch.tanh(x @ w + 1) * 2 - x / 3
        return (torch.exp(-h).sigmoid() - h**2).relu().sum() + (x @ w[0]).sum() + x[1] @ x[2]

    with te.record():
        C = run()
    assert len(short) > 10
    te.backward(C, wrt=(x, w))
    for g, expected in zip((x.g, w.g), torch.autograd.grad(run(), (x, w)), strict=True):  # type: ignore[attr-defined]
        assert torch.allclose(g, expected, rtol=1e-12)


# -- where others listen ---------------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


class Doubled(TorchFunctionMode):
    """Computes something else than what was called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made + made if func is torch.tanh else made


@pytest.mark.parametrize("inside", [False, True])
def test_a_function_mode_of_the_user_hears_the_call_once(inside: bool) -> None:
    x, mode = torch.rand(3), Functions()
    if inside:
        with te.record(), mode:
            torch.tanh(x)
    else:
        with mode, te.record():
            torch.tanh(x)
    assert mode.heard.count(torch.tanh) == 1


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_function_mode_computes_is_recorded(inside: bool) -> None:
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    first, second = (te.record(), Doubled()) if inside else (Doubled(), te.record())
    with first as one, second as other:
        C = torch.tanh(x).sum()
    tape = one if inside else other
    assert [node.op.name for node in tape.nodes] == ["tanh", "add", "sum"]
    te.backward(C, wrt=x)
    assert torch.allclose(x.g, 2 * (1 - torch.tanh(x) ** 2))  # type: ignore[attr-defined]


@pytest.mark.parametrize("inside", [False, True])
def test_a_dispatch_mode_of_the_user_hears_the_overload_once(inside: bool) -> None:
    x, mode = torch.rand(3), Overloads()
    if inside:
        with te.record() as tape, mode:
            torch.tanh(x)
    else:
        with mode, te.record() as tape:
            torch.tanh(x)
    assert mode.heard.count(torch.ops.aten.tanh.default) == 1
    assert [node.op.name for node in tape.nodes] == ["tanh"]


def gradient_of_rows(f: Any) -> Any:
    return torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))


@pytest.mark.parametrize("transform", [torch.func.vmap, gradient_of_rows])
def test_a_transform_is_recorded_as_what_it_runs(transform: Any) -> None:
    x = torch.rand(3, 4, dtype=torch.float64)
    w = torch.rand(4, dtype=torch.float64)

    def run() -> Tensor:
        made: Tensor = transform(lambda row: torch.tanh(row * w))(x)
        return made.sum()

    with te.record() as tape:
        C = run()
    te.backward(C, wrt=w)
    w.requires_grad_()
    assert torch.allclose(w.g, torch.autograd.grad(run(), w)[0], rtol=1e-12)  # type: ignore[attr-defined]
    other = torch.rand(3, 4, dtype=torch.float64)
    program = tape.program(inputs=(x,), outputs=C)
    x = other
    assert torch.allclose(program(other), run().detach(), rtol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself does, at the first tangent
def test_a_tangent_is_recorded() -> None:
    x, v = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, v)  # type: ignore[no-untyped-call]
            made: Tensor = forward_ad.unpack_dual(torch.tanh(dual)).tangent  # type: ignore[no-untyped-call]
        return made.sum()

    with te.record() as tape:
        C = run(x)
    other = torch.rand(3, dtype=torch.float64)
    assert torch.allclose(tape.program(inputs=(x,), outputs=C)(other), ((1 - torch.tanh(other) ** 2) * v).sum())


def test_autocast_casts() -> None:
    x, w = torch.rand(4, 4), torch.rand(4, 4, requires_grad=True)
    with te.record() as tape, torch.autocast("cpu", torch.bfloat16):
        made = x @ w
    assert made.dtype == torch.bfloat16
    assert [node.op.name for node in tape.nodes] == ["_to_copy", "_to_copy", "mm"]
    assert tape.nodes[-1].outputs[0].dtype == torch.bfloat16


@pytest.mark.parametrize("first", [True, False])
def test_a_tensor_class_of_the_user_is_asked(first: bool) -> None:
    class Loud(Tensor):
        asked: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.asked.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    x = torch.rand(3).as_subclass(Loud)
    with te.record() as tape:
        made = x * torch.ones(3) if first else torch.ones(3) * x
    assert type(made) is Loud
    assert Loud.asked.count("mul") == 1
    assert [node.op.name for node in tape.nodes][-1] == "mul"


def test_a_pause_leaves_it_out(short: list[Any]) -> None:
    x = torch.rand(3)
    with te.record() as tape:
        with te.pause():
            torch.tanh(x)
        torch.sin(x)
    assert short == [torch.sin]
    assert [node.op.name for node in tape.nodes] == ["sin"]


def test_blocks_that_close_in_the_order_in_which_they_were_opened(short: list[Any]) -> None:
    x = torch.rand(3)
    one, two = te.record(), te.record()
    first = one.__enter__()
    second = two.__enter__()
    one.__exit__(None, None, None)
    torch.tanh(x)
    two.__exit__(None, None, None)
    assert ([n.op.name for n in first.nodes], [n.op.name for n in second.nodes]) == ([], ["tanh"])
    assert torch._C._len_torch_function_stack() == 0
    torch.tanh(x)
    assert len(short) == 1


def test_what_listens_for_another_tape_takes_the_short_way_too(short: list[Any]) -> None:
    x, w = torch.rand(3, 3), torch.rand(3, 3)
    with te.record() as before:
        C = (x * w).sum()
    program = before.program(inputs=(x,), outputs=C)
    del short[:]
    with te.record() as tape:
        made = torch.tanh(x * w).sum()
    assert len(short) == 3
    assert [node.op.name for node in tape.nodes] == ["mul", "tanh", "sum"]
    te.backward(made, wrt=w)
    assert torch.allclose(w.g, x * (1 - torch.tanh(x * w) ** 2))  # type: ignore[attr-defined]
    assert torch.allclose(program(x), (x * w).sum())


@pytest.mark.parametrize("batch_first", [True, False])
def test_modules_that_ask_for_a_function_mode_compute_as_without(batch_first: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=batch_first).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = encoder(x), attention(x, x, x)[0]
        with te.record():
            got = encoder(x), attention(x, x, x)[0]
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


# -- what autograd saves unheard -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", "exp exp2 expm1 reciprocal relu rsqrt sigmoid sqrt tan tanh".split())
def test_torch_s_own_backward_in_a_block_finds_the_outputs_that_it_has_saved(name: str, short: list[Any]) -> None:
    x = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        y = getattr(torch, name)(x * 1.5)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (g * g).sum()

    with te.record() as tape:
        C = run(x)
    assert getattr(torch, name) in short
    te.backward(C, wrt=x, keep=True)
    assert torch.allclose(x.g, torch.autograd.grad(run(x), x)[0], rtol=1e-12)  # type: ignore[attr-defined]
    other = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(tape.program(inputs=(x,), outputs=C)(other), run(other).detach(), rtol=1e-12)


def test_an_output_of_another_layout_at_the_same_address_is_not_taken_for_it() -> None:
    x = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    with te.record() as tape:
        y = torch.tanh(x)
        y.t().reshape(-1)
        (g,) = torch.autograd.grad(y[0].exp().sum(), x, create_graph=True)
        C = (g * g).sum()
    other = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(torch.tanh(other)[0].exp().sum(), other)
    assert torch.allclose(tape.program(inputs=(x,), outputs=C)(other), (g * g).sum(), rtol=1e-12)


def test_a_rule_that_reads_no_output_any_more_takes_the_long_way(short: list[Any]) -> None:
    op = registry.find(torch.ops.aten.tanh.default)
    before = op.grad
    assert before is not None
    try:

        @te.rule(torch.ops.aten.tanh.default)
        def tanh_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
            return g / torch.cosh(x) ** 2

        x = torch.rand(3, dtype=torch.float64, requires_grad=True)
        with te.record() as tape:
            (g,) = torch.autograd.grad(torch.tanh(x).sum(), x, create_graph=True)
            C = (g * g).sum()
        assert torch.tanh not in short
        other = torch.rand(3, dtype=torch.float64)
        assert torch.allclose(tape.program(inputs=(x,), outputs=C)(other), ((1 - torch.tanh(other) ** 2) ** 2).sum())
    finally:
        te.rule(torch.ops.aten.tanh.default)(before)
    with te.record():
        torch.tanh(torch.rand(3))
    assert torch.tanh in short


def test_hooks_of_the_user_are_not_called_for_what_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "_found_at", -1)
    heard: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        heard.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), te.record():
        pass
    assert heard == []
    with te.record():
        pass
    assert shortcut._found_at == registry.Op.rules_entered


def test_a_call_that_fails_fails_as_torch_does(short: list[Any]) -> None:
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    with pytest.raises(RuntimeError) as plain:
        x @ y
    with te.record() as tape, pytest.raises(RuntimeError) as recorded:
        x @ y
    assert str(recorded.value) == str(plain.value)
    assert short
    assert tape.nodes == []
    with te.record() as tape:
        torch.tanh(x)
    assert len(tape.nodes) == 1
