"""What a gradient rule is given and what it returned: put in order, checked, fitted to its values.

A rule returns one gradient for each tensor argument. Whether it did, and whether each has the shape, dtype and
device of its value, is looked at here; so is summing over the dimensions that an operation broadcast. An
operation without a rule borrows one from ``torch.func.vjp``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import recorder
from .errors import MissingRuleError, RuleError, message
from .names import located
from .tape import Node, Value, describe

__all__ = ["borrowed", "fitted", "in_order", "refill"]

Tensor = torch.Tensor
_broadcast: Any = torch.broadcast_shapes


def refill(argument: Any, contents: Any) -> Any:
    """`argument` with the contents of values in their place, in order."""
    if isinstance(argument, Value):
        return next(contents)
    if type(argument) in (list, tuple):
        return type(argument)([refill(each, contents) for each in argument])
    return argument


def in_order(returned: Any, node: Node) -> Sequence[Tensor | None]:
    """One gradient for each input of the node.

    A rule may leave out the optional tensor arguments that were not given, or return None for them.
    """
    given = returned if isinstance(returned, (tuple, list)) else [returned]
    if len(given) == len(node.inputs):
        return given
    places = [isinstance(each, Value) for each in _tensor_arguments(node)]
    if len(given) == len(places):
        return [g for g, is_value in zip(given, places, strict=True) if is_value]
    raise RuleError(
        message(
            f"the rule {node.rule} of {node.op.name} returned {len(given)} gradients "
            f"for {len(node.inputs)} tensor arguments.",
            where=located(node),
            operands=[(name, describe(v)) for name, v in zip(node.input_names, node.inputs, strict=True)],
            fix="return one gradient for each tensor argument, in order, None for one that is not differentiable",
        )
    )


def _tensor_arguments(node: Node) -> Iterable[Any]:
    """What was given for each argument that may be a tensor: a value, None, or a number in its place."""
    if node.op.is_named:
        return (
            each for each in _flat((node.args, list(node.kwargs.values()))) if each is None or isinstance(each, Value)
        )
    found: list[Any] = []
    for i, name in _tensor_places(node.op.forward):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(name)
        found += _flat(given)
    return found


@functools.cache
def _tensor_places(overload: Any) -> list[tuple[int, str]]:
    """The arguments of an overload that may be tensors, by place and name; the schema takes long to tell."""
    arguments = enumerate(overload._schema.arguments)
    return [(i, argument.name) for i, argument in arguments if "Tensor" in str(argument.type)]


def fitted(contribution: Tensor, value: Value, node: Node) -> Tensor:
    """A contribution in the shape, dtype and device of its value: un-broadcast, cast, checked."""
    if not isinstance(contribution, Tensor):
        raise _misfit(node, value, f"{type(contribution).__name__}, not a tensor or None")
    if contribution.shape != value.shape:
        if not _may_unbroadcast(contribution, value, node):
            raise _misfit(node, value, f"a gradient of shape {tuple(contribution.shape)}")
        contribution = _unbroadcast(contribution, value.shape)
    if contribution.dtype != value.dtype:
        if contribution.dtype.is_complex and not value.dtype.is_complex:
            contribution = contribution.real
        contribution = contribution.to(value.dtype)
    if contribution.device != value.device:
        contribution = contribution.to(value.device)
    return contribution


def _may_unbroadcast(contribution: Tensor, value: Value, node: Node) -> bool:
    allowed = node.op.broadcasts
    try:
        if allowed is None:
            out = node.outputs[0].shape
            if node.op.is_named:  # X @ w + b broadcasts b, whatever X and w do
                together = _broadcast(value.shape, contribution.shape, out)
            else:
                together = _broadcast(*(v.shape for v in node.inputs))
            allowed = len(node.outputs) == 1 and together == out
    except RuntimeError:
        return False
    return allowed and _spreads(value.shape, contribution.shape)


def _spreads(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of one shape broadcasts to another; told at each bias, where `_broadcast` takes long."""
    extra = len(to) - len(shape)
    return extra >= 0 and all(own in (other, 1) for own, other in zip(shape, to[extra:], strict=True))


