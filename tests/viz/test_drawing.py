"""`draw` from end to end: files of every format, what is left out, and what happens when there is no time."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import tape_engine as te
import viz
from viz import drawing, layout
from viz.layout import CHEAPER, OutOfTime, Picture
from viz.page import size

from .examples import EXAMPLES, article, chain, png_ink, png_size, residual


@pytest.fixture(autouse=True)
def no_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without Graphviz of its own."""
    monkeypatch.setenv("PATH", "")


def said(svg: bytes) -> set[str]:
    found = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(each.itertext()).strip() for each in found}


@pytest.mark.parametrize("example", list(EXAMPLES))
def test_every_shape_is_in_the_svg(example: str, tmp_path: Path) -> None:
    tape = EXAMPLES[example]()
    picture = viz.draw(tape, detail="full")
    assert picture.warnings == []
    texts = said(picture.save(tmp_path / "graph.svg").read_bytes())
    for _, facts in viz.graph(tape).nodes(data=True):
        assert any(text.startswith(str(facts["shape"])) for text in texts)
    assert str(len(tape)) in picture.description


def test_the_article(tmp_path: Path) -> None:
    picture = viz.draw(article())
    assert picture.engine == "pygraphviz"
    texts = said(picture.svg)
    assert {"X", "w", "b", "Y", "Z", "U", "C", "Z = X @ w + b", "U = max(0, Z)"} <= texts
    assert {"X.g", "w.g", "b.g", "Y.g", "Z.g", "U.g", "C.g"} <= texts
    dashed = [
        path
        for path in ET.fromstring(picture.svg).iter("{http://www.w3.org/2000/svg}path")
        if path.get("stroke-dasharray")
    ]
    assert len(dashed) >= 6  # of each operation one back to each of its inputs


def test_a_png_has_144_dots_an_inch(tmp_path: Path) -> None:
    picture = viz.draw(article())
    data = picture.save(tmp_path / "new" / "folder" / "graph.png").read_bytes()
    width, height = size(picture.svg)
    assert png_size(data) == pytest.approx((2 * width, 2 * height), abs=3)
    assert png_ink(data) > 0.01
    assert picture.warnings == []


def test_every_format(tmp_path: Path) -> None:
    picture = viz.draw(article())
    files = {suffix: picture.save(tmp_path / f"graph.{suffix}").read_bytes() for suffix in drawing.FORMATS}
    assert files["pdf"].startswith(b"%PDF")
    assert files["dot"].decode() == picture.source
    assert files["mmd"].startswith(b"flowchart TB")
    assert files["html"].startswith(b"<!DOCTYPE html>")
    assert picture.description.splitlines()[2].encode() in files["html"]
    assert ET.fromstring(files["svg"]).tag.endswith("svg")
    assert picture.save(str(tmp_path / "GRAPH.PNG")) == tmp_path / "GRAPH.PNG"


@pytest.mark.parametrize("name", ["graph.bmp", "graph", "graph.png.txt"])
def test_an_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    picture = viz.draw(article())
    with pytest.raises(viz.OptionError, match=r"\.png, \.svg, \.pdf, \.dot, \.html, \.mmd"):
        picture.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_everything_as_it_was() -> None:
    tape = article()
    before = [(id(node), len(node.inputs), node.swept) for node in tape.nodes]
    state = torch.get_rng_state()
    viz.draw(tape)
    assert [(id(node), len(node.inputs), node.swept) for node in tape.nodes] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_long_chain_is_drawn_in_time_with_its_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    picture = viz.draw(chain(3000))
    assert time.monotonic() - start < 20
    assert picture.warnings == [
        "2,992 of 3,000 operations are drawn together as one card; detail='full' draws every one"
    ]
    assert "1,496 × (mul → tanh)" in picture.description
    assert png_size(picture.save(tmp_path / "chain.png").read_bytes())[1] < 6000


def test_scopes() -> None:
    picture = viz.draw(residual(), detail="scopes")
    groups = [facts["formula"] for _, facts in picture.graph.nodes(data=True) if facts["kind"] == "group"]
    assert groups == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert picture.warnings == []  # it was asked for


def test_what_is_not_swept_is_said() -> None:
    tape = article(sweep=False)
    assert viz.draw(tape).warnings == ["no sweep has passed over this recording yet: no gradients are shown"]
    assert viz.draw(tape, view="forward").warnings == []
    with pytest.raises(viz.NotSweptError, match="there is no reverse sweep to draw"):
        viz.draw(tape, view="backward")


def test_the_sweep_alone() -> None:
    texts = said(viz.draw(article(), view="backward").svg)
    assert "U.g, Y.g = mse_grad(C.g, …)" in texts
    assert "Z = X @ w + b" not in texts


def test_an_empty_tape() -> None:
    with te.record() as tape:
        pass
    picture = viz.draw(tape)
    assert "0 operations" in picture.description
    assert ET.fromstring(picture.svg).tag.endswith("svg")


