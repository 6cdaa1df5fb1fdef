"""What every test of the engine starts from: an empty global tape, nothing open, the rules as they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import tape_engine as te
from tape_engine import modules, recorder, registry


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    """Starts a test on an empty global tape, and holds it to closing what it opened."""
    te.global_tape().clear()
    yield
    assert te.current_tape() is te.global_tape(), "a tape was left open"
    state = recorder.state.state
    assert (state.quiet, state.paused, modules.path()) == (0, 0, ()), (
        "the recorder was left quiet, paused or in a scope"
    )
    assert modules._listeners == 0, "module calls are still listened to"


#: Every operation as it was before the first test that met it, by ``id``: copied once, as there are many of both.
_as_it_was: dict[int, tuple[registry.Op, dict[str, Any]]] = {}


@pytest.fixture(autouse=True)
def rules_as_they_were() -> Iterator[None]:
    """Takes the named operations that a test makes off the table, and puts back the rules that it replaces."""
    named = list(registry._named)
    before = list(registry.ops())
    for each in before:
        if id(each) not in _as_it_was:
            _as_it_was[id(each)] = each, dict(vars(each))
    yield
    registry._named[:] = named
    known = {id(each) for each in before}
    for target, each in list(registry._by_target.items()):
        if id(each) not in known and each.grad is not None:
            del registry._by_target[target]
    for each in before:
        attributes = _as_it_was[id(each)][1]
        if vars(each) != attributes:
            vars(each).clear()
            vars(each).update(attributes)
