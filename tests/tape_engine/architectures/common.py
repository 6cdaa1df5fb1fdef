"""What an architecture is made of, and the random data that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model with its data and its loss.

    Attributes:
        name: what the test is called.
        model: makes it, freshly initialised from torch's generator.
        data: draws one batch; a replay is given the tensors of another one.
        losses: each a function of the model and the batch, with the part of the model (by name, "" for all) that
            its gradients step. They are minimised in turn, as the two of a GAN.
        decides: whether the code takes a branch, or makes a shape, by the elements of the batch.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, ...]]
    losses: tuple[tuple[Loss, str], ...] = field(default=())
    decides: bool = False


def architecture(
    name: str,
    model: Callable[[], nn.Module],
    data: Callable[[], tuple[Tensor, ...]],
    loss: Loss | tuple[tuple[Loss, str], ...],
    *,
    decides: bool = False,
) -> Architecture:
    """An architecture of one loss, or of several."""
    return Architecture(name, model, data, loss if isinstance(loss, tuple) else ((loss, ""),), decides)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape)


def images(channels: int, size: int, classes: int = 5, batch: int = 4) -> Callable[[], tuple[Tensor, ...]]:
    """Draws images with their labels."""
    return lambda: (real(batch, channels, size, size), labels(classes, batch))


def rows(features: int, classes: int = 5, batch: int = 6) -> Callable[[], tuple[Tensor, ...]]:
    """Draws feature vectors with their labels."""
    return lambda: (real(batch, features), labels(classes, batch))


def classified(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """The cross entropy of scores ``(..., classes)`` with labels ``(...)``."""
    scores = model(x)
    return nn.functional.cross_entropy(scores.flatten(0, -2), y.flatten())


def regressed(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return nn.functional.mse_loss(model(x), y)


class Residual(nn.Module):
    """``x + f(x)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return x + self.body(x)
