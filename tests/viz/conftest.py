"""What every test of the pictures starts from: an empty global tape, and the fonts asked for anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tape_engine as te

from . import examples


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    te.global_tape().clear()
    yield
    examples.kept.clear()
