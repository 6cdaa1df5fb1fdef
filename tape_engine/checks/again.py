"""A tape run once more from the contents of its leaves: in float64, moved a little, or under ``torch.autograd``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from ..errors import NotRecordedError, OverwrittenError, message
from ..gradients import refill
from ..names import call_site, user_frame
from ..plans import UNREAD
from ..tape import Kept, Node, Value, ancestors, describe, unwritten
from ..walk import Sweep
from .case import DOUBLE, SEED, Case, doubled, reads_of, run

__all__ = ["Again", "Unknown"]

Tensor = torch.Tensor


class Unknown(Exception):
    """Torch does not know the derivative of an operation on the tape."""


class Again:
    """The nodes that a value was computed by, as nodes of their own with contents of their own.

    Attributes:
        nodes: the new nodes, in order; `source` gives the recorded one of each.
        twins: for each recorded value the new one.
        held: for each new value its contents.
        root: the new value that stands for the one that was asked for.
    """

    def __init__(self, root: Value, node: Node | None, *, double: bool) -> None:
        self.double = double
        self.nodes: list[Node] = []
        self.source: dict[Node, Node] = {}
        self.twins: dict[Value, Value] = {}
        self.held: dict[Value, Tensor] = {}
        self.random = False
        self._lost: set[Value] = set()  # what was overwritten before any rule needed it
        made: dict[Node, Node] = {}
        for place, each in enumerate(_behind(node)):
            given = _given(each)
            if given is None:
                made[each] = self._renewed(each, place, made)
            else:
                for value, tensor in zip(each.outputs, given, strict=True):
                    self._twin(value, doubled(tensor) if double else tensor.detach().clone())
        self.root = self._leaf(root) if node is None else self.twins[root]
        self.node = None if node is None else made.get(node)

    def _leaf(self, value: Value, *, unread: bool = False) -> Value:
        twin = self.twins.get(value)
        if twin is None or (value in self._lost and not unread):
            try:
                contents = _contents(value)
            except OverwrittenError:
                if not unread:
                    raise
                self._lost.add(value)
                contents = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            tensor = doubled(contents) if self.double else contents.detach().clone()
            twin = self.twins[value] = self._twin(value, tensor)
        return twin

    def _twin(self, value: Value, tensor: Tensor) -> Value:
        twin = Value(tensor, constant=value.constant)
        twin.name, twin.index = value.name, value.index
        self.held[twin] = tensor
        self.twins[value] = twin
        return twin

    def _renewed(self, old: Node, place: int, made: dict[Node, Node]) -> Node:
        # what a write under no_grad left behind is there, and what was there before need not be
        given = _available(old) if old.cut and old.mutates else None
        spared = [old.args[i] for i in UNREAD.get(old.op.forward, ())]
        for value, source in zip(old.inputs, old.sources, strict=True):
            unread = given is not None or any(value is each for each in spared)
            if source is None:
                self._leaf(value, unread=unread)
            elif value in self._lost and not unread:
                _contents(value)  # which says so
        inputs = [self.twins[value] for value in old.inputs]
        filled = iter(inputs)
        args = tuple([_renamed(each, filled, self.double) for each in old.args])
        kwargs = {name: _renamed(each, filled, self.double) for name, each in old.kwargs.items()}
        sources = tuple([None if source is None else made.get(source) for source in old.sources])
        node = Node(old.op, args, kwargs, tuple(inputs), sources, *old.site, old.scope)
        node.outputs_tuple, node.gaps, node.mutates = old.outputs_tuple, old.gaps, old.mutates
        node.cut, node.random = old.cut, old.random
        tensors = [self.held[value] for value in inputs]
        self.random |= old.random
        results = list(run(node, tensors, SEED + place)[0] if given is None else given)
        for i, j in old.mutates if spared else ():
            if old.inputs[i] in self._lost:  # so what it became is not known from that, but perhaps is still there
                moved = old.outputs[j].tensor
                if moved is None or not unwritten(moved):
                    self._lost.add(old.outputs[j])
                else:
                    results[j] = doubled(moved) if self.double else moved.detach()
        outputs = []
        for value, result in zip(old.outputs, results, strict=True):
            tensor = self._as_recorded(result, value)
            tensor = tensor.clone() if any(tensor is each for each in tensors) else tensor
            twin = self._twin(value, tensor)
            twin._node = weakref.ref(node)
            outputs.append(twin)
        node.outputs = tuple(outputs)
        if not node.cut:
            read = zip(reads_of(node), [*tensors, *(self.held[v] for v in outputs)], strict=True)
            node.saved = tuple([Kept(tensor) if reads else None for reads, tensor in read])
        self.nodes.append(node)
        self.source[node] = old
        return node

    def _as_recorded(self, result: Tensor, value: Value) -> Tensor:
        """A write into a tensor of another dtype casts; what is recorded is the result before."""
        dtype = DOUBLE.get(value.dtype, value.dtype) if self.double else value.dtype
        return result if result.dtype == dtype else result.to(dtype)

    def case(self, node: Node) -> Case:
        return Case(node, [self.held[v] for v in node.inputs], [self.held[v] for v in node.outputs])

    # -- the gradients, three ways ---------------------------------------------------------------------------

    def sweep(self, seed: Tensor) -> Sweep:
        """The engine's own sweep, over these nodes."""
        return Sweep(self.root, self.node, seed).run()

    def moved(self, by: dict[Value, Tensor]) -> Tensor:
        """The root where some values are moved; what no gradient passes through stays as it is."""
        overlay: dict[Value, Tensor] = {}
        for value, step in by.items():
            if value.leaf:
                overlay[value] = self.held[value] + step
        for place, node in enumerate(self.nodes):
            if any(value in overlay for value in node.inputs):
                self._run_on(node, place, overlay)
            for value in node.outputs:
                if value in by:
                    overlay[value] = overlay.get(value, self.held[value]) + by[value]
        return overlay.get(self.root, self.held[self.root])

    def slope(self, by: dict[Value, Tensor], seed: Tensor) -> float:
        """How far the root, weighted by `seed`, moves; NaN where an operation does not take what is moved."""
        try:
            return float((seed.conj() * (self.moved(by) - self.held[self.root])).real.sum())
        except RuntimeError:
            return float("nan")

    def _run_on(self, node: Node, place: int, overlay: dict[Value, Tensor]) -> None:
        if node.cut:  # under no_grad the gradient of a tensor passes over a write to it
            for i, j in node.mutates:
                if i >= 0 and node.inputs[i] in overlay:
                    value = node.inputs[i]
                    change = overlay[value] - self.held[value].detach()
                    overlay[node.outputs[j]] = self.held[node.outputs[j]] + change
            return
        if not node.op.differentiable:
            return
        tensors = [overlay.get(value, self.held[value]) for value in node.inputs]
        results = _run_tracked(node, tensors, SEED + place)
        for value, result in zip(node.outputs, results, strict=True):
            if value.differentiable:
                overlay[value] = result if result.dtype == self.held[value].dtype else result.to(self.held[value].dtype)

    def torch_gradients(self, wanted: Sequence[Value], seed: Tensor) -> list[Tensor | None]:
        """``torch.autograd`` on the same operations; ``None`` where the root does not depend on a value.

        Raises:
            Unknown: naming the operation of which torch has no derivative.
        """
        overlay: dict[Value, Tensor] = {}
        with torch.enable_grad():
            asked = dict.fromkeys(wanted)
            for value in asked:
                if value.leaf:
                    overlay[value] = self.held[value].detach().requires_grad_()
            for place, node in enumerate(self.nodes):
                if any(value in overlay for value in node.inputs):
                    try:
                        self._run_on(node, place, overlay)
                    except (RuntimeError, NotImplementedError, TypeError) as error:
                        raise Unknown(f"{node.op.name}: {error}") from None
                    moved = any(v in overlay and overlay[v].requires_grad for v in node.inputs)
                    reached = [overlay[v].requires_grad for v in node.outputs if v in overlay]
                    if moved and reached and not any(reached):
                        raise Unknown(node.op.name)
                for value in node.outputs:
                    if value in asked and value not in overlay:
                        overlay[value] = self.held[value].detach().requires_grad_()
                    elif value in asked and not overlay[value].requires_grad:
                        overlay[value].requires_grad_()
            root = overlay.get(self.root)
            if root is None or not root.requires_grad:
                return [None for _ in wanted]
            found = {value: overlay[value] for value in asked if value in overlay}
            try:
                made = torch.autograd.grad(root, list(found.values()), seed, allow_unused=True)
            except (RuntimeError, NotImplementedError) as error:
                raise Unknown(str(error)) from None
        by_value = dict(zip(found, made, strict=True))
        return [by_value.get(value) for value in wanted]


