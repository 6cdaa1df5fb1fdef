"""The passes: each tells something of a frozen tape that makes its replay smaller or right, one file a pass."""

from __future__ import annotations

from .choices import demanded
from .common import merge_common
from .dead import drop_dead
from .early import results_early
from .fold import fold_constants
from .in_place import find_in_place
from .layout import laid_out
from .masks import unmask
from .recompute import recompute
from .rerun import Recomputed
from .turned import turn_products

__all__ = [
    "Recomputed", "demanded", "drop_dead", "find_in_place", "fold_constants", "laid_out", "merge_common", "recompute",
    "results_early", "turn_products", "unmask",
]  # fmt: skip
