"""The native backend: compiled loops on the CPU, for what torch takes longer to be called for than to do.

A program's nodes become instructions for a small machine (`lower`, `machine`), whose instructions are kernels that
LLVM compiled (`kernels`, `scalars`, `translator`, `objects`): once for a machine, not once for a program, so that a
program of thousands of operations is ready at once. Where rows are independent up to sums (`rows`), the instructions go
through blocks of them that fit in cache, on all cores (`segment`). What the kernels cannot do, or torch does better,
stays a call of torch (`plan`, `writer`).
"""

from __future__ import annotations

from .objects import available
from .writer import Told, generate

__all__ = ["Told", "available", "generate"]
