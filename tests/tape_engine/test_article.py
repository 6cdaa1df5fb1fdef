"""The article's backward pass written out: its versions agree with each other, with torch and with differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tape_engine import article

Tensor = torch.Tensor
Job = tuple[Tensor, Tensor, Tensor, Tensor]

VERSIONS: dict[str, Callable[..., article.Gradients]] = {
    "vectorised": article.backward,
    "half vectorised": lambda *job: article.backward(*job, lin_grad=article.lin_grad_half),
    "row loops in lin": lambda *job: article.backward(*job, lin_grad=article.lin_grad_rows),
    "row loops": article.by_rows,
    "closed form": article.closed_form,
}


def draw(rows: int, columns: int, features: int, *, shared_b: bool = False, flat_Y: bool = False) -> Job:
    generator = torch.Generator().manual_seed(rows * 100 + columns * 10 + features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    Y = normal(rows) if flat_Y else normal(rows, features)
    return normal(rows, columns), normal(columns, features), normal(1 if shared_b else features), Y


JOBS = {
    "one feature, flat Y": draw(7, 5, 1, flat_Y=True),
    "one feature": draw(7, 5, 1),
    "four features": draw(6, 3, 4),
    "four features, one b": draw(6, 3, 4, shared_b=True),
    "one row": draw(1, 3, 1),
}


def by_autograd(X: Tensor, w: Tensor, b: Tensor, Y: Tensor) -> article.Gradients:
    X, w, b = (each.clone().requires_grad_() for each in (X, w, b))
    Z = torch.nn.functional.linear(X, w.t(), b.expand(w.shape[1]))
    U = torch.nn.functional.relu(Z)
    C = torch.nn.functional.mse_loss(U, Y.view_as(U))
    return article.Gradients(*torch.autograd.grad(C, (X, w, b, Z, U)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("job", JOBS)
def test_every_version_is_torch_autograd(version: str, job: str) -> None:
    found, expected = VERSIONS[version](*JOBS[job]), by_autograd(*JOBS[job])
    for name, g, e in zip(article.Gradients._fields, found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14, msg=f"{version}: {name}.g")


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_at_the_kink_give_nothing(version: str) -> None:
    X = torch.tensor([[1.0, -1.0], [2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    w = torch.ones(2, 1, dtype=torch.float64)
    found = VERSIONS[version](X, w, torch.zeros(1, dtype=torch.float64), torch.full((3,), 9.0, dtype=torch.float64))
    assert found.Z.flatten().tolist() == [0.0, 2 / 3 * (3 - 9), 0.0]
    assert found.w.flatten().tolist() == [2 / 3 * (3 - 9) * 2, 2 / 3 * (3 - 9) * 1]


def test_the_loss_falls_against_the_gradient() -> None:
    # with the sign of the article's code line it would rise
    X, w, b, Y = JOBS["four features"]
    g = article.backward(X, w, b, Y)
    before, after = article.forward(X, w, b, Y)[2], article.forward(X, w - 1e-3 * g.w, b - 1e-3 * g.b, Y)[2]
    assert after < before


def test_forward_is_torch() -> None:
    X, w, b, Y = JOBS["one feature, flat Y"]
    Z, U, C = article.forward(X, w, b, Y)
    torch.testing.assert_close(Z, torch.nn.functional.linear(X, w.t(), b))
    torch.testing.assert_close(U, torch.relu(Z))
    torch.testing.assert_close(C, torch.nn.functional.mse_loss(U.squeeze(-1), Y))
