"""Which operations may stand in a file, and how a name in a file becomes one: by look-up in tables, never by code.

- ``aten::mm.default``: an overload of torch's own, of those that compute tensors from tensors and plain arguments
  and write to nothing;
- ``tape_engine::lin``: a named operation of ours;
- ``ops::scale``: a named operation of the user's, or ``mylib::f.default``, an overload of a library's: only what
  the user gives as ``ops=``, or has registered a rule for.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from ... import registry
from ...ops import lin, mse, relu
from ...places import read_view, write_view
from ...plans import GUARDS
from ...recorder.doors import cut_op, guard_ops
from ...registry import Op
from .checked import Place, refuse, shown

__all__ = ["Table", "name_of", "refusal", "schema_of", "takes"]

#: Named operations of ours, with the types of their arguments as a schema would give them.
OURS: dict[str, tuple[Op, tuple[str, ...]]] = {
    "tape_engine::lin": (lin, ("Tensor", "Tensor", "Optional[Tensor]")),
    "tape_engine::relu": (relu, ("Tensor",)),
    "tape_engine::mse": (mse, ("Tensor", "Tensor")),
    "tape_engine::read_view": (read_view, ("Tensor", "List[int]", "List[int]", "int")),
    "tape_engine::write_view": (write_view, ("Tensor", "Tensor", "List[int]", "List[int]", "int")),
    "tape_engine::stop_gradient": (cut_op, ("Tensor",)),
    "tape_engine::tolist": (guard_ops["tolist"], ("Tensor",)),
    "tape_engine::elements": (guard_ops["elements"], ("Tensor",)),
}
_NAMES = {id(each): name for name, (each, _) in OURS.items()}

#: What an argument may be: these, optional, and lists of them.
PLAIN = {"Tensor", "int", "float", "bool", "number", "str", "ScalarType", "Layout", "MemoryFormat", "Device"}

#: Families of torch's that look at files, hand out no plain tensors, or take packed memory on trust.
DENIED = ("from_file", "_test_", "_nested", "nested_", "_sparse", "sparse_", "_cslt", "_convert_weight", "_dyn_quant",
          "_weight_int", "_make_per", "quantize_", "_quantize_", "_empty_affine", "_empty_per", "_cudnn_init",
          "_mkldnn", "to_mkldnn", "to_sparse", "_to_sparse", "mkldnn_reorder", "fbgemm_")  # fmt: skip


# -- writing ---------------------------------------------------------------------------------------------------


def name_of(op: Op) -> str:
    """How a file calls an operation."""
    if isinstance(op.forward, OpOverload):
        namespace, _, name = op.forward._schema.name.partition("::")
        return f"{namespace}::{name}.{op.forward._overloadname}"
    return _NAMES.get(id(op)) or f"ops::{op.name}"


def schema_of(op: Op) -> str:
    """The schema string of an operation; of a named one its name and parameters."""
    if isinstance(op.forward, OpOverload):
        return str(op.forward._schema)
    return f"{op.name}({', '.join(op.parameters)})"


def refusal(op: Op) -> str | None:
    """Why an operation cannot be kept in a file, if it cannot."""
    if isinstance(op.forward, OpOverload):
        return _refusal_of(op.forward)
    if id(op) in _NAMES or any(op is each for each in registry.ops()):
        return None
    return "it is a torch.autograd.Function or other Python code, which a file does not hold"


@cache
def _refusal_of(overload: OpOverload) -> str | None:
    schema = overload._schema
    namespace, _, name = schema.name.partition("::")
    if schema.is_mutable or any(a.is_out for a in schema.arguments):
        return "it writes to its arguments"
    if namespace == "aten" and name.startswith(DENIED):
        return "it is of a family that no program file may hold"
    if overload in GUARDS:
        return None
    returned = [str(each.real_type) for each in schema.returns]
    if not returned or not {*returned} <= {"Tensor", "List[Tensor]"}:
        return "it does not return tensors"
    for each in schema.arguments:
        kind = str(each.real_type)
        if kind != "Optional[Generator]" and _inside(kind) not in PLAIN:
            return f"its argument {each.name} is a {kind}"
    return None


def _inside(kind: str) -> str:
    while kind.startswith(("Optional[", "List[")):
        kind = kind.partition("[")[2][:-1]
    return kind


# -- reading ---------------------------------------------------------------------------------------------------


@cache
def _aten() -> dict[str, tuple[str, str]]:
    """Every operation of torch's own that its dispatcher knows: name in a file, packet and overload."""
    found = {}
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        if namespace == "aten":
            packet, _, overload = rest.partition(".")
            found[f"aten::{packet}.{overload or 'default'}"] = packet, overload or "default"
    return found


