"""The table, against sums over the tape."""

from __future__ import annotations

import torch

import tape_engine as te
import viz

from .examples import article, kept, residual


def cells(line: str) -> list[str]:
    return [cell for cell in line.split("  ") if cell.strip()]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_a_line_an_operation_and_totals() -> None:
    tape = residual()
    lines = viz.table(tape).splitlines()
    assert len(lines) == 2 + len(tape) + 1 + 2
    outputs = [v for node in tape.nodes for v in node.outputs]
    for i, (node, line) in enumerate(zip(tape.nodes, lines[2:], strict=False)):
        row = [cell.strip() for cell in cells(line)]
        assert row[:2] == [str(i), node.op.name]
        assert row[2] == " ".join(str(tuple(v.shape)) for v in node.inputs)
        assert row[4].startswith(str(tuple(node.outputs[0].shape)))
        assert number(row[7]) == sum(v.numel() for v in node.outputs)
        assert number(row[8]) == sum(v.nbytes for v in node.outputs)
    total = [cell.strip() for cell in cells(lines[-2])]
    assert total[0] == f"{len(tape)} operations"
    assert number(total[1]) == sum(v.numel() for v in outputs)
    assert number(total[2]) == sum(v.nbytes for v in outputs)
    leaves = [cell.strip() for cell in cells(lines[-1])]
    assert leaves[0] == f"{len(tape.leaves)} leaves"
    assert number(leaves[1]) == sum(v.numel() for v in tape.leaves)


def test_shapes_forward_and_back() -> None:
    lines = viz.table(article()).splitlines()
    assert [cell.strip() for cell in cells(lines[2])][3:7] == ["Z", "(64, 1)", "(64, 1)", "float32"]
    assert [cell.strip() for cell in cells(lines[4])][3:7] == ["C", "()", "()", "float32"]
    unswept = viz.table(article(sweep=False)).splitlines()
    assert [cell.strip() for cell in cells(unswept[2])][5] == "-"


def test_columns_stand_under_each_other() -> None:
    lines = viz.table(residual()).splitlines()
    assert {len(line) for line in (lines[1], lines[-3])} == {max(map(len, lines))}


def test_a_root_of_any_kind() -> None:
    X, w = torch.randn(3, 2), torch.randn(2, 1)
    Z = te.lin(X, w)
    kept.append(Z)
    assert "lin" in viz.table(Z)
    with te.record() as tape:
        pass
    assert "0 operations" in viz.table(tape)
