"""The walk back over the tape: the gradients of what was recorded, node by node.

A rule is mathematics for one operation. What is the same for all of them is done here, once: adding up the
contributions to a value that was used several times, and checking that what a rule reads is what was recorded.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._C import DispatchKey
from torch._C import _dispatch_tls_is_dispatch_key_excluded as _is_excluded
from torch._C import _dispatch_tls_set_dispatch_key_excluded as _exclude

from . import recorder
from .aliases import changed_outside
from .errors import TapeError
from .gradients import borrowed, fitted, in_order, refill
from .names import located
from .refusals import closed_error, failed_error, overwritten_error, reshaped_error
from .specialise import specialise
from .steps import Needs, all_steps, made_for, order_of, steps_to
from .tape import (
    Kept,
    Node,
    Value,
    bind,
    bound,
    current_tape,
    next_in_sequence,
    values_by_tensor,
    written_unseen,
)

__all__ = ["Sweep"]

Tensor = torch.Tensor
_AUTOGRAD = DispatchKey.AutogradCPU
_NESTED = {list, tuple}  # the arguments in which there may be values


class Sweep:
    """One walk back from `root`.

    Attributes:
        structure: whether only the recording of the sweep matters and no number in it, so that contents
            overwritten since do not.
        order: the nodes that `root` depends on, in the order of recording.
        reached: for a recorded sweep, each node with how long the tape was once its rule had run.
        arrivals: for a recorded sweep, each value with its complete gradient, in the order of the walk.
        gradients: the gradients of the values that are asked for, as far as known.
    """

    def __init__(
        self,
        root: Value,
        node: Node | None,
        seed: Tensor,
        *,
        given: Tensor | None = None,
        targets: list[Tensor] | None = None,
        record: bool = False,
        structure: bool = False,
    ) -> None:
        self.structure = structure
        self.root = root
        self.order = order_of(node)
        self.record = record
        self.asked: set[Value] | None = None
        if targets is None:
            self._steps = all_steps(self.order)
        else:
            self.asked = made_for(targets, root, self.order)
            self._steps = steps_to(self.asked, targets, self.order)
        self.pending: dict[Value, Tensor] = {}
        self.gradients: dict[Value, Tensor] = {}
        self.arrivals: list[tuple[Value, Tensor]] = []
        self._summed: set[Value] = set()  # whose pending gradient is memory of our own: it may be added to
        self.tape = current_tape()
        self.reached: list[tuple[Node, int]] = []
        self._began = next_in_sequence()
        self._given = given
        self.pending[root] = seed

    def run(self) -> Sweep:
        """Walks back; afterwards `gradients` is complete."""
        recording = recorder.recording(self.tape, sweep=True) if self.record else nullcontext()
        length = self.tape.length
        changed = None if self.structure else changed_outside(self.order)
        if changed is not None:
            raise overwritten_error(*changed)
        try:
            with torch.no_grad(), recording:
                if self.record or self.structure:
                    for node, needs in self._back():
                        self._step(node, needs)
                        self.reached.append((node, self.tape.length))
                else:
                    free = not (_is_excluded(_AUTOGRAD) or torch._C._len_torch_dispatch_stack())
                    try:
                        self._walk(free)
                    finally:
                        if free:
                            _exclude(_AUTOGRAD, False)
                for value in list(self.pending):  # what is left are the leaves
                    self._arrive(value)
                self._separate()
        except BaseException:
            if self.record:
                self.tape.rewind(length)
            raise
        return self

    def _back(self) -> Iterator[tuple[Node, Needs]]:
        """The steps, the last recorded first."""
        nodes, needs = self._steps
        return zip(reversed(nodes), reversed(needs), strict=True)

    def _walk(self, free: bool) -> None:
        """`_step` for each node, with what most of them need written out: it is done for every operation.

        Most nodes have a rule, read what is intact, and their gradients fit as they are. Where it is `free` to, as
        no mode listens, it runs our own rules below torch's autograd, which they ask nothing of.
        """
        pending, gradients, asked, summed = self.pending, self.gradients, self.asked, self._summed
        devices = torch.accelerator.is_available()  # else all tensors are on the CPU, or shapes alone
        intact: set[Kept] = set()  # cells that were looked at: one of a weight is read again and again
        below = False
        for node, needs in self._back():
            op = node.op
            rule = op.grad
            if rule is None or not node.ordinary:
                if below:
                    below = False
                    _exclude(_AUTOGRAD, False)
                self._step(node, needs)
                continue
            inputs, made = node.inputs, node._outputs
            g: Any
            if type(made) is tuple:
                g = tuple([self._arrive(value) for value in made])
                if not any(each is not None for each in g):
                    continue
                given: list[Any] = [*inputs, *made]
            else:
                g = pending.pop(made, None)  # type: ignore[arg-type]
                if g is None:
                    continue
                if (made._tensor() is not None) if asked is None else (made in asked):  # type: ignore[union-attr]
                    gradients[made] = g  # type: ignore[index]
                given = [*inputs, made]
            for i, kept in enumerate(node.saved):
                if kept is not None:
                    tensor = kept.tensor
                    if kept not in intact:
                        holder = given[i]._tensor()
                        if holder is None if kept.own else (holder is tensor and kept.intact):
                            intact.add(kept)
                        else:
                            tensor = self._contents(node, kept, given[i])
                    given[i] = tensor
            if type(made) is tuple:
                count = len(inputs)
                read, given = tuple(given[count:]), given[:count]
            else:
                read = given.pop()
            kwargs = node.kwargs
            if node.args is not inputs:
                left = iter(given)
                given = [
                    next(left) if type(each) is Value else refill(each, left) if type(each) in _NESTED else each
                    for each in node.args
                ]
                if kwargs:
                    kwargs = {name: refill(each, left) for name, each in kwargs.items()}
            if op.rule_is_ours is not below and free:
                below = not below
                _exclude(_AUTOGRAD, below)
            contributions: Any = None
            try:
                if op.spent is not None and g.numel() >= _LARGE and not node.complex:
                    contribution = before = None  # one of them may be `g`
                    if sys.getrefcount(g) == _ALONE - 1 and _may_be_written(g):
                        contributions = op.spent(needs, g, read, *given, **kwargs)
                if contributions is None:
                    contributions = specialise(rule, needs, not node.complex)(g, read, *given, **kwargs)
            except TapeError:
                raise
            except Exception as error:
                raise failed_error(node, [*g] if type(made) is tuple else [g], error) from error
            if type(contributions) is not tuple or len(contributions) != len(inputs):
                alone = type(contributions) is Tensor and len(inputs) == 1
                contributions = (contributions,) if alone else in_order(contributions, node)
            for value, need, contribution in zip(inputs, needs, contributions):  # noqa: B905 - as long, just asked
                if contribution is None or not need:
                    continue
                if (
                    type(contribution) is not Tensor
                    or contribution.shape != value.shape
                    or contribution.dtype is not value.dtype
                    or (devices and contribution.device != value.device)
                ):
                    contribution = fitted(contribution, value, node)
                before = pending.get(value)
                if before is None and not value.closed:
                    pending[value] = contribution
                elif value in summed:
                    before.add_(contribution)  # type: ignore[union-attr]
                else:
                    before = None  # it counts who else has that
                    self._add(value, contribution, node)

    def _step(self, node: Node, needs: Needs) -> None:
        """Takes the gradients of a node's outputs, and passes on those of its inputs."""
        g = [self._arrive(value) for value in node.outputs]
        if not any(each is not None for each in g):
            return
        if node.cut:
            for i, j in node.mutates:  # as in torch: under no_grad a gradient passes over a write
                contribution, shape = g[j], node.inputs[i].shape
                if i >= 0 and contribution is not None:
                    if contribution.shape != shape:  # as in torch, too: unsqueeze_, say
                        contribution = contribution.sum_to_size(shape)
                    self._add(node.inputs[i], contribution, node)
            return
        for value, need, contribution in zip(node.inputs, needs, self._apply(node, g, needs), strict=True):
            if need and contribution is not None:
                self._add(value, fitted(contribution, value, node), node)

    def _arrive(self, value: Value) -> Tensor | None:
        """The complete gradient of a value: all that used it have been passed."""
        g = self.pending.pop(value, None)
        if g is None:
            return None
        if value in self.asked if self.asked is not None else value._tensor() is not None:
            self.gradients[value] = g
        if self.record:
            self.arrivals.append((value, g))
        return g

    def _add(self, value: Value, contribution: Tensor, reader: Node) -> None:
        if value.closed and not (self.structure and value.node is None):
            raise closed_error(value, located(reader))
        before = self.pending.get(value)
        references = sys.getrefcount(before)
        if before is None:
            self.pending[value] = contribution
        elif not self.record and (value in self._summed or (references == _ALONE and _may_be_written(before))):
            before.add_(contribution)
            self._summed.add(value)
        else:
            self.pending[value] = before + contribution
            self._summed.add(value)

    def _apply(self, node: Node, g: list[Tensor | None], needs: Needs) -> Sequence[Tensor | None]:
        """The contributions of one node to its inputs, as its rule gives them."""
        op = node.op
        contents: list[Any] = [*node.inputs, *node.outputs]
        sources = [*node.sources, *[node] * len(node.outputs)]
        for i, kept in enumerate(node.saved):
            if kept is not None:
                contents[i] = self._linked(self._contents(node, kept, contents[i]), contents[i], sources[i])
        count = len(node.inputs)
        outputs, left = contents[count:], iter(contents[:count])
        args = [refill(each, left) for each in node.args]
        kwargs = {name: refill(each, left) for name, each in node.kwargs.items()}
        out, g_out = node.returned(outputs), node.returned(g)
        rule = borrowed(node, needs) if op.grad is None else specialise(op.grad, needs)
        try:
            returned = rule(g_out, out, *args, **kwargs)
        except TapeError:
            raise
        except Exception as error:
            raise failed_error(node, g, error) from error
        return in_order(returned, node)

    def _contents(self, node: Node, kept: Kept, value: Value) -> Tensor:
        """What the rule of `node` is given for a value whose contents it reads: those recorded, or an error."""
        tensor = kept.tensor
        if self.structure or (kept.intact and (value._tensor() is tensor or not written_unseen(value))):
            return tensor
        raise overwritten_error(node, value)

    def _linked(self, tensor: Tensor, value: Value, source: Node | None) -> Tensor:
        """In a sweep that is recorded, a tensor that stands for `value`, so that the recording finds it."""
        if not self.record or bound(tensor) is value:
            return tensor
        with recorder.quietly():
            alias = tensor.detach()
            bind(alias, value, source)
        return alias

    # -- what comes out ---------------------------------------------------------------------------------

    def by_tensor(self) -> list[tuple[Tensor, Tensor]]:
        """The gradients by the tensors that hold the values now; a leaf's are added up."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        late: list[tuple[Value, Tensor, Tensor]] = []
        for value, g in self.gradients.items():
            holder = value.holder
            if holder is None:
                continue
            if bound(holder) is value and not value.stale:
                found[id(holder)] = (holder, g)
            elif value.begins:
                late.append((value, holder, g))
        return list(_with_late(found, late).values()) if late else list(found.values())

    def _separate(self) -> None:
        """Gives each gradient memory of its own: a rule may have returned ``g``, a view, or an argument."""
        seen: set[int] = set()
        for value in list(self.gradients):  # by key: an iterator over the pairs would hold each gradient it gave
            g = self.gradients[value]
            if g.layout is not torch.strided:  # of a sparse tensor: it has no one storage to compare
                self.gradients[value] = g.clone()
                continue
            known = values_by_tensor.get(id(g))
            older = known is not None and (known.node is None or known.node.seq < self._began)
            storage = g.untyped_storage()
            # A rule may have returned a constant of its own: somebody else holds that, and no recording made it.
            held = (known is None and value is not self.root) if self.record else sys.getrefcount(g) > _ALONE
            taken = g is self._given or older or held or storage._cdata in seen
            # counted: the tensor itself and the handle above
            if not taken and _uses(storage) == 3 and g._base is not None and g.is_contiguous():
                # A view of what may be nobody else's: an alias in its place lets go of its base.
                del known
                g = self.gradients[value] = recorder.ALIAS(g)
            if taken or _uses(storage) > 2:
                g = self.gradients[value] = g.clone(memory_format=torch.contiguous_format)
                storage = g.untyped_storage()
            seen.add(storage._cdata)


def _count_alone() -> int:
    found = {0: object()}
    g = found[0]
    return sys.getrefcount(g)


#: What is counted of an object that one dictionary and one name hold; the question may be counted as well.
_ALONE = _count_alone()


#: From how many elements on it is asked whether a gradient may be written to where it lies.
_LARGE = 1 << 14


def _may_be_written(g: Tensor) -> bool:
    """Whether a gradient that nothing in Python refers to besides is large, and nobody else's at all."""
    return (
        g.numel() >= _LARGE
        and type(g) is Tensor  # another may hold a tensor of its own within
        and g.layout is torch.strided
        and g.is_contiguous()
        and not g.is_inference()
        and not weakref.getweakrefcount(g)  # a cache of the rule's, say
        and g._use_count() == 1  # type: ignore[attr-defined]  # torch itself may hold it
        and _is_ours(g.untyped_storage())
    )


def _is_ours(storage: torch.UntypedStorage) -> bool:
    """Whether one tensor alone has that storage, and it alone that memory: not NumPy, a file or another process."""
    return _uses(storage) == 2 and storage.resizable()  # counted: the tensor itself and the handle


def _uses(storage: torch.UntypedStorage) -> int:
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def _with_late(
    found: dict[int, tuple[Tensor, Tensor]], late: list[tuple[Value, Tensor, Tensor]]
) -> dict[int, tuple[Tensor, Tensor]]:
    """`found`, with the gradients of leaves whose tensors were written to since: all readings of a leaf count."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for value, holder, g in late:
        key, now = id(holder), bound(holder)
        met = None if now is None else recorder.updated(now, now.node)  # where a gradient that passes over writes ends
        begins = met is not None and met.begins
        if key in found and not begins:
            continue
        before = sums.get(key) or (found.get(key) if met is now else None)
        if before is not None:
            if before[1].shape != g.shape:
                raise reshaped_error(value, holder)
            g = before[1] + g
        sums[key] = holder, g
    return {**found, **sums}
