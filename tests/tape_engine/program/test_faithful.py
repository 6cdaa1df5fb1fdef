"""A replay gives what running the code again would: cases that went wrong once, or easily could."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

import tape_engine as te
from tape_engine.program import calls
from tests.helpers import agree, close, g_of, reference
from tests.tape_engine.program.common import F64, draw, freeze

Tensor = torch.Tensor


# -- what goes on beside a program ---------------------------------------------------------------------------


def test_after_freezing_plain_operations_on_a_leaf_are_still_recorded() -> None:
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = (w * x).sum()
    program = tape.program(inputs=x, outputs=y)
    z = (w * 2).sum() + y
    te.backward(z)
    close(g_of(w), x + 2)
    assert program(x) == (w * x).sum()


def test_a_replay_is_not_recorded_because_its_own_tape_listens() -> None:
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = (w * x).sum()
    program = tape.program(inputs=x, outputs=y)
    length = len(te.global_tape())
    made = program(x)
    assert len(te.global_tape()) == length
    assert type(made) is Tensor
    Z = te.relu(w)  # now the global tape knows w as well, and the replay reads it
    through = program(x) + Z.sum()
    te.backward(through)
    close(g_of(w), x + (w > 0).to(F64))


def test_a_step_to_an_unreachable_tensor_leaves_it_without_g() -> None:
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = (x * 2).sum() + w.detach().sum()
    w.g = draw(3)  # type: ignore[attr-defined]
    program = tape.program(inputs=x, outputs=y, wrt=w)
    close(program.step(x), (x * 2).sum() + w.sum())
    assert g_of(w) is None


def test_a_step_from_what_has_no_gradient_is_refused_whatever_is_asked_for() -> None:
    x = draw(3)
    with te.record() as tape:
        y = (x > 0).sum()
    program = tape.program(inputs=x, outputs=y, wrt=x)
    with pytest.raises(te.MissingRuleError):
        program.step(x)


def test_too_few_inputs_tell_the_line_and_what_is_taken() -> None:
    x, y = draw(3), draw(2)
    with te.record() as tape:
        z = x.sum() * y
    program = tape.program(inputs=(x, y), outputs=z)
    with pytest.raises(te.InputError, match=r"takes 2 inputs \(x, y\), not 1") as caught:
        program.step(x)
    text = str(caught.value)
    assert "program.step(x)" in text
    assert "y    recorded (2,)  float64" in text
    assert "fix: program.step(x, y)" in text


def test_a_wrong_backend_is_a_value_error() -> None:
    x = draw(3)
    with te.record() as tape:
        y = x.exp()
    with pytest.raises(te.BackendError, match=r"not 'cobol'[\s\S]*fix: ") as caught:
        tape.program(inputs=x, outputs=y, backend="cobol")
    assert isinstance(caught.value, ValueError)


def test_a_rate_that_changes_adds_no_way_to_call() -> None:
    def once(rate: float) -> None:
        x = torch.ones(3)
        with te.record() as tape:
            y = torch.add(x, x, alpha=rate).clamp(max=rate * 8)
        close(tape.program(inputs=x, outputs=y)(x), torch.full((3,), 1 + rate))

    once(0.5)
    known = len(calls._known)
    for turn in range(20):
        once(0.25 + turn / 64)
    assert len(calls._known) == known


def test_the_ways_to_call_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "KINDS", 8)
    for size in range(1, 30):
        x = torch.ones(40)
        with te.record() as tape:
            y = x.reshape(8, 5).roll(size, 1).exp()
        close(tape.program(inputs=x, outputs=y)(x), x.reshape(8, 5).roll(size, 1).exp())
        assert len(calls._known) <= 8


# -- what a program keeps ------------------------------------------------------------------------------------


def test_a_program_keeps_neither_inputs_nor_activations() -> None:
    w = draw(40, 40)

    def build() -> tuple[te.Program, list[weakref.ref[Tensor]]]:
        x = draw(30, 40)
        with te.record() as tape:
            h = (x @ w).tanh()
            named = te.relu(h)
            mask = torch.nn.functional.dropout(named, 0.5)
            c = (mask * h).exp().sum() + mask.mean()
        return tape.program(inputs=x, outputs=c), [weakref.ref(t) for t in (x, h, named, mask, c)]

    program, refs = build()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5
    x = draw(30, 40)
    assert program.step(x).shape == ()
    assert g_of(w) is not None
    assert type(w) is Tensor  # the tape is gone, and nobody listens any more


def test_the_memory_of_a_recording_goes_with_it() -> None:
    w = draw(64, 64)
    gc.collect()

    def alive() -> int:
        gc.collect()
        memory = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), Tensor)]
        return sum({each._cdata: each.nbytes() for each in memory}.values())

    before = alive()
    x = draw(64, 64)
    with te.record() as tape:
        c = (((x @ w).tanh() @ w).tanh() @ w).exp().sum()
    program = tape.program(inputs=x, outputs=c)
    del tape, c, x
    assert alive() - before < 64 * 64 * 8
    close(program(torch.zeros(64, 64, dtype=F64)), torch.tensor(64.0 * 64, dtype=F64))


def test_the_tape_that_was_frozen_can_still_be_swept_and_frozen_again() -> None:
    x, w = draw(3, 4), draw(4)
    with te.record() as tape:
        c = (x @ w).tanh().sum()
    first = tape.program(inputs=x, outputs=c)
    second = tape.program(inputs=(x, w), outputs=c)
    te.backward(c)
    wanted = x.t() @ (1 - (x @ w).tanh() ** 2)
    close(g_of(w), wanted)
    first.step(x)
    close(g_of(w), wanted)
    v = w.clone()
    second.step(x, v)
    close(g_of(v), wanted)
    assert len(first.tape) == len(tape)


# -- effects, recording after recording ------------------------------------------------------------------------


@pytest.mark.parametrize("between", [False, True])
def test_a_live_tensor_that_two_recordings_write_to(between: bool) -> None:
    n = torch.zeros(())

    def record() -> te.Program:
        x = draw(3)
        with te.record() as tape:
            n.add_(1)
            y = x * n
        tapes.append(tape)
        program: te.Program = tape.program(inputs=x, outputs=y)
        return program

    tapes: list[te.Tape] = []
    first = record()
    if between:
        first(draw(3))
    second = record()
    count = 2 + between
    for program in (first, second, second, first):
        x = draw(3)
        count += 1
        close(program(x), x * count)
        assert n == count


def test_running_statistics_from_training_recorded_to_evaluation_recorded() -> None:
    net = torch.nn.BatchNorm1d(3).double()
    twin = torch.nn.BatchNorm1d(3).double()
    x = draw(5, 3)
    with te.record() as tape:
        y = net(x).square().sum()
    training = tape.program(inputs=x, outputs=y)
    twin(x)
    for _ in range(3):
        x = draw(5, 3)
        training.step(x)
        twin(x)
    net.eval()
    twin.eval()
    with te.record() as tape:
        y = net(x).square().sum()
    evaluation = tape.program(inputs=x, outputs=y)
    x = draw(5, 3)
    close(evaluation(x), twin(x).detach().square().sum())
    training(x)
    twin.train()(x)
    twin.eval()
    close(evaluation(x), twin(x).detach().square().sum())


def test_a_guard_that_refuses_draws_nothing() -> None:
    x, generator = torch.ones(4), torch.Generator().manual_seed(3)
    with te.record() as tape:
        y = torch.nn.functional.dropout(x, 0.5) + torch.rand(4, generator=generator)
        z = (y * 2 if x.sum() > 0 else y).sum()
    program = tape.program(inputs=x, outputs=z)
    before = torch.get_rng_state(), generator.get_state()
    for call in (program, program.step):
        with pytest.raises(te.GuardError):
            call(-x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(generator.get_state(), before[1])


# -- random streams ----------------------------------------------------------------------------------------------


def seeded_first(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(3) * x


def seeded_between(x: Tensor) -> Tensor:
    y = torch.rand(3) * x
    torch.manual_seed(1)
    return y + torch.rand(3)


def forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        return torch.nn.functional.dropout(x, 0.5)


def own_generator(x: Tensor) -> Tensor:
    generator = torch.Generator()
    y = torch.rand(3, generator=generator) * x
    generator.manual_seed(5)
    return y + torch.rand(3, generator=generator)


def drawn_unheard(x: Tensor) -> Tensor:
    y = torch.rand(3) * x
    with te.pause():
        torch.rand(1)
    return y + torch.rand(3)


@pytest.mark.parametrize("function", [seeded_first, seeded_between, forked, own_generator, drawn_unheard])
def test_streams_that_something_else_moves_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(3)
    with te.record() as tape:
        y = function(x)
    with pytest.raises(te.NotRecordedError, match=r"random generator[\s\S]*test_faithful.py:\d+[\s\S]*fix: seed"):
        tape.program(inputs=x, outputs=y)


def test_replays_draw_what_running_the_code_again_would() -> None:
    generator = torch.Generator()

    @te.op
    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand(3, dtype=F64)

    @noisy.rule
    def noisy_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g

    def function(x: Tensor) -> Tensor:
        y = torch.nn.functional.dropout(x, 0.5) + torch.rand(3, generator=generator, dtype=F64)
        torch.rand(5)  # nobody reads it
        y = y + torch.empty(3, dtype=F64).normal_() + torch.randperm(3).to(F64) + torch.rand_like(x)
        out: Tensor = noisy(y) + torch.bernoulli(torch.full((3,), 0.5, dtype=F64))
        return out

    x = draw(3)
    with te.record() as tape:
        y = function(x)
    program = tape.program(inputs=x, outputs=y)
    for seed in range(4):
        x = draw(3)
        torch.manual_seed(seed)
        generator.manual_seed(seed)
        wanted, after = function(x), (torch.rand(1), torch.rand(1, generator=generator))
        torch.manual_seed(seed)
        generator.manual_seed(seed)
        got = program.step(x, seed=torch.ones(3, dtype=F64)) if seed % 2 else program(x)
        close(got, wanted)
        assert (torch.rand(1), torch.rand(1, generator=generator)) == after


def test_seeding_where_nothing_is_drawn_is_no_matter() -> None:
    x = torch.ones(3)
    with te.record() as tape:
        torch.manual_seed(3)
        y = x * 2
    close(tape.program(inputs=x, outputs=y)(x), x * 2)


# -- writes that are no operations -----------------------------------------------------------------------------


def data_of_a_parameter(x: Tensor, w: Tensor) -> Tensor:
    y = w * x
    w.data = w.data * 2
    return w * x + y


def data_of_a_result(x: Tensor, w: Tensor) -> Tensor:
    h = x * w
    h.data = x * 5
    return h * x


def data_before_it_is_read(x: Tensor, w: Tensor) -> Tensor:
    w.data = x * 5
    return w * x


def storage_copied(x: Tensor, w: Tensor) -> Tensor:
    w.untyped_storage().copy_((x * 5).untyped_storage())
    return w * x


def storage_resized(x: Tensor, w: Tensor) -> Tensor:
    y = w * x
    w.untyped_storage().resize_(0)
    w.untyped_storage().resize_(24)
    w.copy_(x)
    return y + w


def set_to_another(x: Tensor, w: Tensor) -> Tensor:
    w.set_(x * 5)  # type: ignore[call-overload]
    return w * x


UNFOLLOWED = [storage_copied, storage_resized, set_to_another]
FOLLOWED = [data_of_a_parameter, data_of_a_result, data_before_it_is_read]


@pytest.mark.parametrize("function", FOLLOWED)
def test_setting_data_is_replayed(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = function(x, w)
    program = tape.program(inputs=x, outputs=y)
    for _ in range(2):
        x, twin = draw(3), w.clone()
        wanted = function(x, twin)
        close(program(x), wanted)
        close(w, twin)


@pytest.mark.parametrize("function", UNFOLLOWED)
def test_writes_that_are_no_operations_are_refused(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = function(x, w)
    with pytest.raises(te.NotRecordedError, match=r"test_faithful.py:\d+[\s\S]*fix: write to the elements"):
        tape.program(inputs=x, outputs=y)
    w = draw(3)
    w.data = draw(3)  # outside a block it is what it was
    with te.record() as tape:
        y = w * x
    w.data = draw(3)
    close(tape.program(inputs=x, outputs=y)(x), w * x)


def test_writes_through_data_are_operations() -> None:
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = w * x
        w.data.mul_(2)
        y = y + w * x
    program = tape.program(inputs=x, outputs=y)
    before = w.clone()
    close(program(x), 3 * before * x)
    close(w, 2 * before)


def test_a_slice_written_through_a_view_of_it_is_refused_as_an_input() -> None:
    writing: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[1:].mul_(2) * 1,
        lambda x: x.view(3).mul_(2) * 1,
    ]
    for function in writing:
        x = torch.arange(6.0)[1:4]
        with te.record() as tape:
            y = function(x)
        with pytest.raises(te.NotRecordedError, match=r"x is a slice[\s\S]*fix: .*clone"):
            tape.program(inputs=x, outputs=y)
        x = x.clone()
        with te.record() as tape:
            y = function(x)
        fresh = torch.arange(6.0)[1:4] + 1
        twin = fresh.clone()
        close(tape.program(inputs=x, outputs=y)(fresh), function(twin))
        close(fresh, twin)


# -- who owns results, and what they are -----------------------------------------------------------------------


@pytest.mark.parametrize("first", ["result", "input"])
def test_a_replay_in_a_recording_gives_results_that_are_the_callers_own(first: str) -> None:
    x = draw(2, 3)
    with te.record() as tape:
        y = x.view(-1)
    program = tape.program(inputs=x, outputs=(y, x))

    def function(run: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> Tensor:
        flat, same = run(x)
        (flat if first == "result" else x).add_(1)
        return flat.sum() * 2 + x.sum() * 3 + same.sum() * 5

    x, mine = torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3, dtype=F64)
    with te.record():
        got = function(program, x)
    close(got, function(program, mine))
    close(x, mine)


def test_outputs_under_a_class_of_the_users_are_on_the_tape() -> None:
    class Mine(torch.Tensor):
        pass

    x, w = draw(3).as_subclass(Mine), draw(3)
    with te.record() as tape:
        out = (x * w).sum()
    program = tape.program(inputs=x, outputs=out)
    y = draw(3)
    close(program.step(y), (y * w).sum())
    close(g_of(y), w)


def test_a_replay_inside_a_recording_keeps_what_the_code_detaches() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        buffer = x * 2
        v = buffer.detach()[0]
        with torch.no_grad():
            buffer.mul_(w)
        return ((x * w).detach() * x).sum() + (v * w).sum() + (buffer * w).sum()

    x, w = draw(3), draw(3)
    program = freeze(function, (x, w))
    x, w = draw(3), draw(3)
    with te.record():
        C = program(x, w) + 0
    te.backward(C)
    agree([x, w], reference(function, x, w))
