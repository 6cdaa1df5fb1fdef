"""Networks of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .common import architecture, classified, labels, real

Tensor = torch.Tensor


class Encoder(nn.Module):
    """Torch's own encoder layers, with positions and a mask of what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(9, 4), nn.Parameter(torch.randn(5, 4) / 5)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True, activation="gelu")
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Any:
        padding = torch.arange(5) >= torch.tensor([[5], [4], [2]])
        return self.head(self.body(self.embedding(tokens) + self.positions, src_key_padding_mask=padding)[:, 0])


class Causal(nn.Module):
    """A block of GPT: causal attention, then a perceptron, each behind its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Any:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, 2)
        q, k, v = (each.view(batch, length, self.heads, -1).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Its last layer's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(8, 4)
        self.blocks, self.norm = nn.ModuleList(Causal(4, 2) for _ in range(2)), nn.LayerNorm(4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Any:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_word(model: nn.Module, tokens: Tensor) -> Any:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Llama(nn.Module):
    """RMS norm, rotary positions, grouped heads, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm1, self.norm2 = nn.Embedding(9, 8), nn.RMSNorm(8), nn.RMSNorm(8)
        self.q, self.kv, self.out = nn.Linear(8, 8, False), nn.Linear(8, 8, False), nn.Linear(8, 8, False)
        self.up, self.gate, self.down = nn.Linear(8, 12, False), nn.Linear(8, 12, False), nn.Linear(12, 8, False)
        self.head = nn.Linear(8, 9, bias=False)
        angles = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def rotate(self, x: Any) -> Tensor:
        angles = torch.view_as_real(self.get_buffer("turns")[: x.shape[2]]).to(x)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(angles)
        return torch.view_as_real(turned).flatten(3)

    def forward(self, tokens: Tensor) -> Any:
        x = self.words(tokens)
        h = self.norm1(x)
        q = self.q(h).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = self.kv(h).chunk(2, -1)
        k, v = k.unsqueeze(1).repeat_interleave(2, 1), v.unsqueeze(1).expand(-1, 2, -1, -1)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 4, 2, stride=2), nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 10, 4))
        self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.body(x)[:, 0])


class CrossAttention(nn.Module):
    """A Perceiver: a few learnt queries ask a long input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.attention = nn.Parameter(torch.randn(2, 4)), nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
        self.head = nn.Bilinear(4, 4, 5)

    def forward(self, x: Tensor) -> Any:
        given = x.transpose(0, 1)
        out, weights = self.attention(self.queries[:, None].repeat(1, len(x), 1), given, given)
        return self.head(out[0], out[1]) + weights.amax((1, 2))[:, None]


class Windows(nn.Module):
    """Swin: attention inside windows that are shifted, with a bias for the relative place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias, self.head = nn.Linear(3, 12), nn.Parameter(torch.randn(9)), nn.Linear(4, 5)
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        self.register_buffer(
            "relative", (((places[:, :, None] - places[:, None]) + 1) * torch.tensor([[[3]], [[1]]])).sum(0)
        )

    def forward(self, x: Tensor) -> Any:
        x = (
            x.roll((-1, -1), (1, 2))
            .unfold(1, 2, 2)
            .unfold(2, 2, 2)
            .permute(0, 1, 2, 4, 5, 3)
            .flatten(3, 4)
            .flatten(0, 2)
        )
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.mT / 2 + self.bias[self.get_buffer("relative")]).softmax(-1)
        return self.head((weights @ v).unflatten(0, (-1, 4)).mean((1, 2)))


class Decoder(nn.Module):
    """Torch's whole transformer: an encoder, and a decoder under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.body = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 9)

    def forward(self, source: Tensor, target: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        return self.head(self.body(self.words(source), self.words(target), tgt_mask=mask, tgt_is_causal=True))


def translated(model: nn.Module, source: Tensor, target: Tensor) -> Any:
    return F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())


class Memory(nn.Module):
    """A memory network: a question reads a story several times, each sentence a bag of words."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values, self.question = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.turn, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 5)

    def forward(self, story: Tensor, question: Tensor) -> Any:
        state = self.question(question).sum(1)
        keys, values = self.keys(story).sum(2), self.values(story).sum(2)
        for _ in range(3):
            weights = torch.einsum("bsd,bd->bs", keys, state).softmax(1)
            state = self.turn(state) + torch.einsum("bs,bsd->bd", weights, values)
        return self.head(state)


