"""Programs in files: what is loaded does what was saved, in another process as well, and nothing else is loaded."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import tape_engine as te
import viz
from tape_engine import registry
from tape_engine.program.data import Frozen
from tape_engine.registry import Op
from tests.fuzz_files import joined, parts
from tests.helpers import agree, close, error_text, g_of, grad_of, plain, reference
from tests.tape_engine.computations import COMPUTATIONS
from tests.tape_engine.program.common import C128, F32, F64, draw, follows, freeze
from tests.tape_engine.program.test_random_programs import copied, pair, put_together
from tests.tape_engine.rule_calls import Call, differentiable
from tests.tape_engine.rule_calls import draw as draw_call
from tests.tape_engine.rule_calls import each_tensor as drawn

Tensor = torch.Tensor
layers = torch.nn
ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "program.te"


def through(program: te.Program, path: Path, **options: Any) -> te.Program:
    """The program saved and loaded; it must say the same of itself."""
    program.save(path)
    loaded = te.load(path, **options)
    ready = re.compile(r"; [^;\n]*ready in .* s$", re.MULTILINE)  # the second has nothing left to compile
    assert ready.sub("", str(loaded)) == ready.sub("", str(program))
    assert loaded.code == program.code
    assert list(loaded.params) == list(program.params)
    return loaded


def live(loaded: te.Program, program: te.Program, tensors: list[Tensor]) -> list[Tensor]:
    """The loaded program's own of these live tensors."""
    names = {id(t): name for name, t in program.params.items()}
    return [loaded.params[names[id(t)]] for t in tensors]


def step_of(program: te.Program, *inputs: Tensor, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """What a step from a seed gives: outputs, and ``.g`` by name."""
    torch.manual_seed(seed)
    out = program.step(*inputs)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    found = {name: g_of(t) for name, t in program.wrt.items()}
    found.update({f"input {i}": g_of(t) for i, t in enumerate(inputs)})
    return outputs, found


def same(one: te.Program, other: te.Program, *inputs: Tensor) -> None:
    """Asserts that two programs step to the same numbers, bit for bit."""
    mine, theirs = [plain(t) for t in inputs], [plain(t) for t in inputs]
    (outs, gs), (outs_too, gs_too) = step_of(one, *mine), step_of(other, *theirs)
    assert gs.keys() == gs_too.keys()
    for a, b in zip((*outs, *gs.values()), (*outs_too, *gs_too.values()), strict=True):
        close(a, b, 0.0)
    for a, b in zip((*mine, *one.params.values()), (*theirs, *other.params.values()), strict=True):
        close(plain(a), plain(b), 0.0)


# -- what is loaded does what was saved ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "make"), COMPUTATIONS, ids=[name for name, _ in COMPUTATIONS])
def test_computations_follow_autograd_on_new_inputs(name: str, make: Callable[[], tuple[Any, ...]], path: Path) -> None:
    run, *tensors = make()
    inputs, params = tensors[:1], tensors[1:]
    program = freeze(run, inputs, params)
    mine = live(
        loaded := through(program, path), program, [t for t in params if id(t) in map(id, program.params.values())]
    )
    assert len(mine) == len(params)
    follows(loaded, run, [torch.randn_like(t) for t in inputs], mine, tol=1e-8)
    with torch.no_grad():
        for t in mine:
            t.mul_(1.1)
    follows(loaded, run, [torch.randn_like(t) for t in inputs], mine, tol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writes", "how"),
    [("none", "apart"), ("fresh", "apart"), ("all", "apart"), ("none", "shifted"), ("fresh", "shifted")],
)
def test_random_programs(writes: str, how: str, path: Path) -> None:
    for seed in range(25):
        function = put_together(seed, writes=writes)
        torch.manual_seed(seed)
        given, params = pair(how), [draw(3, 3), draw(3, 3)]
        with te.record() as tape:
            out = function([*given, *params])
        program = tape.program(inputs=given, outputs=out)
        starts = {name: plain(t) for name, t in program.params.items()}
        loaded = through(program, path)
        given = pair(how)
        other = copied(given, how)
        for turn in range(2):
            torch.manual_seed(turn)
            wanted = program.step(*given)
            torch.manual_seed(turn)
            close(loaded.step(*other), plain(wanted), 0.0)
            for mine, theirs in zip((*other, *loaded.params.values()), (*given, *program.params.values()), strict=True):
                close(plain(mine), plain(theirs), 0.0)
                close(g_of(mine), g_of(theirs), 0.0)
            for mine, theirs in ((loaded.params[name], program.params[name]) for name in starts):
                mine.copy_(theirs)


def network() -> torch.nn.Module:
    return layers.Sequential(
        layers.Conv2d(1, 3, 3), layers.BatchNorm2d(3), layers.ReLU(), layers.Dropout(0.4), layers.MaxPool2d(2),
        layers.Flatten(), layers.Linear(12, 4),
    ).double()  # fmt: skip


def test_a_network_trains_as_its_own_code_does(path: Path) -> None:
    net, x, labels = network(), draw(5, 1, 6, 6), torch.tensor([0, 1, 2, 3, 0])
    with te.record() as tape:
        loss = torch.nn.functional.cross_entropy(net(x), labels)
    tape.program(inputs=(x, labels), outputs=loss).save(path)
    loaded = te.load(path)
    assert {*loaded.params} == {*dict(net.named_parameters()), *(n for n, _ in net.named_buffers())}
    weights = [loaded.params[name] for name, _ in net.named_parameters()]
    assert all(isinstance(t, torch.nn.Parameter) and t.requires_grad for t in weights)
    ours, theirs = torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(net.parameters(), lr=0.1)
    for turn in range(4):
        x, labels = draw(5, 1, 6, 6), torch.randint(0, 4, (5,))
        torch.manual_seed(turn)
        got = loaded.step(x, labels)
        for t in weights:
            t.grad = g_of(t)
        ours.step()
        torch.manual_seed(turn)
        theirs.zero_grad()
        wanted = torch.nn.functional.cross_entropy(net(x), labels)
        wanted.backward()  # type: ignore[no-untyped-call]
        theirs.step()
        close(got, wanted.detach(), 1e-10)
        for name, tensor in net.state_dict().items():
            close(loaded.params[name].detach(), tensor, 1e-10)
    assert int(loaded.params["1.num_batches_tracked"]) == 5


def test_a_recurrent_network_in_float32(path: Path) -> None:
    net, x = layers.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    with te.record() as tape:
        out, (hidden, _) = net(x)
        loss = out.square().sum() + hidden.sum()
    loaded = through(tape.program(inputs=x, outputs=(loss, out)), path)
    x = torch.randn(5, 2, 3)
    got, got_out = loaded.step(x)
    out, (hidden, _) = net(x)
    wanted = out.square().sum() + hidden.sum()
    wanted.backward()
    close(got, wanted.detach(), 1e-5)
    close(got_out, out.detach(), 1e-5)
    for name, parameter in net.named_parameters():
        close(grad_of(loaded.params[name]), parameter.grad, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64, torch.complex64, C128])
