"""Which operations of a large recording are drawn as one box.

A picture serves up to a few dozen boxes. Of a larger recording, first whole scopes become a box each, at the
deepest level at which few enough are left; if that is not enough, or tells too little, the long middle of
what is left becomes one more box, between a head and a tail drawn as they are.

Every box holds consecutive operations. An edge always runs from an earlier operation to a later one, so
boxes drawn for consecutive operations can never form a cycle, whatever the recording.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from tape_engine.tape import Node

from .graph import Group

__all__ = ["BUDGET", "plan"]

#: How many boxes a picture is kept to by ``detail="auto"``.
BUDGET = 48
_FEWEST = 6  # boxes of scopes below which a picture tells too little


def plan(nodes: Sequence[Node], detail: str = "auto", budget: int = BUDGET) -> list[Group]:
    """The groups to draw as one box each, in order; none where every operation can be shown.

    Args:
        nodes: the operations, in the order of recording.
        detail: ``"auto"`` keeps to `budget` boxes, ``"scopes"`` makes a box of each call of an outermost scope
            (a level further in where there is only one); anything else draws every operation.
        budget: how many boxes are wanted at most; at least 3.
    """
    if detail not in ("auto", "scopes") or (detail == "auto" and len(nodes) <= budget):
        return []
    depths = range(1, 1 + max((len(node.scope) for node in nodes), default=0))
    levels = {depth: _boxes(nodes, depth) for depth in depths}
    if detail == "scopes":
        named = [[_named(nodes, box) for box in level if _is_group(box)] for level in levels.values()]
        return next((level for level in named if len(level) > 1), named[0] if named else [])
    fitting = [depth for depth, level in levels.items() if len(level) <= budget]
    depth = max(fitting, default=0)
    # Two or three boxes say little: rather one level deeper, with its middle left out.
    if depth + 1 in levels and (not fitting or len(levels[depth]) < _FEWEST):
        depth += 1
    boxes = levels[depth] if depth in levels else _single(nodes)
    groups = [_named(nodes, box) for box in boxes if _is_group(box)]
    if len(boxes) <= budget:
        return groups
    middle = _middle(nodes, boxes, groups, budget)
    return sorted([g for g in groups if g.stop <= middle.start or g.start >= middle.stop] + [middle], key=_start)


Box = tuple[int, int, tuple[str, ...]]  # from, up to, and the scope that it stands for


def _start(group: Group) -> int:
    return group.start


def _is_group(box: Box) -> bool:
    return box[1] - box[0] > 1


def _single(nodes: Sequence[Node]) -> list[Box]:
    return [(i, i + 1, node.scope) for i, node in enumerate(nodes)]


def _boxes(nodes: Sequence[Node], depth: int) -> list[Box]:
    """The recording with every run of operations in one scope of this depth as one box."""
    boxes: list[Box] = []
    for scope, run in groupby(range(len(nodes)), key=lambda i: nodes[i].scope[:depth]):
        places = list(run)
        if len(scope) == depth:
            boxes.append((places[0], places[-1] + 1, scope))
        else:
            boxes += [(i, i + 1, scope) for i in places]
    return boxes


def _named(nodes: Sequence[Node], box: Box) -> Group:
    start, stop, scope = box
    names = [node.op.name for node in nodes[start:stop]]
    return Group(start, stop, title=scope_title(scope), scope=scope[:-1], pattern=_pattern(names))


def scope_title(scope: Sequence[str]) -> str:
    """A scope's own name, without that of the one it stands in: ``attention`` for ``block.attention``."""
    if not scope:
        return ""
    inner = scope[-1]
    return inner.removeprefix(f"{scope[-2]}.") if len(scope) > 1 else inner


def _middle(nodes: Sequence[Node], boxes: Sequence[Box], groups: Sequence[Group], budget: int) -> Group:
    """One group of all but the first and last few boxes."""
    head = tail = max(1, budget // 3)  # what is left out is to be worth a box
    # Of a plain repetition, two turns at either end tell as much as twenty.
    words = [nodes[b[0]].op.name if not _is_group(b) else scope_kind(nodes, b) for b in boxes]
    period = _period(words[head:-tail])
    if period and period <= head:
        head, tail = (max(min(each, 4), min(each, 2 * period)) for each in (head, tail))
    left_out = boxes[head : len(boxes) - tail]
    words = words[head : len(boxes) - tail]
    start, stop = left_out[0][0], left_out[-1][1]
    scope = nodes[start].scope
    for node in nodes[start:stop]:
        while node.scope[: len(scope)] != scope:
            scope = scope[:-1]
    return Group(start, stop, title=f"{stop - start:,} operations", scope=scope, pattern=_pattern(words))


def scope_kind(nodes: Sequence[Node], box: Box) -> str:
    """What a box of a scope is, for telling repetitions: blocks of equal operations are of one kind."""
    names = [node.op.name for node in nodes[box[0] : box[1]]]
    return f"({' → '.join(names[:3])}{' → …' if len(names) > 3 else ''}, {len(names)} operations)"


def _period(names: Sequence[str]) -> int:
    """The length of the shortest stretch that `names` repeats from end to end; 0 where it repeats none."""
    for period in range(1, min(32, len(names) // 2) + 1):
        if all(a == b for a, b in zip(names, names[period:], strict=False)):
            return period
    return 0


def _pattern(names: Sequence[str]) -> str:
    """``30 × (mul → tanh)`` for a repetition, otherwise what there is most of: ``12 addmm, 8 relu, …``."""
    period = _period(names)
    if period and len(names) >= 2 * period and period <= 6:
        turns, rest = divmod(len(names), period)
        turn = " → ".join(names[:period])
        text = f"{turns:,} × {turn}" if period == 1 else f"{turns:,} × ({turn})"
        return text + (f" → {' → '.join(names[:rest])}" if rest else "")
    if len(names) <= 4:
        return " → ".join(names)
    counts = Counter(names).most_common()
    shown = ", ".join(f"{count:,} {name}" for name, count in counts[:4])
    return shown + (f", {sum(c for _, c in counts[4:]):,} more" if len(counts) > 4 else "")
