"""The tape as data: values, the nodes that join them, the tapes that hold the nodes.

    value ──► node ──► value ──► node ──► value
    X, w, b    lin       Z        relu      U

A `Value` is one tensor at one point of a recording. A `Node` is one recorded operation: the values
it read, the values it made, its other arguments, and the user's line. A `Tape` is the ordered list of
nodes. Nothing in this room runs an operation or knows a gradient rule.

Who keeps what alive:

- a tensor keeps its value and the node that made it (through `values_by_tensor`), a node keeps its
  input values and the nodes that made those. So what a tensor depends on lives as long as the tensor;
- a value refers to its tensor weakly. What a rule will read is kept by the node, in a `Kept` cell,
  so that an in-place write can put a copy of the old contents into the cell before it happens;
- the tape of a ``te.record()`` block keeps its nodes and leaves; the global tape refers to them
  weakly: a recording that nobody can reach any more leaves it by itself.
"""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import CodeType
from typing import Any

import torch

from .registry import Op

__all__ = ["Kept", "Node", "Tape", "Value", "current_tape", "global_tape"]

_data_ptr = torch._C.TensorBase.data_ptr  # torch's own: the method on Tensor may be wrapped while a block is open
_stride = torch._C.TensorBase.stride  # likewise
_sequence = itertools.count()  # nodes of all tapes and threads, in the order of recording


def next_in_sequence() -> int:
    """A number between those of the nodes recorded before and after."""
    return next(_sequence)


#: The storages whose memory was handed to code that nobody hears (``numpy()``), by address, each with its weak
#: reference. A cell on one of them keeps a copy from the start: no count tells of such a write.
exposed: dict[int, Any] = {}


class Kept:
    """A tensor that some rule will read: the contents a value had when it was recorded.

    ``versions`` are torch's counts of the writes to it, by which a write unseen is found out. They are two
    just after a write, which torch counts once the recorder has seen it. ``address`` is where its elements
    lie, by which ``x.data = y`` is found out, which torch does not count. For a copy, and for an alias that does
    not share the count of its tensor's writes, there is nothing to find out: they are ``own``.
    """

    __slots__ = ("__weakref__", "address", "own", "tensor", "versions")

    def __init__(self, tensor: torch.Tensor, *, own: bool = False) -> None:
        if exposed and _is_exposed(tensor):
            tensor, own = tensor.detach().clone(memory_format=torch.preserve_format), True
        self.tensor = tensor
        self.own = own
        if not own:
            self.versions, self.address = versions_of(tensor), address_of(tensor)

    def replace(self, copy: torch.Tensor) -> None:
        """From now on `copy`, which nobody else has, has the contents."""
        self.tensor, self.own = copy, True

    @property
    def intact(self) -> bool:
        """Whether the contents are still those that were recorded."""
        if self.own:
            return True
        tensor = self.tensor
        try:
            return tensor._version in self.versions and _data_ptr(tensor) == self.address
        except (RuntimeError, NotImplementedError):
            return version_of(tensor) in self.versions and address_of(tensor) == self.address


def _is_exposed(tensor: torch.Tensor) -> bool:
    try:
        return tensor.untyped_storage()._cdata in exposed
    except (NotImplementedError, RuntimeError):
        return False


_STRIDED = torch.strided

#: The dtypes whose values can have a gradient.
DIFFERENTIABLE = frozenset(
    each
    for each in vars(torch).values()
    if isinstance(each, torch.dtype) and (each.is_floating_point or each.is_complex)
)


