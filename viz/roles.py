"""What part each leaf plays: input, parameter, target or constant.

A tape knows only that a leaf came from outside. Its role is told from the facts of the recording; where
several operations read a leaf, the first of *parameter, target, input, constant* that one of them votes for
counts:

1. an ``nn.Parameter`` is a parameter; what was recorded as a constant is one;
2. the name under which an operation takes it: ``weight``, ``w``, ``b``… makes a parameter, ``target``, ``Y``…
   a target, ``X``, ``indices``… an input, ``running_mean``… a constant;
3. what plain arithmetic does with it. In a matrix product with a computed value it is a parameter; of two
   leaves multiplied the one that ``requires_grad``, otherwise the second. What is spread over the rows of a
   computed value (a bias) is a parameter. What is subtracted from a computed value, on the way to a loss of
   one element, is a target. A single number is a constant;
4. otherwise ``requires_grad`` makes a parameter, and everything else is an input.

Operations that only rearrange a leaf (``Y.unsqueeze(-1)``, ``weight.t()``) are looked through.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from tape_engine.tape import Node, Value

__all__ = ["ROLES", "roles_of"]

ROLES = ("input", "parameter", "target", "constant")

_BY_NAME = {
    name: role
    for role, names in {
        "parameter": "w W b B weight weights bias beta gamma kernel theta",
        "target": "y Y t T targ targs target targets label labels y_true",
        "input": "x X indices",
        "constant": "running_mean running_var num_batches_tracked",
    }.items()
    for name in names.split()
}
_REARRANGING = frozenset(
    "_reshape_alias _to_copy _unsafe_view alias clone contiguous detach expand flatten lift_fresh movedim permute"
    " reshape squeeze t to transpose unflatten unsqueeze view".split()
)
#: Of each matrix product, the places of its two factors among the inputs.
_PRODUCTS = {"mm": (0, 1), "matmul": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "addmm": (1, 2)}
_DIFFERENCES = frozenset(["sub", "rsub"])
_TOWARDS_A_LOSS = frozenset("abs div mean mul neg pow square sqrt sum squeeze view".split())


def roles_of(nodes: Sequence[Node]) -> dict[int, str]:
    """The role of every leaf that `nodes` read, by ``id`` of the value."""
    recording = _Uses(nodes)
    return {id(leaf): recording.role(leaf) for leaf in recording.leaves}


def base_name(node: Node) -> str:
    """An operation's name without overload and in-place mark: ``add`` for ``add_.Tensor``."""
    name = node.op.name.split(".", 1)[0]
    return name.rstrip("_") or name


class _Uses:
    """Which operation made each value, and which read it."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.maker = {id(v): node for node in nodes for v in node.outputs}
        self.readers: dict[int, list[tuple[Node, int]]] = defaultdict(list)
        leaves: dict[int, Value] = {}
        for node in nodes:
            for place, value in enumerate(node.inputs):
                self.readers[id(value)].append((node, place))
                if id(value) not in self.maker:
                    leaves.setdefault(id(value), value)
        self.leaves = list(leaves.values())

    def role(self, leaf: Value) -> str:
        if isinstance(leaf.holder, torch.nn.Parameter):
            return "parameter"
        if leaf.constant:
            return "constant"
        uses = list(self.uses(leaf))
        votes = {_BY_NAME.get(_taken_as(node, place) or "") for node, place in uses} - {None}
        if not votes:
            votes = {self.by_arithmetic(node, place, leaf) for node, place in uses} - {None}
        found = next((role for role in ("parameter", "target", "input", "constant") if role in votes), None)
        if found is None:
            return "parameter" if _trained(leaf) else "input"
        return found

    def uses(self, leaf: Value) -> Iterator[tuple[Node, int]]:
        """The operations that use a leaf's elements, looking through those that only rearrange them."""
        seen, stack = {id(leaf)}, [leaf]
        while stack:
            for node, place in self.readers.get(id(stack.pop()), ()):
                if base_name(node) in _REARRANGING and node.outputs:
                    fresh = [v for v in node.outputs if id(v) not in seen]
                    seen.update(map(id, fresh))
                    stack += fresh
                else:
                    yield node, place

    def origin(self, value: Value) -> Value | None:
        """The leaf that `value` is, or is rearranged from; ``None`` for a computed value."""
        while (node := self.maker.get(id(value))) is not None:
            if base_name(node) not in _REARRANGING or not node.inputs:
                return None
            value = node.inputs[0]
        return value

    def by_arithmetic(self, node: Node, place: int, leaf: Value) -> str | None:
        base = base_name(node)
        if base in _PRODUCTS and len(node.inputs) > max(_PRODUCTS[base]):
            left, right = _PRODUCTS[base]
            if place not in (left, right):
                return "parameter"  # what addmm adds
            other = self.origin(node.inputs[right if place == left else left])
            if other is None:
                return "parameter"
            first = _trained(leaf) if _trained(leaf) != _trained(other) else place == right
            return "parameter" if first else "input"
        if not leaf.shape and not _trained(leaf):
            return "constant"
        if len(node.inputs) != 2 or not node.outputs or self.origin(node.inputs[1 - place]) is not None:
            return None
        if base in _DIFFERENCES and not _trained(leaf) and self.leads_to_loss(node.outputs[0]):
            return "target"
        other_shape = tuple(node.inputs[1 - place].shape)
        spread = leaf.numel() < node.inputs[1 - place].numel() and tuple(node.outputs[0].shape) == other_shape
        return "parameter" if spread and leaf.dtype.is_floating_point else None

    def leads_to_loss(self, value: Value) -> bool:
        """Whether nothing but powers, sums and the like lie between `value` and a single number."""
        for _ in range(16):
            if not value.shape:
                return True
            readers = self.readers.get(id(value), [])
            if not readers or any(node is not readers[0][0] for node, _ in readers):
                return False
            node = readers[0][0]
            if base_name(node) not in _TOWARDS_A_LOSS or not node.outputs:
                return False
            value = node.outputs[0]
        return False


def _trained(value: Value) -> bool:
    holder = value.holder
    return holder is not None and holder.requires_grad


def _taken_as(node: Node, place: int) -> str | None:
    """The name under which an operation takes the input at `place`."""
    value, names = node.inputs[place], node.op.parameters
    if base_name(node) == "embedding":  # torch names its table `weight`, as a linear layer's
        return ("weight", "indices")[place] if place < 2 else None
    at = 0
    for name, argument in (*zip(names, node.args, strict=False), *node.kwargs.items()):
        held = argument if isinstance(argument, (tuple, list)) else (argument,)
        inside = [each for each in held if isinstance(each, Value)]
        if at <= place < at + len(inside) and inside[place - at] is value:
            return name
        at += len(inside)
    return names[place] if place < len(names) else None