def test_dtypes(dtype: torch.dtype, path: Path) -> None:
    x, w = draw(4, 3, dtype=dtype), draw(3, dtype=dtype)
    program = freeze(lambda x, w: ((x * w).sum(0) * w.conj()).abs().sum(), [x], [w])
    same(program, through(program, path), draw(4, 3, dtype=dtype))


def test_integers_booleans_and_zero_sizes(path: Path) -> None:
    x, table, at, mask = draw(3, 2), draw(5, 2), torch.tensor([4, 0, 4]), torch.tensor([True, False, True])
    none = draw(0, 2)

    def function(x: Tensor, at: Tensor, table: Tensor, mask: Tensor, none: Tensor) -> Tensor:
        return (table[at] * x * mask.unsqueeze(1)).sum() + none.sum() + torch.cat([none, x])[0, 1]

    program = freeze(function, [x, at], [table, mask, none])
    loaded = through(program, path)
    x, at = draw(3, 2), torch.tensor([1, 1, 3])
    loaded.step(x, at)
    wanted = reference(lambda x, table: function(x, at, table, mask, none), x, table)
    agree([x, *live(loaded, program, [table])], wanted)


def test_several_outputs_and_what_has_a_gradient(path: Path) -> None:
    x, w, v, far = draw(3), draw(3), draw(3), draw(3)
    with te.record() as tape:
        y = x * w
        out, other = (y * v).sum(), y.exp() + far
    program = tape.program(inputs=x, outputs=(out, other), wrt=[x, y, v, far])
    loaded = through(program, path)
    assert list(loaded.wrt) == list(program.wrt)
    x_new = draw(3)
    got = loaded.step(x_new)
    close(got[0], (x_new * w * v).sum())
    close(got[1], (x_new * w).exp() + far)
    close(grad_of(x_new), w * v)
    close(grad_of(loaded.wrt["y"]), v)
    close(grad_of(loaded.wrt["v"]), x_new * w)
    assert {*loaded.wrt} == {"y", "v"}
    assert g_of(loaded.params["far"]) is None


def test_a_guard_is_kept_with_its_line(path: Path) -> None:
    x = draw(3).abs()
    with te.record() as tape:
        y = x * 2 if x.sum() > 0 else x * 3
        out = y.sum()
    loaded = through(tape.program(inputs=x, outputs=out), path)
    close(loaded(x + 1), 2 * (x + 1).sum())
    with pytest.raises(te.GuardError) as caught:
        loaded(-x)
    assert "True when recorded, False now" in str(caught.value)
    assert "at test_file.py:" in str(caught.value)
    assert "y = x * 2 if x.sum() > 0 else x * 3" in str(caught.value)


def test_guards_of_lists_and_of_what_went_to_numpy(path: Path) -> None:
    x, at = draw(3), torch.tensor([2, 0])
    with te.record() as tape:
        out = sum(x[i] for i in at.tolist()) * float(at.numpy()[0])
    loaded = through(tape.program(inputs=(x, at), outputs=out), path)
    y = draw(3)
    close(loaded(y, torch.tensor([2, 0])), (y[2] + y[0]) * 2)
    with pytest.raises(te.GuardError):
        loaded(y, torch.tensor([1, 0]))


def test_shapes_that_depend_on_elements(path: Path) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    with te.record() as tape:
        out = (x[x > 0].exp()).sum() + len(x.nonzero())
    loaded = through(tape.program(inputs=x, outputs=out), path)
    y = torch.tensor([-1.0, 2.0, 4.0])
    close(loaded.step(y), torch.tensor([2.0, 4.0]).exp().sum() + 3, 1e-6)
    close(grad_of(y), torch.tensor([0.0, 2.0, 4.0]).exp() * torch.tensor([0.0, 1, 1]), 1e-6)
    with pytest.raises(te.GuardError, match="depends on the elements"):
        loaded(torch.tensor([1.0, 2.0, 4.0]))


def test_a_borrowed_rule_steps_after_loading(path: Path) -> None:
    x = draw(4)

    @te.op
    def wave(x: Tensor) -> Tensor:
        return (x * 3).sin() * x

    with te.record() as tape:
        out = wave(x).sum()
    assert tape.nodes[0].rule == "borrowed"
    program = tape.program(inputs=x, outputs=out)
    program.save(path)
    loaded = te.load(path, ops=[wave])
    y = draw(4)
    loaded.step(y)
    agree([y], reference(lambda y: ((y * 3).sin() * y).sum(), y))


