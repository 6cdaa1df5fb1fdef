"""A tape frozen: the list of nodes that a replay runs, forward and back.

Freezing turns a tape into plain data for the passes and the backends: nodes of torch's own operations in
an order in which they can run, and the values that stand at its rim. Named operations are opened up into
the torch operations of their bodies, and the reverse sweep is recorded once (it is a recording like any
other), so that forward and backward are one list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..aliases import extent
from ..errors import DTypeError, NotRecordedError, ShapeError, message
from ..names import call_site, local_name, names_of, user_frame
from ..recorder import quietly, recording
from ..sweep import Sweep
from ..tape import Node, Tape, Value, bind, bound, describe, pop_tape, push_tape, unbind, values_by_tensor
from .data import DESCRIBED, SAME, Frozen
from .passes.dead import drop_dead

__all__ = ["freeze_nodes"]

Tensor = torch.Tensor


def freeze_nodes(tape: Tape, inputs: Sequence[Tensor], outputs: Sequence[Tensor], wrt: Any, *, single: bool) -> Frozen:
    """Freezes `tape` from `inputs` to `outputs`, with the sweep from the first output to `wrt`.

    Raises:
        NotRecordedError: for an output that is not on the tape.
        DTypeError: for an input, output or `wrt` that is no tensor.
        ShapeError: for two inputs that are the same tensor.
    """
    made = [_output(each) for each in outputs]
    nodes = _needed(tape, [value for value, _ in made])
    leaves = _leaves(nodes, [value for value, _ in made])
    rim = _inputs(inputs, leaves)
    seed_tensor = torch.ones_like(outputs[0], memory_format=torch.contiguous_format).as_subclass(Tensor)
    seed = Value(seed_tensor)
    seed.name = "seed"
    frozen = Frozen(
        forward=[],
        inputs=rim,
        given=list(inputs),
        live={},
        outputs=[value for value, _ in made],
        single=single,
        seed=seed,
        names=names_of(nodes),
    )
    frozen.forward = [each for node in nodes for each in _opened(node, frozen)]
    frozen.writes = _writes(nodes, leaves)
    root, source = made[0]
    if root.differentiable:
        bind(seed_tensor, seed, None)
        _record_sweep(frozen, root, source, seed_tensor, wrt)
        unbind(seed_tensor)
    _merge_same(frozen)
    _find_live(frozen)
    return frozen


# -- the rim -----------------------------------------------------------------------------------------------


def _output(tensor: Any) -> tuple[Value, Node | None]:
    if not isinstance(tensor, Tensor):
        raise DTypeError(
            message(f"tape.program: an output is {type(tensor).__name__}, not a tensor.", where=call_site(user_frame()))
        )
    entry = values_by_tensor.get(id(tensor))
    if entry is None:
        name = local_name(user_frame(), tensor) or "an output"
        raise NotRecordedError(
            message(
                f"tape.program: {name} is not on the tape.",
                where=call_site(user_frame()),
                operands=[(name, describe(tensor))],
                fix="give a tensor that was computed inside the recording",
            )
        )
    return entry[1], entry[2]


def _needed(tape: Tape, outputs: list[Value]) -> list[Node]:
    """The nodes that the outputs depend on, those with an effect of their own, and those of other tapes before them."""
    nodes = tape.nodes
    on_tape = set(nodes)
    wanted = [node for node in nodes if node.random or node.mutates or node.result is not None]
    wanted += [source for value in outputs if (source := value.node) is not None]
    seen: set[Node] = set()
    while wanted:
        node = wanted.pop()
        if node in seen:
            continue
        seen.add(node)
        wanted += [source for source in node.sources if source is not None and (source in on_tape or not tape.strong)]
    return sorted(seen, key=lambda node: node.seq)


def _leaves(nodes: list[Node], outputs: list[Value]) -> dict[Value, Tensor | None]:
    """The values that the nodes read and none of them makes, with their tensors."""
    made = {value for node in nodes for value in node.outputs}
    read = [value for node in nodes for value in node.inputs] + outputs
    return {value: value.holder for value in read if value not in made}


def _inputs(inputs: Sequence[Tensor], leaves: dict[Value, Tensor | None]) -> list[Value | None]:
    found: list[Value | None] = []
    for tensor in inputs:
        if not isinstance(tensor, Tensor):
            raise DTypeError(
                message(
                    f"tape.program: an input is {type(tensor).__name__}, not a tensor.", where=call_site(user_frame())
                )
            )
        value = next((v for v, holder in leaves.items() if holder is tensor), None)
        if value is not None and value in found:
            name = local_name(user_frame(), tensor) or "a tensor"
            raise ShapeError(
                message(f"tape.program: {name} is given as an input twice.", where=call_site(user_frame()))
            )
        if value is None and bound(tensor) is not None and not bound(tensor).leaf:  # type: ignore[union-attr]
            name = local_name(user_frame(), tensor) or "an input"
            raise NotRecordedError(
                message(
                    f"tape.program: {name} was computed inside the recording, so it cannot be an input of its replay.",
                    where=call_site(user_frame()),
                    operands=[(name, describe(tensor))],
                    fix="give the tensors that the recorded code was given",
                )
            )
        found.append(value)
    return found


def _writes(nodes: list[Node], leaves: dict[Value, Tensor | None]) -> list[tuple[Value, Value]]:
    """The leaves that were written to, each with the value that its tensor held at the end."""
    first: dict[Value, Value] = {}
    last: dict[Value, Value] = {}
    for node in nodes:
        steps = [(node.inputs[i], node.outputs[j]) for i, j in node.mutates if i >= 0]
        if node.op.name == "write_view":
            steps.append((node.inputs[0], node.outputs[0]))
        for before, after in steps:
            origin = first.get(before, before)
            if origin in leaves:
                first[after] = origin
                last[origin] = after
    return list(last.items())


def _merge_same(frozen: Frozen) -> None:
    """Operations whose result is their argument are left out: both values are one."""
    for nodes in (frozen.forward, frozen.backward):
        for node in nodes:
            if node.op.forward in SAME:
                frozen.same[frozen.canonical(node.outputs[0])] = frozen.canonical(node.inputs[0])
        nodes[:] = [node for node in nodes if node.op.forward not in SAME]


def _find_live(frozen: Frozen) -> None:
    """Every value that is read and never made is a live reference to its tensor."""
    nodes = drop_dead(frozen, with_sweep=True)
    made = {frozen.canonical(value) for node in nodes for value in node.outputs}
    rim = {value for value in (*frozen.inputs, frozen.seed) if value is not None}
    read = [v for node in nodes if node.op.forward not in DESCRIBED for v in node.inputs]
    read += [*frozen.outputs, *(value for _, value in frozen.gradients)]
    for value in map(frozen.canonical, read):
        if value in made or value in rim or value in frozen.live:
            continue
        holder = value.holder
        if holder is None and value.kept is not None:
            holder = value.kept.tensor
        if holder is None:
            raise NotRecordedError(
                message(
                    f"tape.program: {value.name or 'a value'} that the tape reads is gone; "
                    "the tensor was dropped, and only a tape of te.record() keeps it.",
                    operands=[(value.name or "value", describe(value))],
                    fix="record inside `with te.record() as tape:`, or keep the tensor",
                )
            )
        frozen.live[value] = holder


# -- named operations, opened up ----------------------------------------------------------------------------


def _opened(node: Node, frozen: Frozen) -> list[Node]:
    """The torch operations of which a named operation consists; the node itself if they cannot be told.

    The body runs once, on stand-ins of the recorded shapes, so that it needs neither the values of the
    recording nor a change to any tensor.
    """
    if not node.op.is_named:
        return [node]
    inner = Tape(strong=True)
    pairs = [(_stand_in(value), value) for value in node.inputs]
    contents = iter([tensor for tensor, _ in pairs])
    args = [_refill(each, contents) for each in node.args]
    kwargs = {name: _refill(each, contents) for name, each in node.kwargs.items()}
    state = torch.get_rng_state()
    push_tape(inner)
    try:
        for (tensor, value), source in zip(pairs, node.sources, strict=True):
            bind(tensor, value, source)
        with torch.no_grad(), recording(inner, sweep=True, opening=True):
            result = node.op.forward(*args, **kwargs)
    except Exception:  # a body that needs its real arguments is run as it is
        return [node]
    finally:
        pop_tape(inner)
        torch.set_rng_state(state)
    made = [result] if isinstance(result, Tensor) else list(result)
    values = [bound(tensor) for tensor in made]
    steps = inner.nodes
    sound = {value for step in steps for value in step.outputs} | set(node.inputs)
    foreign = [v for step in steps for v in step.inputs if v not in sound]
    unsound = foreign or any(step.random or step.result is not None or step.mutates for step in steps)
    if unsound or len(values) != len(node.outputs) or any(value is None or value not in sound for value in values):
        return [node]
    for original, value in zip(node.outputs, values, strict=True):
        assert value is not None
        if value in frozen.same or value in frozen.outputs:
            return [node]
        if value in node.inputs:
            frozen.same[original] = value
        else:
            frozen.same[value] = original
    for step in steps:
        step._code, step._lasti, step.scope = node._code, node._lasti, node.scope
    return steps


def _stand_in(value: Value) -> Tensor:
    """Zeros of a value's shape and strides."""
    size = extent(value.shape, value.strides) if value.strides else value.numel()
    flat = torch.zeros(size, dtype=value.dtype, device=value.device)
    return flat.as_strided(value.shape, value.strides) if value.strides else flat.reshape(value.shape)


