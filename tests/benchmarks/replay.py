"""What a replay takes, by every backend that is there: tiny operations, a sampler's gradient, the first result."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import tape_engine as te
from tape_engine.program.backends import native

from .others import JAX, TORCH_COMPILE, by_jax, by_torch_compile, has_compiler, has_jax
from .timing import Case, Table, Timing, measure

__all__ = ["BACKENDS", "first_result", "growth", "posterior", "replays", "tiny"]

Tensor = torch.Tensor

BACKENDS = ("python", "native") if native.available() else ("python",)
ROOT = Path(__file__).parents[2]


def replays(
    made: Callable[[str], te.Program], inputs: Sequence[Tensor], *, number: int = 1, units: int = 1,
    then: Callable[[], object] = lambda: None,
) -> list[Case]:  # fmt: skip
    """A case for each backend; `made` gives its program, `then` is done after each step."""

    def case(backend: str) -> Case:
        program = made(backend)

        def run() -> object:
            program.step(*inputs)
            return then()

        return Case(f"tape_engine, replay ({backend})", run, number=number, units=units)

    return [case(backend) for backend in BACKENDS]


def tiny(
    count: int, rounds: int, *, products: bool = False, others: bool = False,
    on_run: Callable[[str], None] = lambda _: None,
) -> Table:  # fmt: skip
    """`count` operations on 8 x 8 elements, forward and back; with `products` a third of them are of matrices.

    With `others` too: for a few hundred operations, that is (JAX had not compiled 3,000 after ten minutes).
    """
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator) / 3
    leaves = [each.clone().requires_grad_() for each in (x, w)]

    def function(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(count // (3 if products else 2)):
            x = torch.tanh(x @ w) * w if products else torch.tanh(x * w)
        return x.sum()

    def program(backend: str) -> te.Program:
        with te.record() as tape:
            C = function(x, w)
        made: te.Program = tape.program(inputs=(x,), outputs=C, wrt=(x, w), backend=backend)
        return made

    cases = [
        Case("torch.autograd, eager", lambda: torch.autograd.grad(function(*leaves), leaves), units=count),
        *replays(program, [x], number=5, units=count),
    ]
    if others:

        def by_numpy(x: Any, w: Any) -> Any:
            import jax

            for _ in range(count // (3 if products else 2)):
                x = jax.numpy.tanh(x @ w) * w if products else jax.numpy.tanh(x * w)
            return x.sum()

        expected = torch.autograd.grad(function(*leaves), leaves)
        cases += by_torch_compile(function, (x, w), expected, number=5, units=count)
        cases += by_jax(by_numpy, (x, w), expected, number=5, units=count)
    what = "products and element-wise" if products else "element-wise"
    title = f"{count:,} tiny operations ({what}, 8 x 8), forward and back, for each of them"
    return measure(title, cases, rounds, unit="operation", on_run=on_run)


def posterior(rows: int, rounds: int, *, others: bool = False, on_run: Callable[[str], None] = lambda _: None) -> Table:
    """The gradient of a log posterior, as a sampler calls it: logistic regression, 8 groups, 5 features, float64."""
    generator = torch.Generator().manual_seed(0)
    kind = {"dtype": torch.float64, "generator": generator}
    features = torch.randn(rows, 5, **kind)  # type: ignore[call-overload]
    group = torch.randint(0, 8, (rows,), generator=generator)
    outcome = torch.rand(rows, **kind).round()  # type: ignore[call-overload]
    mean, log_scale = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    offset, slope = (torch.randn(n, **kind) for n in (8, 5))  # type: ignore[call-overload]
    given = (mean, log_scale, offset, slope)
    leaves = [each.clone().requires_grad_() for each in given]

    def log_posterior(mean: Tensor, log_scale: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
        of_group = mean + log_scale.exp() * offset
        logit = of_group[group] + features @ slope
        likelihood = (outcome * logit - F.softplus(logit)).sum()
        prior = 0.5 * (offset**2).sum() + 0.5 * (slope / 2.5).pow(2).sum() + 0.5 * mean**2 + 0.5 * log_scale**2
        found: Tensor = likelihood - prior
        return found

    def program(backend: str) -> te.Program:
        with te.record() as tape:
            C = log_posterior(*given)
        made: te.Program = tape.program(inputs=given, outputs=C, wrt=given, backend=backend)
        return made

    cases = [
        Case("torch.autograd, eager", lambda: torch.autograd.grad(log_posterior(*leaves), leaves), number=10),
        *replays(program, given, number=10),
    ]
    if others:

        def by_numpy(mean: Any, log_scale: Any, offset: Any, slope: Any, *data: Any) -> Any:
            import jax

            features, group, outcome = data
            logit = (mean + jax.numpy.exp(log_scale) * offset)[group] + features @ slope
            likelihood = (outcome * logit - jax.nn.softplus(logit)).sum()
            prior = 0.5 * (offset**2).sum() + 0.5 * ((slope / 2.5) ** 2).sum() + 0.5 * mean**2 + 0.5 * log_scale**2
            return likelihood - prior

        expected = torch.autograd.grad(log_posterior(*leaves), leaves)
        cases += by_torch_compile(log_posterior, given, expected, number=10, close=1e-8)
        data = (features, group, outcome)
        cases += by_jax(by_numpy, given, expected, constants=data, number=10, close=1e-8)
    title = f"the gradient of a hierarchical logistic regression's log posterior, {rows:,} rows"
    return measure(title, cases, rounds, on_run=on_run)


FIRST = """
import sys, time
import torch, tape_engine as te
rows, count, way = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if rows:
    X, Y, w, b = torch.rand(rows, 784), torch.rand(rows), torch.randn(784, 1) / 28, torch.zeros(1)
    inputs = (X, Y)
    if way == "replay":  # the others would be given what a tape listens to
        with te.record() as tape:
            C = te.mse(te.relu(te.lin(X, w, b)), Y)
