"""Bad arguments: named, with what is allowed and the nearest of it."""

from __future__ import annotations

from typing import Any

import pytest

import tape_engine as te
import viz

from .examples import article


@pytest.mark.parametrize(
    ("argument", "text", "fix"),
    [
        ({"view": "forwards"}, "view='forwards' is not one of 'both', 'forward', 'backward'.", "view='forward'"),
        ({"detail": "Full"}, "detail='Full' is not one of 'auto', 'full', 'shapes', 'scopes'.", "detail='full'"),
        ({"engine": "neato"}, "engine='neato' is not one of 'auto', 'dot', 'pygraphviz'.", "engine='auto'"),
        ({"rankdir": None}, "rankdir=None is not one of 'TB', 'LR'.", "rankdir='TB'"),
        ({"timeout": 0}, "timeout=0 is not a positive number of seconds.", "timeout=20"),
        ({"timeout": float("nan")}, "timeout=nan is not a positive number of seconds.", "timeout=20"),
        ({"timeout": "5"}, "timeout='5' is not a positive number of seconds.", "timeout=20"),
        ({"timeout": True}, "timeout=True is not a positive number of seconds.", "timeout=20"),
    ],
)
def test_messages(argument: dict[str, Any], text: str, fix: str) -> None:
    tape = article()
    with pytest.raises(viz.OptionError) as found:
        viz.draw(tape, **argument)
    lines = str(found.value).splitlines()
    assert lines[0] == text
    assert lines[1].startswith("  at test_errors.py:")
    assert "viz.draw(tape, **argument)" in lines[1]
    assert lines[-1] == f"  fix: {fix}"
    assert isinstance(found.value, (te.TapeError, ValueError))


def test_every_error_is_a_tape_error_and_a_builtin() -> None:
    for error, builtin in (
        (viz.OptionError, ValueError),
        (viz.LayoutError, RuntimeError),
        (viz.NotSweptError, ValueError),
    ):
        assert issubclass(error, te.TapeError)
        assert issubclass(error, builtin)
