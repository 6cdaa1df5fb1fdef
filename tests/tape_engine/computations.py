"""Computations as users write them, small: each a maker of a function and the tensors it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
F = torch.nn.functional


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def of_module(module: torch.nn.Module, *inputs: Tensor, loss: Callable[[Any], Tensor] | None = None) -> tuple[Any, ...]:
    """A module as a function of its inputs and parameters."""
    module = module.double()
    names = [name for name, _ in module.named_parameters()]
    parameters = [p.detach().clone() for p in module.parameters()]

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors[len(inputs) :], strict=True))
        out = torch.func.functional_call(module, given, tensors[: len(inputs)])
        return loss(out) if loss else (out * out).sum()

    return run, *inputs, *parameters


def perceptron() -> tuple[Any, ...]:
    layers = torch.nn
    net = layers.Sequential(layers.Linear(4, 6), layers.Tanh(), layers.LayerNorm(6), layers.GELU(), layers.Linear(6, 3))
    labels = torch.tensor([0, 2, 1, 2, 0])
    return of_module(net, rand(5, 4), loss=lambda out: F.cross_entropy(out, labels, label_smoothing=0.1))


def plain_perceptron() -> tuple[Any, ...]:
    def run(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        hidden = (x @ w + b).clamp(min=0.0)
        scores = hidden @ v - 0.5 * hidden.mean(1, keepdim=True)
        chosen = scores.log_softmax(1)[torch.arange(5), torch.tensor([0, 1, 2, 0, 1])]
        return -chosen.mean() + 1e-2 * (w**2).sum() / 2 + (3 - v).abs().sum()

    return run, rand(5, 4), rand(4, 6), rand(6), rand(6, 3)


def in_place() -> tuple[Any, ...]:
    def run(x: Tensor, y: Tensor) -> Any:
        z = x * 2
        z.add_(y).mul_(x)
        z[1] = y[0] ** 2
        z[:, 2:].sub_(x[:, :2])
        z.transpose(0, 1)[0].exp_()
        return (z.sigmoid() * y).sum()

    return run, rand(3, 4), rand(3, 4)


def convolutional() -> tuple[Any, ...]:
    layers = torch.nn
    net = layers.Sequential(
        layers.Conv2d(2, 4, 3, padding=1),
        layers.BatchNorm2d(4, track_running_stats=False),
        layers.SiLU(),
        layers.MaxPool2d(2),
        layers.Conv2d(4, 4, 2, bias=False, groups=2),
        layers.GroupNorm(2, 4),
        layers.Upsample(scale_factor=2, mode="bilinear"),
        layers.ConvTranspose2d(4, 2, 2, stride=2),
        layers.AdaptiveAvgPool2d(1),
        layers.Flatten(),
    )
    return of_module(net, rand(2, 2, 6, 6))


def attention() -> tuple[Any, ...]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (causal * F.scaled_dot_product_attention(q, k, v, scale=0.7)).sum()

    return run, rand(1, 2, 3, 4), rand(1, 2, 3, 4), rand(1, 2, 3, 4)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    causal = (q @ k.mT * 0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v
    return (causal * ((q @ k.mT * 0.7).softmax(-1) @ v)).sum()


def transformer() -> tuple[Any, ...]:
    block = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
    return of_module(block.train(), rand(2, 3, 4))


def recurrent() -> tuple[Any, ...]:
    return of_module(torch.nn.LSTM(3, 4), rand(3, 2, 3), loss=lambda out: (out[0] ** 2).sum() + out[1][1].sum())


def gated() -> tuple[Any, ...]:
    return of_module(torch.nn.GRU(3, 4, 2), rand(3, 2, 3), loss=lambda out: (out[0] ** 2).sum())


def indexed() -> tuple[Any, ...]:
    def run(x: Tensor, table: Tensor) -> Tensor:
        rows = F.embedding(torch.tensor([1, 3, 1]), table)
        best = torch.topk(x, 2, dim=1)
        spread = torch.zeros(3, 5, dtype=x.dtype).scatter_add(1, best.indices, best.values * rows[:, :2])
        spread[spread > 1] = 0.5
        wide = torch.cat([spread, x.gather(1, best.indices), x.index_select(1, torch.tensor([0, 0]))], 1)
        return (torch.stack(wide.chunk(3, 1)[:2]).sort(0).values ** 2).sum() + wide[:, ::2].amax(1).prod()

    return run, rand(3, 4), rand(4, 4)


PLACES = torch.tensor([1, 3, 1, 0, 2])


def bags() -> tuple[Any, ...]:
    starts = torch.tensor([0, 3])

    def run(table: Tensor, weights: Tensor) -> Tensor:
        found = [F.embedding_bag(PLACES, table, starts, mode=mode) for mode in ("sum", "mean", "max")]
        found.append(F.embedding_bag(PLACES, table, starts, mode="sum", per_sample_weights=weights))
        return torch.stack(found).pow(2).sum()

    return run, rand(4, 3), rand(5)


def bags_reference(table: Tensor, weights: Tensor) -> Tensor:
    rows, weighted = table[PLACES], table[PLACES] * weights[:, None]
    bags = [(rows[:3], weighted[:3]), (rows[3:], weighted[3:])]
    found = [torch.stack([r.sum(0), r.mean(0), r.amax(0), w.sum(0)]) for r, w in bags]
    return torch.stack(found).pow(2).sum()


def summed() -> tuple[Any, ...]:
    def run(x: Tensor, y: Tensor) -> Any:
        a = torch.einsum("ij,kj->ik", x, y) / x.norm(dim=1, keepdim=True)
        b = x.std(0) + y.var(unbiased=False) + x.logsumexp(1).sum() + x.cumsum(1).prod(1).sum()
        return a.sum() * b.sum() + F.cosine_similarity(x, y).sum() + (x.cumprod(1) * y).sum() + x.logcumsumexp(0).sum()

    return run, rand(3, 4), rand(3, 4)


def complex_numbers() -> tuple[Any, ...]:
    def run(x: Tensor, z: Tensor) -> Any:
        turned = torch.fft.fft(x * z.exp()).outer(z.conj()) @ z.unsqueeze(-1)
        return (turned * turned.conj()).real.sum() + z.abs().sum() + torch.fft.irfft(torch.fft.rfft(x) * z[:3]).sum()

    return run, rand(4), rand(4, dtype=torch.complex128)


def decompositions() -> tuple[Any, ...]:
    def run(x: Tensor, b: Tensor) -> Any:
        s = x @ x.mT + torch.eye(3, dtype=x.dtype)
        factor = torch.linalg.cholesky(s)
        values, vectors = torch.linalg.eigh(s)
        u, sizes, vh = torch.linalg.svd(x, full_matrices=False)
        q, r = torch.linalg.qr(x)
        whole = torch.cholesky_solve(b, factor).sum() + torch.logdet(s) + (vectors * values).sin().sum()
        return whole + (u @ sizes.sqrt().diag() @ vh * q).sum() + r.abs().sum() + torch.linalg.inv(s)[0, 1]

    return run, rand(3, 3), rand(3, 2)


def eigenvalues() -> tuple[Any, ...]:
    def run(x: Tensor) -> Any:
        values, vectors = torch.linalg.eig(x)
        # of the vectors only the projectors v w*, which no phase changes
        projector = vectors[:, :1] @ torch.linalg.inv(vectors)[:1]
        return (values * values.conj()).real.sum() + (projector * projector.conj()).real.sum()

    return run, rand(3, 3)


def spectra() -> tuple[Any, ...]:
    def run(x: Tensor) -> Any:
        return torch.linalg.eigvalsh(x @ x.mT).log().sum() + torch.linalg.svdvals(x).prod() + torch.linalg.det(x) ** 2

    return run, rand(3, 3)


COMPUTATIONS: list[tuple[str, Callable[[], tuple[Any, ...]]]] = [
    ("perceptron", perceptron),
    ("plain perceptron", plain_perceptron),
    ("in place", in_place),
    ("convolutional", convolutional),
    ("attention", attention),
    ("transformer", transformer),
    ("recurrent", recurrent),
    ("gated", gated),
    ("indexed", indexed),
    ("bags", bags),
    ("summed", summed),
    ("complex numbers", complex_numbers),
    ("decompositions", decompositions),
    ("linalg_eig", eigenvalues),
    ("spectra", spectra),
]