def _unbroadcast(g: Tensor, shape: torch.Size) -> Tensor:
    """The sum of `g` over the dimensions along which a tensor of `shape` was repeated to its shape."""
    extra = g.ndim - len(shape)
    repeated = [i for i in range(g.ndim) if i < extra or (shape[i - extra] == 1 and g.shape[i] != 1)]
    if len(repeated) == extra:
        return g.sum(repeated) if extra else g
    return g.sum(repeated, keepdim=True).reshape(shape)


def _misfit(node: Node, value: Value, got: str) -> RuleError:
    i = next(k for k, each in enumerate(node.inputs) if each is value)
    name = node.input_names[i]
    return RuleError(
        message(
            f"the rule {node.rule} of {node.op.name} returned {got} for {name}, which has shape {tuple(value.shape)}.",
            where=located(node),
            operands=[(n, describe(v)) for n, v in zip(node.input_names, node.inputs, strict=True)],
            fix=f"return for {name} a gradient of shape {tuple(value.shape)}",
        )
    )


def borrowed(node: Node, needs: tuple[bool, ...]) -> Any:
    """The rule of an operation that has none registered, as ``torch.func.vjp`` gives it."""
    if node.random:
        raise MissingRuleError(
            message(
                f"{node.op.name} has no registered gradient rule, and a borrowed one would run it again and draw "
                "other random numbers.",
                where=located(node),
                fix=recorder.rule_to_add(node.op),
            )
        )

    def borrowed_grad(g: Any, out: Any, *args: Any, **kwargs: Any) -> list[Tensor | None]:
        tensors = [each for each in _flat((args, list(kwargs.values()))) if isinstance(each, Tensor)]

        def forward(*chosen: Tensor) -> Any:
            left = iter(chosen)
            contents = iter([next(left) if need else tensor for tensor, need in zip(tensors, needs, strict=True)])
            filled = [_swap(each, contents) for each in args]
            named = {name: _swap(each, contents) for name, each in kwargs.items()}
            with recorder.opened():
                result = node.op.forward(*filled, **named)
            made = list(result) if isinstance(result, (tuple, list)) else [result]
            return tuple(each for each, gradient in zip(made, gradients, strict=False) if gradient is not None)

        gradients = list(g) if isinstance(g, (tuple, list)) else [g]
        _load_compiler()
        chosen = [
            tensor.detach() if tensor.grad_fn is not None else tensor
            for tensor, need in zip(tensors, needs, strict=True)
            if need
        ]
        try:
            _refuse_undifferentiable(forward, chosen)
            pull: Any = torch.func.vjp(forward, *chosen)[1]
            found = iter(pull(tuple(each for each in gradients if each is not None)))
        except (RuntimeError, NotImplementedError) as error:
            raise MissingRuleError(
                message(
                    f"{node.op.name} has no registered gradient rule, and torch has none to borrow: {error}",
                    where=located(node),
                    operands=[(name, describe(v)) for name, v in zip(node.input_names, node.inputs, strict=True)],
                    fix=recorder.rule_to_add(node.op),
                )
            ) from error
        return [next(found) if need else None for need in needs]

    return borrowed_grad


@functools.cache
def _load_compiler() -> None:
    """Loads torch's compiler, as ``torch.func.vjp`` does at its first call.

    Torch 2.8 asks a function mode of its own as it does, and none is asked in a sweep.
    """
    with torch._C._EnableTorchFunction():
        importlib.import_module("torch._dynamo")


def _refuse_undifferentiable(forward: Any, tensors: Sequence[Tensor]) -> None:
    """Where torch has no derivative ``torch.func.vjp`` returns zeros without a word."""
    with torch.enable_grad():
        made = forward(*[tensor.detach().requires_grad_() for tensor in tensors])
    if not any(each.requires_grad for each in made):
        raise NotImplementedError("its result does not require a gradient, as torch sees it")


def _flat(argument: Any) -> Iterable[Any]:
    if isinstance(argument, (tuple, list)):
        for each in argument:
            yield from _flat(each)
    else:
        yield argument


def _swap(argument: Any, contents: Any) -> Any:
    """`argument` with the next of `contents` in the place of each tensor."""
    if isinstance(argument, Tensor):
        return next(contents)
    if type(argument) in (list, tuple):
        return type(argument)([_swap(each, contents) for each in argument])
    return argument
