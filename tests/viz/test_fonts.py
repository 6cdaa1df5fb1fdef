"""A machine without a font: found out, and helped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import viz
from viz import fonts
from viz.layout import render
from viz.lettering import font_file

from .examples import article, png_ink

WORDS = 'digraph { a [shape=plain, fontname="DejaVu Sans,Verdana", label="Z = X @ w + b (64, 784)"] }'


@pytest.fixture
def no_font(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fontconfig that knows no folder."""
    (tmp_path / "fonts.conf").write_text(
        f'<?xml version="1.0"?><fontconfig><cachedir>{tmp_path / "cache"}</cachedir></fontconfig>'
    )
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "fonts.conf"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fonts, "_found", {})


@pytest.mark.usefixtures("no_font")
def test_without_a_font_the_text_is_drawn_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = render(WORDS, "png")
    assert len(drawn.remarks) == 1
    assert "this machine has no font" in drawn.remarks[0]
    monkeypatch.setattr("viz.layout.font_environment", lambda *_: ({}, []))
    blank = render(WORDS, "png")  # what would have come out
    assert png_ink(drawn.data) > 2 * png_ink(blank.data)


@pytest.mark.usefixtures("no_font")
def test_the_drawing_says_so() -> None:
    assert any("no font" in warning for warning in viz.draw(article()).warnings)


@pytest.mark.usefixtures("no_font")
def test_matplotlibs_font_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "matplotlib" / "mpl-data" / "fonts" / "ttf"
    folder.mkdir(parents=True)
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('it is only looked at')")
    (folder / "DejaVuSans.ttf").write_bytes(font_file())
    monkeypatch.syspath_prepend(str(tmp_path))
    environment, remarks = fonts._remedy()
    assert remarks == []
    assert f"<dir>{folder}</dir>" in Path(environment["FONTCONFIG_FILE"]).read_text()


def test_each_engine_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_found", {})
    asked = []

    def run(text: str, kind: str, environment: dict[str, str]) -> tuple[bytes, str]:
        asked.append(kind)
        return b"node small 0 0 1.5 1\nnode large 0 0 6 1\n", ""

    assert [fonts.font_environment("dot", "/bin/dot", run) for _ in range(3)] == [({}, [])] * 3
    assert asked == ["plain"]


def test_an_answer_that_cannot_be_read_is_no_reason_for_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_found", {})
    assert fonts.font_environment("dot", "x", lambda *_: (b"", "")) == ({}, [])


def test_the_probe_tells_sizes_apart_where_there_is_a_font() -> None:
    answer = render(fonts._PROBE, "plain").data
    small, large = re.findall(rb"^node \w+ \S+ \S+ (\S+)", answer, re.MULTILINE)
    assert float(large) > 2 * float(small)
