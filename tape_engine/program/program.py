"""`Program`: a tape that was frozen, to be run again on other inputs."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from ..errors import BackendError, DTypeError, MissingRuleError, message
from ..names import call_site, user_frame
from ..recorder import is_quiet, quietly, rest_leaves
from ..tape import Tape, Value, bind, describe, on_freeze
from .again import is_heard, run_recorded
from .backends import cudagraph, native
from .bare import let_go
from .collecting import Uncollected
from .data import STEPPED, Frozen
from .file import path_of, write, written
from .frozen import freeze_nodes
from .function import Function
from .given import Given
from .guards import streams_of
from .profile import Profile
from .profiling import profiled

__all__ = ["Program", "freeze"]

Tensor = torch.Tensor

BACKENDS = ("auto", "python", "native", "inductor", "cudagraph")


class Program:
    """A frozen tape. Calling it replays the forward pass, `step` replays the sweep as well.

    Every tensor that the tape read and that is not an input is a live reference: it is read anew on
    every replay, so that an update of the parameters needs nothing more. Replaying from several
    threads is safe: each replay that runs has buffers of its own.

    Attributes:
        tape: what was recorded, without contents: a program keeps no tensors but the live ones.
        params: the live tensors, by name.
    """

    def __init__(
        self,
        tape: Tape,
        frozen: Frozen,
        *,
        copy: bool,
        backend: str = "auto",
        shared: list[tuple[int, int, int]] | None = None,
    ) -> None:
        self.tape = frozen.tape
        self._frozen = frozen
        self._copy = copy
        self._marked = tape.token.marked  # the leaves that listen on behalf of the tape; empty once it is gone
        self._given = Given(frozen, shared)
        self._streams = streams_of(frozen)
        self._forward = Function(frozen, with_sweep=False, copy=copy, backend=backend)
        self._step = Function(frozen, with_sweep=True, copy=copy, backend=backend)

    # -- what a user calls -------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor) -> Any:
        """Replays the forward pass on `inputs`; returns the outputs, which belong to the caller.

        Inside a recording the replay is recorded as well, so that gradients pass through it.

        Raises:
            InputError: naming every input (and live tensor) whose shape, dtype or device differs.
            GuardError: where a decision of the recorded code comes out differently.
        """
        given = self._given
        heard = not is_quiet()
        with _Apart():
            given.check(inputs)
            recorded = heard and is_heard(inputs, given.live, self._marked)
            if not recorded:
                with self._streams:
                    outputs, _ = self._forward(*inputs)
                given.forget_written(inputs)
        if recorded:
            with self._streams:
                outputs = run_recorded(self._frozen, inputs)
        return outputs[0] if self._frozen.single else outputs

    def step(self, *inputs: Tensor, seed: Tensor | None = None, accumulate: bool = False) -> Any:
        """Replays the forward pass and the sweep; returns the outputs, and writes ``.g`` on the `wrt` values.

        A tensor that stands in several places, as two inputs or as an input and a parameter, gets the sum.

        Args:
            inputs: as many as were frozen, of the recorded shapes, dtypes and devices.
            seed: the gradient of the loss with respect to the first output; one by default. (Random operations draw
                from torch's generators: ``torch.manual_seed`` before a replay repeats it.)
            accumulate: adds to the ``.g`` that is there.

        Raises:
            ShapeError: if the first output has several elements and no seed, the seed another shape, or a ``.g``
                that is to be added to another one than its tensor.
            InputError, GuardError: as calling the program. Whatever is raised, no ``.g`` has changed.
        """
        frozen, given = self._frozen, self._given
        heard = not is_quiet()
        with _Apart():
            given.check(inputs, "program.step")
            if not frozen.gradients and not (frozen.unreached and frozen.outputs[0].differentiable):
                raise MissingRuleError(
                    message(
                        "program.step: the output depends on no value that could have a gradient.",
                        where=call_site(user_frame()),
                        fix="call the program itself: program(...)",
                    )
                )
            targets = self.targets(inputs)
            seed = given.seed(seed, self._step.one)
            olds = given.olds(targets) if accumulate else None
            if olds is not None and not self._copy:  # the replay writes where they lie
                olds = [None if old is None else old.clone() for old in olds]
            with self._streams:
                outputs, gradients = self._step(*inputs, seed)
            given.forget_written(inputs)
            _write(targets, gradients, olds)
            for target in () if accumulate else frozen.unreached:
                vars(inputs[target] if isinstance(target, int) else target).pop("g", None)
            recorded = heard and is_heard(inputs, given.live, self._marked)
        if recorded:
            for made in (*outputs, *gradients):
                value = Value(made)
                value.closed = STEPPED
                bind(made, value, None)
        return outputs[0] if frozen.single else outputs

    def profile(self, *inputs: Tensor, seed: Tensor | None = None, sweep: bool = True, repeats: int = 10) -> Profile:
        """Times a replay on `inputs`, operation by operation: `print` shows a table, ``.rows`` is the data.

        What is timed is the replay's own function, with a clock between its lines. It leaves nothing behind: no ``.g``
        is written, live tensors, running statistics and inputs keep their contents, random streams stand where they
        stood. (Named operations that a replay calls as a whole do what they do.) Inside a recording nothing of it is
        recorded.

        Args:
            inputs: as `step` takes them.
            seed: likewise.
            sweep: whether the sweep runs as well; a program that has none is timed forward.
            repeats: how often it is run; times are medians.

        Raises:
            InputError, GuardError, ShapeError, DTypeError: as `step`; DTypeError for `repeats` below 1.
        """
        frozen, given = self._frozen, self._given
        if type(repeats) is not int or repeats < 1:
            what = f"program.profile: repeats is how often the program is run, 1 or more: not {repeats!r}."
            raise DTypeError(message(what, where=call_site(user_frame()), fix="repeats=10"))
        function = self._step if sweep and frozen.gradients else self._forward
        with quietly(), torch.inference_mode(False), torch.no_grad():
            given.check(inputs, "program.profile")
            start = given.seed(seed, function.one, "program.profile") if function is self._step else None
            without = torch.autocast(function.device, enabled=False)
            source = function.source
            with without:
                return profiled(
                    frozen, source, inputs, start, lambda: given.check(inputs), backend=function.backend, runs=repeats
                )

    def targets(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on which a step on `inputs` writes ``.g``, in order."""
        return [inputs[t] if isinstance(t, int) else t for t, _ in self._frozen.gradients]

    @property
    def code(self) -> str:
        """The source of the replay: the forward pass with the sweep."""
        return (self._step if self._frozen.gradients else self._forward).source.text

    @property
    def params(self) -> dict[str, Tensor]:
        """The live tensors, by name."""
        return {self._frozen.title(v) or f"live{i}": tensor for i, (v, tensor) in enumerate(self._given.live)}

    @property
    def wrt(self) -> dict[str, Tensor]:
        """The tensors that get ``.g`` and are no inputs, by name: parameters, and recorded tensors of ``wrt=``."""
        return {self._title(t): t for t, _ in self._frozen.gradients if not isinstance(t, int)}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the program to a file, with the live tensors as they are now; `te.load` reads it.

        The file is a safetensors file (the package is needed: ``pip install 'tape-engine[files]'``). It is written
        beside `path` and takes its place when it is whole, so that no half-written file is ever there.

        Raises:
            SaveError: for what a file cannot hold: Python code (``torch.autograd.Function``), objects as arguments,
                tensors that are not strided. It names the line.
            PathError: for a folder that is not there, or a file that cannot be written.
            DTypeError: for what is no path.
        """
        target = path_of(path, "program.save")
        with quietly(), torch.inference_mode(False), torch.no_grad():
            made = written(self._frozen, copy=self._copy, shared=self._given.shared)
            write(target, made.header, made.payload)

    def __str__(self) -> str:
        frozen = self._frozen
        function = self._step if frozen.gradients else self._forward
        source = function.source
        rows = [("input", name, describe(given)) for name, given in zip(frozen.titles, frozen.given, strict=True)]
        rows += [("live", name, describe(tensor)) for name, tensor in self.params.items()]
        rows += [("output", frozen.names.get(id(v)) or "output", describe(v)) for v in frozen.outputs]
        rows += [(".g", self._title(target), describe(g)) for target, g in frozen.gradients]
        lines = [f"  {kind:<6}  {name:<12}  {text}" for kind, name, text in rows]
        head = (
            f"program: {len(frozen.forward)} operations forward, {len(frozen.backward)} in the sweep; "
            f"backend {function.backend}; {len(source.buffers)} kept buffers in {source.kept:,} bytes"
        )
        plan = [f"  {function.plan}"] if function.plan else []
        if source.again.values:
            many = len(source.again.values)
            plan.append(f"  {many} values are computed again in the sweep: {source.again.spared:,} bytes less are held")
        return "\n".join([head, *plan, *lines])

    def _title(self, target: int | Tensor) -> str:
        """How messages call a tensor that gets ``.g``."""
        if isinstance(target, int):
            return self._frozen.titles[target]
        values = (v for node in self._frozen.nodes for v in (*node.inputs, *node.outputs))
        found = next((v for v in values if v.holder is target), None)
        return (found is not None and self._frozen.title(found)) or "value"

    def __repr__(self) -> str:
        return f"<program of {len(self._frozen.forward)} operations forward, {len(self._frozen.backward)} in the sweep>"


class _Apart(quietly):
    """A context in which nothing is recorded and torch builds no graph: `torch.no_grad` at a third of its cost."""

    def __enter__(self) -> None:
        quietly.__enter__(self)
        self.grad = torch.is_grad_enabled()
        if self.grad:
            torch._C._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        if self.grad:
            torch._C._set_grad_enabled(True)
        quietly.__exit__(self)


def _write(targets: Sequence[Tensor], gradients: Sequence[Tensor], olds: Sequence[Tensor | None] | None) -> None:
    """Leaves its gradient on each target, the sum on one that stands in several places, added to the old one."""
    written: dict[int, Tensor] = {}
    for i, (tensor, g) in enumerate(zip(targets, gradients, strict=True)):
        before = written.get(id(tensor))
        if before is not None:
            before.add_(g)
            continue
        old = None if olds is None else olds[i]
        written[id(tensor)] = tensor.g = g if old is None else g.add_(old)  # type: ignore[attr-defined]


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
        backend: ``"python"``: calls of torch; ``"native"``: compiled loops, on the CPU, for what they are good at;
            ``"inductor"``: torch's own compiler; ``"cudagraph"``: on a GPU, the whole step as one CUDA graph;
            ``"auto"``: native where llvmlite is installed and it pays, a CUDA graph where the program can be captured,
            otherwise python. `print(program)` tells which it is.
        copy: results belong to the caller. With ``copy=False`` a replay may write over what an earlier
            one returned, ``.g`` included; such a result must not be given as an input then.

    Raises:
        DTypeError: for an argument of another type.
        NotRecordedError: for an output that is not on the tape, an input that was computed on it, or a tensor
            whose change between two readings the tape does not hold.
        ShapeError: for an input that is given twice.
        BackendError: for a backend that there is not, that needs what is not installed, or that cannot run this
            program, with the line that stands in its way.
    """
    if backend not in BACKENDS:
        raise _no_backend(
            f"backend is one of {', '.join(BACKENDS)}: not {backend!r}.",
            'leave it out: backend="auto" takes the quickest that can run the tape',
        )
    if backend == "native" and not native.available():
        raise _no_backend(
            "the native backend needs llvmlite, which is not installed.",
            "pip install llvmlite, or backend='auto', which does without",
        )
    given = _tensors(inputs, "inputs", "the tensors that a replay is given anew")
    wanted = _tensors(outputs, "outputs", "a tensor of the tape or a tuple of them")
    if not wanted:
        raise DTypeError(
            message(
                "tape.program: outputs takes a tensor of the tape or a tuple of them.",
                where=call_site(user_frame()),
                fix="tape.program(inputs=(X, Y), outputs=C)",
            )
        )
    targets = None if wrt is None else _tensors(wrt, "wrt", "tensors")
    with quietly(), Uncollected():
        frozen = freeze_nodes(tape, given, wanted, targets, single=isinstance(outputs, Tensor))
        _check_backend(backend, frozen)
        program = Program(tape, frozen, copy=copy, backend=backend)
        let_go(frozen)
        if tape.strong:
            tape.frozen = tape.length
            rest_leaves(tape.token)
        return program


def _check_backend(backend: str, frozen: Frozen) -> None:
    """Refuses a backend that was asked for by name, and cannot run this program on this machine."""
    device = frozen.seed.device
    if backend == "inductor":
        from .backends import inductor

        lacking = inductor.missing(device)
        if lacking is not None:
            raise _no_backend(f"the inductor backend needs {lacking[0]}.", f"{lacking[1]}, or backend='auto'")
    if backend == "cudagraph":
        if device.type != cudagraph.DEVICE:
            what = f"the cudagraph backend runs on a GPU, and this program on {device}."
            raise _no_backend(what, "record on a GPU, or backend='auto'")
        why = cudagraph.refusal(frozen, with_sweep=True)
        if why is not None:
            raise _no_backend(f"the program cannot be captured as a CUDA graph: {why[0]}.", "backend='auto'", why[1])


def _no_backend(what: str, fix: str, where: str | None = None) -> BackendError:
    return BackendError(message(f"tape.program: {what}", where=where or call_site(user_frame()), fix=fix))


def _tensors(argument: Any, name: str, wanted: str) -> list[Tensor]:
    """The tensors of an argument that is one, or a tuple or list of them."""
    if isinstance(argument, Tensor):
        return [argument]
    listed = isinstance(argument, (tuple, list))
    wrong = next((each for each in argument if not isinstance(each, Tensor)), None) if listed else argument
    if not listed or wrong is not None:
        raise DTypeError(
            message(
                f"tape.program: {name} takes {wanted}, not {type(wrong).__name__}.",
                where=call_site(user_frame()),
                fix="tape.program(inputs=(X, Y), outputs=C, wrt=[w])",
            )
        )
    return list(argument)


on_freeze(freeze)
