"""How the python backend calls an operation of torch: the quickest way that gives what was recorded.

``torch.mm(a, b, out=buffer)`` takes about half as long as the overload ``torch.ops.aten.mm.out``. Not every
overload has such a function, nor does every function take its overload's arguments. So each way is
tried once, on tensors of the recorded shapes, and used where it gives what the overload itself gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._ops import OpOverload

from ..regions import storage_of
from ..tape import Node, Value, address_of
from .data import sized_by_elements

__all__ = ["Call", "call_of"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Call:
    """A way to run an operation.

    Attributes:
        function: what is called.
        title: how the generated code writes it (``torch.mm``), or how it names it.
        outs: the keywords under which it takes its results' memory; empty if it allocates them.
        view: whether its result looks into the memory of an argument.
        unknown: whether it may do so, for all that is known.
        more: arguments that are given to it after the operation's own.
        in_place: whether its result may be written where an operand lies: element by element, that is.
    """

    function: Callable[..., Any]
    title: str
    outs: tuple[str, ...] = ()
    view: bool = False
    more: tuple[Any, ...] = ()
    in_place: bool = False
    unknown: bool = False


#: Overloads that have no variant for given memory, by one that does the same and has, with its further arguments.
SAME_WITH_OUT: dict[Any, tuple[Callable[..., Any], str, tuple[Any, ...]]] = {
    torch.ops.aten.relu.default: (torch.clamp_min, "torch.clamp_min", (0,))
}

#: Overloads that copy: their result's memory is filled with ``copy_``.
COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}

#: Overloads that leave out what their backward needs where torch's grad mode is off.
GRAD_MODE = {torch.ops.aten.mkldnn_rnn_layer.default}

#: Overloads that draw in the order of fresh contiguous memory, where the in-place ones that are recorded under
#: them draw in the order in which their tensor lies.
LAID_OUT = {torch.ops.aten.bernoulli.p: Tensor.bernoulli_}

_known: dict[Any, Call] = {}

#: How many kinds of call are known at most: sizes and places that differ from recording to recording are kinds too.
KINDS = 10_000


def call_of(node: Node) -> Call:
    """The quickest way to run `node`, found at the first node of its kind."""
    forward = node.op.forward
    if not isinstance(forward, OpOverload):
        view = node.op.name == "read_view"
        return Call(forward, node.op.name, view=view, unknown=not view)
    if forward in LAID_OUT and node.mutates:
        return Call(_filling(LAID_OUT[forward]), f"{node.op.name}_")
    key = (forward, _kind(node.args), _kind(node.kwargs), len(node.outputs), node.gaps)
    found = _known.get(key)
    if found is None:
        found = _under_grad_mode(node, forward) if forward in GRAD_MODE else _find(node, forward)
        if len(_known) >= KINDS:
            _known.clear()
        _known[key] = found
    return found


def _under_grad_mode(node: Node, forward: OpOverload) -> Call:
    run = _with_grad_mode(forward)
    looks = _looks_in(node, run)
    return Call(run, node.op.name, view=looks is True, unknown=looks is None)


def _with_grad_mode(forward: OpOverload) -> Callable[..., Any]:
    """`forward` under torch's grad mode, without a graph of torch's."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return forward(*[each.detach() if isinstance(each, Tensor) else each for each in args], **kwargs)

    return run


