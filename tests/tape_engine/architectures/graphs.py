"""Networks on graphs and sets, and embeddings of words."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .common import architecture, classified, labels, real

Tensor = torch.Tensor


class GraphConvolutions(nn.Module):
    """GCN: features averaged over the neighbours, by a dense and normalised adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Any:
        adjacency = torch.eye(len(x), dtype=x.dtype)
        adjacency[edges[0], edges[1]] = 1.0
        adjacency[edges[1], edges[0]] = 1.0
        scale = adjacency.sum(1).rsqrt()
        adjacency = scale[:, None] * adjacency * scale
        return self.second(adjacency @ F.relu(self.first(adjacency @ x)))


class GraphAttention(nn.Module):
    """GAT: the softmax over the edges that end at a node, by scatter operations."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.ends, self.head = (
            nn.Linear(4, 6, bias=False),
            nn.Parameter(torch.randn(2, 6)),
            nn.Linear(6, 5),
        )

    def forward(self, x: Tensor, edges: Tensor) -> Any:
        source, target = torch.cat([edges, torch.arange(len(x)).expand(2, -1)], 1)
        h = self.values(x)
        score = F.leaky_relu((h @ self.ends[0])[source] + (h @ self.ends[1])[target], 0.2)
        highest = score.new_full((len(x),), -torch.inf).scatter_reduce(0, target, score, "amax")
        weight = (score - highest[target]).exp()
        total = torch.zeros_like(highest).scatter_add(0, target, weight)
        message = (weight / total[target])[:, None] * h[source]
        return self.head(F.elu(torch.zeros_like(h).index_add_(0, target, message)))


class MessagePassing(nn.Module):
    """Messages along the edges, summed at the nodes; their states go through a GRU; the graph is read off by sets."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.GRUCell(6, 4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Any:
        for _ in range(2):
            sent = self.message(torch.cat([x.index_select(0, edges[0]), x.index_select(0, edges[1])], 1))
            x = self.update(torch.zeros(len(x), 6, dtype=x.dtype).index_add(0, edges[1], sent), x)
        rows = graph[:, None].expand_as(x)
        mean = x.new_zeros(3, 4).scatter_reduce(0, rows, x, "mean", include_self=True)
        most = x.new_zeros(3, 4).scatter_reduce(0, rows, x, "amax", include_self=True)
        return self.head(torch.cat([mean, most], 1))


class DeepSets(nn.Module):
    """A function of a set: each element by itself, summed, and a mask for those that are not there."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.whole = nn.Sequential(nn.Linear(3, 6), nn.Softsign()), nn.Sequential(nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Any:
        h = self.each(x)
        missing = (torch.arange(x.shape[1]) >= torch.tensor([[4], [2], [3]]))[..., None]
        total = h.masked_fill(missing, 0.0).sum(1)
        return self.whole(torch.cat([total, h.masked_fill(missing, -torch.inf).amax(1)], 1))


class PointCloud(nn.Module):
    """Each point with its nearest neighbours (DGCNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.head = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Any:
        near = torch.cdist(x, x).topk(3, largest=False).indices[..., 1:]
        index = near.flatten(1)[..., None].expand(-1, -1, 3)
        neighbours = x.gather(1, index).view(*near.shape, 3)
        pairs = torch.cat([x[:, :, None].expand_as(neighbours), neighbours - x[:, :, None]], -1)
        return self.head(F.leaky_relu(self.edge(pairs)).amax(2).mean(1))


class Word2Vec(nn.Module):
    """Skip-grams with negative samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.contexts = nn.Embedding(11, 4), nn.Embedding(11, 4)

    def forward(self, words: Tensor, contexts: Tensor) -> Any:
        drawn = torch.randint(11, (len(words), 3))
        centre = self.words(words)
        right = F.logsigmoid((centre * self.contexts(contexts)).sum(1))
        wrong = F.logsigmoid(-(self.contexts(drawn) @ centre[..., None])[..., 0]).sum(1)
        return -(right + wrong).mean()


class BagOfWords(nn.Module):
    """fastText: the mean of the embeddings of a text's words, the texts given by their offsets."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 4, mode=mode), nn.Linear(4, 5)

    def forward(self, words: Tensor) -> Any:
        return self.head(self.bag(words.flatten(), torch.tensor([0, 5, 7])))


class Recommender(nn.Module):
    """Matrix factorisation of a table of which a few entries are known."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(5, 3, max_norm=None), nn.Embedding(7, 3)
        self.mean, self.of_user = nn.Parameter(torch.tensor(0.1)), nn.Embedding(5, 1)

    def forward(self, users: Tensor, items: Tensor) -> Any:
        return self.mean + self.of_user(users).squeeze(-1) + (self.users(users) * self.items(items)).sum(-1)


def graph() -> tuple[Tensor, ...]:
    return real(7, 4), torch.randint(7, (2, 12)), labels(5, 7)


def of_nodes(model: nn.Module, x: Tensor, edges: Tensor, y: Tensor) -> Any:
    return F.cross_entropy(model(x, edges), y)


ARCHITECTURES = [
    architecture("GCN", GraphConvolutions, graph, of_nodes),
    architecture("GAT", GraphAttention, graph, of_nodes),
    architecture(
        "message passing",
        MessagePassing,
        lambda: (real(7, 4), torch.randint(7, (2, 12)), torch.tensor([0, 0, 0, 1, 1, 2, 2]), labels(5, 3)),
        lambda model, x, edges, of, y: F.cross_entropy(model(x, edges, of), y),
    ),
    architecture("Deep Sets", DeepSets, lambda: (real(3, 4, 3), labels(5, 3)), classified),
    architecture("point cloud", PointCloud, lambda: (real(2, 6, 3), labels(5, 2)), classified),
    architecture(
        "word2vec",
        Word2Vec,
        lambda: (labels(11, 6), labels(11, 6)),
        lambda model, words, contexts: model(words, contexts),
    ),
    architecture("bag of words, mean", lambda: BagOfWords("mean"), lambda: (labels(11, 10), labels(5, 3)), classified),
    architecture("bag of words, max", lambda: BagOfWords("max"), lambda: (labels(11, 10), labels(5, 3)), classified),
    architecture(
        "matrix factorisation",
        Recommender,
        lambda: (labels(5, 8), labels(7, 8), real(8)),
        lambda model, users, items, y: F.huber_loss(model(users, items), y),
    ),
]
