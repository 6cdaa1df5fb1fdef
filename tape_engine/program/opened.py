"""Named operations, opened up into the torch operations of their bodies.

A replay that knew a named operation only as a whole would have to call its Python body every time. So the
body runs when the tape is frozen, on stand-ins of the recorded shapes, and what it does is recorded. It
runs twice, on other numbers: only what is the same both times is what it always does. A body that
branches on its numbers, draws random ones or leaves torch is left whole, and called on each replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..exits import close_exits, open_exits
from ..places import extent
from ..recorder import CalledBack, FunctionOp, called_again, recording
from ..recorder.apart import Apart
from ..tape import Node, Tape, Value, bind, bound, pop_tape, push_tape
from .data import LIFT, VIEWS, Frozen, sized_by_elements
from .guards import generators_kept

__all__ = ["opened", "renamed"]

Tensor = torch.Tensor
Large = dict[tuple[torch.dtype, torch.device, int], Tensor]

LARGE = 1 << 20  # elements from which on stand-ins lie in one memory: to fill it anew takes longer than the body


@dataclass
class _Body:
    """One run of a body: the stand-ins' values, the operations, what came out, and the tensors it read besides.

    `chose` says that it got a tensor itself where it might have got a copy, `asked` that it asked for strides.
    """

    given: list[Value]
    steps: list[Node]
    made: list[Value]
    besides: dict[Value, Tensor]
    chose: bool
    asked: bool


def opened(node: Node, frozen: Frozen) -> list[Node]:
    """The torch operations of which a named operation consists; the node itself if they cannot be told."""
    if not node.op.is_named or node.op in VIEWS or node.result is not None:
        return [node]
    if isinstance(node.op, FunctionOp):
        return [called_again(node)]
    if isinstance(node.op, CalledBack):
        return [node]
    with generators_kept({v.device for v in node.inputs}):
        body = _run(node, 0, frozen.stand_ins)
        again = None if body is None else _run(node, 1, frozen.stand_ins)
    if body is None or again is None or not _alike(body, again):
        return [node]
    names = dict(zip(body.given, node.inputs, strict=True))
    for value, output in zip(body.made, node.outputs, strict=True):
        if value in names or value in body.besides:
            frozen.same[output] = names.get(value, value)  # an argument handed through, or one output twice
        else:
            names[value] = output
    for step in body.steps:
        step.args, step.kwargs = renamed(step.args, names), renamed(step.kwargs, names)
        step.inputs = tuple([names.get(v, v) for v in step.inputs])
        step.outputs = tuple([names.get(v, v) for v in step.outputs])
        step._code, step._lasti, step.scope, step.saved = node._code, node._lasti, node.scope, ()
    frozen.held += body.besides.values()
    if body.chose or body.asked:
        frozen.unsure.append((node, body.asked))
    return body.steps


def _run(node: Node, turn: int, large: Large) -> _Body | None:
    """Runs the body and records it; ``None`` if it fails, or does what a list of operations cannot hold."""
    tape = Tape(strong=True)
    given = [_stand_in(value, turn, large) for value in node.inputs]
    contents = iter(given)
    args = _refilled(node.args, contents)
    kwargs = _refilled(node.kwargs, contents)
    push_tape(tape)
    open_exits()
    try:
        values = [Value(tensor) for tensor in given]
        for tensor, value in zip(given, values, strict=True):
            bind(tensor, value, None)
        with torch.no_grad(), recording(tape, sweep=True, opening=True), Apart():
            result = node.op.forward(*args, **kwargs)
    except Exception:  # whatever a body needs that stand-ins lack: it is run as it is
        return None
    finally:
        close_exits()
        pop_tape(tape)
    tensors = [t for t in ([result] if isinstance(result, Tensor) else result) if t is not None]
    found = [bound(tensor) for tensor in tensors]
    made = [value for value in found if value is not None and not value.stale]
    if len(made) != len(found) or len(made) != len(node.outputs):
        return None
    known = {*values, *(v for step in tape.nodes for v in step.outputs)}
    besides: dict[Value, Tensor] = {}
    for value in (*(v for step in tape.nodes for v in step.inputs), *made):
        if value not in known:
            holder = value.holder
            if holder is None:
                return None
            besides[value] = holder
    own = {id(tensor) for tensor in (*given, *besides.values())}
    for step in tape.nodes:
        writes = any(id(v.holder) in own for v in step.outputs) or any(i < 0 for i, _ in step.mutates)
        if step.random or step.result is not None or writes or sized_by_elements(step):
            return None
    chose, asked = any(v.chosen >= 0 for v in tape.asked), any(v.asked for v in tape.asked)
    return _Body(values, tape.nodes, made, besides, chose, asked)


def _alike(one: _Body, other: _Body) -> bool:
    """Whether two runs of a body did the same."""
    if len(one.steps) != len(other.steps):
        return False
    pairs = dict(zip(one.given, other.given, strict=True))
    lifted = {v for step in one.steps if step.op.forward is LIFT for v in step.inputs}
    for a, b in zip(one.besides.items(), other.besides.items(), strict=False):
        constant = a[0] in lifted and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1])
        if constant or a[1] is b[1]:
            pairs[a[0]] = b[0]
    for step, twin in zip(one.steps, other.steps, strict=True):
        if step.op is not twin.op or not _equal(step.args, twin.args, pairs):
            return False
        if not _equal(step.kwargs, twin.kwargs, pairs) or len(step.outputs) != len(twin.outputs):
            return False
        for v, w in zip(step.outputs, twin.outputs, strict=True):
            if v.shape != w.shape or v.dtype != w.dtype:
                return False
            pairs[v] = w
    return all(pairs.get(v) is w for v, w in zip(one.made, other.made, strict=True))


def _equal(a: Any, b: Any, pairs: dict[Value, Value]) -> bool:
    if isinstance(a, Value):
        return pairs.get(a) is b
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y, pairs) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k], pairs) for k in a)
    return bool(a == b or (a != a and b != b))


def renamed(argument: Any, names: dict[Value, Value]) -> Any:
    """An argument of a node with other values in the place of those that `names` knows."""
    if isinstance(argument, Value):
        return names.get(argument, argument)
    if isinstance(argument, dict):
        return {name: renamed(each, names) for name, each in argument.items()}
    if type(argument) in (list, tuple):
        return type(argument)([renamed(each, names) for each in argument])
    return argument


def _refilled(argument: Any, contents: Iterator[Tensor]) -> Any:
    if isinstance(argument, Value):
        return next(contents)
    if isinstance(argument, dict):
        return {name: _refilled(each, contents) for name, each in argument.items()}
    if type(argument) in (list, tuple):  # a namedtuple is the user's own, and holds no value
        return type(argument)([_refilled(each, contents) for each in argument])
    return argument


def _stand_in(value: Value, turn: int, large: Large) -> Tensor:
    """A tensor of a value's shape and strides: rising above zero, then falling below; 0, then 1.

    `large` keeps what was made for large ones, as a body that writes to its arguments is not opened up anyway.
    """
    size = extent(value.shape, value.strides) if value.strides else value.numel()
    key = value.dtype, value.device, turn
    flat = large.get(key) if size >= LARGE else None
    if flat is None or flat.numel() < size:
        if value.dtype.is_floating_point or value.dtype.is_complex:
            low, high = ((0.1, 0.9), (-0.2, -0.8))[turn]
            flat = torch.linspace(low, high, size, device=value.device).to(value.dtype)
        else:
            flat = torch.full((size,), turn, dtype=value.dtype, device=value.device)
        if size >= LARGE:
            large[key] = flat
    flat = flat[:size]
    return flat.as_strided(value.shape, value.strides) if value.strides else flat.reshape(value.shape)
