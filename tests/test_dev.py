"""dev.py against environments made of a few files: no package is installed here, and no network is used."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HERE = [*sys.version_info[:3]]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("dev_under_test", ROOT / "dev.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a NamedTuple looks for its module
    spec.loader.exec_module(module)
    return module


dev: Any = load()


class Workshop:
    """A repository of four files, and what dev.py ran in it.

    ``venv`` and ``pip`` are played: a Python that tells what `answer` says stands in for the environment's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[list[str]] = []
        self.installed: list[str] = []
        self.constraints = ""
        self.torch = "2.13.0"
        self.fails: dict[str, BaseException] = {}
        (root / ".ci").mkdir()
        (root / ".ci" / "constraints.txt").write_text("# held\ntorch==2.13.0\nruff<1\n")
        (root / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["torch"]\n[tool.ruff]\nx = 1\n')

    @property
    def folder(self) -> Path:
        return self.root / ".venv"

    def environment(self, system: bool | None = None) -> Any:
        return dev.Environment(self.root, system)

    def make(self) -> None:
        """An environment as venv would leave it."""
        python = self.folder / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text('#!/bin/sh\ncat "$(dirname "$0")/../answer.json"\n')
        python.chmod(0o755)
        (self.folder / "lib" / "python3" / "site-packages").mkdir(parents=True, exist_ok=True)
        self.answer(torch=None, missing=["torch"])

    def answer(
        self,
        version: list[int] = HERE,
        torch: str | None = "2.13.0",
        missing: tuple[str, ...] | list[str] = (),
        pip: bool = True,
    ) -> None:
        (self.folder / "answer.json").write_text(json.dumps([version, torch, missing, pip]))

    def package(self) -> Path:
        """An installed package of one file."""
        site = self.folder / "lib" / "python3" / "site-packages"
        (site / "p-1.dist-info").mkdir(parents=True)
        (site / "p-1.dist-info" / "RECORD").write_text('p.py,sha256=x,3\n"a, b.py",,\n__pycache__/p.pyc,,\n')
        (site / "a, b.py").write_text("")
        (site / "p.py").write_text("x=1")
        return site / "p.py"

    def run(self, command: list[str], label: str, log: Path, cwd: Path) -> None:
        self.ran.append(command)
        kind = command[2] if command[1] == "-m" else "import torch"
        if kind in self.fails:
            raise self.fails[kind]
        if kind == "venv":
            self.make()
        elif kind == "pip":
            self.constraints = Path(command[command.index("--constraint") + 1]).read_text()
            self.installed.append(command[-1])
            (self.folder / "bin" / "tape-engine").write_text("")
            self.answer(torch=self.torch)

    def kinds(self) -> list[str]:
        """What was run since the last question."""
        kinds = [command[2] for command in self.ran if command[1] == "-m"]
        self.ran.clear()
        return kinds


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shop = Workshop(tmp_path)
    monkeypatch.setattr(dev, "run_shown", shop.run)
    return shop


# -- set-up, and set-up again --------------------------------------------------------------------------------


def test_set_up_is_done_once(shop: Workshop) -> None:
    shop.environment().ensure(["test"])
    assert shop.kinds() == ["venv", "pip"]
    assert shop.installed == [".[test]"]
    assert "torch==2.13.0\n" in shop.constraints
    shop.environment().ensure(["test"])
    shop.environment().ensure([])
    assert shop.kinds() == []


def test_more_is_added_when_it_is_asked_for(shop: Workshop) -> None:
    shop.environment().ensure([])
    shop.environment().ensure(["docs"])
    shop.environment().ensure(["test"])
    shop.environment().ensure(["docs", "test"])
    assert shop.installed == [".", ".[docs]", ".[docs,test]"]
    assert shop.kinds() == ["venv", "pip", "pip", "pip"]


@pytest.mark.parametrize(
    ("file", "old", "new", "again"),
    [
        ("pyproject.toml", '["torch"]', '["torch", "rich"]', ["pip"]),
        (".ci/constraints.txt", "2.13.0", "2.14.0", ["pip"]),
        ("pyproject.toml", "x = 1", "x = 2", []),  # how the code is linted is nothing to install
    ],
)
def test_what_set_up_rests_on(shop: Workshop, file: str, old: str, new: str, again: list[str]) -> None:
    shop.environment().ensure([])
    shop.kinds()
    path = shop.root / file
    path.write_text(path.read_text().replace(old, new))
    for expected in (again, []):
        shop.environment().ensure([])
        assert shop.kinds() == expected


def test_another_python_makes_it_anew(shop: Workshop) -> None:
    shop.environment().ensure(["test"])
    shop.answer(version=[3, HERE[1] + 1, 0])
    shop.kinds()
    shop.environment().ensure([])
    assert shop.kinds() == ["venv", "pip"]


def test_a_later_release_of_the_same_python_is_looked_at_only(shop: Workshop) -> None:
    shop.environment().ensure([])
    shop.answer(version=[*HERE[:2], HERE[2] + 1])
    shop.kinds()
    shop.environment().ensure([])
    assert shop.kinds() == ["pip"]


def test_a_moved_repository_is_set_up_anew(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> None:
    shop.environment().ensure([])
    moved = tmp_path_factory.mktemp("moved") / "x"
    shutil.copytree(shop.root, moved)
    shop.root = moved
    shop.kinds()
    shop.environment().ensure([])
    assert shop.kinds() == ["venv", "pip"]


# -- what is broken is mended ------------------------------------------------------------------------------------


def break_python(shop: Workshop) -> None:
    (shop.folder / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")


def lose_python(shop: Workshop) -> None:
    (shop.folder / "bin" / "python").unlink()


def dangle_python(shop: Workshop) -> None:
    lose_python(shop)
    (shop.folder / "bin" / "python").symlink_to("/nowhere/python3")


def empty_out(shop: Workshop) -> None:
    for path in shop.folder.iterdir():
        if path.name != "tape-engine-setup.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def lose_a_package(shop: Workshop) -> None:
    shop.package().unlink()
    shop.answer(missing=["networkx"])


def half_unpack(shop: Workshop) -> None:
    (shop.package().parent / "p-1.dist-info" / "RECORD").unlink()
    shop.environment().write_note(shop.environment().read_note()._replace(key=None))


@pytest.mark.parametrize("damage", [break_python, lose_python, dangle_python, empty_out, lose_a_package, half_unpack])
def test_a_broken_environment_is_made_anew(shop: Workshop, damage: Callable[[Workshop], None]) -> None:
    shop.environment().ensure(["test"])
    damage(shop)
    leftover = shop.folder / "bin" / "leftover"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_text("")
    shop.kinds()
    shop.environment().ensure(["test"])
    assert shop.kinds() == ["venv", "pip"]
    assert not leftover.exists()
    assert {path.name for path in shop.root.glob(".venv*")} == {".venv", ".venv.lock"}
    shop.environment().ensure(["test"])
    assert shop.kinds() == []


def test_a_lost_command_is_installed_again(shop: Workshop) -> None:
    shop.environment().ensure([])
    (shop.folder / "bin" / "tape-engine").unlink()
    shop.kinds()
    shop.environment().ensure([])
    assert shop.kinds() == ["pip"]


def test_setup_looks_at_every_file(shop: Workshop) -> None:
    shop.environment().ensure([])
    path = shop.package()
    shop.kinds()
    shop.environment().ensure([], thorough=True)
    assert shop.kinds() == ["pip"]
    path.unlink()
    shop.environment().ensure([])
    assert shop.kinds() == []
    shop.environment().ensure([], thorough=True)
    assert shop.kinds() == ["venv", "pip"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"ours": true}', '{"x": 1}'])
def test_an_unreadable_note_is_no_note(shop: Workshop, content: str) -> None:
    shop.environment().ensure([])
    (shop.folder / "tape-engine-setup.json").write_text(content)
    shop.kinds()
    shop.environment().ensure([])
    assert shop.kinds()[-1] == "pip"
    shop.environment().ensure([])
    assert shop.kinds() == []


@pytest.mark.parametrize("step", ["venv", "pip", "import torch"])
def test_an_interrupted_set_up_is_taken_up_again(shop: Workshop, step: str) -> None:
    shop.fails[step] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        shop.environment().ensure(["test"])
    assert not shop.environment().ready(["test"])
    shop.fails.clear()
    shop.kinds()
    shop.environment().ensure(["test"])
    assert shop.kinds() == (["venv", "pip"] if step == "venv" else ["pip"])
    shop.environment().ensure(["test"])
    assert shop.kinds() == []


def test_without_a_network_what_worked_still_works(shop: Workshop) -> None:
    shop.environment().ensure(["test"])
    shop.fails["pip"] = dev.Failure("no network")
    with pytest.raises(dev.Failure, match="no network"):
        shop.environment().ensure(["docs"])
    shop.kinds()
    shop.environment().ensure(["test"])
    assert shop.kinds() == []


def test_a_failed_set_up_that_left_damage_is_not_trusted(shop: Workshop) -> None:
    shop.environment().ensure(["test"])
    shop.fails["pip"] = dev.Failure("no space")
    path = shop.package()
    original = shop.run

    def run(command: list[str], *rest: Any) -> None:
        path.unlink()
        original(command, *rest)

    dev.run_shown = run
    with pytest.raises(dev.Failure, match="no space"):
        shop.environment().ensure(["docs"])
    assert not shop.environment().ready(["test"])


def test_what_is_missing_after_all_is_said(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shop, "answer", lambda **_: Workshop.answer(shop, missing=["networkx"]))
    with pytest.raises(dev.Failure, match="does not import: networkx"):
        shop.environment().ensure([])


def test_one_set_up_at_a_time(shop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    environment = shop.environment()
    with environment.locked():
        other = threading.Thread(target=shop.environment().ensure, args=(["test"],))
        other.start()
        deadline = time.monotonic() + 10
        said = ""
        while "waiting for it" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capfd.readouterr().err
        assert "another one is at work here; waiting for it" in said
        assert shop.kinds() == []
    other.join(10)
    assert shop.kinds() == ["venv", "pip"]


# -- what is somebody's own -----------------------------------------------------------------------------------------


def test_an_environment_of_ones_own_keeps_its_torch(shop: Workshop) -> None:
    shop.make()
    shop.answer(torch="2.9.1+cu128", missing=["networkx"])
    shop.torch = "2.9.1+cu128"
    shop.environment().ensure(["test"])
    assert shop.kinds() == ["pip"]
    assert shop.constraints.splitlines() == ["# held", "ruff<1", "torch==2.9.1+cu128"]
    shop.environment().ensure(["test"])
    assert shop.kinds() == []


def test_an_environment_of_ones_own_without_torch_gets_it(shop: Workshop) -> None:
    shop.make()
    shop.environment().ensure([])
    assert "torch==2.13.0" in shop.constraints.splitlines()


@pytest.mark.parametrize("version", ["2.4.0", "2.7.1+cu118", "1.13"])
def test_an_old_torch_is_not_replaced(shop: Workshop, version: str) -> None:
    shop.make()
    shop.answer(torch=version)
    with pytest.raises(dev.Failure, match=re.escape(f"torch here is {version}, tape_engine needs 2.8 or later")):
        shop.environment().ensure([])
    assert shop.kinds() == []


@pytest.mark.parametrize("version", ["2.8.0", "2.10.0a0+git", "3.0"])
def test_a_newer_torch_is_taken(shop: Workshop, version: str) -> None:
    shop.make()
    shop.answer(torch=version)
    shop.environment().ensure([])
    assert f"torch=={version}" in shop.constraints.splitlines()


def test_an_old_python_of_ones_own_is_refused(shop: Workshop) -> None:
    shop.make()
    shop.answer(version=[3, 9, 1])
    with pytest.raises(dev.Failure, match=r"was not made by dev.py, and is of Python 3\.9"):
        shop.environment().ensure([])
    assert (shop.folder / "answer.json").exists()


def test_what_does_not_work_is_moved_aside(shop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        shutil.rmtree(shop.folder, ignore_errors=True)
        shop.folder.mkdir()
        (shop.folder / "mine.txt").write_text(f"{number}")
        shop.environment().ensure([])
        assert (shop.root / f".venv.aside-{number}" / "mine.txt").read_text() == f"{number}"
        assert f"it is .venv.aside-{number} now" in capfd.readouterr().err
        assert shop.kinds() == ["venv", "pip"]


@pytest.mark.parametrize("what", ["a file", "a dangling link", "an empty folder"])
def test_whatever_stands_in_the_way(shop: Workshop, what: str) -> None:
    if what == "a file":
        shop.folder.write_text("conda")
    elif what == "a dangling link":
        shop.folder.symlink_to(shop.root / "gone")
    else:
        shop.folder.mkdir()
    shop.environment().ensure([])
    assert shop.environment().ready([])
    assert len([*shop.root.glob(".venv.aside-*")]) == (what != "an empty folder")


def test_a_linked_folder_stays_linked(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shop.folder.symlink_to(elsewhere)
    shop.environment().ensure([])
    break_python(shop)
    shop.environment().ensure([])
    assert shop.folder.is_symlink()
    assert shop.environment().ready([])


# -- the machine's own torch ------------------------------------------------------------------------------------------


def test_the_machines_torch(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)

    def make() -> None:
        Workshop.make(shop)
        shop.answer(torch="2.9.0+rocm")

    monkeypatch.setattr(shop, "make", make)
    shop.torch = "2.9.0+rocm"
    shop.environment(system=True).ensure([])
    assert "--system-site-packages" in shop.ran[0]
    assert "torch==2.9.0+rocm" in shop.constraints.splitlines()
    shop.kinds()
    shop.environment().ensure([])  # it is remembered
    assert shop.kinds() == []
    shop.environment(system=False).ensure([])
    assert shop.kinds() == ["venv", "pip"]
    assert "torch==2.13.0" in shop.constraints.splitlines()


def test_the_machine_has_no_torch(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(dev.Failure, match=r"torch was asked for, and .* has none"):
        shop.environment(system=True).ensure([])
    assert "pip" not in shop.kinds()


@pytest.mark.parametrize(("told", "system"), [("1", True), ("0", False), ("", None), (None, None)])
def test_the_machines_torch_by_the_environment_variable(
    monkeypatch: pytest.MonkeyPatch, told: str | None, system: bool | None
) -> None:
    if told is None:
        monkeypatch.delenv(dev.SYSTEM_TORCH, raising=False)
    else:
        monkeypatch.setenv(dev.SYSTEM_TORCH, told)
    asked = []
    monkeypatch.setattr(dev.Environment, "ensure", lambda self, extras, **_: asked.append(self.system))
    assert dev.main(["setup"]) == 0
    assert dev.main(["setup", "--system-site-packages"]) == 0
    assert dev.main(["--system-site-packages", "setup"]) == 0
    assert asked == [system, True, True]


# -- a Python that cannot ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["venv", "ensurepip"])
def test_a_python_without_venv(shop: Workshop, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else find(name))
    with pytest.raises(dev.Failure) as caught:
        shop.environment().ensure([])
    assert f"sudo apt install python3.{sys.version_info[1]}-venv" in str(caught.value)
    assert not shop.folder.exists()


def test_a_venv_that_fails_for_want_of_ensurepip(shop: Workshop) -> None:
    shop.fails["venv"] = dev.Failure("set-up failed\n    ... because ensurepip is not available ...")
    with pytest.raises(dev.Failure, match="sudo apt install"):
        shop.environment().ensure([])
    shop.fails["venv"] = dev.Failure("no space left")
    with pytest.raises(dev.Failure, match="no space left"):
        shop.environment().ensure([])


def test_an_old_python_is_refused() -> None:
    code = f"""
import sys
sys.version_info, sys.version, sys.argv = (3, 8, 2), "3.8.2 (x)", ["dev.py", "demo", "--out", "x"]
exec(compile(open({str(ROOT / "dev.py")!r}).read(), "dev.py", "exec"), {{"__name__": "__main__"}})
"""
    environ = {**os.environ, "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "dev.py needs Python 3.11 or later; this is 3.8.2.\n"
        "  fix: install a newer one, then: python3.11 dev.py demo --out x\n"
    )


def test_old_pythons_can_read_it() -> None:
    """An older Python must reach the line that refuses it: no newer grammar anywhere in the file."""
    tree = ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    futures = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    newer = [node for node in ast.walk(tree) if isinstance(node, (ast.Match, ast.NamedExpr, ast.TryStar))]
    assert not futures
    assert not newer


def test_it_needs_the_standard_library_alone() -> None:
    tree = ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


# -- a step, shown ---------------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_step_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    dev.run_shown(python("print('noise'); import sys; print('more', file=sys.stderr)"), "doing it", log, tmp_path)
    assert capfd.readouterr() == ("", "set-up: doing it\n")
    assert {"noise", "more"} <= {*log.read_text().splitlines()}


def test_a_failed_step_shows_the_end_of_its_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(dev.Failure) as caught:
        dev.run_shown(python("for i in range(90): print('line', i)\nraise SystemExit(3)"), "doing it", log, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "set-up failed while doing it:"
    assert lines[1:-1] == [f"    line {i}" for i in range(65, 90)]
    assert lines[-1] == f"  the whole output: {log}"
    assert "line 0\n" in log.read_text()


def test_an_interrupted_step_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = []

    def interrupt(child: Any, *rest: Any) -> None:
        children.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(dev, "show_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dev.run_shown(python("import time; time.sleep(60)"), "waiting", tmp_path / "log", tmp_path)
    assert children[0].returncode == -signal.SIGTERM


def test_progress_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    code = "import time; print('Collecting a-very-long-name-of-a-package'); time.sleep(0.5)"
    dev.run_shown(python(code), "doing it", tmp_path / "log", tmp_path)
    steps = capsys.readouterr().err.split("\r\x1b[K")
    assert any("looking for a-v" in step for step in steps)
    assert all(len(step.rstrip("\n")) < 40 for step in steps)
    assert re.fullmatch(r"set-up: doing it \(\d s\)\n", steps[-1])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Collecting torch==2.13.0 (from x)", "looking for torch==2.13.0"),
        ("  Downloading torch-2.13.0-cp311.whl (888.1 MB)", "downloading torch-2.13.0-cp311.whl (888.1 MB)"),
        ("  Downloading https://host/a/b.whl.metadata", "downloading b.whl.metadata"),
        ("Processing /wheels/torch-2.13.0.whl (from x)", "reading torch-2.13.0.whl"),
        ("Installing collected packages: mpmath, networkx, torch", "unpacking 3 packages"),
        ("Requirement already satisfied: pip", None),
        ("", None),
    ],
)
def test_a_line_of_pip_in_short(line: str, told: str | None) -> None:
    assert dev.in_short(line) == told


# -- the commands ----------------------------------------------------------------------------------------------------


class Calls:
    """The commands that would have been run, and the exit status each is to have."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.extras: list[str] = []
        self.status: Callable[[list[str]], int] = lambda command: 0

    def call(self, environment: Any, command: list[str], cwd: Path | None = None) -> int:
        self.commands.append([Path(command[0]).name, *command[1:]])
        return self.status(command)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(dev, "call", calls.call)
    monkeypatch.setattr(dev.Environment, "ensure", lambda self, extras, **_: calls.extras.extend(extras))
    monkeypatch.delenv(dev.SYSTEM_TORCH, raising=False)
    return calls


def test_arguments_are_passed_on(calls: Calls) -> None:
    assert dev.main(["demo", "--data", "x y", "--out", "z"]) == 0
    assert dev.main(["bench", "--quick"]) == 0
    assert dev.main(["test", "-x", "-k", "a and b", "tests/viz", "--", "-h"]) == 0
    demo, bench, test = calls.commands
    assert demo == ["tape-engine", "demo", "--data", "x y", "--out", "z"]
    assert bench == ["python", "-m", "tests.benchmarks", "--quick"]
    assert test == ["python", "-m", "pytest", "-x", "-k", "a and b", "tests/viz", "--", "-h"]


def test_jax_is_installed_for_whom_asks_for_it(calls: Calls) -> None:
    assert dev.main(["bench", "--quick"]) == 0
    assert "bench" not in calls.extras
    assert dev.main(["bench", "--others", "--quick"]) == 0
    assert calls.extras[-1] == "bench"
    assert calls.commands[-1] == ["python", "-m", "tests.benchmarks", "--others", "--quick"]


@pytest.mark.parametrize(("cores", "more"), [(1, []), (2, ["-n", "2"]), (64, ["-n", "8"])])
def test_the_whole_suite_uses_every_core(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, cores: int, more: list[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(cores)}, raising=False)
    assert dev.main(["test"]) == 0
    assert calls.commands[-1] == ["python", "-m", "pytest", *more]


def test_exit_status_is_the_commands(calls: Calls) -> None:
    calls.status = lambda command: 5
    assert [dev.main([name]) for name in ("demo", "test", "docs", "bench")] == [5, 5, 5, 5]


def test_docs_alone_install_the_docs_extra(calls: Calls) -> None:
    for name in ("setup", "demo", "test", "check", "bench"):
        dev.main([name])
    assert "docs" not in calls.extras
    dev.main(["docs"])
    assert calls.extras[-1] == "docs"
    assert calls.commands[-1][:4] == ["python", "-m", "sphinx", "-W"]


@pytest.mark.parametrize("failing", ["ruff", "mypy", "pytest"])
def test_check_runs_every_step(calls: Calls, failing: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert dev.main(["check"]) == 0
    assert [command[2] for command in calls.commands] == ["ruff", "ruff", "mypy", "pytest"]
    assert calls.commands[-1][-2:] == ["-m", "not slow"]
    calls.commands.clear()
    calls.status = lambda command: int(failing in command)
    assert dev.main(["check"]) == 1
    assert len(calls.commands) == 4
    assert re.search(rf"failed  .*({failing}|tests)", capfd.readouterr().err)


@pytest.mark.parametrize("name", ["setup", "demo", "test", "check", "docs", "bench"])
def test_help(calls: Calls, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: python3 dev.py {name}")
    with pytest.raises(SystemExit) as caught:
        dev.main(["--help"])
    assert caught.value.code == 0
    assert f"  {name} " in capsys.readouterr().out
    assert not calls.commands
    assert not calls.extras


def test_no_command_and_a_wrong_one(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert dev.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
    for wrong in (["frob"], ["check", "x"], ["--system", "test"]):
        with pytest.raises(SystemExit) as caught:
            dev.main(wrong)
        assert caught.value.code == 2
    assert calls.commands == []


def test_a_failure_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(dev.Environment, "ensure", fail)
    error: BaseException = dev.Failure("this went wrong")
    assert dev.main(["demo"]) == 1
    assert capfd.readouterr() == ("", "dev.py: this went wrong\n")
    error = PermissionError("the disk is read-only")
    assert dev.main(["demo"]) == 1
    assert capfd.readouterr().err == "dev.py: the disk is read-only\n"
    error = KeyboardInterrupt()
    assert dev.main(["demo"]) == 130


def test_an_unclear_wish_is_refused(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(dev.SYSTEM_TORCH, "maybe")
    assert dev.main(["demo"]) == 1
    assert capfd.readouterr().err.startswith(f"dev.py: {dev.SYSTEM_TORCH} is 'maybe'.\n  fix: ")
    assert not calls.commands


def test_an_interrupted_command_ends_first(shop: Workshop, tmp_path: Path) -> None:
    """Ctrl-C reaches the command too; dev.py waits for it to end in its own way, and starts nothing after it."""
    child = """
import time
print("up", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    print("down", flush=True)
"""
    code = f"""
import importlib.util, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background is deaf to it
spec = importlib.util.spec_from_file_location("dev", {str(ROOT / "dev.py")!r})
dev = importlib.util.module_from_spec(spec)
sys.modules["dev"] = dev
spec.loader.exec_module(dev)
dev.Environment.ensure = lambda *_, **__: None
real = dev.call
dev.call = lambda environment, command, cwd=None: real(environment, [sys.executable, "-c", {child!r}], cwd)
sys.exit(dev.main(["check"]))
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=20)
    assert out == "down\n"
    assert run.returncode == 130
    assert err == "check: ruff check\n\ndev.py: interrupted\n"


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", 143)])
def test_call(shop: Workshop, code: str, status: int) -> None:
    assert dev.call(shop.environment(), python(code)) == status


def test_a_commands_environment(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("PATH", "/usr/bin")
    environ = shop.environment().environ()
    assert environ["PATH"] == f"{shop.folder / dev.SCRIPTS}{os.pathsep}/usr/bin"
    assert environ["VIRTUAL_ENV"] == str(shop.folder)
    assert environ.keys().isdisjoint({"PYTHONHOME", "PYTHONPATH"})
    shop.folder.mkdir()
    shop.environment().write_note(dev.Note(ours=True, system=True))
    assert shop.environment().environ()["PYTHONPATH"] == "/nowhere"


# -- the files beside it ---------------------------------------------------------------------------------------------


def test_the_project_file_and_the_set_up_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules = {"scikit-learn": "sklearn", "pytest-xdist": "xdist"}

    def named(requirements: list[str]) -> set[str]:
        names = [re.split(r"[<>=!~\[; ]", text)[0] for text in requirements]
        return {modules.get(name, name).replace("-", "_") for name in names}

    assert {*dev.MODULES[""]} == named(project["dependencies"]) | {"tape_engine"}
    extras = project["optional-dependencies"]
    extras = {name: each + extras["files"] * ("tape-engine[files]" in each) for name, each in extras.items()}
    assert {*dev.MODULES["test"]} == named(extras["test"]) - {"tape_engine"}
    assert {*dev.MODULES["docs"]} == named(extras["docs"]) - {"tape_engine"}
    assert {*dev.MODULES["bench"]} == named(extras["bench"])
    assert {*dev.MODULES["dev"]} == named(extras["dev"]) - {"tape_engine", "types_networkx"}
    assert f"torch>={'.'.join(map(str, dev.OLDEST_TORCH))}" in project["dependencies"]
    constraints = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len([line for line in constraints if re.fullmatch(r"torch==\d+\.\d+\.\d+", line)]) == 1


def test_ci_runs_the_suite_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "dev.py").write_text(
        "import os, sys\nprint(sys.argv[1:], os.environ['CI'], os.getcwd(), repr(sys.stdin.read()))\nsys.exit(7)"
    )
    done = subprocess.run([tmp_path / ".ci" / "run"], cwd="/", input="x", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"['test'] true {tmp_path.resolve()} ''\n"


@pytest.mark.slow
def test_a_real_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """venv is real here; pip, which would need a network, is played by a file for each module that is missing."""
    shop = Workshop(tmp_path)
    real = dev.run_shown

    def run(command: list[str], label: str, log: Path, cwd: Path) -> None:
        if command[2] == "venv":
            real(command, label, log, cwd)
        elif command[2] == "pip":
            site = next(shop.folder.glob("lib/python*/site-packages"))
            for name in dev.modules_of(["test"]):
                (site / f"{name}.py").write_text("")
            (shop.folder / "bin" / "tape-engine").write_text("")
        shop.ran.append(command)

    monkeypatch.setattr(dev, "run_shown", run)
    shop.environment().ensure(["test"])
    assert shop.kinds() == ["venv", "pip"]
    shop.environment().ensure(["test"])
    assert shop.kinds() == []
    probe = shop.environment().probe(["torch", "nothing_of_the_kind"])
    assert probe == dev.Probe(HERE, None, ["nothing_of_the_kind"], True)
    assert shop.environment().intact()
    next(shop.folder.glob("lib/python*/site-packages/pip/__init__.py")).unlink()
    assert not shop.environment().intact()
    shop.environment().ensure(["test"])
    assert shop.kinds() == ["venv", "pip"]


def test_the_module_is_a_script() -> None:
    assert isinstance(dev, ModuleType)
    done = subprocess.run([sys.executable, ROOT / "dev.py", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "The one-command loop" in done.stdout
