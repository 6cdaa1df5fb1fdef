"""Which nodes a sweep passes over, and the gradients of which of their inputs it needs."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch

from . import recorder
from .tape import DIFFERENTIABLE, Node, Value, bound, values_by_tensor

__all__ = ["Needs", "Steps", "all_steps", "made_for", "order_of", "steps_to"]

Tensor = torch.Tensor
Needs = tuple[bool, ...]  # for each input of a node, whether its gradient is wanted
Steps = tuple[list[Node], list[Needs]]  # the nodes, and as many needs: less for the collector of cycles than pairs

_by_seq = attrgetter("seq")
_once: dict[Needs, Needs] = {}  # each as one object: there are few


def order_of(node: Node | None) -> list[Node]:
    """The nodes through which a gradient can pass from `node` back, in the order of recording."""
    if node is None:
        return []
    seen = {node}
    stack, found = [node], []
    while stack:
        here = stack.pop()
        found.append(here)
        if not (here.mutates if here.cut else here.op.differentiable):
            continue
        inputs = here.inputs
        for i, source in enumerate(here.sources):
            if source is not None and source not in seen:
                value = inputs[i]
                if value.dtype in DIFFERENTIABLE and not value.constant:
                    seen.add(source)
                    stack.append(source)
    found.sort(key=_by_seq)  # in long runs it is, backward
    return found


def all_steps(order: Sequence[Node]) -> Steps:
    """Each node through which a gradient passes, with which of its inputs can have one."""
    nodes, all_needs = [], []
    for node in order:
        if node.op.differentiable or node.cut:
            needs = tuple([v.dtype in DIFFERENTIABLE and not v.constant for v in node.inputs])
            if True in needs:
                nodes.append(node)
                all_needs.append(_once.setdefault(needs, needs))
    return nodes, all_needs


def made_for(targets: Sequence[Tensor], root: Value, order: Sequence[Node]) -> set[Value]:
    """The values that the tensors of `wrt` hold, of those that the nodes made; leaves are found by `steps_to`."""
    found = {root} if any(root.holder is each for each in targets) else set()
    made = [value for each in targets if (value := bound(each)) is not None and not value.leaf]
    if made:
        nodes = set(order)
        found.update(value for value in made if value.node in nodes and value.differentiable)
    begun = [v for node in order if node.cut and not node.mutates for v in node.outputs if v.begins]
    found.update([v for v in begun if any(v.holder is each for each in targets)])  # bound or, read since, no more
    return found


def steps_to(asked: set[Value], targets: Sequence[Tensor], order: Sequence[Node], *, closed: bool = False) -> Steps:
    """Each node through which a gradient finds its way to a value asked for, with which of its inputs do.

    To those `asked` are added the leaves that the tensors of `wrt` hold, or held. Where a `closed` value is computed
    from one of them, the walk goes there as well, and that value says so; so it does to each where a tensor is not
    found, which may lie behind it.
    """
    wanted = {id(tensor) for tensor in targets}
    useful: set[Value] = set(asked)
    passed: set[Value] = set()
    nodes, all_needs = [], []
    for node in order:
        needs = []
        for value in node.inputs:
            need = value in useful
            if not need and value._node is None and value not in passed:
                need = id(value._tensor()) in wanted and value.differentiable
                if need:
                    asked.add(value)
                elif value.closed:
                    need = closed or _leads_to(value, wanted)
                (useful if need else passed).add(value)
            needs.append(need)
        if True in needs and (node.op.differentiable or node.cut):
            made = node._outputs
            if isinstance(made, Value):
                if made.dtype in DIFFERENTIABLE and not made.constant:
                    useful.add(made)
            else:
                useful.update([v for v in made if v.dtype in DIFFERENTIABLE and not v.constant])
            nodes.append(node)
            all_needs.append(_once.setdefault(key := tuple(needs), key))
    if not closed and wanted > {id(value.holder) for value in asked}:
        return steps_to(asked, targets, order, closed=True)
    return nodes, all_needs


def _leads_to(value: Value, wanted: set[int]) -> bool:
    """Whether a closed value is computed from a wanted leaf: on a tape that was swept, or by torch alone.

    Of what was written to unseen nobody knows from what it is: it may be from any.
    """
    if value.closed in recorder.UNKNOWN:
        return value.differentiable
    holder = value.holder
    binding = None if holder is None else values_by_tensor.get(id(holder))
    if holder is None or value.closed not in (recorder.SWEPT, recorder.OUTSIDE):
        return False
    if binding is not None and binding.node is not None:
        leaves = [v for node in order_of(binding.node) for v in node.inputs if v._node is None]
        return any(id(leaf._tensor()) in wanted for leaf in leaves)
    return any(id(leaf) in wanted for leaf in recorder.leaves_of([holder]))