def test_inside_a_recording_and_frozen_again(path: Path) -> None:
    x, w = draw(3), draw(3)
    program = freeze(lambda x, w: (te.relu(x) * w).sin().sum(), [x], [w])
    loaded = through(program, path)
    y, v = draw(3), draw(3)
    with te.record() as tape:
        out = loaded(y * v) * 2
    te.backward(out, keep=True)
    wanted = reference(lambda y, v, w: ((y * v).relu() * w).sin().sum() * 2, y, v, w)
    agree([y, v, loaded.params["w"]], wanted)
    again = through(tape.program(inputs=(y, v), outputs=out), path.with_name("again"))
    y, v = draw(3), draw(3)
    again.step(y, v)
    agree([y, v], reference(lambda y, v: ((y * v).relu() * w).sin().sum() * 2, y, v))


def test_results_belong_to_the_caller_as_before(path: Path) -> None:
    x = draw(3)
    with te.record() as tape:
        out = x * 2
    for keep in (True, False):
        loaded = through(tape.program(inputs=x, outputs=out, copy=keep), path)
        first, second = loaded(draw(3)), loaded(draw(3))
        assert (first.data_ptr() != second.data_ptr()) == keep


def test_inputs_that_do_not_fit_are_named(path: Path) -> None:
    X, Y = draw(4, 2), draw(4)
    loaded = through(freeze(lambda X, Y: ((X.sum(1) - Y) ** 2).mean(), [X, Y]), path)
    with pytest.raises(te.InputError) as caught:
        loaded(draw(3, 2), draw(4).float())
    assert "X    recorded (4, 2)  float64, given (3, 2)  float64" in str(caught.value)
    assert "Y    recorded (4,)  float64, given (4,)  float32" in str(caught.value)


def test_inputs_that_share_memory_with_what_is_written(path: Path) -> None:
    x = draw(4)
    y = x[1:]
    with te.record() as tape:
        out = (x[:3] * y).sum()
        x.mul_(2.0)
    loaded = through(tape.program(inputs=(x, y), outputs=out), path)
    x = draw(4)
    before = x.clone()
    close(loaded(x, x[1:]), (before[:3] * before[1:]).sum())
    close(x, before * 2)
    with pytest.raises(te.InputError, match="shared, and share no more"):
        loaded(draw(4), draw(3))


def test_what_shares_memory_may_stand_in_another_order_in_a_file(path: Path) -> None:
    x = draw(4)
    y, z = x[1:], x[:3]
    with te.record() as tape:
        out = (z * y).sum()
        x.mul_(2.0)
    tape.program(inputs=(x, y, z), outputs=out).save(path)
    outer, inner, payload = parts(path.read_bytes())
    assert len(inner["shared"]) > 1
    inner["shared"] = [*reversed(inner["shared"]), inner["shared"][0]]
    path.write_bytes(joined(outer, inner, payload))
    loaded = te.load(path)
    x = draw(4)
    before = x.clone()
    close(loaded(x, x[1:], x[:3]), (before[:3] * before[1:]).sum())
    close(x, before * 2)
    with pytest.raises(te.InputError, match="shared, and share no more"):
        loaded(x, draw(3), x[:3])


# -- the tensors -----------------------------------------------------------------------------------------------


def test_parameters_that_share_memory_still_do(path: Path) -> None:
    flat = draw(12)
    w, v, turned, apart = flat[:6].view(2, 3), flat[4:10], flat[6:].view(2, 3).t(), draw(8)[::2]
    tied = torch.nn.Parameter(draw(3))
    x = draw(3)

    def function(x: Tensor) -> Tensor:
        return (w @ x).sum() + v.sum() * turned.exp().sum() + (tied * x + tied).sum() * apart.sum()

    program = freeze(function, [x])
    loaded = through(program, path)
    mine = live(loaded, program, [w, v, turned, apart, tied])
    for ours, theirs in zip(mine, [w, v, turned, apart, tied], strict=True):
        assert (ours.stride(), ours.requires_grad) == (theirs.stride(), theirs.requires_grad)
        assert isinstance(ours, torch.nn.Parameter) == isinstance(theirs, torch.nn.Parameter)
        close(plain(ours), plain(theirs), 0.0)
    assert mine[0].data_ptr() + 4 * 8 == mine[1].data_ptr()
    with torch.no_grad():
        mine[0][1, 1] = 7.0  # element 4 of what they share
    assert float(mine[1][0]) == 7.0
    assert mine[4].untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in mine[:4]}
    follows(loaded, lambda x: w_of(mine, x), [draw(3)])


def w_of(mine: list[Tensor], x: Tensor) -> Tensor:
    w, v, turned, apart, tied = (t.detach() for t in mine)
    return (w @ x).sum() + v.sum() * turned.exp().sum() + (tied * x + tied).sum() * apart.sum()


def test_views_of_another_dtype_share_memory_too(path: Path) -> None:
    z = draw(3, dtype=C128)
    pairs = torch.view_as_real(z)
    x = draw(3)
    program = freeze(lambda x: (x * z).abs().sum() + pairs.sum(), [x])
    loaded = through(program, path)
    mine, reals = live(loaded, program, [z, pairs])
    close(mine, z, 0.0)
    with torch.no_grad():
        reals[0, 1] = 5.0
    assert mine[0].imag == 5.0


def test_of_a_large_storage_only_what_is_read_is_kept(path: Path) -> None:
    data = draw(1000, 50)
    row = data[500]
    program = freeze(lambda x: (x * row).sum(), [draw(50)])
    through(program, path)
    assert path.stat().st_size < 10_000


