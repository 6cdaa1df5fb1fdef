"""The benchmarks run, compare what is equal, and count as they say; how fast anything is, no test asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tape_engine import article as by_hand
from tests.benchmarks import article, timing
from tests.benchmarks.__main__ import main


@pytest.mark.slow
def test_they_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    assert main(["--quick", "--rows", "40", "--rounds", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["machine"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in printed
    assert len(report["tables"]) == 6
    for table in report["tables"]:
        assert table["title"] in printed
        first, *others = table["timings"]
        assert first["name"] == "torch.autograd, eager"
        assert first["ratio"] == 1.0
        assert others[-1]["name"] == "tape_engine, replay"
        for each in table["timings"]:
            assert each["name"] in printed
            assert 0 < each["low"] <= each["median"] <= each["high"]
    names = [each["name"] for each in report["tables"][0]["timings"]]
    assert [name for name in names if "article" in name] == [
        "the article's row loops",
        "the article's half vectorised",
        "the article's fully vectorised",
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
