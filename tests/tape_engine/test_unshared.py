"""Writes to memory that nobody else looks into are recorded as all writes are, and where somebody does, they are those.

Each program runs plainly, recorded with the short way, and recorded by the long way alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tape_engine as te
from tape_engine.recorder import inplace, shortcut
from tests.helpers import plain

from .test_parts import parts_of

Tensor = torch.Tensor


class Statistics:
    """What a batch norm is given, and the leaves of which gradients are asked."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.weight, self.bias = (torch.randn(s).requires_grad_() for s in ((6, 3), (3,), (3,)))
        self.mean, self.var = torch.rand(3), torch.rand(3)
        self.count = torch.tensor(0)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias]

    def norm(self, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
        """The layer, once."""
        self.count.add_(1)
        given = self.mean if mean is None else mean, self.var if var is None else var
        return F.batch_norm(self.x, *given, self.weight, self.bias, True)


def twice(s: Statistics) -> Tensor:
    return s.norm() + s.norm() * 2


def read_before(s: Statistics) -> Tensor:
    before = (s.weight * s.mean).sum()
    return s.norm() * before


def read_after(s: Statistics) -> Tensor:
    return s.norm() * (s.weight * s.mean).sum()


def seen_through_a_view(s: Statistics) -> Tensor:
    view = s.var[:2]
    made = s.norm()
    return made * (s.bias[:2] * view).sum()


def seen_through_an_alias(s: Statistics) -> Tensor:
    alias = s.mean.detach()
    before = (s.bias * alias).sum()
    return s.norm() * before * (s.bias * alias).sum()


def a_view_of_a_buffer(s: Statistics) -> Tensor:
    both = torch.stack([s.mean, s.var])
    made = s.norm(both[0], both[1])
    return made * (s.bias * both[0]).sum() * both[1].sum()


def one_for_both(s: Statistics) -> Tensor:
    return s.norm(s.mean, s.mean) * (s.bias * s.mean).sum()


def without_gradient(s: Statistics) -> Tensor:
    with torch.no_grad():
        s.norm()
    return s.norm() * s.mean.sum()


def computed_before(s: Statistics) -> Tensor:
    mean, var = s.mean * 2, s.var + 1
    return s.norm(mean, var) * (s.bias * mean * var).sum()


def passed_over(s: Statistics) -> Tensor:
    """Under ``no_grad`` the gradient of what is moved on passes over that."""
    mean, var = s.weight * 2, s.bias * s.bias
    with torch.no_grad():
        s.norm(mean, var)
    return s.norm() * mean.sum() + var


def also_the_bias(s: Statistics) -> Tensor:
    with torch.no_grad():
        shared = s.bias.detach().clone()
    made = F.batch_norm(s.x, shared, s.var, s.weight, shared, True)
    return made * shared.sum()


def counted(s: Statistics) -> Tensor:
    s.count.add_(1)
    before = s.bias * s.count
    s.count.add_(2)
    return s.norm() * before.sum() * s.count


def a_count_with_a_view(s: Statistics) -> Tensor:
    view = s.count.view(1)
    s.count.add_(3)
    view.mul_(2)
    s.count.add_(1)
    return s.norm() * view


def masked(s: Statistics) -> Tensor:
    mask = torch.empty_like(s.x).fill_(2.0)
    mask.mul_(0.5)
    return s.norm() * mask * mask.clone().add_(1)


PROGRAMS = [
    twice, read_before, read_after, seen_through_a_view, seen_through_an_alias, a_view_of_a_buffer, one_for_both,
    without_gradient, computed_before, passed_over, also_the_bias, counted, a_count_with_a_view, masked,
]  # fmt: skip


def recorded(program: Callable[[Statistics], Tensor], around: Any) -> tuple[Statistics, te.Tape, Tensor]:
    s = Statistics()
    with te.record(strict=True) as tape, around:
        C = (program(s) ** 2).sum()
    return s, tape, C


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda each: each.__name__)
def test_it_is_as_the_long_way(program: Callable[[Statistics], Tensor]) -> None:
    plain = Statistics()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):  # it does not count such writes
        expected = (program(plain) ** 2).sum()
    theirs = torch.autograd.grad(expected, plain.leaves, allow_unused=True)
    short, tape, C = recorded(program, contextlib.nullcontext())
    long, by_long, other = recorded(program, shortcut.left_out())
    assert parts_of(tape) == parts_of(by_long)
    assert torch.equal(C, expected)
    assert torch.equal(other, expected)
    for name in ("mean", "var", "count"):
        assert torch.equal(getattr(short, name), getattr(plain, name))
        assert torch.equal(getattr(long, name), getattr(plain, name))
    for ours, gradient in zip(te.grad(C, short.leaves, keep=True), theirs, strict=True):
        assert (ours is None) == (gradient is None)
        if ours is not None and gradient is not None:
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)