def test_an_expanded_tensor_takes_one_element(path: Path) -> None:
    one = draw(1).expand(100, 100)
    loaded = through(freeze(lambda x: (x * one).sum(), [draw(100)]), path)
    assert loaded.params["one"].stride() == (0, 0)
    assert path.stat().st_size < 10_000
    follows(loaded, lambda x: (x * float(one[0, 0])).sum() * 100, [draw(100)])


def test_a_loaded_program_is_apart_from_the_saved_one(path: Path) -> None:
    x, w = draw(3), draw(3)
    program = freeze(lambda x, w: (x * w).sum(), [x], [w])
    loaded = through(program, path)
    with torch.no_grad():
        loaded.params["w"].zero_()
    assert float(loaded(x)) == 0.0
    close(program(x), (x * w).sum())
    assert program.params["w"] is w


# -- named operations --------------------------------------------------------------------------------------------


def made_ops() -> tuple[te.Program, Any, Any]:
    @te.op
    def scale(x: Tensor, factor: float, how: Any = None) -> Tensor:
        return x * factor

    @scale.rule
    def scale_grad(g, out, x, factor, how):  # type: ignore[no-untyped-def]
        return g * factor

    @te.op
    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    @noisy.rule
    def noisy_grad(g, out, x):  # type: ignore[no-untyped-def]
        return g * out / x

    x = draw(3)
    with te.record() as tape:
        out = noisy(scale(x, -2.5, {"mode": slice(1, None), "at": (float("inf"), 1j)})).sum()
    return tape.program(inputs=x, outputs=out), scale, noisy


@pytest.mark.parametrize("as_mapping", [False, True])
def test_operations_of_the_users_own(as_mapping: bool, path: Path) -> None:
    program, scale, noisy = made_ops()
    loaded = through(program, path, ops={"scale": scale, "noisy": noisy} if as_mapping else (scale, noisy))
    assert loaded.tape.nodes[0].args[1:] == program.tape.nodes[0].args[1:]
    same(program, loaded, draw(3))
    torch.manual_seed(3)
    y = draw(3)
    torch.manual_seed(4)
    loaded.step(y)
    torch.manual_seed(4)
    close(grad_of(y), -2.5 * torch.rand(3, dtype=F64))


def test_an_operation_that_is_missing_is_named(path: Path) -> None:
    program, scale, _ = made_ops()
    program.save(path)
    with pytest.raises(te.LoadError) as caught:
        te.load(path, ops=[scale])
    assert str(caught.value) == (
        "program.te cannot be loaded.\n"
        "  ops[1].name: the program runs the operation noisy, which is not given.\n"
        "  fix: te.load(path, ops=[noisy])"
    )
    with pytest.raises(te.DTypeError, match="ops takes named operations"):
        te.load(path, ops=[print])  # type: ignore[list-item]


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found: Tensor = 2 * x * g
        return found


def test_a_function_of_pythons_is_refused_with_its_line(path: Path) -> None:
    x = draw(3)
    with te.record() as tape:
        out = Squared.apply(x).sum()  # type: ignore[no-untyped-call]
    program = tape.program(inputs=x, outputs=out)
    with pytest.raises(te.SaveError) as caught:
        program.save(path)
    assert str(caught.value).startswith(
        "program.save: Squared cannot be kept in a file: it is a torch.autograd.Function or other Python code, "
        "which a file does not hold.\n  at test_file.py:"
    )
    assert "out = Squared.apply(x).sum()" in str(caught.value)
    assert not path.exists()


def test_arguments_that_are_no_data_are_refused(path: Path) -> None:
    class Mode:
        pass

    @te.op
    def odd(x: Tensor, mode: Any) -> Tensor:
        return x * 2

    x = draw(3)
    with te.record() as tape:
        out = odd(x, Mode()).sum()
    with pytest.raises(te.SaveError, match=r"odd is given .*Mode, which a file cannot hold"):
        tape.program(inputs=x, outputs=out).save(path)
    with te.record() as tape:
        drawn = (x + torch.rand(3, generator=torch.Generator())).sum()
    with pytest.raises(te.SaveError, match="Generator, which a file cannot hold"):
        tape.program(inputs=x, outputs=drawn).save(path)


def test_two_operations_of_one_name_are_refused(path: Path) -> None:
    one, other = te.op(name="turn")(lambda x: x * 2), te.op(name="turn")(lambda x: x * 3)
    x = draw(3)
    with te.record() as tape:
        out = other(one(x)).sum()
    with pytest.raises(te.SaveError, match="another operation of the program has the same name") as caught:
        tape.program(inputs=x, outputs=out).save(path)
    assert "@te.op(name='turn2')" in str(caught.value)


# -- what it says of itself --------------------------------------------------------------------------------------


def test_listing_and_picture_are_those_of_the_saved_program(path: Path) -> None:
    X, w, b, Y = draw(5, 3), torch.nn.Parameter(draw(3, 1)), torch.nn.Parameter(draw(1)), draw(5)
    with te.record() as tape:
        with te.scope("first"), te.scope("layer"):
            Z = te.lin(X, w, b)
        state = Z.detach().clone()
        state[1:].mul_(2)
        U = te.relu(Z) * torch.nn.functional.dropout(state, 0.5)
        C = te.mse(U, Y)
    program = tape.program(inputs=(X, Y), outputs=(C, state))
    loaded = through(program, path)
    assert str(loaded.tape).splitlines()[1:] == str(program.tape).splitlines()[1:]
    assert "first/layer: lin(X (5, 3), w (3, 1), b (1,))" in str(loaded.tape)
    graphs = [viz.graph(each) for each in (loaded, program)]
    assert [dict(g.nodes) for g in graphs[:1]] == [dict(g.nodes) for g in graphs[1:]]
    assert list(graphs[0].edges(data=True)) == list(graphs[1].edges(data=True))
    assert viz.table(loaded) == viz.table(program)


