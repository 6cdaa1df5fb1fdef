"""The SVG and the page: well-formed, self-contained, with the description in them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

from viz.page import accessible, inline, page, size

SVG = (
    b'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x" "y">\n<svg width="48pt" height="120.5pt"\n'
    b' viewBox="0 0 48 120.5" xmlns="http://www.w3.org/2000/svg"><text>X</text></svg>\n'
)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_size_in_points() -> None:
    assert size(SVG) == (48.0, 120.5)
    assert size(b"<svg>") == (0.0, 0.0)


def test_the_description_is_inside_the_svg() -> None:
    told = ET.fromstring(accessible(SVG, "a & b", "x < y\nand \x00 more", "d1"))
    space = "{http://www.w3.org/2000/svg}"
    assert [each.tag for each in told][:2] == [f"{space}title", f"{space}desc"]
    assert told[0].text == "a & b"
    assert told[1].text == "x < y\nand \ufffd more"
    assert told.get("role") == "img"
    assert told.get("aria-labelledby") == told[0].get("id")
    assert told.get("aria-describedby") == told[1].get("id")


def test_inside_a_page_there_is_no_prolog() -> None:
    assert inline(SVG).startswith("<svg width")


def test_the_page_is_whole_and_loads_nothing() -> None:
    text = page(SVG, "title <1>", "words & {{svg}} more </pre><script>")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.links == []
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    assert "title &lt;1&gt;" in text
    assert "words &amp; {{svg}} more &lt;/pre&gt;&lt;script&gt;" in text
    assert text.count("<svg") == 1
    assert not re.search(r"\{\{(title|description)\}\}", text)