def _run_tracked(node: Node, tensors: list[Tensor], seed: int) -> list[Tensor]:
    """The forward; tensors that torch takes only without a gradient (statistics, weights of a loss) go without."""
    tracked = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    try:
        return run(node, tensors, seed)[0]
    except RuntimeError:
        if not tracked:
            raise
    for i in tracked:
        alone = [t if k == i else t.detach() for k, t in enumerate(tensors)]
        try:
            run(node, alone, seed)
        except RuntimeError:
            tensors = [t.detach() if k == i else t for k, t in enumerate(tensors)]
    return run(node, tensors, seed)[0]


def _renamed(argument: object, values: object, double: bool) -> object:
    """An argument with the new values in place of the recorded ones."""
    filled = refill(argument, values)
    return doubled(filled) if double and isinstance(filled, torch.dtype) else filled


def _behind(node: Node | None) -> list[Node]:
    """Every node whose results `node` was computed from, and itself, in the order of recording."""
    if node is None:
        return []
    return ancestors(node, lambda here: () if here is not node and _given(here) is not None else here.sources)


def _given(node: Node) -> list[Tensor] | None:
    """What a node that takes no gradient gave (noise, a mask, a constant), where that is still there."""
    if any(value.differentiable for value in node.inputs) or node.mutates:
        return None
    return _available(node)


def _available(node: Node) -> list[Tensor] | None:
    """The outputs of a node as they were recorded, if all of them can still be had."""
    found = []
    for value in node.outputs:
        kept, tensor = value.kept, value.tensor
        if tensor is not None:
            if not unwritten(tensor):
                return None
            found.append(tensor.detach())
        elif kept is not None and kept.intact:
            found.append(kept.tensor)
        else:
            return None
    return found


def _contents(value: Value) -> Tensor:
    """What a leaf held when it was recorded."""
    kept, holder = value.kept, value.holder
    if kept is not None and kept.intact:
        return kept.tensor
    name = value.name or "a tensor"
    if holder is None:
        raise NotRecordedError(
            message(
                f"te.check: {name} that the tape read is gone, so its operations cannot be run again.",
                where=call_site(user_frame()),
                operands=[(name, describe(value))],
                fix="record inside `with te.record() as tape:`, which keeps its leaves, or keep the tensor",
            )
        )
    if value.tensor is None or not unwritten(holder):
        raise OverwrittenError(
            message(
                f"te.check: {name} was changed since it was recorded, so the tape cannot be run again.",
                where=call_site(user_frame()),
                operands=[(name, describe(value))],
                fix=f"call te.check before {name} is changed",
            )
        )
    return holder
