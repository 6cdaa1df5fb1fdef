"""The one table of operations: what each is called, computes, and how its gradient is taken.

An `Op` is an operation's single record. Named operations are made of a function with `op`; the
operations of torch itself are entered under their ATen overload with `rule`::

    @op
    def scale(x, factor):
        return x * factor

    @scale.rule
    def scale_grad(g, out, x, factor):
        return g * factor

    @rule(torch.ops.aten.flip.default, samples=[sample(spec(3, 4), [0])])
    def flip_grad(g, out, x, dims):
        return g.flip(dims)

A rule is a vector-Jacobian product: it takes ``g`` (the gradient of the loss with respect to the
output; a tuple where the operation has several outputs, ``None`` for an output that the loss does
not reach), the output, then the operation's own arguments, and returns one gradient for each tensor
argument, in order, ``None`` for one that is not differentiable. Which arguments' data a rule reads
is told from its code (`reads`), and only those are kept for the sweep: for an argument of which it
reads no more than ``shape``, ``dtype`` and the like, it is given that description alone.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from .errors import DTypeError, MissingRuleError, RuleError, message

__all__ = [
    "Absent",
    "Op",
    "Sample",
    "Spec",
    "composite",
    "declare",
    "find",
    "op",
    "ops",
    "reads",
    "records",
    "rule",
    "sample",
    "spec",
]

Rule = Callable[..., Any]

#: What a description of a value answers without its data: a rule that asks no more keeps no tensor.
DESCRIPTION = frozenset(
    "shape dtype device ndim size dim numel stride layout is_complex is_floating_point itemsize element_size".split()
)


# -- samples: the arguments with which an operation's rule is tested ------------------------------


@dataclass(frozen=True)
class Spec:
    """A tensor to be drawn for a sample: its shape, dtype, and where its elements may lie.

    ``values`` gives the elements outright (for kinks and ties); otherwise they are drawn uniformly
    from ``low`` to ``high`` (integers for an integer dtype, for booleans a fair coin).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    low: float = -2.0
    high: float = 2.0
    values: tuple[float, ...] | None = None

    def draw(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """A new tensor of this description."""
        if self.values is not None:
            return torch.tensor(self.values, dtype=self.dtype).reshape(self.shape)
        if self.dtype == torch.bool:
            return torch.rand(self.shape, generator=generator) < 0.5
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            return torch.randint(int(self.low), int(self.high) + 1, self.shape, generator=generator, dtype=self.dtype)
        unit = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        real = self.low + (self.high - self.low) * unit
        if self.dtype.is_complex:
            unit = torch.rand(self.shape, generator=generator, dtype=torch.float64)
            return torch.complex(real, self.low + (self.high - self.low) * unit).to(self.dtype)
        return real.to(self.dtype)


@dataclass(frozen=True)
class Sample:
    """One call with which a rule is tested; tensors stand as `Spec`, also inside lists."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def spec(
    *shape: int,
    dtype: torch.dtype = torch.float64,
    low: float = -2.0,
    high: float = 2.0,
    values: Sequence[float] | None = None,
) -> Spec:
    """A tensor of a sample: ``spec(3, 4)``, ``spec(5, low=0.1, high=2.0)``, ``spec(2, values=[0.0, 1.0])``."""
    return Spec(tuple(shape), dtype, low, high, None if values is None else tuple(values))


def sample(*args: Any, **kwargs: Any) -> Sample:
    """A call of an operation with these arguments; write `spec` where a tensor stands."""
    return Sample(args, kwargs)


# -- an operation's record -------------------------------------------------------------------------


#: Where this package keeps its own rules.
_OURS = "tape_engine.rules."


class Op:
    """An operation's one record: name, forward, rule, samples, and what its rule reads.

    Attributes:
        name: how print, picture and messages call it (``lin``, ``mm``).
        forward: the function itself; for an operation of torch, its ATen overload.
        grad: its registered gradient rule, or ``None``.
        differentiable: false where it is declared that no gradient passes (``argmax``, ``eq``).
        broadcasts: whether the sweep may sum a gradient over broadcast dimensions; ``None`` lets it
            where the output's shape is what broadcasting the arguments gives.
        spent: gives what the rule gives, written where the gradient lies that it is given, which nobody needs any more;
            None where it cannot (`spends`).
        rule_is_ours: whether that is one of this package, which asks nothing of torch's autograd.
        saves: the names of the rule's parameters whose data it reads; ``None`` without a rule.
        outputs_read: of an operation with several outputs, those that its rule reads (``out[1]``); ``None`` for all.
        sized_by_elements: whether the shape of a result may depend on the arguments' elements (``nonzero``).
        samples: the calls with which its rule is tested.
        formula: what a picture writes inside its box.
    """

    rules_entered = 0  # of all operations, since the package was loaded

    def __init__(
        self,
        forward: Callable[..., Any],
        *,
        name: str,
        broadcasts: bool | None = None,
        samples: Iterable[Sample] = (),
        formula: str | None = None,
        check: Callable[..., None] | None = None,
    ) -> None:
        self.forward = forward
        self.name = name
        self.grad: Rule | None = None
        self.rule_is_ours = False
        self.spent: Callable[..., tuple[Any, ...] | None] | None = None
        self._differentiable = True
        self.broadcasts = broadcasts
        self.saves: frozenset[str] | None = None
        self.outputs_read: frozenset[int] | None = None
        self.rule_parameters: tuple[str, ...] = ()
        self.samples: tuple[Sample, ...] = tuple(samples)
        self.formula = formula
        self.check = check
        self.is_named = not isinstance(forward, torch._ops.OpOverload)
        self.sized_by_elements = torch.Tag.dynamic_output_shape in getattr(forward, "tags", ())
        self.signature = _signature(forward) if self.is_named else None
        self._note_reads()
        self.__name__ = name
        self.__doc__ = forward.__doc__
        self.__wrapped__ = forward

    @property
    def differentiable(self) -> bool:
        return self._differentiable

    @differentiable.setter
    def differentiable(self, does: bool) -> None:
        self._differentiable = does
        self._note_reads()

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the operation and records it as one node on the current tape."""
        return _call(self, args, kwargs)

    def rule(self, function: Rule) -> Rule:
        """Registers `function` as this operation's gradient rule; returns it unchanged."""
        return self._enter(function)

    def _enter(self, function: Rule) -> Rule:
        Op.rules_entered += 1
        if not callable(function):
            raise DTypeError(message(f"the rule of {self.name} must be a function, not {type(function).__name__}."))
        saves, names = reads(function)
        if names is not None and len(names) < 2:
            raise RuleError(
                message(
                    f"the rule {function.__name__} takes {len(names)} parameters; a rule takes g, the output, "
                    f"then the arguments of {self.name}.",
                    fix=f"def {function.__name__}(g, out, {', '.join(self.parameters) or '*args'}): ...",
                )
            )
        self.grad, self.saves, self.rule_parameters = function, saves, names or ()
        self.spent = None
        self.rule_is_ours = getattr(function, "__module__", "").startswith(_OURS)
        self.outputs_read = None if names is None else places_read(function, names[1])
        self.differentiable = True
        return function

    def reads_argument(self, key: int | str) -> bool:
        """Whether its rule reads the data of an argument, given by position or keyword.

        A borrowed rule reads every argument, a declared non-differentiable operation none.
        """
        if isinstance(key, str):
            return self._reads_all or key in (self.saves or ())
        return self._reads_all or (key < len(self.argument_reads) and self.argument_reads[key])

    def reads_places(self, count: int) -> Sequence[bool]:
        """`reads_argument` of the first `count` positions, and perhaps some more."""
        return (
            self.argument_reads if count <= len(self.argument_reads) else [self.reads_argument(i) for i in range(count)]
        )

    def reads_output_at(self, place: int, count: int) -> bool:
        """Whether its rule reads the data of the output at `place`, of `count`."""
        return self.reads_output and (self.outputs_read is None or count == 1 or place in self.outputs_read)

    def bare(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a node, as a program keeps them: without contents."""
        return args

    def _note_reads(self) -> None:
        """Works out what the rule reads once, as it is asked at every call."""
        saves, names = self.saves or frozenset(), self.rule_parameters
        self._reads_all = self.differentiable and (self.grad is None or not names)
        reads = [self._reads_all or (self.differentiable and name in saves) for name in names[2:]]
        spare = max(0, len(self.parameters) - len(reads))
        #: for each argument by position, whether its rule reads the data; of those beyond, it may read all
        self.argument_reads = (*reads, *[self._reads_all] * spare)
        #: whether its rule reads the data of its output
        self.reads_output = self.differentiable and self.grad is not None and (not names or names[1] in saves)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the operation's own arguments, in order."""
        if isinstance(self.forward, torch._ops.OpOverload):
            return tuple(argument.name for argument in self.forward._schema.arguments)
        if self.signature is None:
            return ()
        return tuple(self.signature.parameters)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in the operation's own order, defaults filled in (named operations only)."""
        if self.signature is None or (not kwargs and len(args) == len(self.signature.parameters)):
            return args, kwargs
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args, bound.kwargs


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature: taken as it is called
        return None


def reads(function: Rule) -> tuple[frozenset[str], tuple[str, ...] | None]:
    """The names of a rule's parameters whose data its code reads, and all its parameters in order.

    A parameter of which only the description is asked (``x.shape``, ``x.dtype``) is not among the
    first. What cannot be told from the bytecode counts as read. The second is ``None`` for a rule
    that takes ``*args`` or has no readable signature: then all of its arguments count as read.
    """
    signature = _signature(function)
    code = getattr(inspect.unwrap(function), "__code__", None)
    kinds = inspect.Parameter
    if (
        signature is None
        or code is None
        or any(p.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) for p in signature.parameters.values())
        or inspect.unwrap(function) is not function
    ):
        return frozenset(), None
    names = tuple(signature.parameters)
    read = set(code.co_cellvars) & set(names)
    instructions = list(dis.get_instructions(code))
    for here, after in zip(instructions, [*instructions[1:], None], strict=True):
        if "LOAD_FAST" not in here.opname:
            continue
        loaded = here.argval if isinstance(here.argval, tuple) else (here.argval,)
        described = (
            after is not None
            and after.opname in ("LOAD_ATTR", "LOAD_METHOD")
            and str(after.argval).split(" ")[-1] in DESCRIPTION
        )
        read.update(loaded[:-1] if described else loaded)
    return frozenset(read) & set(names), names


def places_read(function: Rule, name: str) -> frozenset[int] | None:
    """Of a parameter that is a tuple, the elements that a rule's code reads; ``None`` if it reads it otherwise.

    For ``g * out[1]`` that is ``{1}``.
    """
    code = inspect.unwrap(function).__code__
    if name in code.co_cellvars:
        return None
    found: set[int] = set()
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG")]
    for i, here in enumerate(instructions):
        if "LOAD_FAST" not in here.opname:
            continue
        loaded = here.argval if isinstance(here.argval, tuple) else (here.argval,)
        if name not in loaded:
            continue
        index, subscript = [*instructions[i + 1 : i + 3], None, None][:2]
        subscripted = (
            index is not None
            and subscript is not None
            and index.opname in ("LOAD_CONST", "LOAD_SMALL_INT")
            and type(index.argval) is int
            and index.argval >= 0
            and (subscript.opname == "BINARY_SUBSCR" or (subscript.opname, subscript.argrepr) == ("BINARY_OP", "[]"))
        )
        if name in loaded[:-1] or index is None or not subscripted:
            return None
        found.add(index.argval)
    return frozenset(found)


# -- the table -------------------------------------------------------------------------------------

_by_target: dict[Any, Op] = {}
_named: list[Op] = []


def _unset(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise RuntimeError("the recorder is not loaded")  # pragma: no cover - import tape_engine loads it


_call: Callable[[Op, tuple[Any, ...], dict[str, Any]], Any] = _unset


def on_call(handler: Callable[[Op, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """The recorder says here what calling an `Op` does; the table itself knows no tape."""
    global _call
    _call = handler


@overload
def op(forward: Callable[..., Any]) -> Op: ...
@overload
def op(
    forward: None = None,
    *,
    name: str | None = None,
    broadcasts: bool | None = None,
    samples: Iterable[Sample] = (),
    formula: str | None = None,
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Any]], Op]: ...
def op(
    forward: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    broadcasts: bool | None = None,
    samples: Iterable[Sample] = (),
    formula: str | None = None,
    check: Callable[..., None] | None = None,
) -> Op | Callable[[Callable[..., Any]], Op]:
    """Makes a named operation of a function: each call is one node, whatever its body does.

    Args:
        forward: a function of torch tensors (and other arguments) to one tensor or a tuple of them.
        name: how the operation is called; the function's own name by default.
        broadcasts: whether gradients may be summed over broadcast dimensions (see `Op`).
        samples: the calls with which its rule is tested (`te.check_rule` without arguments).
        formula: what a picture writes inside its box.
        check: called with the arguments before the operation runs, to refuse what does not fit.

    Raises:
        DTypeError: if `forward` is not callable.
    """

    def make(function: Callable[..., Any]) -> Op:
        if not callable(function):
            raise DTypeError(message(f"te.op makes an operation of a function, not of {type(function).__name__}."))
        title = name or str(getattr(function, "__name__", type(function).__name__))
        made = Op(function, name=title, broadcasts=broadcasts, samples=samples, formula=formula, check=check)
        _named.append(made)
        return made

    return make if forward is None else make(forward)


def rule(
    target: Any, *, samples: Iterable[Sample] = (), broadcasts: bool | None = None, formula: str | None = None
) -> Callable[[Rule], Rule]:
    """Registers a gradient rule for `target`, replacing the one it has.

    Args:
        target: a named operation, an ATen overload (``torch.ops.aten.flip.default``) or a torch
            function (``torch.flip``).
        samples: the calls with which the rule is tested.
        broadcasts: whether gradients may be summed over broadcast dimensions (see `Op`).
        formula: what a picture writes inside the operation's box.

    Raises:
        DTypeError: for a target that is none of these.
        MissingRuleError: for a torch function that runs as several operations, which have the rules.
    """

    def enter(function: Rule) -> Rule:
        for found in records(target):
            found._enter(function)
            found.samples = tuple(samples) or found.samples
            found.broadcasts = broadcasts if broadcasts is not None else found.broadcasts
            found.formula = formula or found.formula
        return function

    return enter


def spends(target: Any) -> Callable[[Rule], Rule]:
    """Registers how a rule's gradient may be written where the gradient lies that it is given.

    The function takes ``(needs, g, out, *args)``, where `needs` tells for each tensor argument whether its gradient is
    wanted. It returns what the rule returns, in the memory of `g`, or None where it must have other memory: then it
    has not written to it. It is asked where nobody else has `g`, and all numbers are real.
    """

    def enter(function: Rule) -> Rule:
        for found in records(target):
            found.spent = function
        return function

    return enter


def declare(*targets: Any) -> None:
    """Declares operations through which no gradient passes (comparisons, argmax, factories…)."""
    for target in targets:
        for found in records(target):
            found.differentiable = False


class Absent:
    """What stands for an overload that this release of torch lacks or runs as several others: it has no record."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name


def records(target: Any) -> list[Op]:
    """The records that a named operation, an ATen overload or a torch function stands for."""
    if isinstance(target, Op):
        return [target]
    if isinstance(target, Absent):
        return []
    if isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    else:
        packet = target if isinstance(target, torch._ops.OpOverloadPacket) else _packet(target)
        overloads = [getattr(packet, each) for each in packet.overloads()] if packet else []
    whole = [each for each in overloads if not composite(each)]
    if not isinstance(target, torch._ops.OpOverload):
        whole = [each for each in whole if not each._schema.is_mutable and not each._overloadname.endswith("out")]
    if not whole:
        title = getattr(target, "__name__", str(target))
        raise MissingRuleError(
            message(
                f"{title} runs as several operations, and it is those that have the rules.",
                fix=f"record it and look at print(tape), or make one operation of it: te.op({title})",
            )
        )
    return [find(each) for each in whole]


def _packet(target: Any) -> Any:
    """The ATen operation behind a function of torch; ``None`` for one that has none of its name."""
    name = getattr(target, "__name__", "")
    owners = (torch, torch.Tensor, torch.nn.functional, torch.special, torch.linalg, torch.fft, torch._C._nn)
    if not name or not any(
        getattr(owner, each, None) is target for owner in owners for each in (name, name.partition("_")[2])
    ):
        raise DTypeError(
            message(
                f"{target!r} is not an operation: a rule is registered for a named operation, an ATen overload "
                "or a torch function.",
                fix="te.rule(torch.ops.aten.flip.default); of a function of your own te.op makes an operation",
            )
        )
    return getattr(torch.ops.aten, name, None)


def composite(overload: torch._ops.OpOverload) -> bool:
    """Whether torch runs an overload as several others; also for those that only TorchScript has."""
    try:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(overload._name, "CPU")
        return overload._can_decompose() and not has_kernel
    except RuntimeError:
        return True


def find(target: torch._ops.OpOverload) -> Op:
    """The record of an ATen overload; made at its first use."""
    found = _by_target.get(target)
    if found is None:
        name = target._schema.name.removeprefix("aten::").replace("::", ".")
        found = _by_target[target] = Op(target, name=name)
    return found


def ops() -> list[Op]:
    """Every operation on the table: the named ones, then those of torch, in order of entry."""
    return [*_named, *_by_target.values()]
