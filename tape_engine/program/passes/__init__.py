"""The passes: each takes a frozen tape and makes it smaller, one file a pass."""

from __future__ import annotations

from .dead import drop_dead
from .fold import fold_constants

__all__ = ["drop_dead", "fold_constants"]
