"""LSTM layers of the native backend, forward and back, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tape_engine as te
from tape_engine.program.backends import native
from tests.helpers import plain

if not native.available() or not torch._C._has_mkldnn:
    pytest.skip("no kernels, or no LSTM layer of oneDNN's", allow_module_level=True)

from tape_engine.program.backends.native import recurrent

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are taken over whatever processor this is, and small ones too."""
    monkeypatch.setattr(recurrent, "blas_lags", lambda: True)
    monkeypatch.setattr(recurrent, "WORK", 1)


def ours(program: te.Program) -> tuple[int, int]:
    """How many layers are ours, forward and back."""
    text = program._step.source.text
    torchs = text.count("mkldnn_rnn_layer(") + text.count("mkldnn_rnn_layer_backward(")
    found = text.count("= lstm(") + text.count("= lstm_backward")
    return found, torchs


def loss(model: nn.LSTM, x: Tensor, *state: Tensor) -> Tensor:
    y, (h, c) = model(x, state)
    found: Tensor = y.square().mean() + h.sin().mean() + (c.cos() * 3).mean()
    return found


CASES: list[dict[str, Any]] = [
    {"batch_first": True, "num_layers": 2},
    {"bidirectional": True, "bias": False},
    {"batch_first": True, "num_layers": 2, "bidirectional": True},
]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers(case: dict[str, Any], parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gradient, of the inputs, the first states, and the parameters, on other inputs than those recorded."""
    monkeypatch.setattr(recurrent, "threads", lambda: parts)
    torch.manual_seed(0)
    B, T, H = 37, 9, 44
    model = nn.LSTM(20, H, **case)
    layers = model.num_layers * (1 + model.bidirectional)

    def drawn() -> list[Tensor]:
        x = torch.randn(B, T, 20) if model.batch_first else torch.randn(T, B, 20)
        return [x, torch.randn(layers, B, H), torch.randn(layers, B, H)]

    given = drawn()
    with te.record() as tape:
        C = loss(model, *given)
    program = tape.program(inputs=given, outputs=C, wrt=[*given, *model.parameters()], backend="native")
    assert ours(program) == (2 * layers, 0)
    for _ in range(2):
        given = drawn()
        leaves = [plain(each).requires_grad_() for each in given]
        C = loss(model, *leaves)
        wanted = torch.autograd.grad(C, [*leaves, *model.parameters()])
        torch.testing.assert_close(program(*given), C.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(program.step(*given), C.detach(), rtol=1e-5, atol=1e-6)
        for each, g in zip([*given, *model.parameters()], wanted, strict=True):
            torch.testing.assert_close(vars(each)["g"], g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_one_moment(case: dict[str, Any]) -> None:
    """Nothing comes before it: the gradient of the recurrent weights is that of the first state alone."""
    torch.manual_seed(0)
    model = nn.LSTM(20, 44, **case)
    layers = model.num_layers * (1 + model.bidirectional)
    state = torch.randn(layers, 32, 44), torch.randn(layers, 32, 44)
    x = torch.randn(1, 32, 20)
    with te.record() as tape:
        C = loss(model, x, *state)
    program = tape.program(inputs=(x,), outputs=C, wrt=list(model.parameters()), backend="native")
    assert ours(program) == (2 * layers, 0)
    x = torch.randn(1, 32, 20)
    wanted = torch.autograd.grad(loss(model, x, *state), list(model.parameters()))
    program.step(x)
    for each, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(vars(each)["g"], g, rtol=1e-4, atol=1e-6)


def test_rows_that_share_their_gradient() -> None:
    """A gradient that is the same for all rows may lie in memory once."""
    torch.manual_seed(0)
    T, B, H = 5, 32, 44
    model = nn.LSTM(20, H)
    x = torch.randn(T, B, 20)
    w, u, b, d = model.parameters()
    zeros = torch.zeros(B, H)
    states: list[Any] = [zeros, zeros, False, [], 2, H, 1, True, False, False, True]
    g = torch.randn(T, 1, H).expand(T, B, H)
    with torch.no_grad():
        out, h, c, note = recurrent.forward(x, w, u, b, d, *states)
        given: list[Any] = [x, w, u, b, d, zeros, zeros, out, h, c, g, zeros, zeros]
        given += [False, 2, H, 1, True, True, False, [], False, note]
        back: Any = recurrent._Backward((True,) * 7)
        found = back(*given)
    x.requires_grad_()
    wanted = torch.autograd.grad(model(x)[0], [x, w, u, b, d], g)
    for one, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_what_is_read_is_computed() -> None:
    """Of an input that is data no gradient is wanted: it is not computed, and those of both biases are apart."""
    model = nn.LSTM(20, 44)
    x = torch.randn(9, 32, 20)
    with te.record() as tape:
        C = model(x)[0].square().mean()
    parameters = list(model.parameters())
    program = tape.program(inputs=(x,), outputs=C, wrt=parameters, backend="native")
    gives = [each.gives for each in program._step.source.constants.values() if isinstance(each, recurrent._Backward)]
    assert gives == [(False, True, True, True, True, False, False)]
    x = torch.randn(9, 32, 20)
    wanted = torch.autograd.grad(model(x)[0].square().mean(), parameters)
    program.step(x)
    for each, g in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(vars(each)["g"], g, rtol=1e-4, atol=1e-7)
    assert vars(parameters[2])["g"].data_ptr() != vars(parameters[3])["g"].data_ptr()


def test_large_numbers_saturate() -> None:
    model = nn.LSTM(20, 44)
    x = torch.randn(9, 32, 20) * 1e4
    with te.record() as tape:
        C = model(x)[0].square().mean()
    program = tape.program(inputs=(x,), outputs=C, wrt=list(model.parameters()), backend="native")
    wanted = torch.autograd.grad(model(x)[0].square().mean(), list(model.parameters()))
    program.step(x)
    for each, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(vars(each)["g"], g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", ["few rows", "small state", "large state", "GRU", "packed", "double"])
def test_other_layers_are_torchs(case: str) -> None:
    """Where tiles were mostly empty, or the weights too large for a cache; another kind, another dtype."""
    B, H = (8 if case == "few rows" else 32), {"small state": 24, "large state": 300}.get(case, 44)
    model: Any = nn.GRU(20, H) if case == "GRU" else nn.LSTM(20, H)
    x = torch.randn(3, B, 20)
    if case == "double":
        model, x = model.double(), x.double()

    def function(x: Tensor) -> Tensor:
        if case == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3] * 20 + [2] * 12))
            return model(packed)[0].data.square().mean()  # type: ignore[no-any-return]
        return model(x)[0].square().mean()  # type: ignore[no-any-return]

    with te.record() as tape:
        C = function(x)
    program = tape.program(inputs=(x,), outputs=C, wrt=list(model.parameters()), backend="native")
    assert ours(program)[0] == 0
    x = torch.randn_like(x)
    torch.testing.assert_close(program.step(x), function(x).detach())


def test_a_layer_is_not_parted_from_its_gradient() -> None:
    """What it has noted is read by nobody else: where the user asks for it, the layer is torch's."""
    model = nn.LSTM(20, 44)
    x = torch.randn(9, 32, 20)
    with te.record() as tape:
        C = model(x)[0].square().mean()
    (layer,) = [node for node in tape.nodes if node.op.name.startswith("mkldnn_rnn_layer")]
    told = recurrent.calls([layer], lambda value: value, {layer.outputs[-1]})
    assert told(layer) is None
    told = recurrent.calls([layer], lambda value: value, set())
    assert told(layer) is not None
    assert C.numel() == 1


@pytest.mark.parametrize("rows", [32, 4])
def test_auto_is_native_where_a_layer_is_ours(rows: int) -> None:
    """Few rows are torch's, and so is then the whole program."""
    model, x = nn.LSTM(32, 64), torch.randn(6, rows, 32)
    state = torch.zeros(1, rows, 64), torch.zeros(1, rows, 64)
    with te.record() as tape:
        C = model(x, state)[0].sum()
    program = tape.program(inputs=(x,), outputs=C, wrt=list(model.parameters()), backend="auto")
    text = str(program)
    assert ("backend native" in text and "1 LSTM layer," in text) == (rows == 32), text
