"""What every test of the engine starts from, and leaves behind: an empty global tape, and nothing open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tape_engine as te
from tape_engine import modules, recorder


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    """Starts a test on an empty global tape, and holds it to closing what it opened."""
    te.global_tape().clear()
    yield
    assert te.current_tape() is te.global_tape(), "a tape was left open"
    state = recorder._state
    assert (state.quiet, state.paused, state.scope) == (0, 0, ()), "the recorder was left quiet, paused or in a scope"
    assert modules._listeners == 0, "module calls are still listened to"
