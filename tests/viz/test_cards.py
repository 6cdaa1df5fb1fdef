"""What a card shows of many inputs and outputs."""

from __future__ import annotations

from typing import Any

import pytest

from viz.cards import Cards, chip, first_hidden_port, shown_outputs
from viz.palette import VALUE


def value(name: str = "v", *, read: bool = True, g: bool = False) -> dict[str, Any]:
    return {
        "name": name, "label": name, "shape": (2,), "dtype": "float32", "role": "intermediate", "read": read,
        "g_shape": (2,) if g else None,
    }  # fmt: skip


def facts(inputs: int, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "op": "split", "source": None, "formula": "f", "params": "", "marks": (), "role": "result",
        "rule": "split_grad",
        "inputs": [value(f"x{i}") for i in range(inputs)], "outputs": outputs,
    }  # fmt: skip


@pytest.mark.parametrize(("count", "hidden"), [(0, 0), (1, 1), (8, 8), (9, 7), (50, 7)])
def test_ports_up_to_eight(count: int, hidden: int) -> None:
    assert first_hidden_port(facts(count, [])) == hidden
    card = Cards().operation(facts(count, [value()]))
    assert (f"+{count - hidden} more" in card) == (count > 8)


@pytest.mark.parametrize(
    ("outputs", "shown"),
    [
        ([], []),
        ([value(read=False)], [0]),
        ([value(), value(read=False)], [0]),
        ([value(read=False), value()], [0, 1]),
        ([value(read=False), value(read=False, g=True)], [0, 1]),
        ([value()] * 6, [0, 1, 2]),
        ([value(read=False)] * 3 + [value()], [3]),
    ],
)
def test_outputs_that_matter(outputs: list[dict[str, Any]], shown: list[int]) -> None:
    assert shown_outputs(facts(1, outputs)) == shown
    card = Cards().operation(facts(1, outputs))
    assert (f"+{len(outputs) - len(shown)} more" in card) == (len(outputs) > len(shown))


def test_a_chip_is_round_unless_docked_and_dashed_for_gradients() -> None:
    assert 'style="rounded"' in chip("x", VALUE)
    assert 'style="rounded,dashed"' in chip("x", VALUE, dashed=True)
    assert "style" not in chip("x", VALUE, square=True)
    assert 'port="v0"' in chip("x", VALUE, port="v0")


def test_the_sweep_alone_shows_what_the_rule_does() -> None:
    swept = facts(0, [value("Z", g=True)]) | {"inputs": [value("X", g=True), value("w", g=True), value("k")]}
    card = Cards(forward=False).operation(swept)
    assert "X.g, w.g = split_grad(Z.g, …)" in card
    assert card.count("<b>") == 4
    borrowed = Cards(forward=False).operation(swept | {"rule": "borrowed"})
    assert "vjp of split(Z.g, …)" in borrowed
