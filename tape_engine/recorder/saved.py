"""What torch's autograd has saved, known again when its own backward runs in a block.

Autograd saves what its formulas read, and hands it to them as tensors of its own making. For the tape each is the
value that was saved: else a gradient of a gradient would end there, in silence.
"""

from __future__ import annotations

import torch
from torch._C import DisableTorchFunction, DispatchKey, _current_graph_task_id, _SetExcludeDispatchKeyGuard

from ..aliases import unheard
from ..tape import Tape, Value, address_of, bound, values_by_tensor

__all__ = ["before_cut", "in_backward", "is_unpacking", "saved_unheard", "unpacked"]

Tensor = torch.Tensor


def saved_unheard(tensor: Tensor, tape: Tape) -> Value | None:
    """The value that torch's own backward unpacks, if autograd has saved it unheard."""
    node = tape.unheard.get(address_of(tensor)) if tape.unheard and bound(tensor) is None else None
    cell = None if node is None else node.saved[-1]
    value = None if node is None else node.outputs[0]
    if cell is None or value is None or address_of(cell.tensor) != address_of(tensor):  # written to since, or freed
        return None
    return value if (value.shape, value.strides, value.dtype) == (tensor.shape, tensor.stride(), tensor.dtype) else None


def is_unpacking(packed: Tensor) -> bool:
    """Whether torch's own backward makes an alias of what hooks gave it, and no tape knows what that stands for."""
    if _current_graph_task_id() < 0:
        return False
    known = bound(packed)
    if known is None or known.leaf:
        return True
    return not known.constant and known.holder is packed and not packed.requires_grad  # the hook has computed it


def in_backward(tensor: Tensor) -> bool:
    """Whether torch's own backward is at work, and `tensor` has a place in its graph."""
    return _current_graph_task_id() >= 0 and tensor.requires_grad


def before_cut(tensor: Tensor) -> Value | None:
    """What a hook gave for `tensor` without its gradient, if that is recorded: what ``checkpoint`` computes again."""
    held = bound(tensor)
    node = None if held is None else held.node
    if node is None or not node.op.name.startswith("detach") or not node.inputs[0].differentiable:
        return None
    return node.inputs[0]


def unpacked(tensor: Tensor) -> Tensor | None:
    """The tensor that was saved, if torch's own backward was given this one in its place.

    So it is where hooks packed it (``saved_tensors_hooks``, ``checkpoint``): whatever they made of it, torch links
    what they give back to where the saved one stands in its graph, and by that it is found.
    """
    if not in_backward(tensor) or tensor._base is not None:
        return None
    if tensor.is_leaf:
        original = _beginning(tensor)
        return None if original is tensor else original
    for reference in list(values_by_tensor.values()):
        other = reference()
        if other is None or other is tensor or other._base is not None or not other.requires_grad:
            continue
        if other.grad_fn is tensor.grad_fn and other.output_nr == tensor.output_nr:
            return other
    return None


def _beginning(leaf: Tensor) -> Tensor | None:
    """The tensor on which torch's own backward would leave the gradient of `leaf`."""
    above = _SetExcludeDispatchKeyGuard(DispatchKey.AutogradFunctionality, False)  # a mode hears torch below its graph
    with DisableTorchFunction(), unheard(leaf), torch.enable_grad(), above:
        alias = leaf.view_as(leaf)
    made: Tensor | None = None if alias.grad_fn is None else alias.grad_fn.next_functions[0][0].variable  # type: ignore[union-attr]
    return made
