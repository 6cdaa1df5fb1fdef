"""The context of a custom ``torch.autograd.Function``: what its forward leaves for its backward.

It is of torch's own class for the function's contexts, with what torch does in C++ for one that has a place in its
graph done here. Saved tensors are kept in cells, as those that a rule reads: a later write puts a copy into the cell.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import _is_setup_context_defined

from ..errors import GuardError, NotRecordedError, OverwrittenError, message
from ..names import call_site, located, user_frame
from ..tape import Hidden, Kept, Node, Value, bind, bound, describe, written_unseen
from .mode import quietly
from .state import state, tensors_in
from .writing import ALIAS

__all__ = [
    "Call",
    "Run",
    "Saved",
    "by_input",
    "call_in",
    "context_of",
    "leaves_of",
    "no_gradient_lost",
    "sets_up_apart",
    "values_in",
]

Tensor = torch.Tensor
_Function = torch.autograd.Function


# -- the context ---------------------------------------------------------------------------------------------


class Saved:
    """A tensor given to ``ctx.save_for_backward``: its value, and the cell of its contents."""

    __slots__ = ("cell", "node", "value")

    def __init__(self, node: Node, value: Value, cell: Kept) -> None:
        self.node = weakref.ref(node)  # which keeps the context
        self.value = value
        self.cell = cell

    def contents(self) -> Tensor:
        """The tensor as it was saved; where a recording listens, one that stands for the value."""
        cell, value = self.cell, self.value
        if not cell.intact or (cell.own and value._tensor() is not cell.tensor and written_unseen(value)):
            node = self.node()
            raise OverwrittenError(
                message(
                    f"{value.name or 'a tensor'} that the backward of {node.op.name if node else 'a function'} reads "
                    "was changed by a write that the recorder could not see.",
                    where=None if node is None else located(node),
                    operands=[(value.name or "value", describe(value))],
                    fix="write to it inside te.record(), or to a copy of it: .clone()",
                )
            )
        if state.quiet or bound(cell.tensor) is value:
            return cell.tensor
        with quietly():
            alias = ALIAS(cell.tensor)
            bind(alias, value, value.node)
        return alias


class _Context:
    """What is added to torch's own class of a function's context: it works without torch's graph."""

    _saved: tuple[Any, ...] = ()
    _lent: tuple[Any, ...] | None = None
    _materialize = True

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        if self._lent is not None:
            return self._lent
        return tuple([each.contents() if isinstance(each, Saved) else each for each in self._saved])

    def set_materialize_grads(self, value: bool) -> None:
        self._materialize = value


def context_of(cls: Any, needs: tuple[bool, ...]) -> Any:
    """A new context of a function, whose inputs need a gradient as `needs` tells."""
    of_torch = cls._backward_cls
    made = vars(of_torch).get("_of_the_tape")  # there, as a table of ours would keep the function alive
    if made is None:
        made = of_torch._of_the_tape = type(of_torch.__name__, (_Context, of_torch), {"__module__": cls.__module__})
    ctx = made()
    ctx.needs_input_grad = needs
    return ctx


def sets_up_apart(cls: Any) -> bool:
    """Whether a function is of the newer form, whose forward takes no context."""
    return bool(_is_setup_context_defined(cls.setup_context))  # type: ignore[no-untyped-call]


# -- one call ------------------------------------------------------------------------------------------------


