"""A tape frozen: the list of nodes that a replay runs, forward and back.

Freezing turns a tape into plain data for the passes and the backends: nodes of torch's own operations in
an order in which they can run, and the values that stand at its rim. Named operations are opened up into
the torch operations of their bodies, and the reverse sweep is recorded once (it is a recording like any
other), so that forward and backward are one list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..errors import NotRecordedError, ShapeError, message
from ..names import call_site, local_name, located, names_of, user_frame
from ..places import write_view
from ..recorder import PARTED, SWEEP, SWEPT, UNFOLLOWED, UNSEEN, freezing, quietly, read, recording
from ..tape import Node, Tape, Value, bind, bound, describe, pop_tape, push_tape, unbind, values_by_tensor
from ..walk import Sweep
from .bare import bare, bare_tape
from .data import DESCRIBED, LIFT, SAME, STEPPED, Frozen, sized_by_elements
from .decisive import decisive
from .lying import as_they_lay, strided
from .opened import opened
from .passes.common import merge_common
from .passes.dead import drop_dead

__all__ = ["freeze_nodes"]

Tensor = torch.Tensor


def freeze_nodes(
    tape: Tape, inputs: Sequence[Tensor], outputs: Sequence[Tensor], targets: list[Tensor] | None, *, single: bool
) -> Frozen:
    """Freezes `tape` from `inputs` to `outputs`, with the sweep from the first output to `targets`.

    Raises:
        NotRecordedError: for an output that is not on the tape, an input that was computed on it, a leaf that
            changed between two readings, or is gone.
        ShapeError: for two inputs that are the same tensor.
    """
    _refuse_unfollowed(tape)
    end = Tape(strong=True)  # what has to be read off once more at the end of the recording
    made = [_output(each, tape, end) for each in outputs]
    recorded = [*_needed(tape, made, end, inputs), *end.nodes]
    _refuse_contexts(recorded)
    known: dict[Node, Node] = {}
    replayed = bare_tape(tape, known)
    nodes = bare(recorded, known)
    leaves = _leaves(recorded, [value for value, _ in made], tape)
    seed_tensor = torch.ones_like(outputs[0], memory_format=torch.contiguous_format).as_subclass(Tensor)
    seed = Value(seed_tensor)
    seed.name = "seed"
    titles = [local_name(user_frame(), each) or f"input{i}" for i, each in enumerate(inputs)]
    rim = _inputs(inputs, leaves, titles)
    frozen = Frozen(
        tape=replayed,
        nodes=nodes,
        leaves=leaves,
        inputs=rim,
        given=list(inputs),
        titles=titles,
        outputs=[value for value, _ in made],
        single=single,
        seed=seed,
        names=names_of(nodes),
    )
    _join_readings(frozen)
    steps = {node: opened(node, frozen) for node in nodes}
    frozen.forward = [each for made in steps.values() for each in made]
    frozen.writes = _writes(nodes, leaves, rim)
    for tensor, name in zip(inputs, titles, strict=True):
        base = tensor._base
        if base is None or any(leaf.holder is tensor for leaf, _ in frozen.writes):
            continue
        if any(v.holder is base for node in replayed.nodes if node.op is write_view for v in node.outputs):
            what = f"tape.program: {name} is a slice of a tensor that the recorded code writes to through another view."
            raise _refuse(what, tensor, name, "record on a tensor of its own: .clone()")
    if made[0][0].differentiable:
        bind(seed_tensor, seed, None)
        _record_sweep(frozen, *made[0], seed_tensor, targets)
        unbind(seed_tensor)
    if targets is not None:
        reached = {id(frozen.given[t] if isinstance(t, int) else t) for t, _ in frozen.gradients}
        frozen.unreached = [_target(each, frozen) for each in targets if id(each) not in reached]
    lying = strided(tape, frozen, steps)
    _merge_same(frozen)
    merge_common(frozen)
    _find_live(frozen)
    frozen.lying = as_they_lay(lying, frozen)
    frozen.held.clear()  # what of it is read is live now
    frozen.stand_ins.clear()
    return frozen


def _refuse_unfollowed(tape: Tape) -> None:
    """Refuses a recording of code that did what a replay could not do again."""
    if tape.streams is not None and tape.streams.moved:
        raise NotRecordedError(
            message(
                "tape.program: a random generator was seeded or moved between two draws of the recorded code: "
                "a replay would draw other numbers than running it again.",
                where=tape.streams.moved,
                fix="seed before the block, and before each replay that is to repeat it",
            )
        )
    if tape.disordered is not None:
        how, fix, where = tape.disordered
        what = f"tape.program: the recorded code {how}, in an order that torch does not tell."
        raise NotRecordedError(message(what, where=where, fix=fix))
    if tape.unfollowed is not None:
        what, where = tape.unfollowed
        raise NotRecordedError(
            message(
                f"tape.program: the recorded code gave a tensor other contents by {what}, which is no operation.",
                where=where,
                fix="write to the elements: x.copy_(...)",
            )
        )


def _refuse_contexts(nodes: Iterable[Node]) -> None:
    """Refuses a recorded sweep through a custom function: it ran on the context of the recorded forward."""
    for node in nodes:
        if node.context is not None:
            raise NotRecordedError(
                message(
                    f"tape.program: the backward of {node.context}, a torch.autograd.Function, was recorded with what "
                    "its forward had kept: a replay of the forward keeps something else.",
                    where=located(node),
                    fix="make it an operation with a rule: te.op",
                )
            )


# -- the rim -----------------------------------------------------------------------------------------------


def _refuse(what: str, tensor: Tensor, name: str, fix: str) -> NotRecordedError:
    return NotRecordedError(message(what, where=call_site(user_frame()), operands=[(name, describe(tensor))], fix=fix))


def _output(tensor: Tensor, tape: Tape, end: Tape) -> tuple[Value, Node | None]:
    """The value that an output holds now, and the node that made it."""
    binding = values_by_tensor.get(id(tensor))
    above = None if binding is not None or tensor._base is None else bound(tensor._base)
    # A view whose base was written to since; or of a class of the user's, under which torch has dressed up the result.
    if (above is not None and above.node is not None) or (binding is not None and binding.value.stale):
        with quietly():
            read(tensor, end)
        binding = values_by_tensor[id(tensor)]
    value, node = (None, None) if binding is None else (binding.value, binding.node)
    if node is None:
        on_tape = any(value is v for n in tape.nodes for v in n.inputs)
    else:
        on_tape = node.tape is end.token or (node.tape is tape.token and (not tape.strong or node in tape.nodes))
    if value is None or not on_tape:
        name = local_name(user_frame(), tensor) or "an output"
        fix = "give a tensor that was computed inside the recording"
        raise _refuse(f"tape.program: {name} is not on the tape.", tensor, name, fix)
    return value, node


def _needed(
    tape: Tape, outputs: Iterable[tuple[Value, Node | None]], end: Tape, inputs: Sequence[Tensor]
) -> list[Node]:
    """The nodes that the outputs depend on, and for a ``te.record()`` block those with an effect of their own.

    The global tape holds what other code does as well: of that, only what the outputs depend on is meant.
    """
    nodes = tape.nodes
    on_tape = set(nodes)
    wanted = [node for _, node in outputs if node is not None] + [s for n in end.nodes for s in n.sources if s]
    if tape.strong:
        made = {value for node in nodes for value in node.outputs}
        read_from = [v.holder for node in nodes for v in node.inputs if v not in made]  # also off other tapes
        rim = {id(tensor) for tensor in (*tape.held, *read_from) if tensor is not None}
        for node in nodes:
            guards = node.result is not None or sized_by_elements(node)
            writes = any(i < 0 for i, _ in node.mutates) or any(id(v.holder) in rim for v in node.outputs)
            if guards or writes or node.random:
                wanted.append(node)
    seen: set[Node] = set()
    while wanted:
        node = wanted.pop()
        if node in seen or (tape.strong and node not in on_tape):
            continue
        seen.add(node)
        wanted += [source for source in node.sources if source is not None]
    if not tape.strong:
        seen |= decisive(tape, seen, inputs)
    return sorted(seen, key=lambda node: node.seq)


def _leaves(nodes: list[Node], outputs: list[Value], tape: Tape) -> dict[Value, Tensor | None]:
    """The values that the nodes read and none of them makes, with their tensors.

    Among them those of the caller's tensors that are written to without being read (``out=``).
    """
    made = {value for node in nodes for value in node.outputs}
    read = [value for node in nodes for value in node.inputs] + outputs
    leaves = {value: value.holder for value in read if value not in made}
    known = {id(holder) for holder in leaves.values() if holder is not None}
    first = {id(v.holder): node for node in reversed(tape.nodes) for v in node.outputs}
    for node in nodes:
        for holder in [node.outputs[j].holder for i, j in node.mutates if i < 0]:
            if holder is not None and id(holder) not in known and first.get(id(holder)) is node:
                leaves[Value(holder)] = holder
    return leaves


def _inputs(inputs: Sequence[Tensor], leaves: dict[Value, Tensor | None], titles: list[str]) -> list[Value | None]:
    by_holder = {id(holder): value for value, holder in reversed(leaves.items()) if holder is not None}
    found: list[Value | None] = []
    for i, (tensor, name) in enumerate(zip(inputs, titles, strict=True)):
        if any(tensor is other for other in inputs[:i]):
            raise ShapeError(
                message(f"tape.program: {name} is given as an input twice.", where=call_site(user_frame()))
            )
        value = by_holder.get(id(tensor))
        held = bound(tensor)
        if value is not None and value.name and name == f"input{i}":
            titles[i] = value.name
        if value is None and held is not None and held.node is not None:
            what = f"tape.program: {name} was computed inside the recording, so it cannot be an input of its replay."
            raise _refuse(what, tensor, name, "give the tensors that the recorded code was given")
        found.append(value)
    return found


def _join_readings(frozen: Frozen) -> None:
    """One leaf for each tensor that was read; refuses one that the tape has seen in two states without the change.

    Several leaves stand for one tensor where it comes from a tape that was swept, or was written to unheard.
    """
    first: dict[int, Value] = {}
    for value, holder in frozen.leaves.items():
        if holder is None:
            continue
        other = first.setdefault(id(holder), value)
        if other is value:
            continue
        if not all(v.constant or v.closed == SWEPT for v in (value, other)):
            name = frozen.title(other) or "a tensor"
            what = f"tape.program: {name} was read, changed in a way that the tape does not hold, and read again."
            fix = f"write to {name} inside the recording and outside te.pause(), or to a copy: {name}.clone()"
            raise _refuse(what, holder, name, fix)
        frozen.same[value] = other


def _writes(
    nodes: list[Node], leaves: dict[Value, Tensor | None], rim: list[Value | None]
) -> list[tuple[Value, Value]]:
    """The leaves whose tensors were written to, each with the value that its tensor held at the end.

    In the order of the writes: of tensors that share memory, the later write holds what all of it became.
    """
    by_holder = {id(holder): value for value, holder in reversed(leaves.items()) if holder is not None}
    last: dict[Value, Value] = {}
    for node in nodes:
        for value in node.outputs:
            holder = value.holder
            if holder is None or value.stale:
                continue
            leaf = by_holder.get(id(holder))
            if leaf is not None:
                last.pop(leaf, None)
                last[leaf] = value
    return [(leaf, value) for leaf, value in last.items() if not _covered(leaf, nodes, rim)]


def _covered(leaf: Value, nodes: list[Node], rim: list[Value | None]) -> bool:
    """Whether a leaf is but the base of a written input, and nobody reads it: the write to the input will do."""
    base = leaf.holder
    if base is None or leaf in rim or not any(v.holder._base is base for v in rim if v and v.holder is not None):
        return False
    states = {leaf, *(v for node in nodes for v in node.outputs if v.holder is base)}
    return all(node.op is write_view for node in nodes for v in node.inputs if v in states)


def _merge_same(frozen: Frozen) -> None:
    """Operations whose result is their argument are left out: both values are one."""
    for nodes in (frozen.forward, frozen.backward):
        for node in nodes:
            if node.op.forward in SAME:
                frozen.same[frozen.canonical(node.outputs[0])] = frozen.canonical(node.inputs[0])
                if node.op.forward is LIFT:
                    frozen.constants.add(frozen.canonical(node.inputs[0]))
        nodes[:] = [node for node in nodes if node.op.forward not in SAME]


def _find_live(frozen: Frozen) -> None:
    """Every value that is read and never made is a live reference to its tensor."""
    nodes = drop_dead(frozen, with_sweep=True)
    made = {frozen.canonical(value) for node in nodes for value in node.outputs}
    rim = {value for value in (*frozen.inputs, frozen.seed) if value is not None}
    read = [v for node in nodes if node.op.forward not in DESCRIBED for v in node.inputs]
    read += [*frozen.outputs, *(value for _, value in frozen.gradients), *(leaf for leaf, _ in frozen.writes)]
    for value in map(frozen.canonical, read):
        if value in made or value in rim or value in frozen.live:
            continue
        holder = value.holder
        if holder is not None and value.closed in (PARTED, STEPPED, SWEEP, UNFOLLOWED, UNSEEN):
            name = value.name or "a value"
            what = (
                f"tape.program: {name}, which the recorded code read, {value.closed}: a replay could not make it again."
            )
            around = "copy one of the two before that: .clone()"
            if value.closed != UNFOLLOWED:
                around = "compute it by recorded operations, inside the block"
            raise _refuse(what, holder, name, around)
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
    frozen.constants &= frozen.live.keys()


# -- the sweep, recorded ---------------------------------------------------------------------------------------


def _target(tensor: Tensor, frozen: Frozen) -> int | Tensor:
    """A tensor that gets ``.g``: the caller's input, by its place, or itself."""
    return next((i for i, given in enumerate(frozen.given) if given is tensor), tensor)


