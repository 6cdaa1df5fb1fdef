"""Every operation that the kernels do, one program each, against torch: its numbers, layouts, dtypes and odd shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tape_engine as te
from tape_engine.program.backends import native
from tape_engine.program.backends.native.ops import LOWERED
from tests.tape_engine.program.common import F32, F64, draw

pytestmark = pytest.mark.skipif(not native.available(), reason="llvmlite, an extra, is not installed")

Tensor = torch.Tensor
aten = torch.ops.aten
Function = Callable[..., Any]

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-30,
    -1e-30,
    0.5,
    -0.5,
    3.0,
    20.0,
    -20.0,
    88.0,
    -88.0,
    104.0,
    -104.0,
    1e-5,
    -1e-5,
    1e5,
    2.5,
    -3.0,
    0.1,
]


def program_of(function: Function, *inputs: Tensor) -> te.Program:
    """A program of `function` alone, all of it in segments; two more operations make it worth one."""
    with te.record() as tape, torch.no_grad():
        result = function(*inputs)
        made = result if isinstance(result, tuple) else (result,)
    program: te.Program = tape.program(inputs=inputs, outputs=tuple(made), backend="native")
    return program


def same(got: Tensor, wanted: Tensor, tol: float | None = None) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    tol = tol or {F32: 2e-6, F64: 2e-14}.get(wanted.dtype, 0.0)
    torch.testing.assert_close(got, wanted, rtol=tol, atol=tol, equal_nan=True)


@pytest.fixture(autouse=True)
def segments_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation is worth a segment here."""
    monkeypatch.setattr("tape_engine.program.backends.native.plan.LEAST", 1)


