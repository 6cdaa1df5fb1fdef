"""The reverse sweep: the walk back over the tape, and the only place that writes ``.g``.

The forward pass and the sweep are twins, the same nodes in opposite orders::

    for node in nodes:             outputs = node.op.forward(inputs)
    for node in reversed(nodes):   g of the inputs += node.op.grad(g of the outputs, outputs, inputs)

A rule is mathematics for one operation. What is the same for all of them is done here, once: adding up
the contributions to a value that was used several times, summing over the dimensions that an operation
broadcast, giving each gradient its value's dtype, and checking that a rule returned what it should.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch

from . import recorder
from .errors import (
    DTypeError,
    NotRecordedError,
    OverwrittenError,
    RuleError,
    ShapeError,
    SweptError,
    TapeError,
    message,
)
from .gradients import borrowed, fitted, in_order, refill
from .names import call_site, local_name, located, user_frame
from .specialise import specialise
from .tape import (
    Kept,
    Node,
    Value,
    bind,
    bound,
    current_tape,
    describe,
    global_tape,
    new_global_tape,
    next_in_sequence,
    values_by_tensor,
    version_of,
)

__all__ = ["backward", "grad"]

Tensor = torch.Tensor


# -- what a user calls -----------------------------------------------------------------------------------


def backward(
    C: Tensor,
    seed: Tensor | None = None,
    *,
    wrt: Tensor | Sequence[Tensor] | None = None,
    accumulate: bool = False,
    keep: bool = False,
    record: bool = False,
) -> None:
    """Sweeps back from `C`, and leaves on every value that `C` depends on its gradient, as ``.g``.

    Each ``.g`` is a tensor of its value's shape, dtype and device, in memory of its own. It is written,
    not added to.

    Args:
        C: a recorded tensor, of one element unless `seed` is given.
        seed: the gradient of the loss with respect to `C`, of the shape of `C`; one by default.
        wrt: the only tensors (leaves or intermediates) to write ``.g`` on. What they do not need is not
            computed. One that `C` does not depend on is left without ``.g``.
        accumulate: adds to the ``.g`` that is there.
        keep: leaves the tape open; otherwise the sweep closes it (and a new global one starts): it can still
            be swept again, drawn and explained, but no recording goes on from its values. What was swept
            lives as long as `C` does.
        record: records the sweep itself, so that gradients of gradients follow; implies `keep`.

    Raises:
        NotRecordedError: if no tape knows `C`, or a tensor of `wrt` is none.
        ShapeError: if `C` has several elements and no seed, or the seed another shape.
        DTypeError: if `C` is not floating or complex.
        MissingRuleError, RuleError, OverwrittenError, SweptError: naming the operation and its line.
            Whatever is raised, no ``.g`` has changed.
    """
    with recorder.quietly():
        targets = None if wrt is None else _targets(wrt, "te.backward")
        root, node = _root(C, "te.backward")
        found = Sweep(root, node, _seed(C, seed), given=seed, targets=targets, record=record).run()
        writes = found.by_tensor()
        if accumulate:
            with recorder.recording(current_tape(), sweep=True) if record else nullcontext():
                writes = [(tensor, _sum(tensor, g)) for tensor, g in writes]
        for tensor, g in writes:
            tensor.g = g  # type: ignore[attr-defined]
        if targets is not None and not accumulate:
            written = {id(tensor) for tensor, _ in writes}
            for tensor in targets:
                if id(tensor) not in written and hasattr(tensor, "g"):
                    del tensor.g
        if record:
            recorder.listen_to([g for _, g in writes], current_tape())
        else:
            _as_given([g for _, g in writes])
        if not (record or keep):
            _close(found.order)


def grad(
    C: Tensor, wrt: Tensor | Sequence[Tensor], seed: Tensor | None = None, *, keep: bool = False, record: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradients of `C` with respect to `wrt`, as a tuple; writes no ``.g``.

    Args:
        C: a recorded tensor, of one element unless `seed` is given.
        wrt: a tensor or a sequence of them.
        seed: as in `backward`.
        keep: as in `backward`.
        record: records the sweep itself, so that gradients of gradients follow; implies `keep`.

    Returns:
        For each tensor its gradient, of its own shape, dtype and device; ``None`` where `C` does not
        depend on it.

    Raises:
        As `backward`.
    """
    with recorder.quietly():
        targets = _targets(wrt, "te.grad")
        root, node = _root(C, "te.grad")
        sweep = Sweep(root, node, _seed(C, seed), given=seed, targets=targets, record=record).run()
        found = {id(tensor): g for tensor, g in sweep.by_tensor()}
        results = tuple(found.get(id(tensor)) for tensor in targets)
        if record:
            recorder.listen_to([g for g in results if g is not None], current_tape())
        else:
            _as_given([g for g in results if g is not None])
        if not (record or keep):
            _close(sweep.order)
        return results