#: Those in which what is read is what is written to at the same time, or both statistics are the same.
DISORDERED = {one_for_both, also_the_bias}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda each: each.__name__)
def test_a_replay_does_the_same_again(program: Callable[[Statistics], Tensor]) -> None:
    s, tape, C = recorded(program, contextlib.nullcontext())
    if program in DISORDERED:
        with pytest.raises(te.TapeError, match="in an order that torch does not tell"):
            tape.program(outputs=C)
        return
    replay = tape.program(outputs=C)
    plain = Statistics()
    with torch.no_grad():
        program(plain)
        expected = (program(plain) ** 2).sum()
        torch.testing.assert_close(replay(), expected, rtol=1e-5, atol=1e-6)
    for name in ("mean", "var", "count"):
        torch.testing.assert_close(getattr(s, name), getattr(plain, name))


def test_a_layer_of_its_own_takes_the_short_way_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(inplace, "settle", lambda *args, **kwargs: written.append(args))
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)), torch.randn(5, 3)
    for step in range(3):
        with te.record() as tape:
            C = net(x).sum()
        assert sum(bool(node.mutates) for node in tape) == 4
        te.backward(C, wrt=list(net.parameters()))
        assert [int(count) for name, count in net.named_buffers() if "tracked" in name] == [step + 1] * 2
    assert not written


def test_statistics_and_counts_keep_nothing_of_the_steps_before() -> None:
    net, x = nn.BatchNorm1d(3), torch.randn(5, 3)
    nodes = []
    for _ in range(3):
        with te.record() as tape:
            C = net(x).square().sum()
        te.backward(C, wrt=list(net.parameters()))
        nodes.append(len(te.tape.ancestors(tape.nodes[-1])))
        for name in ("running_mean", "running_var"):
            assert te.tape.bound(net.get_buffer(name)).leaf  # type: ignore[union-attr]
    assert len({*nodes}) == 1


