"""Tensors that share a storage, and what an in-place write to one of them does to the others.

A tape is functional: a write makes a new value. Where several tensors look into one storage, a write
through one of them changes what the others hold, and their common *base* tells how::

    x ──► v = x[0] ──► v.mul_(2)        is recorded as    v' = mul(v, 2)
                                                          x' = write_view(x, v', where v lies in x)

A view that is read again afterwards is read off the new base: ``read_view(x', where it lies)``. Both
are ordinary operations with ordinary rules. Before the write happens, every `Kept` cell that looks
into the region gets a copy of its own, so that a rule still finds what was recorded.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .places import extent, offset_of, stride_of
from .regions import overlap, same_storage, storage_in, storage_of
from .tape import (
    Hidden,
    Kept,
    Node,
    Value,
    bound,
    exposed,
    looking,
    on_looking,
    rebind,
    unwritten,
    values_by_tensor,
    version_of,
)

__all__ = [
    "Aliases",
    "changed_outside",
    "count_together",
    "counted_with",
    "expose",
    "forget_exposed",
    "join",
    "look",
    "neighbours",
    "parted_from",
    "protect",
    "refresh",
    "sample_of",
    "share",
    "stale_views",
    "unheard",
    "written_views",
]

# -- who shares a storage with whom --------------------------------------------------------------------


class Aliases:
    """The values that live in one storage: those that a tensor holds now, and those kept for a rule."""

    __slots__ = ("__weakref__", "_drop_at", "_kin", "dropped", "foreign", "members", "storage")

    def __init__(self) -> None:
        self.foreign = False  # whether others have that memory too
        self.dropped = False  # whether views were dropped that are to be read off their base again
        self.storage = 0  # its address, once it is known
        self.members: list[weakref.ref[Value]] = []
        self._kin: list[weakref.ref[Aliases]] = []
        self._drop_at = 16  # how many there are when the dead ones are next dropped

    def add(self, value: Value) -> None:
        """Enters a value; whenever they have doubled, the dead ones are dropped."""
        value._aliases = self
        self.members.append(weakref.ref(value))
        if len(self.members) >= self._drop_at:
            self._drop_at = max(16, 2 * len(self.alive()))

    def settle(self, storage: int) -> None:
        """From now on it is found by the address of its storage."""
        if storage:
            self.storage = storage
            _by_storage[storage] = self

    def alive(self) -> list[Value]:
        """The members that still matter; the others are dropped."""
        known = [v for ref in self.members if (v := ref()) is not None]
        found = [v for v in known if v.kept or v.tensor is not None]
        if len(found) < len(self.members):
            self.dropped = self.dropped or any(v.stale and not v.kept for v in known)
            self.members = [weakref.ref(v) for v in found]
        return found

    @property
    def kin(self) -> list[Aliases]:
        """Those of other storages among which are tensors whose writes torch counts together with some of these."""
        return [others for ref in self._kin if (others := ref()) is not None]

    def join_count(self, others: Aliases) -> None:
        """A tensor with the memory of `others` has that of these from now on, and its count of writes stays."""
        family = {id(each): each for each in (self, others, *self.kin, *others.kin)}
        for each in family.values():
            each._kin = [weakref.ref(other) for other in family.values() if other is not each]

    def counted(self) -> list[Value]:
        """The members that still matter, and those of its kin."""
        return [*self.alive(), *(v for others in self.kin for v in others.alive())] if self._kin else self.alive()


_by_storage: weakref.WeakValueDictionary[int, Aliases] = weakref.WeakValueDictionary()


def join(tensor: torch.Tensor, value: Value) -> bool:
    """Enters `value`, which `tensor` holds, among the aliases of its storage; says whether others have that memory too.

    Torch marks a storage that it shares with NumPy, with a file or another process: it cannot be resized.
    """
    storage = storage_in(tensor)
    key = 0 if storage is None else int(storage._cdata)
    if key:
        group = _by_storage.get(key)  # views that wait will find it there
        if group is None:
            group = Aliases()
            group.settle(key)
        group.add(value)
    if storage is None or storage.resizable() or tensor.numel() == 0 or tensor.device.type != "cpu":
        return False
    value._aliases.foreign = True
    return True


#: Of a tensor in memory that is not torch's own, so many elements are looked at to see whether they were changed.
SAMPLE = 256


def sample_of(tensor: torch.Tensor) -> bytes:
    """The octets of some elements of a tensor, spread over it: of a small one, of all."""
    try:
        with torch.no_grad(), unheard(tensor):
            flat = tensor.detach().resolve_conj().resolve_neg()
            if flat.numel() > SAMPLE:
                places = torch.arange(SAMPLE) * (flat.numel() - 1) // (SAMPLE - 1)
                flat = flat[torch.unravel_index(places, flat.shape)]
            octets: bytes = flat.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return octets
    except (RuntimeError, TypeError):  # a tensor without memory of its own, or of another kind
        return b""


def changed_outside(nodes: Sequence[Node]) -> tuple[Node, Value] | None:
    """A value in memory that others have too, whose elements have changed since, with a node whose rule reads it."""
    ends = {node.tape for node in (*nodes[:1], *nodes[-1:]) if node.tape is not None}
    for ref, then in [each for token in ends for each in token.foreign]:
        value = ref()
        kept = None if value is None else value.kept
        if value is None or kept is None or kept.own or not kept.intact:
            continue
        if sample_of(kept.tensor) == then:
            continue
        for node in nodes:
            if value in node.inputs and (kept in node.saved or isinstance(node.args[-1], Hidden)):
                return node, value
    return None


def _group_at(storage: int) -> Aliases | None:
    """Those that live in the storage at an address."""
    if looking:
        join_views()
    return _by_storage.get(storage)


def look(node: weakref.ref[Node], owner: Value) -> bool:
    """Enters the outputs of `node`, views of `owner`, among its aliases once those are asked for.

    Says whether that may wait: where others have that memory too, its elements are to be looked at now.
    """
    group = owner._aliases
    if group is not None and group.foreign:
        return False
    owner.viewed = True
    looking.append(node)
    if len(looking) >= MOST_LOOKING:
        join_views()
    return True


#: How many views wait to be entered among the aliases of what they look into.
MOST_LOOKING = 4096


def join_views() -> None:
    """Enters the views that wait, in the order of recording."""
    with _joining:
        while looking:
            ref = looking[0]
            node = ref()
            if node is not None:
                for value in node.outputs:
                    _enter(value, node.inputs[0])
            if looking and looking[0] is ref:  # of what it did, a collection of garbage may have done some
                looking.popleft()


_joining = threading.RLock()
on_looking(join_views)


def _enter(value: Value, owner: Value) -> None:
    """Enters a view that has waited; the tensors may be gone by now, and only some of what rules read be left."""
    if value.shape and not value.strides:  # of no one storage
        return
    group = owner._aliases
    if group is None or not group.storage:
        kept = [None if cell is None else cell.tensor for cell in (owner.kept, value.kept)]
        tensor = next((each for each in (owner.holder, value.holder, *kept) if each is not None), None)
        storage = 0 if tensor is None else storage_of(tensor)
        if tensor is not None and not storage:
            return
        known = _by_storage.get(storage) if storage else None
        if known is None:
            known = Aliases() if group is None else group
            known.settle(storage)
        for member in (owner,) if group is None else [v for ref in group.members if (v := ref()) is not None]:
            if member._aliases is not known:
                known.add(member)
        group = known
    if value._aliases is not group:
        group.add(value)


def share(value: Value, with_whom: Value) -> None:
    """Enters `value` among the aliases of a value that is known to live in the same storage."""
    if with_whom.aliases is None:
        holder = with_whom.holder
        if holder is not None:
            join(holder, with_whom)
    group: Aliases | None = with_whom.aliases
    if group is not None:
        group.add(value)
        if group.foreign:
            node, made = value.node, value.holder
            if node is not None and node.tape is not None and made is not None:
                node.tape.watch(value, sample_of(made))


def count_together(new: Value, old: Value) -> None:
    """A tensor that held `old` holds `new`, in other memory: torch counts its writes with those of its old aliases."""
    groups: tuple[Aliases | None, Aliases | None] = new.aliases, old.aliases
    if groups[0] is not None and groups[1] is not None and groups[0] is not groups[1]:
        groups[0].join_count(groups[1])


def alone(tensor: torch.Tensor, value: Value) -> bool:
    """Whether nothing else is known to live in the storage of `tensor`, which holds `value`, and no rule reads it."""
    if tensor._base is not None or value.kept is not None:
        return False
    if value._aliases is None and not value.viewed and storage_of(tensor) not in _by_storage:
        return True  # nor waits there a view of it
    group = value.aliases or _group_at(storage_of(tensor))
    if group is not None:
        if group._kin:
            return False
        for ref in group.members:
            member = ref()
            if not (member is None or member is value) and (member.kept or member.tensor is not None):
                return False
    return True


def neighbours(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The other live tensors that hold a value in the region that `tensor` looks into."""
    group = _group_at(storage_of(tensor))
    if group is None:
        return []
    holders = [t for v in group.alive() if (t := v.holder) is not None and bound(t) is v]
    return [t for t in holders if t is not tensor and overlap(t, tensor)]


