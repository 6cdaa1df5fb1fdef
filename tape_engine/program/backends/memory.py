"""What a writer of replay functions notes of memory while it writes, and the lines that come of it."""

from __future__ import annotations

from dataclasses import replace

from ...tape import Node, Value
from ..calls import Call
from ..data import VIEWS, Frozen
from ..lifetimes import LARGE, Lifetimes
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

    def let_go(self) -> None:
        """Adds lines that let go of large memory after that which reads it last."""
        last: dict[str, int] = {}
        large: set[str] = set()
        for value, name in self.locals.items():
            last[name] = max(last.get(name, 0), self.life.last[value])
            if any(root in self.locals and root.nbytes >= LARGE for root in self.life.rooted(value)):
                large.add(name)
        gone: dict[int, list[str]] = {}
        for name in (name for name in last if name in large and last[name] < self.life.step):
            gone.setdefault(self.ends[last[name]], []).append(name)
        moved, lines = [0], []
        for i, line in enumerate(self.lines, 1):
            lines += [line, *([f"del {', '.join(gone[i])}"] if i in gone else ())]
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
                self.life.view(value, operands)
            else:
                self.life.make(value)
            self.life.touch(value)
        if node.op.is_named and node.op not in VIEWS:
            self.life.keep((*operands, *values))
