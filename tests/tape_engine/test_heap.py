"""The heap: memory that comes and goes at its end is not given back to the system each time."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

TRIAL = """
import json, resource
import torch
from tape_engine.heap import settle_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.full((3 << 20,), 1.0) for _ in range(3)]  # 12 MiB each, at the end of the heap
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [faults() for _ in range(6)]
settle_heap()
after = [faults() for _ in range(6)]
print(json.dumps([sorted(before[2:])[2], sorted(after[2:])[2]]))
"""


def test_what_is_freed_at_the_end_of_the_heap_is_not_paid_for_again() -> None:
    run = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, check=True)
    before, after = json.loads(run.stdout)
    if platform.libc_ver()[0] == "glibc":
        assert before > 1_000, "36 MiB, given back and taken anew"
    assert after < 100
