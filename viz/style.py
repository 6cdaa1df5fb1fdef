"""A networkx graph as DOT text: what the picture looks like.

Each operation is a card: its input ports in a row above, the formula in the middle, its value and the
gradient of that side by side below. A leaf is a node in the shape and colour of its role; where there are
many, parameters and constants stand in the ports that read them. Values run along solid lines from a card's
lower edge to a port, gradients along dashed ones from a port back to the gradient of the value that was read
there. The same graph always gives the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx as nx

from .cards import MORE, Cards, chip, first_hidden_port, shown_outputs
from .clusters import Cluster, clusters
from .collapse import scope_title
from .markup import attributes, counted, font, html, quoted, row, shape_text, shorten, table
from .palette import FONT, GRADIENT, INK, LINE, PAPER, QUIET, ROLE, SCOPE, VALUE, Paint

__all__ = ["dot"]

Facts = Mapping[str, Any]
#: Parameters and constants up to which each is drawn as a node of its own.
MOST_DRAWN = 6
#: Lines up to which a leaf stands by itself: with more, they would fill the picture and take dot minutes.
MOST_LINES = 4
_QUIET = frozenset(["parameter", "constant"])


def dot(
    graph: nx.MultiDiGraph[str],
    *,
    view: str = "both",
    detail: str = "full",
    rankdir: str = "TB",
    docked: bool | None = None,
) -> str:
    """The DOT text of a graph made by `viz.graph`.

    Args:
        graph: operations, leaves and groups.
        view: ``"forward"`` leaves the gradients out, ``"backward"`` shows them alone, ``"both"`` shows all.
        detail: ``"shapes"`` makes small cards of the operation's name and the shapes; anything else full ones.
        rankdir: ``"TB"`` or ``"LR"``, the direction in which values run.
        docked: whether parameters and constants that one card alone reads are drawn in its port instead of as
            nodes of their own; by default where there are more than six. Unless `detail` is ``"full"``, a
            parameter's transpose, which every ``nn.Linear`` takes, is drawn there as well: ``weightᵀ``. A leaf that
            more than four ports read is always drawn in those.
    """
    docks = _docks(graph, transposes=detail != "full")
    alone = [key for key, ports in docks.items() if len(ports) == 1]
    if not (len(alone) > MOST_DRAWN if docked is None else docked):
        docks = {key: ports for key, ports in docks.items() if len(ports) > 1}
    return _Writer(graph, view, detail, rankdir, docks).text()


Port = tuple[str, int]  # of a card, by its place


def _docks(graph: nx.MultiDiGraph[str], *, transposes: bool) -> dict[str, list[Port]]:
    """The nodes that can stand in the ports that read them, each with those ports."""
    found: dict[str, list[Port]] = {}
    taken = set[Port]()
    for key, facts in graph.nodes(data=True):
        ports = [
            (to, edge["port"]) for _, to, edge in graph.out_edges(key, data=True) if edge["direction"] == "forward"
        ]
        if not ports or any(port >= first_hidden_port(graph.nodes[reader]) for reader, port in ports):
            continue
        alone = len(ports) == 1
        leaf = facts["kind"] == "leaf" and (len(ports) > MOST_LINES or (alone and facts["role"] in _QUIET))
        # In the order of the graph a leaf comes before its transpose: by then it is known whether it was docked.
        if leaf or (transposes and alone and facts["op"] == "t" and (key, 0) in taken):
            found[key] = ports
            taken.update(ports if alone else ())
    return found


def _docked_facts(leaf: Facts, port: Facts) -> Facts:
    """What is shown of a docked leaf; of one that was transposed, the gradient is that of the leaf itself."""
    own = port["label"].removesuffix("ᵀ")
    return {**port, "name": port["label"], "role": leaf["role"], "g_name": own, "g_shape": leaf["g_shape"]}


class _Writer:
    def __init__(
        self, graph: nx.MultiDiGraph[str], view: str, detail: str, rankdir: str, docks: Mapping[str, list[Port]]
    ) -> None:
        self.graph, self.view = graph, view
        self.forward = view != "backward"
        self.backward = view != "forward" and bool(graph.graph.get("swept"))
        self.across = rankdir == "LR"
        self.leave, self.enter = ("e", "w") if self.across else ("s", "n")
        self.docks = docks
        self.docked: dict[str, dict[int, Facts]] = {}
        sources = {port: key for key, ports in docks.items() for port in ports}
        for (reader, place), key in sources.items():
            leaf = graph.nodes[sources.get((key, 0), key)]
            self.docked.setdefault(reader, {})[place] = _docked_facts(leaf, graph.nodes[reader]["inputs"][place])
        self.cards = Cards(self.forward, self.backward, detail == "shapes", self.across, graph.graph.get("dtype"))

    def text(self) -> str:
        node = {"fontname": quoted(FONT), "fontsize": "12", "fontcolor": quoted(INK), "shape": "plain"}
        edge = {
            "fontname": quoted(FONT), "fontsize": "9", "fontcolor": quoted(QUIET), "color": quoted(LINE),
            "arrowsize": "0.7", "penwidth": "1.2",
        }  # fmt: skip
        lines = [
            "digraph tape {",
            f"  graph [{attributes(self.settings())}]",
            f"  node [{attributes(node)}]",
            f"  edge [{attributes(edge)}]",
            *self.clustered(clusters(self.graph, self.docks), 1),
            *self.edges(),
            "}",
        ]
        return "\n".join(lines) + "\n"

    def settings(self) -> dict[str, str]:
        return {
            "rankdir": "LR" if self.across else "TB", "bgcolor": quoted(PAPER), "fontname": quoted(FONT),
            "fontsize": "10", "fontcolor": quoted(QUIET), "nodesep": "0.3", "ranksep": "0.45", "pad": "0.2",
            "labelloc": "b", "label": f"<{self.legend()}>", "tooltip": quoted(self.summary()),
        }  # fmt: skip

    def summary(self) -> str:
        facts = self.graph.graph
        said = [counted(facts["operations"], "operation"), counted(facts["leaves"], "leaf", "leaves")]
        if facts["dtype"]:
            said.append(f"{facts['dtype']} unless marked")
        if self.view != "forward" and not self.backward:
            said.append("not swept yet")
        if self.backward and facts["planned"]:
            said.append("gradients as a step computes them")
        return " · ".join(said)

    def legend(self) -> str:
        """What the shapes and lines mean, of those that occur."""

        def key(text: str, paint: Paint, *, dashed: bool = False, square: bool = False) -> str:
            return chip(font(html(text), size=9, color=INK), paint, dashed=dashed, square=square)

        roles = {each["role"] for _, each in self.graph.nodes(data=True) if each["kind"] == "leaf"}
        inside = {each["role"] for docked in self.docked.values() for each in docked.values()}
        cells = [
            key(f"{role} ({'square' if role in inside else ROLE[role].shape})", ROLE[role], square=role in inside)
            for role in ROLE
            if role in roles
        ]
        if self.forward and roles:
            cells.append(key("value (solid)", VALUE))
        if self.backward:
            cells.append(key("gradient .g (dashed)", GRADIENT, dashed=True))
        keys = row([f"<td>{table(row(cells), spacing=4, padding=3)}</td>"]) if cells else ""
        return table(keys + row([f"<td>{font(html(self.summary()), size=9)}</td>"]), padding=2)

    # -- nodes

    def clustered(self, cluster: Cluster, depth: int) -> list[str]:
        """The nodes, each inside the frames of the scopes that it stands in."""
        margin, lines = "  " * depth, list[str]()
        for member in cluster.members:
            if isinstance(member, Cluster):
                frame = {
                    "label": quoted(shorten(member.title, 40)), "labeljust": "l", "labelloc": "t", "margin": "10",
                    "style": quoted("rounded,filled"), "color": quoted(SCOPE.line), "fillcolor": quoted(SCOPE.fill),
                    "tooltip": quoted(" / ".join(member.scope)),
                }  # fmt: skip
                inside = self.clustered(member, depth + 1)
                if inside:
                    lines += [f"{margin}subgraph cluster_{member.number} {{", f"{margin}  graph [{attributes(frame)}]"]
                    lines += [*inside, f"{margin}}}"]
            elif self.shown(member):
                lines.append(f"{margin}{member} [{attributes(self.node(member, cluster.scope))}]")
        return lines

    def shown(self, key: str) -> bool:
        """Whether a node is drawn: no docked leaf, and of the sweep alone only what a gradient reaches."""
        if key in self.docks:
            return False
        return self.forward or any(each["g_shape"] is not None for each in self.graph.nodes[key]["outputs"])

    def node(self, key: str, framed: tuple[str, ...]) -> dict[str, str]:
        facts = self.graph.nodes[key]
        if facts["kind"] == "leaf":
            paint = ROLE[facts["role"]]
            told = f"{facts['name']}: {facts['role']} {shape_text(facts['shape'])} {facts['dtype']} {facts['device']}"
            return {
                "shape": paint.shape, "style": "filled", "margin": quoted("0.06,0.04"), "width": "0", "height": "0",
                "color": quoted(paint.line), "fillcolor": quoted(paint.fill), "penwidth": "1.3",
                "label": f"<{self.cards.leaf(facts)}>", "class": quoted(f"leaf {facts['role']}"),
                "tooltip": quoted(told),
            }  # fmt: skip
        docked = self.docked.get(key, {})
        inside = scope_title(facts["scope"]) if len(facts["scope"]) > len(framed) else ""  # of a frame left out
        if facts["kind"] == "group":
            label, text = self.cards.group(facts, docked), facts["pattern"]
        else:
            label, text = self.cards.operation(facts, docked, inside), facts["code"]
        told = "\n".join(part for part in (facts["source"], text, facts["rule"] and f"rule: {facts['rule']}") if part)
        return {"label": f"<{label}>", "class": quoted(facts["kind"]), "tooltip": quoted(told or facts["op"])}

    # -- edges

    def edges(self) -> list[str]:
        lines, seen = [], set[tuple[str, str]]()
        for tail, head, facts in self.graph.edges(data=True):
            back = facts["direction"] == "backward"
            maker, reader = (head, tail) if back else (tail, head)
            wanted = self.backward if back else self.forward
            if not wanted or not (self.shown(maker) and self.shown(reader)):
                continue
            ends = self.ends(maker, reader, facts, back=back)
            if ends in seen:  # of what shares a port, one line is enough
                continue
            seen.add(ends)
            look = self.gradient_line(facts) if back else self.value_line(facts)
            lines.append(f"  {ends[0]} -> {ends[1]} [{attributes(look)}]")
        return lines

    def ends(self, maker: str, reader: str, facts: Facts, *, back: bool) -> tuple[str, str]:
        port = min(facts["port"], first_hidden_port(self.graph.nodes[reader]))
        side = f"{'b' if back and self.forward else 'i'}{port}"
        value = f"{'g' if back else 'v'}{facts['output']}" if self.alone(maker, facts) else MORE
        return f"{maker}:{value}:{self.leave}", f"{reader}:{side}:{self.enter}"

    def alone(self, maker: str, facts: Facts) -> bool:
        """Whether the value that an edge carries has a chip of its own."""
        return facts["output"] in shown_outputs(self.graph.nodes[maker])

    def value_line(self, facts: Facts) -> dict[str, str]:
        told = quoted(f"{facts['name']} {shape_text(facts['shape'])} {facts['dtype']}")
        # Beside a gradient's line a second label would be in the way: its two ends tell the shape already.
        label = {} if self.backward else {"label": quoted(f" {shape_text(facts['shape'])} ")}
        return {"class": "forward", **label, "weight": "4", "tooltip": told, "labeltooltip": told}

    def gradient_line(self, facts: Facts) -> dict[str, str]:
        # A gradient runs up. Written from the maker of the value down to its reader and drawn backward, it gives dot
        # no cycle to break, and runs beside the line of its value.
        told = quoted(f"{facts['name']}.g {shape_text(facts['shape'])}")
        return {
            "class": "backward", "dir": "back", "style": "dashed", "color": quoted(GRADIENT.line),
            "fontcolor": quoted(GRADIENT.line), "label": quoted(f" {shape_text(facts['shape'])} "), "tooltip": told,
            "labeltooltip": told,
        }  # fmt: skip
