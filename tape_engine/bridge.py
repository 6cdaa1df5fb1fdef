"""From ``.g`` to ``.grad``: what an optimizer of `torch.optim`, gradient clipping and gradient scaling read.

::

    te.backward(C, wrt=list(model.parameters()))
    te.fill_grad(model)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .errors import DTypeError, NotRecordedError, ShapeError, message
from .names import call_site, local_name, user_frame
from .recorder import pause, quietly
from .tape import describe

__all__ = ["fill_grad"]

Tensor = torch.Tensor


def fill_grad(parameters: Any, accumulate: bool = False) -> None:
    """Sets ``p.grad`` of each parameter from its ``p.g``, so that torch's optimizers take it from there.

    The elements are copied: what works on ``.grad`` in place (`torch.nn.utils.clip_grad_norm_`, a gradient
    scaler) leaves ``.g`` as the sweep gave it. A ``.grad`` that is there is written over where it fits, so that
    a training loop allocates nothing, and ``optimizer.zero_grad()`` is not needed.

    Args:
        parameters: a module, an optimizer, a tensor, or an iterable of tensors, of ``(name, tensor)`` pairs
            as ``module.named_parameters()`` gives them, or of an optimizer's param-group dicts.
        accumulate: adds to the ``.grad`` that is there. Otherwise a parameter without ``.g``, or a frozen one
            (an `nn.Parameter` with ``requires_grad=False``), is left with ``.grad = None``: nothing stale
            stays behind. Give the sweep ``wrt=`` the parameters, so that one that the loss does not reach loses
            the ``.g`` of an earlier sweep.

    Raises:
        DTypeError: for what is not a parameter: no tensor, or one that torch computed (not a leaf).
        ShapeError: where ``.g`` is not of the shape, dtype or device of its parameter.
        NotRecordedError: where no parameter has ``.g``, as before the first sweep.
            Whatever is raised, no ``.grad`` has changed.
    """
    with pause(), quietly():
        named = list({id(p): (name, p) for name, p in _named(parameters)}.values())
        pairs = [(p, _checked(name, p)) for name, p in named]
        if pairs and all(g is None for _, g in pairs):
            raise NotRecordedError(
                message(
                    f"te.fill_grad: none of the {len(pairs)} parameters has .g yet.",
                    where=call_site(user_frame()),
                    operands=[(name, describe(p)) for name, p in named[:3]],
                    fix="call te.backward(C) first, C computed from them by recorded operations",
                )
            )
        with torch.no_grad():
            for p, g in pairs:
                _fill(p, g, accumulate)


def _fill(p: Tensor, g: Tensor | None, accumulate: bool) -> None:
    if isinstance(p, torch.nn.Parameter) and not p.requires_grad:
        g = None
    before = p.grad
    if g is None:
        if not accumulate:
            p.grad = None
    elif before is None or before.layout != g.layout or before.requires_grad or _shared(before, g):
        p.grad = g.detach().clone() if before is None or not accumulate else before.detach() + g
    elif accumulate:
        before.add_(g)
    else:
        before.copy_(g)


def _shared(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients look into one storage, as after ``p.grad = p.g`` by hand."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def _named(parameters: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with a name for messages."""
    if isinstance(parameters, torch.nn.Module):
        yield from parameters.named_parameters()
    elif isinstance(parameters, torch.optim.Optimizer):
        yield from _named(parameters.param_groups)
    elif isinstance(parameters, Tensor):
        yield local_name(user_frame(), parameters) or "the tensor", parameters
    elif isinstance(parameters, dict):
        if "params" not in parameters:
            raise _no_parameter("a dict without 'params'")
        names = parameters.get("param_names")
        inside = list(_named(parameters["params"]))
        yield from zip(names, (p for _, p in inside), strict=True) if names else inside
    elif isinstance(parameters, Iterable) and not isinstance(parameters, (str, bytes)):
        for i, each in enumerate(parameters):
            if isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) and isinstance(each[1], Tensor):
                yield each
            elif isinstance(each, Tensor):
                yield local_name(user_frame(), each) or f"parameter {i}", each
            elif isinstance(each, dict):
                yield from _named(each)
            else:
                raise _no_parameter(f"an iterable with {type(each).__name__} in it")
    else:
        raise _no_parameter(type(parameters).__name__)


def _no_parameter(what: str) -> DTypeError:
    return DTypeError(
        message(
            f"te.fill_grad takes a module, an optimizer or an iterable of tensors, not {what}.",
            where=call_site(user_frame()),
            fix="te.fill_grad(model.parameters())",
        )
    )


def _checked(name: str, p: Tensor) -> Tensor | None:
    """The ``.g`` of a parameter, if it has one that may become its ``.grad``."""
    g = getattr(p, "g", None)
    if not p.is_leaf:
        raise DTypeError(
            message(
                f"te.fill_grad: torch computed {name}, so it is no parameter: an optimizer reads the .grad of leaves.",
                where=call_site(user_frame()),
                operands=[(name, describe(p))],
                fix=f"give the tensors that {name} was computed from",
            )
        )
    if g is None:
        return None
    if not isinstance(g, Tensor):
        raise DTypeError(
            message(
                f"te.fill_grad: the .g of {name} is {type(g).__name__}, not a tensor.",
                where=call_site(user_frame()),
                operands=[(name, describe(p))],
                fix=f"te.backward writes it: del {name}.g, and sweep again",
            )
        )
    if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
        raise ShapeError(
            message(
                f"te.fill_grad: the .g of {name} is not of its shape, dtype and device; {name} has changed since.",
                where=call_site(user_frame()),
                operands=[(name, describe(p)), (f"{name}.g", describe(g))],
                fix="sweep again, from a loss computed with the parameters as they are now",
            )
        )
    return g
