"""The engines: which is taken, that the text suits each, and that what runs too long is ended for good."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tape_engine as te
import viz
from viz import fonts, layout
from viz.layout import OutOfTime, engines, render
from viz.style import dot

from .examples import article, png_size, residual

SMALL = 'digraph { a [label="X (64, 784)"]; a -> b }'
#: A `dot` that does what Graphviz does, by way of the wheel.
STAND_IN = """#!{python}
import subprocess, sys
kind = next(a[2:] for a in sys.argv[1:] if a.startswith("-T"))
rest = [a[2:] for a in sys.argv[1:] if a.startswith("-G")]
open({log!r}, "a").write(kind + "\\n")
sys.exit(subprocess.run([sys.executable, "-P", {child!r}, {wheel!r}, kind, *rest]).returncode)
"""


@pytest.fixture
def no_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def own_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_found", {})


def program(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "dot"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_fonts: None) -> Path:
    """Puts a `dot` on PATH; returns the file in which it notes what it was asked for."""
    log = tmp_path / "log"
    text = STAND_IN.format(python=sys.executable, log=str(log), child=layout._CHILD, wheel=layout._wheel())
    monkeypatch.setenv("PATH", str(program(tmp_path / "bin", text).parent))
    return log


def children() -> set[int]:
    """The processes that this one started, those that ended but were not waited for among them."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(entry.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.mark.usefixtures("no_dot")
def test_without_dot_on_path_the_wheel_draws() -> None:
    assert engines() == ["pygraphviz"]
    picture = render(SMALL, "png", settings=["dpi=144"])
    assert (picture.engine, picture.remarks) == ("pygraphviz", ())
    assert png_size(picture.data) > (50, 50)


def test_dot_on_path_comes_first(stand_in: Path) -> None:
    assert engines() == ["dot", "pygraphviz"]
    assert render(SMALL, "svg").engine == "dot"
    assert "svg" in stand_in.read_text().split()
    assert render(SMALL, "svg", engine="pygraphviz").engine == "pygraphviz"


@pytest.mark.usefixtures("stand_in")
def test_both_engines_take_the_text_and_agree() -> None:
    for source in (dot(viz.graph(article())), dot(viz.graph(residual()), view="backward", rankdir="LR")):
        drawn = [render(source, "svg", engine=each) for each in ("dot", "pygraphviz")]
        assert [each.remarks for each in drawn] == [(), ()]
        assert drawn[0].data == drawn[1].data


@pytest.mark.parametrize(
    ("kind", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("xdot", b"digraph")]
)
def test_formats(kind: str, head: bytes) -> None:
    assert render(SMALL, kind).data.startswith(head)


def test_settings_reach_the_engine() -> None:
    one, two = (png_size(render(SMALL, "png", settings=[f"dpi={dpi}"]).data) for dpi in (72, 144))
    assert two[0] == pytest.approx(2 * one[0], abs=2)


@pytest.mark.usefixtures("own_fonts")
@pytest.mark.parametrize(
    "text",
    ["#!/bin/sh\necho out of order >&2; exit 3\n", "#!/bin/sh\necho half a pict\n", "no program at all", "#!/none\n"],
)
def test_a_dot_that_fails_gives_way_to_the_wheel(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program(tmp_path / "bin", text).parent))
    picture = render(SMALL, "png")
    assert picture.engine == "pygraphviz"
    assert len(picture.remarks) == 1
    assert picture.remarks[0].startswith("dot ")
    with pytest.raises(viz.LayoutError, match=r"could not be laid out: dot .*\n  fix: "):
        render(SMALL, "png", engine="dot")


@pytest.mark.usefixtures("own_fonts")
def test_a_layout_that_takes_too_long_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    path = program(tmp_path / "bin", f"#!/bin/sh\n/bin/sleep 600 &\necho $! $$ > {pids}\n/bin/sleep 600\n")
    monkeypatch.setenv("PATH", str(path.parent))
    start = time.monotonic()
    with pytest.raises(OutOfTime, match=r"dot was not done after 1\.5 s"):
        render(SMALL, "svg", engine="dot", timeout=1.5)
    assert time.monotonic() - start < 5
    for pid in map(int, pids.read_text().split()):
        for _ in range(50):  # a process that was killed takes a moment to go
            if not alive(pid):
                break
            time.sleep(0.02)
        assert not alive(pid)


@pytest.mark.usefixtures("own_fonts")
def test_an_engine_that_hangs_leaves_the_next_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program(tmp_path / "bin", "#!/bin/sh\nexec /bin/sleep 600\n").parent))
    picture = render(SMALL, "svg", timeout=6)
    assert picture.engine == "pygraphviz"
    assert picture.remarks == ("dot was not done after 3 s",)


def test_a_real_layout_is_ended_in_time() -> None:
    dense = "digraph {" + "".join(f"{i} -> {j};" for i in range(120) for j in range(i)) + "}"
    start = time.monotonic()
    with pytest.raises(OutOfTime) as found:
        render(dense, "svg", timeout=0.8)
    assert time.monotonic() - start < 4
    assert isinstance(found.value, viz.LayoutError)
    assert isinstance(found.value, te.TapeError)


@pytest.mark.usefixtures("no_dot")
def test_nothing_found_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_wheel", lambda: None)
    with pytest.raises(viz.LayoutError, match="pip install pygraphviz"):
        render(SMALL, "png")
    with pytest.raises(viz.LayoutError, match="engine='dot' was asked for, but no `dot` was found on PATH"):
        render(SMALL, "png", engine="dot")


def test_text_that_is_no_graph_is_refused() -> None:
    with pytest.raises(viz.LayoutError):
        render("digraph { a -> ", "svg")


def test_the_users_own_modules_do_not_get_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pygraphviz.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "table.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert render(SMALL, "svg", engine="pygraphviz").data
