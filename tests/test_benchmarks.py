"""The benchmarks run, compare what is equal, and count as they say; how fast anything is, no test asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tape_engine import article as by_hand
from tests.benchmarks import article, models, others, replay, report, timing
from tests.benchmarks.__main__ import main
from tests.helpers import g_of


@pytest.mark.slow
def test_they_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, told = tmp_path / "figures.json", tmp_path / "speed.md"
    assert main(["--quick", "--rows", "40", "--rounds", "1", "--json", str(path), "--markdown", str(told)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["machine"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in printed
    text = told.read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in text
    assert text.count("\n## ") == len(figures["tables"]) + 1
    assert all(table["title"][1:] in text for table in figures["tables"])
    assert len(figures["tables"]) == 12 + len(models.MODELS)
    assert [each["name"] for each in figures["memory"]] == [model.name for model in models.MODELS]
    for each in figures["memory"]:
        assert each["name"] in printed
        assert next(iter(each["peaks"])) == "torch.autograd, eager"
        assert len(each["peaks"]) == 2 + len(replay.BACKENDS)
        assert min(each["peaks"].values()) > 0
    *against_torch, first_results, growth, loops = figures["tables"]
    assert [each["name"].split()[-1] for each in growth["timings"]] == ["python", "python", "native", "native"]
    assert all("compiled" in each["name"] or "process" in each["name"] for each in first_results["timings"])
    for table in against_torch:
        assert table["title"] in printed
        first, *others = table["timings"]
        assert first["name"] == "torch.autograd, eager"
        assert first["ratio"] == 1.0
        replayed = [each["name"] for each in others if "replay" in each["name"]]
        assert replayed in ([], [f"tape_engine, replay ({backend})" for backend in replay.BACKENDS])
        for each in table["timings"]:
            assert each["name"] in printed
            assert 0 < each["low"] <= each["median"] <= each["high"]
    assert [each["name"] for each in loops["timings"]] == [
        "the article's fully vectorised",
        "the article's half vectorised",
        "the article's row loops",
    ]


def test_a_way_to_other_gradients_is_not_compared() -> None:
    X, Y = article.random_data(20, 5)
    w, b = torch.randn(5, 1), torch.zeros(1)

    def right() -> by_hand.Gradients:
        return by_hand.backward(X, w, b, Y)

    def wrong() -> by_hand.Gradients:
        return right()._replace(b=right().b * 1.01)

    article._agree({"right": right, "as right": right})
    with pytest.raises(AssertionError, match=r"wrong: b\.g differs by 1\.0e-02 from right"):
        article._agree({"right": right, "wrong": wrong})


def test_the_cases_take_turns() -> None:
    order: list[str] = []
    cases = [
        timing.Case("a", lambda: order.append("a")),
        timing.Case("b", lambda: order.append("b"), number=2),
        timing.Case("slow", lambda: order.append("slow"), every=2),
    ]
    table = timing.measure("title", cases, 3)
    warm_up, rounds = order[:5], order[5:]
    assert warm_up == ["a", "a", "b", "b", "slow"]
    assert rounds == ["a", "b", "b", "slow", "b", "b", "a", "slow", "a", "b", "b"]
    assert [each.measurements for each in table.timings] == [3, 3, 2]


def test_median_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 1.0, 5.0, 5.0, 11.0, 11.0, 13.0, 13.0, 16.0, 16.0, 20.0])
    cases = [timing.Case("a", lambda: None), timing.Case("b", lambda: None, number=2, units=2)]
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: next(ticks))
        table = timing.measure("title", cases, 3)
    first, second = table.timings
    # the turns are a b, b a, a b: a took 1, 2 and 3 seconds, b took 4, 6 and 4 for 2 x 2 units
    assert (first.median, first.low, first.high) == (2.0, 1.0, 3.0)
    assert (second.median, second.low, second.high) == (1.0, 1.0, 1.5)
    assert table.ratio(second) == 0.5


def test_the_most_memory_is_that_held_at_one_time() -> None:
    with models.counting() as count:
        first = torch.ones(1000)
        second = torch.ones(3000)
        del first
        third = torch.ones(2000)
        del second
    assert count.most == 4 * (3000 + 2000)
    assert count.held == 4 * 2000
    del third


def test_all_ways_of_a_model_give_the_same_gradients() -> None:
    for model in models.MODELS:
        expected = None
        for parameters, way in models._ways(model, 2).values():
            torch.manual_seed(1)
            way()
            if expected is None:
                expected = [parameter.grad for parameter in parameters]
                continue
            for parameter, grad in zip(parameters, expected, strict=True):
                torch.testing.assert_close(g_of(parameter), grad)


def test_the_page_tells_how_others_were_timed() -> None:
    def table(*names: str) -> timing.Table:
        return timing.Table("a step", "step", tuple(timing.Timing(name, 1e-3, 1e-3, 1e-3, 1) for name in names))

    about = {"torch": "2", "jax": "0", "C++ compiler": None}
    alone = report.page(about, [table("torch.autograd, eager")], [])
    assert "torch 2, jax 0, C++ compiler None" in alone
    assert "jax.jit" not in alone
    for name in (others.JAX, f"the article by {others.TORCH_COMPILE}, nothing compiled yet"):
        text = report.page(about, [table("torch.autograd, eager", name)], [])
        assert text.index("jax.jit(jax.value_and_grad(...))") < text.index("## A step")
