"""Networks in whose loss derivatives stand: what torch differentiates inside the recorded code is recorded too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from .common import architecture, real

Tensor = torch.Tensor


def field(ins: int, outs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(ins, 7), nn.Tanh(), nn.Linear(7, outs))


def heat(model: nn.Module, points: Tensor) -> Any:
    """Physics-informed: the heat equation ``u_t = u_xx`` at points (x, t), and what holds at time 0."""

    def u(p: Tensor) -> Any:
        return model(p).squeeze(-1)

    slope = torch.func.vmap(torch.func.jacrev(u))(points)
    curvature = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(u)))(points)
    start = points * torch.tensor([1.0, 0.0], dtype=points.dtype)
    return ((slope[:, 1] - curvature[:, 0, 0]) ** 2).mean() + F.mse_loss(u(start), start[:, 0].sin())


def pendulum(model: nn.Module, state: Tensor, change: Tensor) -> Any:
    """Hamiltonian: the derivatives of one learnt energy are the equations of motion."""
    slope = torch.func.grad(lambda s: model(s).sum())(state)
    q, p = slope.chunk(2, 1)
    return F.mse_loss(torch.cat([p, -q], 1), change)


def penalised(model: nn.Module, fake: Tensor, true: Tensor) -> Any:
    """A Wasserstein critic whose slope is held at 1 between the two, by torch.autograd inside the loss."""
    between = fake.lerp(true, torch.rand(len(fake), 1, dtype=fake.dtype)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    return model(fake).mean() - model(true).mean() + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()


def adapted(model: nn.Module, x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor) -> Any:
    """MAML: the loss of a model that has taken one step of gradient descent on other data."""

    def loss(parameters: dict[str, Any], x: Tensor, y: Tensor) -> Any:
        return F.mse_loss(functional_call(model, parameters, (x,)), y)

    parameters: dict[str, Any] = dict(model.named_parameters())
    slopes = torch.func.grad(loss)(parameters, x, y)
    return loss({name: p - 0.1 * slopes[name] for name, p in parameters.items()}, x_new, y_new)


ARCHITECTURES = [
    architecture("physics-informed network", lambda: field(2, 1), lambda: (real(5, 2),), heat),
    architecture("Hamiltonian network", lambda: field(2, 1), lambda: (real(5, 2), real(5, 2)), pendulum),
    architecture("gradient penalty", lambda: field(3, 1), lambda: (real(5, 3), real(5, 3)), penalised),
    architecture("MAML", lambda: field(2, 1), lambda: (real(4, 2), real(4, 1), real(4, 2), real(4, 1)), adapted),
]
