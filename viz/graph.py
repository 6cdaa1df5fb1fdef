"""A tape as a networkx graph: operations and leaves are its nodes, what passes between them its edges.

Every node carries

=============  ==========================================================================================
``kind``       ``"op"``, ``"leaf"``, or ``"group"`` (several operations drawn as one; never in `graph`)
``op``         the operation's name (``lin``); ``None`` for a leaf
``name``       the user's own name of its (first) value
``role``       of a leaf ``input``, ``parameter``, ``target`` or ``constant``; of an operation ``result``
               where nothing reads what it made, otherwise ``intermediate``
``shape``      of its (first) value; ``None`` where the operation made no tensor
``g_shape``    the shape of that value's ``.g``; ``None`` where it has none
``dtype``      ``"float32"``, and ``device``, ``"cpu"``
``scope``      the names of the groups it stands in, outermost first
``source``     ``"train.py:12"`` or ``None``; ``code`` is the text of that line
``formula``    ``"Z = X @ w + b"``; ``params`` tells what else the operation was given: ``"dim=[0]"``
``rule``       the name of its gradient rule, ``borrowed``, ``none`` or ``cut``
``marks``      what is out of the ordinary: ``borrowed rule``, ``no gradient``, ``in place``, ``random``, ``guard``
``inputs``     one entry a port, in order: ``name``, ``shape``, ``dtype``, ``role``, ``g_shape``, the shape of
               the gradient that goes back through this port, and ``label``, the name without that of the scope
``outputs``    one entry a value: ``name``, ``shape``, ``dtype``, ``g_shape``, and whether it is ``read``
``elements``   of all its values, and ``bytes``, ``g_elements``, ``g_bytes``
=============  ==========================================================================================

Every edge carries ``direction``: ``"forward"`` from the node that made a value to one that reads it,
``"backward"`` the other way, for the gradient that the reader's rule sends back; ``port``, the place among the
reader's inputs; ``output``, the place among the maker's outputs; and ``name``, ``shape``, ``dtype`` of what passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from tape_engine.names import code_line, names_of, where
from tape_engine.tape import Node, Value

from .formula import formula, params_text
from .recording import Recording, recording

__all__ = ["Group", "build", "graph"]

#: Above this many operations, names are looked up for those alone that are drawn.
_MANY = 20_000


@dataclass(frozen=True)
class Group:
    """The operations from `start` up to `stop` of a recording, to be drawn as one."""

    start: int
    stop: int
    title: str
    scope: tuple[str, ...] = ()
    pattern: str = ""


def graph(root: Any) -> nx.MultiDiGraph[str]:
    """The computation as data: operations and leaves as nodes, values and gradients as edges.

    Args:
        root: a tape, a program, or a recorded tensor (then: all that it was computed from).

    Returns:
        A multigraph whose node keys are ``op0``, ``op1``… in the order of recording, and ``leaf0``, ``leaf1``… in
        that of reading. What nodes and edges carry is listed at the head of this file.

    Raises:
        NotRecordedError: for a tensor that no recorded operation made.
        DTypeError: for a root of another kind.
    """
    return build(recording(root))


# -- the graph -----------------------------------------------------------------------------------------


def build(source: Recording, groups: Sequence[Group] = ()) -> nx.MultiDiGraph[str]:
    """The graph of a recording, in which each of `groups` (in order, apart from each other) is one node."""
    return _Builder(source, groups).build()


class _Builder:
    def __init__(self, source: Recording, groups: Sequence[Group]) -> None:
        self.source = source
        self.groups = {f"group{i}": group for i, group in enumerate(groups)}
        self.owner = [f"op{i}" for i in range(len(source.nodes))]
        for key, each in self.groups.items():
            self.owner[each.start : each.stop] = [key] * (each.stop - each.start)
        self.maker: dict[int, str] = {}
        self.readers: dict[int, dict[str, None]] = {}
        for node, key in zip(source.nodes, self.owner, strict=True):
            for value in node.inputs:
                self.readers.setdefault(id(value), {})[key] = None
            for value in node.outputs:
                self.maker[id(value)] = key
        self.names = self._names()
        self.result: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        self.outputs: dict[int, tuple[str, int]] = {}  # of each value, the node and place it comes from
        self.folded: dict[str, list[Value]] = {}  # of each group, the leaves that are drawn inside it
        self._fold_leaves()

    def _names(self) -> dict[int, str]:
        nodes = self.source.nodes
        if len(nodes) <= _MANY:
            return names_of(nodes) if nodes else {}
        shown = [n for n, key in zip(nodes, self.owner, strict=True) if key not in self.groups]
        edges = [nodes[i] for g in self.groups.values() for i in (g.start, g.stop - 1)]
        return names_of(sorted({id(n): n for n in (*shown, *edges)}.values(), key=lambda n: n.seq))

    def _fold_leaves(self) -> None:
        """Leaves that one group alone reads go inside it: parameters always, others where they are many."""
        alone: dict[str, dict[int, Value]] = {}
        for node, key in zip(self.source.nodes, self.owner, strict=True):
            if key in self.groups:
                for v in node.inputs:
                    if id(v) not in self.maker and len(self.readers[id(v)]) == 1:
                        alone.setdefault(key, {})[id(v)] = v
        for key, leaves in alone.items():
            quiet = [v for v in leaves.values() if self.source.roles[id(v)] in ("parameter", "constant")]
            self.folded[key] = list(leaves.values()) if len(leaves) - len(quiet) > 4 else quiet

    def build(self) -> nx.MultiDiGraph[str]:
        nodes, folded = self.source.nodes, {id(v) for leaves in self.folded.values() for v in leaves}
        members: dict[str, list[Node]] = {}
        for node, key in zip(nodes, self.owner, strict=True):
            members.setdefault(key, []).append(node)
        leaves = 0
        for index, (key, inside) in enumerate(members.items()):
            for value in (v for node in inside for v in node.inputs):
                if id(value) not in self.maker and id(value) not in folded and id(value) not in self.outputs:
                    leaf = f"leaf{leaves}"
                    leaves += 1
                    self.outputs[id(value)] = (leaf, 0)
                    self.result.add_node(leaf, **self._leaf(value))
            if key in self.groups:
                self._add_group(key, inside, index)
            else:
                self._add_op(key, inside[0], index)
        dtypes: Counter[str] = Counter(each["dtype"] for _, each in self.result.nodes(data=True) if each["dtype"])
        floating = {d: n for d, n in dtypes.items() if d.startswith(("float", "bfloat", "complex"))} or dtypes
        self.result.graph.update(
            operations=len(nodes),
            leaves=len({id(v) for node in nodes for v in node.inputs if id(v) not in self.maker}),
            dtype=max(floating, key=lambda d: floating[d]) if floating else None,
            swept=bool(self.source.gradients),
            planned=self.source.planned,
        )
        return self.result

    def _value(self, value: Value) -> dict[str, Any]:
        return {
            "name": self.names.get(id(value), "?"),
            "shape": tuple(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "g_shape": self.source.gradients.get(id(value)),
            "read": id(value) in self.readers,
        }

    def _sizes(self, values: Sequence[Value]) -> dict[str, int]:
        with_g = [v for v in values if id(v) in self.source.gradients]
        return {
            "elements": sum(v.numel() for v in values),
            "bytes": sum(v.nbytes for v in values),
            "g_elements": sum(v.numel() for v in with_g),
            "g_bytes": sum(v.nbytes for v in with_g),
        }

    def _leaf(self, value: Value) -> dict[str, Any]:
        return {
            "kind": "leaf", "op": None, "role": self.source.roles[id(value)], **self._value(value),
            "device": str(value.device), "scope": self._leaf_scope(value), "source": None, "code": None,
            "formula": None, "params": "", "rule": None, "marks": (), "inputs": (), "outputs": (self._value(value),),
            **self._sizes([value]),
        }  # fmt: skip

    def _leaf_scope(self, value: Value) -> tuple[str, ...]:
        """The scope that all its readers share, for what belongs to it; an input stands outside."""
        if self.source.roles[id(value)] not in ("parameter", "constant"):
            return ()
        scopes = [self._scope_of(key) for key in self.readers[id(value)]]
        shared = scopes[0]
        for scope in scopes[1:]:
            while scope[: len(shared)] != shared:
                shared = shared[:-1]
        return shared

    def _scope_of(self, key: str) -> tuple[str, ...]:
        return self.groups[key].scope if key in self.groups else self.source.nodes[int(key[2:])].scope

    def _add_op(self, key: str, node: Node, index: int) -> None:
        outputs = tuple(self._value(v) for v in node.outputs)
        first = outputs[0] if outputs else {"name": node.op.name, "shape": None, "dtype": None, "g_shape": None}
        read = any(id(v) in self.readers for v in node.outputs)
        local = {id(v): self._label(v, node.scope) for v in node.inputs}
        local |= {id(v): self.names.get(id(v), "?") for v in node.outputs}
        self.result.add_node(
            key, kind="op", op=node.op.name, role="intermediate" if read or not outputs else "result", **first,
            device=str(node.outputs[0].device) if outputs else None, scope=node.scope, source=where(node),
            code=code_line(node), formula=formula(node, local, self.readers), params=params_text(node), rule=node.rule,
            marks=_marks(node), outputs=outputs,
            inputs=tuple(self._port(v, self.source.sends(node, v), node.scope) for v in node.inputs),
            **self._sizes(node.outputs), index=index,
        )  # fmt: skip
        for place, value in enumerate(node.outputs):
            self.outputs[id(value)] = (key, place)
        for port, value in enumerate(node.inputs):
            self._join(value, key, port, sends=self.source.sends(node, value))

    def _add_group(self, key: str, inside: Sequence[Node], index: int) -> None:
        group, folded = self.groups[key], self.folded.get(key, [])
        hidden, entering, sends = {id(v) for v in folded}, dict[int, Value](), set()
        for node in inside:
            for value in node.inputs:
                if self.maker.get(id(value)) != key and id(value) not in hidden:
                    entering[id(value)] = value
                    if self.source.sends(node, value):
                        sends.add(id(value))
        leaving = [v for node in inside for v in node.outputs if set(self.readers.get(id(v), ("",))) != {key}]
        last = [v for node in inside for v in node.outputs][-1:]
        leaving = [v for v in leaving if id(v) in self.readers] or leaving[-1:] or last
        outputs = tuple(self._value(v) for v in leaving)
        first = outputs[0] if outputs else {"name": group.title, "shape": None, "dtype": None, "g_shape": None}
        counts = Counter(node.op.name for node in inside)
        read = any(id(v) in self.readers for v in leaving)
        self.result.add_node(
            key, kind="group", op="group", role="intermediate" if read else "result",
            **first, device=str(leaving[0].device) if leaving else None, scope=group.scope,
            source=_span(where(inside[0]), where(inside[-1])), code=None, formula=group.title, params="", rule=None,
            marks=tuple(sorted({mark for node in inside for mark in _marks(node)})),
            inputs=tuple(self._port(v, id(v) in sends, group.scope) for v in entering.values()), outputs=outputs,
            **self._sizes([v for node in inside for v in node.outputs]), index=index,
            count=len(inside), counts=dict(counts.most_common()), pattern=group.pattern,
            folded=tuple({"role": self.source.roles[id(v)], **self._value(v), **self._sizes([v])} for v in folded),
        )  # fmt: skip
        for place, value in enumerate(leaving):
            self.outputs[id(value)] = (key, place)
        for port, value in enumerate(entering.values()):
            self._join(value, key, port, sends=id(value) in sends)

    def _port(self, value: Value, sends: bool, scope: tuple[str, ...]) -> dict[str, Any]:
        port = self._value(value)
        return {
            **port,
            "role": self.source.roles.get(id(value), "intermediate"),
            "g_shape": port["g_shape"] if sends else None,
            "label": self._label(value, scope),
        }

    def _label(self, value: Value, scope: tuple[str, ...]) -> str:
        """A value's name: ``weight`` for ``block.1.weight`` inside that module, ``weightᵀ`` for it transposed."""
        node = value.node
        if node is not None and node.op.name == "t" and node.inputs[0].leaf and id(value) in self.maker:
            return f"{self._label(node.inputs[0], scope)}ᵀ"
        name = self.names.get(id(value), "?")
        inner = next((each for each in reversed(scope) if name.startswith(f"{each}.")), None)
        return name if inner is None or id(value) in self.maker else name[len(inner) + 1 :]

    def _join(self, value: Value, reader: str, port: int, *, sends: bool) -> None:
        maker, output = self.outputs[id(value)]
        facts: dict[str, Any] = {
            "port": port,
            "output": output,
            "name": self.names.get(id(value), "?"),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        self.result.add_edge(
            maker, reader, key=f"forward {output}-{port}", direction="forward", shape=tuple(value.shape), **facts
        )
        if sends:
            shape = self.source.gradients[id(value)]
            self.result.add_edge(
                reader, maker, key=f"backward {port}-{output}", direction="backward", shape=shape, **facts
            )


def _marks(node: Node) -> tuple[str, ...]:
    guard = not node.outputs and node.result is not None
    facts: Mapping[str, bool] = {
        "borrowed rule": node.rule == "borrowed" and not guard,
        "no gradient": node.cut,
        "in place": bool(node.mutates),
        "random": node.random,
        "guard": guard,
    }
    return tuple(mark for mark, holds in facts.items() if holds)


def _span(first: str | None, last: str | None) -> str | None:
    """``train.py:3-9`` of two places in one file."""
    if first is None or last is None or first == last:
        return first or last
    file, _, line = last.rpartition(":")
    return f"{first}-{line}" if first.rpartition(":")[0] == file else f"{first} to {last}"
