"""A rule without what nobody asked for gives the same gradients, and computes no more than it must."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tape_engine import registry
from tape_engine.specialise import specialise

FACTOR = 3.0
log: list[str] = []


def note(name: str, result: Any) -> Any:
    log.append(name)
    return result


def straight(g: float, out: float, x: float, y: float) -> Any:
    """A docstring."""
    a = note("a", g * x)
    b = note("b", g * y)
    c = note("c", a + b)
    return note("x", c * FACTOR), note("y", b)


def chained(g: float, out: float, x: float, y: float) -> Any:
    a = b = note("ab", g + x)
    (p, q) = note("p", a), note("q", b)
    return p, q * y


def annotated(g: float, out: float, x: float, y: float) -> Any:
    a: float = note("a", g * x)
    return note("x", a), note("y", g * y)


def branching(g: float, out: float, x: float, y: float) -> Any:
    if x > 1:
        g = note("branch", g * 2)
    return note("x", g * x), note("y", g * y)


def early(g: float, out: float, x: float, y: float) -> Any:
    if x > 1:
        return note("x", g), note("y", g)
    return g * 0, g * 1


def written(g: float, out: float, x: float, y: float) -> Any:
    table = {}
    table["k"] = note("k", g * x)
    return table["k"], note("y", g * y)


def augmented(g: float, out: float, x: float, y: float) -> Any:
    a = g * x
    a += note("plus", 1.0)
    return a, note("y", g * y)


def starred(g: float, out: float, x: float, y: float) -> Any:
    return (*(note("all", (g * x, g * y))),)


def nested(g: float, out: float, x: float, y: float) -> Any:
    def inner(k: float) -> float:
        return k * y

    return inner(g * x), note("y", g)


def rebound(g: float, out: float, x: float, y: float) -> Any:
    a = note("first", g * x)
    b = note("b", a * 2)
    a = note("second", g * y)
    return b, a


def comprehension(g: float, out: float, x: float, y: float) -> Any:
    parts = [note("part", g * each) for each in (x, y)]
    return parts[0], parts[1]


def defaults(g: float, out: float, x: float, y: float, k: float = 2.0, *, m: float = 5.0) -> Any:
    return note("x", g * k), note("y", g * m)


def walrus(g: float, out: float, x: float, y: float) -> Any:
    return note("x", (a := g * x)), note("y", a * y)


def side_effect(g: float, out: float, x: float, y: float) -> Any:
    note("effect", None)
    return note("x", g * x), note("y", g * y)


def raising(g: float, out: float, x: float, y: float) -> Any:
    assert x < 100, "too large"
    return note("x", g * x), note("y", g * y)


def with_block(g: float, out: float, x: float, y: float) -> Any:
    with warnings.catch_warnings():
        a = g * x
    return a, note("y", g * y)


def looped(g: float, out: float, x: float, y: float) -> Any:
    total = 0.0
    for k in range(3):
        total = total + note("step", g * k)
    return total * x, note("y", g * y)


def closing(k: float) -> Callable[..., Any]:
    m = k * 2

    def closed(g: float, out: float, x: float, y: float) -> Any:
        a = g * k
        return note("x", a * x), note("y", g * m * y)

    return closed


RULES = [
    straight,
    chained,
    annotated,
    branching,
    early,
    written,
    augmented,
    starred,
    nested,
    rebound,
    comprehension,
    defaults,
    walrus,
    side_effect,
    raising,
    with_block,
    looped,
    closing(2.0),
    closing(7.0),
    lambda g, out, x, y: (note("x", g * x), note("y", g * y)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("x", [0.5, 2.0])
def test_what_is_asked_for_is_unchanged(rule: Callable[..., Any], needs: tuple[bool, bool], x: float) -> None:
    wanted = rule(2.0, None, x, 3.0)
    got = specialise(rule, needs)(2.0, None, x, 3.0)
    assert len(got) == len(wanted)
    for g, w, need in zip(got, wanted, needs, strict=True):
        if need:
            assert g == w


@pytest.mark.parametrize(
    ("rule", "needs", "evaluated"),
    [
        (straight, (True, True), ["a", "b", "c", "x", "y"]),
        (straight, (False, True), ["b", "y"]),
        (straight, (True, False), ["a", "b", "c", "x"]),
        (annotated, (False, True), ["y"]),
        (side_effect, (False, True), ["effect", "y"]),
        (rebound, (False, True), ["second"]),
        (defaults, (True, False), ["x"]),
        (closing(2.0), (True, False), ["x"]),
        (closing(2.0), (False, True), ["y"]),
    ],
)
def test_what_is_not_asked_for_is_not_computed(
    rule: Callable[..., Any], needs: tuple[bool, bool], evaluated: list[str]
) -> None:
    made = specialise(rule, needs)
    log.clear()
    made(2.0, None, 3.0, 4.0)
    assert log == evaluated


def test_closures_of_one_source_are_told_apart() -> None:
    two, seven = (specialise(closing(k), (True, False))(1.0, None, 1.0, 1.0)[0] for k in (2.0, 7.0))
    assert (two, seven) == (2.0, 7.0)


def test_a_global_is_read_when_the_rule_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = specialise(straight, (True, False))
    before = made(1.0, None, 1.0, 1.0)[0]
    monkeypatch.setitem(globals(), "FACTOR", 30.0)
    assert made(1.0, None, 1.0, 1.0)[0] == 10 * before


def test_a_closure_cell_changed_later_is_seen() -> None:
    k = 1.0

    def rule(g: float, out: float, x: float, y: float) -> Any:
        return g * k, g

    made = specialise(rule, (True, False))
    assert made(1.0, None, 0.0, 0.0)[0] == 1.0
    k = 5.0
    assert made(1.0, None, 0.0, 0.0)[0] == 5.0


def test_a_rule_without_source_is_run_whole() -> None:
    space: dict[str, Any] = {}
    exec("def rule(g, out, x, y):\n    return g * x, g * y", space)
    assert specialise(space["rule"], (True, False))(2.0, None, 3.0, 4.0)[0] == 6.0
    assert specialise(max, (True, False)) is max


def test_two_lambdas_on_one_line_are_not_confused() -> None:
    first, second = (lambda g, out, x, y: (g * 1, g * 2)), (lambda g, out, x, y: (g * 3, g * 4))
    assert specialise(first, (True, False))(1.0, None, 0.0, 0.0)[0] == 1.0
    assert specialise(second, (True, False))(1.0, None, 0.0, 0.0)[0] == 3.0


def test_a_function_redefined_under_the_same_name() -> None:
    def make(k: int) -> Callable[..., Any]:
        if k == 1:

            def rule(g: float, out: float, x: float, y: float) -> Any:
                return g * 1, g

        else:

            def rule(g: float, out: float, x: float, y: float) -> Any:
                return g * 2, g

        return rule

    assert specialise(make(1), (True, False))(1.0, None, 0.0, 0.0)[0] == 1.0
    assert specialise(make(2), (True, False))(1.0, None, 0.0, 0.0)[0] == 2.0


def test_everything_asked_for_is_the_rule_itself() -> None:
    assert specialise(straight, (True, True)) is straight
    assert specialise(straight, (True, False)) is specialise(straight, (True, False))


def test_errors_of_a_specialised_rule_point_at_its_source() -> None:
    made = specialise(raising, (False, True))
    with pytest.raises(AssertionError, match="too large") as caught:
        made(1.0, None, 200.0, 1.0)
    assert caught.traceback[-1].name == "raising"


def two_gradients() -> list[Any]:
    found = []
    for op in registry.ops():
        if op.grad is not None and op.samples:
            found += [(op, sample) for sample in op.samples[:2]]
    return found


SAMPLES = two_gradients()


@given(data=st.data())
def test_registered_rules_specialised(data: st.DataObject) -> None:
    op, sample = data.draw(st.sampled_from(SAMPLES), label="rule")
    generator = torch.Generator().manual_seed(0)

    def drawn(argument: Any) -> Any:
        if isinstance(argument, registry.Spec):
            return argument.draw(generator)
        if isinstance(argument, (list, tuple)):
            return type(argument)(drawn(each) for each in argument)
        return argument

    args = tuple(drawn(each) for each in sample.args)
    kwargs = {name: drawn(each) for name, each in sample.kwargs.items()}
    if op.is_named:
        args, kwargs = op.bind(args, kwargs)
    out = op.forward(*args, **kwargs)
    several = isinstance(out, (tuple, list))
    g: Any = (
        tuple(
            torch.ones_like(each) if each is not None and (each.is_floating_point() or each.is_complex()) else None
            for each in out
        )
        if several
        else torch.ones_like(out)
    )
    whole = op.grad(g, tuple(out) if several else out, *args, **kwargs)
    if not isinstance(whole, tuple) or len(whole) < 2:
        return
    needs = tuple(data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole)), label="needs"))
    part = specialise(op.grad, needs)(g, tuple(out) if several else out, *args, **kwargs)
    assert len(part) == len(whole)
    for some, all_, need in zip(part, whole, needs, strict=True):
        if need and isinstance(all_, torch.Tensor):
            assert torch.equal(torch.nan_to_num(some), torch.nan_to_num(all_))
