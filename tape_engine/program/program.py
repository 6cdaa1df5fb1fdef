"""`Program`: a tape that was frozen, to be run again on other inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import DTypeError, InputError, MissingRuleError, ShapeError, message
from ..names import call_site, local_name, user_frame
from ..recorder import forget_leaves, quietly
from ..tape import Tape, describe, on_freeze
from .backends import python
from .data import Frozen
from .frozen import freeze_nodes

__all__ = ["Program", "freeze"]

Tensor = torch.Tensor

BACKENDS = ("auto", "python")


class Program:
    """A frozen tape. Calling it replays the forward pass, `step` replays the sweep as well.

    Every tensor that the tape read and that is not an input is a live reference: it is read anew on
    every replay, so that an update of the parameters needs nothing more. Replaying from several
    threads is safe: each replay that runs has buffers of its own.

    Attributes:
        tape: the tape that was frozen.
        params: the live tensors, by name.
    """

    def __init__(self, tape: Tape, frozen: Frozen, *, copy: bool) -> None:
        self.tape = tape
        self._frozen = frozen
        self._copy = copy
        self._forward = _Function(frozen, with_sweep=False)
        self._step = _Function(frozen, with_sweep=True)
        self._specs = [_Spec(frozen, i) for i in range(len(frozen.given))]
        self._live = [(value, tensor) for value, tensor in frozen.live.items() if value.leaf]

    # -- what a user calls -------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor) -> Any:
        """Replays the forward pass on `inputs`; returns the outputs, which belong to the caller.

        Raises:
            InputError: naming every input (and live tensor) whose shape, dtype or device differs.
            GuardError: where a decision of the recorded code comes out differently.
        """
        self._check(inputs)
        with quietly(), torch.no_grad(), self._forward.borrowed(self._copy) as run:
            outputs, _ = run(*inputs)
        return outputs[0] if self._frozen.single else outputs

    def step(self, *inputs: Tensor, seed: Tensor | None = None, accumulate: bool = False) -> Any:
        """Replays the forward pass and the sweep; returns the outputs, and writes ``.g`` on the `wrt` values.

        Args:
            inputs: as many as were frozen, of the recorded shapes, dtypes and devices.
            seed: the gradient of the loss with respect to the first output; one by default.
            accumulate: adds to the ``.g`` that is there.

        Raises:
            ShapeError: if the first output has several elements and no seed, or the seed another shape.
            InputError, GuardError: as calling the program. Whatever is raised, no ``.g`` has changed.
        """
        self._check(inputs)
        if not self._frozen.gradients:
            raise MissingRuleError(
                message(
                    "program.step: the output depends on no value that could have a gradient.",
                    where=call_site(user_frame()),
                    fix="call the program itself: program(...)",
                )
            )
        with quietly(), torch.no_grad():
            seed = self._seed(seed)
            with self._step.borrowed(self._copy) as run:
                outputs, gradients = run(*inputs, seed)
            targets = [inputs[t] if isinstance(t, int) else t for t, _ in self._frozen.gradients]
            if accumulate:
                olds = [getattr(tensor, "g", None) for tensor in targets]
                gradients = [g if old is None else old + g for old, g in zip(olds, gradients, strict=True)]
            for tensor, g in zip(targets, gradients, strict=True):
                tensor.g = g  # type: ignore[attr-defined]
        return outputs[0] if self._frozen.single else outputs

    @property
    def code(self) -> str:
        """The source of the replay: the forward pass with the sweep."""
        return (self._step if self._frozen.gradients else self._forward).source.text

    @property
    def params(self) -> dict[str, Tensor]:
        """The live tensors, by name."""
        names = self._frozen.names
        return {names.get(id(value)) or value.name or f"live{i}": t for i, (value, t) in enumerate(self._live)}

    def __str__(self) -> str:
        frozen = self._frozen
        source = (self._step if frozen.gradients else self._forward).source
        kept = sum(value.nbytes for value in source.buffers.values())
        rows = [("input", spec.name, spec.text) for spec in self._specs]
        rows += [("live", name, describe(tensor)) for name, tensor in self.params.items()]
        rows += [("output", frozen.names.get(id(v)) or "output", describe(v)) for v in frozen.outputs]
        rows += [(".g", spec_name(frozen, target), describe(g)) for target, g in frozen.gradients]
        lines = [f"  {kind:<6}  {name:<12}  {text}" for kind, name, text in rows]
        head = (
            f"program: {len(frozen.forward)} operations forward, {len(frozen.backward)} in the sweep; "
            f"backend python; {len(source.buffers)} kept buffers, {kept:,} bytes"
        )
        return "\n".join([head, *lines])

    def __repr__(self) -> str:
        return f"<program of {len(self._frozen.forward)} operations forward, {len(self._frozen.backward)} in the sweep>"

    # -- what is given -----------------------------------------------------------------------------------

    def _check(self, inputs: Sequence[Any]) -> None:
        """Refuses inputs (or live tensors) that are not as recorded, naming all that differ."""
        specs = self._specs
        if len(inputs) == len(specs):
            for tensor, spec in zip(inputs, specs, strict=True):
                if not spec.fits(tensor):
                    break
            else:
                for value, tensor in self._live:
                    if tensor.shape != value.shape or tensor.dtype != value.dtype:
                        break
                else:
                    return
        self._refuse(inputs)

    def _refuse(self, inputs: Sequence[Any]) -> None:
        specs = self._specs
        if len(inputs) != len(specs):
            what = f"the program takes {len(specs)} inputs ({', '.join(s.name for s in specs)}), not {len(inputs)}."
            raise InputError(message(what, where=call_site(user_frame())))
        rows = [
            (spec.name, f"recorded {spec.text}, given {_described(tensor)}")
            for tensor, spec in zip(inputs, specs, strict=True)
            if not spec.fits(tensor)
        ]
        rows += [
            (name, f"recorded {describe(value)}, now {describe(tensor)}")
            for (name, tensor), (value, _) in zip(self.params.items(), self._live, strict=True)
            if tensor.shape != value.shape or tensor.dtype != value.dtype
        ]
        raise InputError(
            message(
                f"{len(rows)} {'tensor does' if len(rows) == 1 else 'tensors do'} not fit what was recorded.",
                where=call_site(user_frame()),
                operands=rows,
                fix="give inputs of the recorded shape, dtype and device, or record again on these",
            )
        )

    def _seed(self, seed: Tensor | None) -> Tensor:
        wanted = self._frozen.seed
        name = self._frozen.names.get(id(self._frozen.outputs[0])) or "the output"
        if seed is None:
            if wanted.numel() != 1:
                raise ShapeError(
                    message(
                        f"program.step: {name} has {wanted.numel()} elements; its gradient needs a seed of its shape.",
                        where=call_site(user_frame()),
                        operands=[(name, describe(wanted))],
                        fix=f"program.step(..., seed=torch.ones({tuple(wanted.shape)}))",
                    )
                )
            return self._step.one
        if not isinstance(seed, Tensor):
            raise DTypeError(
                message(f"the seed must be a tensor, not {type(seed).__name__}.", where=call_site(user_frame()))
            )
        if seed.shape != wanted.shape:
            raise ShapeError(
                message(
                    f"program.step: the seed has another shape than {name}.",
                    where=call_site(user_frame()),
                    operands=[(name, describe(wanted)), ("seed", describe(seed))],
                    fix=f"give a seed of shape {tuple(wanted.shape)}",
                )
            )
        return seed.to(wanted.device, wanted.dtype)


def spec_name(frozen: Frozen, target: int | Tensor) -> str:
    """How messages call a tensor that gets ``.g``."""
    if isinstance(target, int):
        value = frozen.inputs[target]
    else:
        value = next((v for v, tensor in frozen.live.items() if tensor is target), None)
    return (frozen.names.get(id(value)) if value is not None else None) or "value"


class _Spec:
    """What an input must be."""

    def __init__(self, frozen: Frozen, i: int) -> None:
        given = frozen.given[i]
        value = frozen.inputs[i]
        self.shape, self.dtype, self.device = given.shape, given.dtype, given.device
        self.name = (frozen.names.get(id(value)) if value is not None else None) or f"input {i}"
        self.text = describe(given)

    def fits(self, tensor: Any) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.shape == self.shape
            and tensor.dtype == self.dtype
            and tensor.device == self.device
        )


def _described(given: Any) -> str:
    return describe(given) if isinstance(given, Tensor) else f"{type(given).__name__}, not a tensor"


class _Function:
    """A generated function in as many copies as replays run at once."""

    def __init__(self, frozen: Frozen, *, with_sweep: bool) -> None:
        self._frozen = frozen
        self._with_sweep = with_sweep
        self._source: python.Source | None = None
        self._idle: list[Callable[..., Any]] = []
        self._lock = threading.Lock()
        self._one: Tensor | None = None

    @property
    def source(self) -> python.Source:
        """The generated source; made at its first use."""
        with self._lock:
            if self._source is None:
                with quietly(), torch.no_grad():
                    self._source = python.generate(self._frozen, with_sweep=self._with_sweep)
            return self._source

    @property
    def one(self) -> Tensor:
        """The seed of a sweep from one element."""
        if self._one is None:
            seed = self._frozen.seed
            self._one = torch.ones(seed.shape, dtype=seed.dtype, device=seed.device)
        return self._one

    @contextmanager
    def borrowed(self, copy: bool) -> Iterator[Callable[..., Any]]:
        """A copy of the function that no other replay uses meanwhile."""
        try:
            run = self._idle.pop()  # atomic: no two threads get the same
        except IndexError:
            run = self.source.function(copy=copy)
        try:
            yield run
        finally:
            self._idle.append(run)


def freeze(
    tape: Tape,
    inputs: Tensor | Sequence[Tensor] = (),
    outputs: Any = None,
    wrt: Any = None,
    backend: str = "auto",
    *,
    copy: bool = True,
) -> Program:
    """Freezes a tape into a program.

    Args:
        tape: a recorded tape.
        inputs: the tensors that a replay is given anew, in order; the other ones that the tape read are
            live references.
        outputs: a tensor or a tuple of tensors of the tape, to return.
        wrt: the tensors on which `Program.step` writes ``.g``; by default every leaf that has one.
        backend: ``"auto"`` or ``"python"``.
        copy: results belong to the caller. With ``copy=False`` a replay may write over what an earlier
            one returned, ``.g`` included.

    Raises:
        DTypeError: for an argument of another type.
        NotRecordedError: for an output that is not on the tape, or an input that was computed on it.
    """
    if backend not in BACKENDS:
        raise DTypeError(
            message(
                f"tape.program: backend is one of {', '.join(BACKENDS)}: not {backend!r}.",
                where=call_site(user_frame()),
            )
        )
    single = isinstance(outputs, Tensor)
    wanted = [outputs] if single else list(outputs) if isinstance(outputs, (tuple, list)) else []
    if not wanted:
        raise DTypeError(
            message(
                "tape.program: outputs takes a tensor of the tape or a tuple of them.",
                where=call_site(user_frame()),
                fix="tape.program(inputs=(X, Y), outputs=C)",
            )
        )
    given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    with quietly():
        frozen = freeze_nodes(tape, given, wanted, wrt, single=single)
        forget_leaves(tape.token)
    for i, (value, tensor) in enumerate(zip(frozen.inputs, frozen.given, strict=True)):
        if value is not None:
            frozen.names.setdefault(id(value), local_name(user_frame(), tensor) or f"input{i}")
    return Program(tape, frozen, copy=copy)


on_freeze(freeze)
