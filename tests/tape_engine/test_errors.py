"""Every error is a TapeError and of the builtin kind that it specialises, and its text has one form."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import tape_engine as te
from tape_engine import errors
from tape_engine.errors import message

KINDS = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, Exception) and not issubclass(each, Warning)
]

BUILTINS = {
    "BackendError": ValueError,
    "DTypeError": TypeError,
    "DataError": ValueError,
    "GuardError": RuntimeError,
    "InputError": ValueError,
    "LoadError": ValueError,
    "MissingRuleError": NotImplementedError,
    "NotRecordedError": ValueError,
    "OverwrittenError": RuntimeError,
    "PathError": OSError,
    "RuleError": RuntimeError,
    "SaveError": ValueError,
    "ShapeError": ValueError,
    "SweptError": RuntimeError,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_a_tape_error_and_a_builtin_one(kind: type[Exception]) -> None:
    assert issubclass(kind, te.TapeError)
    assert kind.__doc__
    assert kind.__name__ in errors.__all__
    if kind is te.TapeError:
        return
    assert issubclass(kind, BUILTINS[kind.__name__])
    error = kind("text")
    assert str(error) == "text"
    assert type(pickle.loads(pickle.dumps(error))) is kind


def test_none_is_missing() -> None:
    assert set(BUILTINS) | {"TapeError"} == {kind.__name__ for kind in KINDS}


@pytest.mark.parametrize(
    "name",
    [
        "TapeError",
        "ShapeError",
        "MissingRuleError",
        "RuleError",
        "GuardError",
        "LoadError",
        "DTypeError",
        "InputError",
        "NotRecordedError",
        "OverwrittenError",
        "SweptError",
    ],
)
def test_users_find_them_in_the_package(name: str) -> None:
    assert getattr(te, name) is getattr(errors, name)
    assert name in te.__all__


def test_the_form_of_a_message() -> None:
    assert message("what is wrong.") == "what is wrong."
    assert message(
        "what.",
        where="train.py:12    Z = te.lin(X, w, b)",
        operands=[("X", "(64, 784)  float32"), ("weights", "(785, 1)   float32")],
        fix="make w of shape (784, 1)",
    ) == (
        "what.\n"
        "  at train.py:12    Z = te.lin(X, w, b)\n"
        "  X          (64, 784)  float32\n"
        "  weights    (785, 1)   float32\n"
        "  fix: make w of shape (784, 1)"
    )
    assert message("what.", operands=iter([("x", "()")])) == "what.\n  x    ()"
    assert message("what.", fix="this") == "what.\n  fix: this"


def test_code_that_catches_the_builtin_keeps_working() -> None:
    X, w = torch.zeros(3, 2), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="lin"):
        te.lin(X, w)
    with pytest.raises(TypeError):
        te.relu(torch.arange(3))
    with pytest.raises(ValueError, match="on no tape"):
        te.backward(X.sum())


def test_warnings_are_warnings() -> None:
    warnings = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, Warning)]
    assert all(issubclass(each, UserWarning) for each in warnings)