# -- the sweep -------------------------------------------------------------------------------------------


class Sweep:
    """One walk back from `root`.

    Attributes:
        structure: whether only the recording of the sweep matters and no number in it, so that contents
            overwritten since do not.
        order: the nodes that `root` depends on, in the order of recording.
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
        self.order = _ancestors(node)
        self.record = record
        self.targets = None if targets is None else {id(tensor) for tensor in targets}
        self.asked = None if targets is None else self._asked()
        self.useful = None if self.asked is None else self._useful(self.asked)
        self.pending: dict[Value, Tensor] = {}
        self.gradients: dict[Value, Tensor] = {}
        self.arrivals: list[tuple[Value, Tensor]] = []
        self._summed: set[Value] = set()  # whose pending gradient is memory of our own: it may be added to
        self.tape = current_tape()
        self._began = next_in_sequence()
        self._given = given
        self.pending[root] = seed

    def run(self) -> Sweep:
        """Walks back; afterwards `gradients` is complete."""
        recording = recorder.recording(self.tape, sweep=True) if self.record else nullcontext()
        length = self.tape.length
        try:
            with torch.no_grad(), recording:
                for node in reversed(self.order):
                    self._step(node)
                for value in list(self.pending):  # what is left are the leaves
                    self._arrive(value)
                self._separate()
        except BaseException:
            if self.record:
                self.tape.rewind(length)
            raise
        return self

    def _step(self, node: Node) -> None:
        """Takes the gradients of a node's outputs, and passes on those of its inputs."""
        g = [self._arrive(value) for value in node.outputs]
        if not any(each is not None for each in g):
            return
        if node.cut:
            for i, j in node.mutates:  # as in torch: under no_grad a gradient passes over a write
                if i >= 0 and g[j] is not None:
                    self._add(node.inputs[i], g[j], node)  # type: ignore[arg-type]
            return
        inputs, useful = node.inputs, self.useful
        if useful is None:
            needs = tuple([value.differentiable for value in inputs])
        else:
            needs = tuple([value in useful for value in inputs])
        if True not in needs or not node.op.differentiable:
            return
        for value, need, contribution in zip(inputs, needs, self._apply(node, g, needs), strict=True):
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
        if value.closed and not self.structure:
            raise _closed_error(value, located(reader))
        before = self.pending.get(value)
        if before is None:
            self.pending[value] = contribution
        elif value in self._summed and not self.record:
            before.add_(contribution)
        else:
            self.pending[value] = before + contribution
            self._summed.add(value)

    def _apply(self, node: Node, g: list[Tensor | None], needs: tuple[bool, ...]) -> Sequence[Tensor | None]:
        """The contributions of one node to its inputs, as its rule gives them."""
        op = node.op
        contents: list[Any] = list(node.inputs)
        outputs: list[Any] = list(node.outputs)
        for i, kept in enumerate(node.saved):
            if kept is not None:
                if i < len(contents):
                    contents[i] = self._contents(node, kept, contents[i], node.sources[i])
                else:
                    k = i - len(contents)
                    outputs[k] = self._contents(node, kept, outputs[k], node)
        out, g_out = (outputs[0], g[0]) if not node.outputs_tuple else (node.returned(outputs), node.returned(g))
        if node.args is node.inputs:
            args, kwargs = contents, node.kwargs
        else:
            left = iter(contents)
            args = [refill(each, left) for each in node.args]
            kwargs = {name: refill(each, left) for name, each in node.kwargs.items()}
        rule = borrowed(node, needs) if op.grad is None else specialise(op.grad, needs)
        try:
            returned = rule(g_out, out, *args, **kwargs)
        except TapeError:
            raise
        except Exception as error:
            title = getattr(op.grad, "__name__", "borrowed rule")
            raise RuleError(
                message(
                    f"the rule {title} of {op.name} raised {type(error).__name__}: {error}",
                    where=located(node),
                    operands=_described(node, g),
                )
            ) from error
        return in_order(returned, node)

    def _contents(self, node: Node, kept: Kept, value: Value, source: Node | None) -> Any:
        """What the rule of `node` is given for a value whose contents it reads."""
        tensor = kept.tensor
        if not self.structure and (not kept.intact or (value._tensor() is not tensor and _written_unseen(value))):
            raise OverwrittenError(
                message(
                    f"{value.name or 'a value'} that the rule of {node.op.name} reads "
                    "was changed by a write that the recorder could not see.",
                    where=located(node),
                    operands=[(value.name or "value", describe(value))],
                    fix="write to it inside te.record(), or to a copy of it: .clone()",
                )
            )
        if not self.record or bound(tensor) is value:
            return tensor
        with recorder.quietly():
            alias = tensor.detach()  # a tensor that stands for the value, so that the recording finds it
            bind(alias, value, source)
        return alias

    # -- which values matter ----------------------------------------------------------------------------

    def _asked(self) -> set[Value]:
        """The values that the tensors of `wrt` hold, or held as leaves."""
        assert self.targets is not None
        asked = {self.root} if id(self.root.holder) in self.targets else set()
        for node in self.order:
            for value in (*node.inputs, *node.outputs):
                holder = value.holder
                if holder is None or id(holder) not in self.targets or not value.differentiable:
                    continue
                if value.leaf or bound(holder) is value:
                    asked.add(value)
        return asked

    def _useful(self, asked: set[Value]) -> set[Value]:
        """The values through which a gradient finds its way to those asked for."""
        useful = set(asked)
        # a tensor that is not found here may lie behind a closed value: then that has to say so
        hidden = self.targets is not None and self.targets > {id(value.holder) for value in asked}
        for node in self.order:
            if hidden:
                useful.update(value for value in node.inputs if value.closed)
            if any(value in useful for value in node.inputs):
                useful.update(value for value in node.outputs if value.differentiable)
        return useful

    # -- what comes out ---------------------------------------------------------------------------------

    def by_tensor(self) -> list[tuple[Tensor, Tensor]]:
        """The gradients by the tensors that hold the values now; a leaf's are added up."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        late: list[tuple[Tensor, Tensor]] = []
        for value, g in self.gradients.items():
            holder = value.holder
            if holder is None:
                continue
            if bound(holder) is value and not value.stale:
                found[id(holder)] = (holder, g)
            elif value.leaf:
                late.append((holder, g))
        for holder, g in late:
            now = bound(holder)
            if id(holder) not in found:
                found[id(holder)] = (holder, g)
            elif now is not None and recorder.is_update(now, now.node):
                found[id(holder)] = (holder, g)  # the gradient passed over the write, and met what was there
            elif now is not None and now.leaf:  # one leaf, written to in between: both readings count
                found[id(holder)] = (holder, found[id(holder)][1] + g)
        return list(found.values())

    def _separate(self) -> None:
        """Gives each gradient memory of its own: a rule may have returned ``g``, a view, or an argument."""
        seen: set[int] = set()
        for value, g in self.gradients.items():
            known = values_by_tensor.get(id(g))
            older = known is not None and (known.node is None or known.node.seq < self._began)
            storage = g.untyped_storage()
            # counted: the tensor itself and the handle in the line above
            if g is self._given or older or storage._cdata in seen or _uses(storage) > 2:
                g = g.clone(memory_format=torch.contiguous_format)
                self.gradients[value] = g
                storage = g.untyped_storage()
            seen.add(storage._cdata)


def _uses(storage: torch.UntypedStorage) -> int:
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


_by_seq = attrgetter("seq")


def _ancestors(node: Node | None) -> list[Node]:
    """The nodes through which a gradient can pass from `node` back, in the order of recording."""
    if node is None:
        return []
    seen = {node}
    stack = [node]
    while stack:
        here = stack.pop()
        if not here.op.differentiable or (here.cut and not here.mutates):
            continue
        for i, source in enumerate(here.sources):
            if source is not None and source not in seen and here.inputs[i].differentiable:
                seen.add(source)
                stack.append(source)
    return sorted(seen, key=_by_seq)


def _close(order: list[Node]) -> None:
    """Closes the tapes that were swept: their leaves listen no more, and a new global tape starts."""
    for node in order:
        node.swept = True
    for token in {node.tape for node in order if node.tape is not None}:
        token.closed_at = next_in_sequence()
        recorder.forget_leaves(token)
        if token is global_tape().token:
            new_global_tape()


def _as_given(gradients: list[Tensor]) -> None:
    """In an open block, marks gradients as what no gradient can be taken of, so that a sweep says so."""
    if not recorder.current_tape_is_global():
        for g in gradients:
            value = Value(g)
            value.closed = recorder.SWEEP
            bind(g, value, None)


def _written_unseen(value: Value) -> bool:
    """Whether the tensor that holds the value was written to without the recorder noticing.

    An alias that is kept in its place was made below torch's count of writes, and does not share it.
    """
    holder = value._tensor()
    binding = None if holder is None else values_by_tensor.get(id(holder))
    if holder is None or binding is None or binding.value is not value or value.leaf:
        return False
    return version_of(holder) not in binding.versions


# -- what a user gave -------------------------------------------------------------------------------------


def _targets(wrt: Tensor | Sequence[Tensor], caller: str) -> list[Tensor]:
    targets: list[Any] = list(wrt) if isinstance(wrt, (tuple, list)) else [wrt]
    for each in targets:
        if not isinstance(each, Tensor):
            raise DTypeError(
                message(
                    f"{caller}: wrt takes a tensor or a sequence of tensors, not {type(each).__name__}.",
                    where=call_site(user_frame()),
                )
            )
    return targets


def _root(C: Tensor, caller: str) -> tuple[Value, Node | None]:
    """The value that `C` holds and the node that made it."""
    frame = user_frame()
    if not isinstance(C, Tensor):
        raise DTypeError(message(f"{caller} takes a recorded tensor, not {type(C).__name__}.", where=call_site(frame)))
    name = local_name(frame, C) or "the tensor"
    row = [(name, describe(C))]
    binding = values_by_tensor.get(id(C))
    if binding is None:
        raise NotRecordedError(
            message(
                f"{caller}: {name} is on no tape, so there is nothing to sweep.",
                where=call_site(frame),
                operands=row,
                fix=f"compute {name} inside `with te.record():`, or with named operations such as te.mse",
            )
        )
    value = recorder.read(C, current_tape()) if binding.value.stale else binding.value
    node = values_by_tensor[id(C)].node
    if not (C.dtype.is_floating_point or C.dtype.is_complex):
        raise DTypeError(
            message(
                f"{caller}: {name} has the dtype {C.dtype}, and only floating or complex numbers have a gradient.",
                where=call_site(frame),
                operands=row,
            )
        )
    if value.constant:
        raise NotRecordedError(
            message(
                f"{caller}: {name} is a constant: it was computed under torch.no_grad(), te.pause() "
                "or te.stop_gradient().",
                where=call_site(frame),
                operands=row,
                fix=f"compute {name} outside that block",
            )
        )
    if value.closed:
        raise _closed_error(value, call_site(frame))
    return value, node


def _seed(C: Tensor, seed: Tensor | None) -> Tensor:
    frame = user_frame()
    name = local_name(frame, C) or "the tensor"
    if seed is None:
        if C.numel() != 1:
            raise ShapeError(
                message(
                    f"{name} has {C.numel()} elements; its gradient needs a seed of the same shape.",
                    where=call_site(frame),
                    operands=[(name, describe(C))],
                    fix=f"te.backward({name}, torch.ones_like({name})), or sweep from a sum or a mean of {name}",
                )
            )
        return torch.ones_like(C, memory_format=torch.contiguous_format).as_subclass(Tensor)
    if not isinstance(seed, Tensor):
        raise DTypeError(message(f"the seed must be a tensor, not {type(seed).__name__}.", where=call_site(frame)))
    if seed.shape != C.shape:
        raise ShapeError(
            message(
                f"the seed has another shape than {name}.",
                where=call_site(frame),
                operands=[(name, describe(C)), ("seed", describe(seed))],
                fix=f"give a seed of shape {tuple(C.shape)}",
            )
        )
    if seed.is_complex() and not C.is_complex():
        raise DTypeError(
            message(
                f"the seed is complex, and {name} is real.",
                where=call_site(frame),
                operands=[(name, describe(C)), ("seed", describe(seed))],
                fix="give a real seed, such as seed.real",
            )
        )
    return seed if seed.dtype == C.dtype and seed.device == C.device else seed.to(C.device, C.dtype)


def _sum(tensor: Tensor, g: Tensor) -> Tensor:
    before = getattr(tensor, "g", None)
    if before is None:
        return g
    if not isinstance(before, Tensor) or before.shape != g.shape:
        kind = ShapeError if isinstance(before, Tensor) else DTypeError
        there = describe(before) if isinstance(before, Tensor) else f"{type(before).__name__}, not a tensor"
        raise kind(
            message(
                "accumulate=True: the .g that is there cannot be added to.",
                where=call_site(user_frame()),
                operands=[(".g", there), ("new .g", describe(g))],
                fix="del it before the sweep",
            )
        )
    with torch.no_grad():
        return before.to(g.device, g.dtype) + g


def _described(node: Node, g: list[Tensor | None]) -> list[tuple[str, str]]:
    rows = [("g", describe(each)) for each in g if each is not None]
    return rows + [(name, describe(v)) for name, v in zip(node.input_names, node.inputs, strict=True)]


def _closed_error(value: Value, where: str | None) -> TapeError:
    """What says that no gradient may pass into a value."""
    kind = {recorder.SWEPT: SweptError, recorder.UNSEEN: OverwrittenError}.get(value.closed, NotRecordedError)
    name = value.name or "a value"
    return kind(
        message(
            f"the gradient reaches {name}, which {value.closed}.",
            where=where,
            operands=[(value.name or "value", describe(value))],
            fix=_way_around(value),
        )
    )


def _way_around(value: Value) -> str:
    name = value.name or "it"
    if value.closed == recorder.SWEPT:
        return f"pass keep=True to the first sweep, or go on from te.stop_gradient({name})"
    if value.closed == recorder.SWEEP:
        return "pass record=True to that sweep"
    if value.closed == recorder.OUTSIDE:
        return f"compute {name} inside `with te.record():`, or go on from {name}.detach()"
    return f"write to {name} inside the recording, or to a copy of it: .clone()"
