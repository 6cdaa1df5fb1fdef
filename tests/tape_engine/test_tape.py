"""The tape as data: what a user finds when looking at it."""

from __future__ import annotations

import linecache
import threading
from typing import Any

import pytest
import torch

import tape_engine as te
from tape_engine.names import code_line, where
from tape_engine.tape import Kept, describe, version_of
from tests.helpers import Tensor, plain


def rand(*shape: int) -> Any:
    return torch.randn(shape, dtype=torch.float64)


def recorded() -> tuple[te.Tape, list[Tensor]]:
    X, w, b, Y = rand(5, 3), rand(3, 2), rand(2), rand(5, 2)
    with te.record() as tape:
        Z = te.lin(X, w, b)
        U = torch.relu(Z)
        best = U.max(1)
        C = te.mse(U, Y) + best.values.sum() * 0.5
    return tape, [X, w, b, Y, Z, U, best.values, C]


def test_nodes_are_in_order_and_know_their_values() -> None:
    tape, (X, w, b, Y, Z, U, _, C) = recorded()
    nodes = tape.nodes
    assert [node.op.name for node in nodes] == ["lin", "relu", "max", "mse", "sum", "mul", "add"]
    assert len(tape) == 7
    assert list(tape) == nodes
    lin, relu, peak, mse, *_, last = nodes
    assert all(v.tensor is t for v, t in zip(lin.inputs, (X, w, b), strict=True))
    assert lin.outputs[0].tensor is Z
    assert relu.inputs[0] is lin.outputs[0]
    assert relu.outputs[0].tensor is U
    assert mse.inputs[1].tensor is Y
    assert last.outputs[0].tensor is C
    assert (len(peak.outputs), peak.outputs_tuple, lin.outputs_tuple) == (2, True, False)
    assert [v.index for v in peak.outputs] == [0, 1]
    assert peak.outputs[1].dtype == torch.int64
    assert sorted(node.seq for node in nodes) == [node.seq for node in nodes]
    assert peak.args[1:] == (1,) or peak.params == {"dim": 1}


def test_a_tape_is_append_only_and_its_lists_are_copies() -> None:
    tape, _ = recorded()
    tape.nodes.clear()
    tape.values.clear()
    assert len(tape.nodes) == 7
    assert len(tape.values) == 12


def test_values_appear_once_each_and_only_once_assigned() -> None:
    x = rand(3)
    with te.record() as tape:
        y = x * x
        y.add_(x)
        z = y + y
    values = tape.values
    assert len({id(v) for v in values}) == len(values) == 4  # x, y, what y held after the write, z
    makers = [v for node in tape.nodes for v in node.outputs]
    assert len(makers) == len({id(v) for v in makers})
    assert [v.leaf for v in values] == [True, False, False, False]
    assert tape.leaves == values[:1]
    assert values[1].tensor is None  # y went on
    assert values[2].tensor is y
    assert values[3].tensor is z
    assert tape.nodes[1].mutates
    assert not tape.nodes[0].mutates


def test_a_value_describes_its_tensor() -> None:
    x = rand(4, 3)
    with te.record() as tape:
        x.t()
    value = tape.nodes[0].outputs[0]
    t = x.t()
    assert (value.shape, value.dtype, value.device, value.ndim) == (t.shape, t.dtype, t.device, 2)
    assert value.strides == value.stride() == t.stride()
    assert (value.size(), value.size(0), value.stride(1), value.dim(), value.numel()) == (t.shape, 3, 3, 2, 12)
    assert (value.itemsize, value.element_size(), value.nbytes) == (8, 8, 96)
    assert value.is_floating_point()
    assert not value.is_complex()
    assert value.differentiable
    assert "(3, 4)" in repr(value)
    assert "float64" in repr(value)
    assert value.node is tape.nodes[0]
    assert not value.leaf
    assert repr(tape.nodes[0]) == "<node t: (4, 3) -> (3, 4)>"


@pytest.mark.parametrize(
    ("t", "text"),
    [
        (torch.zeros(64, 784), "(64, 784)  float32"),
        (torch.zeros(()), "()  float32"),
        (torch.zeros(3, dtype=torch.bfloat16), "(3,)  bfloat16"),
        (torch.zeros(0, 2, dtype=torch.complex64), "(0, 2)  complex64"),
        (torch.zeros(2, device="meta"), "(2,)  float32  meta"),
    ],
)
def test_describe(t: Tensor, text: str) -> None:
    assert describe(t) == text


def test_an_empty_tape() -> None:
    with te.record() as tape:
        pass
    assert len(tape) == 0
    assert bool(tape)
    assert tape.nodes == []
    assert tape.values == []
    assert tape.leaves == []
    assert "0 nodes" in str(tape)
    assert repr(tape) == "<tape of 0 nodes>"


def test_current_and_global_tape() -> None:
    outside = te.global_tape()
    assert te.current_tape() is outside
    with te.record() as tape:
        assert te.current_tape() is tape
        assert te.global_tape() is outside
        te.relu(rand(2))
    assert len(tape) >= 1
    assert len(outside) == 0


def test_tapes_are_of_one_thread() -> None:
    seen: list[Any] = []
    with te.record() as tape:
        thread = threading.Thread(target=lambda: seen.extend([te.current_tape(), te.global_tape()]))
        thread.start()
        thread.join()
    assert seen[0] is seen[1]
    assert seen[0] is not tape
    assert seen[0] is not te.global_tape()


def test_scopes_params_and_flags_of_nodes() -> None:
    x = rand(3, 4)
    with te.record() as tape:
        with te.scope("a"):
            x.sum(1, keepdim=True)
        with torch.no_grad():
            x.exp()
        x.argmax()
        torch.rand(2)
        bool(x.sum() > 0)
        torch.special.i1(x)
    by_name = {node.op.name: node for node in tape.nodes}
    total = tape.nodes[0]
    assert total.scope == ("a",)
    assert total.params == {"dim": [1], "keepdim": True}
    assert total.rule == "sum_dim_grad" or total.rule.endswith("_grad")
    assert (by_name["exp"].cut, by_name["exp"].rule) == (True, "cut")
    assert by_name["argmax"].rule == "none"
    assert by_name["rand"].random
    guards = [node for node in tape.nodes if not node.outputs]
    assert len(guards) == 1
    assert guards[0].result in (True, False)
    assert not any(node.swept for node in tape.nodes)


def test_the_user_s_line_of_a_node() -> None:
    x = rand(3)
    with te.record() as tape:
        y = x * 2
        z = torch.nn.functional.softplus(
            y,
        )
    assert code_line(tape.nodes[0]) == "y = x * 2"
    assert code_line(tape.nodes[1]) == "z = torch.nn.functional.softplus("
    file, line = str(where(tape.nodes[0])).split(":")
    assert file == "test_tape.py"
    assert linecache.getline(__file__, int(line)).strip() == "y = x * 2"
    del z


def test_kept_cells_tell_a_write() -> None:
    t = rand(3)
    cell = Kept(t)
    before = cell.intact
    t.add_(1)
    assert (before, cell.intact) == (True, False)
    with torch.inference_mode():
        frozen = rand(3)
    assert version_of(frozen) == 0
    assert Kept(frozen).intact


def test_the_values_of_a_cleared_tape_live_on_with_their_tensors() -> None:
    tape, (X, *_, C) = recorded()
    tape.clear()
    te.backward(C)
    assert X.g.shape == X.shape
    before = plain(X.g)
    te.backward(C)
    assert torch.equal(before, X.g)
