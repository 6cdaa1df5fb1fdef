"""The heap: memory that comes and goes at its end is not given back to the system each time."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tape_engine import heap

FAULTS = """
import json, resource
import torch
from tape_engine import heap
from tape_engine.heap import hold_heap, settle_heap

def faults(count, leaf=None):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.full((3 << 20,), 1.0) for _ in range(count)]  # 12 MiB each, at the end of the heap
    if leaf is not None:
        hold_heap(leaf)
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

settle_heap()
"""


def told(trial: str, before: str = "") -> list[int]:
    """What a process of its own prints."""
    run = subprocess.run([sys.executable, "-c", before + FAULTS + trial], capture_output=True, text=True, check=True)
    found: list[int] = json.loads(run.stdout)
    return found


@pytest.mark.slow
def test_what_is_freed_at_the_end_of_the_heap_is_not_paid_for_again() -> None:
    found = told("print(json.dumps(sorted(faults(3) for _ in range(6))))")
    assert found[2] < 1_000, "of 9,216 pages, given back and taken anew"


@pytest.mark.slow
def test_more_than_the_library_keeps_is_held_as_long_as_a_leaf_is_there() -> None:
    held, still = told(
        """
leaf = torch.zeros(3)
held = sorted(faults(9, leaf) for _ in range(6))[2]
del leaf
print(json.dumps([held, heap._pin is not None]))
"""
    )
    assert held < 1_000, "of 27,648 pages"
    assert not still, "what holds the memory goes with the leaf"


@pytest.mark.slow
def test_what_lies_free_in_the_heap_does_not_keep_it_from_being_held() -> None:
    """Else the block that is to settle it comes from there, and the one that is to hold it lies by itself."""
    found = told(
        """
blocks += [heap._libc.malloc(20 << 20) for _ in range(4)]  # and it is in use again
leaf = torch.zeros(3)
print(json.dumps(sorted(faults(9, leaf) for _ in range(6))))
""",
        before="""
import torch
from tape_engine import heap
torch.full((23 << 18,), 1.0)  # so large a block comes by itself, once
blocks = [heap._libc.malloc(20 << 20) for _ in range(9)]
for block in blocks[2:6]:
    heap._libc.free(block)  # 80 MiB between blocks in use
""",
    )
    assert found[2] < 1_000, "of 27,648 pages"


def test_a_leaf_of_another_thread_goes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def top(_: int) -> int:
        heap._pin = None  # as the other thread does
        return 1

    for name, value in {"_settled": True, "_top": top, "_pin": SimpleNamespace(end=0), "_Pin": id}.items():
        monkeypatch.setattr(heap, name, value)
    leaf = torch.zeros(1)
    heap.hold_heap(leaf)
    assert vars(heap)["_pin"] == id(leaf)
