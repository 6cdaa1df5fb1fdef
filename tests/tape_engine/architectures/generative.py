"""Generative models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .common import architecture, labels, real

Tensor = torch.Tensor


class Variational(nn.Module):
    """A variational autoencoder, reparametrised."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Any:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance


def evidence(model: nn.Module, x: Tensor) -> Any:
    back, mean, log_variance = model(x)
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
    return F.binary_cross_entropy_with_logits(back, x.sigmoid(), reduction="sum") / len(x) + divergence


class Distributions(nn.Module):
    """The same by ``torch.distributions``, with a Gumbel softmax besides."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 7), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Any:
        mean, scale, logits = self.encoder(x).split([2, 2, 3], 1)
        normal: Any = torch.distributions.Normal(mean, F.softplus(scale), validate_args=False)
        kind = F.gumbel_softmax(logits, tau=0.7)
        out = self.decoder(torch.cat([normal.rsample(), kind], 1))
        prior: Any = torch.distributions.Normal(torch.zeros_like(mean), 1.0, validate_args=False)
        likelihood: Any = torch.distributions.Laplace(out, 1.0, validate_args=False)
        return torch.distributions.kl_divergence(normal, prior).sum(1) - likelihood.log_prob(x).sum(1)


class Adversaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(6, 1))


def of_critic(model: Adversaries, z: Tensor, x: Tensor) -> Any:
    fake, real_ones = model.critic(model.generator(z).detach()), model.critic(x)
    ones = torch.ones_like(fake)
    return F.binary_cross_entropy_with_logits(real_ones, ones) + F.binary_cross_entropy_with_logits(fake, 0 * ones)


def of_generator(model: Adversaries, z: Tensor, x: Tensor) -> Any:
    return F.softplus(-model.critic(model.generator(z))).mean() + 0 * x.sum()


class Denoiser(nn.Module):
    """The network of a diffusion model, told the time by sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.first = nn.Sequential(nn.Linear(8, 8), nn.SiLU()), nn.Conv2d(1, 4, 3, padding=1)
        self.scale, self.norm = nn.Linear(8, 8), nn.GroupNorm(2, 4, affine=False)
        self.last = nn.Conv2d(4, 1, 3, padding=1)
        self.register_buffer("alphas", torch.linspace(0.99, 0.9, 10).cumprod(0))

    def forward(self, x: Tensor, t: Tensor) -> Any:
        angles = t[:, None] * torch.exp(-math.log(100) * torch.arange(4, dtype=x.dtype) / 4)
        scale, shift = self.scale(self.time(torch.cat([angles.sin(), angles.cos()], 1)))[..., None, None].chunk(2, 1)
        return self.last(F.silu(torch.addcmul(shift, self.norm(self.first(x)), 1 + scale)))


def denoised(model: Denoiser, x: Tensor) -> Any:
    t = torch.randint(10, (len(x),))
    noise = torch.randn_like(x)
    a = model.get_buffer("alphas")[t][:, None, None, None]
    return F.mse_loss(model(a.sqrt() * x + (1 - a).sqrt() * noise, t), noise)


class Coupling(nn.Module):
    """A coupling layer: one half scales and shifts the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.turn = (
            nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)),
            nn.Parameter(torch.eye(4) + torch.randn(4, 4) / 5),
        )

    def forward(self, x: Tensor) -> Any:
        a, b = x.tensor_split(2, 1)
        scale, shift = self.net(a).tensor_split(2, 1)
        x = torch.cat([a, b * scale.tanh().exp() + shift], 1)
        return x @ self.turn, scale.tanh().sum(1) + torch.linalg.slogdet(self.turn).logabsdet


class Flow(nn.Module):
    """A normalising flow: an activation norm and couplings, with the logarithm of the determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale, self.shift = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.layers = nn.ModuleList(Coupling() for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        x, total = (x + self.shift) * self.log_scale.exp(), self.log_scale.sum()
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return (0.5 * (x**2 + math.log(2 * math.pi)).sum(1) - total).mean()


class MaskedAutoregression(nn.Module):
    """MADE: weights under a mask, so that each feature depends on those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
        degree = torch.arange(8) % 3
        self.register_buffer("in_mask", (degree[:, None] >= torch.arange(4)).to(torch.float64))
        self.register_buffer("out_mask", (torch.arange(4).repeat(2)[:, None] > degree).to(torch.float64))

    def forward(self, x: Tensor) -> Any:
        h = F.linear(x, self.first.weight * self.get_buffer("in_mask"), self.first.bias).relu()
        mean, log_scale = F.linear(h, self.second.weight * self.get_buffer("out_mask"), self.second.bias).chunk(2, 1)
        return F.gaussian_nll_loss(mean, x, (2 * log_scale).exp())


class Boltzmann(nn.Module):
    """A restricted Boltzmann machine, by contrastive divergence: its samples are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(torch.randn(shape) / 2) for shape in ((6, 4), (6,), (4,)))

    def energy(self, v: Tensor) -> Tensor:
        return -(v @ self.a) - F.softplus(v @ self.w + self.b).sum(1)

    def forward(self, v: Tensor) -> Any:
        with torch.no_grad():
            fake = v
            for _ in range(2):
                h = torch.bernoulli((fake @ self.w + self.b).sigmoid())
                fake = torch.bernoulli((h @ self.w.t() + self.a).sigmoid())
        return (self.energy(v) - self.energy(fake)).mean()


class Policy(nn.Module):
    """An actor and a critic: the logarithm of a drawn action's probability, weighted by its advantage (PPO)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return self.actor(h), self.critic(h).squeeze(-1)


def policy_loss(model: nn.Module, x: Tensor, rewards: Tensor) -> Any:
    logits, value = model(x)
    actions: Any = torch.distributions.Categorical(logits=logits, validate_args=False)
    with torch.no_grad():
        chosen = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
        before = actions.log_prob(chosen) + 0.1 * torch.randn(len(x), dtype=x.dtype)
    ratio, advantage = (actions.log_prob(chosen) - before).exp(), rewards - value.detach()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
    return -clipped.mean() + 0.5 * F.smooth_l1_loss(value, rewards) - 0.01 * actions.entropy().mean()


ARCHITECTURES = [
    architecture("VAE", Variational, lambda: (real(5, 6),), evidence),
    architecture("VAE of distributions", Distributions, lambda: (real(5, 6),), lambda model, x: model(x).mean()),
    architecture(
        "GAN", Adversaries, lambda: (real(6, 3), real(6, 4)), ((of_critic, "critic"), (of_generator, "generator"))
    ),
    architecture("diffusion", Denoiser, lambda: (real(3, 1, 5, 5),), denoised),
    architecture("normalising flow", Flow, lambda: (real(6, 4),), lambda model, x: model(x)),
    architecture("masked autoregression", MaskedAutoregression, lambda: (real(6, 4),), lambda model, x: model(x)),
    architecture("Boltzmann machine", Boltzmann, lambda: (labels(2, 5, 6).double(),), lambda model, x: model(x)),
    architecture("actor and critic", Policy, lambda: (real(6, 4), real(6)), policy_loss),
]
