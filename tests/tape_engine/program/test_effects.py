"""Effects of the recorded code, which happen on each replay: counters, running statistics, writes through views."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tape_engine as te
from tests.helpers import close, g_of, plain
from tests.tape_engine.program.common import F64, draw, follows, freeze

Tensor = torch.Tensor


# -- effects happen on each replay ---------------------------------------------------------------------------


def test_counter() -> None:
    n, x = torch.zeros((), dtype=torch.int64), draw(3)
    with te.record() as tape:
        n.add_(1)
        y = x * n
    program = tape.program(inputs=x, outputs=y)
    assert n == 1
    close(program(x), x * 2)
    close(program.step(x, seed=torch.ones(3, dtype=F64)), x * 3)
    close(g_of(x), torch.full((3,), 3.0, dtype=F64))
    assert n == 3


def test_counter_that_nothing_reads() -> None:
    n, x = torch.zeros(()), draw(3)
    with te.record() as tape:
        y = x * 2
        n.add_(1)
    program = tape.program(inputs=x, outputs=y)
    program(x)
    program(x)
    assert n == 3


def test_counter_under_no_grad() -> None:
    n, x = torch.zeros(()), draw(3)
    with te.record() as tape:
        with torch.no_grad():
            n.add_(1)
        y = x * n
    program = tape.program(inputs=x, outputs=y)
    close(program(x), x * 2)
    assert n == 2


def test_running_mean() -> None:
    mean, x = torch.zeros(2, dtype=F64), draw(5, 2)

    def function(x: Tensor, mean: Tensor) -> Tensor:
        mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return (x - mean).square().sum()

    program = freeze(function, [x], [mean])
    expected = plain(mean)
    for _ in range(5):
        x = draw(5, 2)
        wanted = function(x, expected)
        close(program(x), wanted)
        close(mean, expected)


def test_old_contents_are_read_where_they_were_read() -> None:
    """`y` reads the state before the write, `z` after it; both have their gradients."""
    state = draw(3)

    def function(x: Tensor, state: Tensor) -> Tensor:
        y = x * state
        state.add_(x.detach())
        z = x * state
        return (y * z).sum()

    program = freeze(function, [draw(3)], [state])
    for _ in range(3):
        x, before = draw(3), plain(state)
        tracked = x.clone().requires_grad_()
        mine = before.clone()
        y = tracked * before
        mine += x
        (wanted,) = torch.autograd.grad((y * (tracked * mine)).sum(), tracked)
        program.step(x)
        close(state, mine)
        close(g_of(x), wanted)


def test_writes_to_an_input() -> None:
    def function(x: Tensor) -> Tensor:
        x.add_(1)
        return (x * x).sum()

    program = freeze(function, [draw(3)])
    x, mine = torch.arange(3.0, dtype=F64), torch.arange(3.0, dtype=F64)
    close(program(x), function(mine))
    close(x, mine)
    close(program.step(x), function(mine))
    close(x, mine)
    close(g_of(x), 2 * mine)


@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_writes_to_an_input_of_other_strides(layout: str) -> None:
    def function(x: Tensor) -> Tensor:
        x[0].mul_(3)
        return x.sum()

    program = freeze(function, [draw(2, 3)])
    x = torch.ones(2, 6, dtype=F64)[:, ::2] if layout == "strided" else torch.ones(3, 2, dtype=F64).t()
    close(program(x), torch.tensor(12.0, dtype=F64))
    close(x, torch.tensor([[3.0] * 3, [1.0] * 3], dtype=F64))


def row_scaled(x: Tensor) -> Tensor:
    x[0].mul_(3)
    return x.sum()


def all_moved(x: Tensor) -> Tensor:
    x.add_(1)
    return x.sum()


@pytest.mark.parametrize("function", [row_scaled, all_moved], ids=lambda f: f.__name__)
def test_writes_to_an_input_that_was_a_slice(function: Callable[[Tensor], Tensor]) -> None:
    """Recorded on a slice of the data, as batches are; replayed on a slice and on a tensor of its own, or refused."""
    data = draw(6, 3)
    x = data[:3]
    try:
        program = freeze(function, [x])
        before = plain(data)
        for given in (draw(3, 3), draw(9, 3)[2:5]):
            mine = plain(given)
            wanted = function(mine)
            close(program(given), wanted)
            close(plain(given), mine)
            close(data, before)
    except te.TapeError:
        return


def test_views_written_through() -> None:
    buffer = torch.zeros(4, 3, dtype=F64)

    def function(x: Tensor, buffer: Tensor) -> Tensor:
        buffer[1].copy_(x)
        buffer[:, 2].add_(1)
        buffer.view(-1)[0] = 5
        return (buffer * buffer).sum()

    program = freeze(function, [draw(3)], [buffer])
    expected = plain(buffer)
    for _ in range(3):
        x = draw(3)
        close(program(x), function(x, expected))
        close(buffer, expected)


def test_two_live_tensors_swapped() -> None:
    a, b = draw(3), draw(3)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        old = a.clone()
        a.copy_(b)
        b.copy_(old)
        return x + a

    program = freeze(function, [draw(3)], [a, b])
    first, second = plain(a), plain(b)
    x = draw(3)
    close(program(x), x + second)
    close(a, second)
    close(b, first)


def test_one_live_tensor_copied_onto_another() -> None:
    """As a target network follows: the source is written to as well, in the same code."""
    a, b = draw(3), draw(3)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a.copy_(b)
        b.add_(1)
        return x * a

    program = freeze(function, [draw(3)], [a, b])
    mine = plain(a), plain(b)
    for _ in range(2):
        x = draw(3)
        close(program(x), function(x, *mine))
        close(a, mine[0])
        close(b, mine[1])


def test_a_write_to_a_view_that_was_made_before() -> None:
    base = torch.zeros(2, 3, dtype=F64)
    row = base[1]
    with te.record() as tape:
        row.add_(1)
        y = base.sum()
    program = tape.program(outputs=y)
    close(program(), torch.tensor(6.0, dtype=F64))
    close(base, torch.tensor([[0.0] * 3, [2.0] * 3], dtype=F64))


def test_out_argument_onto_a_live_tensor() -> None:
    kept = torch.zeros(3, dtype=F64)

    def function(x: Tensor, kept: Tensor) -> Tensor:
        torch.mul(x, 2, out=kept)
        return kept.sum()

    program = freeze(function, [draw(3)], [kept])
    x = draw(3)
    close(program(x), (2 * x).sum())
    close(kept, 2 * x)


def test_noise_drawn_into_a_live_tensor() -> None:
    noise, x = torch.zeros(3, dtype=F64), draw(3)

    def function(x: Tensor, noise: Tensor) -> Tensor:
        noise.normal_()
        return x + noise

    program = freeze(function, [x], [noise])
    mine = torch.zeros(3, dtype=F64)
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = function(x, mine)
        torch.manual_seed(seed)
        close(program(x), wanted)
        close(noise, mine)


def test_a_write_that_cannot_be_done_changes_nothing() -> None:
    """An expanded input has one place for several elements: torch refuses to write to it, and so does a replay."""
    n = torch.zeros(())

    def function(x: Tensor) -> Tensor:
        n.add_(1)
        x.add_(1)
        return x.sum()

    program = freeze(function, [draw(4)])
    n.zero_()
    x = draw(1).expand(4)
    before = plain(x)
    for call in (program, program.step):
        with pytest.raises((te.TapeError, RuntimeError)):
            call(x)
    assert n == 0
    close(x, before)
    assert g_of(x) is None


SHARED = ["two inputs", "live and input", "two live"]


@pytest.mark.parametrize("how", SHARED)
def test_tensors_that_share_memory_and_one_is_written_to(how: str) -> None:
    """As recorded they share it, and they do so when replayed: with the same offset, or refused with another."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        before = b.sum()
        a.add_(1)
        return (a * 2 + b * b).sum() + before

    def pair(shift: int) -> tuple[Tensor, Tensor]:
        both = draw(6)
        return both[:3], both[shift : shift + 3]

    a, b = pair(1)
    with te.record() as tape:
        y = function(a, b)
    inputs = {"two inputs": (a, b), "live and input": (b,), "two live": ()}[how]
    try:
        program = tape.program(inputs=inputs, outputs=y)
    except te.NotRecordedError:
        return
    if how == "two inputs":
        pairs = [pair(1), pair(2), pair(3), pair(0), pair(1)]
        calls = [lambda p=p: program(*p) for p in pairs]
    elif how == "live and input":
        pairs = [(a, b), (a, draw(3)), (a, a), (a, b)]
        calls = [lambda p=p: program(p[1]) for p in pairs]
    else:
        pairs = [(a, b), (a, b)]
        calls = [program, program]
    for (a, b), call in zip(pairs, calls, strict=True):
        space = torch.zeros(6, dtype=F64)
        mine = copies_of(a, b, space)
        wanted = function(*mine)
        try:
            got = call()  # type: ignore[no-untyped-call]
        except te.InputError:
            continue
        close(got, wanted)
        close(plain(a), plain(mine[0]))
        close(plain(b), plain(mine[1]))


