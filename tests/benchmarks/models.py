"""Whole models beside eager torch: the time of a training step, and the most memory that it holds.

Their operations take long (a hundred microseconds and more), so that what recording costs an operation should hardly
show; and what a tape keeps for its rules should be what torch's own graph keeps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tape_engine as te

from .replay import replays
from .timing import Case, Table, measure

__all__ = ["MODELS", "Memory", "memory", "step"]

Tensor = torch.Tensor
F = nn.functional


# -- the models --------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with batch normalisation, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(y)))


class Attention(nn.Module):
    """Causal self-attention and a layer of its own for each place, each beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        parts = self.into(self.before(x)).chunk(3, -1)
        q, k, v = (each.view(batch, places, self.heads, -1).transpose(1, 2) for each in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, places, width))
        fed: Tensor = self.down(F.gelu(self.up(self.between(x))))
        return x + fed


class Language(nn.Module):
    """Which of 200 tokens comes next: embedding, attention, one score a token."""

    def __init__(self, tokens: int = 200, places: int = 128, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Parameter(torch.randn(places, width) / 50)
        self.blocks = nn.Sequential(*(Attention(width, 4) for _ in range(3)))
        self.score = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.blocks(self.embed(x) + self.place))
        return scores.flatten(0, 1)


class Sequence(nn.Module):
    """Two LSTM layers over 50 places, and a score for each of 10 classes at the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(64, 128, 2, batch_first=True)
        self.score = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.layers(x)[0][:, -1])
        return scores


def perceptron() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10)
    )


def residual() -> nn.Module:
    """Two residual blocks of 32 channels, mean over the picture, 10 classes."""
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), Residual(32), Residual(32), *ends)


@dataclass(frozen=True)
class Model:
    """A model to be trained: how it is made, and the shapes of its data.

    Attributes:
        name: as the tables show it.
        make: makes it.
        shape: of its input without the batch.
        tokens: how many tokens its input is drawn from; 0 for an input of numbers.
        classes: how many classes it scores.
        batch: as many inputs as the benchmarks give it.
        scores: how many scores it gives for each input.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0
    classes: int = 10
    batch: int = 64
    scores: int = 1

    def prepared(self, batch: int | None = None) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
        """Its parameters, and a function that computes its loss on one batch."""
        torch.manual_seed(0)
        model, size = self.make(), batch or self.batch
        X = torch.randint(self.tokens, (size, *self.shape)) if self.tokens else torch.randn(size, *self.shape)
        Y = torch.randint(self.classes, (size * self.scores,))
        return list(model.parameters()), lambda: F.cross_entropy(model(X), Y)


MODELS = (
    Model("perceptron 784-512-512-10, batch 1,024", perceptron, (784,), batch=1024),
    Model("residual net, 32 channels of 32 x 32, batch 32", residual, (3, 32, 32), batch=32),
    Model("attention, 3 blocks of width 128, 32 x 128 tokens", Language, (128,), 200, 200, batch=32, scores=128),
    Model("LSTM, 2 layers of 128, 64 x 50 places", Sequence, (50, 64)),
)


def _ways(model: Model, batch: int | None) -> dict[str, tuple[list[nn.Parameter], Callable[[], object]]]:
    """Every way to the gradients of all parameters, by its name, with the parameters that get them.

    torch.autograd has a model of its own, which no tape knows.
    """
    leaves, eager = model.prepared(batch)
    parameters, loss = model.prepared(batch)

    def autograd() -> None:
        for leaf in leaves:
            leaf.grad = None
        eager().backward()  # type: ignore[no-untyped-call]

    def recorded() -> None:
        with te.record():
            C = loss()
        te.backward(C, wrt=parameters)

    def program(backend: str) -> te.Program:
        with te.record() as tape:
            C = loss()
        made: te.Program = tape.program(outputs=C, wrt=parameters, backend=backend)
        return made

    return {
        "torch.autograd, eager": (leaves, autograd),
        "tape_engine, te.record() over plain torch": (parameters, recorded),
        **{case.name: (parameters, case.run) for case in replays(program, ())},
    }


# -- time and memory ---------------------------------------------------------------------------------------


def step(
    model: Model, rounds: int, *, batch: int | None = None, on_run: Callable[[str], None] = lambda _: None
) -> Table:
    """The gradients of all parameters, forward and back."""
    cases = [Case(name, way) for name, (_, way) in _ways(model, batch).items()]
    return measure(model.name, cases, rounds, on_run=on_run)


@dataclass(frozen=True)
class Memory:
    """The most bytes that tensors held during a step, beyond the parameters, by every way; the first is eager torch."""

    name: str
    peaks: dict[str, int]

    def ratio(self, way: str) -> float:
        """How much of torch's own peak that of a way is."""
        return self.peaks[way] / next(iter(self.peaks.values()))

    def as_data(self) -> dict[str, Any]:
        """The row for a JSON file."""
        return {"name": self.name, "peaks": self.peaks, "ratios": {way: self.ratio(way) for way in self.peaks}}


def memory(model: Model, *, batch: int | None = None) -> Memory:
    """The peaks of one step by every way, as torch's allocator on the CPU counts them.

    What a first step keeps for the next ones, the buffers of a program, counts as held all the time.
    """
    peaks = {}
    for name in _ways(model, batch):
        parameters, way = _ways(model, batch)[name]  # on a model of its own: what one way leaves is not another's
        with counting() as first:
            way()  # the most that a first run alone takes is not counted
            _forget(parameters)
        with counting() as second:
            way()
        _forget(parameters)
        peaks[name] = first.held + second.most
    return Memory(model.name, peaks)


def _forget(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
        if hasattr(parameter, "g"):
            del parameter.g
    gc.collect()


@dataclass
class Count:
    """Bytes of tensors made in a block: the most that were held at one time, and those still held at its end."""

    most: int = 0
    held: int = 0


@contextmanager
def counting() -> Iterator[Count]:
    """What is yielded has the figures after the block."""
    found = Count()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        yield found
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        found.held += event.nbytes()
        found.most = max(found.most, found.held)
