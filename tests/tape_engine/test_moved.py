"""Memory that a tensor is given in the place of its own, and what a sweep does not know: right, or refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tape_engine as te
from tests.helpers import Tensor, close, plain


def rand() -> Tensor:
    return torch.randn(3, 3, dtype=torch.float64)


# What torch takes for a view of the base is none in memory: its gradient goes by the one, contents by the other.


def the_base_moved_and_written_to(x: Tensor) -> Tensor:
    y = x * 2
    v = y.t()
    y.data = torch.ones_like(x)
    y.mul_(3)
    return (v * v).sum() + (y * y).sum()


def the_base_moved_and_its_view_written_to(x: Tensor) -> Tensor:
    y = x * 2
    v = y.t()
    y.data = torch.ones_like(x)
    v.mul_(3)
    return (v * v).sum() + (y * x).sum()


def the_view_moved_and_written_to(x: Tensor) -> Tensor:
    y = x * 2
    v = y.view(3, 3)
    v.data = torch.ones_like(x)
    v.mul_(3)
    return (v * v).sum() + (y * x).sum()


def the_view_moved_to_where_it_lies_in_another_way(x: Tensor) -> Tensor:
    y = x * 2
    v = y[1:]
    v.data = torch.ones_like(v)
    return (v * v).sum() + (y * x).sum()


def the_base_moved_to_where_it_lies_in_another_way(x: Tensor) -> Tensor:
    y = x * 2
    v = y[1:]
    y.data = torch.ones_like(x).t()
    return (v * v).sum() + (y * x).sum()


MOVED = [
    the_base_moved_and_written_to,
    the_base_moved_and_its_view_written_to,
    the_view_moved_and_written_to,
    the_view_moved_to_where_it_lies_in_another_way,
    the_base_moved_to_where_it_lies_in_another_way,
]


@pytest.mark.parametrize("f", MOVED, ids=lambda f: f.__name__)
def test_a_view_in_other_memory_than_its_base_is_refused(f: Callable[[Tensor], Tensor]) -> None:
    x = rand()
    expected = f(plain(x))
    with te.record() as tape:
        C = f(x)
    assert torch.equal(plain(C), expected)
    refusal = (
        r"is a view of other memory than its base has since x.data = y or set_, or the base of such a view(.|\n)*"
        r"at test_moved.py:(.|\n)*fix: copy the elements instead: x.copy_\(y\)"
    )
    with pytest.raises(te.NotRecordedError, match=refusal):
        te.grad(C, x)
    with pytest.raises(te.NotRecordedError, match="view of other memory than its base"):
        tape.program(inputs=x, outputs=C)


def test_constants_in_other_memory_than_their_base_harm_nothing() -> None:
    x = rand()
    with te.record():
        y = torch.ones(3, 3, dtype=torch.float64)
        v, d = y.t(), y.detach()
        z = x * v
        y.data = torch.zeros(3, 3, dtype=torch.float64)
        y.add_(3)
        d.add_(1)
        C = (z * x).sum() + (y * x).sum() + (v * x).sum()
    close(te.grad(C, x)[0], 2 * plain(x) + 3 + 2)


def test_contents_of_another_shape_leave_no_gradient_to_what_was_computed() -> None:
    x = rand()
    with te.record() as tape:
        y = x * 2
        y.data = torch.ones(2, 3, dtype=torch.float64)
        C = (y * y).sum() + (x * x).sum()
    with pytest.raises(te.NotRecordedError, match="y, which was computed, and given contents of another shape"):
        te.grad(C, x)
    with pytest.raises(te.NotRecordedError, match="given contents of another shape"):
        tape.program(inputs=x, outputs=C)


def test_a_parameter_of_another_shape_begins_again() -> None:
    p: Any = torch.nn.Parameter(rand())
    with te.record():
        p.data = torch.ones(2, dtype=torch.float64)
        C = (p * p).sum()
    te.backward(C)
    close(p.g, torch.full((2,), 2.0, dtype=torch.float64))


def test_the_rest_of_a_storage_may_be_read_after_its_views_have_moved() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        v, u = y[0], y[1]
        z = u * u  # whose rule keeps what torch counts the writes of together with those of y
        y.data = torch.ones_like(x)
        with torch.no_grad():
            y.mul_(2)
        return (v * u).sum() + z.sum() + (y * x).sum()

    x = rand()
    copy = plain(x).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
        expected = f(copy)
    (wanted,) = torch.autograd.grad(expected, copy)
    with te.record():
        C = f(x)
    close(te.grad(C, x)[0], wanted)


def test_training_by_data_alone_is_training() -> None:
    start = rand()
    p: Any = plain(start).requires_grad_()
    q = plain(start).requires_grad_()
    for _ in range(3):
        with te.record():
            v = p.t()
            C = (p @ v).square().sum()
            te.backward(C)
            p.data = p.data - 0.01 * p.g
        (g,) = torch.autograd.grad((q @ q.t()).square().sum(), q)
        q = (q - 0.01 * g).detach().requires_grad_()
        close(p, q)


# -- what was written to unseen, where other ways lead to the leaf ---------------------------------------------


def test_a_gradient_that_an_unseen_write_hides_is_refused_though_another_way_is_known() -> None:
    x, w = rand(), rand()
    with te.record():
        y = x * 2
        thread = threading.Thread(target=lambda: y.mul_(3))
        thread.start()
        thread.join()
        C = (y * y).sum() + (x * w).sum()
    with pytest.raises(te.OverwrittenError, match="the gradient reaches y, which was changed by a write"):
        te.grad(C, x)
    with pytest.raises(te.OverwrittenError, match="the gradient reaches y, which was changed by a write"):
        te.backward(C, wrt=[x, w])


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_view_that_is_given_another_shape_has_no_gradient(first: bool, required: bool) -> None:
    """Where torch has the gradient of its base go depends on how it lies by then."""
    x = torch.rand(3, 2, dtype=torch.float64).requires_grad_(required)
    with te.record():
        y = x * 1
        v = y[:, :1]
        for given in (first, not first):
            if given:
                v.data = torch.full((3, 2), 0.3, dtype=torch.float64)
            else:
                with torch.no_grad():
                    v.mul_(0.5)
        C = torch.tanh(y).sum() + torch.tanh(v).sum()
    with pytest.raises(te.TapeError, match=r"gradient reaches v, .*x\.data = y"):
        te.backward(C)
