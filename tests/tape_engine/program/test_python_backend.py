"""The generated code: valid Python in the user's own words, no work that nobody needs, results into kept memory."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tape_engine as te
from tests.helpers import close, g_of
from tests.tape_engine.program.common import F64, draw, follows, freeze, is_view, out_kernel, ran

Tensor = torch.Tensor


def article() -> tuple[te.Tape, Tensor, Tensor, Tensor, Tensor, Tensor]:
    X, Y, w, b = draw(6, 3), draw(6, 2), draw(3, 2), draw(2)
    with te.record() as tape:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        C = te.mse(U, Y)
    return tape, X, Y, w, b, C


def definition(code: str) -> ast.FunctionDef:
    tree = ast.parse(code)
    assert len(tree.body) == 1
    assert isinstance(tree.body[0], ast.FunctionDef)
    return tree.body[0]


def names_in(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


# -- the text ------------------------------------------------------------------------------------------------


def test_code_is_python_that_names_the_users_variables() -> None:
    tape, X, Y, _, _, C = article()
    program = tape.program(inputs=(X, Y), outputs=C, backend="python")
    function = definition(program.code)
    assert [a.arg for a in function.args.args][:2] == ["X", "Y"]
    assert {"X", "Y", "w", "b", "Z", "U", "C"} <= names_in(program.code)
    assert {"X_g", "w_g", "b_g", "Z_g", "U_g"} <= names_in(program.code)
    assert not any(isinstance(node, (ast.For, ast.While, ast.If)) for node in ast.walk(function)), "straight-line code"


def test_code_shows_the_users_lines() -> None:
    tape, X, Y, _, _, C = article()
    code = tape.program(inputs=(X, Y), outputs=C, backend="python").code
    line = article.__code__.co_firstlineno
    for offset, text in ((3, "Z = te.lin(X, w, b)"), (4, "U = te.relu(Z)"), (5, "C = te.mse(U, Y)")):
        assert code.count(text) == 1, code
        assert f"test_python_backend.py:{line + offset}" in code
    assert code.index("te.lin") < code.index("te.relu") < code.index("te.mse") < code.index("reverse sweep")


def test_code_names_what_modules_hold() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    x = draw(4, 3, dtype=torch.float32)
    with te.record() as tape:
        y = net(x).sum()
    code = tape.program(inputs=x, outputs=y, backend="python").code
    assert "0_weight" in code
    assert "2_bias" in code
    definition(code)


def test_code_of_a_program_without_a_sweep() -> None:
    k = torch.arange(4)
    with te.record() as tape:
        total = (k * 2).sum()
    code = tape.program(inputs=k, outputs=total, backend="python").code
    assert [a.arg for a in definition(code).args.args] == ["k"]
    assert "sweep" not in code


def test_every_line_is_short_enough_to_read() -> None:
    tape, X, Y, _, _, C = article()
    assert max(map(len, tape.program(inputs=(X, Y), outputs=C, backend="python").code.splitlines())) < 120


ODD_NAMES = [
    "guard", "measured", "results", "result", "result_2", "new_h", "h_g", "h", "mm", "add", "seed", "step", "forward",
    "p_0", "recorded", "site", "x_2", "v", "live", "param", "print", "len", "None_", "é", "Σ", "self", "unused",
    "input0", "torch_", "local_scalar_dense", "y_g", "C_g", "view", "transpose",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_user_names_collide_with_nothing(name: str) -> None:
    source = f"""
def run(te, torch, x, {name}):
    with te.record() as tape:
        h_ = x * {name}
        k_ = float(x[0].sign())
        few_ = h_[{name} != 0]
        y_ = (few_ * k_).sum() + (h_ @ {name}).tanh()
    return tape, y_, x, {name}
