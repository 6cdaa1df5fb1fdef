"""Every gradient of PyTorch's own operator samples, through the recorder (strict), the rules and the sweep.

The 540 operations are the OpInfos of torch 2.13 that support autograd and float64 on the CPU (``op_db`` of
``common_methods_invocations``, filtered by what OpInfo itself declares; another torch may count another number).
Here the first samples of each are run; all of them, some 13,500, with

    TAPE_ENGINE_OPINFO_SAMPLES=all python3 dev.py test tests/tape_engine/test_opinfo.py

The counts stand at the end of the session's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import tape_engine as te
from tests.tape_engine.opinfo import (
    LAYOUTS,
    Survey,
    as_it_is,
    check_each_output,
    check_first,
    compare,
    in_place,
    survey,
    title,
)

#: Operations without a rule, and why; under strict recording they are refused by name.
SPARSE = "sparse tensors, of which the engine records nothing"
PRIVATE = "a custom operation private to torch, new in 2.13, that computes its own gradient forward"
REFUSED = {
    "sparse.mm.reduce": SPARSE,
    "sparse.sampled_addmm": SPARSE,
    "to_sparse": SPARSE,
    "nn.functional.linear_cross_entropy.chunked": PRIVATE,
    "nn.functional.linear_cross_entropy.chunked_none": PRIVATE,
}

#: Where torch's own forward kernel misreads the layout (past an expanded tensor's memory; past the mark that says
#: negative), so that its results are no reference.
MISREAD = {"expanded": {"native_group_norm", "masked.median"}, "negated": {"nn.functional.max_pool1d"}}


def report(found: Survey, what: str, record_property: Callable[[str, object], None]) -> None:
    """Says the count, and asserts that nothing is wrong and nothing is refused but what is listed."""
    record_property("count", f"OpInfo, {what}: {len(found.right)} of {found.total} ({found.compared} samples)")
    told = [f"{name}: {text}" for name, text in found.wrong.items()]
    assert not told, f"{len(told)} wrong:\n\n" + "\n\n".join(told)
    assert set(found.refused) <= set(REFUSED), {n: t for n, t in found.refused.items() if n not in REFUSED}
    assert len(found.right) >= 0.95 * found.total


def test_every_gradient(record_property: Callable[[str, object], None]) -> None:
    report(survey(check_first), "gradients", record_property)


def test_every_gradient_of_another_draw(record_property: Callable[[str, object], None]) -> None:
    report(survey(check_first, seed=5), "gradients, other samples", record_property)


def test_every_gradient_of_one_output_of_several(record_property: Callable[[str, object], None]) -> None:
    """A gradient that is undefined, of an output that the loss does not reach, is not passed as zeros."""
    # Of native_group_norm torch itself drops the gradients of the further outputs unless the first has one.
    found = survey(check_each_output, among=lambda op: title(op) != "native_group_norm")
    several = {name: text for name, text in found.without_reference.items() if text != "one output"}
    found = replace(found, without_reference=several)
    report(found, "gradients of each output alone", record_property)
    assert {"svd", "linalg.eigh", "linalg.qr", "linalg.slogdet", "var_mean"} <= {*found.right}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["sequence", "hidden", "cell"])
def test_the_gradient_of_one_output_of_a_recurrent_layer(which: int) -> None:
    layer = torch.nn.LSTM(3, 4, 2, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    parameters = list(layer.parameters())

    def loss() -> torch.Tensor:
        sequence, (hidden, cell) = layer(x)
        chosen: torch.Tensor = (sequence, hidden, cell)[which]
        return chosen.square().sum()

    expected = torch.autograd.grad(loss(), parameters, allow_unused=True)
    with te.record(strict=True):
        ours = te.grad(loss(), parameters)
    for g, wanted in zip(ours, expected, strict=True):
        compare(g, wanted, "gradient", 1e-10)


def test_every_gradient_in_place(record_property: Callable[[str, object], None]) -> None:
    report(survey(check_first, in_place), "gradients in place", record_property)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_every_gradient_of_tensors_that_are_not_contiguous(
    layout: str, record_property: Callable[[str, object], None]
) -> None:
    left_out = MISREAD.get(layout, set())
    found = survey(check_first, as_it_is, LAYOUTS[layout], among=lambda op: title(op) not in left_out)
    report(found, f"gradients, {layout} in memory", record_property)
