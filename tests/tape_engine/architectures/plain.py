"""Networks of fully connected layers, and ways of training that need no more."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from .common import architecture, classified, labels, real, regressed, rows

Tensor = torch.Tensor


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5))


class Mixer(nn.Module):
    """MLP-Mixer: a perceptron over the patches, then one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(9, 6), nn.GELU(), nn.Linear(6, 9))
        self.channels = nn.Sequential(nn.Linear(4, 6), nn.GELU(approximate="tanh"), nn.Linear(6, 4))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).mT).mT
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(1))


class NormalisedWeights(nn.Module):
    """Weights that are themselves computed: weight norm, spectral norm, an orthogonal matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(6, 5))
        self.second = parametrizations.spectral_norm(nn.Linear(5, 4))
        self.third = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))))


class Embedded(nn.Module):
    """The tower of a Siamese network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.SELU(), nn.AlphaDropout(0.1), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Any:
        return F.normalize(self.body(x), dim=-1)


def triplet(model: nn.Module, anchor: Tensor, positive: Tensor, negative: Tensor) -> Any:
    a, p, n = model(anchor), model(positive), model(negative)
    return F.triplet_margin_loss(a, p, n, margin=0.5) + F.cosine_embedding_loss(a, n, -torch.ones(len(a)).to(a))


class Capsules(nn.Module):
    """Dynamic routing between capsules, whose vectors are squashed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.votes = nn.Linear(6, 12), nn.Parameter(torch.randn(4, 5, 3, 2) / 3)

    @staticmethod
    def squash(s: Tensor) -> Tensor:
        squared = (s * s).sum(-1, keepdim=True)
        return squared / (1 + squared) * s / (squared + 1e-8).sqrt()

    def forward(self, x: Tensor) -> Any:
        u = self.squash(self.first(x).view(-1, 4, 3))
        votes = torch.einsum("bic,ijcd->bijd", u, self.votes)
        logits = votes.new_zeros(votes.shape[:3])
        for _ in range(3):
            v = self.squash(torch.einsum("bij,bijd->bjd", logits.softmax(-1), votes))
            logits = logits + torch.einsum("bijd,bjd->bij", votes, v.detach())
        return v.norm(dim=-1)


def margin(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """The loss of a capsule network: a margin on the length of each class's vector."""
    sizes, right = model(x), F.one_hot(y, 5)
    return (right * (0.9 - sizes).clamp_min(0) ** 2 + 0.5 * (1 - right) * (sizes - 0.1).clamp_min(0) ** 2).sum(1).mean()


class NeuralOde(nn.Module):
    """An ordinary differential equation whose right-hand side is learnt, by Runge and Kutta's fourth-order method."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), nn.Linear(3, 5)

    def slope(self, t: float, x: Tensor) -> Any:
        return self.field(torch.cat([x, torch.full_like(x[:, :1], t)], 1))

    def forward(self, x: Tensor) -> Any:
        h = 0.25
        for i in range(4):
            t = i * h
            k1 = self.slope(t, x)
            k2 = self.slope(t + h / 2, x + h / 2 * k1)
            k3 = self.slope(t + h / 2, x + h / 2 * k2)
            k4 = self.slope(t + h, x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(x)


class HyperNetwork(nn.Module):
    """A network whose weights are another one's output: `functional_call` puts them in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
        self.shapes = {name: p.shape for name, p in self.inner.named_parameters()}
        self.outer = nn.Linear(5, sum(shape.numel() for shape in self.shapes.values()))

    def forward(self, task: Tensor, x: Tensor) -> Any:
        parts = self.outer(task).split([shape.numel() for shape in self.shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        return functional_call(self.inner, weights, (x,))


class VectorQuantised(nn.Module):
    """Codes rounded to the nearest of a code book; the gradient goes straight through (VQ-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.codes = nn.Linear(6, 3), nn.Linear(3, 6), nn.Embedding(7, 3)

    def forward(self, x: Tensor) -> Any:
        z = self.encoder(x)
        nearest = torch.cdist(z, self.codes.weight).argmin(1)
        code = self.codes(nearest)
        through = z + (code - z).detach()
        commitment = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return self.decoder(through), commitment


def quantised(model: nn.Module, x: Tensor) -> Any:
    back, commitment = model(x)
    return F.mse_loss(back, x) + commitment


class FactorisationMachine(nn.Module):
    """Click prediction: each pair of features by the product of their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pairs, self.bias = nn.Embedding(12, 1), nn.Embedding(12, 3), nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Any:
        e = self.pairs(features)
        return self.bias + self.first(features).sum((1, 2)) + 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1)


def clicked(model: nn.Module, features: Tensor, y: Tensor) -> Any:
    return F.binary_cross_entropy_with_logits(model(features), y)


class Ensemble(nn.Module):
    """Several networks at once, their weights stacked: one batched product a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(3, 6, 8) / 2), nn.Parameter(torch.zeros(3, 1, 8))
        self.w2, self.b2 = nn.Parameter(torch.randn(3, 8, 5) / 3), nn.Parameter(torch.zeros(3, 1, 5))

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(torch.baddbmm(self.b1, x.expand(3, *x.shape), self.w1))
        return torch.baddbmm(self.b2, hidden, self.w2).logsumexp(0)


class RadialBasis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres, self.widths, self.head = (
            nn.Parameter(torch.randn(5, 2)),
            nn.Parameter(torch.zeros(5)),
            nn.Linear(5, 1),
        )

    def forward(self, x: Tensor) -> Any:
        return self.head((-(torch.cdist(x, self.centres) ** 2) * self.widths.exp()).exp())


ARCHITECTURES = [
    architecture("MLP", perceptron, rows(6), classified),
    architecture("MLP-Mixer", Mixer, lambda: (real(3, 1, 6, 6), labels(5, 3)), classified),
    architecture("normalised weights", NormalisedWeights, rows(6), classified),
    architecture("Siamese triplets", Embedded, lambda: (real(6, 5), real(6, 5), real(6, 5)), triplet),
    architecture("capsules", Capsules, rows(6), margin),
    architecture("neural ODE", NeuralOde, rows(3), classified),
    architecture(
        "hypernetwork",
        HyperNetwork,
        lambda: (real(5), real(6, 3), real(6, 2)),
        lambda model, task, x, y: F.smooth_l1_loss(model(task, x), y, beta=0.3),
    ),
    architecture("vector quantisation", VectorQuantised, lambda: (real(6, 6),), quantised),
    architecture(
        "factorisation machine",
        FactorisationMachine,
        lambda: (labels(12, 6, 4), labels(2, 6).double()),
        clicked,
    ),
    architecture("ensemble of perceptrons", Ensemble, rows(6), classified),
    architecture(
        "radial basis functions",
        RadialBasis,
        lambda: (real(6, 2), real(6, 1)),
        regressed,
    ),
]
