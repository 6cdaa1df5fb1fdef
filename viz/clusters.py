"""The frames of a picture: which nodes stand together inside a scope."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import networkx as nx

from .collapse import scope_title

__all__ = ["Cluster", "clusters"]


@dataclass
class Cluster:
    """One uninterrupted stay in a scope: nodes and the frames inside it, in order."""

    scope: tuple[str, ...]
    number: int = 0
    members: list[str | Cluster] = field(default_factory=list)

    @property
    def title(self) -> str:
        return scope_title(self.scope)

    def operations(self) -> int:
        """How many cards stand in it, its own and those of the frames inside."""
        inside = (
            each.operations() if isinstance(each, Cluster) else not each.startswith("leaf") for each in self.members
        )
        return sum(inside)


def clusters(graph: nx.MultiDiGraph[str], hidden: Container[str] = ()) -> Cluster:
    """The outermost frame, which is not drawn, with every node in it but those that are `hidden`.

    A scope that is left and entered again has a frame for each stay. A frame around one single card would say
    no more than the card: there is none. A leaf goes with the first operation that reads it, as deep as it belongs.
    """
    whole = Cluster(())
    open_frames, waiting = [whole], list[str]()
    for key, facts in graph.nodes(data=True):
        if key in hidden:
            continue
        if facts["kind"] == "leaf":
            waiting.append(key)
            continue
        scope = facts["scope"]
        shared = 0
        for frame, name in zip(open_frames[1:], scope, strict=False):
            if frame.scope[-1] != name:
                break
            shared += 1
        del open_frames[shared + 1 :]
        for depth in range(len(scope) + 1):
            if depth > shared:
                inner = Cluster(scope[:depth])
                open_frames[-1].members.append(inner)
                open_frames.append(inner)
            here = [leaf for leaf in waiting if min(len(graph.nodes[leaf]["scope"]), len(scope)) == depth]
            open_frames[depth].members += here
        waiting.clear()
        open_frames[-1].members.append(key)
    whole.members += waiting
    _unframe(whole)
    for number, frame in enumerate(_frames(whole)):
        frame.number = number
    return whole


def _unframe(cluster: Cluster) -> None:
    members: list[str | Cluster] = []
    for member in cluster.members:
        if isinstance(member, Cluster):
            _unframe(member)
            members += [member] if member.operations() > 1 else member.members
        else:
            members.append(member)
    cluster.members = members


def _frames(cluster: Cluster) -> list[Cluster]:
    inside = [member for member in cluster.members if isinstance(member, Cluster)]
    return [each for frame in inside for each in (frame, *_frames(frame))]
