"""The C library's heap, told early that large blocks come and go.

glibc takes a block from the system by itself, page by page, until it has seen one of that size freed; and it gives
the end of its heap back once twice that size lies free there. Both sizes grow with the largest block freed so far,
up to 32 MiB. What torch's own backward frees on its way is memory of the forward, in the midst of the heap. A sweep
frees its own gradients alone, for the recording stays as long as its root does, and those lie at the end of the
heap: at each of them the memory went back, and the next one paid for thousands of new pages (a third of a step of
`tests/benchmarks`' residual net). So one such block is made and freed, untouched, before the first recording. Any
process that once had a large tensor has done the same.
"""

from __future__ import annotations

import torch

__all__ = ["settle_heap"]

#: Just below the largest size that the C library learns from, in bytes.
LARGEST = (32 << 20) - (8 << 10)

_settled = False


def settle_heap() -> None:
    """Makes and frees one large block, once a process; its pages are never touched."""
    global _settled
    if not _settled:
        _settled = True
        torch.UntypedStorage(LARGEST)
