"""What does not fit is refused in the user's own words, with a fix that fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tape_engine as te
from tests.helpers import Tensor, error_text

# -- texts, word for word --------------------------------------------------------------------------


def test_features_that_do_not_match() -> None:
    images, weights = torch.zeros(64, 784), torch.zeros(785, 1)
    with pytest.raises(te.ShapeError) as caught:
        te.lin(images, weights)
    assert error_text(caught, __file__) == (
        "lin: the last dimension of images, 784, is not the first of weights, 785.\n"
        "  at LINE\n"
        "  images     (64, 784)  float32\n"
        "  weights    (785, 1)  float32\n"
        "  fix: make weights of shape (784, 1)"
    )


def test_a_transposed_weight() -> None:
    images, weights = torch.zeros(64, 784), torch.zeros(10, 784)
    with pytest.raises(te.ShapeError) as caught:
        te.lin(images, weights)
    assert error_text(caught, __file__) == (
        "lin: the last dimension of images, 784, is not the first of weights, 10.\n"
        "  at LINE\n"
        "  images     (64, 784)  float32\n"
        "  weights    (10, 784)  float32\n"
        "  fix: weights.t() in the place of weights"
    )


def test_a_bias_that_does_not_fit() -> None:
    X, w, b = torch.zeros(5, 3), torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(te.ShapeError) as caught:
        te.lin(X, w, b)
    assert error_text(caught, __file__) == (
        "lin: b of shape (3,) is neither (2,), one for each column of w, nor (1,).\n"
        "  at LINE\n"
        "  X    (5, 3)  float32\n"
        "  w    (3, 2)  float32\n"
        "  b    (3,)  float32\n"
        "  fix: make b of shape (2,)"
    )


def test_a_single_row() -> None:
    row, w = torch.zeros(3), torch.zeros(3, 2)
    with pytest.raises(te.ShapeError) as caught:
        te.lin(row, w)
    assert error_text(caught, __file__) == (
        "lin: row has 1 dimension; it takes rows of features, (N, D) or with more leading dimensions.\n"
        "  at LINE\n"
        "  row    (3,)  float32\n"
        "  w      (3, 2)  float32\n"
        "  fix: row.unsqueeze(0) in the place of row"
    )


def test_a_target_that_would_broadcast() -> None:
    scores, labels = torch.zeros(64, 1), torch.zeros(1, 64)
    with pytest.raises(te.ShapeError) as caught:
        te.mse(scores, labels)
    assert error_text(caught, __file__) == (
        "mse: scores (64, 1) and labels (1, 64) do not pair element by element.\n"
        "  at LINE\n"
        "  scores    (64, 1)  float32\n"
        "  labels    (1, 64)  float32\n"
        "  fix: labels.t() in the place of labels"
    )


def test_the_article_s_pair_the_wrong_way_round() -> None:
    scores, labels = torch.zeros(64), torch.zeros(64, 1)
    with pytest.raises(te.ShapeError) as caught:
        te.mse(scores, labels)
    assert error_text(caught, __file__) == (
        "mse: scores (64,) and labels (64, 1) do not pair element by element.\n"
        "  at LINE\n"
        "  scores    (64,)  float32\n"
        "  labels    (64, 1)  float32\n"
        "  fix: labels.squeeze(-1) in the place of labels"
    )


def test_a_pair_beyond_help() -> None:
    U, Y = torch.zeros(4, 3), torch.zeros(5, 2)
    with pytest.raises(te.ShapeError, match=r"fix: make Y of shape \(4, 3\)"):
        te.mse(U, Y)


def test_dtypes_that_differ() -> None:
    X, w, b = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(3, 2), torch.zeros(2)
    with pytest.raises(te.DTypeError) as caught:
        te.lin(X, w, b)
    assert isinstance(caught.value, TypeError)
    assert error_text(caught, __file__) == (
        "lin: its operands have different dtypes.\n"
        "  at LINE\n"
        "  X    (5, 3)  float64\n"
        "  w    (3, 2)  float32\n"
        "  b    (2,)  float32\n"
        "  fix: X.to(torch.float32)"
    )


def test_integers_for_relu() -> None:
    counts = torch.arange(3)
    with pytest.raises(te.DTypeError) as caught:
        te.relu(counts)
    assert error_text(caught, __file__) == (
        "relu: counts is int64, not a real floating dtype.\n"
        "  at LINE\n"
        "  counts    (3,)  int64\n"
        "  fix: counts.to(torch.float32)"
    )


def test_what_is_no_tensor() -> None:
    rows = [[1.0, 2.0]]
    w = torch.zeros(2, 1)
    with pytest.raises(te.DTypeError) as caught:
        te.lin(rows, w)
    assert error_text(caught, __file__) == (
        "lin: rows is list, not a tensor.\n"
        "  at LINE\n"
        "  rows    list [[1.0, 2.0]]\n"
        "  w       (2, 1)  float32\n"
        "  fix: torch.as_tensor(rows)"
    )
    array = numpy.zeros((2, 2), dtype=numpy.float32)
    with pytest.raises(te.DTypeError, match=r"array is ndarray, not a tensor"):
        te.lin(array, w)
    with pytest.raises(te.DTypeError, match="not a tensor"):
        te.relu(None)
    with pytest.raises(te.DTypeError, match="not a tensor"):
        te.mse(w, "Y")


def test_devices_that_differ() -> None:
    X, w = torch.zeros(5, 3), torch.zeros(3, 2, device="meta")
    with pytest.raises(te.InputError) as caught:
        te.lin(X, w)
    assert isinstance(caught.value, ValueError)
    text = error_text(caught, __file__)
    assert "different devices" in text
    assert "(3, 2)  float32  meta" in text
    assert 'fix: w.to("cpu")' in text


def test_names_of_operands_by_position_and_keyword() -> None:
    images, weight, bias = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(3, 2), torch.zeros(2)
    shown = r"images +\(5, 3\)  float64\n  weight +\(3, 2\)  float32\n  bias +\(2,\)  float32"
    for call in (
        lambda: te.lin(images, weight, bias),
        lambda: te.lin(images, weight, b=bias),
        lambda: te.lin(b=bias, w=weight, X=images),
    ):
        with pytest.raises(te.DTypeError, match=shown):
            call()  # type: ignore[no-untyped-call]
    scores, labels = torch.zeros(5, 1), torch.zeros(1, 5)
    for call in (lambda: te.mse(scores, labels), lambda: te.mse(Y=labels, U=scores), lambda: te.mse(scores, Y=labels)):
        with pytest.raises(
            te.ShapeError, match=r"scores +\(5, 1\)  float32\n  labels +\(1, 5\)  float32\n  fix: labels\.t\(\)"
        ):
            call()


def test_operands_that_are_no_plain_names() -> None:
    model = SimpleNamespace(w=torch.zeros(4, 2), layers=[torch.zeros(4, 2)])
    X = torch.zeros(5, 3)
    with pytest.raises(te.ShapeError, match=r"first of model\.w, 4"):
        te.lin(X, model.w)
    with pytest.raises(te.ShapeError, match=r"first of model\.layers\[0\], 4|first of w, 4"):
        te.lin(X, model.layers[0])
    with pytest.raises(te.ShapeError, match=r"\(5, 3\)"):
        te.lin(X * 2, model.w)
    with pytest.raises(te.ShapeError):
        te.lin(*[X, model.w])
    with pytest.raises(te.ShapeError):
        te.lin(X=X, w=model.w)
    with pytest.raises(te.ShapeError):
        list(map(te.lin, [X], [model.w]))
    with pytest.raises(te.ShapeError, match=r"first of w, 4"):
        exec("te.lin(X, w)", {"te": te, "X": X, "w": model.w})


def test_a_call_over_several_lines() -> None:
    images, weights = torch.zeros(6, 3), torch.zeros(4, 2)
    with pytest.raises(te.ShapeError, match="last dimension of images, 3, is not the first of weights, 4"):
        te.lin(
            images,
            weights,
        )


# -- the fix is carried out ------------------------------------------------------------------------


def repaired(text: str, operands: dict[str, Any]) -> dict[str, Any]:
    """The operands after what the message says under "fix: "."""
    assert "fix: " in text, text
    fix = text.rsplit("fix: ", 1)[1]
    space = {"torch": torch, **operands}
    if found := re.fullmatch(r"(.+) in the place of (\w+)", fix):
        return {**operands, found[2]: eval(found[1], space)}
    if found := re.fullmatch(r"make (\w+) of shape (\(.*\))", fix):
        return {**operands, found[1]: torch.randn(eval(found[2], {"N": 2, "D": 2, "M": 2}))}
    if found := re.fullmatch(r"(\w+)\.to\(.+\)", fix):
        return {**operands, found[1]: eval(fix, space)}
    if found := re.fullmatch(r"torch\.as_tensor\((\w+)\)", fix):
        return {**operands, found[1]: eval(fix, space)}
    raise AssertionError(f"a fix of no known form: {fix}")


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=4).map(tuple)


def hold_to_its_fix(call: Callable[..., Any], operands: dict[str, Any]) -> None:
    """An operand a fix at most: what a fix mended is not refused again."""
    for _ in range(len(operands)):
        try:
            call(**operands)
            return
        except te.TapeError as error:
            operands = repaired(str(error), operands)
    call(**operands)


@given(X=shapes, w=shapes, b=st.none() | shapes)
@settings(max_examples=200)
def test_a_fix_of_lin_fits(X: tuple[int, ...], w: tuple[int, ...], b: tuple[int, ...] | None) -> None:
    hold_to_its_fix(
        lambda X, w, b: te.lin(X, w, b),
        {"X": torch.randn(X), "w": torch.randn(w), "b": None if b is None else torch.randn(b)},
    )


@given(U=shapes, Y=shapes)
@settings(max_examples=200)
def test_a_fix_of_mse_fits_at_once(U: tuple[int, ...], Y: tuple[int, ...]) -> None:
    operands: dict[str, Any] = {"U": torch.randn(U), "Y": torch.randn(Y)}
    try:
        (lambda U, Y: te.mse(U, Y))(**operands)
    except te.ShapeError as error:
        operands = repaired(str(error), operands)
        te.mse(operands["U"], operands["Y"])


DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64, torch.bfloat16]


def fixed(X: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`te.lin` after doing what its messages say, three times at most."""
    kinds = []
    for _ in range(4):
        try:
            return te.lin(X, w, b)
        except te.DTypeError as error:
            operands = repaired(str(error), {"X": X, "w": w, "b": b})
            X, w, b = operands["X"], operands["w"], operands["b"]
            kinds.append(str(error))
    raise AssertionError("three fixes did not help: " + "\n".join(kinds))