def compare(function: Function, recorded: Sequence[Tensor], given: Sequence[Tensor], tol: float | None = None) -> None:
    """A replay on other inputs gives what torch gives, without a call of torch."""
    program = program_of(function, *recorded)
    for inputs in (recorded, given):
        wanted = function(*inputs)
        for g, w in zip(program(*inputs), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            same(g, w, tol)
    told = program._forward.native
    assert told is not None
    assert told.torch == 0, str(told)


UNARY: dict[str, Function] = {
    "neg": torch.neg,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "atan": torch.atan,
    "abs": torch.abs,
    "erf": torch.erf,
    "sign": torch.sign,
    "sgn": torch.sgn,
    "silu": F.silu,
    "relu": torch.relu,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "root": lambda x: x**0.5,
    "inverse": lambda x: x**-1,
    "inverse root": lambda x: x**-0.5,
    "power": lambda x: x**2.3,
    "first power": lambda x: x**1,
    "scalar power": lambda x: 1.5**x,
    "add": lambda x: x + 1.5,
    "add alpha": lambda x: torch.add(x, 2.0, alpha=3),
    "subtract": lambda x: 2 - x,
    "subtract alpha": lambda x: torch.rsub(x, 2.0, alpha=0.5),
    "multiply": lambda x: x * 3,
    "divide": lambda x: x / 3,
    "divided": lambda x: 3 / x,
    "clamp": lambda x: x.clamp(-1.0, 1.5),
    "clamp below": lambda x: x.clamp(min=0.5),
    "clamp above": lambda x: x.clamp(max=0.5),
    "hardtanh": F.hardtanh,
    "clamp_min": lambda x: torch.clamp_min(x, 0.5),
    "clamp_max": lambda x: torch.clamp_max(x, 0.5),
    "softplus": F.softplus,
    "softplus of a slope": lambda x: F.softplus(x, 2.0, 5.0),
    "isnan": torch.isnan,
    "eq": lambda x: x == 0.5,
    "ne": lambda x: x != 0.5,
    "lt": lambda x: x < 0.5,
    "le": lambda x: x <= 0.5,
    "gt": lambda x: x > 0.5,
    "ge": lambda x: x >= 0.5,
    "clone": torch.clone,
    "to float64": lambda x: (x * 2).to(F64) * 2,
    "to float32": lambda x: (x * 2).to(F32) * 2,
    "to bool": lambda x: x.to(torch.bool),
    "nought": lambda x: x * 0,
    "where": lambda x: torch.where(x > 0, x, -1.0),
    "not": lambda x: (x > 0).logical_not(),
    "masked": lambda x: x.masked_fill(x > 0, 2.0),
    "of a mask": lambda x: (x > 0).to(x.dtype) * 2,
    "tanh_backward": lambda x: aten.tanh_backward(x, x),
    "sigmoid_backward": lambda x: aten.sigmoid_backward(x, x),
    "silu_backward": lambda x: aten.silu_backward(x, x / 9),
    "softplus_backward": lambda x: aten.softplus_backward(x, x / 9, 1.5, 20.0),
    "threshold_backward": lambda x: aten.threshold_backward(x, x + 1, 0.5),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", UNARY)
def test_of_one(name: str, dtype: torch.dtype) -> None:
    function = UNARY[name]
    special = torch.tensor(SPECIAL, dtype=dtype)
    # of huge arguments the C library's sine is right, torch's own is not to the last digit
    tol = 2e-5 if dtype == F32 and name in ("tan", "power", "scalar power") else 2e-12 if name == "tan" else None
    compare(function, [torch.ones(24, dtype=dtype)], [special], tol)
    compare(function, [draw(3, 5, dtype=dtype)], [draw(3, 5, dtype=dtype) * 3], tol)


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_functions_are_right_to_the_last_digits(name: str, dtype: torch.dtype) -> None:
    """Against float64, or for float64 torch's own, in units of the last place."""
    eps = torch.finfo(dtype).eps
    program = program_of(UNARY[name], torch.ones(4000, dtype=dtype))
    for scale in (1e-6, 1e-2, 1.0, 30.0, 300.0):
        x = (draw(4000) * scale).to(dtype)
        (got,) = program(x)
        wanted = UNARY[name](x.double())
        normal = wanted.isfinite() & (wanted.abs() > torch.finfo(dtype).tiny) & (wanted.abs() < torch.finfo(dtype).max)
        error = ((got.double() - wanted) / wanted)[normal].abs()
        assert error.numel() == 0 or error.max() <= 4 * eps, (name, scale, error.max() / eps)
        assert torch.equal(got.isnan(), wanted.isnan())


@pytest.mark.parametrize("name", ["relu", "expm1", "tanh", "sqrt", "sin", "neg"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_sign_of_nought_is_torchs(name: str, dtype: torch.dtype) -> None:
    """What is divided by it later is infinite one way or the other."""
    function = UNARY[name]
    noughts = torch.tensor([-0.0, 0.0], dtype=dtype).repeat(10)
    (got,) = program_of(function, torch.ones(20, dtype=dtype))(noughts)
    assert torch.equal(got.signbit(), function(noughts).signbit())


@pytest.mark.parametrize("name", ["addcmul", "addcdiv"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_product_is_scaled_before_it_can_be_too_large(name: str, dtype: torch.dtype) -> None:
    large = torch.finfo(dtype).max / 4
    other = 8.0 if name == "addcmul" else 1 / 8
    function = getattr(torch, name)
    given = [torch.tensor([each] * 20, dtype=dtype) for each in (1.0, large, other)]
    compare(lambda a, b, c: function(a, b, c, value=0.25), [draw(20, dtype=dtype) for _ in given], given)


BINARY: dict[str, Function] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "atan2": torch.atan2,
    "pow": lambda a, b: a.abs() ** b,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "where": lambda a, b: torch.where(a > b, a, b * 2),
    "add alpha": lambda a, b: torch.add(a, b, alpha=0.5),
    "sub alpha": lambda a, b: torch.sub(a, b, alpha=2),
    "clamp": lambda a, b: a.clamp(b, b + 1),
    "clamp below": lambda a, b: a.clamp(min=b),
    "clamp above": lambda a, b: a.clamp(max=b),
    "addcmul": lambda a, b: torch.addcmul(a, b, a, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, a),
    "masks": lambda a, b: ((a > 0) & (b > 0)) | ((a < -1) ^ (b < -1)),
    "logic": lambda a, b: torch.logical_xor(torch.logical_and(a, b), torch.logical_or(a > 0, b > 0)),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", BINARY)
def test_of_two(name: str, dtype: torch.dtype) -> None:
    function = BINARY[name]
    tol = 2e-5 if dtype == F32 and name == "pow" else 1e-12 if name == "pow" else None
    special = torch.tensor(SPECIAL, dtype=dtype)
    pairs = torch.cartesian_prod(special, special)
    compare(
        function,
        [torch.ones(len(pairs), dtype=dtype)] * 1 + [draw(len(pairs), dtype=dtype)],
        [pairs[:, 0].clone(), pairs[:, 1].clone()],
        tol,
    )
    for one, other in [((3, 5), (5,)), ((3, 1), (1, 5)), ((4, 3, 5), (3, 1)), ((), (3, 5)), ((0, 3), (1, 3)), ((), ())]:
        recorded = [draw(*one, dtype=dtype), draw(*other, dtype=dtype)]
        compare(function, recorded, [draw(*one, dtype=dtype), draw(*other, dtype=dtype)], tol)
    turned = [draw(5, 3, dtype=dtype).t(), draw(3, 10, dtype=dtype)[:, ::2]]
    compare(function, turned, [draw(5, 3, dtype=dtype).t(), draw(3, 10, dtype=dtype)[:, ::2]], tol)


WHOLE: dict[str, Function] = {
    "arithmetic": lambda a, b: (a + b) * a - b,
    "square": lambda a, b: a**2 + b**3,
    "largest": torch.maximum,
    "neg": lambda a, b: -a + b,
    "order": lambda a, b: a < b,
    "where": lambda a, b: torch.where(a > b, a, b),
    "to float": lambda a, b: a.float() * b.double(),
    "fraction": lambda a, b: a / (b * b + 1),
    "relu": lambda a, b: a.relu(),
    "sum": lambda a, b: (a.sum(0), b.amax(1), (a > b).sum(), (a > 2).any(0), (b < 9).all(), a.amin()),
    "mixed": lambda a, b: a * 1.5 + b,
    "bits": lambda a, b: (a & b) | (a ^ b),
    "shift": lambda a, b: a * 2**40 + b,
}


@pytest.mark.parametrize("name", WHOLE)
def test_of_whole_numbers(name: str) -> None:
    both = [[torch.randint(-9, 9, (4, 3)), torch.randint(-9, 9, (4, 3))] for _ in range(2)]
    compare(WHOLE[name], both[0], both[1])


@pytest.mark.parametrize("name", ["integer division", "remainder", "to whole numbers"])
def test_what_whole_numbers_do_in_their_own_way_stays_with_torch(name: str) -> None:
    functions: dict[str, Function] = {
        "integer division": lambda a, b: (a + 1) // (b * b + 1) * 2,
        "remainder": lambda a, b: (a + 1) % (b * b + 1) * 2,
        "to whole numbers": lambda a, b: (a * 1.7).long() + b,
    }
    function = functions[name]
    a, b = torch.randint(-9, 9, (4, 3)), torch.randint(-9, 9, (4, 3))
    program = program_of(function, a, b)
    a, b = torch.randint(-9, 9, (4, 3)), torch.randint(-9, 9, (4, 3))
    same(program(a, b)[0], function(a, b))
    told = program._forward.native
    assert told is not None
    assert told.torch == 1


SHAPES: dict[str, Function] = {
    "t": lambda x: x[0].t() * 2,
    "transpose": lambda x: x.transpose(0, 2) + 1,
    "permute": lambda x: x.permute(2, 0, 1) * x.permute(2, 0, 1),
    "view": lambda x: x.view(6, 4) + 1,
    "reshape": lambda x: x.transpose(0, 1).reshape(-1) * 2,
    "unsqueeze": lambda x: x.unsqueeze(1) * x.unsqueeze(0),
    "squeeze": lambda x: x[:1].squeeze(0) + 1,
    "expand": lambda x: x[:, :1].expand(2, 3, 4) * x,
    "select": lambda x: x[1, :, 2] * x[0, :, -1],
    "slice": lambda x: x[:, 1:, ::2] + x[:, :-1, 1::2],
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "stack": lambda x: torch.stack([x, x * 2], -1),
    "turned results": lambda x: ((x * 2).transpose(0, 1), (x[1] + 1).t()),
    "select_backward": lambda x: aten.select_backward(x[0], [3, 5, 4], 1, -2),
    "slice_backward": lambda x: aten.slice_backward(x, [2, 9, 4], 1, 2, 8, 2),
    "flatten": lambda x: x.permute(1, 2, 0).flatten(1) * 2,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    compare(SHAPES[name], [draw(2, 3, 4)], [draw(2, 3, 4)])
    compare(SHAPES[name], [draw(2, 3, 4, dtype=F32)], [draw(2, 3, 4, dtype=F32)])


REDUCED: dict[str, Function] = {
    "sum": lambda x: x.sum(),
    "sum 0": lambda x: x.sum(0),
    "sum 1": lambda x: x.sum(1),
    "sum -1": lambda x: x.sum(-1),
    "sum two": lambda x: x.sum((0, 2)),
    "sum kept": lambda x: x.sum((1, 2), keepdim=True),
    "mean": lambda x: x.mean(),
    "mean 1": lambda x: x.mean(1),
    "mean kept": lambda x: x.mean((0, 1), keepdim=True),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 2)),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "sum turned": lambda x: x.transpose(0, 2).sum(1),
    "in float64": lambda x: x.sum(1, dtype=F64),
    "softmax": lambda x: x.softmax(-1),
    "softmax 0": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(1),
    "softmax_backward": lambda x: aten._softmax_backward_data(x, x.abs(), 1, x.dtype),
    "log_softmax_backward": lambda x: aten._log_softmax_backward_data(x, -x.abs(), 2, x.dtype),
    "sum of expanded": lambda x: x[0, 0, 0].expand(3, 4).sum(),
    "any": lambda x: (x > 1).any(1),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", REDUCED)
def test_totals(name: str, dtype: torch.dtype) -> None:
    for shape in ((3, 4, 5), (1, 1, 1), (2, 33, 70)):
        compare(
            REDUCED[name], [draw(*shape, dtype=dtype)], [draw(*shape, dtype=dtype)], 1e-5 if dtype == F32 else 1e-12
        )


@pytest.mark.parametrize("name", ["sum", "sum 1", "mean", "amax", "amin", "max", "min", "softmax"])
def test_totals_of_special_numbers(name: str) -> None:
    for special in (math.nan, math.inf, -math.inf):
        x = draw(3, 4, 5)
        x[1, 2, 3] = special
        compare(REDUCED[name], [draw(3, 4, 5)], [x])


def test_sums_of_nothing() -> None:
    compare(lambda x: (x.sum(0), x.sum(), x.sum(1) + 1), [draw(0, 3)], [draw(0, 3)])


PRODUCTS: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "mm": (lambda a, b: a @ b, [(3, 4), (4, 5)]),
    "mm of one column": (lambda a, b: a @ b, [(9, 40), (40, 1)]),
    "mm to one row": (lambda a, b: a @ b, [(1, 40), (40, 9)]),
    "outer": (lambda a, b: a @ b, [(9, 1), (1, 20)]),
    "mm turned": (lambda a, b: a.t() @ b.t(), [(4, 3), (5, 4)]),
    "mm of nothing": (lambda a, b: a @ b, [(3, 0), (0, 5)]),
    "mm of lines": (lambda a, b: a.t() @ b, [(30, 17), (30, 1)]),
    "mm wide": (lambda a, b: a @ b.t(), [(6, 10), (33, 10)]),
    "mm to a turned": (lambda a, b: (a @ b).t() * 2, [(3, 4), (4, 5)]),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "bmm expanded": (lambda a, b: a @ b, [(2, 3, 4), (4, 5)]),
    "mv": (torch.mv, [(3, 20), (20,)]),
    "mv turned": (lambda a, b: a.t() @ b, [(3, 20), (3,)]),
    "dot": (torch.dot, [(33,), (33,)]),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b), [(5,), (3, 4), (4, 5)]),
    "linear": (lambda x, w, b: F.linear(x, w, b), [(3, 4), (5, 4), (5,)]),
    "baddbmm": (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)]),
    "addmv": (torch.addmv, [(3,), (3, 4), (4,)]),
    "matmul of stacks": (torch.matmul, [(2, 2, 3, 4), (2, 2, 4, 5)]),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype) -> None:
    function, shapes = PRODUCTS[name]
    both = [[draw(*shape, dtype=dtype) for shape in shapes] for _ in range(2)]
    compare(function, both[0], both[1], 1e-5 if dtype == F32 else 1e-12)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_products_of_special_numbers(special: float) -> None:
    a, b = draw(3, 20), draw(20, 4)
    a[1, 7] = special
    compare(lambda a, b: (a @ b, b.t() @ a.t()), [draw(3, 20), draw(20, 4)], [a, b], 1e-12)


PICKED: dict[str, Function] = {
    "index": lambda x, i: x[i] * 2,
    "index_select": lambda x, i: x.index_select(0, i),
    "embedding": lambda x, i: F.embedding(i, x),
    "embedding of a table": lambda x, i: F.embedding(i.view(2, 3), x),
    "index of a vector": lambda x, i: x[:, 1][i] + 1,
    "index_put": lambda x, i: torch.zeros(4, 3, dtype=x.dtype).index_put((i,), x[i], accumulate=True) * 2,
    "index_add": lambda x, i: x.index_add(0, i, x[i] * 2),
    "index of a stack": lambda x, i: x.view(4, 3, 1)[i].sum(0),
}


@pytest.mark.parametrize("name", PICKED)
def test_picked_by_indices(name: str) -> None:
    for dtype in (F32, F64):
        one, other = torch.tensor([0, 3, 1, 1, -1, 2]), torch.tensor([2, 2, 0, -4, 3, 1])
        if "embedding" in name or "select" in name or "add" in name:
            one, other = one % 4, other % 4
        compare(PICKED[name], [draw(4, 3, dtype=dtype), one], [draw(4, 3, dtype=dtype), other])


@pytest.mark.parametrize("wrong", [4, -5, 2**40])
@pytest.mark.parametrize("name", ["index", "index_put"])
def test_an_index_out_of_range_is_refused(name: str, wrong: int) -> None:
    x, i = draw(4, 3), torch.tensor([0, 3, 1, 1, 2, 2])
    program = program_of(PICKED[name], x, i)
    bad = i.clone()
    bad[3] = wrong
    for _ in range(2):
        with pytest.raises(IndexError, match="out of range"):
            program(x, bad)
        same(program(x, i)[0], PICKED[name](x, i))


def test_every_kernel_function_is_tested() -> None:
    """The tables above reach every overload that there is a lowering function for."""
    both = [draw(3, 5).abs(), draw(3, 5)]
    whole = [torch.randint(-9, 9, (4, 3)), torch.randint(-9, 9, (4, 3))]
    indices = torch.tensor([0, 3, 1, 1, 2, 2])
    runs: list[tuple[Function, Sequence[Tensor]]] = [(f, both[:1]) for f in UNARY.values()]
    runs += [(f, both) for f in BINARY.values()]
    runs += [(f, whole) for f in WHOLE.values()]
    runs += [(f, [draw(2, 3, 4)]) for f in (*SHAPES.values(), *REDUCED.values())]
    runs += [(f, [draw(*shape) for shape in shapes]) for f, shapes in PRODUCTS.values()]
    runs += [(f, [draw(4, 3), indices]) for f in PICKED.values()]
    with te.record() as tape:
        for function, tensors in runs:
            function(*tensors)
    reached = {node.op.forward for node in tape.nodes}
    twins = {
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.rsub.Tensor,
        aten.square.default,
        aten.where.ScalarSelf,
        aten.where.Scalar,
        aten.where.ScalarOther,
        aten.masked_fill.Tensor,
        aten.pow.Tensor_Tensor,
        aten.reshape.default,
        aten._reshape_alias.default,
        aten.squeeze.default,
        aten.squeeze.dims,
        aten.any.default,
        aten.any.dims,
        aten.all.dims,
        aten.all.dim,
        aten.all.default,
        aten.bitwise_not.default,
        aten._unsafe_view.default,
        aten.clamp_max.Tensor,
        aten.clamp_min.Tensor,
        aten.clamp.Tensor,
    }
    assert {str(each) for each in LOWERED.keys() - reached - twins} == set()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("operation", [torch.add, torch.sub])
def test_a_scaled_term_is_rounded_with_the_sum(operation: Function, dtype: torch.dtype) -> None:
    """A product too large for a number is none where the sum is infinite anyway, nor where it is not so large."""
    huge = torch.finfo(dtype).max
    a = torch.tensor([math.inf, -math.inf, math.inf, -huge, huge, 1.0, math.nan] * 5, dtype=dtype)
    b = torch.tensor([huge, huge, -huge, huge, -huge, huge, 1.0] * 5, dtype=dtype)
    for alpha in (2.0, -2.0):
        program = program_of(lambda a, b, alpha=alpha: operation(operation(a, b, alpha=alpha), b * 0 + 1), a, b)
        assert "native" in program.code
        wanted = operation(operation(a, b, alpha=alpha), b * 0 + 1)
        torch.testing.assert_close(program(a, b)[0], wanted, equal_nan=True, rtol=0, atol=0)