def test_a_notebook_shows_the_svg_and_its_words() -> None:
    picture = viz.draw(article())
    bundle = picture._repr_mimebundle_()
    assert bundle["image/svg+xml"].startswith("<svg")
    assert "<!DOCTYPE" not in bundle["image/svg+xml"]
    assert bundle["text/plain"] == picture.description
    assert set(picture._repr_mimebundle_(include=["text/plain"])) == {"text/plain"}
    assert set(picture._repr_mimebundle_(exclude=["text/plain"])) == {"image/svg+xml"}
    assert repr(picture) == "<drawing of 3 operations, laid out by pygraphviz>"


# -- large, slow, or without an engine -------------------------------------------------------------------


def test_a_very_large_png_is_shrunk_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drawing, "_MOST_SIDE", 400)
    picture = viz.draw(article())
    assert max(png_size(picture.save(tmp_path / "g.png").read_bytes())) <= 401
    assert re.fullmatch(
        r"the PNG is shrunk to \d\d dots an inch; an SVG, PDF or HTML page shows every detail", picture.warnings[0]
    )
    picture.save(tmp_path / "again.png")
    assert len(picture.warnings) == 1
    monkeypatch.setattr(drawing, "_MOST_PIXELS", 10_000)
    width, height = png_size(viz.draw(article()).save(tmp_path / "h.png").read_bytes())
    assert width * height <= 10_400


def test_a_very_large_pdf_is_shrunk_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drawing, "_MOST_PDF", 300)
    picture = viz.draw(article())
    data = picture.save(tmp_path / "g.pdf").read_bytes()
    box = re.search(rb"MediaBox\s*\[\s*[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)", data)
    assert picture.warnings[0].startswith("the PDF is shrunk to ")
    assert box is None or max(map(float, box.groups())) <= 300


class Slow:
    """Stands in for `render`, late at the first `late` calls."""

    def __init__(self, late: int, monkeypatch: pytest.MonkeyPatch, error: viz.LayoutError | None = None) -> None:
        self.calls: list[tuple[str, tuple[str, ...], float]] = []
        self.late, self.error = late, error or OutOfTime("late")
        monkeypatch.setattr(drawing, "render", self)

    def __call__(
        self, source: str, picture_format: str, *, engine: str, timeout: float, settings: tuple[str, ...]
    ) -> Picture:
        self.calls.append((source, tuple(settings), timeout))
        if len(self.calls) <= self.late:
            raise self.error
        return Picture(b'<svg width="1pt" height="1pt"></svg>', "dot")


def test_a_slow_layout_is_drawn_more_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(1, monkeypatch)
    picture = viz.draw(article(), timeout=10)
    assert [settings for _, settings, _ in slow.calls] == [(), CHEAPER]
    assert slow.calls[0][0] == slow.calls[1][0]
    assert slow.calls[0][2] == pytest.approx(5, abs=0.5)
    assert picture.warnings == ["laid out more plainly, with straight lines: the layout took too long or failed"]


def test_then_with_less_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(2, monkeypatch)
    picture = viz.draw(chain(400), detail="full")
    assert len(slow.calls[2][0]) < len(slow.calls[0][0]) / 4
    assert picture.warnings[0].startswith("392 of 400 operations are drawn together")
    assert picture.source == slow.calls[2][0]


def test_then_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(3, monkeypatch)
    with pytest.raises(
        viz.LayoutError, match=r"the picture of 3 operations could not be laid out within 20 s\.\n  at "
    ):
        viz.draw(article())
    Slow(3, monkeypatch, viz.LayoutError("broken"))
    with pytest.raises(viz.LayoutError, match="broken"):
        viz.draw(article())


def test_no_time_at_all() -> None:
    with pytest.raises(viz.LayoutError, match="could not be laid out within 1e-06 s"):
        viz.draw(article(), timeout=1e-6)


def test_without_any_engine_text_is_still_to_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "_wheel", lambda: None)
    picture = viz.draw(article())
    assert picture.engine is None
    assert picture.warnings == ["no Graphviz was found: only .dot, .mmd and the description are to be had"]
    assert picture.save(tmp_path / "g.dot").read_text() == picture.source
    assert picture.save(tmp_path / "g.mmd").stat().st_size
    assert set(picture._repr_mimebundle_()) == {"text/plain"}
    assert repr(picture) == "<drawing of 3 operations, not laid out>"
    for suffix in ("png", "svg", "pdf", "html"):
        with pytest.raises(viz.LayoutError, match="pip install pygraphviz"):
            picture.save(tmp_path / f"g.{suffix}")
    with pytest.raises(viz.LayoutError, match="pygraphviz is not installed"):
        viz.draw(article(), engine="pygraphviz")


def test_graphviz_is_not_loaded_into_this_process() -> None:
    code = (
        "import sys, torch, viz, tape_engine as te\n"
        "X, w = torch.ones(2, 3), torch.ones(3, 1)\nZ = te.lin(X, w)\n"
        "assert not {'pygraphviz', 'graphviz', 'matplotlib'} & set(sys.modules)\n"
        "print(viz.draw(Z).engine)\nassert 'pygraphviz' not in sys.modules\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["pygraphviz"], "")
