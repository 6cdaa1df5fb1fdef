"""Training by replay is training by running the code, random stream included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tape_engine as te
from tests.helpers import close, g_of
from tests.tape_engine.program.common import F64, draw, freeze

Tensor = torch.Tensor


# -- training by replay is training by running the code ------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(-2, -1) / x.shape[-1] ** 0.5).softmax(-1)
        out: Tensor = x + weights @ self.v(x)
        return out


class Classifier(nn.Module):
    """Embedding, attention with a residual, LayerNorm, dropout, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = Attention(8)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.norm(self.attention(self.embedding(tokens)))).mean(1)
        return out


def normalised(features: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 5))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(27, 5),
    )


def plain_mlp() -> nn.Module:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.randn(6, 9) / 3), nn.Parameter(torch.zeros(9))
            self.w2, self.b2 = nn.Parameter(torch.randn(9, 5) / 3), nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(x @ self.w1 + self.b1)
            return h @ self.w2 + self.b2

    return Plain()


def real(*shape: int) -> Callable[[], Tensor]:
    return lambda: draw(*shape)


def tokens() -> Tensor:
    return torch.randint(11, (4, 6))


TRAINED: list[Any] = [
    pytest.param(plain_mlp, real(8, 6), id="plain MLP"),
    pytest.param(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 5)), real(8, 6), id="norm"
    ),
    pytest.param(lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 5)), real(8, 6), id="dropout"),
    pytest.param(normalised, real(8, 6), id="batch norm"),
    pytest.param(Classifier, tokens, id="attention"),
    pytest.param(convolutional, real(4, 1, 8, 8), id="convolution"),
]


@pytest.mark.parametrize(("make", "draw_x"), TRAINED)
def test_training_by_replay(make: Callable[[], nn.Module], draw_x: Callable[[], Tensor]) -> None:
    """Fifty steps of Adam: the same losses, parameters, buffers and random stream as running the code."""
    ours = make().double()
    theirs = copy.deepcopy(ours)
    batches = [(draw_x(), torch.randint(5, (len(draw_x()),))) for _ in range(50)]
    x, y = batches[0]
    state = copy.deepcopy(ours.state_dict())
    with te.record() as tape:
        loss = F.cross_entropy(ours(x), y)
    program = tape.program(inputs=(x, y), outputs=loss)
    ours.load_state_dict(state)  # the recording was a step of running statistics
    assert_same_state(ours, theirs)

    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    torch.manual_seed(3)
    optimiser = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for x, y in batches:
        optimiser.zero_grad()
        out = F.cross_entropy(theirs(x), y)
        out.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses["theirs"].append(out.item())
    drawn_by_theirs = torch.rand(3)

    torch.manual_seed(3)
    optimiser = torch.optim.Adam(ours.parameters(), lr=0.01)
    for x, y in batches:
        out = program.step(x, y)
        for p in ours.parameters():
            p.grad = g_of(p)
        optimiser.step()
        losses["ours"].append(out.item())
    assert torch.equal(torch.rand(3), drawn_by_theirs), "the random stream differs"
    torch.testing.assert_close(losses["ours"], losses["theirs"], rtol=1e-7, atol=1e-9)
    assert_same_state(ours, theirs)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8), f"{name} differs"


