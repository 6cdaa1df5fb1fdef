"""Where the recorded code got a view or a copy, whichever the strides gave: a replay does the same, or refuses.

Every function runs again in plain torch on a copy of what the replay is given, of the same strides. A replay on other
strides than those recorded must give the same results and leave the same tensors, or be refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tape_engine as te
from tape_engine.program.backends import native
from tests.helpers import close, plain
from tests.tape_engine.program.common import F64, draw

Tensor = torch.Tensor
Function = Callable[[Tensor, Tensor], Tensor]

STRIDES = {"in order": (4, 1), "transposed": (1, 4), "spread": (8, 2)}
WEIGHTS = torch.arange(16, dtype=F64)


def lying(how: str) -> Tensor:
    """Numbers (4, 4) in memory of their own, of certain strides."""
    return torch.empty_strided((4, 4), STRIDES[how], dtype=F64).copy_(draw(4, 4))


def alike(tensor: Tensor) -> Tensor:
    """A copy of the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())


# -- which is written to --------------------------------------------------------------------------------------------


def result_written(x: Tensor, w: Tensor) -> Tensor:
    y = x.reshape(-1)
    y.add_(1)
    return y.sum()


def base_written(x: Tensor, w: Tensor) -> Tensor:
    y = x.reshape(-1)
    x.add_(1)
    return (y * WEIGHTS).sum()


def itself_written(x: Tensor, w: Tensor) -> Tensor:
    y = x.contiguous()
    y.add_(1)
    return (y * w).sum()


def of_a_result(x: Tensor, w: Tensor) -> Tensor:
    h = x * w
    y = h.flatten()
    y.mul_(2)
    return (h * 3).sum() + y.sum()


def base_of_a_result(x: Tensor, w: Tensor) -> Tensor:
    h = x * w
    y = torch.flatten(h)
    h.mul_(2)
    return (y * WEIGHTS).sum()


def part_written(x: Tensor, w: Tensor) -> Tensor:
    y = x.ravel()
    y[2:5] = 0
    return (x * WEIGHTS.view(4, 4)).sum()


def column_written(x: Tensor, w: Tensor) -> Tensor:
    y = x.reshape(2, 8)
    x.t()[0].mul_(3)
    return (y * WEIGHTS.view(2, 8)).sum()


def written_and_never_read(x: Tensor, w: Tensor) -> Tensor:
    y = x.t().reshape(-1)
    y.add_(1)
    return (x * w).sum()


def written_through_a_detached_one(x: Tensor, w: Tensor) -> Tensor:
    x.reshape(-1).detach().add_(1)
    return (x * w).sum()


def written_without_gradient(x: Tensor, w: Tensor) -> Tensor:
    y = x.reshape(-1)
    with torch.no_grad():
        y.add_(1)
    return (x * w).sum()


def base_of_what_repeats(x: Tensor, w: Tensor) -> Tensor:
    y = x.expand(2, 4, 4).reshape(2, 16)
    x.add_(1)
    return (y * WEIGHTS).sum()


def windows_side_by_side(x: Tensor, w: Tensor) -> Tensor:
    y = x[0].unfold(0, 2, 2).contiguous()
    y.add_(1)
    return (x * w).sum() + y.sum()


def written_by_out(x: Tensor, w: Tensor) -> Tensor:
    y = x.reshape(-1)
    torch.sin(x, out=x)
    return (y * WEIGHTS).sum()


def in_a_memory_format(x: Tensor, w: Tensor) -> Tensor:
    h = (x * w)[None, None].expand(1, 3, 4, 4).clone(memory_format=torch.preserve_format) * x
    y = h.to(memory_format=torch.channels_last)
    y.add_(1)
    return (h * WEIGHTS.view(4, 4)).sum()


@te.op
def in_order(x: Tensor) -> Tensor:
    return x.contiguous()


@in_order.rule
def in_order_grad(g, out, x):  # type: ignore[no-untyped-def]
    return g


@te.op
def in_a_row(x: Tensor) -> Tensor:
    """A body that branches on its numbers, so that nobody looks into it."""
    return x.reshape(16) if float(x.sum()) > -1e9 else x.reshape(16) * 2


@in_a_row.rule
def in_a_row_grad(g, out, x):  # type: ignore[no-untyped-def]
    return g.reshape(4, 4)


@te.op
def summed(x: Tensor) -> Tensor:
    return x.sum() if x.is_contiguous() else x.mean()


@summed.rule
def summed_grad(g, out, x):  # type: ignore[no-untyped-def]
    return g.expand(x.shape)