class Call(Hidden):
    """What a call of a function was, without contents: all that a program needs to call it again.

    Attributes:
        function: the ``torch.autograd.Function``.
        needs: for each argument whether it can have a gradient.
        outputs: for each result its value; what is no tensor stands as it is.
        single: whether the result was one tensor, and no tuple.
        dirty: the arguments that it writes to, by place.
        handle: in a program, what stands for the context.
        missing: the arguments for which its backward gave None, once it has run; else None.
    """

    def __init__(self, function: Any, needs: tuple[bool, ...]) -> None:
        self.function = function
        self.needs = needs
        self.outputs: tuple[Any, ...] = ()
        self.single = True
        self.dirty: tuple[int, ...] = ()
        self.missing: frozenset[int] | None = None
        self._handle: Value | None = None

    @property
    def title(self) -> str:
        return str(self.function.__name__)

    @property
    def handle(self) -> Value:
        if self._handle is None:
            self._handle = Value(torch.empty(0, dtype=torch.int64))
        return self._handle

    def forward(self, ctx: Any, args: tuple[Any, ...]) -> Any:
        """The function's own forward, on a context of ours."""
        if not sets_up_apart(self.function):
            return self.function.forward(ctx, *args)
        result = self.function.forward(*args)
        self.function.setup_context(ctx, args, result)
        return result

    def listed(self, result: Any) -> tuple[Any, ...]:
        """The results of another run of it, as they were recorded; what is no tensor must be the same.

        Raises:
            GuardError: where it is not.
        """
        listed = result if isinstance(result, tuple) else (result,)
        others = [(now, then) for now, then in zip(listed, self.outputs, strict=True) if not isinstance(then, Value)]
        if any(isinstance(now, Tensor) or now != then for now, then in others):
            raise GuardError(
                message(
                    f"what {self.title} returns beside tensors comes out differently: "
                    f"{[then for _, then in others]!r} when recorded, {[now for now, _ in others]!r} now.",
                    fix="record the code again on these inputs",
                )
            )
        return listed

    def backward(self, ctx: Any, g: Sequence[Tensor | None]) -> list[Any]:
        """The function's own backward: for each argument a gradient or None.

        Args:
            ctx: the context that its forward has written to.
            g: for each result its gradient; None for one that the loss does not reach.

        Raises:
            RuntimeError: where torch refuses what it returned.
        """
        pairs = zip(g, self.outputs, strict=True)
        filled = [_zeros(value) if each is None and ctx._materialize else each for each, value in pairs]
        returned = ctx.apply(*filled)
        found = list(returned) if isinstance(returned, tuple) else [returned]
        while len(found) > len(self.needs) and found[-1] is None:
            found.pop()
        if len(found) != len(self.needs):
            raise RuntimeError(
                f"its backward returned {len(found)} gradients, and its forward takes {len(self.needs)} arguments"
            )
        self.missing = frozenset(i for i, each in enumerate(found) if each is None)
        return found


def _zeros(value: Any) -> Tensor | None:
    if not isinstance(value, Value):
        return None
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)


class Run(Hidden):
    """One call as it was recorded: the `Call`, and the context with all that the function left there."""

    def __init__(self, call: Call, ctx: Any) -> None:
        self.call = call
        self.ctx = ctx
        self.own: list[tuple[str, Tensor]] = []  # the attributes of the context that are results: in the end, aliases
        self.values: list[Value] = []  # what those hold


def call_in(args: Sequence[Any]) -> Call:
    """The call of which the arguments of a node tell."""
    last = args[-1]
    found: Call = last.call if isinstance(last, Run) else last
    return found


def by_input(found: list[Any], args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Gradients by argument as gradients by input: tensors inside a list have none, as in torch."""
    by_input: list[Tensor | None] = []
    for i, (each, argument) in enumerate(zip(found, args[:-1], strict=True)):
        if isinstance(argument, (list, tuple)):
            by_input += [None] * len(list(values_in(argument)))
        elif isinstance(argument, Value):
            by_input.append(each)
        elif each is not None:
            raise RuntimeError(f"its backward returned a gradient for argument {i}, which is not a tensor")
    return tuple(by_input)


def values_in(argument: Any) -> Iterator[Value]:
    """The values in an argument, also inside tuples and lists, in order."""
    if isinstance(argument, Value):
        yield argument
    elif type(argument) in (list, tuple):
        for each in argument:
            yield from values_in(each)


# -- gradients that go past the tape -------------------------------------------------------------------------


class _Inside(threading.local):
    """The function whose backward this thread is running, if it is running one."""

    title = ""


_inside = _Inside()
_lock = threading.Lock()
_running = 0
_plain_backward: Callable[..., Any] = torch.autograd.backward


@contextmanager
def no_gradient_lost(title: str) -> Iterator[None]:
    """A context in which torch's own backward is watched: what it leaves in ``.grad`` no sweep finds."""
    global _running
    before, _inside.title = _inside.title, title
    with _lock:
        _running += 1
        torch.autograd.backward = _watched
    try:
        yield
    finally:
        _inside.title = before
        with _lock:
            _running -= 1
            if not _running:
                torch.autograd.backward = _plain_backward


def _watched(tensors: Any, *args: Any, **kwargs: Any) -> None:
    if _inside.title:
        for leaf in leaves_of(tensors):
            held = bound(leaf)
            if isinstance(leaf, torch.nn.Parameter) or (held is not None and held.leaf):
                raise NotRecordedError(
                    message(
                        f"the backward of {_inside.title} calls torch.autograd.backward, by which the gradient of a "
                        "tensor that is not among its arguments goes to .grad: the sweep would not have it.",
                        where=call_site(user_frame()),
                        operands=[("tensor", describe(leaf))],
                        fix="give it to the function as an argument, and return its gradient",
                    )
                )
    _plain_backward(tensors, *args, **kwargs)


def leaves_of(tensors: Any) -> Iterator[Tensor]:
    """The tensors on which torch's own backward from `tensors` would leave a gradient."""
    stack = [tensor.grad_fn for tensor in tensors_in(tensors) if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                stack.append(before)
