"""A picture in words, for whoever cannot see it: first the counts, then a sentence an operation, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx

from .markup import counted, shape_text
from .roles import ROLES

__all__ = ["describe"]

Facts = Mapping[str, Any]


def describe(graph: nx.MultiDiGraph[str], *, view: str = "both") -> str:
    """What a picture of `graph` shows, a line a fact."""
    forward, backward = view != "backward", view != "forward" and bool(graph.graph["swept"])
    nodes = [facts for _, facts in graph.nodes(data=True)]
    leaves = [facts for facts in nodes if facts["kind"] == "leaf"]
    steps = [facts for facts in nodes if facts["kind"] != "leaf"]
    count, read = graph.graph["operations"], graph.graph["leaves"]
    dtype = f", in {graph.graph['dtype']} unless said otherwise" if graph.graph["dtype"] else ""
    lines = [f"A computation of {counted(count, 'operation')} on {counted(read, 'leaf', 'leaves')}{dtype}."]
    if forward:
        told = [told for role in ROLES for told in _leaves(role, leaves, graph.graph["dtype"])]
        lines += [f"Leaves: {_listed(told)}."] if told else []
        lines += [f"{i}. {_forward(facts, graph.graph['dtype'])}" for i, facts in enumerate(steps, 1)]
    if backward:
        swept = [facts for facts in reversed(steps) if any(each["g_shape"] is not None for each in facts["inputs"])]
        lines.append("The gradients, from the last operation to the first:")
        lines += [_backward(facts) for facts in swept]
    elif view != "forward":
        lines.append("No sweep has passed over it yet: it shows no gradients.")
    return "\n".join(lines)


def _leaves(role: str, leaves: Sequence[Facts], dtype: str | None, most: int = 8) -> list[str]:
    """The leaves of one role, each by itself where they are few."""
    chosen = [leaf for leaf in leaves if leaf["role"] == role]
    if len(chosen) <= most:
        return [f"{_a(role)} {_value(leaf, dtype)}" for leaf in chosen]
    return [f"{counted(len(chosen), role)} of {counted(sum(leaf['elements'] for leaf in chosen), 'element')} in all"]


def _a(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _value(facts: Facts, dtype: str | None) -> str:
    unusual = f" {facts['dtype']}" if facts["dtype"] != dtype else ""
    return f"{facts['name']} {shape_text(facts['shape'])}{unusual}"


def _forward(facts: Facts, dtype: str | None) -> str:
    given = _listed([_value(each, dtype) for each in _few(facts["inputs"])]) if facts["inputs"] else "nothing"
    made = _listed([_value(each, dtype) for each in _few(facts["outputs"])]) if facts["outputs"] else "no tensor"
    marks = f" ({', '.join(facts['marks'])})" if facts["marks"] else ""
    place = f" at {facts['source']}" if facts["source"] else ""
    if facts["kind"] == "group":
        count = counted(facts["count"], "operation")
        title = facts["formula"] if facts["formula"] != count else "drawn as one"
        return f"{title}, {count}{place}{marks}: {facts['pattern']}; from {given} to {made}."
    scope = f" in {' / '.join(facts['scope'])}" if facts["scope"] else ""
    extra = f" with {facts['params']}" if facts["params"] else ""
    return f"{facts['op']}{place}{scope}{marks}: {facts['formula']}{extra}; from {given} to {made}."


def _backward(facts: Facts) -> str:
    sent = {each["name"]: shape_text(each["g_shape"]) for each in facts["inputs"] if each["g_shape"] is not None}
    given = [
        f"{each['name']}.g {shape_text(each['g_shape'])}" for each in facts["outputs"] if each["g_shape"] is not None
    ]
    rule = {"borrowed": f"the borrowed rule of {facts['op']}", None: "the group's rules"}.get(
        facts["rule"], facts["rule"]
    )
    sends = "send" if facts["rule"] is None else "sends"
    told = [f"{name}.g {shape}" for name, shape in sent.items()]
    source = _listed(_few(given)) if given else "a gradient that was not kept"  # of a sweep with `wrt`
    return f"- {rule} {sends} {_listed(_few(told))}, from {source}."


def _few(parts: Iterable[Any], most: int = 12) -> list[Any]:
    return list(parts)[:most]
