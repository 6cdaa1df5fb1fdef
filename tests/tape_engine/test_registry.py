"""The table of operations: what a rule is told to read, samples, and how operations are entered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine import registry
from tape_engine.registry import DESCRIPTION, Op, Spec, reads, sample, spec
from tape_engine.tape import Value

Tensor = torch.Tensor
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """The table as it was, after a test that enters something."""
    kept = {target: dict(vars(op)) for target, op in registry._by_target.items()}
    named = list(registry._named)
    yield
    registry._named[:] = named
    for target in [t for t in registry._by_target if t not in kept]:
        del registry._by_target[target]
    for target, state in kept.items():
        vars(registry._by_target[target]).update(state)


# -- what a rule reads ---------------------------------------------------------------------------------


def told(function: Any) -> set[str]:
    read, names = reads(function)
    assert names is not None
    return set(read)


def test_only_the_arguments_whose_data_is_used_are_read() -> None:
    def uses_two(g: Any, out: Any, a: Any, b: Any) -> Any:
        return g @ b.t(), a.t() @ g

    def uses_out(g: Any, out: Any, x: Any) -> Any:
        return g * out

    def uses_none(g: Any, out: Any, x: Any, dims: Any = ()) -> Any:
        return -g

    assert told(uses_two) == {"g", "a", "b"}
    assert told(uses_out) == {"g", "out"}
    assert told(uses_none) == {"g"}
    assert reads(uses_none)[1] == ("g", "out", "x", "dims")


def test_a_description_is_not_data() -> None:
    def by_attribute(g: Any, out: Any, x: Any) -> Any:
        return g.expand(x.shape).to(x.dtype) / x.numel() + x.ndim + x.size(0) + len(x.shape) + x.dim() - out.shape[0]

    def and_data(g: Any, out: Any, x: Any) -> Any:
        return g.expand(x.shape) * x

    def by_helper(g: Any, out: Any, x: Any) -> Any:
        return torch.zeros_like(x)

    assert told(by_attribute) == {"g"}
    assert told(and_data) == {"g", "x"}
    assert told(by_helper) == {"x"}


def test_data_read_in_an_inner_function_or_after_an_assignment_is_read() -> None:
    def in_closure(g: Any, out: Any, x: Any) -> Any:
        def inner() -> Any:
            return x * 2

        return g * inner()

    def in_comprehension(g: Any, out: Any, tensors: Any, dim: Any = 0) -> Any:
        return [g * t for t in tensors]

    def renamed(g: Any, out: Any, x: Any) -> Any:
        y = x
        return g * y.shape[0]

    def reassigned(g: Any, out: Any, x: Any) -> Any:
        twice = g * 2
        x = x.reshape(-1)
        return twice * x.shape[0]

    def after_a_store(g: Any, out: Any, x: Any) -> Any:
        twice = g * 2
        return x * twice

    def in_a_branch(g: Any, out: Any, x: Any, p: Any) -> Any:
        return g * x if p else g

    assert "x" in told(in_closure)
    assert "tensors" in told(in_comprehension)
    assert "x" in told(renamed)
    assert "x" in told(reassigned)
    assert "x" in told(after_a_store)
    assert told(in_a_branch) == {"g", "x", "p"}


def test_what_cannot_be_told_counts_as_read() -> None:
    def of_any(g: Any, out: Any, *args: Any) -> Any:
        return g

    def of_names(g: Any, out: Any, **kwargs: Any) -> Any:
        return g

    class Callable:
        def __call__(self, g: Any, out: Any, x: Any) -> Any:
            return g

    for rule in (of_any, of_names, Callable()):
        op = Op(lambda x: x, name="made")
        op.rule(rule)
        assert op.reads_argument(0)
        assert op.reads_argument("x")
        assert op.reads_output


def test_a_keyword_is_a_parameter_like_any_other() -> None:
    def rule(g: Any, out: Any, x: Any, *, weight: Any = None, bias: Any = None) -> Any:
        return g * weight

    op = Op(lambda x: x, name="made")
    op.rule(rule)
    assert [op.reads_argument(key) for key in (0, "weight", "bias", 7)] == [False, True, False, False]
    assert not op.reads_output


def test_a_borrowed_rule_reads_everything_and_a_declared_operation_nothing() -> None:
    op = Op(lambda x: x, name="made")
    assert op.reads_argument(0)
    assert not op.reads_output
    registry.declare(op)
    assert not op.reads_argument(0)


@pytest.mark.parametrize("name", sorted(DESCRIPTION))
def test_a_description_answers_as_the_tensor_does(name: str) -> None:
    for t in (torch.randn(2, 3), torch.zeros(3, dtype=torch.complex128)[::2], torch.tensor(1)):
        asked = [getattr(each, name) for each in (t, Value(t))]
        answers = [each() if callable(each) else each for each in asked]
        assert answers[0] == answers[1]


def test_common_rules_keep_no_more_than_they_should() -> None:
    kept = {
        aten.add.Tensor: set(),
        aten.sum.dim_IntList: set(),
        aten.mean.default: set(),
        aten.view.default: set(),
        aten.expand.default: set(),
        aten.select.int: set(),
        aten.slice.Tensor: set(),
        aten.exp.default: {"out"},
        aten.tanh.default: {"out"},
        aten.sigmoid.default: {"out"},
        aten.relu.default: {"out"},
        aten._softmax.default: {"out"},
        aten._log_softmax.default: {"out"},
        aten.mm.default: {"a", "b"},
        aten.addmm.default: {"a", "b"},
        aten.embedding.default: set(),  # of the weight; the index is needed
        aten.avg_pool2d.default: set(),
        aten.clone.default: set(),
        aten._to_copy.default: set(),
    }
    parameters = {"x", "a", "b", "c", "weight", "out"}
    for target, expected in kept.items():
        op = registry.find(target)
        assert op.saves is not None
        assert op.saves & parameters == expected, target


# -- samples ---------------------------------------------------------------------------------------------


def test_a_spec_draws_what_it_describes() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = spec(50, 2, low=0.5, high=0.75).draw(generator)
    assert drawn.shape == (50, 2)
    assert drawn.dtype == torch.float64
    assert bool(((drawn >= 0.5) & (drawn <= 0.75)).all())
    assert spec(3, values=[1.0, 0.0, -1.0]).draw().tolist() == [1.0, 0.0, -1.0]
    assert spec(2, 2, dtype=torch.int64, values=[1, 2, 3, 4]).draw().tolist() == [[1, 2], [3, 4]]
    numbers = spec(50, dtype=torch.complex128).draw(generator)
    assert numbers.dtype == torch.complex128
    assert numbers.imag.std() > 0.5
    whole = spec(50, dtype=torch.int64, low=0, high=2).draw(generator)
    assert set(whole.tolist()) == {0, 1, 2}
    assert 0 < int(spec(50, dtype=torch.bool).draw(generator).sum()) < 50
    assert spec().draw().shape == ()
    assert spec(0, 3).draw().shape == (0, 3)


def test_a_spec_is_drawn_anew_and_repeatably() -> None:
    one, two = (spec(4).draw(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert spec(3) == Spec((3,))
    assert sample(spec(3), 2, dim=1).kwargs == {"dim": 1}


# -- entering operations ---------------------------------------------------------------------------------


def test_an_op_is_named_after_its_function_and_is_on_the_table() -> None:
    @te.op
    def thrice(x: Tensor) -> Tensor:
        """Three times x."""
        return 3 * x

    assert thrice.name == "thrice"
    assert thrice.__doc__ == "Three times x."
    assert thrice in registry.ops()
    assert thrice.parameters == ("x",)
    assert te.op(name="triple", formula="3 x")(lambda x: 3 * x).name == "triple"


def test_a_rule_replaces_the_one_before_and_keeps_the_samples() -> None:
    before = registry.find(aten.flip.default)
    samples = before.samples
    assert samples

    @te.rule(aten.flip.default)
    def flip_anew_grad(g: Any, out: Any, x: Any, dims: Any) -> Any:
        return g.flip(dims)

    assert before.grad is flip_anew_grad
    assert before.samples == samples


def test_a_torch_function_stands_for_its_overloads() -> None:
    @te.rule(torch.flip)
    def flip_anew_grad(g: Any, out: Any, x: Any, dims: Any) -> Any:
        return g.flip(dims)

    assert registry.find(aten.flip.default).grad is flip_anew_grad


def test_a_function_that_runs_as_several_operations_is_refused() -> None:
    with pytest.raises(te.MissingRuleError, match=r"torch\.chunk runs as several operations"):
        te.rule(torch.chunk)(lambda g, out, x, chunks, dim=0: torch.cat(g, dim))


@pytest.mark.parametrize("target", ["flip", 3, len])
def test_what_is_no_operation_is_refused(target: Any) -> None:
    with pytest.raises(te.DTypeError, match="is not an operation"):
        te.rule(target)(lambda g, out, x: g)


def test_a_rule_takes_g_and_the_output() -> None:
    op = te.op(lambda x: x)
    with pytest.raises(te.RuleError, match="takes 1 parameters; a rule takes g, the output"):
        op.rule(lambda g: g)
    with pytest.raises(te.DTypeError, match="must be a function, not int"):
        op.rule(3)  # type: ignore[arg-type]
    with pytest.raises(te.DTypeError, match="makes an operation of a function, not of int"):
        te.op(3)  # type: ignore[call-overload]


def test_a_rule_makes_a_declared_operation_differentiable_again() -> None:
    op = registry.find(aten.eq.Tensor)
    assert not op.differentiable

    @te.rule(aten.eq.Tensor)
    def eq_grad(g: Any, out: Any, a: Any, b: Any) -> Any:
        return torch.zeros_like(g), torch.zeros_like(g)

    assert op.differentiable


def test_an_overload_has_one_record() -> None:
    assert registry.find(aten.mm.default) is registry.find(aten.mm.default)
    assert registry.find(aten.add.Tensor) is not registry.find(aten.add.Scalar)
    assert registry.find(aten.add.Tensor).name == "add"
    assert registry.find(aten.addmm.default).parameters == ("self", "mat1", "mat2", "beta", "alpha")
