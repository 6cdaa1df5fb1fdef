"""The reverse sweep, as a user calls it, and the only place that writes ``.g``; the walk itself is in `walk`.

The forward pass and the sweep are twins, the same nodes in opposite orders::

    for node in nodes:             outputs = node.op.forward(inputs)
    for node in reversed(nodes):   g of the inputs += node.op.grad(g of the outputs, outputs, inputs)

Here is what comes before the walk and after it: what a user gave is looked at, the gradients are written, and
the tapes that were swept are closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._C import DisableTorchFunction

from . import collector, heap, recorder
from .errors import (
    DTypeError,
    NotRecordedError,
    ShapeError,
    TapeError,
    message,
)
from .names import call_site, local_name, user_frame
from .refusals import closed_error
from .tape import (
    DIFFERENTIABLE,
    Node,
    Token,
    Value,
    bind,
    bound,
    current_tape,
    describe,
    global_tape,
    new_global_tape,
    next_in_sequence,
    values_by_tensor,
)
from .walk import Sweep

__all__ = ["backward", "grad", "root_of"]

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
            computed. One that `C` does not depend on is left without ``.g``; one on which `C` depends by way of a
            tape that was swept, too, is refused.
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
    with recorder.quietly(), DisableTorchFunction():  # a function mode of the user's hears its own code, and no rules
        targets = None if wrt is None else _targets(wrt, "te.backward")
        root, node = root_of(C, "te.backward")
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
        _end(found, writes, stays_open=record or keep)


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
    with recorder.quietly(), DisableTorchFunction():
        targets = _targets(wrt, "te.grad")
        root, node = root_of(C, "te.grad")
        sweep = Sweep(root, node, _seed(C, seed), given=seed, targets=targets, record=record).run()
        by_tensor = sweep.by_tensor()
        found = {id(tensor): g for tensor, g in by_tensor}
        results = tuple(found.get(id(tensor)) for tensor in targets)
        if record:
            recorder.listen_to([g for g in results if g is not None], current_tape())
        else:
            _as_given([g for g in results if g is not None])
        _end(sweep, by_tensor, stays_open=record or keep)
        return results


# -- when it is over -----------------------------------------------------------------------------------


def _end(sweep: Sweep, by_tensor: list[tuple[Tensor, Tensor]], *, stays_open: bool) -> None:
    """What comes after a sweep that gave the gradients `by_tensor`: its tapes close, and what waited for it goes on."""
    if not stays_open:
        _close(sweep.order)
    collector.let_go()
    if by_tensor:
        heap.hold_heap(by_tensor[-1][0])  # a leaf, as those come last


def _close(order: list[Node]) -> None:
    """Closes the tapes that were swept: their leaves listen no more, and a new global tape starts.

    What a node has written to without a gradient (statistics, counters) is a leaf again: such a tensor lives on in
    its module, and would keep the whole recording alive with it.
    """
    tokens: set[Token] = set()
    for node in order:
        node.swept = True
        if node.tape is not None:
            tokens.add(node.tape)
        for _, j in node.mutates:
            value = node.outputs[j]
            holder = value.holder
            if value.constant and holder is not None and bound(holder) is value and not value.stale:
                recorder.settle(holder, value)
    for token in tokens:
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


def root_of(C: Tensor, caller: str) -> tuple[Value, Node | None]:
    """The value that `C` holds and the node that made it."""
    if not isinstance(C, Tensor):
        raise DTypeError(
            message(
                f"{caller} takes a recorded tensor, not {type(C).__name__}.",
                where=call_site(user_frame()),
                fix=f"give the tensor itself, before .item() or float(): {caller}(C{', [w]' * (caller == 'te.grad')})",
            )
        )

    base = values_by_tensor.get(id(C._base)) if id(C) not in values_by_tensor and C._base is not None else None
    if base is not None and base.node is not None:  # of the user's own tensor class: torch makes it a view of what ran
        recorder.read(C, current_tape())
    binding = values_by_tensor.get(id(C))
    if binding is None:
        raise _refusal(
            NotRecordedError,
            C,
            f"{caller}: {{name}} is on no tape, so there is nothing to sweep.",
            "compute {name} inside `with te.record():`, or with named operations such as te.mse",
        )
    value = recorder.read(C, current_tape()) if binding.value.stale else binding.value
    node = values_by_tensor[id(C)].node
    if C.dtype not in DIFFERENTIABLE:
        what = f"{caller}: {{name}} has the dtype {C.dtype}, and only floating or complex numbers have a gradient."
        raise _refusal(DTypeError, C, what)
    if value.constant:
        raise _refusal(
            NotRecordedError,
            C,
            f"{caller}: {{name}} is a constant: it was computed under torch.no_grad(), te.pause() "
            "or te.stop_gradient().",
            "compute {name} outside that block",
        )
    if value.closed:
        raise closed_error(value, call_site(user_frame()))
    return value, node


def _refusal(
    kind: type[TapeError], C: Tensor, what: str, fix: str | None = None, seed: Tensor | None = None
) -> TapeError:
    """What says that no sweep can begin at `C`, with this seed; ``{name}`` stands for what the user calls `C`."""
    frame = user_frame()
    name = local_name(frame, C) or "the tensor"
    operands = [(name, describe(C)), *([] if seed is None else [("seed", describe(seed))])]
    fix = fix and fix.format(name=name)
    return kind(message(what.format(name=name), where=call_site(frame), operands=operands, fix=fix))


def _seed(C: Tensor, seed: Tensor | None) -> Tensor:
    """The gradient with which the sweep from `C` begins, in its dtype and on its device."""
    if seed is None:
        if C.numel() != 1:
            raise _refusal(
                ShapeError,
                C,
                f"{{name}} has {C.numel()} elements; its gradient needs a seed of the same shape.",
                "te.backward({name}, torch.ones_like({name})), or sweep from a sum or a mean of {name}",
            )
        return torch.ones(C.shape, dtype=C.dtype, device=C.device)
    if not isinstance(seed, Tensor):
        raise DTypeError(
            message(
                f"the seed must be a tensor, not {type(seed).__name__}.",
                where=call_site(user_frame()),
                fix=f"seed=torch.ones({tuple(C.shape)})",
            )
        )
    if seed.shape != C.shape:
        fix = f"give a seed of shape {tuple(C.shape)}"
        raise _refusal(ShapeError, C, "the seed has another shape than {name}.", fix, seed)
    if seed.is_complex() and not C.is_complex():
        fix = "give a real seed, such as seed.real"
        raise _refusal(DTypeError, C, "the seed is complex, and {name} is real.", fix, seed)
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