@pytest.mark.parametrize("of_b", [None, torch.float32, torch.int64, torch.complex64], ids=str)
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_dtypes_of_lin(of_b: torch.dtype | None) -> None:
    for of_X in DTYPES:
        for of_w in DTYPES:
            X, w = torch.ones(5, 3).to(of_X), torch.ones(3, 2).to(of_w)
            b = None if of_b is None else torch.ones(2).to(of_b)
            fits = of_X == of_w and of_b in (None, of_w) and (of_w.is_floating_point or of_w.is_complex)
            if not fits:
                with pytest.raises(te.DTypeError):
                    te.lin(X, w, b)
            Z = fixed(X, w, b)
            assert Z.dtype.is_floating_point or Z.dtype.is_complex


def test_nothing_is_computed_or_changed_by_a_refusal() -> None:
    X, w = torch.randn(5, 3), torch.randn(4, 2)
    before = X.clone(), w.clone(), torch.get_rng_state()
    with te.record() as tape:
        for _ in range(3):
            with pytest.raises(te.ShapeError):
                te.lin(X, w)
    assert len(tape) == 0
    assert len(te.global_tape()) == 0
    assert torch.equal(X, before[0])
    assert torch.equal(w, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert type(X) is Tensor
    assert not hasattr(X, "g")
