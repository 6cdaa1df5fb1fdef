"""What a write means to those who look into the same memory, where torch lets a gradient pass over it or begin anew.

The references are torch.autograd's, on copies of what it saves: so it computes with what it has recorded, and does not
refuse what was overwritten since. Each program is recorded with leaves that require a gradient and with plain ones, and
replayed on other inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tape_engine as te
from tests.helpers import Tensor, agree, close, plain
from tests.tape_engine.program.common import freeze

ALL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}


def program(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    ALL[f.__name__] = f
    return f


def weighed(*tensors: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for k, each in enumerate(tensors):
        total = total + (torch.tanh(each) * (k + 1)).sum()
    return total


class Doubled(torch.autograd.Function):
    """Doubles its argument in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] * 2


# -- writes through detached aliases -------------------------------------------------------------------------


@program
def a_view_not_read_since_its_base_was_written_to(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v = y[1:]
    d = v.data
    z = v * v  # whose rule keeps what v held
    v[0] = v.sum()
    with torch.no_grad():
        d.add_(0.5)
    return weighed(y, v, d, z)


@program
def a_view_of_a_detached_alias_after_a_write_through_it(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    flat = y.data.flatten()
    flat.mul_(torch.tanh(flat))
    y.add_(0.6)
    return weighed(y, flat)


@program
def a_detached_alias_with_gaps(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y[::2].data.mul_(1.3)
    return weighed(y)


@program
def a_parameter_made_of_what_is_written_to(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    p = torch.nn.Parameter(y.detach())
    v = p[0]
    with torch.no_grad():
        y.mul_(2)
    return weighed(y, p, v)


@program
def a_write_to_a_parameter_that_is_an_alias(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    p = torch.nn.Parameter(y.detach())
    with torch.no_grad():
        p.mul_(2)
    return weighed(y, p)


@program
def a_view_made_under_no_grad(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    with torch.no_grad():
        v = y.view(-1)
    u = v[2:]
    v.data.add_(0.3)
    return weighed(y, v, u)


@program
def what_was_detached_in_place_is_kept(x: Tensor, w: Tensor) -> Tensor:
    y = x * 2
    z = y * torch.tanh(w)
    y.detach_()
    y.mul_(2)
    return weighed(y, z)


@program
def a_view_of_what_is_detached_in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v, u = y[1], y[2]
    z = u * u
    y.data.mul_(0.5)
    y.detach_()
    return weighed(y, v, u, z)


@program
def a_write_that_torch_does_not_count_after_a_base_was_detached_in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v, u = y.unsqueeze(0), y[1]
    y.detach_()
    y.data.mul_(1.3)
    v.data[:, 0].add_(0.2)
    return weighed(y, v, u)


@program
def a_write_that_torch_counts_after_a_base_was_detached_in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v, u = y.view(-1), y[2]
    z = v * u.sum() + u.sin().sum()
    y.detach_()
    y.data.mul_(1.3)
    with torch.no_grad():
        v[:3].mul_(1.5)
    return weighed(y, v, u, z) + (x * x).sum()


@program
def views_that_were_used_and_not_since_the_last_write(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v, u, t, s = y.view(-1), y[2], y[:1], y[1:]
    with torch.no_grad():
        v.mul_(1.5)
        y.sum(), u.sum()  # no gradient is wanted here, and torch does not ask how u was computed
    y[0].mul_(w[0])
    z = t * t + s.sum()
    t.data.add_(0.1)
    y.detach_()
    return weighed(y, v, u, t, s, z) + (x * x).sum()


@program
def views_that_were_used_since_the_last_write(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v, u = y.view(-1), y[2]
    with torch.no_grad():
        v.mul_(1.5)
    z = v * v
    y.detach_()
    return weighed(y, v, u, z)


@program
def a_base_that_begins_anew_where_it_was_detached_in_place(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v, u = y.view(-1), y[2]
    y.detach_().requires_grad_()
    y.data.mul_(1.3)
    z = u * u
    with torch.no_grad():
        v[:3].mul_(1.5)
    return weighed(v, u, z)


# -- writes under no_grad ------------------------------------------------------------------------------------


@program
def an_out_under_no_grad(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    with torch.no_grad():
        torch.tanh(w, out=y)
    return weighed(y)


@program
def an_out_that_is_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    with torch.no_grad():
        torch.neg(w[0], out=y[1])
    return weighed(y)


@program
def an_out_of_no_elements(x: Tensor, w: Tensor) -> Tensor:
    room = torch.empty(0, dtype=x.dtype)
    with torch.no_grad():
        torch.stack([x, w], out=room)
    return weighed(x * room, room)


@program
def a_view_turned(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v = y[:2]
    with torch.no_grad():
        v.t_()
    return weighed(y, v, v @ w[:2])


@program
def the_base_of_a_view_turned(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v = y.permute(1, 0)
    with torch.no_grad():
        y.t_()
    return weighed(y, v)


@program
def a_dimension_more(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v = y[0]
    with torch.no_grad():
        y.unsqueeze_(0)
    y.mul_(2)
    return weighed(y, v)


@program
def a_function_of_the_users_that_writes(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v = y[0]
    with torch.no_grad():
        Doubled.apply(v)  # type: ignore[no-untyped-call]
    return weighed(y, v)


# -- memory that a tensor is given ---------------------------------------------------------------------------


@program
def data_of_another_then_a_write(x: Tensor, w: Tensor) -> Tensor:
    y, z = x * 2, w * 3
    y.data = z.detach()
    y.abs_()
    return weighed(y, z)


@program
def data_of_another_then_a_write_to_that(x: Tensor, w: Tensor) -> Tensor:
    y, z = x * 2, w * 3
    y.data = z.detach()
    z.mul_(w)
    return weighed(y, z)


@program
def a_view_of_the_memory_before(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v, u = y.t(), y[0]
    y.mul_(2)
    y.data = torch.ones_like(w)
    return weighed(y, v, u)


@program
def a_view_of_the_memory_before_and_a_write_under_no_grad(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v = y.t()
    y.data = torch.ones_like(w)
    with torch.no_grad():
        y.mul_(3)
    return weighed(y, v)


@program
def a_detached_alias_of_the_memory_before(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    d = y.detach()
    v = d[1:]
    y.data = torch.ones_like(w)
    y.mul_(w)
    v.sigmoid_()
    return weighed(y, d, v)


# -- where elements lie --------------------------------------------------------------------------------------


@program
def as_strided_of_what_is_written_to_since(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v = y[1:]
    s = v.as_strided((2,), (1,), 4)
    y.data.mul_(2)
    return weighed(y, s * w[0, :2])


@program
def a_slice_whose_strides_are_no_multiples(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    v = y[:2, ::2]
    v.mul_(w[:2, ::2])
    return weighed(y, v)


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 3, dtype=torch.float64, generator=generator) + 0.3 for _ in range(2)]


def wanted(f: Callable[[Tensor, Tensor], Tensor], given: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [plain(each).requires_grad_() for each in given]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
        C = f(*leaves)
    return C.detach(), list(torch.autograd.grad(C, leaves, allow_unused=True))


@pytest.mark.parametrize("requires_grad", [True, False], ids=["leaves of torch's", "plain tensors"])
@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_that_of_torch(name: str, requires_grad: bool) -> None:
    value, gradients = wanted(ALL[name], drawn(1))
    mine = [each.requires_grad_(requires_grad) for each in drawn(1)]
    with te.record():
        C = ALL[name](*mine)
    assert torch.equal(plain(C), value)
    te.backward(C)
    agree(mine, gradients, 1e-10)


@pytest.mark.parametrize("name", ALL)
def test_a_replay_on_other_inputs_gives_what_torch_gives(name: str) -> None:
    replayed = freeze(ALL[name], drawn(1))
    others = drawn(2)
    value, gradients = wanted(ALL[name], others)
    close(replayed.step(*others), value)
    agree(others, gradients, 1e-10)


@pytest.mark.parametrize("name", ALL)
def test_a_replay_inside_a_recording_passes_the_gradient_on(name: str) -> None:
    replayed = freeze(ALL[name], drawn(1))
    others = drawn(2)
    value, gradients = wanted(ALL[name], others)
    with te.record():
        C = replayed(*others) * 1
    close(C, value)
    agree_with(te.grad(C, others), gradients)


def agree_with(found: tuple[Tensor | None, ...], references: list[Tensor | None]) -> None:
    for got, each in zip(found, references, strict=True):
        if got is None or each is None:
            assert got is None or not got.any()
            assert each is None or not each.any(), "a gradient is missing"
        else:
            close(got, each)


# -- a leaf under no_grad ------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_leaf_is_overwritten_by_an_out_under_no_grad_and_stays_the_leaf(requires_grad: bool) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        before = x * w
        with torch.no_grad():
            torch.tanh(w, out=x)
        return weighed(before, x)

    _, gradients = wanted(f, drawn(1))
    x, w = [each.requires_grad_(requires_grad) for each in drawn(1)]
    with te.record():
        C = f(x, w)
    te.backward(C)
    agree([x, w], gradients)


def test_a_leaf_that_was_not_read_before_has_the_gradient_of_its_new_shape() -> None:
    x, w = drawn(1)
    with te.record():
        with torch.no_grad():
            x.unsqueeze_(0)
        C = (x * w).sum()
    (g,) = te.grad(C, x)
    close(g, w[None])


def test_a_leaf_that_was_read_in_two_shapes_is_refused() -> None:
    x, w = drawn(1)
    with te.record():
        before = (x * w).sum()
        with torch.no_grad():
            x.unsqueeze_(0)
        C = before + (x * w).sum()
    with pytest.raises(te.NotRecordedError, match="x was read, given another shape, and read again"):
        te.grad(C, x)


def test_a_replay_turns_the_input_that_the_code_turns() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            x.t_()
        return (x * w).sum()

    x, w = drawn(1)
    with te.record() as tape:
        C = f(x, w)
    replayed = tape.program(inputs=(x, w), outputs=C)
    a, b = drawn(2)
    turned = plain(a).t()
    close(replayed(a, b), (turned * b).sum())
    close(a, turned)


# -- elements that lie in one place --------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["copy_", "fill_"])
def test_a_write_of_given_elements_to_overlapping_places_leaves_the_last(write: str) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        y = x * 1
        v = y.unfold(-1, 2, 1)
        v.copy_(w.unfold(-1, 2, 1) * 2) if write == "copy_" else v.fill_(w.sum())
        return weighed(y, v)

    given = drawn(1)
    with te.record():
        C = f(*given)
    found = te.grad(C, given)
    for k, g in enumerate(found):
        differences = torch.zeros(9, dtype=torch.float64)
        for i in range(9):
            ends = []
            for step in (1e-6, -1e-6):
                moved = drawn(1)
                moved[k].view(-1)[i] += step
                ends.append(float(f(*moved)))
            differences[i] = (ends[0] - ends[1]) / 2e-6
        close(torch.zeros(3, 3, dtype=torch.float64) if g is None else g, differences.view(3, 3), 1e-6)


def test_a_write_that_reads_overlapping_places_is_refused() -> None:
    x, w = drawn(1)
    with te.record() as tape:
        y = x * 1
        v = y.unfold(-1, 2, 1)
        v.mul_(w[0, 0])
        C = weighed(y)
    with pytest.raises(te.NotRecordedError, match=r"several of which lie in one place(.|\n)*fix: write to a copy"):
        te.grad(C, [x, w])
    with pytest.raises(te.NotRecordedError, match=r"several of which lie in one place(.|\n)*fix: write to a copy"):
        tape.program(inputs=(x, w), outputs=C)


@pytest.mark.parametrize("copies", [False, True])
def test_a_replay_of_a_write_to_what_the_operation_reads_is_refused(copies: bool) -> None:
    """Torch reads what it has written by then, or has not; the fix that the error tells is one."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        y = x * w
        first = y[:, :1]
        y.sub_(first.clone() if copies else first)
        y[:, 1].add_(y[1, 2])  # beside it: that is none
        y.add_(y.view(9).view(3, 3))  # each with itself: nor is that
        return weighed(y)

    x, w = drawn(1)
    with te.record() as tape:
        C = f(x, w)
    if not copies:
        refusal = r"reads at other places, in an order that torch does not tell(.|\n)*y.sub_(.|\n)*fix: .*\.clone\(\)"
        with pytest.raises(te.NotRecordedError, match=refusal):
            tape.program(inputs=(x, w), outputs=C)
        return
    others = drawn(2)
    value, gradients = wanted(f, others)
    close(tape.program(inputs=(x, w), outputs=C).step(*others), value)
    agree(others, gradients)


@pytest.mark.parametrize(
    ("alias", "through"),
    [
        (lambda x: x.detach(), "whole"),
        (lambda x: x.data, "part"),
        (lambda x: x[0].detach(), "whole"),
        (lambda x: x.data[0], "whole"),
        (lambda x: x.data[0], "part"),
    ],
)
def test_an_alias_that_is_first_read_after_a_write_is_replayed(alias: Callable[[Tensor], Tensor], through: str) -> None:
    """It was made outside the block, and nothing tells of it but that it has the memory that is written to."""

    def run(whole: Tensor, part: Tensor, w: Tensor) -> Tensor:
        written, read = (whole, part) if through == "whole" else (part, whole)
        written.mul_(2)
        total = (read * w).sum() + (read * read).sum()
        written.add_(w.detach())
        return total + (read * w).sin().sum()

    def made() -> tuple[Tensor, Tensor, Tensor]:
        whole = torch.arange(6, dtype=torch.float64).reshape(2, 3)
        return whole, alias(whole), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)

    reference, ours = made(), made()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        expected = run(*reference)
    with te.record() as tape:
        C = run(*ours)
    assert torch.equal(C, expected)
    (theirs,) = torch.autograd.grad(expected, reference[2])
    torch.testing.assert_close(te.grad(C, ours[2], keep=True)[0], theirs)
    replay = tape.program(outputs=C)
    with torch.no_grad():
        torch.testing.assert_close(replay(), run(*reference))
    torch.testing.assert_close(ours[0], reference[0])


@pytest.mark.parametrize("alias", [lambda x: x.detach(), lambda x: x.data, lambda x: x.data[0]])
def test_the_gradient_of_an_alias_from_outside_passes_over_writes_to_what_it_is_of(
    alias: Callable[[Tensor], Tensor],
) -> None:
    def run(whole: Tensor, part: Tensor) -> Tensor:
        total = (part * part).sum()
        with torch.no_grad():
            whole.add_(1)
        return total + part.sin().sum()

    whole, other = (torch.arange(6, dtype=torch.float64).reshape(2, 3) for _ in range(2))
    ours, reference = alias(whole), alias(other).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        (theirs,) = torch.autograd.grad(run(other, reference), reference)
    with te.record():
        C = run(whole, ours)
    torch.testing.assert_close(te.grad(C, ours)[0], theirs)
