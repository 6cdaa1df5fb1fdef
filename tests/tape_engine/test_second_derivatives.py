"""Every second derivative of PyTorch's own operator samples: the sweep recorded, and swept again.

Of each OpInfo that says it has a second derivative (``supports_gradgrad``; 531 of the 540 in torch 2.13) the first
samples are recorded (strict) and swept with ``record=True``; the gradients, weighed at random, are swept again and
compared with double backward of ``torch.autograd``. All samples, some 13,000, with

    TAPE_ENGINE_OPINFO_SAMPLES=all python3 dev.py test tests/tape_engine/test_second_derivatives.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine.errors import MissingRuleError
from tests.tape_engine.opinfo import (
    as_it_is,
    call_of,
    cases,
    check_second,
    compare,
    dotted,
    plain,
    samples,
    survey,
    title,
    weights,
)

Tensor = torch.Tensor

#: Whose first rule is a kernel of ATen that has no rule itself; they are refused by name.
REFUSED = {
    "nn.functional.linear_cross_entropy.chunked": "no rule",
    "nn.functional.linear_cross_entropy.chunked_none": "no rule",
    "sparse.sampled_addmm": "no rule for sparse tensors",
    "to_sparse": "no rule for sparse tensors",
}

#: Where torch itself has no second derivative of any sample, whatever OpInfo says, or refuses the sample.
WITHOUT_REFERENCE = {
    "as_strided_scatter",  # its first derivative is wrong already
    "chalf",
    "grid_sampler_2d",  # these three are held against finite differences below
    "grid_sampler_3d",
    "max_pool2d_with_indices_backward",
    "nn.functional.ctc_loss",
    "nn.functional.grid_sample",
    "sparse.sampled_addmm",
}


def has_second(op: object) -> bool:
    return bool(getattr(op, "supports_gradgrad", False))


def test_every_second_derivative(record_property: Callable[[str, object], None]) -> None:
    found = survey(check_second, among=has_second)
    record_property(
        "count", f"OpInfo, second derivatives: {len(found.right)} of {found.total} ({found.compared} samples)"
    )
    told = [f"{name}: {text}" for name, text in found.wrong.items()]
    assert not told, f"{len(told)} wrong:\n\n" + "\n\n".join(told)
    assert set(found.refused) <= set(REFUSED), {n: t for n, t in found.refused.items() if n not in REFUSED}
    assert set(found.without_reference) <= WITHOUT_REFERENCE, found.without_reference
    assert len(found.right) >= 0.95 * found.total


#: Held against finite differences as well, for double backward of torch rests on the same formulas.
BY_DIFFERENCES = (
    "tanh softmax nn.functional.gelu nn.functional.layer_norm nn.functional.conv2d linalg.inv linalg.solve "
    "cumprod logsumexp nn.functional.batch_norm atan2 prod matmul nn.functional.embedding linalg.matrix_exp"
).split()


@pytest.mark.parametrize("op", [op for op in cases() if title(op) in BY_DIFFERENCES], ids=title)
def test_a_second_derivative_by_finite_differences(op: object) -> None:
    """The gradient of a weighed gradient, along a random direction, by central differences of the first gradients."""
    sample = next(s for s in samples(op, 0) if s.input.numel())
    call = call_of(as_it_is(op), sample, plain, track=False)  # type: ignore[arg-type]
    with torch.no_grad():
        factors = weights(call(), 2)
    by = weights(call.leaves, 3)

    def weighed(record: bool) -> Tensor:
        loss = dotted(call(), factors)
        gradients = [
            torch.zeros_like(t) if g is None else g
            for g, t in zip(te.grad(loss, call.leaves, record=record), call.leaves, strict=True)
        ]
        return dotted(gradients, by)

    with te.record(strict=True):
        ours = [
            torch.zeros_like(t) if g is None else g
            for g, t in zip(te.grad(weighed(True), call.leaves), call.leaves, strict=True)
        ]
    along = weights(call.leaves, 4)
    step = 1e-5
    values = []
    for sign in (1, -1):
        for leaf, direction in zip(call.leaves, along, strict=True):
            leaf.add_(direction, alpha=sign * step)
        with te.record(strict=True):
            values.append(weighed(False))
        for leaf, direction in zip(call.leaves, along, strict=True):
            leaf.sub_(direction, alpha=sign * step)
    expected = float(values[0] - values[1]) / (2 * step)
    assert float(dotted(ours, along)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("values", [[0.0, 2.0, 3.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0]], ids=str)
def test_a_product_has_its_second_derivatives_at_zeros(values: list[float]) -> None:
    """Of two zeros in one product too, which double backward of torch refuses."""
    tensors = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    out_by, x_by, s_by = (torch.randn(n, dtype=torch.float64) for n in (2, 2, 3))

    def second(out: Tensor, gradients: Callable[[Tensor], tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
        by_x, by_s = gradients((out * out_by).sum())
        assert by_x is not None
        assert by_s is not None
        return gradients((by_x * x_by).sum() + (by_s * s_by).sum())

    x, s = (t.clone().requires_grad_() for t in tensors)
    written_out = torch.stack([x[0] * s[0] * s[1], x[1] * s[2]])
    expected = second(written_out, lambda loss: torch.autograd.grad(loss, (x, s), create_graph=True))
    with te.record(strict=True):
        out = tensors[0].scatter_reduce(0, torch.tensor([0, 0, 1]), tensors[1], "prod")
        ours = second(out, lambda loss: te.grad(loss, tensors, record=True))
    for g, wanted in zip(ours, expected, strict=True):
        compare(g, wanted, "second gradient", 1e-12)


def test_where_there_is_no_second_derivative_the_missing_rule_is_named() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    with te.record(strict=True):
        out = torch.pdist(x).sum()
        with pytest.raises(MissingRuleError, match="_pdist_backward has no registered gradient rule"):
            te.grad(out, [x], record=True)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic", "trilinear"])
def test_grid_sample_by_finite_differences(mode: str, padding: str, align: bool) -> None:
    """Torch has no second derivative of it: the gradient of a weighed gradient, by differences of torch's first."""
    sizes = (2, 3, 4) if mode == "trilinear" else (3, 4)
    x = torch.randn(2, 2, *sizes, dtype=torch.float64)
    grid = torch.rand(2, *[2] * len(sizes), len(sizes), dtype=torch.float64) * 3.4 - 1.7
    sampled: Any = torch.nn.functional.grid_sample
    how: Any = {"mode": mode.replace("tri", "bi"), "padding_mode": padding, "align_corners": align}
    by = [torch.randn_like(x), torch.randn_like(grid)]
    factor = torch.randn(2, 2, *[2] * len(sizes), dtype=torch.float64)

    def weighed(a: Tensor, b: Tensor) -> Tensor:
        tracked = [t.detach().requires_grad_() for t in (a, b)]
        out = (sampled(*tracked, **how).sin() * factor).sum()
        return dotted(list(torch.autograd.grad(out, tracked)), by)

    with te.record(strict=True):
        out = (sampled(x, grid, **how).sin() * factor).sum()
        found = te.grad(out, [x, grid], record=True)
        loss = dotted([torch.zeros_like(t) if g is None else g for g, t in zip(found, (x, grid), strict=True)], by)
    ours = te.grad(loss, [x, grid])
    for place, t in enumerate((x, grid)):
        along, step = torch.randn_like(t), 1e-6
        shifted = [[u + sign * step * along if u is t else u for u in (x, grid)] for sign in (1, -1)]
        expected = float(weighed(*shifted[0]) - weighed(*shifted[1])) / (2 * step)
        g = ours[place]
        assert (0.0 if g is None else float((g * along).sum())) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("function", "at"),
    [
        (torch.nn.functional.elu, 0.0),
        (torch.nn.functional.celu, 0.0),
        (torch.nn.functional.softplus, 20.0),
        (torch.nn.functional.softplus, float("nan")),
    ],
)
def test_at_a_kink_the_second_derivative_is_that_of_torch(function: Callable[[Tensor], Tensor], at: float) -> None:
    x = torch.tensor([at, at - 0.5, at + 0.5], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), leaf)
    with te.record(strict=True):
        (g,) = te.grad(function(x).sum(), x, record=True)
        assert g is not None
        loss = g.sum()
    torch.testing.assert_close(te.grad(loss, x)[0], expected, equal_nan=True)
