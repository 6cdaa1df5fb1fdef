"""What a writer of replay functions notes of memory while it writes, and the lines that come of it."""

from __future__ import annotations

from dataclasses import replace

from ...tape import Node, Value
from ..calls import Call
from ..data import VIEWS, Frozen
from ..lifetimes import LARGE, Lifetimes, Part, Stretch, periods, released, stretches
from ..passes.in_place import InPlace
from .source import Unit

__all__ = ["Memory"]


class Memory:
    """The part of a writer that knows who needs which memory, and until when.

    Attributes:
        life: the lives of the values.
        locals: what has memory only while a replay runs, and views of it, with their names.
        readers: for each value the nodes that read it, in the order in which they run.
        ends: the number of lines at the end of each step.
        buffers, results: names of kept memory, and of sources of memory for what the caller gets.
        places: in which memory each buffer lies, once that is planned.
        asked_at: the steps at which those sources are asked.
        rooms: names for memory that is let go where nothing lies in it.
        anew: the sources whose memory is not kept.
        kept, mine: values that are read at the end; those of them that are written into the caller's memory.
    """

    frozen: Frozen
    life: Lifetimes
    locals: dict[Value, str]
    readers: dict[Value, list[Node]]
    ends: dict[int, int]
    kept: set[Value]
    mine: set[Value]
    in_place: InPlace
    lines: list[str]
    units: list[Unit]
    buffers: dict[str, Value]
    results: dict[str, Value]
    places: dict[Value, Stretch]
    asked_at: dict[str, int]
    rooms: dict[str, Stretch]
    anew: set[str]

    def unused(self, name: str) -> str:
        """A name that nothing has."""
        raise NotImplementedError

    def order(self) -> list[list[Node]]:
        """The nodes in the order in which they run; those of one list run as one."""
        raise NotImplementedError

    def way(self, node: Node) -> Call:
        """How a node is called."""
        raise NotImplementedError

    def find_readers(self) -> dict[Value, list[Node]]:
        """For each value the nodes that read it, in the order in which they run."""
        found: dict[Value, list[Node]] = {}
        for node in (node for nodes in self.order() for node in nodes if node not in self.in_place.left_out):
            spread = self.in_place.spread.get(node)
            for value in (*node.inputs, *(() if spread is None else spread.inputs)):
                found.setdefault(self.frozen.canonical(value), []).append(node)
        return found

    def find_fresh(self, wanted: list[Value]) -> list[Value]:
        """The results in memory that an operation took for them alone, which need no copy: the caller gets it."""
        alone = [v for v in dict.fromkeys(wanted) if v in self.locals and v in self.life.lives]
        return [v for v in alone if v not in self.mine and (v.strides or not v.ndim)]

    def plan_memory(self) -> None:
        """Where each buffer lies, and which memory is not kept from replay to replay."""
        self.places = stretches(self.buffers.values(), self.life)
        if any(stretch.device.type != "cpu" for stretch in self.places.values()):
            return  # torch keeps the memory of other devices itself
        parts = periods(self.places, self.life)
        end = self.life.step
        kept = [*parts.values(), *(Part(self.results[n].nbytes, [(at, end, self.results[n].nbytes)], n)
                                   for n, at in self.asked_at.items())]  # fmt: skip
        lives = [(v, self.life.lives[v]) for v in self.locals if v in self.life.lives]
        for part in released(kept, [(life.born, life.dies, v.nbytes) for v, life in lives], end):
            if isinstance(part.of, Stretch):
                self.rooms[self.unused("room")] = part.of
            elif isinstance(part.of, str):
                self.anew.add(part.of)

    def let_go(self) -> None:
        """Adds lines that let go of large memory after that which reads it last, and find it before it is needed."""
        last: dict[str, int] = {}
        large: set[str] = set()
        for value, name in self.locals.items():
            last[name] = max(last.get(name, 0), self.life.last[value])
            if any(root in self.locals and root.nbytes >= LARGE for root in self.life.rooted(value)):
                large.add(name)
        gone: dict[int, list[str]] = {}
        for name in (name for name in last if name in large and last[name] < self.life.step):
            gone.setdefault(self.ends[last[name]], []).append(name)
        after = {line: [f"del {', '.join(names)}"] for line, names in gone.items()}
        parts = periods(self.places, self.life)
        before: dict[int, list[str]] = {}
        for name, stretch in self.rooms.items():
            for start, stop, size in parts[stretch].periods:
                before.setdefault(self.ends.get(start - 1, 0), []).append(f"{name}.resize_({size})")
                after.setdefault(self.ends[stop], []).append(f"{name}.resize_(0)")
        lines = list(before.get(0, ()))
        moved = [0]
        for i, line in enumerate(self.lines, 1):
            lines += [line, *after.get(i, ()), *before.get(i, ())]
            moved.append(len(lines))
        self.lines = lines
        self.units = [replace(each, start=moved[each.start], stop=moved[each.stop]) for each in self.units]

    def tick(self) -> None:
        """The end of a step: what it read may be overwritten by the next one."""
        self.ends[self.life.step] = len(self.lines)
        self.life.step += 1

    def dying(self, node: Node, operands: list[Value]) -> Value | None:
        """An operand in fresh memory that nobody reads after a node, and that the node may write its result over."""
        value = self.frozen.canonical(node.outputs[0])
        for found in () if value in self.mine else self.life.operands(value, operands):
            if found in self.locals and found not in self.kept and self.readers[found][-1] is node:
                ways = [None if n.op.is_named else self.way(n) for n in self.readers[found] if n is not node]
                if all(way is not None and not (way.view or way.unknown) for way in ways):
                    return found
        return None

    def made(self, node: Node, call: Call, names: list[str], operands: list[Value]) -> None:
        """Notes in whose memory the results of a call lie: in that of its operands, or in memory of their own."""
        values = [self.frozen.canonical(v) for v in node.outputs]
        for name, value in zip(names, values, strict=True):
            self.locals[value] = name
            if call.view or call.unknown:
                self.life.view(value, [*operands, *(() if call.view else (value,))])
            if not call.view:
                self.life.make(value)
            self.life.touch(value)
        if node.op.is_named and node.op not in VIEWS:
            self.life.keep((*operands, *values))
