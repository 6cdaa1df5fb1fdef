"""Plans: every overload of ATen that writes has a functional twin that computes the same, or says that it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._ops import OpOverload

from tape_engine.plans import QUICK, Plan, plan_of
from tests.helpers import Overloads, Tensor, plain

aten = torch.ops.aten


def every_overload() -> list[Any]:
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::"):
            continue
        packet, _, overload = name.removeprefix("aten::").partition(".")
        try:
            found.append(getattr(getattr(aten, packet), overload or "default"))
        except (AttributeError, RuntimeError):
            continue
    return found


OVERLOADS = every_overload()


def test_a_plan_can_be_made_of_every_overload() -> None:
    assert len(OVERLOADS) > 2000
    plans = [plan_of(each) for each in OVERLOADS]
    assert all(isinstance(plan, Plan) for plan in plans)
    assert plan_of(aten.add_.Tensor) is plan_of(aten.add_.Tensor)


def test_what_writes_is_recorded_under_what_does_not() -> None:
    writing = [(each, plan_of(each)) for each in OVERLOADS if each._schema.is_mutable]
    assert len(writing) > 800
    for overload, plan in writing:
        if plan.writes and plan.known:
            assert not plan.op.forward._schema.is_mutable, overload  # type: ignore[attr-defined]
            assert len(plan.writes) >= len(plan.outs)


KNOWN: list[tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]] = [
    (aten.add_.Tensor, aten.add.Tensor, (0,), ()),
    (aten.add.out, aten.add.Tensor, ("out",), ("out",)),
    (aten.mul_.Scalar, aten.mul.Scalar, (0,), ()),
    (aten.relu_.default, aten.relu.default, (0,), ()),
    (aten.zero_.default, aten.zero.default, (0,), ()),
    (aten.fill_.Scalar, aten.fill.Scalar, (0,), ()),
    (aten.copy_.default, aten.copy.default, (0,), ()),
    (aten.index_put_.default, aten.index_put.default, (0,), ()),
    (aten.masked_fill_.Scalar, aten.masked_fill.Scalar, (0,), ()),
    (aten.scatter_add_.default, aten.scatter_add.default, (0,), ()),
    (aten.normal_.default, aten.normal_functional.default, (0,), ()),
    (aten.max.dim_max, aten.max.dim, ("max", "max_values"), ("max", "max_values")),
    (aten._foreach_add_.List, aten._foreach_add.List, (0,), ()),
    (aten.addmm_.default, aten.addmm.default, (0,), ()),
    (aten.clamp_.default, aten.clamp.default, (0,), ()),
    (aten.bernoulli_.float, aten.bernoulli.p, (0,), ()),
    (aten.uniform_.default, aten.uniform.default, (0,), ()),
]


@pytest.mark.parametrize(("overload", "twin", "writes", "outs"), KNOWN, ids=[str(row[0]) for row in KNOWN])
def test_the_twins_of_common_writes(overload: Any, twin: Any, writes: tuple[Any, ...], outs: tuple[Any, ...]) -> None:
    plan = plan_of(overload)
    assert plan.known
    assert plan.op.forward is twin
    assert plan.writes == writes
    assert plan.outs == outs


CALLS: list[tuple[Any, Callable[[Tensor], tuple[Any, ...]]]] = [
    (aten.add_.Tensor, lambda x: (x, x * 2)),
    (aten.sub_.Tensor, lambda x: (x, x * 2)),
    (aten.pow_.Scalar, lambda x: (x, 2)),
    (aten.addcmul_.default, lambda x: (x, x * 2, x + 1)),
    (aten.lerp_.Scalar, lambda x: (x, x * 2, 0.3)),
    (aten.clamp_min_.default, lambda x: (x, 0.1)),
    (aten.copy_.default, lambda x: (x, torch.ones(3))),
    (aten.fill_.Tensor, lambda x: (x, torch.tensor(2.0))),
    (aten.zero_.default, lambda x: (x,)),
    (aten.masked_fill_.Tensor, lambda x: (x, x > 0, torch.tensor(5.0))),
    (aten.index_put_.default, lambda x: (x, [torch.tensor([0, 2])], torch.ones(2))),
    (aten.index_fill_.int_Scalar, lambda x: (x, 0, torch.tensor([1]), 4.0)),
    (aten.scatter_.src, lambda x: (x, 0, torch.tensor([0, 0]), torch.ones(2))),
    (aten.scatter_reduce_.two, lambda x: (x, 0, torch.tensor([0, 0]), torch.ones(2), "amax")),
    (aten.cumsum_.default, lambda x: (x, 0)),
    (aten.tril_.default, lambda x: (x.expand(3, 3).clone(),)),
    (aten.t_.default, lambda x: (x.expand(2, 3).clone(),)),
    (aten.squeeze_.default, lambda x: (x.view(1, 3),)),
    (aten.leaky_relu_.default, lambda x: (x, 0.2)),
    (aten.round_.decimals, lambda x: (x,)),
]


@pytest.mark.parametrize(("overload", "arguments"), CALLS, ids=[str(row[0]) for row in CALLS])
def test_twins_compute_the_same(overload: Any, arguments: Callable[[Tensor], tuple[Any, ...]]) -> None:
    x = torch.tensor([-1.0, 0.5, 2.0])
    kwargs = {"decimals": 1} if overload is aten.round_.decimals else {}
    plan = plan_of(overload)
    functional = plan.op.forward(*arguments(plain(x)), **kwargs)
    args = arguments(plain(x))
    overload(*args, **kwargs)
    assert torch.equal(functional, args[0])
    untouched = arguments(plain(x))
    before = plain(untouched[0])
    plan.op.forward(*untouched, **kwargs)
    assert torch.equal(untouched[0], before)


@pytest.mark.parametrize(
    ("overload", "views"),
    [
        (aten.view.default, True),
        (aten.t.default, True),
        (aten.select.int, True),
        (aten.slice.Tensor, True),
        (aten.split.Tensor, True),
        (aten.unbind.int, True),
        (aten.as_strided.default, True),
        (aten._unsafe_view.default, True),
        (aten.detach.default, True),
        (aten.alias.default, True),
        (aten.view_as_real.default, True),
        (aten._conj.default, True),
        (aten.diagonal.default, True),
        (aten.unfold.default, True),
        (aten.expand.default, True),
        (aten.lift_fresh.default, True),
        (aten.add.Tensor, False),
        (aten.clone.default, False),
        (aten.mm.default, False),
        (aten.cat.default, False),
        (aten._to_copy.default, False),
    ],
)
def test_what_may_share_storage(overload: Any, views: bool) -> None:
    assert plan_of(overload).views is views


@pytest.mark.parametrize(
    ("overload", "random"),
    [
        (aten.rand.default, True),
        (aten.randn_like.default, True),
        (aten.bernoulli.default, True),
        (aten.native_dropout.default, True),
        (aten.multinomial.default, True),
        (aten.normal_.default, True),
        (aten.uniform_.default, True),
        (aten.randperm.default, True),
        (aten.zeros.default, False),
        (aten.add.Tensor, False),
        (aten.empty.memory_format, False),
    ],
)
def test_what_draws_from_a_generator(overload: Any, random: bool) -> None:
    assert plan_of(overload).random is random


@pytest.mark.parametrize(
    ("overload", "guard"),
    [
        (aten._local_scalar_dense.default, True),
        (aten.equal.default, True),
        (aten.eq.Tensor, False),
        (aten.nonzero.default, False),
    ],
)
def test_what_asks_a_value_out_of_the_tensors(overload: Any, guard: bool) -> None:
    assert plan_of(overload).guard is guard


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "mm": [(3, 3)] * 2,
    "bmm": [(2, 3, 3)] * 2,
    "mv": [(3, 3), (3,)],
    "dot": [(3,)] * 2,
    "addmm": [(3, 3)] * 3,
}


@pytest.mark.parametrize("overload", QUICK, ids=str)
def test_the_quick_way_to_call_an_overload_calls_that_and_nothing_else(overload: OpOverload) -> None:
    shapes = SHAPES.get(overload._schema.name.removeprefix("aten::"))
    count = sum(str(argument.type) == "Tensor" for argument in overload._schema.arguments)
    args = [torch.rand(shape) for shape in shapes or [(3, 3)] * count]
    with Overloads() as heard:
        quick = QUICK[overload](*args)
    assert heard.heard == [overload]
    torch.testing.assert_close(quick, overload(*args), rtol=0, atol=0)


def test_a_number_in_a_tensors_place_is_no_other_overload() -> None:
    x = torch.rand(3)
    for overload in (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
        with Overloads() as heard:
            quick = QUICK[overload](x, 2.5)
        assert heard.heard == [overload]
        torch.testing.assert_close(quick, overload(x, 2.5), rtol=0, atol=0)