def in_an_operation(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = in_order(x)
    y.add_(1)
    return (y * x).sum()


def in_an_operation_left_whole(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = in_a_row(x)
    y.add_(1)
    return (y * x.flatten()).sum()


def asked_in_an_operation(x: Tensor, w: Tensor) -> Tensor:
    out: Tensor = summed(x)
    return out * 2


def by_strides(x: Tensor, w: Tensor) -> Tensor:
    return x.as_strided((3,), (2,)).sum()


def decided_by_layout(x: Tensor, w: Tensor) -> Tensor:
    return x.sum() if x.is_contiguous() else x.mean()


def counted_in_strides(x: Tensor, w: Tensor) -> Tensor:
    return x.sum() * x.stride()[0]


MATTERS: list[Function] = [
    result_written, base_written, itself_written, of_a_result, base_of_a_result, part_written, column_written,
    written_and_never_read, written_through_a_detached_one, written_without_gradient, written_by_out,
    base_of_what_repeats, windows_side_by_side,
    in_a_memory_format, in_an_operation, in_an_operation_left_whole, asked_in_an_operation, by_strides,
    decided_by_layout, counted_in_strides,
]  # fmt: skip


# -- which is not, or where nobody could tell ------------------------------------------------------------


def only_read(x: Tensor, w: Tensor) -> Tensor:
    return (x.reshape(-1) * WEIGHTS).sum() + x.contiguous().flatten().sum()


def written_before(x: Tensor, w: Tensor) -> Tensor:
    x.mul_(2)
    return (x.contiguous().reshape(-1) * WEIGHTS).sum()


def the_other_is_not_read(x: Tensor, w: Tensor) -> Tensor:
    return ((x * w).flatten().relu_() * WEIGHTS).sum()


def of_a_product(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w  # in order, whatever x and w are
    y = h.flatten()
    y.mul_(2)
    return (h * 3).sum()


def of_a_layer(x: Tensor, w: Tensor) -> Tensor:
    h = torch.nn.functional.linear(x[None], w).flatten(1)
    return torch.nn.functional.dropout(torch.nn.functional.relu(h, inplace=True), 0.5, False, True).sum()


def by_a_view_of_the_user_s(x: Tensor, w: Tensor) -> Tensor:
    y = x[:2, :2].view(4, 1) if x.stride()[1] > 5 else x[:2].view(2, 2, 2)
    y.add_(1)
    return (x * WEIGHTS.view(4, 4)).sum()


def of_a_dtype(x: Tensor, w: Tensor) -> Tensor:
    y = x.to(F64)  # itself, however it lies
    y.add_(1)
    return (y * w).sum()


def beside(x: Tensor, w: Tensor) -> Tensor:
    count = torch.zeros(4, dtype=F64)
    square = count.reshape(2, 2)
    count.add_(w.diagonal())
    return square.sum() * x.flatten().sum()


def windows(x: Tensor, w: Tensor) -> Tensor:
    y = x.unfold(1, 2, 1).contiguous().view(-1)
    y.mul_(2)
    z = x.expand(3, 4, 4).contiguous()
    x.add_(1)
    return (x * w).sum() + y.sum() + (z * w).sum()


DOES_NOT: list[Function] = [
    windows, only_read, written_before, the_other_is_not_read, of_a_product, of_a_layer, of_a_dtype, beside,
]  # fmt: skip

BACKENDS = ["python", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="an extra"))]


def refused(program: te.Program, function: Function, x: Tensor, w: Tensor) -> bool:
    """Whether a replay on `x` is refused; if it is not, it does what the function does."""
    mine, his = alike(x), alike(w)
    before = plain(x), plain(w)
    try:
        got = program(x)
    except te.InputError:
        with pytest.raises(te.InputError, match=r"strides[\s\S]*fix: record again on these"):
            program.step(x)
        assert torch.equal(x, before[0])
        assert torch.equal(w, before[1])
        return True
    with torch.no_grad():
        close(got, function(mine, his))
    close(x, mine)
    close(w, his)
    return False


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [*MATTERS, *DOES_NOT], ids=lambda f: f.__name__)
@pytest.mark.parametrize("recorded", STRIDES)
def test_a_replay_on_other_strides(function: Function, recorded: str, backend: str) -> None:
    x, w = lying(recorded), draw(4, 4)
    with te.record() as tape:
        out = function(x, w)
    program = tape.program(inputs=x, outputs=out, backend=backend)
    found = {how: refused(program, function, lying(how), w) for how in STRIDES}
    assert not found.pop(recorded)
    if function in DOES_NOT:
        assert not any(found.values())


@pytest.mark.parametrize("function", MATTERS, ids=lambda f: f.__name__)
def test_of_what_matters_some_layout_is_refused(function: Function) -> None:
    """Else the test above would show nothing."""
    found = []
    for recorded in STRIDES:
        x, w = lying(recorded), draw(4, 4)
        with te.record() as tape:
            out = function(x, w)
        program = tape.program(inputs=x, outputs=out)
        found += [refused(program, function, lying(how), w) for how in STRIDES]
    assert any(found)


def test_a_view_that_the_user_asks_for_by_name_demands_no_strides() -> None:
    def function(x: Tensor) -> Tensor:
        y = x[:2].view(2, 2, 2)
        y.add_(1)
        return (x * WEIGHTS.view(4, 4)).sum()

    x = lying("in order")
    with te.record() as tape:
        out = function(x)
    program = tape.program(inputs=x, outputs=out)
    x = lying("spread")
    mine = alike(x)
    close(program(x), function(mine))
    close(x, mine)