def counted_with(tensor: torch.Tensor) -> list[Value]:
    """The values that still matter of the tensors whose writes torch counts together with those of `tensor`."""
    group = _group_at(storage_of(tensor))
    return [] if group is None else group.counted()


def parted_from(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The live tensors that torch takes for views of the same base as `tensor`, or for that, and have other memory."""
    group = _group_at(storage_of(tensor))
    root = tensor if tensor._base is None else tensor._base
    if group is None or not group._kin:
        return []
    holders = [t for v in group.counted() if (t := v.holder) is not None and bound(t) is v]
    return [t for t in holders if (t is root or t._base is root) and not same_storage(t, tensor)]


def stale_views(tensor: torch.Tensor, value: Value) -> list[torch.Tensor]:
    """The live views of `tensor`, which holds `value`, that are to be read off it again; or of what it is a view of."""
    group: Aliases | None = value.aliases
    if group is None or not (any(each.stale for each in group.alive()) or group.dropped):
        return []
    root = tensor if tensor._base is None else tensor._base
    found = [t for each in list(values_by_tensor.values()) if each.value.stale and (t := each()) is not None]
    return [t for t in found if t._base is root]


def written_views(tensor: torch.Tensor, value: Value) -> list[torch.Tensor]:
    """The live views of `tensor`, which holds `value`, whose base was written to."""
    holders = [v.holder for v in (() if value.aliases is None else value.aliases.alive()) if v.written[0] >= 0]
    return [each for each in holders if each is not None and each._base is tensor]


def expose(tensor: torch.Tensor) -> None:
    """The memory of `tensor` is handed to code that nobody hears: cells that look there get copies, now and later."""
    key = storage_of(tensor)
    if not key:
        return
    forget_exposed()
    value = bound(tensor)
    if value is not None:
        protect(tensor, value)
    exposed[key] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def forget_exposed() -> None:
    """Drops the exposed storages that are gone."""
    for key in [key for key, ref in exposed.items() if ref.expired()]:
        del exposed[key]


def unheard(tensor: torch.Tensor | None = None) -> AbstractContextManager[None]:
    """A context in which no mode of the user's hears what is done to `tensor`, unless that is of such a mode's own."""
    if not torch._C._len_torch_dispatch_stack() or (
        tensor is not None and torch._C._dispatch_keys(tensor).has(_PYTHON)
    ):
        return nullcontext()
    quiet: AbstractContextManager[None] = torch._C._DisableTorchDispatch()
    return quiet


_PYTHON = torch._C.DispatchKey.Python


def protect(tensor: torch.Tensor, value: Value) -> list[tuple[Kept | None, torch.Tensor]]:
    """Before `tensor` is written to: a copy for every cell that looks into what will change.

    Returns what the write spares, cells and bound tensors beside its region, for `refresh` afterwards:
    torch counts writes by storage, so that their count goes up although their contents stay.
    """
    spared: list[tuple[Kept | None, torch.Tensor]] = []
    storage = storage_of(tensor)
    group = [value] if value.aliases is None else value.aliases.counted()
    for each, cell in [(v, found) for v in group if (found := v.kept) is not None]:
        if not cell.intact:
            continue
        if storage_of(cell.tensor) == storage and overlap(cell.tensor, tensor):
            with unheard(cell.tensor):
                cell.replace(_copy(cell.tensor.detach(), each.asked))
        elif not cell.own:  # a copy has no count
            spared.append((cell, cell.tensor))
    for other in group:
        holder = other.tensor
        if holder is None or holder is tensor:
            continue
        if unwritten(holder) and not (storage_of(holder) == storage and overlap(holder, tensor)):
            spared.append((None, holder))
    return spared


def _copy(tensor: torch.Tensor, asked: bool) -> torch.Tensor:
    """A copy of `tensor`; where the code has asked how it lies, one that begins where it does, as strides count."""
    offset = int(offset_of(tensor))
    if not (asked and offset):
        return tensor.clone(memory_format=torch.preserve_format)
    room = tensor.new_empty(offset + extent(tuple(tensor.shape), stride_of(tensor)))
    return room.as_strided(tensor.shape, stride_of(tensor), offset).copy_(tensor)


def refresh(spared: list[tuple[Kept | None, torch.Tensor]], pending: int = 1) -> None:
    """After the write: what it spared takes the storage's count of writes, with those that torch has yet to count."""
    for cell, tensor in spared:
        count = version_of(tensor)
        if cell is None:
            rebind(tensor, count + pending)
        else:
            cell.versions = (count, count + pending)