"""
    space: dict[str, Any] = {}
    exec(compile(source, f"<{name}>", "exec"), space)
    x, w = torch.rand(3, dtype=F64), draw(3)
    tape, y, _, _ = space["run"](te, torch, x, w)
    program = tape.program(inputs=x, outputs=y, backend="python")
    definition(program.code)
    follows(program, lambda x, w: (x * w).sum() + ((x * w) @ w).tanh(), [torch.rand(3, dtype=F64)], [w])


def test_one_name_for_many_values() -> None:
    x, w = draw(3), draw(3)

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = x
        for _ in range(5):
            h = h * w
            h = h + x
        return h.sum()

    program = freeze(function, [x], [w], backend="python")
    definition(program.code)
    follows(program, function, [draw(3)], [w])


def test_a_line_break_in_the_source_line() -> None:
    """Comments in the code are the user's text: whatever it is, it stays a comment."""
    space: dict[str, Any] = {}
    source = "def run(x):\n    return (x *\n        2).sum(), '''\nraise SystemExit\n'''\n"
    exec(compile(source, "<odd\nname>", "exec"), space)
    x = draw(3)
    with te.record() as tape:
        y, _ = space["run"](x)
    program = tape.program(inputs=x, outputs=y, backend="python")
    definition(program.code)
    close(program(x), 2 * x.sum())


# -- no work that nobody needs -------------------------------------------------------------------------------


def test_gradients_that_nobody_asked_for_are_not_computed() -> None:
    tape, X, Y, w, b, C = article()
    everything = tape.program(inputs=(X, Y), outputs=C, backend="python")
    one = tape.program(inputs=(X, Y), outputs=C, wrt=[w], backend="python")
    assert "w_g" in names_in(one.code)
    assert not {"X_g", "b_g", "Y_g"} & names_in(one.code)
    assert ran(lambda: everything.step(X, Y)).names.count("mm") == 3
    spy = ran(lambda: one.step(X, Y))
    assert spy.names.count("mm") == 2
    assert spy.names.count("sum") == 0, "b.g was computed"
    assert spy.names.count("neg") == 0, "Y.g was computed"
    only_b = tape.program(inputs=(X, Y), outputs=C, wrt=b, backend="python")
    assert ran(lambda: only_b.step(X, Y)).names.count("mm") == 1


def test_of_a_deep_net_only_the_last_layer() -> None:
    weights = [draw(4, 4) for _ in range(6)]
    x = draw(2, 4)
    with te.record() as tape:
        h = x
        for w in weights:
            h = torch.tanh(h @ w)
        y = h.sum()
    program = tape.program(inputs=x, outputs=y, wrt=weights[-1], backend="python")
    assert ran(lambda: program.step(x)).names.count("mm") == 6 + 1
    program = tape.program(inputs=x, outputs=y, wrt=weights[0], backend="python")
    assert ran(lambda: program.step(x)).names.count("mm") == 6 + 5 + 1
    program = tape.program(inputs=x, outputs=y, wrt=x, backend="python")
    assert ran(lambda: program.step(x)).names.count("mm") == 6 + 6


def test_calling_runs_no_sweep() -> None:
    tape, X, Y, _, _, C = article()
    program = tape.program(inputs=(X, Y), outputs=C, backend="python")
    assert ran(lambda: program(X, Y)).names.count("mm") == 1
    assert g_of(X) is None


def test_what_the_outputs_do_not_need_is_not_computed() -> None:
    x, w = draw(4, 3), draw(3, 3)
    with te.record() as tape:
        h = x @ w
        more = (h @ w).exp()
        more.sum()
    program = tape.program(inputs=x, outputs=h, backend="python")
    assert ran(lambda: program(x)).names == ["mm"]


def test_a_forward_pass_of_the_article_is_six_operations() -> None:
    tape, X, Y, _, _, C = article()
    program = tape.program(inputs=(X, Y), outputs=C, backend="python")
    assert ran(lambda: program(X, Y)).names == ["mm", "add", "clamp_min", "sub", "pow", "mean"]


# -- results into kept memory --------------------------------------------------------------------------------


def mlp(x: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x @ w + 0.5)
    return (h @ w - x).pow(2).mean()


def mixed(x: Tensor, w: Tensor) -> Tensor:
    h = torch.sigmoid(x @ w) * x.exp() / (x.abs() + 1)
    return torch.cat([h, -x], 1).sum(1).mean() + (w > 0).to(F64).mul(w).amax()


def attention(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w @ x.t()).softmax(-1) @ x).square().sum()