def test_lines_are_told_as_they_were(path: Path, tmp_path: Path) -> None:
    source = tmp_path / "script.py"
    source.write_text("def run(x):\n    y = x.sin()\n    return y.sum()\n")
    space: dict[str, Any] = {}
    exec(compile(source.read_text(), str(source), "exec"), space)
    loaded = through(freeze(space["run"], [draw(2)]), path)
    source.write_text("\n\n\nsomething = 'else'\n")
    other = te.load(path)
    for each in (loaded, other):
        assert "y (2,) float64 = sin(x (2,))  sin_grad  script.py:2" in str(each.tape)
        assert "# y = x.sin()    (script.py:2)" in each.code


# -- in another process --------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys, torch
import tape_engine as te
assert "viz" not in sys.modules
torch.set_num_threads(1)
program = te.load(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
torch.manual_seed(5)
out = program.step(*inputs)
torch.save([out, [t.g for t in inputs if hasattr(t, "g")], {k: t.g for k, t in program.wrt.items()},
            {k: t.detach() for k, t in program.params.items()}], sys.argv[3])
print(program)
"""


@pytest.mark.slow
def test_another_process_steps_to_the_same_numbers(path: Path, tmp_path: Path) -> None:
    net, x, labels = network(), draw(5, 1, 6, 6), torch.tensor([0, 1, 2, 3, 0])
    with te.record() as tape:
        loss = torch.nn.functional.cross_entropy(net(x), labels)
    program = tape.program(inputs=(x, labels), outputs=loss)
    program.save(path)
    x = draw(5, 1, 6, 6)
    torch.save([x, labels], tmp_path / "inputs")
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE, str(path), f"{tmp_path}/inputs", f"{tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{program}\n"
    out, of_inputs, gs, params = torch.load(tmp_path / "out", weights_only=True)
    torch.manual_seed(5)
    close(program.step(x, labels), out, 0.0)
    close(grad_of(x), of_inputs[0], 0.0)
    assert {*gs} == {*program.wrt}
    for name, tensor in program.wrt.items():
        close(g_of(tensor), gs[name], 0.0)
    for name, tensor in program.params.items():
        close(plain(tensor), params[name], 0.0)


def test_a_file_is_read_with_json_and_safetensors_alone(path: Path) -> None:
    from safetensors import safe_open

    X, w, b = draw(5, 3), draw(3, 2), draw(2)
    freeze(lambda X, w, b: te.lin(X, w, b).sum(), [X], [w, b]).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert (metadata["format"], metadata["version"]) == ("tape_engine program", "1")
    header = json.loads(metadata["program"])
    close(tensors["w"], w, 0.0)
    close(tensors["b"], b, 0.0)
    held: dict[int, Tensor] = {header["inputs"][0]["value"]: draw(5, 3)}
    held.update({row["value"]: tensors[header["tensors"][row["tensor"]]["payload"]] for row in header["live"]})
    X = held[header["inputs"][0]["value"]]
    for i in header["forward"]:
        node = header["nodes"][i]
        namespace, _, name = header["ops"][node["op"]]["name"].partition("::")
        packet, _, overload = name.partition(".")
        call = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        args = [held[a["value"]] if isinstance(a, dict) else a for a in node["args"]]
        (held[node["outputs"][0]],) = [call(*args)]
    close(held[header["outputs"][0]], (X @ w + b).sum())


# -- writing -------------------------------------------------------------------------------------------------------


def small() -> te.Program:
    return freeze(lambda x, w: (x * w).sum(), [draw(3)], [draw(3)])


def test_paths(tmp_path: Path) -> None:
    program = small()
    for path in (str(tmp_path / "a.te"), tmp_path / "b ü.te", tmp_path / "no suffix"):
        program.save(path)
        assert "w" in te.load(path).params
    assert {p.name for p in tmp_path.iterdir()} == {"a.te", "b ü.te", "no suffix"}
    with pytest.raises(te.DTypeError, match=r"program.save takes a path"):
        program.save(3)  # type: ignore[arg-type]
    with pytest.raises(te.DTypeError, match=r"te.load takes a path"):
        te.load(None)  # type: ignore[arg-type]


def test_folders_that_are_missing_and_files_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = small()
    with pytest.raises(te.PathError) as caught:
        program.save(tmp_path / "none" / "a.te")
    assert error_text(caught, __file__) == (
        f"{tmp_path}/none/a.te cannot be written: no such file or directory.\n  at LINE\n"
        f"  fix: make the folder first: {tmp_path}/none"
    )
    with pytest.raises(te.PathError, match="it is a folder"):
        program.save(tmp_path)
    with pytest.raises(te.PathError, match=r"cannot be read: no such file") as caught:
        te.load(tmp_path / "a.te")
    assert isinstance(caught.value, OSError)
    with pytest.raises(te.PathError, match=r"cannot be read: it is no regular file"):
        te.load(tmp_path)

    def refuse(*args: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(te.PathError, match="permission denied"):
        program.save(tmp_path / "a.te")


def test_a_file_is_written_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    small().save(path)
    path.chmod(0o640)
    before = path.read_bytes()

    def fail(tensors: Any, file: Any, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(te.PathError, match="no space left on device"):
        small().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    monkeypatch.undo()
    small().save(path)
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o640


def test_without_safetensors_saving_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = small()
    program.save(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(te.SaveError, match="needs the package safetensors") as caught:
        program.save(path)
    assert "pip install 'tape-engine[files]'" in str(caught.value)
    assert "w" in te.load(path).params  # reading does without


def test_saving_and_loading_leave_everything_as_it_was(path: Path) -> None:
    program = small()
    state = torch.get_rng_state()
    with te.record() as tape:
        program.save(path)
        te.load(path)
    assert len(tape) == 0
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        program.save(path)
        loaded = te.load(path)
    assert not any(t.is_inference() for t in loaded.params.values())
    x = draw(3)
    loaded.step(x)


def test_every_field_of_a_frozen_tape_is_kept() -> None:
    # A field that is added must be written and read as well, or be named here as one that a file needs not tell.
    kept = (
        "tape nodes leaves inputs given titles outputs single seed forward backward live constants gradients unreached "
        "writes lying same names"
    )
    assert {each.name for each in fields(Frozen)} == {*kept.split(), "held", "stand_ins", "unsure"}


# -- devices -------------------------------------------------------------------------------------------------------


def on_another_device(path: Path) -> None:
    """Makes of a file one that was saved on a GPU."""
    outer, inner, payload = parts(path.read_bytes())
    for row in (*inner["types"], *inner["tensors"]):
        row["device"] = "cuda:0"
    path.write_bytes(joined(outer, inner, payload))


def test_what_was_on_a_device_that_is_not_here_comes_to_the_cpu(path: Path) -> None:
    x = draw(3)
    with te.record() as tape:
        out = (x + torch.ones(3, dtype=F64, device="cpu")).sum()
    tape.program(inputs=x, outputs=out).save(path)
    on_another_device(path)
    if not torch.cuda.is_available():
        with pytest.warns(te.TapeWarning, match="saved on cuda:0, which is not here: it is loaded onto the CPU"):
            loaded = te.load(path)
        close(loaded(x), x.sum() + 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = te.load(path, device="cpu")
    close(loaded(x), x.sum() + 3)
    with pytest.raises(te.DTypeError, match="no device that is here"):
        te.load(path, device="abacus")


# -- what is refused -----------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any], dict[str, Any]], Any]


def setting(value: Any, *keys: Any) -> Edit:
    """An edit of the header: what stands at these keys becomes `value`."""

    def edit(outer: dict[str, Any], inner: dict[str, Any]) -> None:
        here: Any = outer if keys[0] == "outer" else inner
        *path, last = [key for key in keys if key != "outer"]
        for key in path:
            here = here[key]
        if value is DELETED:
            del here[last]
        else:
            here[last] = value

    return edit


DELETED = object()


def both(*edits: Edit) -> Edit:
    def edit(outer: dict[str, Any], inner: dict[str, Any]) -> None:
        for each in edits:
            each(outer, inner)

    return edit


def deep(outer: dict[str, Any], inner: dict[str, Any]) -> None:
    nested: Any = 1
    for _ in range(80):
        nested = [nested]
    inner["nodes"][0]["args"][1] = nested


def of_no_shape(inner: dict[str, Any]) -> int:
    """The type of a single number."""
    return next(i for i, row in enumerate(inner["types"]) if row["shape"] == [])


HUGE = 10**12

#: An edit of the header of `victim`, and what the error must say.
DAMAGE: dict[str, tuple[Edit, str]] = {
    "another format": (
        setting("pt", "outer", "__metadata__", "format"),
        "__metadata__.format: 'tape_engine program' is",
    ),
    "another version": (setting("2", "outer", "__metadata__", "version"), "reads version 1, not '2'"),
    "a payload of no dtype": (setting("F7", "outer", "w", "dtype"), "payload.w.dtype: 'F7' is no dtype"),
    "a payload that is huge": (setting([HUGE], "outer", "w", "shape"), "payload.w.shape: more elements than"),
    "a payload of another size": (setting([4], "outer", "w", "shape"), "payload.w.data_offsets: 24 bytes, where"),
    "a payload beyond the end": (setting([0, 999], "outer", "w", "data_offsets"), "999 is not between 0 and 24"),
    "a payload that nobody reads": (setting([], "tensors"), "payload.w: no tensor of the program lies there"),
    "a part that is missing": (setting(DELETED, "gradients"), "the header: gradients is missing"),
    "a part that is unknown": (setting(1, "code"), "the header: 'code' is no part of the format"),
    "a part of another kind": (setting({}, "nodes"), "nodes: a list is wanted, not an object of 0"),
    "an operation that is unknown": (
        setting("aten::nothing.x", "ops", 0, "name"),
        "ops[0].name: 'aten::nothing.x' is no",
    ),
    "an operation that reads files": (
        setting("aten::from_file.default", "ops", 0, "name"),
        "may not stand in a program",
    ),
    "an operation that writes": (setting("aten::add_.Tensor", "ops", 0, "name"), "it writes to its arguments"),
    "an operation with out=": (setting("aten::mul.out", "ops", 0, "name"), "it writes to its arguments"),
    "an operation by a path": (setting("aten::__class__.__mro__", "ops", 0, "name"), "ops[0].name: 'aten::__class__"),
    "an operation of a library": (setting("prims::sin.default", "ops", 0, "name"), "which is not given"),
    "an operation of Python": (
        setting("os::system", "ops", 0, "name"),
        "runs the operation system, which is not given",
    ),
    "a shape that is negative": (setting([-3], "types", 0, "shape"), "types[0].shape[0]: -3 is not between 0"),
    "a shape of fractions": (
        setting([3.0], "types", 0, "shape"),
        "types[0].shape[0]: a whole number is wanted, not 3.0",
    ),
    "a shape that is beyond counting": (
        setting([1 << 62], "types", 0, "shape"),
        "types[0].shape: more bytes than can be",
    ),
    "a number of a thousand digits": (
        setting(10**1000, "types", 0, "shape", 0),
        "a number of 3322 bits is not between",
    ),
    "strides that are too few": (setting([], "types", 0, "strides"), "types[0].strides: a list of 1 is wanted"),
    "too many dimensions": (
        both(setting([1] * 65, "types", 0, "shape"), setting([1] * 65, "types", 0, "strides")),
        "65 dimensions",
    ),
    "a dtype that is none": (setting("float33", "types", 0, "dtype"), "types[0].dtype: 'float33' is none of"),
    "a device that is none": (setting("cpu; rm", "types", 0, "device"), "types[0].device: 'cpu; rm' is no device"),
    "a type out of range": (setting(99, "values", 0, "type"), "values[0].type: 99 is not between 0 and"),
    "a name of two lines": (setting("a\nb", "values", 0, "name"), "values[0].name: the string 'a\\nb' has characters"),
    "a value out of range": (
        setting({"value": 99}, "nodes", 0, "args", 0),
        "nodes[0].args[0].value: 99 is not between",
    ),
    "an argument of no kind": (setting({"pickle": "x"}, "nodes", 0, "args", 0), "nodes[0].args[0].pickle: no argument"),
    "an argument of another type": (
        setting("x", "nodes", 0, "args", 1),
        "nodes[0].args[1]: mul takes a Tensor as other",
    ),
    "an argument too many": (setting([{"value": 0}] * 3, "nodes", 0, "args"), "mul takes 2 arguments by their place"),
    "an argument that is missing": (setting([{"value": 0}], "nodes", 0, "args"), "nodes[0]: mul needs other"),
    "a keyword that is none": (setting({"dim": 1}, "nodes", 1, "kwargs"), "nodes[1].kwargs: sum takes no 'dim' here"),
    "lists that are nested deep": (deep, "nested too deep"),
    "an output made twice": (setting([0], "nodes", 0, "outputs"), "recorded[0]: mul makes x, which is there already"),
    "an output too many": (setting([2, 3], "nodes", 0, "outputs"), "nodes[0].tuple: 2 values are a tuple"),
    "an order that is wrong": (setting([1, 0], "forward"), "forward[0]: sum reads y before it is made"),
    "a node that runs twice": (setting([0, 0, 1], "forward"), "forward: a node stands there twice"),
    "a node that is missing": (setting([1], "forward"), "reads y, which nothing gives"),
    "an output that is missing": (setting([], "outputs"), "outputs: 0 of them"),
    "an output of the sweep": (
        lambda _, inner: inner.update(outputs=[inner["gradients"][0]["g"]], seed=inner["gradients"][0]["g"]),
        "outputs[0]: ",
    ),
    "an input of another type": (
        lambda _, inner: inner["inputs"][0].update(type=of_no_shape(inner)),
        "inputs[0].value: the value is of another type",
    ),
    "a leaf of another type": (
        lambda _, inner: inner["values"][1].update(type=of_no_shape(inner)),
        "the value is of another type than",
    ),
    "a tensor that reaches too far": (
        setting(1, "tensors", 0, "offset"),
        "tensors[0]: it reaches to byte 32 of 'w', which",
    ),
    "a tensor with huge strides": (
        setting([HUGE], "tensors", 0, "strides"),
        "tensors[0]: it reaches to byte 16000000000008",
    ),
    "a tensor of no payload": (setting("v", "tensors", 0, "payload"), "tensors[0].payload: 'v' is not in the payload"),
    "an integer with a gradient": (
        both(setting("int64", "tensors", 0, "dtype"), setting(True, "tensors", 0, "requires_grad")),
        "tensors[0].requires_grad: int64 has no gradient",
    ),
    "a gradient of another shape": (
        lambda _, inner: inner["gradients"][0].update(g=inner["outputs"][0]),
        "gradients[0].g: a gradient of shape ()",
    ),
    "values that are the same in a circle": (
        setting([[0, 1], [1, 0]], "same"),
        "same: a value that stands for another",
    ),
    "values of two types that are the same": (
        setting([[2, 3]], "same"),
        "same[0]: values of two types cannot be the same",
    ),
    "a write to what is computed": (
        setting([[2, 2]], "writes"),
        "writes[0][0]: it is no tensor that could be written to",
    ),
    "a line that is negative": (setting(-1, "lines", 0, "line"), "lines[0].line: -1 is not between"),
    "an index that is true": (setting(True, "seed"), "seed: a whole number is wanted, not True"),
}


def victim(path: Path) -> None:
    """A program of a product and a sum: its header is edited below."""
    x, w = draw(3), draw(3)
    with te.record() as tape:
        y = x * w
        out = y.sum()
    tape.program(inputs=x, outputs=out).save(path)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_header_that_is_damaged_is_refused_with_the_place(what: str, path: Path) -> None:
    victim(path)
    outer, inner, payload = parts(path.read_bytes())
    edit, said = DAMAGE[what]
    edit(outer, inner)
    path.write_bytes(joined(outer, inner, payload))
    with pytest.raises(te.LoadError) as caught:
        te.load(path)
    assert str(caught.value).startswith("program.te cannot be loaded.\n  ")
    assert said in str(caught.value)


def test_shapes_that_no_operation_gives_are_refused(path: Path) -> None:
    victim(path)
    outer, inner, payload = parts(path.read_bytes())
    made = inner["values"][inner["nodes"][0]["outputs"][0]]
    inner["types"].append({"shape": [HUGE], "strides": [1], "dtype": "float64", "device": "cpu"})
    made["type"] = len(inner["types"]) - 1
    path.write_bytes(joined(outer, inner, payload))
    with pytest.raises(
        te.LoadError, match=r"nodes\[0\].outputs\[0\]: mul gives \(3,\) torch.float64 here, and the file"
    ):
        te.load(path)


def test_bytes_that_are_damaged_are_refused(path: Path) -> None:
    victim(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    for damaged, said in (
        (b"", "0 bytes: no room for the 8"),
        (data[:7], "7 bytes: no room"),
        (data[:100], "its length is said to be"),
        (data[:-1], "is not between 0 and 23"),
        (data + b"\0", "cut off, or longer than it says"),
        ((1 << 63).to_bytes(8, "little") + data[8:], "its length is said to be 9223372036854775808 bytes"),
        (b"PK\x03\x04" + data, "its length is said to be"),
        (data[:8] + b"\xff" + data[9:], "no JSON"),
        (data[:8] + header.replace(b'"w":', b'"w":1,"w":', 1)[:length] + data[8 + length :], "no JSON"),
        ((2 * 5000).to_bytes(8, "little") + b"[" * 10_000, "nested too deep"),
        ((17).to_bytes(8, "little") + b'{"__metadata__":9' + b"\0", "no JSON"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(te.LoadError, match="cannot be loaded") as caught:
            te.load(path)
        assert said in str(caught.value)


def test_a_key_that_stands_twice_is_refused(path: Path) -> None:
    victim(path)
    outer, inner, payload = parts(path.read_bytes())
    twice = json.dumps(inner)[:-1] + ', "copy": false}'
    path.write_bytes(joined(outer, twice, payload))
    with pytest.raises(te.LoadError, match="the program: no JSON: a key stands twice in one object"):
        te.load(path)


def test_booleans_that_are_neither_are_refused(path: Path) -> None:
    mask, x = torch.tensor([True, False, True]), draw(3)
    with te.record() as tape:
        out = (x * mask).sum()
    tape.program(inputs=x, outputs=out).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-3] + b"\2" + data[-2:])
    with pytest.raises(te.LoadError, match="bytes that are neither true nor false"):
        te.load(path)


def test_names_in_a_file_become_no_code(path: Path) -> None:
    victim(path)
    outer, inner, payload = parts(path.read_bytes())
    hostile = "x=__import__('os').abort()#", "\ufb01", "def", "torch", "\u00b2", "\uff47uard", "a;b", "'", "\u0e33"
    for name in hostile:
        for row in inner["values"]:
            row["name"] = name
        inner["inputs"][0]["title"] = name
        inner["lines"] = [{"file": "/etc/passwd", "line": 1, "code": 'x """'} for _ in inner["lines"]]
        path.write_bytes(joined(outer, inner, payload))
        loaded = te.load(path)
        w = next(iter(loaded.params.values()))
        x = draw(3)
        close(loaded.step(x), (x * w).sum())
        close(grad_of(x), w)
        assert "root:" not in str(loaded.tape) + loaded.code


def test_a_file_that_is_not_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(te.PathError, match="no regular file"):
        te.load(tmp_path / "pipe")


def test_loading_a_huge_claim_takes_no_memory(path: Path) -> None:
    # an honest header of a program that would need terabytes to run: to load it needs nothing
    x = draw(2)
    with te.record() as tape:
        out = x.expand(2, 2) * x.new_ones(2, 2)
    tape.program(inputs=x, outputs=out).save(path)
    outer, inner, payload = parts(path.read_bytes())
    text = json.dumps(inner["types"]).replace("[2, 2]", f"[{HUGE}, 2]").replace("[2, 1]", "[2, 1]")
    inner["types"] = json.loads(text)
    for node in inner["nodes"]:
        node["args"] = json.loads(json.dumps(node["args"]).replace("[2, 2]", f"[{HUGE}, 2]"))
    path.write_bytes(joined(outer, inner, payload))
    try:
        loaded = te.load(path)
    except te.LoadError:
        return
    assert loaded.tape.nodes[-1].outputs[0].shape[0] == HUGE


def call_of(op: Op, call: Call, path: Path) -> None:
    """A call of an operation through a file: the same source, with the same tensors."""
    tensors = list({id(t): t for t in drawn([*call.args, call.kwargs])}.values())
    with te.record() as tape:
        out = (op if op.is_named else op.forward)(*call.args, **call.kwargs)
    outputs = sorted(drawn(out), key=lambda t: not differentiable(t))
    program = tape.program(inputs=tensors[: len(tensors) // 2], outputs=tuple(outputs))
    loaded = through(program, path, ops=[op] if op.is_named else ())
    for name, tensor in program.params.items():
        torch.testing.assert_close(plain(loaded.params[name]), plain(tensor), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.slow
def test_every_sample_of_every_rule_goes_through_a_file(path: Path) -> None:
    # so that no shape which an operation gives, and no argument which it takes, is refused for another's fault
    done = 0
    for op in registry.ops():
        for sample in op.samples:
            call_of(op, draw_call(op, sample), path)
            done += 1
    assert done > 800


@pytest.mark.slow
def test_every_place_of_a_header_is_looked_at(path: Path) -> None:
    """Whatever stands in a header, replaced by something of no sense, is refused or harmless."""
    victim(path)
    data = path.read_bytes()
    outer, inner, payload = parts(data)
    dice = random.Random(0)

    def every(tree: Any, keys: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        found = [keys] if keys else []
        inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        for key, each in inside:
            found += every(each, (*keys, key))
        return found

    for keys in every(inner, ()):
        for nonsense in (None, -1, 10**30, 0.5, "nonsense", [], {}, [[[1]]], DELETED):
            outer, inner, payload = parts(data)
            setting(nonsense, *keys)(outer, inner)
            path.write_bytes(joined(outer, inner, payload))
            try:
                loaded = te.load(path)
            except te.LoadError:
                continue
            x = draw(3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    loaded.step(x) if dice.random() < 0.2 else str(loaded)
                except (te.TapeError, RuntimeError):
                    continue
