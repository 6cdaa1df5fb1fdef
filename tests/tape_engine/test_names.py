"""The user's own words: variable names, lines and expressions, as the source has them."""

from __future__ import annotations

import linecache
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tape_engine as te
from tape_engine.names import code_line, local_name, names_of, source_segment, user_frame, where
from tests.helpers import Tensor, plain


def rand(*shape: int) -> Any:
    return torch.randn(shape, dtype=torch.float64)


def names(tape: te.Tape) -> list[str]:
    """The names of all values, in the order of appearance."""
    found = names_of(tape.nodes)
    return [found[id(value)] for value in tape.values]


def made(tape: te.Tape) -> list[str]:
    """The names of what the nodes made, in order."""
    found = names_of(tape.nodes)
    return [found[id(value)] for node in tape.nodes for value in node.outputs]


def test_the_article_s_names() -> None:
    X, w, b, Y = rand(5, 3), rand(3, 1), rand(1), rand(5)
    Z = te.lin(X, w, b)
    U = te.relu(Z)
    C = te.mse(U, Y)
    assert names(te.global_tape()) == ["X", "w", "b", "Z", "U", "Y", "C"]
    del C


def test_names_of_plain_torch() -> None:
    images, weights, bias = rand(5, 3), rand(3, 2), rand(2)
    with te.record() as tape:
        scores = images @ weights + bias
        probabilities = torch.softmax(scores, -1)
        best, which = probabilities.max(1)
        loss = -best.log().mean()
    assert names(tape)[:4] == ["images", "weights", "mm", "bias"]
    assert [name for name in made(tape) if name in ("scores", "probabilities", "best", "which", "loss")] == [
        "scores",
        "probabilities",
        "best",
        "which",
        "loss",
    ]
    del which, loss


def assigned_in_every_way(x: Tensor) -> None:
    plain_name = x * 2
    annotated: Tensor = x * 3
    holder = SimpleNamespace()
    holder.attribute = x * 4
    if (walrus := x * 5) is not None:
        pass
    first = second = x * 6
    left, right = x.split(2)
    (one, *_) = x.unbind(0)
    table = {}
    table["key"] = x * 7
    x * 8
    print(end=f"{(x * 9).shape}"[:0])
    many_lines = torch.add(
        x,
        x,
    )
    chained = (x * 10).sin().cos()
    conditional = x * 11 if len(x) else None
    del plain_name, annotated, walrus, first, second, left, right, one, many_lines, chained, conditional


def test_every_kind_of_assignment() -> None:
    x = rand(4)
    with te.record() as tape:
        assigned_in_every_way(x)
    named = names_of(tape.nodes)
    found = {
        str(node.args[1]) if node.op.name == "mul" else node.op.name: [named[id(v)] for v in node.outputs]
        for node in tape.nodes
    }
    assert found["2"] == ["plain_name"]
    assert found["3"] == ["annotated"]
    assert found["4"] == ["holder.attribute"]
    assert found["5"] == ["walrus"]
    assert found["6"] == ["first"]
    everything = made(tape)
    assert everything[everything.index("left") + 1] == "right"
    assert "one" in everything
    assert found["7"][0].startswith("mul")
    assert found["8"][0].startswith("mul")
    assert found["9"][0].startswith("mul")
    assert "many_lines" in everything
    assert found["cos"] == ["chained"]
    assert found["sin"] == ["sin"]


def test_no_two_values_bear_one_name() -> None:
    x = rand(3)
    with te.record() as tape:
        h = x
        for _ in range(3):
            h = torch.sin(h)
            h += 1
        out = [torch.cos(h) for _ in range(2)]
    found = names(tape)
    assert len(set(found)) == len(found)
    assert found[0] == "x"
    assert [name for name in found if name.split("#")[0] == "h"] == ["h", "h#2", "h#3", "h#4", "h#5", "h#6"]
    assert [name for name in found if name.startswith("cos")] == ["cos", "cos#2"]
    del out


def test_leaves_bear_the_name_of_the_function_that_read_them() -> None:
    def layer(inputs: Tensor, weight: Tensor) -> Tensor:
        return torch.relu(inputs @ weight)

    data, matrix = rand(4, 3), rand(3, 3)
    with te.record() as tape:
        layer(layer(data, matrix), matrix)
    assert names(tape)[:2] == ["inputs", "weight"]
    assert len(names(tape)) == 6


def test_attributes_and_subscripts_as_operands() -> None:
    model = SimpleNamespace(w=rand(3, 2), layers=[rand(2)])
    batch = {"images": rand(4, 3)}
    with te.record() as tape:
        te.lin(batch["images"], model.w, model.layers[0])
    assert names(tape)[:3] == ["X", "model.w", "b"]


def test_parameters_bear_their_names_in_the_module() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = rand(5, 3)
    with te.record() as tape:
        net(x)
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} <= set(names(tape))
    assert "x" in names(tape)


