"""Warnings: torch's own are shown where they are without a recording."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tape_engine as te


def of_a_gradient(x: torch.Tensor) -> Any:
    return (x * 2).grad  # torch warns in C++, for it is no leaf


def of_a_target(x: torch.Tensor) -> Any:
    return F.mse_loss(x, x[:1])  # warns in Python, for its caller


def of_a_cast(x: torch.Tensor) -> Any:
    return torch.tensor(x)  # a wrapper of the recorder's stands here


def shown(body: Any, action: Any, times: int, *, module: str = "", recorded: bool) -> list[Any]:
    """What is shown of the warnings of some calls, under a filter."""
    globals().pop("__warningregistry__", None)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore" if module else action)
        if module:
            warnings.filterwarnings("always", module="tape_engine")
            warnings.filterwarnings(action, module=module)
        with te.record() if recorded else nullcontext():
            for _ in range(times):
                body(torch.ones(2, requires_grad=True))
    return [(str(each.message), each.category, each.filename, each.lineno) for each in found]


@pytest.mark.parametrize("action", ["always", "default", "module", "once"])
@pytest.mark.parametrize("body", [of_a_gradient, of_a_target])
def test_a_warning_of_torch_s_is_shown_where_it_is_without_a_recording(body: Any, action: str) -> None:
    expected = shown(body, action, 3, recorded=False)
    assert expected
    assert all(filename == __file__ for _, _, filename, _ in expected)
    assert shown(body, action, 3, recorded=True) == expected


def test_each_line_that_calls_for_a_warning_is_told() -> None:
    def body(x: torch.Tensor) -> None:
        F.mse_loss(x, x[:1])
        F.mse_loss(x, x[:1])

    lines = {line for *_, line in shown(body, "default", 2, recorded=True)}
    assert lines == {body.__code__.co_firstlineno + 1, body.__code__.co_firstlineno + 2}


def test_a_warning_below_a_wrapper_is_shown_at_the_user_s_line() -> None:
    ((_, _, filename, line),) = shown(of_a_cast, "default", 2, recorded=True)
    assert (filename, line) == (__file__, of_a_cast.__code__.co_firstlineno + 1)


def test_a_filter_of_the_user_s_module_holds_in_a_block() -> None:
    for action, count in (("ignore", 0), ("always", 1)):
        found = shown(of_a_gradient, action, 1, module=__name__.replace(".", r"\."), recorded=True)
        assert len(found) == count
    with pytest.raises(UserWarning, match="not a leaf"):
        shown(of_a_gradient, "error", 1, module=__name__.replace(".", r"\."), recorded=True)


def test_warnings_are_python_s_own_after_the_block() -> None:
    before = vars(warnings)["_showwarnmsg"]
    with te.record():
        assert vars(warnings)["_showwarnmsg"] is not before
    assert vars(warnings)["_showwarnmsg"] is before