class Table:
    """The operations that a file may name: torch's, ours, and those that the user gives.

    Args:
        ops: operations, or a mapping of names to them.
        draft: an operation that is not given is replaced by one that cannot run (for pictures).
    """

    def __init__(self, ops: Sequence[Op] | Mapping[str, Op], *, draft: bool = False) -> None:
        named = ops.items() if isinstance(ops, Mapping) else [(each.name, each) for each in ops]
        self._given: dict[str, Op] = {f"ops::{name}": each for name, each in named if each.is_named}
        self._given |= {name_of(each): each for _, each in named if not each.is_named}
        self._draft = draft

    def find(self, name: str, place: Place, schema: str = "", rule: str | None = None) -> Op:
        """The operation of a name; schema and rule are what a stand-in for it tells.

        Raises:
            LoadError: for a name that stands for none, or for one that may not stand in a file.
        """
        namespace = name.partition("::")[0]
        found: Op | None = None
        if namespace == "aten":
            known = _aten().get(name)
            overload = None if known is None else getattr(getattr(torch.ops.aten, known[0], None), known[1], None)
            found = registry.find(overload) if isinstance(overload, OpOverload) else None
        elif name in OURS:
            found = OURS[name][0]
        else:
            found = self._given.get(name) or _registered(name)
        if found is None:
            self._missing(name, namespace, place)
            found = _stand_in(name, schema, rule)
        if found.is_named:
            return found
        reason = _refusal_of(found.forward)
        if reason is not None:
            refuse(place, f"{name} may not stand in a program file: {reason}.")
        return found

    def _missing(self, name: str, namespace: str, place: Place) -> None:
        if namespace in ("aten", "tape_engine"):
            refuse(place, f"{shown(name)} is no operation that is known here.", "load it with the torch that saved it")
        if not self._draft:
            short = name.partition("::")[2]
            fix = f"te.load(path, ops=[{short}])" if namespace == "ops" else f"te.load(path, ops=[...]) with {short}"
            refuse(place, f"the program runs the operation {short}, which is not given.", fix)


def _registered(name: str) -> Op | None:
    """An overload of a library's for which a rule is registered."""
    return next((each for each in registry.ops() if not each.is_named and name_of(each) == name), None)


def _stand_in(name: str, schema: str, rule: str | None) -> Op:
    """An operation that has the name, the parameters and the rule's name of one that is not here, and cannot run."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} was not given when the program was loaded")

    made = Op(forward, name=name.partition("::")[2])
    words = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", schema.partition("(")[2]))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if words and not any(keyword.iskeyword(word) for word in words):
        made.signature = inspect.Signature([inspect.Parameter(word, kind, default=None) for word in words])
    if rule is not None:

        def grad(g: Any, out: Any, *args: Any) -> Any:
            raise NotImplementedError(f"{rule} was not given when the program was loaded")

        grad.__name__ = rule
        made.rule(grad)
    return made


def takes(op: Op) -> list[tuple[str, str, bool, bool]] | None:
    """For each argument of an operation its name, type, whether it is needed, and whether by keyword only.

    ``None`` for an operation of the user's, whose arguments have no types.
    """
    if isinstance(op.forward, OpOverload):
        return _takes(op.forward)
    ours = _NAMES.get(id(op))
    if ours is None:
        return None
    names = op.parameters or ("self",)
    return [(name, kind, True, False) for name, kind in zip(names, OURS[ours][1], strict=True)]


@cache
def _takes(overload: OpOverload) -> list[tuple[str, str, bool, bool]]:
    return [
        (a.name, str(a.real_type), not a.has_default_value(), bool(a.kwarg_only)) for a in overload._schema.arguments
    ]
