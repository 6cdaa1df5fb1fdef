"""The heap: memory that comes and goes at its end is not given back to the system each time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TRIAL = """
import json, resource
import torch
from tape_engine.heap import settle_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.full((3 << 20,), 1.0) for _ in range(3)]  # 12 MiB each, at the end of the heap
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

settle_heap()
print(json.dumps(sorted(faults() for _ in range(6))[2]))
"""


@pytest.mark.slow
def test_what_is_freed_at_the_end_of_the_heap_is_not_paid_for_again() -> None:
    run = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) < 1_000, "of 9,216 pages, given back and taken anew"