def test_dropout_mask_is_shared_by_forward_and_backward() -> None:
    x = torch.ones(200, dtype=F64)
    with te.record() as tape:
        y = F.dropout(x, 0.4)
    program = tape.program(inputs=x, outputs=y)
    masks = []
    for _ in range(4):
        out = program.step(x, seed=torch.ones(200, dtype=F64))
        assert torch.equal(out, g_of(x))  # type: ignore[arg-type]
        masks.append(out != 0)
    assert not torch.equal(masks[0], masks[1])
    torch.manual_seed(5)
    again = program(x)
    torch.manual_seed(5)
    assert torch.equal(again, F.dropout(x, 0.4))


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda x: x * torch.randn(4, 3, dtype=F64),
    "rand_like": lambda x: x * torch.rand_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "normal_": lambda x: x + torch.zeros(4, 3, dtype=F64).normal_(),
    "uniform_": lambda x: x * torch.empty(4, 3, dtype=F64).uniform_(1, 2),
    "randperm": lambda x: x[torch.randperm(4)].cumsum(0),
    "randint": lambda x: x[torch.randint(4, (6,))].cumsum(0),
    "multinomial": lambda x: x[torch.multinomial(torch.ones(4), 2)] * 2,
    "two draws, one unused": lambda x: (torch.rand(3), x * torch.rand(4, 3, dtype=F64))[1],
    "bernoulli_ of a transposed one": lambda x: x * torch.empty(3, 4, dtype=F64).t().bernoulli_(0.5),
    "bernoulli_ by a tensor": lambda x: x * torch.empty(3, 4, dtype=F64).t().bernoulli_(x.sigmoid()),
    "uniform_ of a transposed one": lambda x: x * torch.empty(3, 4, dtype=F64).t().uniform_(),
    "dropout of a transposed one": lambda x: F.dropout(x.view(2, 2, 3).transpose(0, 1), 0.5),
    "dropout of a slice": lambda x: F.dropout(torch.cat([x, x], 1).t()[1:5:2], 0.5),
    "dropout1d": lambda x: F.dropout1d(x[None], 0.5),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=-1),
    "distribution": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations_draw_anew(name: str) -> None:
    function, x = RANDOM[name], draw(4, 3)
    program = freeze(function, [x])
    x = draw(4, 3)
    for seed in (1, 2):
        torch.manual_seed(seed)
        tracked = x.clone().requires_grad_()
        wanted = function(tracked)
        (wanted_g,) = torch.autograd.grad(wanted.sum(), tracked)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        close(program(x), wanted.detach())
        assert torch.equal(torch.get_rng_state(), state), "running the code would leave another random stream"
        torch.manual_seed(seed)
        close(program.step(x, seed=torch.ones_like(wanted).detach()), wanted.detach())
        close(g_of(x), wanted_g)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_of_its_own() -> None:
    x, own = draw(3), torch.Generator().manual_seed(1)
    program = freeze(lambda x: x + torch.rand(3, dtype=F64, generator=own), [x])
    own.manual_seed(4)
    got = program(x)
    wanted = x + torch.rand(3, dtype=F64, generator=torch.Generator().manual_seed(4))
    close(got, wanted)


def test_freezing_draws_nothing() -> None:
    x, net = draw(4, 3), nn.Dropout(0.5)
    with te.record() as tape:
        y = te.relu(net(x)).sum()
    before = torch.get_rng_state()
    program = tape.program(inputs=x, outputs=y)
    str(program), program.code
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", ["nothing", "loaded", "replayed", "data"])
def test_buffers_that_changed_between_two_recordings(how: str) -> None:
    """What happened to a module's buffers since another tape is of no concern to this one."""
    net, x = nn.BatchNorm1d(3).double(), draw(4, 3)
    saved = copy.deepcopy(net.state_dict())
    with te.record() as tape:
        y = net(x).sum()
    first = tape.program(inputs=x, outputs=y)
    if how == "loaded":
        net.load_state_dict(saved)
    elif how == "replayed":
        first.step(x)
    elif how == "data":
        net.num_batches_tracked.data.zero_()  # type: ignore[union-attr]
        net.running_mean.data.zero_()  # type: ignore[union-attr]
    with te.record() as tape:
        z = (net(x) * x).sum()
    program = tape.program(inputs=x, outputs=z)
    x, twin = draw(4, 3), copy.deepcopy(net)
    wanted = (twin(tracked := x.clone().requires_grad_()) * tracked).sum()
    (wanted_g,) = torch.autograd.grad(wanted, tracked)
    close(program.step(x), wanted.detach())
    close(g_of(x), wanted_g)
    assert_same_state(net, twin)
