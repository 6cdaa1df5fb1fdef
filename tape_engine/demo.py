"""The main job on real digits: record lin → relu → mse, sweep, compare, draw, and train by replay.

What is recorded here is what a user would type: three lines in `record_main`, two in `Network`. The rest
holds the gradients against other ways to the same ones. `cli` reports what came out.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import article, data
from .errors import DataError, message
from .ops import lin, mse, relu
from .recorder import pause, record
from .sweep import backward

__all__ = ["Comparison", "Main", "Score", "Trained", "compare", "draw", "largest_difference", "record_main", "train"]

Tensor = torch.Tensor

SEED = 0
ROWS = 2000  # the row loops are slow, and this many rows show as much as 60,000
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
NAMES = article.Gradients._fields


# -- the article's job -------------------------------------------------------------------------------------------


class Main(NamedTuple):
    """lin → relu → mse as recorded and swept: each of the five has its ``.g``."""

    X: Tensor
    w: Tensor
    b: Tensor
    Z: Tensor
    U: Tensor
    Y: Tensor
    C: Tensor
    listing: str


def record_main(images: Tensor, labels: Tensor) -> Main:
    """Records and sweeps the article's three operations in float64, with the labels as targets.

    `images` is `(N, D)`, `labels` `(N,)`. The weights are random, and `b` has about half of the rows come out
    above 0.
    """
    generator = torch.Generator().manual_seed(SEED)
    X, Y = images.double(), labels.double()
    w = torch.randn(X.shape[1], 1, generator=generator, dtype=torch.float64) / math.sqrt(X.shape[1])
    b = 0.1 - (X @ w).mean(0)
    with record() as tape:
        Z = lin(X, w, b)
        U = relu(Z)
        C = mse(U, Y)
    backward(C)
    return Main(X, w, b, Z, U, Y, C, str(tape))


# -- the same gradients by other ways ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One ``.g`` held against the same gradient from elsewhere.

    Attributes:
        name: of the value whose gradient it is.
        shape: of the value.
        differences: for each other way, the largest difference relative to the largest element.
        tolerance: up to which they count as equal.
    """

    name: str
    shape: tuple[int, ...]
    differences: dict[str, float]
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether every difference is within the tolerance; one that is not a number is not."""
        return all(each <= self.tolerance for each in self.differences.values())


def largest_difference(found: Tensor | None, expected: Tensor) -> float:
    """The largest absolute difference of two tensors, divided by the largest element of the expected one.

    Infinite for a gradient that is missing or has another shape or dtype.
    """
    if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return difference / scale if scale > 0 else difference


def by_autograd(X: Tensor, w: Tensor, b: Tensor, Y: Tensor) -> article.Gradients:
    """The gradients as torch.autograd has them."""
    X, w, b = (each.detach().clone().requires_grad_() for each in (X, w, b))
    Z, U, C = article.forward(X, w, b, Y)
    return article.Gradients(*torch.autograd.grad(C, (X, w, b, Z, U)))


WAYS = {
    "closed form": article.closed_form,
    "row loops": article.by_rows,
    "torch.autograd": by_autograd,
}


def compare(main: Main) -> list[Comparison]:
    """Each ``.g`` of `main` against the closed form, the article's loops over rows, and torch.autograd."""
    with pause():
        plain = [each.detach() for each in (main.X, main.w, main.b, main.Y)]
        others = {way: compute(*plain) for way, compute in WAYS.items()}
        return [
            Comparison(
                name,
                tuple(getattr(main, name).shape),
                {
                    way: largest_difference(getattr(getattr(main, name), "g", None), getattr(other, name))
                    for way, other in others.items()
                },
                TOLERANCE[main.X.dtype],
            )
            for name in NAMES
        ]


# -- the picture -----------------------------------------------------------------------------------------------------


def draw(main: Main, out: Path) -> list[Path]:
    """Draws the graph of the main job, forward and backward, into the folder `out`; gives the files written.

    Raises:
        TapeError: no picture could be made.
        ImportError: a package that pictures need is not installed.
    """
    viz = importlib.import_module("viz")  # the engine knows no pictures: only its demo reaches for them
    drawing = viz.draw(main.C)
    paths = [out / "graph.png", out / "graph.svg"]
    for path in paths:
        drawing.save(path)
    return paths


# -- training by replay ----------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Images to train on and images held out, with an output of 1 for the digit shown and 0 for the others."""

    X: Tensor
    Y: Tensor
    held_X: Tensor
    held_Y: Tensor


def split(digits: data.Digits) -> Split:
    """The set's own test part as held-out images; a fifth of the set, drawn at random, where it has none."""
    classes = len(digits.names)
    if digits.test is not None:
        parts = [(digits.images, digits.labels), (digits.test.images, digits.test.labels)]
    else:
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SEED))
        held = len(digits) // 5
        parts = [(digits.images[rows], digits.labels[rows]) for rows in (order[held:], order[:held])]
    (X, labels), (held_X, held_labels) = parts
    one_hot = torch.nn.functional.one_hot
    return Split(X, one_hot(labels, classes).to(X.dtype), held_X, one_hot(held_labels, classes).to(X.dtype))


class Score(NamedTuple):
    """How well held-out digits are told: mean square error over all outputs, and share of digits right."""

    error: float
    right: float


def score(P: Tensor, Y: Tensor) -> Score:
    """The score of outputs `P` for targets `Y`, both `(N, 10)`."""
    return Score(float((P - Y).pow(2).mean()), float((P.argmax(1) == Y.argmax(1)).double().mean()))