def copies_of(a: Tensor, b: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of two tensors that share memory as these do."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return plain(a), plain(b)
    first = a.as_strided((6,), (1,), 0).clone()
    return first[a.storage_offset() :][:3], first[b.storage_offset() :][:3]


def test_live_tensors_that_no_longer_share_memory() -> None:
    base = draw(2, 3)
    row = base[0]

    def function(x: Tensor) -> Tensor:
        row.add_(x)
        return base.sum()

    program = freeze(function, [draw(3)])
    base.data = draw(2, 3)  # from now on a write to `row` is not one to `base`
    x = draw(3)
    wanted, kept = base.sum(), plain(base)
    old = plain(row)
    try:
        got = program(x)
    except te.TapeError:
        return
    close(got, wanted)
    close(base, kept)
    close(row, old + x)


def test_batch_norm_called_twice() -> None:
    net = nn.BatchNorm1d(3, momentum=0.5).double()
    twin = copy.deepcopy(net)
    x = draw(5, 3)
    with te.record() as tape:
        y = net(net(x) * 2).square().sum()
    twin(twin(x) * 2)
    program = tape.program(inputs=x, outputs=y)
    for _ in range(3):
        x = draw(5, 3)
        close(program(x), twin(twin(x) * 2).square().sum().detach())
        for a, b in zip(net.buffers(), twin.buffers(), strict=True):
            close(a, b)


def test_batch_norm_whose_output_is_not_asked_for() -> None:
    """Running the code would move its statistics all the same."""
    net = nn.BatchNorm1d(3).double()
    twin = copy.deepcopy(net)
    x = draw(5, 3)
    with te.record() as tape:
        net(x)
        y = x.sum()
    program = tape.program(inputs=x, outputs=y)
    twin(x)
    program(x)
    twin(x)
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        close(a, b)


def test_batch_norm_in_eval_mode_moves_nothing() -> None:
    net = nn.BatchNorm1d(3).double().eval()
    before = [plain(b) for b in net.buffers()]
    follows(freeze(lambda x: net(x).square().sum(), [draw(5, 3)]), lambda x: net(x).square().sum(), [draw(5, 3)])
    for a, b in zip(net.buffers(), before, strict=True):
        assert torch.equal(a, b)


# -- a slice of a tensor that is written to through a slice of the slice ----------------------------------------


def test_a_written_slice_of_a_live_tensor_is_replayed_on_itself_and_refused_on_another() -> None:
    """On another tensor the code would leave the recorded base alone; the fix that is told is tried."""

    def code(x: Tensor) -> Tensor:
        x[1:].mul_(2)
        return (x * x).sum()

    base = torch.arange(6.0)
    x = base[1:4]
    with te.record() as tape:
        C = code(x)
    program = tape.program(inputs=x, outputs=C)
    twin = base.clone()
    assert torch.equal(program(x), code(twin[1:4]))
    assert torch.equal(base, twin)
    with pytest.raises(te.InputError, match="writes to memory that x and base shared, and share no more") as caught:
        program(torch.arange(6.0)[1:4])
    assert "fix: record on tensors of their own: x = x.clone() before the block" in str(caught.value)
    assert torch.equal(base, twin)

    x = x.clone()
    with te.record() as tape:
        C = code(x)
    program = tape.program(inputs=x, outputs=C)
    other, twin = torch.arange(6.0), torch.arange(6.0)
    assert torch.equal(program(other[1:4]), code(twin[1:4]))
    assert torch.equal(other, twin)


def test_inputs_that_share_memory_as_the_recorded_ones_did_not_are_named() -> None:
    x, y = torch.arange(3.0), torch.arange(3.0)
    with te.record() as tape:
        x.mul_(2)
        C = (x * y).sum()
    program = tape.program(inputs=(x, y), outputs=C)
    both = torch.arange(3.0)
    with pytest.raises(
        te.InputError, match="writes to memory that x and y share in another way than recorded"
    ) as caught:
        program(both, both)
    assert "fix: give a copy: .clone()" in str(caught.value)
    assert torch.equal(both, torch.arange(3.0))
    assert program(both, both.clone()) == 10
