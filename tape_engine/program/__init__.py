"""Replay: a tape frozen into a program, which runs much faster than the code that was recorded.

`frozen` makes plain data of a tape, `passes` make it smaller, `backends` make a function of it, `buffers`
keep its memory, `program` is what a user calls, `replayable` records and replays a function by itself.
"""

from __future__ import annotations

from .loading import load
from .program import Program, freeze
from .replayable import replayable

__all__ = ["Program", "freeze", "load", "replayable"]