class Network:
    """Two linear layers with a rectifier between: D inputs, `HIDDEN` features, 10 outputs."""

    HIDDEN = 32

    def __init__(self, inputs: int, outputs: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.W1 = torch.randn(inputs, self.HIDDEN, generator=generator) * math.sqrt(2 / inputs)
        self.b1 = torch.zeros(self.HIDDEN)
        self.W2 = torch.randn(self.HIDDEN, outputs, generator=generator) * math.sqrt(1 / self.HIDDEN)
        self.b2 = torch.zeros(outputs)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.W1, self.b1, self.W2, self.b2

    def __call__(self, X: Tensor) -> Tensor:
        """`X` (N, D) to outputs (N, 10)."""
        H = relu(lin(X, self.W1, self.b1))
        P: Tensor = lin(H, self.W2, self.b2)
        return P


@dataclass
class Trained:
    """What training by replay gave.

    Attributes:
        sizes: inputs, hidden features and outputs of the network.
        steps, batch: the number of steps, and of rows in each.
        train, held: the number of images trained on, and held out.
        before, after, mean: held-out scores before and after training, and of predicting the mean.
        replay: the largest relative difference between the ``.g`` of a replay and torch.autograd.
        seconds: of training, in all.
        microseconds: the median time of a step by each way of taking it.
    """

    sizes: tuple[int, int, int]
    steps: int
    batch: int
    train: int
    held: int
    before: Score
    after: Score
    mean: Score
    replay: float
    seconds: float
    microseconds: dict[str, float]

    @property
    def agrees(self) -> bool:
        """Whether the gradients of a replay are those of torch.autograd, to float32 rounding."""
        return self.replay <= TOLERANCE[torch.float32]


def batches(X: Tensor, Y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `size` rows without end, drawn anew in each pass over the rows; a short rest is left out."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(X), generator=generator)
        for start in range(0, len(X) - size + 1, size):
            rows = order[start : start + size]
            yield X[rows], Y[rows]


def train(
    digits: data.Digits, steps: int, *, batch: int = 64, lr: float = 1.0, on_step: Callable[[], None] = lambda: None
) -> Trained:
    """Records one step of a small network, then trains it by `steps` replays on batches of `batch` rows.

    `on_step` is called after each.

    Raises:
        DataError: there are too few images to train on and to hold out.
    """
    X, Y, held_X, held_Y = split(digits)
    batch = min(batch, len(X))
    if len(held_X) == 0:
        raise DataError(message(f"demo: {len(digits)} images are too few to hold some out.", fix="give it at least 5"))
    network = Network(X.shape[1], Y.shape[1])
    stream = batches(X, Y, batch)
    X_batch, Y_batch = next(stream)
    with record() as tape:
        C = mse(network(X_batch), Y_batch)
    program = tape.program(inputs=(X_batch, Y_batch), outputs=C, wrt=network.parameters)

    with pause():
        before, mean = score(network(held_X), held_Y), score(Y.mean(0).expand_as(held_Y), held_Y)
    agreement = replay_against_autograd(program, network, X_batch, Y_batch)
    with one_thread():
        start = time.perf_counter()
        for _ in range(steps):
            program.step(*next(stream))
            for parameter in network.parameters:
                parameter -= lr * parameter.g  # type: ignore[attr-defined]
            on_step()
        seconds = time.perf_counter() - start
        microseconds = step_times(program, network, X_batch, Y_batch)
    with pause():
        after = score(network(held_X), held_Y)
    return Trained(
        sizes=(X.shape[1], network.HIDDEN, Y.shape[1]),
        steps=steps,
        batch=batch,
        train=len(X),
        held=len(held_X),
        before=before,
        after=after,
        mean=mean,
        replay=agreement,
        seconds=seconds,
        microseconds=microseconds,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: steps this small gain nothing from a second, and on a busy machine lose ten times over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autograd_step(parameters: Sequence[Tensor], X: Tensor, Y: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the network's loss with respect to `parameters` (leaves that require them)."""
    W1, b1, W2, b2 = parameters
    C = ((X @ W1 + b1).clamp_min(0.0) @ W2 + b2 - Y).pow(2).mean()
    return torch.autograd.grad(C, parameters)


def leaves_of(network: Network) -> list[Tensor]:
    """Copies of the network's parameters, for torch.autograd."""
    with pause():
        return [parameter.detach().clone().requires_grad_() for parameter in network.parameters]


def replay_against_autograd(program: Any, network: Network, X: Tensor, Y: Tensor) -> float:
    """The largest relative difference of any ``.g`` that a replay writes from torch.autograd's gradient."""
    program.step(X, Y)
    expected = autograd_step(leaves_of(network), X, Y)
    with pause():
        found = [getattr(parameter, "g", None) for parameter in network.parameters]
        return max(largest_difference(g, e) for g, e in zip(found, expected, strict=True))


def step_times(program: Any, network: Network, X: Tensor, Y: Tensor, rounds: int = 60) -> dict[str, float]:
    """The median time of a step, forward and back, in microseconds; the ways take turns."""
    leaves = leaves_of(network)
    with pause():  # on tensors that no tape knows: on others torch's own operations would be recorded
        own_X, own_Y = X.detach().clone(), Y.detach().clone()

    def recorded() -> None:
        backward(mse(network(X), Y), wrt=network.parameters)

    ways: dict[str, Callable[[], object]] = {
        "torch.autograd": lambda: autograd_step(leaves, own_X, own_Y),
        "record and sweep": recorded,
        "replay": lambda: program.step(X, Y),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, step in ways.items():
            start = time.perf_counter()
            step()
            times[way].append(time.perf_counter() - start)
    return {way: 1e6 * statistics.median(taken) for way, taken in times.items()}