class Value:
    """One tensor at one point of a recording: its description, and where it came from.

    Attributes:
        shape, dtype, device, strides: of the tensor, as recorded.
        node: the node that made it; ``None`` for a leaf, and once that node has left its tape.
        index: which of that node's outputs it is.
        constant: true where the sweep stops (``detach``, ``no_grad``, ``te.stop_gradient``).
        detached: its tensor was made by ``detach`` or ``.data``: writes to it are no writes to the others, as a
            gradient sees it.
        closed: why no gradient may pass into it (its tape was swept; a write went unseen), or "".
        name: the name under which a module holds it (``net.0.weight``), if any is known.
        aliases: the group of values that share its storage; ``None`` while it is alone there.
        viewed: whether a view of it was made that may not be among them yet (`looking`).
        marks: how many tapes have its tensor listen for plain operations (leaves only).
        rests: how many frozen tapes have its tensor listen, but only for what torch's own gradient would not show.
        stale: true once a write through an alias made its tensor hold other contents.
        written: of a view, where in the order of recording something was last written to memory of its base, torch's
            count before that, and where the last write before it stood that torch has counted; -1 for none (`asked`).
        observed: outside a block, how many operations lie between it and values that have a gradient.
        chosen: where in the order of recording the code got its tensor from ``contiguous()``, which might have been a
            copy had it lain otherwise; -1 if it did not.
        asked: whether the code has asked for its strides, or goes by them.
        ended: outside a block, where in the order of recording a write gave its tensor other contents; -1 before.
    """

    # What most values share stands here, and on a value only where it differs: a value is made at each operation.
    index = 0
    constant = False
    detached = False
    closed = ""
    name: str | None = None
    _aliases: Any = None
    viewed = False
    marks = 0
    rests = 0
    stale = False
    written = (-1, -1, -1)
    observed = 0
    chosen = -1
    asked = False
    ended = -1
    _node: weakref.ref[Node] | None = None
    _kept: weakref.ref[Kept] | None = None

    def __init__(
        self, tensor: torch.Tensor, ref: weakref.ref[torch.Tensor] | None = None, *, constant: bool = False
    ) -> None:
        self.shape, self.strides = layout_of(tensor)
        self.dtype = tensor.dtype
        self.device = tensor.device
        self._tensor: Callable[[], torch.Tensor | None] = weakref.ref(tensor) if ref is None else ref
        if constant:
            self.constant = True

    @property
    def node(self) -> Node | None:
        return None if self._node is None else self._node()

    @property
    def leaf(self) -> bool:
        """Whether it came from outside the recording."""
        return self._node is None

    @property
    def begins(self) -> bool:
        """Whether a gradient ends here, as at a leaf: also at ``nn.Parameter(x)`` and at copies of leaves."""
        node = self.node
        if node is None:
            return self._node is None
        return node.cut and not self.constant and all(place != self.index for _, place in node.mutates)

    @property
    def tensor(self) -> torch.Tensor | None:
        """The tensor, if it is alive and still holds this value (no later write made it another)."""
        found = self._tensor()
        return found if found is not None and not self.stale and bound(found) is self else None

    @property
    def holder(self) -> torch.Tensor | None:
        """The tensor object that held the value when it was recorded, whatever it holds now."""
        return self._tensor()

    @property
    def aliases(self) -> Any:
        if looking:
            _join_views()
        return self._aliases

    @property
    def kept(self) -> Kept | None:
        """The cell of its contents, if a rule keeps it."""
        return None if self._kept is None else self._kept()

    def keep(self, tensor: torch.Tensor, *, own: bool = False) -> Kept:
        """The cell of its contents, made of `tensor` if there is none yet."""
        found = None if self._kept is None else self._kept()
        if found is None:
            found = Kept(tensor, own=own)
            self._kept = weakref.ref(found)
        return found

    @property
    def differentiable(self) -> bool:
        """Whether it can have a gradient: floating or complex, and no constant."""
        return not self.constant and self.dtype in DIFFERENTIABLE

    # What a rule may ask of an argument whose data it does not read.
    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def layout(self) -> torch.layout:
        return torch.strided

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def stride(self, dim: int | None = None) -> Any:
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel() * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"<value {self.name + ' ' if self.name else ''}{describe(self)}>"


#: The nodes of views that are not yet among the aliases of what they look into: nobody asks before the next write.
looking: deque[weakref.ref[Node]] = deque()


class Hidden:
    """An argument of a node that is not the user's, and is not shown."""