def _refill(argument: Any, contents: Any) -> Any:
    if isinstance(argument, Value):
        return next(contents)
    if isinstance(argument, (list, tuple)):
        return type(argument)([_refill(each, contents) for each in argument])
    return argument


# -- the sweep, recorded ---------------------------------------------------------------------------------------


def _record_sweep(frozen: Frozen, root: Value, source: Node | None, seed: Tensor, wrt: Any) -> None:
    targets = None if wrt is None else [wrt] if isinstance(wrt, Tensor) else list(wrt)
    for each in targets or []:
        if not isinstance(each, Tensor):
            raise DTypeError(
                message(f"tape.program: wrt takes tensors, not {type(each).__name__}.", where=call_site(user_frame()))
            )
    inner = Tape(strong=True)
    push_tape(inner)
    try:
        with quietly():
            sweep = Sweep(root, source, seed, targets=targets, record=True, structure=True).run()
            found = sweep.by_tensor()
            leaves = {id(v.holder) for node in sweep.order for v in node.inputs if v.leaf}
            for tensor, g in found:
                value = bound(g)
                if value is None or (targets is None and id(tensor) not in leaves):
                    continue
                place = next((i for i, given in enumerate(frozen.given) if given is tensor), None)
                frozen.gradients.append((tensor if place is None else place, value))
            arrivals = [(value, bound(g)) for value, g in sweep.arrivals]
    finally:
        pop_tape(inner)
    frozen.backward = [each for node in inner.nodes for each in _opened(node, frozen)]
    names = frozen.names
    for value, g_value in arrivals:
        if g_value is not None and id(value) in names:
            names.setdefault(id(g_value), f"{names[id(value)]}_g")
