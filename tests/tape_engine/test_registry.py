"""Operations of the user's own, and gradient rules for them and for torch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine import registry
from tape_engine.registry import reads
from tests.helpers import Tensor, agree, close, g_of, plain, reference

aten = torch.ops.aten


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(shape, dtype=dtype)


# -- te.op -----------------------------------------------------------------------------------------


def test_the_example_of_the_page() -> None:
    @te.op
    def lin(X: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return X @ w + b

    @lin.rule
    def lin_grad(g: Tensor, Z: Tensor, X: Tensor, w: Tensor, b: Tensor) -> Any:
        return g @ w.t(), X.t() @ g, g.sum(0)

    assert (
        lin_grad(torch.ones(1, 1), None, torch.ones(1, 1), torch.ones(1, 1), None)[0].item() == 1.0
    )  # still a function
    X, w, b = rand(4, 3), rand(3, 2), rand(2)
    with te.record() as tape:
        Z = lin(X, w, b)
    assert [node.op.name for node in tape.nodes] == ["lin"]
    assert tape.nodes[0].rule == "lin_grad"
    te.backward(Z.sum())
    agree([X, w, b], reference(lambda X, w, b: (X @ w + b).sum(), X, w, b))


def test_one_node_a_call_whatever_its_body_does() -> None:
    @te.op
    def busy(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i in range(10):
            total.add_(torch.sin(x * i))
        with te.scope("inside"), te.record() as inner:
            total = total + te.relu(x)
        assert len(inner) == 0
        return total

    x = rand(3)
    with te.record() as tape:
        y = busy(x)
    assert len(tape) == 1
    te.backward(y.sum())
    agree([x], reference(lambda x: torch.stack([torch.sin(x * i) for i in range(10)]).sum() + torch.relu(x).sum(), x))


def test_named_operations_inside_named_operations_are_part_of_their_body() -> None:
    @te.op
    def layer(X: Tensor, w: Tensor) -> Tensor:
        return te.relu(te.lin(X, w))

    @layer.rule
    def layer_grad(g: Tensor, out: Tensor, X: Tensor, w: Tensor) -> Any:
        assert te.relu.grad is not None
        g = te.relu.grad(g, out, None)  # a rule is a function like any other
        return g @ w.t(), X.t() @ g

    X, w = rand(4, 3), rand(3, 2)
    U = layer(X, w)
    assert len(te.global_tape()) == 1
    te.backward(U.sum())
    agree([X, w], reference(lambda X, w: torch.relu(X @ w).sum(), X, w))
    assert len(te.global_tape()) == 0


def scale_op() -> Any:
    @te.op
    def scale(
        x: Tensor, factor: float = 2.0, *, shift: float = 0.0, name: str = "n", other: Tensor | None = None
    ) -> Tensor:
        return x * factor + shift + (0.0 if other is None else other)

    @scale.rule
    def scale_grad(
        g: Tensor, out: Tensor, x: Tensor, factor: float, *, shift: float, name: str, other: Tensor | None
    ) -> Any:
        assert isinstance(factor, float)
        assert isinstance(name, str)
        return g * factor, None if other is None else g

    return scale


@pytest.mark.parametrize(
    ("args", "kwargs", "factor"),
    [
        ((), {}, 2.0),
        ((3.0,), {}, 3.0),
        ((), {"factor": 3.0}, 3.0),
        ((3.0,), {"shift": 1.0}, 3.0),
        ((), {"name": "m", "shift": -1.0, "factor": 4.0}, 4.0),
    ],
)
def test_keywords_and_defaults(args: tuple[Any, ...], kwargs: dict[str, Any], factor: float) -> None:
    scale = scale_op()
    x = rand(3)
    te.backward(scale(x, *args, **kwargs).sum())
    close(x.g, torch.full((3,), factor).double())
    x = rand(3)
    te.backward(scale(*args[1:], x=x, factor=factor, **{k: v for k, v in kwargs.items() if k != "factor"}).sum())
    close(x.g, torch.full((3,), factor).double())


def test_an_optional_tensor_given_by_keyword() -> None:
    scale = scale_op()
    x, other = rand(3), rand(3)
    te.backward(scale(x, other=other).sum())
    close(x.g, torch.full((3,), 2.0).double())
    close(other.g, torch.ones(3).double())


def test_params_are_the_arguments_that_are_not_tensors() -> None:
    scale = scale_op()
    given = rand(3)
    with te.record() as tape:
        scale(given, 3.0, name="m")
    assert tape.nodes[0].params == {"factor": 3.0, "shift": 0.0, "name": "m"}
    (x,) = tape.nodes[0].inputs
    assert x.shape == (3,)


def test_arguments_of_every_kind() -> None:
    @te.op
    def mix(
        tensors: list[Tensor],
        weights: tuple[float, ...],
        table: dict[str, int],
        function: Callable[[Tensor], Tensor],
        nothing: None,
    ) -> Tensor:
        assert table == {"a": 1}
        assert nothing is None
        return sum(w * function(t) for w, t in zip(weights, tensors, strict=True))

    @mix.rule
    def mix_grad(g: Tensor, out: Tensor, tensors: Any, weights: Any, table: Any, function: Any, nothing: None) -> Any:
        return [g * w * torch.cos(t) for w, t in zip(weights, tensors, strict=True)]

    a, b = rand(3), rand(3)
    te.backward(mix([a, b, a], (1.0, 2.0, 3.0), {"a": 1}, torch.sin, None).sum())
    agree([a, b], reference(lambda a, b: (4 * torch.sin(a) + 2 * torch.sin(b)).sum(), a, b))


def test_star_arguments() -> None:
    @te.op
    def total(*tensors: Tensor, factor: float = 1.0) -> Tensor:
        return sum(t.sum() for t in tensors) * factor

    @total.rule
    def total_grad(g: Tensor, out: Tensor, *tensors: Tensor, factor: float) -> Any:
        return tuple((g * factor).expand(t.shape) for t in tensors)

    a, b, c = rand(2), rand(3), rand(2, 2)
    te.backward(total(a, b, c, factor=3.0))
    for t in (a, b, c):
        close(t.g, torch.full(t.shape, 3.0).double())


def test_several_outputs() -> None:
    @te.op
    def polar(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.hypot(x, y), torch.atan2(y, x)

    seen: list[Any] = []

    @polar.rule
    def polar_grad(g: Any, out: Any, x: Tensor, y: Tensor) -> Any:
        seen.append(g)
        assert isinstance(g, tuple)
        assert isinstance(out, tuple)
        r = out[0]
        g_r = torch.zeros_like(x) if g[0] is None else g[0]
        g_a = torch.zeros_like(x) if g[1] is None else g[1]
        return g_r * x / r - g_a * y / r**2, g_r * y / r + g_a * x / r**2

    x, y = rand(3), rand(3)
    r, a = polar(x, y)
    te.backward((r * a).sum(), keep=True)
    agree([x, y], reference(lambda x, y: (torch.hypot(x, y) * torch.atan2(y, x)).sum(), x, y))
    te.backward(a.sum())
    assert seen[-1][0] is None
    agree([x, y], reference(lambda x, y: torch.atan2(y, x).sum(), x, y))
    (only,) = te.op(lambda x: (x * 2,), name="one")(x)  # type: ignore[call-overload]
    te.backward(only.sum())
    close(x.g, torch.full((3,), 2.0).double())


def test_named_tuples_and_lists_come_back_as_they_are() -> None:
    made = te.op(lambda x: x.max(0), name="peak")  # type: ignore[call-overload]
    listed = te.op(lambda x: [x * 1, x * 2], name="listed")  # type: ignore[call-overload]
    x = rand(3)
    best = made(x)
    assert isinstance(best, torch.return_types.max)
    te.backward(best.values)
    assert x.g.sum() == 1.0
    both = listed(x)
    assert isinstance(both, list)
    te.backward(both[1].sum())
    close(x.g, torch.full((3,), 2.0).double())


@pytest.mark.parametrize(
    "way",
    [lambda x: x, lambda x: x.view(3, 1), lambda x: x[1:], lambda x: x.t(), lambda x: x.detach(), lambda x: x.add_(0)],
)
def test_an_operation_that_returns_its_input_or_a_view_of_it(way: Callable[[Tensor], Tensor]) -> None:
    made = te.op(way, name="same")  # type: ignore[call-overload]

    @made.rule  # type: ignore[untyped-decorator]
    def same_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        found = torch.zeros(x.shape, dtype=g.dtype)
        found[-g.numel() :] = g.reshape(-1)
        return found * 10

    x = rand(3)
    y = made(x)
    assert y is not x
    C = (y * 2).sum() + x.sum()
    te.backward(C)
    wanted = torch.full((3,), 21.0).double()
    wanted[: 3 - y.numel()] = 1.0
    close(x.g, wanted)
    close(y.g, torch.full(y.shape, 2.0).double())


def test_the_same_tensor_returned_twice() -> None:
    @te.op
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y

    @twice.rule
    def twice_grad(g: Any, out: Any, x: Tensor) -> Tensor:
        return sum(each * 2 for each in g if each is not None)

    x = rand(3)
    a, b = twice(x)
    te.backward((a + 3 * b).sum())
    close(x.g, torch.full((3,), 8.0).double())


@pytest.mark.parametrize("returned", [None, 3.0, "y", [], (), (1.0,)])
def test_an_operation_that_returns_no_tensor(returned: Any) -> None:
    made = te.op(lambda x: returned, name="nothing")  # type: ignore[call-overload]
    x = rand(3)
    with pytest.raises(te.DTypeError, match="nothing returned") as caught:
        made(x)
    assert isinstance(caught.value, TypeError)
    assert "test_registry.py" in str(caught.value)
    assert len(te.global_tape()) == 0


def test_an_operation_that_raises_keeps_its_exception_and_adds_a_note() -> None:
    @te.op
    def fussy(image: Tensor, size: int) -> Tensor:
        raise KeyError("mine")

    picture = rand(3)
    with pytest.raises(KeyError) as caught:
        fussy(picture, 2)
    assert caught.value.args == ("mine",)
    (note,) = caught.value.__notes__
    assert "fussy" in note
    assert "(3,)  float64" in note
    assert "fussy(picture, 2)" in note
    assert len(te.global_tape()) == 0
    te.backward(te.relu(picture).sum())


@pytest.mark.parametrize("arguments", [((), {}), ((1, 2, 3, 4), {}), ((1,), {"nonsense": 2})])
def test_calls_that_do_not_fit_the_signature(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    with pytest.raises(TypeError) as caught:
        te.lin(*arguments[0], **arguments[1])
    assert "lin" in str(caught.value)
    assert isinstance(caught.value, te.TapeError)
    assert "test_registry.py" in str(caught.value)


@pytest.mark.parametrize("target", [None, 3, "relu", rand(2)])
def test_te_op_takes_a_function(target: Any) -> None:
    with pytest.raises(te.DTypeError):
        te.op()(target)
    if target is not None:
        with pytest.raises(te.DTypeError):
            te.op(target)


def test_te_op_of_builtins_lambdas_partials_methods_and_modules() -> None:
    x = rand(3)

    class Model:
        def forward(self, x: Tensor) -> Tensor:
            return x * 3

    wanted = [torch.sin(x), x * 2, x**3, x * 3, torch.nn.Hardswish()(x)]
    functions = [
        torch.sin,
        lambda x: x * 2,
        functools.partial(torch.pow, exponent=3),
        Model().forward,
        torch.nn.Hardswish(),
    ]
    for function, value in zip(functions, wanted, strict=True):
        made = te.op(function)  # type: ignore[call-overload]
        assert made.name
        y = made(x)
        close(y, value)
        te.backward(y.sum())
        agree([x], reference(lambda x, function=function: function(x).sum(), x))


def test_an_operation_keeps_name_and_doc() -> None:
    @te.op(name="other", formula="x²")
    def square(x: Tensor) -> Tensor:
        """The square."""
        return x * x

    assert square.name == square.__name__ == "other"
    assert square.__doc__ == "The square."
    assert square.formula == "x²"
    assert repr(square) == "<op other>"
    assert square in registry.ops()


def test_a_check_refuses_before_the_operation_runs() -> None:
    ran = []

    def check(x: Tensor) -> None:
        if x.ndim != 1:
            raise te.ShapeError("one dimension, please")

    @te.op(check=check)
    def careful(x: Tensor) -> Tensor:
        ran.append(1)
        return x * 2

    with pytest.raises(te.ShapeError, match="one dimension"):
        careful(rand(2, 2))
    assert ran == []
    careful(rand(2))
    assert ran == [1]


def test_an_operation_in_place_on_its_argument() -> None:
    @te.op
    def bump(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    @bump.rule
    def bump_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * 2

    x, w = rand(3), rand(3)
    before = plain(x)
    z = te.lin(x.unsqueeze(0), torch.eye(3).double())
    y = bump(x)
    close(y, 2 * (before + 1))
    del z, w, y


def test_autograd_sees_through_named_operations_as_before() -> None:
    p = torch.nn.Parameter(rand(3))
    y = te.op(lambda t: torch.sin(t), name="sine")(p)  # type: ignore[call-overload]
    y.sum().backward()
    close(p.grad, torch.cos(plain(p)))


# -- rules -----------------------------------------------------------------------------------------


def test_a_rule_that_returns_one_tensor_a_list_or_a_tuple() -> None:
    for returned in (lambda g: g * 2, lambda g: (g * 2,), lambda g: [g * 2]):
        made = te.op(lambda x: x * 2, name="double")  # type: ignore[call-overload]
        made.rule(lambda g, out, x, returned=returned: returned(g))
        x = rand(3)
        te.backward(made(x).sum())
        close(x.g, torch.full((3,), 2.0).double())


def test_a_rule_that_returns_none_cuts_the_gradient() -> None:
    @te.op
    def gate(x: Tensor, mask: Tensor) -> Tensor:
        return x * mask

    @gate.rule
    def gate_grad(g: Tensor, out: Tensor, x: Tensor, mask: Tensor) -> Any:
        return g * mask, None

    x, m = rand(3), rand(3)
    te.backward(gate(x, te.relu(m)).sum())
    close(x.g, torch.relu(plain(m)))
    assert g_of(m) is None


def test_a_rule_may_be_replaced() -> None:
    made = te.op(lambda x: x * 2, name="double")  # type: ignore[call-overload]
    x = rand(3)
    y = made(x)
    te.backward(y.sum())
    close(x.g, torch.full((3,), 2.0).double())

    @te.rule(made)
    def first_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * 5

    te.backward(made(x).sum())
    close(x.g, torch.full((3,), 5.0).double())

    @made.rule  # type: ignore[untyped-decorator]
    def second_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * 6

    te.backward(made(x).sum())
    close(x.g, torch.full((3,), 6.0).double())


def test_a_rule_registered_after_the_recording_is_used_or_refused() -> None:
    made = te.op(lambda x, y: x * y, name="product")  # type: ignore[call-overload]
    te.rule(made)(lambda g, out, x, y: (g * 3, g * 4))  # reads neither
    x, y = rand(3), rand(3)
    z = made(x, y)
    te.rule(made)(lambda g, out, x, y: (g * y, g * x))
    try:
        te.backward(z.sum())
    except te.TapeError:
        return
    close(x.g, plain(y))


def test_a_rule_gets_descriptions_of_what_it_does_not_read() -> None:
    kinds: list[Any] = []

    @te.op
    def flat(x: Tensor, w: Tensor) -> Tensor:
        return x.reshape(-1) * w

    @flat.rule
    def flat_grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        kinds.append((x.shape, x.dtype, x.device, x.ndim, x.size(0), x.dim(), x.numel(), x.stride()))
        return (g * w).reshape(x.shape), (g * 0).sum().reshape(w.shape)

    x, w = rand(2, 3), rand(1)
    te.backward(flat(x, w).sum())
    assert kinds == [((2, 3), torch.float64, torch.device("cpu"), 2, 2, 2, 6, (3, 1))]


def test_what_a_rule_reads_is_told_from_its_code() -> None:
    def shapes_only(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> Any:
        return g.reshape(x.shape), g.to(y.dtype)

    def one(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> Any:
        return g * y, g.expand(x.size(0), 2)

    def the_output(g: Tensor, out: Tensor, x: Tensor) -> Any:
        return g * out

    def in_a_closure(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> Any:
        return [g * t for t in (lambda: (x,))()], y.shape

    def in_a_comprehension(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> Any:
        return [g * x for _ in range(2)], y.ndim

    def renamed(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> Any:
        z = x
        return g * z.shape[0], y.shape

    def conditional(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> Any:
        return (g * x if y.dtype.is_complex else g), None

    def both(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> Any:
        return g * (x, y)[0].shape[0], None

    def stars(g: Tensor, out: Tensor, *args: Tensor) -> Any:
        return g

    assert reads(shapes_only)[0] == {"g"}
    assert reads(one)[0] == {"g", "y"}
    assert reads(the_output)[0] == {"g", "out"}
    assert reads(in_a_closure)[0] >= {"g", "x"}
    assert "y" not in reads(in_a_closure)[0]
    assert reads(in_a_comprehension)[0] >= {"g", "x"}
    assert reads(renamed)[0] >= {"g", "x"}
    assert reads(conditional)[0] == {"g", "x"}
    assert reads(both)[0] >= {"x", "y"}
    assert reads(stars)[1] is None
    assert reads(functools.partial(one))[1] is None or reads(functools.partial(one))[0] >= {"y"}


RULES_THAT_READ_IN_DISGUISE: list[Callable[..., Any]] = [
    lambda g, out, x: g * eval("x"),
    lambda g, out, x: g * locals()["x"],
    lambda g, out, x: g * (lambda: x)(),
    lambda *a: a[0] * a[2],
    lambda g, *a: g * a[1],
    lambda g, out, x: next(g * t for t in [x]),
    lambda g, out, x: g * x.T.mT,
    lambda g, out, x: g * (x if x.shape else 1),
    lambda g, out, x=None: g * x,
    functools.partial(lambda k, g, out, x: g * x * k, 1.0),
]


@pytest.mark.parametrize("rule", RULES_THAT_READ_IN_DISGUISE, ids=range(len(RULES_THAT_READ_IN_DISGUISE)))
def test_rules_that_read_in_disguise_still_get_the_data(rule: Callable[..., Any]) -> None:
    made = te.op(lambda x: x * x / 2, name="half")  # type: ignore[call-overload]
    made.rule(rule)
    x = rand(3, 3)
    with suppress(te.RuleError):  # refused by name, or right
        te.backward(made(x).sum())
        close(x.g, plain(x))


def test_a_rule_wrapped_by_a_decorator() -> None:
    def logged(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return f(*args, **kwargs)

        return wrapper

    made = te.op(lambda x, y: x * y, name="product")  # type: ignore[call-overload]

    @made.rule  # type: ignore[untyped-decorator]
    @logged
    def product_grad(g: Tensor, out: Tensor, x: Tensor, y: Tensor) -> Any:
        return g * y, g * x

    x, y = rand(3), rand(3)
    te.backward(made(x, y).sum())
    close(x.g, plain(y))
    close(y.g, plain(x))


@pytest.mark.parametrize("bad", [None, 3, "rule"])
def test_a_rule_must_be_a_function(bad: Any) -> None:
    made = te.op(lambda x: x * 2, name="double")  # type: ignore[call-overload]
    with pytest.raises(te.DTypeError, match="double"):
        made.rule(bad)
    with pytest.raises(te.DTypeError):
        te.rule(made)(bad)
    assert made.grad is None


def test_a_rule_of_too_few_parameters() -> None:
    @te.op
    def double(x: Tensor, factor: float) -> Tensor:
        return x * factor

    with pytest.raises(te.RuleError) as caught:

        @double.rule
        def double_grad(g: Tensor) -> Tensor:
            return g * 2

    assert str(caught.value) == (
        "the rule double_grad takes 1 parameters; a rule takes g, the output, then the arguments of double.\n"
        "  fix: def double_grad(g, out, x, factor): ..."
    ) or "takes 1 parameter;" in str(caught.value)
    assert double.grad is None


def test_a_rule_with_other_parameters_than_its_operation_is_named_when_it_fails() -> None:
    @te.op
    def double(x: Tensor, factor: float) -> Tensor:
        return x * factor

    @double.rule
    def double_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * 2

    with pytest.raises(te.RuleError, match="double_grad"):
        te.backward(double(rand(3), 2.0).sum())


# -- rules for torch's own operations --------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [aten.flip.default, aten.flip, torch.flip],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_a_rule_for_an_operation_of_torch(target: Any) -> None:
    @te.rule(target)
    def flip_grad(g: Tensor, out: Tensor, x: Tensor, dims: Any) -> Tensor:
        return g.flip(dims) * 10

    x = rand(3)
    with te.record() as tape:
        C = (x.flip(0) * torch.arange(3)).sum()
    assert tape.nodes[0].rule == "flip_grad"
    te.backward(C)
    close(x.g, torch.tensor([20.0, 10.0, 0.0]).double())


@pytest.mark.parametrize(
    "target",
    [
        torch.add,
        torch.sum,
        torch.mean,
        torch.mm,
        torch.Tensor.exp,
        torch.exp,
        torch.nn.functional.gelu,
        torch.special.i0e,
    ],
    ids=lambda t: t.__name__,
)
def test_functions_of_torch_are_taken_as_targets(target: Any) -> None:
    te.rule(target)(lambda g, out, *args: None)


@pytest.mark.parametrize(
    "target",
    [
        torch.einsum,
        torch.matmul,
        torch.nn.functional.linear,
        torch.nn.functional.cross_entropy,
        aten.matmul.default,
        aten.linear,
        torch.square,
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_a_function_that_runs_as_several_operations_is_refused(target: Any) -> None:
    with pytest.raises(te.MissingRuleError) as caught:
        te.rule(target)(lambda g, out, *args: None)
    text = str(caught.value)
    assert "runs as several operations" in text
    assert "te.op(" in text


def a_plain_function(x: Tensor) -> Tensor:
    return x * 2


def relu(x: Tensor) -> Tensor:
    """Named like an operation of torch, and none."""
    return x.clamp_min(0)


@pytest.mark.parametrize(
    "target",
    [3, None, "flip", a_plain_function, relu, len, torch.nn.ReLU, torch.nn.ReLU(), abs],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_what_is_no_operation_is_refused(target: Any) -> None:
    before = [(each, each.grad) for each in registry.ops()]
    with pytest.raises(te.DTypeError, match="not an operation") as caught:
        te.rule(target)(lambda g, out, *args: None)
    assert "fix: " in str(caught.value)
    assert all(each.grad is grad for each, grad in before), "the rule of something else was replaced"


def test_a_rule_with_samples_on_it() -> None:
    @te.rule(torch.special.i1e, samples=[te.sample(te.spec(3))], formula="i1e", broadcasts=False)
    def i1e_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * (torch.special.i0e(x) - out * (x.sgn() + 1 / x))

    (found,) = registry.records(torch.special.i1e)
    assert found.samples
    assert found.formula == "i1e"
    assert found.broadcasts is False
    x = rand(3)
    with te.record(strict=True):
        C = torch.special.i1e(x).sum()
    te.backward(C)
    agree([x], reference(lambda x: torch.special.i1e(x).sum(), x))


def test_an_operation_of_a_user_s_own_torch_library() -> None:
    library = torch.library.Library("tape_engine_tests", "DEF")  # type: ignore[no-untyped-call]
    library.define("twice(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    target = torch.ops.tape_engine_tests.twice.default
    te.rule(target)(lambda g, out, x: g * 2)
    x = rand(3)
    with te.record() as tape:
        y = torch.ops.tape_engine_tests.twice(x)
    assert tape.nodes[0].op.name == "tape_engine_tests.twice"
    te.backward(y.sum())
    close(x.g, torch.full((3,), 2.0).double())
    library._destroy()  # type: ignore[no-untyped-call]


def test_declared_operations_pass_no_gradient() -> None:
    x = rand(3)
    with te.record() as tape:
        C = (x * (x > 0) * x.argmax() * torch.isnan(x).logical_not()).sum()
    rules = {node.op.name: node.rule for node in tape.nodes}
    assert rules["gt"] == rules["argmax"] == "none"
    te.backward(C)
    agree([x], reference(lambda x: (x * (x > 0) * x.argmax()).sum(), x))


# -- samples ---------------------------------------------------------------------------------------


def test_specs_draw_what_they_describe() -> None:
    generator = torch.Generator().manual_seed(0)
    t = te.spec(200, 3, low=1.0, high=2.0).draw(generator)
    assert t.shape == (200, 3)
    assert t.dtype == torch.float64
    assert 1.0 <= t.min() < 1.1 < 1.9 < t.max() <= 2.0
    i = te.spec(100, dtype=torch.int64, low=0, high=2).draw(generator)
    assert i.dtype == torch.int64
    assert set(i.tolist()) == {0, 1, 2}
    assert te.spec(4, values=[-1.0, 0.0, 1.0, 2.0]).draw().tolist() == [-1.0, 0.0, 1.0, 2.0]
    assert te.spec(100, dtype=torch.bool).draw(generator).float().mean() == pytest.approx(0.5, abs=0.2)
    z = te.spec(5, dtype=torch.complex64).draw(generator)
    assert z.dtype == torch.complex64
    assert z.imag.any()
    assert te.spec().draw().shape == ()
    assert te.spec(0, 3).draw().shape == (0, 3)
