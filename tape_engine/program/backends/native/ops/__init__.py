"""From torch's operations to instructions: a small function for each operation that the kernels can do.

A lowering function is given the `Lowering` and a node. It asks for the places of the arguments, and either gives
the result a place of its own and appends instructions that fill it, or says that it is a view of another. What it
cannot do it refuses with `Unfit`, and the node stays with torch.
"""

from __future__ import annotations

from ..lowering import LOWERED
from . import pointwise, products, shapes, totals  # noqa: F401 - they register what they lower

__all__ = ["LOWERED"]