def test_outside_a_block_the_other_way_is_taken() -> None:
    s, other = Statistics(), Statistics()
    y = te.relu(s.x)
    made = F.batch_norm(y, s.mean, s.var, s.weight, s.bias, True)
    te.backward((made * made).sum())
    expected = F.batch_norm(other.x.relu(), other.mean, other.var, other.weight, other.bias, True)
    (expected * expected).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(s.x.g, other.x.grad, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
    assert torch.equal(s.mean, other.mean)


# -- several writes of one operation ----------------------------------------------------------------------------


def rows(base: Tensor) -> list[Tensor]:
    return [base[0], base[2], base[1]]


def crossing(base: Tensor) -> list[Tensor]:
    return [base[0], base[:, 1:]]


def one_twice(base: Tensor) -> list[Tensor]:
    return [base, base]


@pytest.mark.parametrize("written", [rows, crossing, one_twice], ids=lambda each: each.__name__)
@pytest.mark.parametrize("cut", [False, True])
def test_a_list_of_tensors_is_written_to(written: Callable[[Tensor], list[Tensor]], cut: bool) -> None:
    """Where two of them have an element in common, which is written to twice, the gradient is refused, and a replay."""

    def run(x: Tensor) -> Tensor:
        base = x * 1.0
        given = written(base)
        before = (base * base).sum()
        with torch.set_grad_enabled(not cut):
            torch._foreach_mul_(given, [2.0, 3.0, 5.0][: len(given)])
        return before + (base.sin() * x).sum() + sum(each.cos().sum() for each in given)

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        expected = run(x)
    (theirs,) = torch.autograd.grad(expected, x)
    with te.record() as tape:
        C = run(y)
    assert torch.equal(C, expected)
    if written is rows or cut:
        (ours,) = te.grad(C, y, keep=True)
        torch.testing.assert_close(ours, theirs)
    else:
        with pytest.raises(te.TapeError, match="several of which lie in one place"):
            te.grad(C, y, keep=True)
    if written is rows:
        torch.testing.assert_close(tape.program(outputs=C)(), expected)
    else:
        with pytest.raises(te.TapeError, match="in an order that torch does not tell"):
            tape.program(outputs=C)


class Both(torch.autograd.Function):
    """Writes to both of its arguments."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        a.mul_(2)
        b.add_(1)
        ctx.mark_dirty(a, b)
        return a, b

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return g[0] * 2, g[1]


def lists_beside_views(base: Tensor, x: Tensor) -> list[Tensor]:
    seen, part = base[0], base[1:, :2]
    torch._foreach_mul_([base[1], base[0], base[2]], [2.0, 3.0, 5.0])
    return [base, seen, part]


def outs_in_one_memory(base: Tensor, x: Tensor) -> list[Tensor]:
    room = torch.ones(2, 3, 3, dtype=x.dtype)
    seen = room[1] * base
    with torch.no_grad():
        torch.aminmax(base, dim=0, out=(room[0, 0], room[1, 1]))
        torch.linalg.qr(base[:, :3] + torch.eye(3, dtype=x.dtype), out=(room[1], room[0]))
    return [base, seen, room * base]


def a_function_that_writes_to_rows(base: Tensor, x: Tensor) -> list[Tensor]:
    seen = base[1]
    with torch.no_grad():
        made, _ = Both.apply(base[0], base[1])  # type: ignore[no-untyped-call]
    return [base, seen, base * made]


def a_conjugate_that_is_written_to(base: Tensor, x: Tensor) -> list[Tensor]:
    h = torch.view_as_complex(torch.stack([base, base * 2], -1))
    v = h.conj()
    v.mul_(1 + 1j)
    v.real.add_(x)
    return [h.real, v.imag, v.real * base]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "program",
    [lists_beside_views, outs_in_one_memory, a_function_that_writes_to_rows, a_conjugate_that_is_written_to],
    ids=lambda each: each.__name__,
)
def test_several_writes_to_one_memory_are_each_followed(
    program: Callable[[Tensor, Tensor], list[Tensor]], requires_grad: bool
) -> None:
    def run(x: Tensor) -> Tensor:
        base = x * 1.0
        return sum((each.sin() * (k + 1)).sum() for k, each in enumerate(program(base, x)))  # type: ignore[return-value]

    def wanted(x: Tensor) -> tuple[Tensor, Tensor]:
        y = plain(x).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            C = run(y)
        return C.detach(), torch.autograd.grad(C, y)[0]

    x, other = [torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    with te.record() as tape:
        C = run(x.requires_grad_(requires_grad))
    value, gradient = wanted(x)
    assert torch.equal(C.detach(), value)
    torch.testing.assert_close(te.grad(C, x, keep=True)[0], gradient)
    replay = tape.program(inputs=x, outputs=C)
    value, gradient = wanted(other)
    torch.testing.assert_close(replay.step(other), value)
    torch.testing.assert_close(other.g, gradient)  # type: ignore[attr-defined]


def test_torch_itself_conjugates_a_number_on_the_way_back_from_what_listens() -> None:
    x = torch.rand(3, dtype=torch.float64)
    with te.record():
        C = x.sum()
    y = x.detach().clone().requires_grad_()
    h = torch.view_as_complex(torch.stack([y, y * 2], -1)).mul(2 + 1j)
    (g,) = torch.autograd.grad(h.real.sum(), y)
    torch.testing.assert_close(plain(g), torch.zeros(3, dtype=torch.float64))
    te.backward(C)


@pytest.mark.parametrize("how", ["a product", "a product in place", "a function"])
def test_a_replay_of_a_write_to_what_is_read_meanwhile_is_refused(how: str) -> None:
    x = torch.rand(3, 3, dtype=torch.float64)
    with te.record() as tape:
        y = x * 2
        if how == "a product":
            torch.mm(y, x, out=y)
        elif how == "a product in place":
            y.addmm_(y, x)
        else:
            Both.apply(y, y)  # type: ignore[no-untyped-call]
        C = y.sum()
    with pytest.raises(te.NotRecordedError, match=r"in an order that torch does not tell(.|\n)*fix: .*\.clone\(\)"):
        tape.program(inputs=x, outputs=C)


# -- rows of one buffer -----------------------------------------------------------------------------------------


def test_what_a_rule_reads_of_a_buffer_is_kept_in_every_block_before_statistics_in_it_move_on() -> None:
    """Torch does not count such a write: nothing else would tell the sweep of it."""

    def run(x: Tensor, buffer: Tensor) -> Tensor:
        seen = F.linear(buffer, torch.tanh(x))
        return seen.sin().sum() + (F.batch_norm(x, buffer[0], buffer[1], training=True) * x).sum()

    buffer, other = [torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for _ in "ab"]
    for step in range(3):
        x = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        y = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
            (theirs,) = torch.autograd.grad(run(y, buffer), y)
        with te.record():
            C = run(x, other)
        (ours,) = te.grad(C, x)
        assert torch.equal(other, buffer)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_and_weights_with_gaps_between_them(training: bool, channels_last: bool) -> None:
    """The reference is given them in one piece: torch's own gradient is wrong where they are not."""
    drawn = torch.Generator().manual_seed(0)
    shape = (4, 3, 2, 2) if channels_last else (4, 3)
    x, gaps = [torch.rand(s, dtype=torch.float64, generator=drawn) + 0.1 for s in (shape, (3, 4))]
    if channels_last:
        x = x.to(memory_format=torch.channels_last)

    def run(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, training=training).sin().sum()

    y, pieces = x.detach().clone().requires_grad_(), [gaps[:, k].clone() for k in range(3)]
    pieces[0].requires_grad_()
    theirs = torch.autograd.grad(run(y, *pieces), [y, pieces[0]])
    weight, mean, var = gaps[:, 0], gaps[:, 1], gaps[:, 2]
    with te.record():
        C = run(x, weight, mean, var)
    for ours, wanted in zip(te.grad(C, [x, weight]), theirs, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("lists", ["addcmul", "mul", "one's own"])
def test_a_list_whose_items_read_what_others_write(lists: str, cut: bool) -> None:
    """Torch takes them in turn: by then the contents are others than those that were given."""

    def run(x: Tensor) -> Tensor:
        base = x * 1.0
        a, b = base[0], base[1]
        with torch.set_grad_enabled(not cut):
            if lists == "addcmul":
                torch._foreach_addcmul_([a, b], [b, a], [b, a], value=0.3)
            elif lists == "mul":
                torch._foreach_mul_([a, b], [b.clone(), a])
            else:
                torch._foreach_mul_([a, b], [a, b])
        return (a.sin() * x[1]).sum() + (b * b).sum()

    x = torch.randn(2, 4, dtype=torch.float64)
    y = x.clone()
    expected = run(x)
    with te.record() as tape:
        C = run(y)
    assert torch.equal(C, expected)
    if lists == "one's own":
        torch.testing.assert_close(tape.program(outputs=C)(), expected)
        (ours,) = te.grad(C, y)
        assert ours is not None
        if not cut:
            leaf = x.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
                after = run(leaf)
            (theirs,) = torch.autograd.grad(after, leaf)
            torch.testing.assert_close(ours, theirs)
        return
    with pytest.raises(te.TapeError, match="in an order that torch does not tell"):
        tape.program(outputs=C)
    if not cut:
        with pytest.raises(te.TapeError, match="reads for one item what it writes for another"):
            te.grad(C, y)