else:
    x, w = torch.randn(8, 8), torch.randn(8, 8)
    inputs = (x,)
    with te.record() as tape:
        y = x
        for _ in range(count // 2):
            y = torch.tanh(y * w)
        C = y.sum()
def loss(w, b):
    return (torch.relu(X @ w + b).squeeze(-1) - Y).pow(2).mean()
def by_numpy(w, b, X, Y):
    import jax
    return ((jax.nn.relu(X @ w + b)[:, 0] - Y) ** 2).mean()
if way == "JAX, jit":
    import jax
    given = [jax.numpy.asarray(each.numpy()) for each in (w, b, X, Y)]
start = time.perf_counter()
if way == "replay":
    tape.program(inputs=inputs, outputs=C).step(*inputs)
elif way == "torch.compile":
    leaves = [each.clone().requires_grad_() for each in (w, b)]
    torch.autograd.grad(torch.compile(loss)(*leaves), leaves)
else:
    jax.block_until_ready(jax.jit(jax.value_and_grad(by_numpy, argnums=(0, 1)))(*given))
print(time.perf_counter() - start)
"""


def first_result(
    rows: int, count: int, rounds: int, *, others: bool = False, on_run: Callable[[str], None] = lambda _: None
) -> Table:
    """From a recording to its first replay, in a process of its own: with nothing compiled yet, and the second time.

    Of `others` the time from a function to its first gradients, those of the parameters.
    """
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for when in ("nothing compiled yet", "a second process"):
                for what, arguments in (
                    ("the article", (rows, 0, "replay")),
                    (f"{count:,} tiny operations", (0, count, "replay")),
                ):
                    name = f"{what}, {when}"
                    on_run(name)
                    taken.setdefault(name, []).append(_seconds(arguments, Path(folder) / what))
    ways = ((TORCH_COMPILE, has_compiler()), (JAX, has_jax()))
    for way in [way for way, there in ways if there] if others else ():
        with tempfile.TemporaryDirectory() as folder:
            name = f"the article by {way}, nothing compiled yet"
            on_run(name)
            taken[name] = [_seconds((rows, 0, way), Path(folder))]
    timings = [Timing(name, statistics.median(each), min(each), max(each), len(each)) for name, each in taken.items()]
    return Table("from the recording to the first result of a replay", "program", tuple(timings))


def _seconds(arguments: Sequence[Any], cache: Path | None, code: str = FIRST) -> float:
    """What a process that runs `code`, with this folder for its kernels, or the user's own, tells."""
    folders = {"TAPE_ENGINE_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {}
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **folders}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


GROWTH = """
import sys, time
import torch, tape_engine as te
count, backend = int(sys.argv[1]), sys.argv[2]
x, w = torch.randn(8, 8), torch.randn(8, 8) / 3
def recorded(count):
    with te.record() as tape:
        y = x
        for _ in range(count // 2):
            y = torch.tanh(y * w)
        C = y.sum()
    return tape, C
tape, C = recorded(30)
tape.program(inputs=x, outputs=C, backend=backend).step(x)  # what is imported and compiled once
tape, C = recorded(count)
start = time.perf_counter()
tape.program(inputs=x, outputs=C, backend=backend).step(x)
print(time.perf_counter() - start)
"""


def growth(counts: Sequence[int], rounds: int, *, on_run: Callable[[str], None] = lambda _: None) -> Table:
    """From a recording of so many operations to the first result of its replay, for each of them."""
    timings = []
    for backend in ("python", "native"):
        for count in counts:
            name = f"{count:,} operations, {backend}"
            on_run(name)
            taken = [_seconds((count, backend), None, GROWTH) / count for _ in range(rounds)]
            timings.append(Timing(name, statistics.median(taken), min(taken), max(taken), rounds))
    title = "a tape of N operations (element-wise, 8 x 8) to a program and its first step, for each of them"
    return Table(title, "operation", tuple(timings))