def classes(x: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(x @ w, torch.zeros(len(x), dtype=torch.int64))


def activations(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return (F.gelu(h) + F.silu(h) + F.elu(h) + F.leaky_relu(h) + F.softplus(h) + h.clamp(-1, 1)).sum()


def batched(x: Tensor, w: Tensor) -> Tensor:
    return torch.baddbmm(x[None].expand(2, 3, 3), w[None].expand(2, 3, 3), x[None].expand(2, 3, 3)).cumsum(-1).sum()


@pytest.mark.parametrize("function", [mlp, mixed, attention, classes, activations, batched], ids=lambda f: f.__name__)
def test_results_go_into_kept_memory(function: Callable[..., Tensor]) -> None:
    """No operation allocates its result where torch has a kernel that writes it into memory given."""
    x, w = draw(3, 3), draw(3, 3)
    program = freeze(function, [x], [w], backend="python")
    spy = ran(lambda: program.step(x))
    allocating = [f"{o}" for o in spy.heard if not is_view(o) and not o._schema.is_mutable and out_kernel(o)]
    assert not allocating, f"{allocating}\n{program.code}"
    follows(program, function, [draw(3, 3)], [w])


def test_views_written_through_allocate_nothing() -> None:
    x, w = draw(3, 3), draw(3, 3)

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        h[0] *= 2
        h[:, 1] += x[:, 0]
        return h.square().sum()

    program = freeze(function, [x], [w], backend="python")
    spy = ran(lambda: program(x))
    assert not {"empty_strided", "clone", "zeros", "empty", "new_empty_strided"} & set(spy.names), program.code
    follows(program, function, [draw(3, 3)], [w])


def test_common_calls_are_the_quick_ones() -> None:
    """The builtins of torch, not overloads, which take twice as long."""
    x, w = draw(3, 3), draw(3, 3)
    code = freeze(mlp, [x], [w], backend="python").code
    lines = [s.strip() for s in code.splitlines() if "(" in s and not s.strip().startswith(("#", "def", "return"))]
    calls = [s for s in lines if not re.match(r"^\w+ = new_\w+\(\)$|^\w+ = \w+\.\w+\(", s)]
    assert calls
    slow = [s for s in calls if not s.startswith("torch.")]
    quick = [s for s in slow if hasattr(torch, s.partition("(")[0]) or hasattr(torch._C._nn, s.partition("(")[0])]
    assert not quick, f"{quick} have a builtin"


def test_views_of_kept_buffers_are_made_once() -> None:
    x, w = draw(3, 3), draw(3, 3)
    program = freeze(lambda x, w: ((x @ w).t()[:2].reshape(2, 3, 1) * 2).sum(), [x], [w])
    spy = ran(lambda: program(x))
    assert {str(o) for o in spy.heard if is_view(o)} <= {"aten.detach.default"}  # the result's own handle


def test_nothing_of_the_engine_runs_between_the_calls() -> None:
    """As many lines of Python as calls, and a fixed number around them."""
    from tests.tape_engine.program.common import counted

    def chain(length: int) -> int:
        x, w = draw(3), draw(3)

        def function(x: Tensor, w: Tensor) -> Tensor:
            for _ in range(length):
                x = x * w
            return x.sum()

        program = freeze(function, [x], [w], backend="python")
        program(x)
        with counted() as lines:
            program(x)
        return lines[0]

    assert chain(60) == chain(10)


# -- what a copy of the function is made of ------------------------------------------------------------------


def test_a_replay_that_raised_leaves_the_program_usable() -> None:
    @te.op
    def picky(x: Tensor) -> Tensor:
        if float(x.sum()) < 0:
            raise ValueError("negative")
        return x * 2

    @picky.rule
    def picky_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * 2

    x, n = torch.ones(3, dtype=F64), torch.zeros(())
    with te.record() as tape:
        n.add_(1)
        y = picky(x).sum()
    program = tape.program(inputs=x, outputs=y, backend="python")
    program.step(x)
    before = g_of(x)
    with pytest.raises(ValueError, match="negative"):
        program.step(-x)
    assert n == 2
    assert g_of(x) is before
    close(program.step(x), torch.tensor(6.0, dtype=F64))


def test_a_function_that_calls_the_program_itself() -> None:
    """A named operation's body may replay another program, or the same."""
    inner = freeze(lambda x: x.tanh(), [draw(3)])
    runs: list[int] = []

    @te.op
    def through(x: Tensor) -> Tensor:
        runs.append(1)
        return inner(x) * float(1 + 0 * x.sum().item())  # type: ignore[no-any-return]

    @through.rule
    def through_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
        return g * (1 - out * out)

    program = freeze(lambda x: through(x).sum(), [draw(3)])
    follows(program, lambda x: x.tanh().sum(), [draw(3)])
    assert runs
