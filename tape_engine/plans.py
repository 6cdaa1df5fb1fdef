"""How the recorder treats each ATen overload, told once from its schema.

An overload is either *functional*, or it writes to some of its arguments (``add_``, ``add.out``): then it is
recorded under the functional overload that computes the same (``add``). Its result is fresh memory, or
shares that of an argument (a view). Or it asks a value out of the tensors (``item``): that is a guard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from .registry import Op, composite, find

__all__ = ["QUICK", "Plan", "plan_of", "plans_by_id"]

aten = torch.ops.aten

#: What stands for a default that an argument does not have.
MISSING = object()

#: Overloads whose results share storage with an argument although their schemas do not say so.
HIDDEN_VIEWS = {
    aten._unsafe_view.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unsafe_chunk.default,
    aten._reshape_alias.default,
}

#: Overloads that give views of their first argument, whatever they are given: never a copy, nor the argument itself.
LOOKS = {
    getattr(getattr(aten, name), overload)
    for name, overload in (
        each.split(".")
        for each in (
            "t.default transpose.int permute.default view.default _unsafe_view.default expand.default select.int "
            "slice.Tensor unsqueeze.default squeeze.default squeeze.dim split.Tensor split_with_sizes.default "
            "unbind.int"
        ).split()
    )
}

#: Views that mean more than what they compute: cuts, and a tensor made of Python numbers.
APART = {aten.detach.default, aten.view.dtype, aten.lift_fresh.default}

#: Decompositions that torch computes without vectors where no gradient will need them, and at which place it says so.
#: Under a dispatch mode it takes for granted that one will, and the values then are those of another algorithm.
VECTORS = {aten._linalg_svd.default: (False, False), aten._linalg_eigh.default: ("L", False)}

#: Overloads by which a value leaves the tensors for Python.
GUARDS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.allclose.default,
}

#: Functional twins of another name.
TWINS = {aten.conj_physical_.default: aten._conj_physical.default}

#: Batch norm writes to its running statistics (arguments 3 and 4, when argument 5 says that it trains) without
#: a mark in its schema and without being counted. Its functional twin returns them.
BATCH_NORM = aten.native_batch_norm.default
BATCH_NORM_TWIN = aten._native_batch_norm_legit_functional.default

#: The arguments of which an overload does not make its result: statistics that it moves on. In training the result,
#: and the sweep, are made of those of the batch alone.
UNREAD: dict[Any, tuple[int, ...]] = {BATCH_NORM_TWIN: (3, 4)}

#: What gives a tensor the memory of another, or of a storage.
_set: Any = aten.set_
SETS = {getattr(_set, name) for name in _set.overloads()}

_NAMES = (
    "add.Tensor sub.Tensor mul.Tensor div.Tensor neg exp log sqrt rsqrt sin cos tanh sigmoid relu abs reciprocal "
    "maximum minimum mm bmm mv dot t addmm sign floor erf"
)

#: Overloads with the functions of torch that call them and nothing else.
QUICK: dict[OpOverload, Any] = {}
for _name in _NAMES.split():
    _packet, _, _overload = _name.partition(".")
    QUICK[getattr(getattr(aten, _packet), _overload or "default")] = getattr(torch, _packet)


@dataclass(frozen=True)
class Plan:
    """The recorder's treatment of one overload.

    Attributes:
        overload: what it is the plan of, held as long as that.
        op: the record under which it is entered: its own, or that of its functional twin.
        writes: the arguments it writes to, by position or keyword.
        outs: those of them that its functional twin does not take (``out=``).
        views: whether its result may share the storage of an argument.
        looks: whether it gives views of the first argument in any case.
        guard: whether it asks a value out of the tensors.
        random: whether it draws from a generator.
        updates: whether it writes to its first argument and returns that (``add_``), recorded under a known twin.
        gives_memory: whether it gives a tensor the memory of another, or of a storage (``set_``).
        restrides: whether what it writes are a tensor's shape and strides, and no element (``t_``).
        unread: the places of arguments that its rule reads in other calls than these.
        chance: the place of the argument by which it draws (``dropout_p``): with a 0 there it draws nothing.
        known: whether a functional twin was found, if it writes.
        defaults: for each argument the default that its twin does not have, where one was found.
        statistics: whether what it writes are statistics, through which no gradient passes.
        plain: whether it makes tensors or views of others, which are given in no list, and does nothing else.
        single: whether it makes one tensor, and gives it as it is.
        pointwise: whether it makes each element of those at the same place.
        call: runs it; torch's own callable, without the overload's wrapping.
        quick: runs it on plain tensors; torch's function of that name where there is one, which takes less time.
        order: which of its arguments the twin takes at each place, if in another order (``polygamma_(x, n)``).
    """

    op: Op
    writes: tuple[int | str, ...]
    outs: tuple[int | str, ...]
    views: bool
    guard: bool
    random: bool
    known: bool
    defaults: tuple[Any, ...] = ()
    statistics: bool = False
    plain: bool = False
    single: bool = False
    call: Any = None
    quick: Any = None
    order: tuple[int, ...] = ()
    chance: int | None = None
    pointwise: bool = False
    unread: tuple[int, ...] = ()
    gives_memory: bool = False
    looks: bool = False
    updates: bool = False
    restrides: bool = False
    overload: OpOverload | None = None

    def draws(self, args: tuple[Any, ...]) -> bool:
        """Whether a call with these arguments draws from a generator."""
        if not self.random or self.chance is None:
            return self.random
        return len(args) > self.chance and args[self.chance] != 0


#: Those made so far, by the ``id`` of the overload, whose hash is told by a function of Python.
plans_by_id: dict[int, Plan] = {}


def plan_of(overload: OpOverload, args: tuple[Any, ...] = ()) -> Plan:
    """The plan of an overload; made at its first use."""
    if overload is BATCH_NORM and len(args) > 5 and args[5] and args[3] is not None and args[4] is not None:
        return _TRAINING
    found = plans_by_id.get(id(overload))
    if found is None:
        found = plans_by_id[id(overload)] = _make(overload)
    return found


def _make(overload: OpOverload) -> Plan:
    arguments = overload._schema.arguments
    keys: list[int | str] = [a.name if a.kwarg_only else i for i, a in enumerate(arguments)]
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    outs = tuple(keys[i] for i in written if arguments[i].is_out)
    shared = any(r.alias_info is not None and not r.alias_info.is_write for r in overload._schema.returns)
    twin = _functional(overload) if written else overload
    views, guard = shared or overload in HIDDEN_VIEWS, overload in GUARDS
    random = torch.Tag.nondeterministic_seeded in overload.tags
    returned = [str(each.type) for each in overload._schema.returns]
    flat = not any(str(a.type).startswith(("List[Tensor", "List[Optional", "Dict")) for a in arguments)
    return Plan(
        op=find(twin or overload),
        writes=tuple(keys[i] for i in written),
        outs=outs if twin is not None else (),
        views=views,
        guard=guard,
        random=random,
        plain=_makes_tensors(returned)
        and flat
        and not (written or guard or random or overload in {*APART, *VECTORS, BATCH_NORM})
        and "_nested" not in overload._schema.name,  # what it makes may have no shape
        single=returned == ["Tensor"],
        pointwise=torch.Tag.pointwise in overload.tags,
        chance=next((i for i, a in enumerate(arguments) if a.name == "dropout_p" and not a.kwarg_only), None),
        call=overload._op,
        quick=QUICK.get(overload, overload._op),
        known=twin is not None,
        defaults=tuple(a.default_value if a.has_default_value() else MISSING for a in arguments if not a.kwarg_only),
        statistics="batch_norm" in overload._schema.name,
        gives_memory=overload in SETS,
        overload=overload,
        looks=overload in LOOKS,
        restrides=bool(written) and twin is not None and any(r.alias_info is not None for r in twin._schema.returns),
        updates=written == [0]
        and twin is not None
        and returned == ["Tensor"]
        and not arguments[0].is_out
        and not _order(overload, twin)
        and overload not in SETS,
        order=_order(overload, twin) if written and twin is not None else (),
    )


def _makes_tensors(returned: list[str]) -> bool:
    """Whether results of these types are one tensor, several, or a list of them."""
    return returned == ["List[Tensor]"] or (bool(returned) and set(returned) == {"Tensor"})


def _functional(overload: OpOverload) -> OpOverload | None:
    """The overload that computes the same and writes to nothing: ``add`` of ``add_`` and of ``add.out``."""
    if overload in TWINS:
        return TWINS[overload]
    namespace, _, name = overload._schema.name.partition("::")
    takes = {(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out}
    for title in dict.fromkeys((name.removesuffix("_"), name, f"{name.removesuffix('_')}_functional")):
        packet = getattr(getattr(torch.ops, namespace), title, None)
        if packet is None:
            continue
        found = [getattr(packet, each) for each in packet.overloads()]
        found = [each for each in found if {(a.name, str(a.type)) for a in each._schema.arguments} == takes]
        for each in sorted(found, key=lambda o: o._overloadname != overload._overloadname):
            if not each._schema.is_mutable and not composite(each):
                return each  # type: ignore[no-any-return]
    return None


def _order(overload: OpOverload, twin: OpOverload) -> tuple[int, ...]:
    """For each argument of the twin the place of the same one here; empty where they stand alike."""
    names = [a.name for a in overload._schema.arguments if not a.is_out]
    order = tuple(names.index(a.name) for a in twin._schema.arguments)
    return () if order == tuple(range(len(order))) else order


_TRAINING = Plan(
    op=find(BATCH_NORM_TWIN),
    writes=(3, 4),
    outs=(),
    views=False,
    guard=False,
    random=False,
    known=True,
    statistics=True,
    call=BATCH_NORM._op,
    unread=UNREAD[BATCH_NORM_TWIN],
)
