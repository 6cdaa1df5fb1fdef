"""Damaged and hostile files: whatever is changed in one, it is refused with `LoadError`, or it is a program."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tape_engine as te
from tests import fuzz_files
from tests.fuzz_files import NASTY, corpus, fuzz, joined, mutated, outcome, parts, scale

pytestmark = pytest.mark.slow

quick = settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

#: What JSON can hold, and headers like to: also what no header ever should.
anything = st.recursive(
    st.sampled_from([each for each in NASTY if not isinstance(each, (list, dict))])
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    yield corpus(tmp_path_factory.mktemp("corpus"))
    fuzz_files.ORIGINALS.clear()


def refused_or_loaded(path: Path, data: bytes) -> str:
    what, _ = outcome(path, data)  # raises whatever it should not
    return what


@pytest.mark.parametrize("name", fuzz_files.SEEDS)
def test_the_files_themselves_are_loaded(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    assert refused_or_loaded(tmp_path / "a.te", files[name]) != "refused"
    te.load(tmp_path / "a.te", ops=[scale])


@quick
@given(data=st.data())
def test_bytes_changed(data: st.DataObject, files: dict[str, bytes], tmp_path: Path) -> None:
    changed = bytearray(data.draw(st.sampled_from(list(files.values()))))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        stop = data.draw(st.integers(start, min(len(changed), start + 20)))
        changed[start:stop] = data.draw(st.binary(max_size=20))
    refused_or_loaded(tmp_path / "a.te", bytes(changed))


@quick
@given(data=st.data())
def test_files_cut_off(data: st.DataObject, files: dict[str, bytes], tmp_path: Path) -> None:
    whole = data.draw(st.sampled_from(list(files.values())))
    assert refused_or_loaded(tmp_path / "a.te", whole[: data.draw(st.integers(0, len(whole) - 1))]) == "refused"


@quick
@given(data=st.data())
def test_parts_of_the_header_replaced(data: st.DataObject, files: dict[str, bytes], tmp_path: Path) -> None:
    outer, inner, payload = parts(data.draw(st.sampled_from(list(files.values()))))
    here: Any = data.draw(st.sampled_from([outer, inner, inner, inner]))
    while True:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if not isinstance(here[key], (dict, list)) or not here[key] or data.draw(st.integers(0, 5)) == 0:
            break
        here = here[key]
    here[key] = data.draw(anything)
    refused_or_loaded(tmp_path / "a.te", joined(outer, inner, payload))


@quick
@given(
    text=st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")), length=st.integers(0, 200)
)
def test_files_of_something_else(text: str, length: int, tmp_path: Path) -> None:
    data = text.encode("utf-8", "surrogatepass")
    assert refused_or_loaded(tmp_path / "a.te", data) == "refused"
    assert refused_or_loaded(tmp_path / "a.te", length.to_bytes(8, "little") + data) == "refused"


@pytest.mark.parametrize("seed", range(3))
def test_mutations(seed: int) -> None:
    outcomes, _, failures = fuzz(800, seed, run=True)
    assert failures == []
    assert sum(outcomes.values()) == 800
    assert outcomes["refused"] > 500
    assert outcomes["equal"] > 0  # a name, a line of code: the changes that mean nothing


def test_the_same_seed_makes_the_same_mutations(files: dict[str, bytes]) -> None:
    one, other = ([mutated(data, random.Random(7)) for data in files.values()] for _ in range(2))
    assert one == other
    assert all(a != b for a, b in zip(one, files.values(), strict=True))


def test_a_reader_that_trusts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer is tested: with one check taken out, it must complain."""
    from tape_engine.program.file import tables

    def trusting(self: Any, thing: Any, place: Any, of: list[Any]) -> Any:
        return of[thing]

    monkeypatch.setattr(tables.Tables, "index", trusting)
    _, _, failures = fuzz(300, 0)
    assert any("IndexError" in each or "TypeError" in each for each in failures)


def test_memory_does_not_grow(files: dict[str, bytes], tmp_path: Path) -> None:
    import gc

    from tape_engine import tape

    path = tmp_path / "a.te"
    for data in files.values():
        outcome(path, data)
    gc.collect()
    before = len(tape.values_by_tensor), len([o for o in gc.get_objects() if type(o) is torch.Tensor])
    for _ in range(5):
        for data in files.values():
            outcome(path, data)
            outcome(path, mutated(data, random.Random(1)))
    gc.collect()
    after = len(tape.values_by_tensor), len([o for o in gc.get_objects() if type(o) is torch.Tensor])
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 10
