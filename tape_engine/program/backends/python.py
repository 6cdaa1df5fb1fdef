"""Straight-line Python: one torch call a line, written into kept buffers.

There is no graph to build, nothing to look up and no memory to find when it runs. The text of the
function is what ``program.code`` shows.
"""

from __future__ import annotations

import keyword
from collections.abc import Collection, Iterable, Sequence
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload

from ...names import code_line, located, where
from ...places import write_view
from ...tape import Node, Value
from .. import batch_norms, products
from ..buffers import laid, own
from ..calls import COPIES, LAID_OUT, Call, call_of
from ..data import DESCRIBED, VIEWS, Frozen, sized_by_elements
from ..guards import check_guard, check_shape
from ..lifetimes import Lifetimes, Stretch
from ..passes import (
    Recomputed,
    drop_dead,
    find_in_place,
    fold_constants,
    laid_out,
    recompute,
    results_early,
    turn_products,
    unmask,
)  # fmt: skip
from ..passes.in_place import SPREAD, WRITES
from .memory import Memory
from .naming import Names
from .source import Like, Name, Run, Source, Unit

__all__ = ["generate"]

#: What is written into memory that it is given, besides what torch has such calls for.
OWN = {*COPIES, torch.ops.aten.copy.default}

Tensor = torch.Tensor


def generate(frozen: Frozen, *, with_sweep: bool) -> Source:
    """The function that replays a frozen tape: the forward pass, and with it the sweep if asked for."""
    return _Writer(frozen, with_sweep).write()


