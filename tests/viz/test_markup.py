"""Texts in labels: escaped, shortened, wrapped; what XML forbids does not reach Graphviz."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viz.layout import render
from viz.markup import counted, html, quoted, shape_text, shorten, wrapped


@pytest.mark.parametrize(
    ("shape", "text"), [((64, 784), "(64, 784)"), ((1,), "(1,)"), ((), "()"), ((0, 3), "(0, 3)"), (None, "")]
)
def test_shapes(shape: tuple[int, ...] | None, text: str) -> None:
    assert shape_text(shape) == text


@given(st.text())
def test_any_text_is_well_formed_inside_markup(text: str) -> None:
    seen = "".join(ET.fromstring(f"<td>{html(text)}</td>").itertext())
    if all(char == "\n" or (char.isprintable() and char != "\r") for char in text):
        assert seen == text.replace("\n", " ")


@pytest.mark.parametrize(
    "text", ['a<b & "c" > d', "back\\slash \\N \\n", "new\nline", "quote'", "\x00\x1b", "ünï → ∂", "x#1"]
)
def test_any_text_shows_in_the_picture_as_it_is(text: str) -> None:
    source = f"digraph {{ a [label=<{html(text)}>, tooltip={quoted(text)}]; b [label={quoted(text)}] }}"
    svg = ET.fromstring(render(source, "svg").data)
    first, second = (
        ["".join(each.itertext()) for each in group.iter("{http://www.w3.org/2000/svg}text")]
        for group in svg.iter("{http://www.w3.org/2000/svg}g")
        if group.get("class") == "node"
    )
    wanted = text.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert "".join(first) == wanted.replace("\n", " ")
    assert "\n".join(second) == wanted


@given(st.text(min_size=1), st.integers(2, 30))
def test_shortened_text_fits(text: str, most: int) -> None:
    assert len(shorten(text, most)) <= most
    assert shorten(text, len(text)) == text


def test_of_a_dotted_name_the_end_is_kept() -> None:
    assert shorten("encoder.layers.11.attention.weight", 18) == "….attention.weight"
    assert shorten("a long sentence. with dots", 10) == "a long se…"


@given(st.text(st.sampled_from("ab ,.()[]"), max_size=80), st.integers(3, 30))
def test_wrapped_text_fits_and_loses_nothing_but_spaces(text: str, width: int) -> None:
    lines = wrapped(text, width, most=1000)
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_too_many_lines_are_cut() -> None:
    lines = wrapped("one two three four five six", 9, 2)
    assert len(lines) == 2
    assert lines[1].endswith("…")


def test_counts() -> None:
    assert counted(1, "leaf", "leaves") == "1 leaf"
    assert counted(3000, "operation") == "3,000 operations"
