"""What every test starts from: one thread, a fixed seed, and torch as it is when freshly imported."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pytest
import torch

torch.set_num_threads(1)  # tests run side by side; two threads each would only fight for the cores

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Seeds every generator before a test, and holds the test to leaving torch's switches as it found them."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    if after != before:  # else nothing is set: the last of these loads torch's compiler, which takes seconds
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])
        torch.use_deterministic_algorithms(before[2])
    assert after == before, "the test (or what it tested) left torch's switches changed"


def pytest_collection_finish() -> None:
    """Torch, the engine and the tests stay to the end: a test that collects garbage need not walk through them."""
    gc.collect()
    gc.freeze()


#: Suites that are generated or run through whole programs: `dev.py check` leaves them out, `dev.py test` does not.
THOROUGH = (
    "program/test_boundaries.py",
    "program/test_calls.py",
    "program/test_choices.py",
    "program/test_cudagraph.py",
    "program/test_faithful.py",
    "program/test_file.py",
    "program/test_inductor.py",
    "program/test_native_large.py",
    "program/test_native_objects.py",
    "program/test_native_ops.py",
    "program/test_native_rows.py",
    "program/test_native_tiles.py",
    "program/test_random_programs.py",
    "program/test_recompute.py",
    "program/test_recompute_choice.py",
    "program/test_training.py",
    "program/test_values.py",
    "tape_engine/test_aliases.py",
    "tape_engine/test_architectures.py",
    "tape_engine/test_degenerate.py",
    "tape_engine/test_ordinary_torch.py",
    "tape_engine/test_memory.py",
    "tape_engine/test_opinfo.py",
    "tape_engine/test_rules.py",
    "tape_engine/test_second_derivatives.py",
    "tape_engine/test_cli.py",
    "tape_engine/test_demo.py",
    "tests/test_benchmarks.py",
    "tests/test_dev.py",
    "viz/test_drawing.py",
    "viz/test_layout.py",
    "viz/test_style.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves the thorough suites unread where they would be left out: to make up their cases takes long as well."""
    thorough = collection_path.as_posix().endswith(THOROUGH)
    return True if thorough and config.getoption("markexpr") == "not slow" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the thorough suites as slow."""
    for item in items:
        if item.path.as_posix().endswith(THOROUGH):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests counted (``record_property("count", …)``), of tests that ran in other processes too."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == "count":
                    terminalreporter.write_line(str(value))