# -- live tensors, files, recordings of replays, te.replayable, outside a block ------------------------------


def test_a_live_tensor_that_lies_otherwise_now() -> None:
    w = torch.nn.Parameter(lying("in order"))
    x = draw(4, 4)
    with te.record() as tape:
        with torch.no_grad():
            w.reshape(-1).add_(1)
        out = (w * x.reshape(-1).mul_(2).view(4, 4)).sum()
    program = tape.program(inputs=x, outputs=out)
    w.data = lying("transposed")
    before = plain(w)
    with pytest.raises(
        te.InputError, match=r"2 tensors do not fit[\s\S]*x .*strides \(4, 1\)[\s\S]*w .*strides \(4, 1\)"
    ):
        program.step(lying("transposed"))
    assert torch.equal(w, before)
    w.data = lying("in order")
    mine = plain(w) + 1
    x = draw(4, 4)
    close(program(x), (mine * x).sum())  # which is doubled by now


def test_strides_of_single_elements_and_of_none_are_no_difference() -> None:
    def function(x: Tensor) -> Tensor:
        x.reshape(-1).add_(1)
        return x.sum()

    x = torch.zeros(4, 1)
    with te.record() as tape:
        out = function(x)
    program = tape.program(inputs=x, outputs=out)
    assert program(torch.empty_strided((4, 1), (1, 7)).zero_()) == 4
    x = torch.zeros(0, 3)
    with te.record() as tape:
        out = function(x)
    assert tape.program(inputs=x, outputs=out)(torch.empty_strided((0, 3), (1, 5))) == 0


def test_a_conjugated_input_where_the_recorded_one_was_not() -> None:
    x = draw(3, dtype=torch.complex128)
    with te.record() as tape:
        y = x.resolve_conj()
        y.add_(1)
        out = (x * 2).sum()
    program = tape.program(inputs=x, outputs=out)
    with pytest.raises(te.InputError, match="conjugated"):
        program(draw(3, dtype=torch.complex128).conj())
    x = draw(3, dtype=torch.complex128)
    mine = plain(x) + 1
    close(program(x), (mine * 2).sum())
    close(x, mine)


def test_a_program_from_a_file_demands_the_same(tmp_path: Path) -> None:
    x = lying("in order")
    with te.record() as tape:
        out = result_written(x, x)
    tape.program(inputs=x, outputs=out).save(tmp_path / "p.te")
    program = te.load(tmp_path / "p.te")
    assert refused(program, result_written, lying("transposed"), draw(4, 4))
    assert not refused(program, result_written, lying("in order"), draw(4, 4))


def test_a_recording_of_a_replay_demands_the_same() -> None:
    x = lying("in order")
    with te.record() as tape:
        out = result_written(x, x)
    inner = tape.program(inputs=x, outputs=out)
    y = lying("in order")
    with te.record() as tape:
        twice = inner(y) * 2
    outer = tape.program(inputs=y, outputs=twice)
    with pytest.raises(te.InputError, match="strides"):
        outer(lying("transposed"))
    z = lying("in order")
    close(outer(z), 2 * z.sum())


def test_replayable_records_each_layout_once() -> None:
    fast = te.replayable(base_of_a_result)
    w = draw(4, 4)
    for _ in range(3):
        for how in STRIDES:
            x = lying(how)
            close(fast(x, w), base_of_a_result(alike(x), w))
    assert len(fast.programs) == len(STRIDES)


def test_replayable_says_that_layouts_change() -> None:
    @te.replayable
    def moved(x: Tensor) -> Tensor:
        x.reshape(-1).add_(1)
        return x.sum()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(12):
            moved(torch.empty_strided((3, 3), (20 + step, 1)).zero_())
    (text,) = [str(each.message) for each in told]
    for part in ("moved was recorded 10 times", "how its tensors lie", "strides", "fix: give tensors that lie alike"):
        assert part in text


@pytest.mark.parametrize(("recorded", "given"), [("in order", "transposed"), ("transposed", "in order")])
@pytest.mark.parametrize("which", ["result", "base", "itself", "asked"])
def test_outside_a_block(recorded: str, given: str, which: str) -> None:
    def function(x: Tensor, relu: Callable[[Tensor], Tensor]) -> Tensor:
        Z = relu(x)
        if which == "asked":
            return Z.sum() if Z.is_contiguous() else Z.mean()
        y = Z.contiguous() if which == "itself" else Z.reshape(-1)
        (Z if which == "base" else y).add_(1)
        return (y * WEIGHTS.view(y.shape)).sum() + (0 if which == "base" else (Z * 2).sum())

    x = lying(recorded)
    out = function(x, te.relu)
    program = te.global_tape().program(inputs=x, outputs=out)
    x = lying(recorded)
    close(program(x), function(x, torch.relu))
    with pytest.raises(te.InputError, match="strides"):
        program(lying(given))
