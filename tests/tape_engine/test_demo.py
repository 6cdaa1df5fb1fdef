"""The demo's own parts: that it finds what is wrong, splits fairly, and trains."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from tape_engine import article, data, demo
from tape_engine.errors import DataError

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.digits()


def some(digits: data.Digits, count: int, test: data.Digits | None = None) -> data.Digits:
    return data.Digits(digits.images[:count], digits.labels[:count], digits.names, digits.size, digits.source, test)


# -- the comparison ----------------------------------------------------------------------------------------


def test_every_gradient_agrees(digits: data.Digits) -> None:
    job = demo.record_main(digits.images[:200], digits.labels[:200])
    comparisons = demo.compare(job)
    assert [each.name for each in comparisons] == ["X", "w", "b", "Z", "U"]
    assert [each.shape for each in comparisons] == [(200, 64), (64, 1), (1,), (200, 1), (200, 1)]
    for each in comparisons:
        assert each.agrees
        assert set(each.differences) == {"closed form", "row loops", "torch.autograd"}
        assert each.tolerance == 1e-10


def test_the_job_has_rows_on_both_sides_of_the_kink(digits: data.Digits) -> None:
    job = demo.record_main(digits.images, digits.labels)
    share = (job.Z > 0).double().mean()
    assert 0.1 < share < 0.9


def test_the_listing_has_the_names_of_the_code(digits: data.Digits) -> None:
    _, first, second, third = demo.record_main(digits.images[:5], digits.labels[:5]).listing.splitlines()
    assert "Z (5, 1) float64 = lin(X (5, 64), w (64, 1), b (1,))" in first
    assert "U (5, 1) float64 = relu(Z (5, 1))" in second
    assert "C () float64 = mse(U (5, 1), Y (5,))" in third
    assert "demo.py" in first


@pytest.mark.parametrize("name", article.Gradients._fields)
def test_one_wrong_gradient_is_found(digits: data.Digits, name: str) -> None:
    job = demo.record_main(digits.images[:50], digits.labels[:50])
    value = getattr(job, name)
    value.g = value.g * (1 + 1e-9)
    assert {each.name: each.agrees for each in demo.compare(job)} == {
        other: other != name for other in article.Gradients._fields
    }
    del value.g
    assert [each.name for each in demo.compare(job) if not each.agrees] == [name]


@pytest.mark.parametrize("way", demo.WAYS)
def test_one_wrong_way_is_found(digits: data.Digits, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = demo.WAYS[way]
    monkeypatch.setitem(demo.WAYS, way, lambda *job: right(*job)._replace(w=-right(*job).w))
    job = demo.record_main(digits.images[:50], digits.labels[:50])
    wrong = [each for each in demo.compare(job) if not each.agrees]
    assert [each.name for each in wrong] == ["w"]
    assert wrong[0].differences[way] == pytest.approx(2.0)


def test_largest_difference() -> None:
    e = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert demo.largest_difference(e.clone(), e) == 0.0
    assert demo.largest_difference(torch.tensor([1.0, -3.0], dtype=torch.float64), e) == 0.25
    assert demo.largest_difference(torch.full((2,), 0.5), torch.zeros(2)) == 0.5  # absolute, where all is 0
    assert demo.largest_difference(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0
    for misfit in (None, e.float(), e.unsqueeze(1), torch.zeros(3, dtype=torch.float64)):
        assert demo.largest_difference(misfit, e) == math.inf


def test_what_is_not_a_number_does_not_agree() -> None:
    nan = demo.largest_difference(torch.tensor([math.nan]), torch.tensor([1.0]))
    assert not demo.Comparison("w", (1,), {"closed form": nan}, 1e-10).agrees
    assert not demo.Comparison("w", (1,), {"closed form": math.inf}, 1e-10).agrees


# -- training ----------------------------------------------------------------------------------------------


def rows_of(X: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in X.tolist()}


def test_a_fifth_is_held_out(digits: data.Digits) -> None:
    parts = demo.split(digits)
    assert (len(parts.X), len(parts.held_X)) == (1438, 359)
    assert rows_of(parts.X).isdisjoint(rows_of(parts.held_X))
    assert rows_of(parts.X) | rows_of(parts.held_X) == rows_of(digits.images)
    torch.testing.assert_close(parts.Y.sum(1), torch.ones(1438))
    assert parts.Y.shape == (1438, 10)
    shown = {tuple(row): int(label) for row, label in zip(digits.images.tolist(), digits.labels, strict=True)}
    assert [shown[tuple(row)] for row in parts.X.tolist()] == parts.Y.argmax(1).tolist()


def test_the_sets_own_test_part_is_held_out(digits: data.Digits) -> None:
    test = data.Digits(digits.images[100:130], digits.labels[100:130], digits.names, digits.size, "test")
    parts = demo.split(some(digits, 100, test))
    torch.testing.assert_close(parts.X, digits.images[:100])
    torch.testing.assert_close(parts.held_X, digits.images[100:130])
    assert parts.held_Y.argmax(1).tolist() == digits.labels[100:130].tolist()


def test_batches_go_through_all_rows_before_they_come_again() -> None:
    X = torch.arange(23.0).unsqueeze(1)
    stream = demo.batches(X, 2 * X, 5)
    passes = [list(itertools.islice(stream, 4)) for _ in range(3)]
    for batches in passes:
        seen = torch.cat([x for x, _ in batches]).flatten().tolist()
        assert len(set(seen)) == 20
        assert all(len(x) == 5 and torch.equal(y, 2 * x) for x, y in batches)
    assert not torch.equal(passes[0][0][0], passes[1][0][0])


def test_score() -> None:
    Y = torch.eye(2)[[0, 1, 0, 1]]
    assert demo.score(Y, Y) == (0.0, 1.0)
    assert demo.score(torch.full((4, 2), 0.5), Y) == (0.25, 0.5)
    assert demo.score(1 - Y, Y) == (1.0, 0.0)


def test_training_by_replay_beats_the_mean(digits: data.Digits) -> None:
    threads, steps = torch.get_num_threads(), []
    trained = demo.train(digits, 400, on_step=lambda: steps.append(1))
    assert len(steps) == trained.steps == 400
    assert trained.sizes == (64, 32, 10)
    assert (trained.train, trained.held, trained.batch) == (1438, 359, 64)
    assert trained.after.error < 0.3 * trained.mean.error < trained.before.error
    assert trained.after.right > 0.9
    assert trained.replay < 1e-5
    assert trained.agrees
    assert set(trained.microseconds) == {"torch.autograd", "record and sweep", "replay"}
    assert torch.get_num_threads() == threads


def test_training_is_what_torch_would_do(digits: data.Digits) -> None:
    few = some(digits, 120)
    trained = demo.train(few, 25, batch=32, lr=0.5)
    X, Y, held_X, held_Y = demo.split(few)
    leaves = demo.leaves_of(demo.Network(64, 10))
    optimizer = torch.optim.SGD(leaves, lr=0.5)
    stream = demo.batches(X, Y, 32)
    next(stream)  # the batch that was recorded
    for x, y in itertools.islice(stream, 25):
        optimizer.zero_grad()
        for leaf, g in zip(leaves, demo.autograd_step(leaves, x, y), strict=True):
            leaf.grad = g
        optimizer.step()
    W1, b1, W2, b2 = (leaf.detach() for leaf in leaves)
    after = demo.score((held_X @ W1 + b1).relu() @ W2 + b2, held_Y)
    assert trained.after.error == pytest.approx(after.error, rel=1e-4)


def test_a_wrong_replay_is_found(digits: data.Digits) -> None:
    network = demo.Network(64, 10)
    X, Y, *_ = demo.split(some(digits, 40))

    class Wrong:
        def step(self, *_: Tensor) -> None:
            for parameter, g in zip(network.parameters, demo.autograd_step(demo.leaves_of(network), X, Y), strict=True):
                parameter.g = g.clone()  # type: ignore[attr-defined]
            network.b1.g = network.b1.g * 1.01  # type: ignore[attr-defined]

    assert demo.replay_against_autograd(Wrong(), network, X, Y) == pytest.approx(0.01, rel=1e-3)


def test_a_set_smaller_than_a_batch_is_one_batch(digits: data.Digits) -> None:
    assert demo.train(some(digits, 20), 3).batch == 16


def test_too_few_images_to_hold_some_out(digits: data.Digits) -> None:
    with pytest.raises(DataError, match=r"4 images are too few to hold some out"):
        demo.train(some(digits, 4), 3)


# -- the picture -------------------------------------------------------------------------------------------


def test_the_graph_is_drawn(digits: data.Digits, tmp_path: Path) -> None:
    job = demo.record_main(digits.images[:30], digits.labels[:30])
    png, svg = demo.draw(job, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = svg.read_text(encoding="utf-8")
    for shown in ("X.g", "w.g", "(30, 64)", "relu"):
        assert shown in text


def test_without_the_pictures_package(digits: data.Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = demo.record_main(digits.images[:5], digits.labels[:5])
    monkeypatch.setitem(sys.modules, "viz", None)
    with pytest.raises(ImportError):
        demo.draw(job, tmp_path)
