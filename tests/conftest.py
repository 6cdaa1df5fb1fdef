"""What every test starts from: one thread, a fixed seed, and torch as it is when freshly imported."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

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
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    torch.use_deterministic_algorithms(before[2])
    assert after == before, "the test (or what it tested) left torch's switches changed"