class _Writer(Names, Memory):
    def __init__(self, frozen: Frozen, with_sweep: bool) -> None:
        self.frozen = frozen
        self.with_sweep = with_sweep
        wanted = {frozen.canonical(v) for v in (*frozen.outputs, *(g for _, g in frozen.gradients))}
        wanted |= {frozen.canonical(after) for _, after in frozen.writes}
        self.wanted = wanted
        self.nodes = drop_dead(frozen, with_sweep=with_sweep)
        for each in (unmask, turn_products, results_early):
            self.nodes = each(self.nodes, frozen, wanted)
        self.folded = fold_constants(frozen, self.nodes)
        self.laid = laid_out(frozen, self.nodes)
        self.names: dict[Value, str] = {}
        self.space: dict[str, Any] = {
            "torch": torch, "guard": check_guard, "measured": check_shape, "laid": laid, "own": own
        }  # fmt: skip
        self.used = dict.fromkeys([*keyword.kwlist, *self.space], 1)  # how often each name was asked for
        self.known: dict[tuple[str, int], str] = {}  # the names of what every copy of the function shares
        self.buffers: dict[str, Value] = {}
        self.results: dict[str, Value] = {}
        self.views: list[Run] = []
        self.static = set(frozen.constants)  # values that lie in the same memory on every replay
        self.given: set[Value] = set()  # results in the caller's memory that were returned
        self.ways: dict[Node, Call] = {}
        self.lines: list[str] = []
        self.life = Lifetimes()
        self.locals: dict[Value, str] = {}  # what has memory only while a replay runs, and the names of views of it
        self.readers: dict[Value, list[Node]] = {}  # in the order in which they run
        self.ends: dict[int, int] = {}  # the number of lines at the end of each step
        self.units: list[Unit] = []
        self.runs_once: set[Node] = set()
        self.again = Recomputed(self.nodes)
        self.places: dict[Value, Stretch] = {}
        self.asked_at: dict[str, int] = {}
        self.rooms: dict[str, Stretch] = {}
        self.anew: set[str] = set()

    # -- names -------------------------------------------------------------------------------------------

    def name(self, value: Value, fallback: str = "v") -> str:
        """The name of a value in the code: the user's own, made an identifier."""
        value = self.frozen.canonical(value)
        found = self.names.get(value)
        if found is None:
            found = self.names[value] = self.unused(self.frozen.names.get(id(value)) or value.name or fallback)
        self.life.touch(value)
        return found

    # -- the function ------------------------------------------------------------------------------------

    def write(self) -> Source:
        frozen = self.frozen
        inputs = [self.unused(title) for title in frozen.titles]
        rim = {value: name for value, name in zip(frozen.inputs, inputs, strict=True) if value is not None}
        seed = self.name(frozen.seed) if self.with_sweep else None
        for value, tensor in frozen.live.items():
            rim[value] = self.unused(frozen.names.get(id(value)) or value.name or "live")
            self.space[rim[value]] = tensor
        for value, name in rim.items():
            self.names[value] = name
            if value in self.laid:
                self.names[value] = self.unused(f"{name}_laid")
                self.lines.append(f"{self.names[value]} = laid({name}, {value.strides})")
                self.unit("layout", len(self.lines) - 1, (), (), [value])
        wanted = [frozen.canonical(v) for v in frozen.outputs]
        gradients = [frozen.canonical(g) for _, g in frozen.gradients] if self.with_sweep else []
        self.loose = self._loose({*wanted, *gradients})
        self.recompute({*wanted, *gradients, *(frozen.canonical(after) for _, after in frozen.writes)})
        self.kept = {*wanted, *gradients, *(frozen.canonical(after) for _, after in frozen.writes)}
        self.mine = self._results({*wanted, *gradients})
        self.in_place = find_in_place(
            self.order(), frozen.canonical, self.looks_into, {*self.kept, *self.mine}, self.makes
        )
        self.readers = self.find_readers()
        self._nodes()
        # Everything that can refuse has run by here, and results are taken before the contents of leaves change.
        self.fresh = self.find_fresh([*wanted, *gradients])
        if self.fresh:
            names = ", ".join(self.name(v) for v in self.fresh)
            self.lines.append(f"{names}, = own({names})")
        returned = ", ".join([self.owned(v) for v in wanted])
        swept = ", ".join([self.owned(g) for g in gradients])
        views = {frozen.canonical(v) for node in self.nodes if self.looks_into(node) for v in node.outputs}
        for leaf, after in frozen.writes:
            # A view may look into what is written: x.t_()
            content = f"{self.name(after)}.clone()" if frozen.canonical(after) in views else self.name(after)
            self.lines.append(f"{rim[frozen.canonical(leaf)]}.copy_({content})")
            self.unit("effect", len(self.lines) - 1, (), [after], [leaf])
        self.ends[self.life.step] = len(self.lines)  # results and effects: what they read is needed up to here
        self.lines.append(f"return ({returned},), ({swept}{',' if swept else ''})")
        parameters = ", ".join([*inputs, *([seed] if seed else [])])
        head = f"def {'step' if self.with_sweep else 'forward'}({parameters}):"
        once = len(self.runs_once)
        self.plan_memory()
        self.let_go()
        source = Source(
            head, self.lines, self.space, self.buffers, self.results, self.places, self.views, self.units, once,
            self.names, self.rooms, self.anew, self.again,
        )  # fmt: skip
        source.drop_unread()
        return source

    def recompute(self, wanted: set[Value], inside: Collection[Value] = ()) -> None:
        """Computes again in the sweep what need not be kept until then."""
        if self.with_sweep:
            self.again = recompute(self.nodes, self.frozen, wanted, self.folded, self.looks_into, inside)
            self.nodes = self.again.nodes

    def unit(
        self,
        kind: str,
        start: int,
        nodes: Iterable[Node] = (),
        reads: Iterable[Value] = (),
        writes: Iterable[Value] = (),
        part: Sequence[Value] = (),
    ) -> None:
        """Says that the lines from `start` on belong together."""
        read, made = (tuple(dict.fromkeys(map(self.frozen.canonical, each))) for each in (reads, writes))
        last = next(iter(part), None)
        self.units.append(Unit(kind, start, len(self.lines), tuple(nodes), read, made, last))

    def _nodes(self) -> None:
        """The lines of all nodes, each of the user's lines as a comment above its own."""
        forward = set(self.frozen.forward)
        turned = False
        site: Any = None
        for node in self.nodes:
            if not turned and node not in forward:
                turned = True
                self.lines += ["", "# the reverse sweep"]
            if node.site != site and node.site[0] is not None and not turned and node not in self.folded:
                site = node.site
                text = f"# {code_line(node) or node.op.name}    ({where(node)})"
                self.lines.append("".join(c if c.isprintable() else " " for c in text))  # never a line of its own
            self.tell_again(node)
            self.node(node)

    def tell_again(self, *nodes: Node) -> None:
        """A line that says what is computed again by nodes, if anything is."""
        again = [
            self.names[v] for n in nodes if n in self.again.again for v in self.again.computed(n) if v in self.names
        ]
        if again:
            self.lines.append(f"# computed again: {', '.join(dict.fromkeys(again))}")

    def _loose(self, wanted: set[Value]) -> set[Value]:
        """Values of the sweep whose shape may differ from the recorded one: what a rule picked out by a mask.

        No decision of the user's was taken by it. What is computed from them has the recorded shape again, or
        the replay refuses.
        """
        nodes = [node for node in self.nodes if sized_by_elements(node)]
        if not nodes:
            return set()
        found = {self.frozen.canonical(v) for node in nodes for v in node.outputs}
        made = {self.frozen.canonical(v) for node in self.frozen.forward for v in node.outputs}
        return found - made - wanted

    def _results(self, wanted: set[Value]) -> set[Value]:
        """Those of the wanted values that can be written straight into memory that the caller gets."""
        mine: set[Value] = set()
        for node in self.nodes:
            if node in self.folded or (node.op.is_named and node.op is not write_view):
                continue
            if node.op is write_view or node.op.forward in OWN or self.way(node).outs:
                mine.update(value for each in node.outputs if (value := self.frozen.canonical(each)) in wanted)
        return mine

    def way(self, node: Node) -> Call:
        """How a node is called."""
        call = self.ways.get(node)
        if call is None:
            call = products.call_for(node) or batch_norms.call_for(node) or call_of(node)
            if self.loose and call.outs and any(self.frozen.canonical(v) in self.loose for v in node.inputs):
                call = Call(node.op.forward, f"torch.ops.{node.op.forward}")
            self.ways[node] = call
        return call

    def checked(self, node: Node) -> bool:
        """Whether the shape of what a node returns has to be checked."""
        if self.loose and any(self.frozen.canonical(v) in self.loose for v in node.outputs):
            return False
        loose = self.loose and any(self.frozen.canonical(v) in self.loose for v in node.inputs)
        return bool(loose) or sized_by_elements(node) or (node.op.is_named and node.op not in VIEWS)

    def order(self) -> list[list[Node]]:
        """The nodes in the order in which they run; those of one list run as one."""
        return [[node] for node in self.nodes]

    def looks_into(self, node: Node) -> bool:
        """Whether what a node gives may lie in the memory of what it is given."""
        if node.result is not None or node.op is write_view:
            return False
        whole = not isinstance(node.op.forward, OpOverload) or not node.op.forward._schema.name.startswith("aten::")
        return whole or self.way(node).view

    def makes(self, node: Node) -> bool:
        """Whether a node runs by itself on each replay, into memory of its own."""
        loose = self.loose and any(self.frozen.canonical(v) in self.loose for v in (*node.inputs, *node.outputs))
        return not (node in self.folded or node.random or self.looks_into(node) or loose)

    def owned(self, value: Value) -> str:
        """The name of a result: the caller's own memory, or a copy."""
        if (value in self.mine or value in self.fresh) and value not in self.given:
            self.given.add(value)
            return self.name(value)
        name, take = self.unused("result"), self.unused("new_result")
        self.results[take], self.asked_at[take] = value, self.life.step
        self.lines.append(f"{name} = {take}().copy_({self.name(value)})")
        self.unit("result", len(self.lines) - 1, (), [value], [value])
        return name

    # -- one node ----------------------------------------------------------------------------------------

    def node(self, node: Node) -> None:
        forward, start = node.op.forward, len(self.lines)
        self.write_node(node)
        if len(self.lines) > start:
            view = self.way(node).view and node.op is not write_view and node.result is None
            read: Sequence[Value] = () if view or forward in DESCRIBED else node.inputs
            over = node in self.in_place.over
            if over:
                read = self.in_place.spread[node].inputs if node in self.in_place.spread else node.inputs[1:]
            made = () if view else node.outputs
            self.unit(
                "guard" if node.result is not None else "call", start, [node], read, made, read[-1:] if over else ()
            )
        self.tick()

    def write_node(self, node: Node) -> None:
        forward = node.op.forward
        if node in self.in_place.left_out:
            return
        if node.result is not None:
            self.guard(node)
        elif node in self.folded:
            self.once(node)
        elif forward in COPIES and self.plain_copy(node):
            target = self.target(node.outputs[0], node.op.name)
            self.lines.append(f"{target}.copy_({self.argument(node.args[0])})")
        elif forward is torch.ops.aten.copy.default:
            target = self.target(node.outputs[0], node.op.name)
            self.lines.append(f"{target}.copy_({self.argument(node.args[1])})")
        elif node in self.in_place.over:
            self.write_over(node)
        elif node.op is write_view:
            self.write_view(node)
        elif forward in LAID_OUT and node.mutates:
            target = self.target(node.outputs[0], node.op.name)
            self.lines.append(f"{target}.{forward.overloadpacket.__name__}_({self.arguments(node, 1)})")
        else:
            self.call(node, self.way(node))

    def plain_copy(self, node: Node) -> bool:
        kept = {"dtype", "layout", "device", "memory_format", "non_blocking", "pin_memory"}
        return set(node.kwargs) <= kept and node.outputs[0].shape == node.inputs[0].shape

    def target(self, value: Value, fallback: str, over: Sequence[Value] = ()) -> str:
        """The name of the memory that a value is written to: a kept buffer, or the caller's.

        A buffer may be that of one of `over`, if nothing reads this any more.
        """
        value = self.frozen.canonical(value)
        name = self.name(value, fallback)
        if value in self.mine:
            take = self.unused(f"new_{name}")
            self.results[take], self.asked_at[take] = value, self.life.step
            self.lines.append(f"{name} = {take}()")
        else:
            self.buffers[name] = value
            self.static.add(value)
            self.life.make(value, over)
        return name

    def write_view(self, node: Node) -> None:
        """A copy of a base with a part of it written, in kept memory."""
        base, part, *place = node.args
        name = self.target(node.outputs[0], node.op.name)
        view = f"{name}.as_strided({', '.join(self.argument(each) for each in place)})"
        if self.frozen.canonical(node.outputs[0]) not in self.mine:
            view = self.unused(f"part_of_{name}")
            self.views.append((view, Tensor.as_strided, (Name(name), *place), {}))
        self.lines += [f"{name}.copy_({self.argument(base)})", f"{view}.copy_({self.argument(part)})"]

    def write_over(self, node: Node) -> None:
        """A write to a part of a value that nobody reads any more, in its memory."""
        base, out = self.frozen.canonical(self.in_place.over[node]), self.frozen.canonical(node.outputs[0])
        name = self.names[out] = self.name(base)
        self.life.view(out, [base])
        self.life.touch(out)
        if base in self.static:
            self.static.add(out)
        if base in self.locals:
            self.locals[out] = name
        spread = self.in_place.spread.get(node)
        if spread is not None:
            part, _, *place = spread.args
            view = self.part_of(base, name, SPREAD[spread.op.forward], tuple(place))
            self.lines.append(f"{view}.add_({self.argument(part)})")
        elif node.op is write_view:
            _, part, *place = node.args
            view = self.part_of(base, name, torch.ops.aten.as_strided.default, tuple(place))
            self.lines.append(f"{view}.copy_({self.argument(part)})")
        else:
            self.lines.append(f"{name}.{WRITES[node.op.forward]}({self.arguments(node, 1)})")

    def part_of(self, base: Value, name: str, function: Any, place: tuple[Any, ...]) -> str:
        """A view of the memory of a value: made once, if that is always the same."""
        if base not in self.static:
            return f"{self.shared(function.overloadpacket.__name__, function)}({name}, {', '.join(map(str, place))})"
        view = self.unused(f"part_of_{name}")
        self.views.append((view, function, (Name(name), *place), {}))
        return view

    def call(self, node: Node, call: Call) -> None:
        canonical = self.frozen.canonical
        operands = [canonical(v) for v in node.inputs]
        if call.view and all(v in self.static for v in operands):
            self.once(node)
            return
        by_overload = ".ops." in call.title
        function = call.title if call.title.startswith("torch.") and not by_overload else ""
        function = function or self.shared(call.title.split(".")[-2] if by_overload else call.title, call.function)
        arguments = self.arguments(node, 0, call.more)
        if call.in_place and self.locals and (local := self.dying(node, operands)) is not None:
            value = canonical(node.outputs[0])
            arguments += f", {call.outs[0]}={self.name(local)}"
            self.locals[value] = self.name(value, node.op.name)
            self.life.make(value)
            self.lines.append(f"{self.name(value)} = {function}({arguments})")
            return
        if call.outs:
            over = self.life.operands(canonical(node.outputs[0]), operands) if call.in_place else []
            targets = [self.target(v, node.op.name, over) for v in node.outputs]
            outs = ", ".join(f"{out}={target}" for out, target in zip(call.outs, targets, strict=True))
            self.lines.append(f"{function}({arguments}{', ' if arguments else ''}{outs})")
            return
        names = [self.name(v, node.op.name) for v in node.outputs]
        self.made(node, call, names, operands)
        written = node.returned(names)
        made = written if isinstance(written, str) else "".join(f"{name or '_'}, " for name in written).rstrip()
        if call.title.startswith("torch.Tensor."):
            function, arguments = (
                f"{self.argument(node.args[0])}.{call.title.rpartition('.')[2]}",
                self.arguments(node, 1),
            )
        self.lines.append(f"{made} = {function}({arguments})")
        if self.checked(node):
            for name, value in zip(names, node.outputs, strict=True):
                self.lines.append(f"measured({name}, {tuple(value.shape)}, {self.shared('site', located(node))})")

    def once(self, node: Node) -> None:
        """A node that is run when a copy of the function is made: a constant, or a view of a kept buffer."""
        names = [self.name(v, node.op.name) for v in node.outputs]
        args = tuple(self.stored(each) for each in node.args)
        kwargs = {name: self.stored(each) for name, each in node.kwargs.items()}
        whole = names[0] if not node.outputs_tuple else self.unused(node.op.name)
        self.views.append((whole, node.op.forward, args, kwargs))
        self.runs_once.add(node)
        if node.outputs_tuple:
            for i, name in ((i, n) for i, n in enumerate(node.returned(names)) if n is not None):
                self.views.append((name, getitem, (Name(whole), i), {}))
        for value in map(self.frozen.canonical, node.outputs):
            self.static.add(value)
            self.life.view(value, map(self.frozen.canonical, node.inputs))

    def stored(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            value = self.frozen.canonical(argument)
            # of a value that is not static, an operation run once reads no more than the description
            return Name(self.names[value]) if value in self.static else Like(value)
        if type(argument) in (list, tuple):
            return type(argument)([self.stored(each) for each in argument])
        return argument

    def guard(self, node: Node) -> None:
        arguments = ", ".join(self.argument(each) for each in node.args)
        function = self.shared(node.op.name.strip("_"), node.op.forward)
        expected = self.shared("recorded", node.result)
        site = self.shared("site", located(node))
        self.lines.append(f"guard({function}({arguments}), {expected}, {site})")
