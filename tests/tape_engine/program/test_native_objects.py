"""Kernels in the user's cache folder, and what happens where it, or llvmlite, is not as it should be."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine.program.backends import native
from tape_engine.program.backends.native import objects
from tests.helpers import close
from tests.tape_engine.program.common import draw, freeze

ROOT = Path(__file__).parents[3]

needs_llvmlite = pytest.mark.skipif(not native.available(), reason="llvmlite, an extra, is not installed")


def chain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    for _ in range(4):
        x = torch.tanh(x * w)
    return x.sum()


# -- without llvmlite ----------------------------------------------------------------------------------------


@pytest.fixture
def no_llvmlite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llvmlite" else found(name, *rest)
    )
    objects.available.cache_clear()
    monkeypatch.setattr(objects, "load", lambda names: pytest.fail("it tried all the same"))
    yield
    objects.available.cache_clear()


@pytest.mark.usefixtures("no_llvmlite")
def test_without_llvmlite_a_replay_is_calls_of_torch() -> None:
    x, w = draw(3, 3), draw(3, 3)
    program = freeze(chain, [x], [w])
    close(program.step(x), chain(x, w))
    assert "backend python" in str(program)


@pytest.mark.usefixtures("no_llvmlite")
def test_without_llvmlite_the_native_backend_is_refused() -> None:
    with pytest.raises(te.BackendError) as caught:
        freeze(chain, [draw(3, 3)], [draw(3, 3)], backend="native")
    assert "llvmlite" in str(caught.value)
    assert "fix: pip install llvmlite" in str(caught.value)


def test_where_it_does_not_work_a_replay_is_calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no such library")

    monkeypatch.setattr(native, "generate", broken)
    monkeypatch.setattr(native, "available", lambda: True)
    x, w = draw(3, 3), draw(3, 3)
    program = freeze(chain, [x], [w])
    close(program.step(x), chain(x, w))
    assert "backend python" in str(program)
    assert "not native: OSError: no such library" in str(program)


# -- what auto chooses ---------------------------------------------------------------------------------------


@needs_llvmlite
def test_auto_is_native_where_that_pays_and_says_so() -> None:
    x, w = draw(3, 3), draw(3, 3)
    program = freeze(chain, [x], [w])
    text = str(program)
    assert "backend native" in text
    assert "in 1 compiled segments, 0 calls of torch" in text
    assert all(len(line) <= 160 for line in text.splitlines())
    assert "native(" in program.code


@needs_llvmlite
def test_auto_is_python_where_there_is_little_to_do() -> None:
    x, w = draw(3, 3), draw(3, 3)
    assert "backend python" in str(freeze(lambda x, w: (x * w).sum(), [x], [w]))
    assert "backend python" in str(freeze(lambda x, w: (x * w).sort()[0].cumsum(0).sum(), [x], [w]))


# -- the folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kernels"
    monkeypatch.setenv(objects.CACHE_VARIABLE, str(folder))
    return folder


NAMES = ["run", "map_flat", "add_d_111"]


@needs_llvmlite
def test_a_second_process_reads_what_the_first_compiled(cache: Path) -> None:
    first, second = objects.Loaded(), objects.Loaded()
    assert all(address > 0 for address in first.load(NAMES).values())
    assert (first.compiled, first.read) == (3, 0)
    assert len([*cache.iterdir()]) == 3
    second.load(NAMES)
    assert (second.compiled, second.read) == (0, 3)


@needs_llvmlite
@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "another start"])
def test_a_damaged_file_is_made_anew(cache: Path, damage: str) -> None:
    objects.Loaded().load(["add_d_111"])
    (file,) = cache.iterdir()
    good = file.read_bytes()
    middle = len(good) // 2
    bad = {
        "cut": good[:middle], "empty": b"", "another start": b"x" + good[1:],
        "changed": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
    }  # fmt: skip
    file.write_bytes(bad[damage])
    again = objects.Loaded()
    again.load(["add_d_111"])
    assert (again.compiled, again.read) == (1, 0)
    third = objects.Loaded()
    third.load(["add_d_111"])
    assert third.read == 1


@needs_llvmlite
def test_kernels_of_another_source_have_other_names(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.Loaded().load(["add_d_111"])
    other = objects.Loaded()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "another")
    other.load(["add_d_111"])
    assert (other.compiled, other.read) == (1, 0)
    assert len([*cache.iterdir()]) == 2


def test_the_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(objects.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    found = objects.folder()
    assert found == tmp_path / "tape_engine"
    assert found.stat().st_mode & 0o077 == 0
    found.chmod(0o777)  # whoever can write there could have his code run
    assert objects.folder() is None
    monkeypatch.setenv(objects.CACHE_VARIABLE, "")
    assert objects.folder() is None


def test_no_home_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv(objects.CACHE_VARIABLE, str(file / "below"))
    assert objects.folder() is None


@needs_llvmlite
def test_kernels_need_nothing_of_pythons(cache: Path) -> None:
    """They run without Python's lock: nothing in them may raise an error."""
    names = ["product_lines_f", "product_tiles_d", "share", "take_f", "softplus_f_1100"]
    objects.Loaded().load(names)
    for file in cache.iterdir():
        assert b"Py" not in file.read_bytes(), file


@needs_llvmlite
def test_without_a_folder_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "folder", lambda: None)
    loaded = objects.Loaded()
    loaded.load(["add_d_111"])
    assert (loaded.compiled, loaded.read) == (1, 0)


SCRIPT = """
import torch, tape_engine as te
x, w = torch.ones(3, 3), torch.full((3, 3), 0.5)
with te.record() as tape:
    y = x
    for _ in range(4):
        y = torch.tanh(y * w)
    C = y.sum()
program = tape.program(inputs=x, outputs=C, wrt=w, backend="native")
print(float(program.step(x)), float(w.g.sum()))
"""


@needs_llvmlite
@pytest.mark.slow
def test_two_processes_at_once(cache: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=200)[0] for process in both]
    assert told[0] == told[1] != ""
    assert not [file for file in cache.iterdir() if file.suffix != ".kernel"]
