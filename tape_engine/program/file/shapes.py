"""The shapes that a file tells, held against those that its operations give.

Each node runs once on tensors without memory (torch's meta device), each kind of node a single time. What torch
cannot tell without elements (``nonzero``, a mask), or has no such kernel for, is left to the replay, which
checks it against the elements.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from ...tape import Node, Value
from ..data import sized_by_elements
from .allowed import OURS
from .checked import Place, refuse

__all__ = ["check_shapes"]

Tensor = torch.Tensor
aten = torch.ops.aten

#: Operations that return as many tensors as a shape says, with the number that they return.
COUNTED: dict[Any, Callable[..., int]] = {
    aten.unbind.int: lambda shape, dim=0: shape[dim],
    aten.split.Tensor: lambda shape, size, dim=0: max(1, -(-shape[dim] // size)) if size else 1,
    aten.unsafe_split.Tensor: lambda shape, size, dim=0: max(1, -(-shape[dim] // size)) if size else 1,
    aten.split_with_sizes.default: lambda shape, sizes, dim=0: len(sizes),
    aten.unsafe_split_with_sizes.default: lambda shape, sizes, dim=0: len(sizes),
}

#: Outputs of which torch's meta kernels say something else than its others do: sizes of work space, or nothing.
UNTOLD: dict[Any, set[int]] = {
    aten.native_batch_norm.default: {1, 2},
    aten._native_batch_norm_legit_functional.default: {1, 2},
    aten.mkldnn_rnn_layer.default: {3},
    aten._embedding_bag.default: {1, 2, 3},
    aten._embedding_bag_forward_only.default: {1, 2, 3},
}


def _is_left(node: Node) -> bool:
    """Whether torch's meta kernel is of no use: it asks for elements, or takes ``dim=[]`` for no dimension."""
    if node.op.forward is aten.nansum.default:
        return 0 in [len(each) for each in node.args[1:2] if isinstance(each, list)]
    return node.op.forward is aten._pack_padded_sequence.default


def check_shapes(nodes: Sequence[Node]) -> None:
    """Refuses nodes whose outputs are of another shape or dtype than their operations give.

    Raises:
        LoadError: naming the node.
    """
    known: set[Any] = set()
    ours = {id(op) for op, _ in OURS.values()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, node in enumerate(nodes):
            if node.result is not None or sized_by_elements(node) or _is_left(node):
                continue
            if node.op.is_named and id(node.op) not in ours:
                continue
            key = (id(node.op), _kind(node.args), _kind(tuple(node.kwargs.items())), _kind(node.outputs), node.gaps)
            if key not in known:
                _check(node, ("nodes", i))
                known.add(key)


def _kind(argument: Any) -> Any:
    if isinstance(argument, Value):
        return argument.shape, argument.strides, argument.dtype
    if isinstance(argument, (list, tuple)):
        return (type(argument), *[_kind(each) for each in argument])
    return type(argument), repr(argument)


def _check(node: Node, place: Place) -> None:
    forward: Any = node.op.forward
    args = [_bare(each) for each in node.args]
    kwargs = {name: _bare(each) for name, each in node.kwargs.items()}
    if isinstance(forward, OpOverload):
        if not node.inputs:  # a factory would take memory for what it makes
            if all(a.name != "device" for a in forward._schema.arguments):
                refuse(place, f"{node.op.name} reads no tensor.")
            kwargs["device"] = torch.device("meta")
        if any("List" in str(each.type) for each in forward._schema.returns):
            _check_count(node, place)
    try:
        made = forward(*args, **kwargs)
    except NotImplementedError:
        return
    except Exception as error:
        said = str(error).partition("\n")[0][:200]
        refuse(place, f"{node.op.name} does not take its arguments: {said}")
    _compare(node, [made] if isinstance(made, Tensor) else list(made), place)


def _check_count(node: Node, place: Place) -> None:
    """Before an operation makes as many tensors as a shape says."""
    count = COUNTED.get(node.op.forward)
    if count is None:
        return
    try:
        expected = count(node.inputs[0].shape, *node.args[1:], **node.kwargs)
    except (IndexError, TypeError):
        refuse(place, f"{node.op.name} does not take its arguments.")
    if expected != len(node.outputs):
        refuse((*place, "outputs"), f"{node.op.name} gives {expected} tensors, not {len(node.outputs)}.")


def _compare(node: Node, made: list[Any], place: Place) -> None:
    places = [i for i in range(len(node.outputs) + len(node.gaps)) if i not in node.gaps]
    if len(made) < len(node.outputs) + len(node.gaps):
        refuse((*place, "outputs"), f"{node.op.name} gives {len(made)} tensors, not {len(node.outputs)}.")
    untold = UNTOLD.get(node.op.forward, set())
    for k, (i, value) in enumerate(zip(places, node.outputs, strict=True)):
        got = made[i]
        if i in untold:
            continue
        if not isinstance(got, Tensor) or got.shape != value.shape or got.dtype != value.dtype:
            told = f"{tuple(got.shape)} {got.dtype}" if isinstance(got, Tensor) else "nothing"
            refuse(
                (*place, "outputs", k),
                f"{node.op.name} gives {told} here, and the file says {tuple(value.shape)} {value.dtype}.",
            )


def _bare(argument: Any) -> Any:
    """An argument with tensors without memory in the place of values."""
    if isinstance(argument, Value):
        return torch.empty_strided(argument.shape, argument.strides, dtype=argument.dtype, device="meta")
    if isinstance(argument, torch.device):
        return torch.device("meta")
    if type(argument) in (list, tuple):
        return type(argument)([_bare(each) for each in argument])
    return argument