def _filling(fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The in-place operation `fill`, on fresh memory that lies as its tensor does."""
    return lambda tensor, *args, **kwargs: fill(torch.empty_like(tensor), *args, **kwargs)


def _kind(argument: Any) -> Any:
    """What two calls must have in common for one to be run the way that was tried for the other."""
    if isinstance(argument, Value):
        return argument.dtype, argument.ndim, argument.device.type
    if isinstance(argument, (list, tuple)):
        return tuple(_kind(each) for each in argument)
    if isinstance(argument, dict):
        return tuple((name, _kind(each)) for name, each in argument.items())
    if isinstance(argument, float):  # a rate that changes from recording to recording changes no way to call
        return "float" if abs(argument) < float("inf") else repr(argument)
    return repr(argument)


def _find(node: Node, forward: OpOverload) -> Call:
    schema = forward._schema
    name = schema.name.partition("::")[2]
    told = any(r.alias_info is not None for r in schema.returns)
    if not schema.name.startswith("aten::") or node.random:
        return Call(forward, f"torch.ops.{forward}", view=told, unknown=True)
    looks = _looks_in(node, forward)
    shares = told or looks is True  # `_unsafe_view`, `unsafe_split` and their like do not tell
    # A loss that torch reduces takes given memory for its terms first, and moves it to where they have room.
    reduced = "reduction" in node.op.parameters and [v.ndim for v in node.outputs] == [0]
    out = None if shares or node.gaps or reduced or sized_by_elements(node) else _out_variant(forward)
    ways: list[Call] = []
    if forward in SAME_WITH_OUT:
        same, title, more = SAME_WITH_OUT[forward]
        ways.append(Call(same, title, ("out",), more=more))
    for owner, place in ((torch, "torch"), (torch._C._nn, "torch._C._nn")):
        function = getattr(owner, name, None)
        if function is not None and out is not None and len(_outs(out)) == 1 == len(node.outputs):
            ways.append(Call(function, f"{place}.{name}", ("out",)))
    if out is not None and len(_outs(out)) == len(node.outputs):
        ways.append(Call(out, f"torch.ops.{out}", _outs(out)))
    if out is None and forward._overloadname == "Scalar" and not (shares or node.gaps or reduced):
        of_two = getattr(torch, name, None)  # takes a number for the second one
        if of_two is not None and len(node.outputs) == 1:
            ways.append(Call(of_two, f"torch.{name}", ("out",)))
    method = getattr(Tensor, name, None)
    if shares and method is not None:
        ways.append(Call(method, f"torch.Tensor.{name}", view=True))
    for owner, place in ((torch, "torch"), (torch._C._nn, "torch._C._nn")):
        function = getattr(owner, name, None)
        if not shares and function is not None:
            ways.append(Call(function, f"{place}.{name}"))
    default = Call(forward, f"torch.ops.{forward}", view=shares, unknown=looks is None)
    found = next((way for way in ways if _gives_the_same(way, node, forward)), default)
    if found.outs and torch.Tag.pointwise in forward.tags and _writes_over(found, node, forward):
        found = replace(found, in_place=True)
    return found


def _outs(variant: OpOverload) -> tuple[str, ...]:
    return tuple(a.name for a in variant._schema.arguments if a.is_out)


def _out_variant(forward: OpOverload) -> OpOverload | None:
    """The overload that writes into given memory, if torch has a kernel for it and not only a copy."""
    takes = [(a.name, str(a.type)) for a in forward._schema.arguments]
    packet = forward.overloadpacket
    for name in packet.overloads():
        each: OpOverload = getattr(packet, name)
        arguments = each._schema.arguments
        if torch.Tag.generated in each.tags or not any(a.is_out for a in arguments):
            continue
        if [(a.name, str(a.type)) for a in arguments if not a.is_out] == takes:
            return each
    return None


def _gives_the_same(way: Call, node: Node, forward: OpOverload) -> bool:
    """Whether `way` gives what the overload gives; a way that raises does not."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            args = [_trial(each) for each in node.args]
            kwargs = {name: _trial(each) for name, each in node.kwargs.items()}
            expected = _listed(forward(*args, **kwargs))
            if way.outs:
                buffers = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in expected]
                places = [address_of(each) for each in buffers]
                way.function(*args, *way.more, **kwargs, **dict(zip(way.outs, buffers, strict=True)))
                got = buffers if places == [address_of(each) for each in buffers] else []  # it may not move them
            else:
                got = _listed(way.function(*args, **kwargs))
            return len(got) == len(expected) and all(
                a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
                for a, b in zip(got, expected, strict=True)
            )
    except Exception:  # whatever it is, this way is not the one
        return False


def _looks_in(node: Node, forward: Callable[..., Any]) -> bool | None:
    """Whether a result of the overload looks into the memory of an argument; ``None`` if it cannot be tried."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args, kwargs = [_trial(each) for each in node.args], {n: _trial(each) for n, each in node.kwargs.items()}
            made = {storage_of(each) for each in _listed(forward(*args, **kwargs))}
    except Exception:  # whatever it is, nothing is known
        return None
    return any(storage_of(each) in made for each in _tensors([*args, *kwargs.values()]))


def _tensors(arguments: Any) -> list[Tensor]:
    """The tensors among arguments, and in the lists among them."""
    if isinstance(arguments, Tensor):
        return [arguments]
    return [t for each in arguments for t in _tensors(each)] if isinstance(arguments, (list, tuple)) else []


def _writes_over(way: Call, node: Node, forward: OpOverload) -> bool:
    """Whether `way` gives the same where its result is written over the operand of its description, whichever it is."""
    if len(way.outs) != 1:
        return False
    out = node.outputs[0]
    places = [i for i, each in enumerate(node.args) if isinstance(each, Value) and each.shape == out.shape]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            kwargs = {name: _trial(each) for name, each in node.kwargs.items()}
            expected = forward(*[_trial(each) for each in node.args], **kwargs)
            for place in places:
                args = [_trial(each) for each in node.args]
                if args[place].dtype != expected.dtype or args[place].stride() != expected.stride():
                    continue
                way.function(*args, *way.more, **kwargs, **{way.outs[0]: args[place]})
                if not torch.equal(args[place].nan_to_num(), expected.nan_to_num()):
                    return False
    except Exception:  # whatever it is, it does not write over operands
        return False
    return True


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [each for each in result if each is not None]


def _trial(argument: Any) -> Any:
    """Something of an argument's description that tells one computation from another: no two elements alike."""
    if isinstance(argument, Value):
        if not (argument.dtype.is_floating_point or argument.dtype.is_complex):
            return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
        spread = torch.linspace(0.1, 0.9, argument.numel(), device=argument.device)
        return spread.reshape(argument.shape).to(argument.dtype)
    if type(argument) in (list, tuple):
        return type(argument)([_trial(each) for each in argument])
    return argument
