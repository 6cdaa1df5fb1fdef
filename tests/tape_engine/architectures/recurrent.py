"""Networks over sequences: recurrent, state-space and linear ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .common import architecture, classified, labels, real

Tensor = torch.Tensor


class Recurrent(nn.Module):
    """One of torch's recurrent layers over embedded tokens; the last state tells the class."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(9, 4, padding_idx=0), layer, nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Any:
        out, _ = self.layer(self.embedding(tokens))
        return self.head(out[:, -1])


class Packed(nn.Module):
    """A bidirectional LSTM over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 4, bidirectional=True, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1]), batch_first=True)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(out.sum(1))


class Cells(nn.Module):
    """LSTM and GRU cells, called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        h = c = second = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h, c = self.first(step, (h, c))
            second = self.second(h, second)
        return self.head(second)


class Translator(nn.Module):
    """Sequence to sequence with additive attention; the decoder is given the right words half of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.encoder, self.decoder = nn.GRU(4, 5, batch_first=True), nn.GRUCell(9, 5)
        self.query, self.key, self.score = nn.Linear(5, 4), nn.Linear(5, 4, bias=False), nn.Linear(4, 1)
        self.head = nn.Linear(5, 9)

    def forward(self, source: Tensor, target: Tensor) -> Any:
        memory, state = self.encoder(self.source(source))
        state, word, out = state[0], target[:, 0], []
        for i in range(1, target.shape[1]):
            energy = self.score(torch.tanh(self.query(state)[:, None] + self.key(memory)))
            context = (energy.softmax(1) * memory).sum(1)
            state = self.decoder(torch.cat([self.target(word), context], 1), state)
            out.append(self.head(state))
            word = torch.where(torch.rand(len(word)) < 0.5, target[:, i], out[-1].argmax(1))
        return torch.stack(out, 1)


def translated(model: nn.Module, source: Tensor, target: Tensor) -> Any:
    scores = model(source, target)
    return F.cross_entropy(scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0, label_smoothing=0.1)


class SelectiveScan(nn.Module):
    """A Mamba block: a state space whose step depends on the input, the states written into one buffer."""

    def __init__(self, width: int = 4, size: int = 3) -> None:
        super().__init__()
        self.size = size
        self.ins, self.conv = nn.Linear(3, 2 * width), nn.Conv1d(width, width, 2, padding=1, groups=width)
        self.step, self.mix = nn.Linear(width, width), nn.Linear(width, 2 * size)
        self.decay = nn.Parameter(torch.arange(1.0, size + 1).log().repeat(width, 1))
        self.skip, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Any:
        length = x.shape[1]
        u, gate = self.ins(x).chunk(2, -1)
        u = F.silu(self.conv(u.mT)[..., :length].mT)
        step, (b, c) = F.softplus(self.step(u)), self.mix(u).split(self.size, -1)
        decay = torch.exp(step[..., None] * -self.decay.exp())
        drive = step[..., None] * b[:, :, None] * u[..., None]
        state, out = torch.zeros_like(decay[:, 0]), torch.empty_like(u)
        for t in range(length):
            state = state * decay[:, t] + drive[:, t]
            out[:, t] = (state * c[:, t, None]).sum(-1)
        return self.head(((out + u * self.skip) * F.silu(gate)).mean(1))


class StateSpace(nn.Module):
    """S4 with a diagonal matrix: the sequence is convolved with a kernel of complex exponentials, by the FFT."""

    def __init__(self, width: int = 3, size: int = 4) -> None:
        super().__init__()
        self.rate, self.turn = nn.Parameter(torch.rand(width, size)), nn.Parameter(torch.randn(width, size))
        self.out, self.norm = nn.Parameter(torch.randn(width, size, 2) / 2), nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Any:
        length = x.shape[1]
        exponent = torch.complex(-self.rate.exp(), self.turn)[..., None] * torch.arange(length) / 8
        kernel = 2 * torch.einsum("dn,dnl->dl", torch.view_as_complex(self.out), exponent.exp()).real
        spectrum = torch.fft.rfft(self.norm(x).mT, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length].mT
        return self.head(F.gelu(y + x).mean(1))


class LinearAttention(nn.Module):
    """A linear recurrence with a decay of its own for each head (retention), in its parallel form."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.decay, self.norm = nn.Linear(3, 12), nn.Parameter(torch.tensor([1.0, 2.0])), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        back = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        weight = torch.where(back >= 0, self.decay.sigmoid()[:, None, None] ** back.clamp(min=0), 0.0)
        out = (q @ k.mT * weight) @ v
        return self.head(self.norm(out.transpose(1, 2).flatten(2).mT).mean(2))


class MinimalGate(nn.Module):
    """A gated linear recurrence solved all at once, in logarithms, by a running sum (minGRU)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        keep, take = F.logsigmoid(-self.gate(x)), F.logsigmoid(self.gate(x))
        total = keep.cumsum(1)
        state = torch.exp(total + torch.logcumsumexp(take + F.softplus(self.value(x)).log() - total, 1))
        return self.head(state[:, -1])


def tokens() -> tuple[Tensor, ...]:
    return labels(9, 4, 6), labels(5, 4)


def sequences() -> tuple[Tensor, ...]:
    return real(3, 5, 3), labels(5, 3)


ARCHITECTURES = [
    architecture("RNN", lambda: Recurrent(nn.RNN(4, 5, batch_first=True), 5), tokens, classified),
    architecture("LSTM", lambda: Recurrent(nn.LSTM(4, 5, 2, dropout=0.3, batch_first=True), 5), tokens, classified),
    architecture(
        "LSTM with projection", lambda: Recurrent(nn.LSTM(4, 5, proj_size=3, batch_first=True), 3), tokens, classified
    ),
    architecture("GRU", lambda: Recurrent(nn.GRU(4, 5, 2, batch_first=True), 5), tokens, classified),
    architecture("packed bidirectional LSTM", Packed, sequences, classified),
    architecture("recurrent cells", Cells, sequences, classified),
    architecture("sequence to sequence", Translator, lambda: (labels(9, 3, 5), labels(9, 3, 4)), translated),
    architecture("Mamba", SelectiveScan, sequences, classified),
    architecture("S4", StateSpace, sequences, classified),
    architecture("retention", LinearAttention, sequences, classified),
    architecture("minGRU", MinimalGate, sequences, classified),
]
