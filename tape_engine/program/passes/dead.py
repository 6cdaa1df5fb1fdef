"""Dead nodes: what neither a result, nor an effect, nor a guard needs is not computed."""

from __future__ import annotations

from ...tape import Node, Value
from ..data import VIEWS, Frozen, sized_by_elements

__all__ = ["drop_dead"]


def drop_dead(frozen: Frozen, *, with_sweep: bool) -> list[Node]:
    """The nodes that a replay has to run, in order; with the sweep or without it.

    Random operations stay even if nothing reads them: running the code would draw from the generator
    too, and what is drawn after them must be the same. So do guards, among them the operations whose result
    has another shape on other elements, and named operations that were not opened up, whose bodies may
    have effects.
    """
    needed: set[Value] = {frozen.canonical(value) for value in frozen.outputs}
    needed |= {frozen.canonical(after) for _, after in frozen.writes}
    nodes = list(frozen.forward)
    if with_sweep:
        needed |= {frozen.canonical(g) for _, g in frozen.gradients}
        nodes += frozen.backward
    decisive = set(frozen.forward)  # the user's code may have asked for a shape; a rule has not
    kept = []
    canonical = frozen.canonical
    for node in reversed(nodes):
        for value in node.outputs:
            if canonical(value) in needed:
                break
        else:
            guards = node.result is not None or (node in decisive and sized_by_elements(node))
            if not (node.random or guards or (node.op.is_named and node.op not in VIEWS)):
                continue
        kept.append(node)
        for value in node.inputs:
            needed.add(canonical(value))
    return kept[::-1]
