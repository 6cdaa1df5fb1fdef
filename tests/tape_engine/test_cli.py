"""The command line: what it prints, its files, its exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tape_engine
import viz
from tape_engine import cli, demo

QUICK = ["--steps", "20"]


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "draw", lambda job, out: [out / "graph.png"])


def run(*argv: str | Path) -> int:
    return cli.main([str(each) for each in argv])


# -- the demo ----------------------------------------------------------------------------------------------


def test_the_demo_tells_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert run("demo", "--out", out, "--steps", "400") == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert "1,797 digits of 8 x 8 pixels" in printed
    for name, shape in {"X": "(1797, 64)", "w": "(64, 1)", "b": "(1,)", "Z": "(1797, 1)", "U": "(1797, 1)"}.items():
        row = next(line for line in printed.splitlines() if line.strip().startswith(f"{name}.g "))
        assert shape in row
        assert row.rstrip().endswith("agrees")
        differences = re.findall(r"\d\.\de-\d+|\b0\b", row.split(")")[1])
        assert len(differences) == 3
        assert all(float(each) < 1e-10 for each in differences)
    errors_by_name = {
        name: float(figures.split()[0])
        for name, figures in re.findall(
            r"^ +(predicting the mean|before training|after training) +(.*)$", printed, re.M
        )
    }
    assert errors_by_name["after training"] < 0.3 * errors_by_name["predicting the mean"]
    assert "Every comparison agrees." in printed
    assert {path.name for path in out.iterdir()} == {"graph.png", "graph.svg"}
    for path in out.iterdir():
        assert str(path) in printed
        assert path.stat().st_size > 1000
    assert max(map(len, printed.replace(str(out), "").splitlines())) <= 120


def test_a_folder_of_idx_files(tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 4, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(60, dtype=torch.uint8) % 10
    for name, sizes, elements in (
        ("train-images-idx3-ubyte", (60, 4, 3), images),
        ("train-labels-idx1-ubyte", (60,), labels),
    ):
        header = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
        (tmp_path / name).write_bytes(header + bytes(elements.flatten().tolist()))
    assert run("demo", "--data", tmp_path, "--out", tmp_path / "out", *QUICK) == 0
    printed = capsys.readouterr().out
    assert "60 digits of 4 x 3 pixels" in printed
    assert "12 to 32 to 10" in printed
    assert "on 12 digits held out" in printed


def test_a_failed_comparison_is_status_1(
    tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = demo.WAYS["row loops"]
    monkeypatch.setitem(demo.WAYS, "row loops", lambda *job: right(*job)._replace(b=right(*job).b + 1))
    assert run("demo", "--out", tmp_path, *QUICK) == 1
    printed = capsys.readouterr().out
    verdicts = {line.split()[0]: line.split()[-1] for line in printed.splitlines() if ".g  " in line}
    assert verdicts == {"X.g": "agrees", "w.g": "agrees", "b.g": "DIFFERS", "Z.g": "agrees", "U.g": "agrees"}
    assert "1 of 6 comparisons failed." in printed


def test_a_wrong_replay_is_status_1(
    tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "replay_against_autograd", lambda *_: 0.5)
    assert run("demo", "--out", tmp_path, *QUICK) == 1
    assert "1 of 6 comparisons failed." in capsys.readouterr().out


# -- draw ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    @tape_engine.op
    def mine(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    @mine.rule
    def mine_grad(g, out, x, factor):  # type: ignore[no-untyped-def]
        return g * factor

    X, w, b, Y = torch.randn(6, 3), torch.randn(3, 1), torch.randn(1), torch.randn(6)
    with tape_engine.record() as tape:
        Z = tape_engine.lin(X, w, b)
        C = tape_engine.mse(mine(Z, 0.5), Y)
    tape.program(inputs=(X, Y), outputs=C).save(tmp_path / "step.te")
    return tmp_path / "step.te"


def test_a_saved_program_is_drawn(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix, begins in {"png": b"\x89PNG", "svg": b"<?xml", "dot": b"digraph"}.items():
        picture = tmp_path / "pictures" / f"step.{suffix}"
        assert run("draw", saved, "-o", picture) == 0
        assert capsys.readouterr() == (f"{picture}\n", "")
        assert picture.read_bytes().startswith(begins)
    text = (tmp_path / "pictures" / "step.dot").read_text()
    mine = next(each for each in tape_engine.registry.ops() if each.name == "mine")
    assert text == viz.draw(tape_engine.load(saved, ops=[mine])).source  # though here it is not given


def test_a_saved_program_is_drawn_in_the_view_that_is_asked_for(saved: Path, tmp_path: Path) -> None:
    views = {}
    for view in ("forward", "backward", "both"):
        options = ["--view", view, "--rankdir", "LR", "--detail", "full", "--engine", "pygraphviz"]
        assert run("draw", saved, "-o", tmp_path / "step.dot", *options) == 0
        views[view] = (tmp_path / "step.dot").read_text()
        assert "rankdir=LR" in views[view].replace('"', "")
    assert len({*views.values()}) == 3


def test_a_file_that_cannot_be_drawn(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.png"
    assert run("draw", tmp_path / "none.te", "-o", out) == 2
    assert capsys.readouterr().err == (
        f"tape-engine: {tmp_path}/none.te cannot be read: no such file or directory.\n"
        "  fix: give the path that program.save was given\n"
    )
    saved.write_bytes(saved.read_bytes()[:200])
    assert run("draw", saved, "-o", out) == 2
    assert "tape-engine: step.te cannot be loaded.\n  the header: its length is said" in capsys.readouterr().err
    assert not out.exists()


def test_a_picture_that_cannot_be_written(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("draw", saved, "-o", tmp_path / "step.jpg") == 2
    assert "the suffix '.jpg'" in capsys.readouterr().err
    assert run("draw", saved, "-o", saved / "step.png") == 2
    assert "tape-engine: " in capsys.readouterr().err


# -- profile -------------------------------------------------------------------------------------------------


@pytest.fixture
def step(tmp_path: Path) -> Path:
    X, w, index, Y = torch.randn(6, 3), torch.randn(9, 3), torch.randint(9, (6,)), torch.randn(6, dtype=torch.float16)
    with tape_engine.record() as tape:
        C = ((X * w[index]).sum(1) - Y).square()
    tape.program(inputs=(X, index, Y), outputs=C).save(tmp_path / "step.te")
    return tmp_path / "step.te"


def test_a_saved_program_is_profiled(step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", step, "--repeats", "3") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("profile of a replay with its sweep; backend ")
    assert "median of 3 runs" in printed
    assert run("profile", step, "--forward", "--json", "--top", "1") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sweep"] is False
    assert len(told["rows"]) == 1


def test_a_file_that_cannot_be_profiled(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", tmp_path / "none.te") == 2
    assert "none.te cannot be read" in capsys.readouterr().err
    assert run("profile", saved) == 2  # an operation of one's own
    assert "mine" in capsys.readouterr().err


# -- what cannot be done -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required: COMMAND"),
        (["dome"], "invalid choice"),
        (["demo", "--step", "3"], "unrecognized arguments"),  # no abbreviations
        (["demo", "--steps", "0"], "'0' is not a number, 1 or more"),
        (["demo", "--steps", "-3"], "'-3' is not a number"),
        (["demo", "--steps", "many"], "'many' is not a number"),
        (["demo", "more"], "unrecognized arguments: more"),
        (["draw"], "the following arguments are required: FILE, -o/--out"),
        (["draw", "a.te"], "the following arguments are required: -o/--out"),
        (["draw", "a.te", "-o", "a.png", "--view", "sideways"], "argument --view: invalid choice: 'sideways'"),
    ],
)
def test_bad_arguments_are_status_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert said in errors


def test_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere"
    assert run("demo", "--data", missing, "--out", tmp_path / "out") == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("tape-engine: data: this is not a folder of IDX files.")
    assert str(missing) in errors
    assert "Traceback" not in errors


def test_a_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run("demo", "--out", file) == 2
    assert capsys.readouterr().err == f"tape-engine: {file}: File exists\n"


def test_a_package_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "viz", None)
    assert run("demo", "--out", tmp_path, *QUICK) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("tape-engine: a package that this needs is not here:")
    assert errors.endswith("  fix: pip install tape-engine\n")


def test_interrupted(
    tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupt)
    assert run("demo", "--out", tmp_path) == 130
    assert capsys.readouterr().err == "tape-engine: interrupted\n"


# -- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--help"], ["demo", "--version", "record, sweep, check, draw and replay"]),
        (["draw", "--help"], ["FILE", "-o", "--view {both,forward,backward}", "--engine", "Exit status 2 if the file"]),
        (["demo", "--help"], ["--data", "--out", "--steps", "FOLDER", "Exit status 1 if a comparison fails"]),
        (["--version"], [tape_engine.__version__, torch.__version__]),
    ],
)
def test_help(argv: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for each in said:
        assert each in printed


# -- as a process of its own -------------------------------------------------------------------------------

COMMAND = [sys.executable, "-W", "error", "-m", "tape_engine.cli"]
ROOT = Path(tape_engine.__file__).parents[1]


def environ(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@pytest.mark.slow
def test_plain_text_in_a_pipe_without_unicode(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "demo", "--out", tmp_path, *QUICK],
        env=environ(PYTHONIOENCODING="ascii"),
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert b"\x1b" not in done.stdout
    assert done.stdout.isascii()
    assert b"Every comparison agrees." in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="terminals of this kind are POSIX's")
def test_colour_and_progress_on_a_terminal(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "demo", "--out", tmp_path, "--steps", "2000"],
        env=environ(TERM="xterm-256color"),
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert child.returncode == 0, shown.decode(errors="replace")
    assert b"\x1b[1;32mEvery comparison agrees." in shown
    assert re.search(rb"\d+/2000", shown)


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "demo", "--out", tmp_path, *QUICK],
        env=environ(PYTHONUNBUFFERED="1"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 2


def test_importing_it_loads_no_pictures() -> None:
    code = (
        "import sys, tape_engine.cli; print([m for m in ('viz', 'graphviz', 'pygraphviz', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environ(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