def test_code_lines_sites_and_segments() -> None:
    X, w = rand(4, 3), rand(3, 2)
    with te.record() as tape:
        Z = X @ w  # a comment
        V = torch.nn.functional.relu(Z) + te.relu(Z)
    mm, relu, named, add = tape.nodes
    assert code_line(mm) == "Z = X @ w  # a comment"
    assert source_segment(mm) == "X @ w"
    assert source_segment(named) == "te.relu(Z)"
    assert source_segment(relu) == "torch.nn.functional.relu(Z)"
    assert source_segment(add) == "torch.nn.functional.relu(Z) + te.relu(Z)"
    for node in tape.nodes:
        file, line = str(where(node)).split(":")
        assert file == "test_names.py"
        assert linecache.getline(__file__, int(line)).strip() == code_line(node)
    del V


def test_code_without_source() -> None:
    space: dict[str, Any] = {"te": te, "x": rand(3), "torch": torch}
    exec("y = te.relu(x)\nz = y * 2", space)
    nodes = te.global_tape().nodes
    assert [str(where(node)) for node in nodes] == ["<string>:1", "<string>:2"]
    assert [code_line(node) for node in nodes] == [None, None]
    assert len(names(te.global_tape())) == 3
    assert "<string>:1" in str(te.global_tape())
    te.backward(space["z"].sum())


def test_source_given_to_linecache_as_notebooks_do() -> None:
    source = textwrap.dedent("""
        hidden = te.relu(start)
        total = hidden.sum()
    """)
    name = "<cell 1>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {"te": te, "start": rand(3)}
    exec(compile(source, name, "exec"), space)
    assert names(te.global_tape()) == ["start", "hidden", "total"]
    assert "<cell 1>:2" in str(te.global_tape())
    with pytest.raises(te.ShapeError, match=r"hidden has 3 elements") as caught:
        exec(compile("te.backward(hidden)", name, "exec"), space)
    assert "<cell 1>:1" in str(caught.value)


def test_source_that_changed_since_is_no_trouble(tmp_path: Any) -> None:
    path = tmp_path / "changing.py"
    path.write_text("def run(te, x):\n    with te.record() as tape:\n        y = te.relu(x)\n    return tape\n")
    space: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), space)
    tape = space["run"](te, rand(3))
    path.write_text("nothing = 1\n")
    linecache.checkcache(str(path))
    assert len(names(tape)) == 2
    assert "relu" in str(tape)


def test_user_frame_is_the_user_s() -> None:
    frame = user_frame()
    assert frame is not None
    assert frame.f_code.co_name == "test_user_frame_is_the_user_s"
    seen: list[Any] = []
    net = nn.Sequential(nn.Identity())
    net.register_forward_hook(lambda *args: seen.append(user_frame()))
    net(rand(2))
    assert seen[0].f_code.co_filename == __file__


def test_local_name() -> None:
    mine, _hidden = rand(2), rand(2)
    frame = user_frame()
    assert local_name(frame, mine) == "mine"
    assert local_name(frame, _hidden) is None
    assert local_name(frame, rand(2)) is None
    assert local_name(None, mine) is None


def test_the_user_s_own_locals_are_left_alone() -> None:
    x = rand(3)
    held = locals()
    te.relu(x)
    with te.record():
        y = x * 2
    assert held["x"] is x
    assert "x" in locals()
    del y


CALLS: list[Callable[[Tensor], Any]] = [
    lambda x: te.relu(x),
    lambda x: [te.relu(x) for _ in range(2)],
    lambda x: list(map(te.relu, [x, x])),
    lambda x: (lambda y: te.relu(y))(x),
    lambda x: te.relu(*[x]),
    lambda x: te.relu(Z=x),
    lambda x: te.relu(te.relu(x)),
    lambda x: eval("te.relu(x)", {"te": te, "x": x}),
    lambda x: next(te.relu(x) for _ in range(1)),
    lambda x: sorted([x], key=lambda t: float(te.relu(t).sum())),
    lambda x: te.relu(x) if te.relu(x).sum() > -1 else None,
    lambda x: {te.relu(x): te.relu(x)},
    lambda x: f"{te.relu(x)}",
    lambda x: yield_from(x),
]


def yield_from(x: Tensor) -> list[Tensor]:
    def inner() -> Any:
        yield te.relu(x)
        y = te.relu(x)
        yield y

    return list(inner())


@pytest.mark.parametrize("call", CALLS)
def test_names_never_fail(call: Callable[[Tensor], Any]) -> None:
    x = rand(3)
    with te.record() as tape:
        call(x)
    assert len(names(tape)) == len(set(names(tape))) >= 2
    assert str(tape).count("\n") == len(tape)
    for node in tape.nodes:
        where(node), code_line(node), source_segment(node)
    assert torch.equal(plain(x), plain(x))