#: Shapes with strides, each once: a tape of a thousand nodes has few, and fewer objects are less work for the
#: collector of cycles, which would otherwise take a fifth of the time of a recording.
_layouts: dict[tuple[torch.Size, tuple[int, ...]], tuple[torch.Size, tuple[int, ...]]] = {}

#: Those strides among them, by ``id``, in which elements lie one after the other, as torch lays out what it makes.
#: They are held, lest another thread's table come to lay other strides where these were.
dense: dict[int, tuple[int, ...]] = {}


def layout_of(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Shape and strides (none, where the layout is not strided): the ones that stand for their equals."""
    try:
        key = tensor.shape, _stride(tensor)
        found = _layouts.get(key)
    except RuntimeError:  # sparse, and others
        key = tensor.shape, ()
        found = _layouts.get(key)
    except TypeError:  # symbolic sizes are no numbers to look up
        return tensor.shape, _stride(tensor)
    if found is None:
        if len(_layouts) >= 4096:
            _layouts.clear()
            dense.clear()
        found = _layouts[key] = key
        shape, strides = key
        if shape and 0 not in shape and strides == tuple(itertools.accumulate((1, *shape[:0:-1]), operator.mul))[::-1]:
            dense[id(strides)] = strides
    return found


def version_of(tensor: torch.Tensor) -> int:
    """Torch's count of writes to the tensor's storage; 0 where it keeps none (inference tensors)."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


_FEW = tuple((count,) for count in range(32))


def versions_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """`version_of` alone in a tuple; for small counts always the same one, as this is asked at each operation."""
    try:
        return _FEW[tensor._version]
    except (RuntimeError, IndexError):
        return (version_of(tensor),)


def address_of(tensor: torch.Tensor) -> int:
    """Where the tensor's elements lie in memory; 0 where they do not lie in one place."""
    try:
        return _data_ptr(tensor)
    except (RuntimeError, NotImplementedError):
        return 0


def describe(value: Value | torch.Tensor) -> str:
    """Shape, dtype and, off the CPU, device: ``(64, 784)  float32  cuda:0``."""
    text = f"{tuple(value.shape)}  {str(value.dtype).removeprefix('torch.')}"
    return text if value.device.type == "cpu" else f"{text}  {value.device}"


@dataclass(frozen=True)
class Told:
    """A line of code as a program file tells it, in the place of a code object; no other file is looked into."""

    file: str
    line: int
    text: str


class Node:
    """One recorded operation.

    Attributes:
        op: its `Op` record.
        args, kwargs: the arguments, values standing where tensors stood.
        inputs: the values among them, flattened, in order; a value given twice stands twice.
        sources: the nodes that made the inputs, ``None`` for leaves: kept alive by those that read them.
        outputs: the values it made.
        gaps: the places in what it returned where None stood instead of a tensor.
        outputs_tuple: whether the operation returned a tuple or list (of one tensor, perhaps).
        result: what it returned, where that is not tensors (a guard: ``item()``, ``bool()``).
        saved: for each input, then each output, the `Kept` cell its rule reads, or ``None``.
        scope: the names of the groups it stands in, outermost first.
        seq: its place in the order of recording, over all tapes.
        mutates: for each value that the operation wrote over: its place in `inputs`, and in `outputs`
            the place of the value that its tensor held afterwards.
        cut: recorded under ``no_grad``: no gradient passes.
        ordinary: whether its rule is given the outputs as they stand, one or several, and it is not cut, as most are.
        complex: of an ordinary node, whether a value of it is complex.
        random: whether it draws from a generator.
        swept: whether a sweep has passed over it.
        context: in a recorded sweep, the custom function whose backward ran it, on what it had kept by then.
        outline: its copy without tensors, once a decision on the global tape keeps one; `is_outline` in that copy.
    """

    _outputs: Value | tuple[Value, ...] = ()
    outputs_tuple = False
    gaps: tuple[int, ...] = ()
    result: Any = None
    saved: tuple[Kept | None, ...] = ()
    mutates: tuple[tuple[int, int], ...] = ()
    cut = False
    ordinary = False
    complex = False
    random = False
    swept = False
    scope: tuple[str, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - of all nodes that have none, and never written to
    tape: Token | None = None
    context: str | None = None
    outline: Node | None = None
    is_outline = False

    def __init__(
        self,
        op: Op,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: tuple[Value, ...],
        sources: tuple[Node | None, ...],
        code: CodeType | Told | None = None,
        lasti: int = 0,
        scope: tuple[str, ...] = (),
    ) -> None:
        self.op = op
        self.args = args
        if kwargs:
            self.kwargs = kwargs
        self.inputs = inputs
        self.sources = sources
        if scope:
            self.scope = scope
        self.seq = next(_sequence)
        self._code = code
        self._lasti = lasti

    @property
    def outputs(self) -> tuple[Value, ...]:
        made = self._outputs
        return made if type(made) is tuple else (made,)  # type: ignore[return-value]

    @outputs.setter
    def outputs(self, made: tuple[Value, ...]) -> None:
        self._outputs = made[0] if len(made) == 1 else made

    @property
    def closed(self) -> bool:
        """Whether a sweep of its tape came after it: then no new recording may go on from its outputs."""
        return self.tape is not None and self.seq < self.tape.closed_at

    @property
    def rule(self) -> str:
        """How its gradient is taken: the rule's name, ``borrowed``, ``none`` (declared), or ``cut``."""
        if self.cut:
            return "cut"
        if not self.op.differentiable or not any(v.differentiable for v in self.inputs):
            return "none"
        return "borrowed" if self.op.grad is None else getattr(self.op.grad, "__name__", "rule")

    @property
    def params(self) -> dict[str, Any]:
        """The arguments that are not tensors, by name."""
        names = self.op.parameters
        named = {(names[i] if i < len(names) else f"arg{i}"): a for i, a in enumerate(self.args)}
        named.update(self.kwargs)
        hidden = (Hidden, type(None))
        return {name: a for name, a in named.items() if not _holds_value(a) and not isinstance(a, hidden)}

    @property
    def site(self) -> tuple[CodeType | Told | None, int]:
        """The user's code object and the index of the instruction that called the operation."""
        return self._code, self._lasti

    @property
    def input_names(self) -> list[str]:
        """For each input the name of the argument in which it was given; ``others[1]`` inside a list."""
        names = [*self.op.parameters, *(f"argument {i}" for i in range(len(self.args)))]
        found: list[str] = []
        for name, argument in (*zip(names, self.args, strict=False), *self.kwargs.items()):
            if isinstance(argument, Value):
                found.append(name)
            elif isinstance(argument, (list, tuple)):
                found += [f"{name}[{i}]" for i, each in enumerate(argument) if isinstance(each, Value)]
        return [*found, *("input" for _ in self.inputs[len(found) :])]

    def note_form(self, result: Any) -> None:
        """Notes in which form the operation returned its outputs: `result`."""
        if not isinstance(result, torch.Tensor):
            self.outputs_tuple = True
            if isinstance(result, (tuple, list)):
                self.gaps = tuple([i for i, each in enumerate(result) if each is None])
        several = type(self._outputs) is tuple
        self.ordinary = not (self.cut or self.gaps) and several is self.outputs_tuple
        for value in (*self.inputs, *self.outputs):
            if value.dtype.is_complex:
                self.complex = True

    def returned(self, each: Sequence[Any]) -> Any:
        """Things that stand for the outputs, one each, in the form in which the operation returned those."""
        if not self.outputs_tuple:
            return each[0]
        found = list(each)
        for place in self.gaps:
            found.insert(place, None)
        return tuple(found)

    def __repr__(self) -> str:
        inputs = ", ".join(str(tuple(v.shape)) for v in self.inputs)
        outputs = ", ".join(str(tuple(v.shape)) for v in self.outputs)
        return f"<node {self.op.name}: {inputs} -> {outputs}>"


def _holds_value(argument: Any) -> bool:
    if isinstance(argument, Value):
        return True
    return isinstance(argument, (tuple, list)) and any(isinstance(each, Value) for each in argument)


def ancestors(node: Node, through: Callable[[Node], Sequence[Node | None]] = attrgetter("sources")) -> list[Node]:
    """`node` and every node it was computed from, in the order of recording.

    `through` gives the nodes before one; by default all those that made its inputs.
    """
    seen = {node}
    stack = [node]
    while stack:
        for source in through(stack.pop()):
            if source is not None and source not in seen:
                seen.add(source)
                stack.append(source)
    return sorted(seen, key=attrgetter("seq"))


class Token:
    """What a node knows its tape by; it lives as long as the tape or a node of it.

    ``marked`` are the leaves whose tensors listen for plain operations on behalf of the tape, by ``id``; ``resting``
    those that do so no more than needed, since the tape was frozen. ``foreign`` are the values in memory that others
    have too (``torch.from_numpy``), each with a sample of its elements.
    What was recorded before ``closed_at`` belongs to a sweep that is over.
    """

    __slots__ = ("__weakref__", "closed_at", "foreign", "marked", "resting")

    def __init__(self) -> None:
        self.marked: dict[int, weakref.ref[Value]] = {}
        self.resting: dict[int, weakref.ref[Value]] = {}
        self.closed_at = 0
        self.foreign: list[tuple[weakref.ref[Value], bytes]] = []

    def watch(self, value: Value, sample: bytes) -> None:
        """Notes a value whose memory others have too."""
        if len(self.foreign) & (len(self.foreign) - 1) == 0:
            self.foreign = [each for each in self.foreign if each[0]() is not None]
        self.foreign.append((weakref.ref(value), sample))


class Tape:
    """The ordered nodes of a recording.

    Attributes:
        strong: whether it keeps its nodes (a ``te.record()`` block) or follows what the user's
            tensors still reach (the global tape).
        strict: whether an operation without a registered rule raises as it is recorded.
        token: what its nodes know it by.
        decisions: the guards of the global tape, each with how many nodes it keeps; those of a block are its nodes.
        frozen: how long it was when it was last frozen; -1 before.
        forgotten: where in the order of recording the last of them stood that were given up.
        unheard: the nodes whose output torch's autograd has saved unheard, by the address of its elements.
    """

    def __init__(self, *, strong: bool = True, strict: bool = False) -> None:
        self.strong = strong
        self.strict = strict
        self.token = Token()
        self._nodes: list[Any] = []
        self._leaves: dict[int, torch.Tensor] = {}  # keeps the leaves' tensors: a replay reads them
        self.unfollowed: tuple[str, str | None] | None = None  # a write that cannot be replayed, and its line
        self.disordered: tuple[str, str, str | None] | None = None  # one in no known order: how, a fix, and its line
        self.streams: Any = None  # of random numbers, in a block; the recorder follows them
        self.decisions: list[tuple[Node, int]] = []
        self.asked: list[Value] = []  # in a block, the values of which some code has asked how they lie
        self.forgotten = -1
        self.frozen = -1
        self.unheard: dict[int, Node] = {}
        self._sweep_at = 1024  # when the global tape next drops what nobody reaches

    @property
    def nodes(self) -> list[Node]:
        """The nodes, in the order of recording."""
        if self.strong:
            return list(self._nodes)
        return [node for ref in self._nodes if (node := ref()) is not None]

    @property
    def values(self) -> list[Value]:
        """Every value read or made, each once, in the order of appearance."""
        seen: dict[int, Value] = {}
        for node in self.nodes:
            for value in (*node.inputs, *node.outputs):
                seen.setdefault(id(value), value)
        return list(seen.values())

    @property
    def leaves(self) -> list[Value]:
        """The values that came from outside the recording, in the order of appearance."""
        made = {id(v) for node in self.nodes for v in node.outputs}
        return [v for v in self.values if id(v) not in made]

    def append(self, node: Node) -> None:
        """Records `node`."""
        node.tape = self.token
        if self.strong:
            self._nodes.append(node)
            return
        self._nodes.append(weakref.ref(node))
        if len(self._nodes) >= self._sweep_at:
            self._nodes = [ref for ref in self._nodes if ref() is not None]
            self._sweep_at = max(1024, 2 * len(self._nodes))

    def hold(self, tensor: torch.Tensor) -> None:
        """Keeps a leaf's tensor as long as the tape lives."""
        if self.strong:
            self._leaves[id(tensor)] = tensor

    @property
    def length(self) -> int:
        """How far it has come, for `rewind`."""
        return len(self._nodes)

    def has_used(self, value: Value, since: int) -> bool:
        """Whether `value` was used where a gradient may be wanted, since that place in the order of recording."""
        for each in reversed(self._nodes):
            node = each if self.strong else each()
            if node is None:
                continue
            if node.seq < since:
                break
            if value in node.inputs and not node.cut and node.op.differentiable:
                return True
        return False

    def rewind(self, length: int) -> list[Node]:
        """Forgets what was recorded since it had this length (of a tape that keeps its nodes); returns that."""
        if not self.strong:
            return []
        forgotten = self._nodes[length:]
        del self._nodes[length:]
        for address in [address for address, node in self.unheard.items() if node in forgotten]:
            del self.unheard[address]
        return forgotten

    @property
    def held(self) -> list[torch.Tensor]:
        """The tensors of the leaves, which the tape keeps."""
        return list(self._leaves.values())

    def clear(self) -> None:
        """Forgets every node."""
        self._nodes.clear()
        self._leaves.clear()
        self.decisions.clear()
        self.asked.clear()
        self.unheard.clear()

    def __len__(self) -> int:
        return len(self._nodes) if self.strong else len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __bool__(self) -> bool:
        return True  # an empty tape is a tape

    def program(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor] = (),
        outputs: Any = None,
        wrt: Any = None,
        backend: str = "auto",
        *,
        copy: bool = True,
    ) -> Any:
        """Freezes the tape into a `Program` that replays it; see `tape_engine.program.freeze`."""
        return _freeze(self, inputs, outputs, wrt, backend, copy=copy)

    def __str__(self) -> str:
        return _print(self)

    def __repr__(self) -> str:
        return f"<tape of {len(self)} nodes>"


def _unset(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("tape_engine is not loaded")  # pragma: no cover - the package loads both rooms


_join_views: Callable[[], None] = _unset
_print: Callable[[Tape], str] = _unset
_freeze: Callable[..., Any] = _unset


def on_looking(handler: Callable[[], None]) -> None:
    """The room of aliases says here how it enters the views that are left in `looking`."""
    global _join_views
    _join_views = handler


def on_print(handler: Callable[[Tape], str]) -> None:
    """The room of listings says here how a tape prints; the tape itself knows no room above it."""
    global _print
    _print = handler


def on_freeze(handler: Callable[..., Any]) -> None:
    """The room of programs says here how a tape is frozen."""
    global _freeze
    _freeze = handler


# -- which value a tensor holds now ------------------------------------------------------------------


class Binding(weakref.ref[torch.Tensor]):
    """What a tensor holds now: one entry of `values_by_tensor`.

    Attributes:
        key: the ``id`` of the tensor.
        value, node: the value that it holds, and the node that made it (``None`` for a leaf).
        versions: torch's counts of writes with which it holds it. They are two for a view, which shares the
            count of its base only once torch hands it out, and just after a write, which torch counts only then.
    """

    __slots__ = ("key", "node", "value", "versions")
    key: int
    value: Value
    node: Node | None
    versions: tuple[int, ...]


#: What each tensor that is known to a tape holds now, by its ``id``.
values_by_tensor: dict[int, Binding] = {}


def gone() -> None:
    """What a value refers to its tensor by when that is gone."""


def forget(ref: Any, table: dict[int, Binding] = values_by_tensor, gone: Any = gone) -> None:
    """Drops the binding of a tensor that is gone."""
    key, value = ref.key, ref.value
    if value._tensor is ref:
        value._tensor = gone  # or each would keep the other
    if table.get(key) is ref:  # the defaults outlive the module when the interpreter ends
        del table[key]


def bind(tensor: torch.Tensor, value: Value, node: Node | None) -> None:
    """From now on `tensor` holds `value`, made by `node`."""
    made = Binding(tensor, forget)
    made.key = key = id(tensor)
    made.value = value
    made.node = node
    made.versions = versions_of(tensor)
    _part(tensor, values_by_tensor.get(key))
    values_by_tensor[key] = made


def bind_output(tensor: torch.Tensor, node: Node, ref: weakref.ref[Node], pending: int = 0) -> Value:
    """The value that `tensor` holds from now on, made by `node`, to which `ref` refers.

    It is what `bind` does, with one weak reference for the value's as well. `pending` is how many writes torch has
    yet to count.
    """
    made = Binding(tensor, forget)
    made.value = value = Value(tensor, made)
    value._node = ref
    made.node = node
    made.versions = (version_of(tensor), version_of(tensor) + pending) if pending else versions_of(tensor)
    made.key = key = id(tensor)
    _part(tensor, values_by_tensor.get(key))
    values_by_tensor[key] = made
    return value


def _part(tensor: torch.Tensor, binding: Binding | None) -> None:
    """Has the value of a binding that goes out of the table refer to its tensor by a reference of its own."""
    if binding is not None and binding.value._tensor is binding:
        binding.value._tensor = weakref.ref(tensor)


def rebind(tensor: torch.Tensor, *also: int) -> None:
    """The writes counted so far on `tensor`, or to be counted as `also`, have not changed what it holds."""
    found = values_by_tensor.get(id(tensor))
    if found is not None:
        found.versions = (version_of(tensor), *also)


def unwritten(tensor: torch.Tensor) -> bool:
    """Whether nothing was written to `tensor` since it was bound."""
    found = values_by_tensor.get(id(tensor))
    return found is not None and version_of(tensor) in found.versions


def written_unseen(value: Value) -> bool:
    """Whether the tensor that holds the value was written to without the recorder noticing.

    An alias that is kept in its place was made below torch's count of writes, and does not share it.
    """
    holder = value._tensor()
    binding = None if holder is None else values_by_tensor.get(id(holder))
    if holder is None or binding is None or binding.value is not value or value.leaf:
        return False
    return version_of(holder) not in binding.versions


def unbind(tensor: torch.Tensor) -> None:
    """From now on `tensor` is unknown to every tape."""
    _part(tensor, values_by_tensor.pop(id(tensor), None))


def bound(tensor: torch.Tensor) -> Value | None:
    """The value that `tensor` was last bound to, without asking whether it was written to since."""
    found = values_by_tensor.get(id(tensor))
    return None if found is None else found.value


# -- the tapes of a thread -----------------------------------------------------------------------------


class Tapes(threading.local):
    """This thread's global tape and its stack of open ones."""

    def __init__(self) -> None:
        self.globe = Tape(strong=False)
        self.stack: list[Tape] = []
        self.current = self.globe


_tapes = Tapes()


def global_tape() -> Tape:
    """This thread's global tape: named operations called outside ``te.record()`` record on it."""
    return _tapes.globe


def current_tape() -> Tape:
    """The innermost open tape of this thread; the global one where none is open."""
    return _tapes.current


def push_tape(tape: Tape) -> None:
    """Opens `tape` on this thread."""
    _tapes.stack.append(tape)
    _tapes.current = tape


def pop_tape(tape: Tape) -> None:
    """Closes `tape`; what was opened after it stays open, as where the blocks of two coroutines take turns."""
    if tape in _tapes.stack:
        _tapes.stack.remove(tape)
    _tapes.current = _tapes.stack[-1] if _tapes.stack else _tapes.globe


def new_global_tape() -> Tape:
    """Starts a new global tape; what the old one recorded lives as long as tensors reach it."""
    before, _tapes.globe = _tapes.globe, Tape(strong=False)
    if _tapes.current is before:
        _tapes.current = _tapes.globe
    return _tapes.globe