class TuringMachine(nn.Module):
    """A differentiable memory that is written to: erased and added, by the likeness to a key."""

    def __init__(self) -> None:
        super().__init__()
        self.control, self.key, self.strength = nn.GRUCell(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)
        self.erase, self.add, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Any:
        memory, state = torch.full((len(x), 4, 3), 0.1, dtype=x.dtype), x.new_zeros(len(x), 4)
        memory = memory + torch.linspace(0, 0.3, 4)[:, None]
        for step in x.unbind(1):
            state = self.control(step, state)
            likeness = F.cosine_similarity(memory, self.key(state)[:, None], dim=-1)
            weight = (F.softplus(self.strength(state)) * likeness).softmax(1)[..., None]
            memory = memory * (1 - weight * self.erase(state).sigmoid()[:, None]) + weight * self.add(state)[:, None]
        return self.head((weight * memory).sum(1))


class Experts(nn.Module):
    """A mixture of experts: each token goes to the two best, sorted by expert, and comes back by `index_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(4, 3, bias=False), nn.Parameter(torch.randn(3, 4, 6) / 2)
        self.down, self.head = nn.Parameter(torch.randn(3, 6, 4) / 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        probabilities = self.router(x).softmax(-1)
        weights, chosen = probabilities.topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        rows = torch.arange(len(x)).repeat_interleave(2)
        order = chosen.flatten().argsort(stable=True)
        rows, expert = rows[order], chosen.flatten()[order]
        hidden = F.silu(torch.bmm(x[rows][:, None], self.up[expert]))
        made = torch.bmm(hidden, self.down[expert])[:, 0] * weights.flatten()[order][:, None]
        out = torch.zeros_like(x).index_add(0, rows, made)
        share = F.one_hot(chosen, 3).to(x).mean((0, 1))
        return self.head(out + x), 3 * (share * probabilities.mean(0)).sum()


class MaskedExperts(Experts):
    """The same with a loop over the experts, each given as many tokens as chose it: the shapes are data."""

    def forward(self, x: Tensor) -> Any:
        probabilities = self.router(x).softmax(-1)
        weights, chosen = probabilities.topk(2, -1)
        out = torch.zeros_like(x)
        for i in range(3):
            rows, places = torch.where(chosen == i)
            made = F.silu(x[rows] @ self.up[i]) @ self.down[i]
            out.index_add_(0, rows, made * weights[rows, places, None])
        return self.head(out + x), probabilities.var(0).sum()


def balanced(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    scores, balance = model(x)
    return F.cross_entropy(scores, y) + 0.1 * balance


ARCHITECTURES = [
    architecture("Transformer encoder", Encoder, lambda: (labels(9, 3, 5), labels(5, 3)), classified),
    architecture("GPT", Gpt, lambda: (labels(9, 3, 6),), next_word),
    architecture("Llama", Llama, lambda: (labels(9, 3, 6),), next_word),
    architecture("ViT", VisionTransformer, lambda: (real(3, 1, 6, 6), labels(5, 3)), classified),
    architecture("cross attention", CrossAttention, lambda: (real(3, 6, 3), labels(5, 3)), classified),
    architecture("Swin", Windows, lambda: (real(2, 4, 4, 3), labels(5, 2)), classified),
    architecture("Transformer", Decoder, lambda: (labels(9, 3, 5), labels(9, 3, 5)), translated),
    architecture(
        "memory network",
        Memory,
        lambda: (labels(9, 3, 4, 5), labels(9, 3, 4), labels(5, 3)),
        lambda model, story, question, y: F.cross_entropy(model(story, question), y),
    ),
    architecture("neural Turing machine", TuringMachine, lambda: (real(3, 4, 3), labels(5, 3)), classified),
    architecture("mixture of experts", Experts, lambda: (real(6, 4), labels(5, 6)), balanced),
    architecture("masked experts", MaskedExperts, lambda: (real(6, 4), labels(5, 6)), balanced, decides=True),
]
