"""Input at the rim: empty, single, expanded and overlapping tensors, NaN and inf, ties, equal eigenvalues, depth.

Each computation runs in a block and is swept, and is replayed on other input; both against torch.autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tape_engine as te
from tests.helpers import g_of, plain

Tensor = torch.Tensor
Function = Callable[..., Any]
F64, INF, NAN = torch.float64, float("inf"), float("nan")


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def of(*elements: Any) -> Tensor:
    return torch.tensor(elements, dtype=F64)


def weighted(out: Any) -> Tensor:
    """The sum of all floating outputs, each element with a weight of its own; NaN and inf are passed on."""
    total = torch.zeros((), dtype=F64)
    for t in (out,) if isinstance(out, Tensor) else out:
        if t.is_floating_point():
            weights = torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).reshape(t.shape)
            total = total + (t * weights).sum()
        elif t.is_complex():
            total = total + t.real.sum() + 2 * t.imag.sum()
    return total


def by_autograd(function: Function, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    tracked = [plain(t).requires_grad_(t.is_floating_point()) for t in inputs]
    loss = weighted(function(*tracked))
    asked = [t for t in tracked if t.requires_grad]
    found = iter(torch.autograd.grad(loss, asked, allow_unused=True) if loss.requires_grad else [None] * len(asked))
    return loss.detach(), [next(found) if t.requires_grad else None for t in tracked]


def same(inputs: list[Tensor], wanted: list[Tensor | None], tol: float = 1e-10) -> None:
    for t, reference in zip(inputs, wanted, strict=True):
        found = g_of(t)
        if found is None or reference is None:
            assert found is None or not found.any(), "a gradient where torch has none"
            assert reference is None or not reference.any(), "a gradient is missing"
            continue
        assert found.shape == t.shape
        torch.testing.assert_close(plain(found), reference, rtol=10 * tol, atol=tol, equal_nan=True)


def check(function: Function, *inputs: Tensor, others: list[Tensor] | None = None, tol: float = 1e-10) -> None:
    """Recorded and swept, and replayed on `others`, a computation gives what torch.autograd gives."""
    given = [plain(t) for t in inputs]
    value, wanted = by_autograd(function, given)
    with te.record(strict=True):
        loss = weighted(function(*given))
    torch.testing.assert_close(plain(loss), value, rtol=0.0, atol=0.0, equal_nan=True)
    if not any(t is not None for t in wanted):
        return
    te.backward(loss)
    same(given, wanted, tol)

    given = [plain(t) for t in inputs]
    with te.record() as tape:
        loss = weighted(function(*given))
    program = tape.program(inputs=given, outputs=loss)
    for again in [list(inputs), others or [plain(t).flip(0) if t.ndim else plain(t) for t in inputs]]:
        given = [plain(t) for t in again]
        value, wanted = by_autograd(function, given)
        got = program.step(*given)
        torch.testing.assert_close(plain(got), value, rtol=1e-10, atol=1e-12, equal_nan=True)
        same(given, wanted, tol)


# -- no elements, one element ----------------------------------------------------------------------------

EMPTY: dict[str, Function] = {
    "sum": lambda x: x.sum(),
    "sum of none": lambda x: x.sum(0),
    "mean": lambda x: x.sum(1).exp(),
    "prod": lambda x: x.prod(0),
    "pointwise": lambda x: (x.sin() * x + x.relu()) / 3,
    "matmul over nothing": lambda x: x.t() @ x,
    "matmul to nothing": lambda x: x @ torch.ones(3, 2, dtype=F64),
    "cat": lambda x: torch.cat([x, torch.ones(2, 3, dtype=F64), x]),
    "stack": lambda x: torch.stack([x, x * 2]),
    "softmax": lambda x: x.softmax(-1),
    "logsumexp": lambda x: x.logsumexp(1),
    "norm": lambda x: x.norm(dim=1),
    "linear": lambda x: F.linear(x, torch.ones(4, 3, dtype=F64), torch.ones(4, dtype=F64)),
    "layer norm": lambda x: F.layer_norm(x, (3,)),
    "conv": lambda x: F.conv1d(x[:, None], torch.ones(2, 1, 2, dtype=F64)),
    "index": lambda x: x[torch.zeros(0, dtype=torch.long)],
    "mask": lambda x: x[:, torch.zeros(3, dtype=torch.bool)],
    "gather": lambda x: x.gather(0, torch.zeros(0, 3, dtype=torch.long)),
    "index_add": lambda x: torch.ones(2, 3, dtype=F64).index_add(0, torch.zeros(0, dtype=torch.long), x),
    "scatter_add": lambda x: torch.ones(2, 3, dtype=F64).scatter_add(0, torch.zeros(0, 3, dtype=torch.long), x),
    "embedding": lambda x: F.embedding(torch.zeros(0, 2, dtype=torch.long), torch.cat([x, x.new_ones(1, 3)])),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(1).values,
    "pad": lambda x: F.pad(x, (1, 1, 2, 0)),
    "reshape": lambda x: x.reshape(3, 0).t().unsqueeze(1).expand(0, 5, 3),
    "split": lambda x: torch.cat([x.split(1, 1)[0], x.chunk(3, 1)[2]]),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "dropout": lambda x: F.dropout(x, 0.5),
    "where": lambda x: torch.where(x > 0, x, x * 2),
    "det": lambda x: torch.linalg.det(x[:, :, None] * x[:, None]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "written": lambda x: torch.ones(2, 3, dtype=F64).index_fill_(0, torch.tensor([0]), 0.0)[2:].add_(x),
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_elements(name: str) -> None:
    check(EMPTY[name], real(0, 3))


SINGLE: dict[str, Function] = {
    "pointwise": lambda x: x.sin() * x,
    "reductions": lambda x: x.sum() * x.mean() + x.prod() + x.max() + x.amin() + x.logsumexp(0) + x.norm(),
    "a dimension": lambda x: (
        x.sum(0) + x.cumsum(0) + x.cumprod(-1) + x.softmax(0) + x.max(0).values + x.median(0).values
    ),
    "views": lambda x: x.expand(2, 3).sum(0) + x.reshape(1, 1)[0] + x.unsqueeze(0).squeeze() + x.view(()) + x.t(),
    "index": lambda x: x[...] + x[None][0] + x[True].sum() + x.index_select(0, torch.tensor([0])).sum(),
    "gather": lambda x: x.gather(0, torch.tensor(0)) + x.take(torch.tensor([0, 0])).sum(),
    "sorted": lambda x: x.sort().values + x.topk(1).values.sum() + x.kthvalue(1).values + x.flip(()),
    "promoted": lambda x: (torch.ones(3) * x).double() + torch.arange(3) * x + 2 * x,
    "cat": lambda x: torch.stack([x, x * 2]) * torch.cat([x[None], x[None]]),
    "linear algebra": lambda x: (
        torch.dot(x[None], x[None]) + torch.linalg.det(x[None, None]) + torch.outer(x[None], x[None])
    ),
    "statistics": lambda x: x.var(correction=0) + x.std(correction=0) * 0,
    "written": lambda x: torch.zeros((), dtype=F64).copy_(x).mul_(x).add_(1),
}


@pytest.mark.parametrize("name", [name for name in SINGLE if name != "statistics"])
def test_no_dimensions(name: str) -> None:
    check(SINGLE[name], torch.tensor(0.7, dtype=F64), others=[torch.tensor(-1.2, dtype=F64)])


# -- memory that is seen several times -----------------------------------------------------------------

VIEWS: dict[str, Function] = {
    "expanded": lambda x: x[:1].expand(4, 4).exp() * x,
    "expanded and summed": lambda x: x[0].expand(3, 4).cumsum(0).prod(1),
    "expanded matmul": lambda x: x[:1].expand(4, 4) @ x,
    "expanded twice": lambda x: x[:, :1].expand(4, 4).reshape(2, 8).expand(3, 2, 8) ** 2,
    "unfold": lambda x: x.unfold(0, 3, 1).sin(),
    "unfold twice": lambda x: x.unfold(0, 2, 1).unfold(1, 3, 1) ** 2,
    "unfold of one": lambda x: x.reshape(-1).unfold(0, 5, 2).prod(1),
    "as_strided": lambda x: torch.as_strided(x * 1, (3, 4), (1, 2)) ** 2,
    "as_strided at one place": lambda x: torch.as_strided(x * 1, (3, 2), (0, 0), 5) ** 2,
    "as_strided of a leaf": lambda x: torch.as_strided(x, (2, 3), (2, 1), 3).exp(),
    "as_strided of a view": lambda x: torch.as_strided((x * 1).t()[1:], (2, 3), (4, 1), 2).exp(),
    "diagonal": lambda x: x.diagonal() * x.diagonal(1).sum() + x.diagonal(-2)[0],
    "overlapping products": lambda x: x.unfold(1, 2, 1)[:3] @ x.unfold(0, 2, 1).mT[..., :3],
    "im2col": lambda x: F.unfold(x[None, None], 2).square(),
    "fold": lambda x: F.fold(F.unfold(x[None, None], 2), (4, 4), 2).square(),
    "turned": lambda x: x.t().flip(0).roll(1, 1).rot90() * x.mT,
    "real and imaginary": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(8, 2)).conj() ** 2),
    "bits of itself": lambda x: x.view(torch.int64).view(torch.float64).detach() * x,
}


@pytest.mark.parametrize("name", VIEWS)
def test_memory_seen_several_times(name: str) -> None:
    check(VIEWS[name], real(4, 4))


@pytest.mark.parametrize(
    "leaf",
    [
        lambda: real(4, 1).expand(4, 4),
        lambda: real(1).expand(4, 4),
        lambda: real(20).as_strided((4, 4), (1, 2)),
        lambda: real(8, 8)[::2, 1::2],
        lambda: real(4, 4).t(),
        lambda: real(7).unfold(0, 4, 1),
    ],
    ids=["expanded", "one element", "overlapping", "sliced", "transposed", "windows"],
)
def test_leaves_that_lie_otherwise(leaf: Callable[[], Tensor]) -> None:
    """The gradient is that of the elements as they are seen, and lies in memory of its own."""
    x = leaf()
    dense = x.contiguous().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(weighted((dense.sin() @ dense, dense.unfold(0, 2, 1).exp())), dense)
    with te.record(strict=True):
        loss = weighted((x.sin() @ x, x.unfold(0, 2, 1).exp()))
    te.backward(loss)
    same([x], [wanted])
    found = g_of(x)
    assert found is not None
    before = plain(found)
    found[0, 0] += 1
    assert int((plain(found) != before).sum()) == 1, "two elements of a gradient are one"


# -- NaN and inf ---------------------------------------------------------------------------------------

ODD = of(NAN, INF, -INF, 0.0, -0.0, 1.0, -2.0, 1e308)

ALL: list[Function] = [
    torch.abs, torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.sin,
    torch.erf, torch.log1p, torch.expm1, torch.reciprocal, torch.square, torch.sign, torch.floor, torch.round,
    torch.frac, torch.nan_to_num, torch.asinh, torch.atan, torch.logit, torch.sinc, torch.lgamma,
    F.softplus, F.silu, F.gelu, F.elu, F.selu, F.leaky_relu, F.hardtanh, F.relu6, F.hardsigmoid, F.hardswish, F.mish,
    F.logsigmoid, F.softsign, F.tanhshrink, F.celu,
]  # fmt: skip

POINTWISE: dict[str, Function] = {f.__name__: f for f in ALL} | {
    "threshold": lambda x: F.threshold(x, 0.0, 5.0),
    "clamp": lambda x: x.clamp(-2, 1),
    "clamp_min": lambda x: x.clamp(min=0.0),
    "clip by a tensor": lambda x: x.clamp(torch.full((8,), -2.0, dtype=F64), torch.ones(8, dtype=F64)),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "minimum with itself": lambda x: torch.minimum(x, x * 1),
    "fmax": lambda x: torch.fmax(x, x.flip(0)),
    "fmin": lambda x: torch.fmin(x, x.flip(0)),
    "where": lambda x: torch.where(x.isfinite(), x, 0.0),
    "where of a bad branch": lambda x: torch.where(x > 0, x.log(), x * 2),
    "masked_fill": lambda x: x.masked_fill(x.isnan(), 0.0),
    "product": lambda x: x * x.flip(0),
    "quotient": lambda x: x / x.flip(0),
    "power": lambda x: x.abs() ** 0.5 + x**2 + x**0,
    "power of a tensor": lambda x: torch.pow(x, torch.tensor([2.0, 0.0, 1.0, 0.0, 3.0, 0.5, 2.0, 1.0], dtype=F64)),
    "xlogy": lambda x: torch.xlogy(x, x.flip(0)),
    "hypot": lambda x: torch.hypot(x, x.flip(0)),
    "atan2": lambda x: torch.atan2(x, x.flip(0)),
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(0)),
    "fmod": lambda x: torch.fmod(x, 3.0),
    "remainder": lambda x: torch.remainder(x, 3.0),
    "copysign": lambda x: torch.copysign(x, x.flip(0)),
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(0),
    "logsumexp": lambda x: x.logsumexp(0),
    "sum": lambda x: x.sum(),
    "nansum": lambda x: x.nansum(),
    "nanmean": lambda x: x.nanmean(),
    "mean": lambda x: x.mean(),
    "max": lambda x: x.max(),
    "max over a dimension": lambda x: x.max(0).values,
    "amax": lambda x: x.amax(0),
    "cumsum": lambda x: x.cumsum(0),
    "cummax": lambda x: x.cummax(0).values,
    "logcumsumexp": lambda x: x.logcumsumexp(0),
    "sort": lambda x: x.sort().values,
    "median": lambda x: x.median(),
    "nanmedian": lambda x: x.nanmedian(),
    "norm": lambda x: x.norm(),
    "norm of infinite order": lambda x: torch.linalg.vector_norm(x, ord=INF),
    "var": lambda x: x.var(),
    "lerp": lambda x: torch.lerp(x, x.flip(0), 0.3),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.flip(0), value=0.5),
    "matmul": lambda x: x.view(2, 4) @ x.view(4, 2),
    "huber": lambda x: F.huber_loss(x, torch.zeros(8, dtype=F64), reduction="none"),
    "cross entropy": lambda x: F.cross_entropy(x.view(2, 4), torch.tensor([1, 3]), reduction="none"),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_nan_and_inf(name: str) -> None:
    check(POINTWISE[name], ODD)


@pytest.mark.parametrize(
    "function", [lambda a, b: (a**b) ** -1, lambda a, b: (0.0**b).log() + a, lambda a, b: (a**2).sqrt() * b]
)
def test_an_infinite_slope_after_a_power_of_zero(function: Function) -> None:
    """A slope of 0 times one that is infinite is not known, and is no 0."""
    check(function, of(0, 0, 2, 0, 3), of(2, -1, -1, 0, 1))


def test_rows_without_anything_to_attend_to() -> None:
    """A softmax over minus infinities alone is NaN in torch, and 0 in its attention."""
    mask = torch.tensor([[True, True], [False, False]])

    def attention(x: Tensor) -> Any:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    def by_hand(x: Tensor) -> Any:
        return (x @ x.mT).masked_fill(~mask, -INF).softmax(-1) @ x

    check(attention, real(1, 2, 3))
    check(by_hand, real(1, 2, 3))


# -- kinks ---------------------------------------------------------------------------------------------

TIED = of([1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 2.0, -1.0, 2.0])

TIES: dict[str, Function] = {
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max over a dimension": lambda x: x.max(1).values,
    "min over a dimension": lambda x: x.min(0, keepdim=True).values,
    "amax": lambda x: x.amax(1),
    "amax of all": lambda x: x.amax(),
    "amin": lambda x: x.amin((0, 1)),
    "aminmax": lambda x: x.aminmax(dim=1),
    "sort": lambda x: torch.sort(x, dim=1, stable=True).values,
    "argsort": lambda x: x.gather(1, torch.argsort(x, dim=1, stable=True)),
    "msort": lambda x: torch.msort(x),
    "median": lambda x: x.median(),
    "median over a dimension": lambda x: x.median(1).values,
    "mode": lambda x: x.mode(1).values,
    "kthvalue": lambda x: x.kthvalue(2, 1).values,
    "topk": lambda x: x.topk(2, 1).values,
    "cummax": lambda x: x.cummax(1).values,
    "cummin": lambda x: x.cummin(0).values,
    "cumprod": lambda x: x.cumprod(1),
    "prod": lambda x: x.prod(1),
    "prod of all": lambda x: x.prod(),
    "quantile": lambda x: x.quantile(torch.tensor([0.25, 0.5], dtype=F64), dim=1),
    "maximum": lambda x: torch.maximum(x, x.roll(1, 1)),
    "minimum": lambda x: torch.minimum(x, torch.zeros_like(x)),
    "fmax": lambda x: torch.fmax(x, x.roll(1, 1)),
    "relu": torch.relu,
    "relu6": lambda x: F.relu6(x * 3),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "abs": torch.abs,
    "sign": torch.sign,
    "clamp": lambda x: x.clamp(0, 2),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(2),
    "clamp crossed": lambda x: x.clamp(2, 0),
    "clamp by tensors": lambda x: x.clamp(torch.zeros_like(x), torch.full_like(x, 2)),
    "hardtanh": lambda x: F.hardtanh(x, -1, 2),
    "hardsigmoid": lambda x: F.hardsigmoid(x * 3),
    "hardswish": lambda x: F.hardswish(x * 3),
    "softshrink": lambda x: F.softshrink(x, 1.0),
    "hardshrink": lambda x: F.hardshrink(x, 1.0),
    "threshold": lambda x: F.threshold(x, 0.0, 7.0),
    "l1 loss": lambda x: F.l1_loss(x, x.detach().roll(1, 1), reduction="none"),
    "smooth l1 loss": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), beta=1.0, reduction="none"),
    "huber loss": lambda x: F.huber_loss(x, torch.zeros_like(x), delta=2.0, reduction="none"),
    "hinge": lambda x: F.hinge_embedding_loss(x, torch.where(x.detach() > 0, 1.0, -1.0), reduction="none"),
    "max pool": lambda x: F.max_pool2d(x[None], 2, 1),
    "adaptive max pool": lambda x: F.adaptive_max_pool1d(x, 2),
    "norm at zero": lambda x: x.norm(dim=1),
    "1-norm": lambda x: x.norm(1, dim=1),
    "infinite norm": lambda x: torch.linalg.vector_norm(x, INF, dim=1),
    "distance to itself": lambda x: torch.cdist(x, x.detach() * 1),
    "distances": lambda x: torch.cdist(x, x),
    "pairwise distances": lambda x: F.pairwise_distance(x, x.detach().roll(1, 0)),
    "cosine": lambda x: F.cosine_similarity(x, x.roll(1, 0), dim=1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "standard deviation": lambda x: x.std(1),
    "round": torch.round,
    "fmod": lambda x: torch.fmod(x, 2.0),
    "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "sinc": torch.sinc,
    "power": lambda x: x**2 + x**0 + x**1,
    "xlogy": lambda x: torch.xlogy(x.abs(), x.abs()),
    "atan2": lambda x: torch.atan2(x, x.roll(1, 1)),
    "log of a sum": lambda x: torch.logaddexp(x, x),
    "scatter amax": lambda x: torch.zeros(3, 2, dtype=F64).scatter_reduce(
        1, torch.tensor([[0, 0, 1, 1]] * 3), x, "amax"
    ),
    "scatter prod": lambda x: torch.ones(3, 2, dtype=F64).scatter_reduce(
        1, torch.tensor([[0, 0, 1, 1]] * 3), x, "prod"
    ),
    "bag by max": lambda x: F.embedding_bag(torch.tensor([[0, 2, 0], [1, 1, 2]]), x, mode="max"),
}


@pytest.mark.parametrize("name", TIES)
def test_ties_and_kinks(name: str) -> None:
    check(TIES[name], TIED)


# -- one place named several times ---------------------------------------------------------------------

TWICE = torch.tensor([0, 2, 2, 0, 2])

DUPLICATES: dict[str, Function] = {
    "index": lambda x, y: x[TWICE] * y,
    "index by two": lambda x, y: x[TWICE, TWICE % 2] * y[:, 0],
    "index a column": lambda x, y: (x[:, [1, 1, 0]] ** 2).sum() * y,
    "index_select": lambda x, y: x.index_select(0, TWICE) * y,
    "gather": lambda x, y: x.gather(0, TWICE[:, None].expand(5, 3)) * y,
    "take": lambda x, y: x.take(TWICE) * y[:, 0],
    "take_along_dim": lambda x, y: torch.take_along_dim(x, TWICE[:, None], 0) * y,
    "embedding": lambda x, y: F.embedding(TWICE, x) * y,
    "embedding with padding": lambda x, y: F.embedding(TWICE, x, padding_idx=2) * y,
    "embedding by frequency": lambda x, y: F.embedding(TWICE, x, scale_grad_by_freq=True) * y,
    "bag": lambda x, y: F.embedding_bag(TWICE[None], x, mode="sum") * y,
    "weighted bag": lambda x, y: F.embedding_bag(TWICE[None], x, mode="sum", per_sample_weights=y[None, :, 0]),
    "repeat_interleave": lambda x, y: x.repeat_interleave(torch.tensor([2, 0, 3, 0]), 0) * y,
    "index_add": lambda x, y: x.index_add(0, TWICE, y, alpha=2) ** 2,
    "index_add_": lambda x, y: (x * 1).index_add_(0, TWICE, y) ** 2,
    "scatter_add": lambda x, y: x.scatter_add(0, TWICE[:, None].expand(5, 3), y) ** 2,
    "accumulated": lambda x, y: x.index_put((TWICE,), y, accumulate=True) ** 2,
    "accumulated in place": lambda x, y: (x * 1).index_put_((TWICE,), y, accumulate=True) ** 2,
    "put": lambda x, y: x.put(TWICE, y[:, 0], accumulate=True) ** 2,
    "sums": lambda x, y: x.scatter_reduce(0, TWICE[:, None].expand(5, 3), y, "sum") ** 2,
    "means": lambda x, y: x.scatter_reduce(0, TWICE[:, None].expand(5, 3), y, "mean", include_self=False) ** 2,
    "products": lambda x, y: x.scatter_reduce(0, TWICE[:, None].expand(5, 3), y, "prod") ** 2,
    "greatest": lambda x, y: x.scatter_reduce(0, TWICE[:, None].expand(5, 3), y, "amax") ** 2,
    "index_reduce": lambda x, y: x.index_reduce(0, TWICE, y, "mean") ** 2,
    "filled": lambda x, y: x.index_fill(0, TWICE, 3.0) ** 2 * y.sum(),
    "one number put": lambda x, y: x.index_put((TWICE,), torch.tensor(2.0, dtype=F64)) ** 2 * y.sum(),
    "masked_scatter": lambda x, y: x.masked_scatter(x > 0, y) ** 2,
    "an operand twice": lambda x, y: torch.cat([x, x, y, x]).square() + torch.cat([x, y, x, x]),
    "einsum of one": lambda x, y: torch.einsum("ij,ij,kj->k", x, x, y),
    "rows written twice": lambda x, y: written(x, y),
}


def written(x: Tensor, y: Tensor) -> Tensor:
    """Several writes to one place: the last one counts."""
    z = x * 1
    for i in TWICE.tolist():
        z[i] = y[i] * (i + 1)
        z[i, 1:] *= 2
    return z**2


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", DUPLICATES)
def test_duplicate_indices(name: str) -> None:
    check(DUPLICATES[name], real(4, 3), real(5, 3))


def test_a_write_to_one_place_twice_goes_to_the_one_that_is_left() -> None:
    """Without `accumulate` torch leaves open which one it is, and gives both the gradient of the place."""

    def put(x: Tensor, y: Tensor) -> Tensor:
        return x.index_put((TWICE,), y) ** 2

    check(put, real(4, 3), real(5, 3))


# -- equal eigenvalues and singular matrices -------------------------------------------------------------

MATRICES = {
    "identity": torch.eye(3, dtype=F64),
    "twofold": torch.diag(of(2.0, 2.0, 5.0)),
    "zero": torch.zeros(3, 3, dtype=F64),
    "of rank 1": torch.diag(of(2.0, 0.0, 0.0)),
}

SPECTRAL: dict[str, Function] = {
    "eigenvalues": torch.linalg.eigvalsh,
    "eigenvectors": lambda x: torch.linalg.eigh(x).eigenvectors.abs(),
    "values of eigh": lambda x: torch.linalg.eigh(x).eigenvalues,
    "singular values": torch.linalg.svdvals,
    "singular vectors": lambda x: torch.linalg.svd(x).U.abs(),
    "values of svd": lambda x: torch.linalg.svd(x).S,
    "nuclear norm": lambda x: torch.linalg.matrix_norm(x, "nuc"),
    "spectral norm": lambda x: torch.linalg.matrix_norm(x, 2),
    "condition": lambda x: torch.linalg.cond(x + torch.eye(3, dtype=F64)),
    "determinant": torch.linalg.det,
    "logarithm of the determinant": lambda x: torch.linalg.slogdet(x).logabsdet,
    "logdet": torch.logdet,
    "pseudo-inverse": lambda x: torch.linalg.pinv(x + torch.eye(3, dtype=F64)),
    "exponential": torch.linalg.matrix_exp,
    "power": lambda x: torch.linalg.matrix_power(x, 3),
    "qr": lambda x: torch.linalg.qr(x + torch.eye(3, dtype=F64)).R,
    "least squares": lambda x: torch.linalg.lstsq(x + torch.eye(3, dtype=F64), torch.ones(3, 2, dtype=F64)).solution,
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", SPECTRAL)
def test_equal_eigenvalues(name: str, matrix: str) -> None:
    function = SPECTRAL[name]
    try:
        by_autograd(function, [MATRICES[matrix]])
    except RuntimeError as refused:  # of torch: a QR of a singular matrix
        with pytest.raises(type(refused)), te.record():
            te.backward(weighted(function(plain(MATRICES[matrix]))))
        return
    # the gradient of a singular determinant is a limit, taken from a root of a rounding away
    tol = 1e-7 if name == "determinant" else 1e-10
    check(function, MATRICES[matrix], others=[real(3, 3) @ MATRICES["twofold"]], tol=tol)


# -- depth and use -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_depth(depth: int) -> None:
    """A chain of which each turn is its own operation: the closed form is a power."""
    x, w = of(0.5), of(1.0 + 1.0 / depth)
    with te.record():
        y = x
        for _ in range(depth):
            y = y * w
    te.backward(y)
    power = (1.0 + 1.0 / depth) ** depth
    torch.testing.assert_close(g_of(x), of(power), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(g_of(w), of(0.5 * depth * power / (1.0 + 1.0 / depth)), rtol=1e-9, atol=0.0)


def test_a_deep_chain_is_replayed() -> None:
    x, w = of(0.5), of(1.001)
    with te.record() as tape:
        y = x
        for _ in range(3_000):
            y = y * w
    program = tape.program(inputs=x, outputs=y)
    other = of(-2.0)
    torch.testing.assert_close(program.step(other), of(-2.0 * 1.001**3000), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(g_of(other), of(1.001**3000), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(g_of(w), of(-2.0 * 3000 * 1.001**2999), rtol=1e-9, atol=0.0)


USES: dict[str, Function] = {
    "in a thousand operations": lambda x: sum((x * (i / 1000)).sin() for i in range(1000)),
    "a thousand times in one": lambda x: torch.cat([x] * 1000).square() * torch.arange(4000),
    "in a stack": lambda x: torch.stack([x] * 1000, 1) @ torch.linspace(0, 1, 1000, dtype=F64),
    "by itself": lambda x: torch.einsum("i,i,i,i->", x, x, x, x),
    "by a thousand views": lambda x: torch.stack([x[i % 4] * i for i in range(1000)]),
    "through a write": lambda x: added(x),
}


def added(x: Tensor) -> Tensor:
    total = torch.zeros(4, dtype=F64)
    for i in range(1000):
        total += x * (i % 7)
    return total**2


@pytest.mark.parametrize("name", USES)
def test_a_tensor_used_a_thousand_times(name: str) -> None:
    check(USES[name], real(4))


@pytest.mark.parametrize("affine", [False, True])
def test_statistics_that_are_columns_have_the_gradient_of_their_copies(affine: bool) -> None:
    """Torch's kernel takes it that their elements lie one after the other, and gives another gradient."""
    x, weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.rand(3, dtype=torch.float64) + 0.5
    table = torch.rand(3, 4, dtype=torch.float64) + 0.5
    given = weight.requires_grad_() if affine else None
    leaves = [x, weight] if affine else [x]
    expected = F.batch_norm(x, table[:, 0].clone(), table[:, 2].clone(), given, None, False)
    theirs = torch.autograd.grad(expected.sin().sum(), leaves)
    with te.record():
        C = F.batch_norm(x, table[:, 0], table[:, 2], given, None, False).sin().sum()
    for ours, gradient in zip(te.grad(C, leaves), theirs, strict=True):
        torch.testing.assert_close(ours, gradient)
