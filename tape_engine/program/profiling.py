"""How a replay is timed: by its own function, with a clock between the lines, on tensors that nobody else has."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod

import torch

from ..names import code_line, where
from ..tape import Node, Value
from .backends.source import Source, Unit
from .backends.timed import clock_of, timed
from .data import Frozen
from .guards import generators_kept, generators_of
from .profile import Held, Profile, ProfileRow

__all__ = ["profiled", "random_arguments"]

Tensor = torch.Tensor
aten = torch.ops.aten

#: What the kinds of rows are called that are not operations.
IN_WORDS = {"segment": "compiled", "rows": "row blocks", "layout": "layout", "result": "copy of a result",
            "effect": "write"}  # fmt: skip

#: Operations that pick elements of their first argument: they read no more of it than they give.
PICKING = {aten.index.Tensor, aten.index_select.default, aten.embedding.default, aten.gather.default, aten.take.default}


def profiled(
    frozen: Frozen,
    source: Source,
    inputs: Sequence[Tensor],
    seed: Tensor | None,
    check: Callable[[], None],
    *,
    backend: str,
    runs: int,
) -> Profile:
    """Times a replay.

    Args:
        frozen: what is replayed.
        source: its function.
        inputs: the caller's, checked.
        seed: of the sweep; ``None`` for a replay without.
        check: what a replay does before its function.
        backend: what made the function.
        runs: how often it is timed.
    """
    spared = _Spared(frozen, source, inputs)
    clock = clock_of(frozen.seed.device)
    stamps: list[int] = []
    plain = spared.source.function()
    clocked = timed(spared.source, clock, stamps.append).function()
    arguments = [*spared.inputs, *([] if seed is None else [seed])]
    wholes: list[int] = []
    taken: list[list[int]] = []
    with _streams_kept(frozen):
        for turn in range(-1, runs):  # the first one warms up
            spared.refill()
            start = clock()
            check()
            plain(*arguments)
            whole = clock() - start
            stamps.clear()
            spared.refill()
            clocked(*arguments)
            if turn >= 0:
                wholes.append(whole)
                taken.append([after - before for before, after in itertools.pairwise(stamps)])
    cost = _cost(clock)
    rows = _rows(frozen, spared.source, taken, cost)
    seconds = statistics.median(wholes) / 1e9
    summed = sum(row.seconds for row in rows)
    return Profile(tuple(rows), summed, seconds, runs, cost / 1e9, backend, seed is not None, source.once)


def random_arguments(frozen: Frozen) -> tuple[list[Tensor], Tensor | None]:
    """Inputs of the recorded shapes, and the seed of a sweep: normal numbers, where these are no indices or masks."""

    def drawn(like: Tensor | Value) -> Tensor:
        if like.dtype.is_floating_point or like.dtype.is_complex:
            kind = torch.float32 if like.dtype.itemsize < 4 else like.dtype
            return torch.randn(like.shape, dtype=kind, device=like.device).to(like.dtype)
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)

    return [drawn(each) for each in frozen.given], drawn(frozen.seed) if frozen.seed.numel() != 1 else None


class _Spared:
    """The function and the inputs of a replay, with copies in the place of the tensors that it writes to.

    So the caller's own keep their contents, and torch's counts of writes to them, whatever the replay does.
    """

    def __init__(self, frozen: Frozen, source: Source, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)
        constants = dict(source.constants)
        self._copies: list[tuple[Tensor, Tensor]] = []
        written = {frozen.canonical(leaf) for leaf, _ in frozen.writes}
        for i, value in enumerate(frozen.inputs):
            if value in written:
                self.inputs[i] = self._copy(inputs[i])
        for value, tensor in frozen.live.items():
            if value in written:
                own = self._copy(tensor)
                constants.update((name, own) for name, each in source.constants.items() if each is tensor)
        self.source = replace(source, constants=constants)

    def _copy(self, tensor: Tensor) -> Tensor:
        own = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        self._copies.append((own, tensor))
        return own

    def refill(self) -> None:
        """Every replay finds what the first one found."""
        for own, tensor in self._copies:
            own.copy_(tensor)


def _streams_kept(frozen: Frozen) -> AbstractContextManager[None]:
    """Random streams are left as they were; those of a program that draws nothing are not touched."""
    nodes = [*frozen.forward, *frozen.backward]
    if not any(node.random or node.op.is_named for node in nodes):
        return nullcontext()
    return generators_kept({v.device for node in nodes for v in node.outputs}, generators_of(nodes))


def _cost(clock: Callable[[], int]) -> int:
    """Nanoseconds that a clock takes, between two that follow each other, with what notes them."""
    stamps: list[int] = []
    stamp = stamps.append
    for _ in range(200):
        stamp(clock())
    return int(statistics.median(after - before for before, after in itertools.pairwise(stamps)))


# -- rows ----------------------------------------------------------------------------------------------------------


def _rows(frozen: Frozen, source: Source, taken: list[list[int]], cost: int) -> list[ProfileRow]:
    forward, outputs = set(frozen.forward), {frozen.canonical(value) for value in frozen.outputs}
    units = source.units or [Unit("whole", 0, len(source.lines))]
    times = [sorted(max(each - cost, 0) for each in column) for column in zip(*taken, strict=True)]
    medians = [statistics.median(each) for each in times]
    total = sum(medians) or 1
    rows = []
    for place, (unit, median, each) in enumerate(zip(units, medians, times, strict=True)):
        holds = tuple([_held(frozen, source, node, forward) for node in unit.nodes])
        parts = {one.part for one in holds}
        if unit.kind == "whole":
            parts = {"forward"} | ({"sweep"} if source.title == "step" else set())
        elif not parts:
            parts = {"sweep" if unit.kind == "result" and unit.writes[0] not in outputs else "forward"}
        made = [_title(frozen, source, value) for value in unit.writes] or [one.name for one in holds]
        lines = dict.fromkeys(one.line for one in holds if one.line)
        scopes = dict.fromkeys(one.scope for one in holds)
        row = ProfileRow(
            place=place,
            kind=unit.kind,
            op=IN_WORDS.get(unit.kind) or (holds[0].op if holds else "replay"),
            name=", ".join(made[:3]) + ", …" * (len(made) > 3),
            line=next(iter(lines), "") + f" and {len(lines) - 1} more" * (len(lines) > 1),
            code=(code_line(unit.nodes[0]) or "") if len(unit.nodes) == 1 else "",
            scope=next(iter(scopes)) if len(scopes) == 1 else _common(list(scopes)),
            part=parts.pop() if len(parts) == 1 else "both",
            seconds=median / 1e9,
            low=each[0] / 1e9,
            high=each[-1] / 1e9,
            share=median / total,
            bytes_read=sum(_read(unit, value) for value in unit.reads),
            bytes_written=0 if unit.kind == "layout" else sum(map(_touched, [unit.part] if unit.part else unit.writes)),
            holds=holds,
            again=any(one.again for one in holds),
        )
        rows.append(row)
    return rows


def _held(frozen: Frozen, source: Source, node: Node, forward: set[Node]) -> Held:
    name = ", ".join(_title(frozen, source, frozen.canonical(value)) for value in node.outputs[:3])
    part = "forward" if node in forward else "sweep"
    return Held(node.op.name, name, where(node) or "", "/".join(node.scope), part, node in source.again.again)


def _title(frozen: Frozen, source: Source, value: Value) -> str:
    return frozen.title(value) or source.names.get(value) or ""


def _common(scopes: list[str]) -> str:
    """The scopes that several stand in."""
    if not scopes:
        return ""
    split = [each.split("/") for each in scopes]
    count = next((i for i, names in enumerate(zip(*split, strict=False)) if len({*names}) > 1), min(map(len, split)))
    return "/".join(split[0][:count])


def _touched(value: Value) -> int:
    """Bytes of a value in memory: those of an expanded dimension lie there once."""
    if not value.strides:
        return value.nbytes
    return prod(n for n, step in zip(value.shape, value.strides, strict=True) if step or not n) * value.itemsize


def _read(unit: Unit, value: Value) -> int:
    picked = unit.nodes and unit.nodes[0].op.forward in PICKING and value is unit.reads[0]
    return min(_touched(value), sum(map(_touched, unit.writes))) if picked else _touched(value)
