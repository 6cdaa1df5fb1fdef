"""Copies of a recorded value, and ways out of torch and back: the gradient passes, or something is said."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import dlpack

import tape_engine as te
from tests.helpers import close, g_of, plain

Tensor = torch.Tensor
Function = Callable[[Tensor], Any]
F64 = torch.float64


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def by_file(y: Tensor) -> Any:
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file)


def by_set(y: Any) -> Any:
    return torch.zeros(3, dtype=F64).set_(y)


def by_storage(y: Tensor) -> Any:
    return torch.tensor([], dtype=F64).set_(y.untyped_storage(), 0, (3,), (1,))


THROUGH: dict[str, Function] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of what holds it": lambda y: copy.deepcopy({"a": [y]})["a"][0],
    "copy": copy.copy,
    "clone": torch.clone,
    "as_tensor": torch.as_tensor,
    "asarray": torch.asarray,
}

#: Those that torch itself warns of, or that are cuts in torch without a word: ``torch.tensor(x)``, ``x.data``.
CUT: dict[str, Function] = {
    "tensor": lambda y: torch.tensor(y),
    "new_tensor": lambda y: y.new_tensor(y),
    "data": lambda y: y.data,
}

WARNED: dict[str, Function] = {
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "save and load": by_file,
    "numpy": lambda y: torch.from_numpy(y.numpy()),
    "from_dlpack": dlpack.from_dlpack,
    "to_dlpack": lambda y: dlpack.from_dlpack(dlpack.to_dlpack(y)),  # type: ignore[attr-defined]
    "tensor of a list": lambda y: torch.tensor([y[0], y[1], y[2]]),
    "tensor of lists": lambda y: torch.tensor([[y[0], y[1]], [y[2], 0.0]]),
    "new_tensor of a list": lambda y: y.new_tensor([each for each in y]),  # noqa: C416
    "as_tensor of a list": lambda y: torch.as_tensor([y[0], y[1], y[2]]),
    "asarray of a list": lambda y: torch.asarray([y[0], y[1], y[2]]),
    "Tensor of a list": lambda y: torch.Tensor([y[0], y[1], y[2]]).double(),
    "DoubleTensor of lists": lambda y: torch.DoubleTensor([[y[0], y[1]], [y[2], 0.0]]),
    "new of a list": lambda y: y.new([y[0], y[1], y[2]]),
    "a complex one of a list": lambda y: torch.tensor([y[0] + 0j, y[1] + 0j, y[2] + 0j]).real,
}

REFUSED: dict[str, Function] = {
    "set_": by_set,
    "set_ of a storage": by_storage,
    "set_ of what was computed": lambda y: (y * 1).set_(torch.ones(3, dtype=F64)),  # type: ignore[call-overload]
    "set_ of what was computed, a storage": lambda y: (y * 1).set_(real(3).untyped_storage(), 0, (3,), (1,)),
}


def swept(function: Function, x: Tensor) -> Any:
    with te.record() as tape:
        y = x * 2
        z = function(y)
        loss = (z * z).sum() + y.sum()
    te.backward(loss)
    return tape, loss


@pytest.mark.parametrize("name", THROUGH)
def test_a_copy_of_what_was_computed_passes_the_gradient(name: str) -> None:
    x = real(3)
    tape, loss = swept(THROUGH[name], x)
    close(g_of(x), 8 * x + 2)
    program = tape.program(inputs=x, outputs=loss)
    fresh = real(3)
    close(program.step(fresh), (4 * fresh**2 + 2 * fresh).sum())
    close(g_of(fresh), 8 * fresh + 2)


@pytest.mark.parametrize("name", ["deepcopy", "deepcopy of what holds it", "copy"])
def test_a_copy_outside_a_block(name: str) -> None:
    x = real(3)
    with te.record():
        y = x * 2
    z = THROUGH[name](y)
    assert (z.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()) is (name == "copy")
    te.backward((z * z).sum() + y.sum())
    close(g_of(x), 8 * x + 2)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("name", CUT)
def test_what_is_a_cut_in_torch(name: str, outside: bool) -> None:
    x = real(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own
        if outside:
            with te.record():
                y = x * 2
            z = CUT[name](y)
            te.backward((z * z).sum() + y.sum())
        else:
            swept(CUT[name], x)
    close(g_of(x), torch.full_like(x, 2))


@pytest.mark.parametrize("name", WARNED)
def test_a_way_out_of_torch_warns(name: str) -> None:
    x = real(3)
    with pytest.warns(te.TapeWarning, match="constant to the sweep"):
        tape, loss = swept(WARNED[name], x)
    close(g_of(x), torch.full_like(x, 2))
    program = tape.program(inputs=x, outputs=loss)
    close(program(plain(x)), plain(loss))
    with pytest.raises(te.GuardError):  # what came back is what it was then
        program(plain(x) + 1)


@pytest.mark.parametrize("name", REFUSED)
def test_memory_given_by_set_is_refused(name: str) -> None:
    x = real(3)
    with pytest.raises(te.NotRecordedError, match=r"set_, which is no operation(.|\n)*fix: copy the elements instead"):
        swept(REFUSED[name], x)


def test_memory_given_by_set_outside_a_block_is_refused() -> None:
    x = real(3)
    with te.record():
        y = x * 2
    y.set_(torch.ones(3, dtype=F64).untyped_storage(), 0, (3,), (1,))
    with pytest.raises(te.NotRecordedError, match=r"given its memory by set_"):
        te.backward((y * y).sum())


def test_what_is_read_from_a_file_in_a_block_is_a_leaf() -> None:
    x = real(3)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    with te.record():
        read = torch.load(file)
        loss = (read**2).sum()
    te.backward(loss)
    close(g_of(read), 2 * x)


def test_a_copy_of_a_leaf_is_another_leaf() -> None:
    """As in torch: a target network that is copied from the one that is trained. A replay copies it anew."""
    layer, x = nn.Linear(3, 2).double(), real(4, 3)
    with te.record() as tape:
        target = copy.deepcopy(layer)
        loss = (layer(x) * target(x)).sum()
    assert target.weight.requires_grad
    assert target.weight.is_leaf
    te.backward(loss, wrt=[layer.weight, target.weight])
    wanted = (plain(target(x)).T @ x, plain(layer(x)).T @ x)
    close(g_of(layer.weight), wanted[0])
    close(g_of(target.weight), wanted[1])
    program = tape.program(inputs=x, outputs=loss, wrt=layer.weight)
    with torch.no_grad():
        layer.weight.add_(1)
    y = real(4, 3)
    close(program.step(y), plain((layer(y) ** 2).sum()))
    close(g_of(layer.weight), plain(layer(y)).T @ y)


@pytest.mark.parametrize("made", ["copied", "built"])
def test_a_module_made_in_a_block_is_trained_in_others(made: str) -> None:
    layer, x = nn.Linear(3, 2).double(), real(4, 3)
    with te.record():
        own = copy.deepcopy(layer) if made == "copied" else nn.Linear(3, 2).double()
        first = (own(x) ** 2).sum()
    te.backward(first)
    assert type(own.weight) is nn.Parameter  # it listens no more
    wanted = plain(g_of(own.weight))
    for _ in range(2):
        with te.record():
            loss = (own(x) ** 2).sum()
        te.backward(loss)
        (autograd,) = torch.autograd.grad((own(x) ** 2).sum(), own.weight)
        close(g_of(own.weight), autograd)
        te.backward(first, wrt=[own.weight])  # what was recorded first can still be swept
        close(g_of(own.weight), wanted)
        te.backward(first)
        close(g_of(own.weight), wanted)
    with torch.no_grad():
        own.weight.sub_(0.1 * plain(g_of(own.weight)))
    with te.record():
        loss = (own(x) ** 2).sum()
    te.backward(loss)
    (autograd,) = torch.autograd.grad((own(x) ** 2).sum(), own.weight)
    close(g_of(own.weight), autograd)


def test_a_copied_input_is_copied_on_each_replay() -> None:
    x = real(3)
    with te.record() as tape:
        loss = (copy.deepcopy(x) * x).sum()
    program = tape.program(inputs=x, outputs=loss, wrt=x)
    y = real(3)
    close(program.step(y), (y * y).sum())
    close(g_of(y), y)


def test_the_text_of_a_list() -> None:
    x = real(2)
    with te.record():
        y = x * 2
        with pytest.warns(te.TapeWarning) as caught:
            torch.tensor([y[0], y[1]])
    text = str(caught[0].message)
    assert text.startswith("torch.tensor takes the numbers out of the tensors in a list")
    assert "test_copies.py" in text
    assert "fix: torch.stack(...)" in text
    assert len(caught) == 1


def test_a_list_of_numbers_and_of_detached_tensors_is_silent() -> None:
    x = real(2)
    with te.record():
        y = x * 2
        loss = (torch.tensor([1.0, 2.0]) * y).sum() + torch.tensor([y[0].detach(), y[1].detach()]).sum()
    te.backward(loss)
    close(g_of(x), torch.tensor([2.0, 4.0], dtype=F64))


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", [torch.Tensor, torch.FloatTensor])
def test_the_text_of_a_constructor(kind: Any, outside: bool) -> None:
    """One warning a call, at the user's line, however many tensors stand in the list."""
    x = real(3)
    with te.record():
        y = x * 2
        if not outside:
            with pytest.warns(te.TapeWarning) as caught:
                kind([y[0], y[1], y[2]])
    if outside:
        with pytest.warns(te.TapeWarning) as caught:
            kind([y[0], y[1], y[2]])
    assert str(caught[0].message).startswith("a constructor takes the numbers out of the tensors in a list")
    assert [Path(each.filename).name for each in caught] == ["test_copies.py"]


def test_what_comes_of_factories_and_detached_tensors_is_handed_out_silently() -> None:
    x = real(3)
    with te.record():
        y = x * 2
        of_a_factory = torch.ones(3) * 2 + 1
        later = (y.detach() * 3).exp()
        torch.Tensor([later[0], of_a_factory[1]])
        of_a_factory.numpy()
        later.numpy()
    torch.Tensor([later[0]])


@pytest.mark.parametrize("name", ["new", "new_tensor"])
def test_new_of_a_list_outside_a_block_warns(name: str) -> None:
    x = real(3)
    with te.record():
        y = x * 2
    with pytest.warns(te.TapeWarning, match=f"{name} takes the numbers out"):
        getattr(y, name)([y[0], y[1]])


def test_as_subclass_outside_a_block_passes_the_gradient() -> None:
    x = real(3)
    with te.record():
        y = x * 2
    z = y.as_subclass(torch.Tensor)
    te.backward((z * 3).sum() + y.sum())
    close(g_of(x), torch.full_like(x, 8))