def _by_tensor(sweep: Sweep) -> list[tuple[Tensor, Tensor]]:
    """The gradients by tensor; of one from a swept tape, for which each reading has a leaf of its own, the sum."""
    parts: dict[int, list[Tensor]] = {}
    for value, g in sweep.gradients.items():
        if value.leaf and value.closed == SWEPT:
            parts.setdefault(id(value.holder), []).append(g)
    found = sweep.by_tensor()
    return [
        (tensor, sum(parts[id(tensor)][1:], parts[id(tensor)][0]) if id(tensor) in parts else g) for tensor, g in found
    ]


def _traced(nodes: list[Node], sweep: Sweep) -> list[Node]:
    """The nodes of a recorded sweep, with line and scope of the operations whose gradients they compute."""
    start = 0
    for source, stop in sweep.reached:
        for node in nodes[start:stop]:
            (node._code, node._lasti), node.scope = source.site, source.scope
        start = stop
    for node in nodes[start:]:  # sums over readings, copies that keep results apart: of no line in particular
        node._code = None
    return nodes


def _record_sweep(frozen: Frozen, root: Value, source: Node | None, seed: Tensor, targets: list[Tensor] | None) -> None:
    """Records the sweep from the first output; by default to the leaves of the forward pass, and no further."""
    if targets is None:
        made = {v for node in frozen.nodes if node.op.forward is LIFT for v in node.inputs}  # what nobody holds
        leaves = [(value, holder) for value, holder in frozen.leaves.items() if value not in made]
        targets = [holder for value, holder in leaves if holder is not None and value.differentiable]
    inner = Tape(strong=True)
    push_tape(inner)
    try:
        with quietly():
            with freezing():
                sweep = Sweep(root, source, seed, targets=targets, record=True, structure=True).run()
            with recording(inner, sweep=True), torch.no_grad():
                found = _by_tensor(sweep)
            for tensor, g in found:
                value = bound(g)
                if value is not None:
                    frozen.gradients.append((_target(tensor, frozen), value))
            arrivals = [(value, bound(g)) for value, g in sweep.arrivals]
    finally:
        pop_tape(inner)
    frozen.backward = [each for node in _traced(bare(inner.nodes), sweep) for each in opened(node, frozen)]
    made = {value for node in (*frozen.forward, *frozen.backward) for value in node.outputs}
    frozen.held += [h for n in inner.nodes for v in n.inputs if v not in made and (h := v.holder) is not None]
    names = frozen.names
    for value, g_value in arrivals:
        if g_value is not None and id(value) in names:
            names.setdefault(id(g_value), f"{names[id(value)]}_g")
