"""`program.profile`: what it tells, on every backend, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine.program.profile import Held, Profile, ProfileRow
from tests.helpers import g_of
from tests.tape_engine.program.common import F32, draw, freeze, snapshot, unchanged

Tensor = torch.Tensor
BACKENDS = ("python", "native")


def loss_of(x: Tensor, w: Tensor) -> Tensor:
    with te.scope("layer"):
        z = x @ w
    return z.tanh().sum()


LINE = loss_of.__code__.co_firstlineno + 2  # that of ``z = x @ w``


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def held(profile: Profile) -> list[Held]:
    return [each for row in profile.rows for each in row.holds]


def test_a_row_for_each_operation_in_the_order_of_running() -> None:
    x, w = draw(30, 20), draw(20, 10)
    profile = freeze(loss_of, [x], [w], backend="python").profile(x)
    assert [row.place for row in profile.rows] == list(range(len(profile.rows)))
    forward = [row for row in profile.rows if row.part == "forward" and row.kind == "call"]
    assert [row.op for row in forward] == ["mm", "tanh", "sum"]
    assert forward[0].name == "z"
    product = forward[0]
    assert product.line == f"{Path(__file__).name}:{LINE}"
    assert product.code == "z = x @ w"
    assert product.scope == "layer"
    assert product.kind == "call"
    assert product.bytes_read == 8 * (30 * 20 + 20 * 10)
    assert product.bytes_written == 8 * 30 * 10
    assert product.low <= product.seconds <= product.high
    assert product.bytes_per_second == pytest.approx((product.bytes_read + product.bytes_written) / product.seconds)


def test_a_row_of_the_sweep_bears_the_line_and_scope_of_the_operation_whose_gradient_it_is_of() -> None:
    x, w = draw(30, 20), draw(20, 10)
    profile = freeze(loss_of, [x], [w], backend="python").profile(x)
    products = [row for row in profile.rows if row.part == "sweep" and row.op == "mm"]
    assert [row.name for row in products] == ["x_g", "w_g"]
    assert {(row.line, row.code, row.scope) for row in products} == {
        (f"{Path(__file__).name}:{LINE}", "z = x @ w", "layer")
    }


def test_every_operation_that_runs_stands_in_one_row(backend: str) -> None:
    x, w = draw(30, 20), draw(20, 10)
    program = freeze(loss_of, [x], [w], backend=backend)
    found = [(each.op, each.part) for each in held(program.profile(x))]
    frozen = program._frozen
    wanted = [(n.op.name, "forward") for n in frozen.forward] + [(n.op.name, "sweep") for n in frozen.backward]
    missing = len(wanted) - len(found)  # constants, and views of kept memory
    assert missing == program._step.source.once
    assert not {*found} - {*wanted}


def test_a_compiled_piece_is_one_row_that_tells_what_it_holds() -> None:
    x, w = draw(30, 20), draw(20, 10)
    profile = freeze(loss_of, [x], [w], backend="native").profile(x)
    pieces = [row for row in profile.rows if row.kind == "segment"]
    assert len(pieces) == 1
    piece = pieces[0]
    assert piece.part == "both"
    assert {"mm", "tanh", "sum"} <= {each.op for each in piece.holds}
    assert Held("mm", "z", f"{Path(__file__).name}:{LINE}", "layer", "forward") in piece.holds
    assert piece.bytes_read == x.nbytes + w.nbytes + 8  # x, w and the seed: what passes between them moves nothing
    assert piece.bytes_written == 8 + x.nbytes + w.nbytes
    assert profile.backend == "native"
    assert "mm" in str(profile)
    assert "tanh" in str(profile)


def test_blocks_of_rows_read_and_write_each_tensor_once() -> None:
    X, Y, w, b = draw(4_000, 100, dtype=F32), draw(4_000, dtype=F32), draw(100, 1, dtype=F32), draw(1, dtype=F32)
    program = freeze(lambda X, Y, w, b: te.mse(te.relu(te.lin(X, w, b)), Y), [X, Y], [w, b], backend="native")
    (row,) = [row for row in program.profile(X, Y, repeats=2).rows if row.kind == "rows"]
    assert row.op == "row blocks"
    assert row.bytes_read == X.nbytes + Y.nbytes + w.nbytes + b.nbytes + 4
    assert row.bytes_written == X.nbytes + Y.nbytes + w.nbytes + b.nbytes + 4


def test_the_times_add_up(backend: str) -> None:
    x, w = draw(300, 200), draw(200, 100)
    profile = freeze(loss_of, [x], [w], backend=backend).profile(x)
    assert all(row.seconds >= 0 for row in profile.rows)
    assert profile.timed == pytest.approx(sum(row.seconds for row in profile.rows))
    assert profile.around == pytest.approx(profile.seconds - profile.timed)
    assert sum(row.share for row in profile.rows) == pytest.approx(1)
    for totals in (profile.by_op(), profile.by_scope(), profile.by_line()):
        assert sum(total.count for total in totals.values()) == len(profile.rows)
        assert sum(total.seconds for total in totals.values()) == pytest.approx(profile.timed)
        assert sum(total.share for total in totals.values()) == pytest.approx(1)
        assert sum(total.bytes_read for total in totals.values()) == sum(row.bytes_read for row in profile.rows)
        seconds = [total.seconds for total in totals.values()]
        assert seconds == sorted(seconds, reverse=True)


def test_a_slow_operation_is_told_from_quick_ones() -> None:
    """Of a thousand times the work, most of the time."""
    x, w = draw(400, 400), draw(400, 400)
    program = freeze(lambda x, w: (x @ w @ w @ w @ w)[0, :2].exp().sum(), [x], [w], backend="python")
    totals = program.profile(x, sweep=False).by_op()
    assert next(iter(totals)) == "mm"


def test_top_is_the_slowest_first() -> None:
    x, w = draw(30, 20), draw(20, 10)
    profile = freeze(loss_of, [x], [w], backend="python").profile(x)
    seconds = [row.seconds for row in profile.top().rows]
    assert seconds == sorted(seconds, reverse=True)
    assert profile.top(2).rows == profile.top().rows[:2]
    assert profile.top(2).timed == profile.timed


def test_it_is_data() -> None:
    x, w = draw(30, 20), draw(20, 10)
    profile = freeze(loss_of, [x], [w], backend="python").profile(x, repeats=3)
    data = json.loads(json.dumps(profile.as_data()))
    assert data["runs"] == 3
    assert data["sweep"] is True
    assert len(data["rows"]) == len(profile.rows)
    assert {field.name for field in dataclasses.fields(ProfileRow)} < {*data["rows"][0]}
    assert data["rows"][0]["holds"][0]["op"] == "mm"


def test_it_prints_a_line_a_row_with_its_units() -> None:
    x, w = draw(30, 20), draw(20, 10)
    profile = freeze(loss_of, [x], [w], backend="python").profile(x, repeats=3)
    head, told, *rest = str(profile).splitlines()
    assert head == "profile of a replay with its sweep; backend python; median of 3 runs"
    assert "µs in all" in told
    rest = [line for line in rest if not line.strip().startswith("1 operation")]
    columns = "# operation value line scope part µs share read written GB/s".split()
    titles = next(i for i, line in enumerate(rest) if line.split() == columns)
    assert [line.split()[:2] for line in rest[titles + 1 : titles + 3]] == [["0", "mm"], ["1", "tanh"]]
    assert repr(profile) == str(profile)


def test_a_long_profile_prints_its_beginning() -> None:
    def many(x: Tensor) -> Tensor:
        for _ in range(300):
            x = x.sin()
        return x

    x = draw(2)
    profile = freeze(many, [x], backend="python").profile(x, sweep=False, repeats=1)
    assert len(profile.rows) == 300
    assert "and 100 more: profile.top(200), profile.rows" in str(profile)


def test_forward_alone(backend: str) -> None:
    x, w = draw(30, 20), draw(20, 10)
    program = freeze(loss_of, [x], [w], backend=backend)
    for profile in (
        program.profile(x, sweep=False),
        freeze(lambda x: x > 0, [x], backend=backend).profile(x),  # of a program without a sweep
    ):
        assert profile.sweep is False
        assert {row.part for row in profile.rows} == {"forward"}
        assert str(profile).startswith("profile of a replay, forward;")


def test_an_output_of_several_elements_takes_a_seed(backend: str) -> None:
    x, w = draw(3, 2), draw(2, 2)
    program = freeze(lambda x, w: (x @ w).tanh(), [x], [w], backend=backend)
    with pytest.raises(te.ShapeError, match=r"program\.profile: tanh has 6 elements") as caught:
        program.profile(x)
    assert "fix: program.profile(..., seed=torch.ones((3, 2)))" in str(caught.value)
    assert program.profile(x, seed=torch.ones(3, 2, dtype=torch.float64)).sweep
    assert not program.profile(x, sweep=False).sweep


# -- nothing is left behind ------------------------------------------------------------------------------------


def test_no_g_and_no_tensor_changes(backend: str) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    x = draw(16, 4, dtype=F32)
    state, count = torch.zeros(8), torch.zeros(3)

    def code(x: Tensor) -> Tensor:
        y = net(x)
        state.add_(y.detach().sum(0))
        count[1:].add_(1)
        x.mul_(2)
        loss: Tensor = y.square().mean()
        return loss

    with te.record() as tape:
        loss = code(x)
    program = tape.program(inputs=x, outputs=loss, backend=backend)
    program.step(x)
    tensors = [x, state, count, *net.parameters(), *net.buffers()]
    before = snapshot(*tensors)
    versions = [t._version for t in tensors]
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    program.profile(x, repeats=3)
    assert torch.equal(torch.get_rng_state(), drawn)
    unchanged(before, *tensors)
    assert [t._version for t in tensors] == versions

    # and a replay afterwards is what it would have been
    again = program.step(x)
    with torch.no_grad():
        for t, (contents, *_) in zip(tensors, before, strict=True):
            t.copy_(contents)
    torch.set_rng_state(drawn)
    assert torch.equal(program.step(x), again)


def test_every_run_finds_what_the_first_one_found(backend: str) -> None:
    """A guard on a counter that the code itself moves on: a second run on its result would be refused."""
    steps, x = torch.zeros(()), draw(3, dtype=F32)

    def code(x: Tensor) -> Tensor:
        steps.add_(1)
        return x.sin().sum() if steps.item() < 1.5 else x.cos().sum()

    with te.record() as tape:
        y = code(x)
    steps.zero_()
    program = tape.program(inputs=x, outputs=y, backend=backend)
    assert program.profile(x, repeats=4).runs == 4
    assert steps.item() == 0
    with torch.no_grad():
        steps.fill_(7)
    with pytest.raises(te.GuardError):
        program.profile(x)
    assert steps.item() == 7


def test_other_generators_are_left_where_they_stand(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = draw(3)
    program = freeze(lambda x: (x * torch.rand(3, generator=generator, dtype=x.dtype)).sum(), [x], backend=backend)
    before, python = generator.get_state(), random.getstate()
    program.profile(x)
    assert torch.equal(generator.get_state(), before)
    assert random.getstate() == python


def test_nothing_of_it_is_recorded(backend: str) -> None:
    x, w = draw(3, 2), draw(2, 2)
    program = freeze(loss_of, [x], [w], backend=backend)
    length = len(te.global_tape())
    with te.record() as tape:
        y = x * 2
        program.profile(x)
        C = y.sum()
    assert len(tape) == 2
    assert len(te.global_tape()) == length
    te.backward(C)
    assert torch.equal(g_of(x), torch.full_like(x, 2))  # type: ignore[arg-type]


def test_a_waiting_sweep_is_not_disturbed(backend: str) -> None:
    x, buffer = draw(3), torch.zeros(3, dtype=torch.float64)

    def code(x: Tensor) -> Tensor:
        buffer.add_(x.detach())
        return (x * buffer).sum()

    program = freeze(code, [x], backend=backend)
    C = te.lin(x[None], buffer[:, None].clone(), torch.zeros(1, dtype=torch.float64)).sum()
    program.profile(x)
    te.backward(C)
    assert torch.equal(g_of(x), buffer)  # type: ignore[arg-type]


# -- what is refused ---------------------------------------------------------------------------------------------


def test_inputs_are_checked_as_in_a_replay(backend: str) -> None:
    x, w = draw(3, 2), draw(2, 2)
    program = freeze(loss_of, [x], [w], backend=backend)
    for call in (program.step, program.profile):
        with pytest.raises(te.InputError, match="1 tensor does not fit what was recorded"):
            call(draw(4, 2))
        with pytest.raises(te.InputError, match="takes 1 input"):
            call()


def test_guards_are_checked_as_in_a_replay(backend: str) -> None:
    x = draw(3).abs()
    program = freeze(lambda x: x.sin().sum() if x.sum() > 0 else x.cos().sum(), [x], backend=backend)
    assert "guard" in {row.kind for row in program.profile(x).rows}
    with pytest.raises(te.GuardError, match="comes out differently"):
        program.profile(-x)


@pytest.mark.parametrize("repeats", [0, -1, 2.5, "3", True])
def test_repeats_is_a_number_of_runs(repeats: Any) -> None:
    x, w = draw(3, 2), draw(2, 2)
    with pytest.raises(te.DTypeError, match="repeats is how often the program is run, 1 or more") as caught:
        freeze(loss_of, [x], [w]).profile(x, repeats=repeats)
    assert "fix: repeats=10" in str(caught.value)


# -- other ways to a program -------------------------------------------------------------------------------------


def test_a_program_from_a_file_tells_the_same_lines(tmp_path: Path) -> None:
    x, w = draw(30, 20), draw(20, 10)
    program = freeze(loss_of, [x], [w])
    program.save(tmp_path / "p.te")

    def told(profile: Profile) -> list[Any]:
        return [(row.op, row.line, row.scope, row.part, row.bytes_read, row.bytes_written) for row in profile.rows]

    assert told(te.load(tmp_path / "p.te").profile(x)) == told(program.profile(x))


def test_names_of_the_user_s_that_a_clock_could_bear(backend: str) -> None:
    clock, stamp = draw(3), draw(3)

    def code(clock: Tensor) -> Tensor:
        return (clock * stamp).sum()

    program = freeze(code, [clock], backend=backend)
    assert program.profile(clock).rows


def test_a_replayable_function_without_running_it(capsys: pytest.CaptureFixture[str]) -> None:

    @te.replayable
    def loss(x: Tensor, scale: float = 1.0) -> Tensor:
        print("ran", end=" ")
        return (x.sin() if x.sum() > 0 else x.cos()).sum() * scale

    x = draw(3).abs()
    with pytest.raises(te.NotRecordedError, match=r"loss\.profile: this kind of call has no recording") as caught:
        loss.profile(x)
    assert "fix: call loss(...) once, before" in str(caught.value)
    assert not capsys.readouterr().out
    loss(x)
    loss(-x)
    assert "sin" in {h.op for h in held(loss.profile(x, repeats=2))}
    assert "cos" in {h.op for h in held(loss.profile(-x))}
    assert loss.profile(x, sweep=False).sweep is False
    with pytest.raises(te.NotRecordedError):
        loss.profile(x, scale=2.0)
    assert capsys.readouterr().out == "ran ran "


def test_a_replayable_method() -> None:
    class Model:
        def __init__(self) -> None:
            self.w = draw(3)

        @te.replayable
        def loss(self, x: Tensor) -> Tensor:
            return (self.w * x).sum()

    model, x = Model(), draw(3)
    model.loss(x)
    profile: Callable[..., Profile] = model.loss.profile
    assert "mul" in {h.op for h in held(profile(x))}
