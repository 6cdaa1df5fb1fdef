"""The article's table: lin → relu → mse forward and back on 50,000 rows of 784, by every way there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import tape_engine as te
from tape_engine import article
from tape_engine.demo import largest_difference

from .others import by_jax, by_torch_compile
from .replay import replays
from .timing import Case, Table, measure

__all__ = ["all_gradients", "loops", "parameters_only", "random_data"]

Tensor = torch.Tensor

ROWS, COLUMNS = 50_000, 784
CLOSE = 1e-3  # float32, sums over 50,000 rows in different orders


def random_data(rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """Images and labels of the shape of MNIST's, float32: `X` (N, D) from 0 to 1, `Y` (N,) from 0 to 9."""
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(rows, columns, generator=generator)
    return X, torch.randint(0, 10, (rows,), generator=generator).to(X.dtype)


def _weights(columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(columns, 1, generator=generator) / columns**0.5, torch.zeros(1)


def all_gradients(
    X: Tensor, Y: Tensor, rounds: int, *, others: bool = False, on_run: Callable[[str], None] = lambda _: None
) -> Table:
    """Every gradient, those of `X`, `w`, `b`, `Z` and `U`, as the article's code has them."""
    w, b = _weights(X.shape[1])
    leaf_X, leaf_w, leaf_b = leaves = [each.clone().requires_grad_() for each in (X, w, b)]
    labels = Y.clone()  # tensors that the living tape below does not listen to

    def autograd() -> article.Gradients:
        for leaf in leaves:
            leaf.grad = None
        Z, U, C = article.forward(leaf_X, leaf_w, leaf_b, labels)
        Z.retain_grad()
        U.retain_grad()
        C.backward()  # type: ignore[no-untyped-call]
        return article.Gradients(*(each.grad for each in (*leaves, Z, U)))  # type: ignore[arg-type]

    def eager() -> article.Gradients:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        C = te.mse(U, Y)
        te.backward(C)
        return _read(X, w, b, Z, U)

    def recorded() -> article.Gradients:
        with te.record():
            Z = X @ w + b
            U = Z.relu()
            C = (U.squeeze(-1) - Y).pow(2).mean()
        te.backward(C)
        return _read(X, w, b, Z, U)

    with te.record() as tape:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        C = te.mse(U, Y)

    def program(backend: str) -> te.Program:
        made: te.Program = tape.program(inputs=(X, Y), outputs=C, wrt=(X, w, b, Z, U), backend=backend)
        return made

    replayed = replays(program, [X, Y], then=lambda: _read(X, w, b, Z, U))
    by_hand = partial(article.backward, X, w, b, Y)
    ways: dict[str, Callable[[], Any]] = {
        "torch.autograd, eager": autograd,
        "the article's fully vectorised": by_hand,
        "tape_engine, eager (te.lin, te.relu, te.mse)": eager,
        "tape_engine, te.record() over plain torch": recorded,
        **{case.name: case.run for case in replayed},
    }
    _agree(ways)
    cases = [Case(name, way) for name, way in ways.items()]
    if others:
        zeros = torch.zeros(len(X), 1)  # gradients at what is added to `Z` and `U` are those of `Z` and `U`
        right: Sequence[Tensor] = by_hand()
        given = [*leaves, zeros, zeros]
        cases += by_torch_compile(lambda X, w, b, z, u: _shifted(X, w, b, z, u, labels), given, right, close=CLOSE)
        cases += by_jax(_shifted_by_numpy, given, right, constants=(labels,), close=CLOSE)
    room = torch.empty_like(X)
    cases.append(Case("one copy of X", lambda: room.copy_(X)))
    shape = f"X of {len(X):,} x {X.shape[1]}, {str(X.dtype).removeprefix('torch.')}"
    title = f"lin → relu → mse, forward and every gradient, {shape}"
    return measure(title, cases, rounds, on_run=on_run)


def loops(X: Tensor, Y: Tensor, rounds: int, *, on_run: Callable[[str], None] = lambda _: None) -> Table:
    """The article's own three ways to every gradient, one after the other as it improves them.

    To be measured last: the row loops leave 50,000 small pieces of memory behind, where a later way finds room for a
    gradient that it would have to ask the system for when it runs by itself (30 ms for eager torch instead of 95).
    """
    w, b = _weights(X.shape[1])
    by_hand = partial(article.backward, X, w, b, Y)
    ways: dict[str, Callable[[], Any]] = {
        "the article's fully vectorised": by_hand,
        "the article's half vectorised": partial(by_hand, lin_grad=article.lin_grad_half),
        "the article's row loops": partial(by_hand, lin_grad=article.lin_grad_rows),
    }
    _agree(ways)
    cases = [Case(name, way, every=2) for name, way in ways.items()]  # a minute a run: once is enough to warm up
    return measure("the article's own code, for the same gradients", cases, rounds, on_run=on_run)


def parameters_only(
    X: Tensor, Y: Tensor, rounds: int, *, others: bool = False, on_run: Callable[[str], None] = lambda _: None
) -> Table:
    """What a training step needs: the gradients of `w` and `b` alone."""
    w, b = _weights(X.shape[1])
    leaf_w, leaf_b = (each.clone().requires_grad_() for each in (w, b))

    def autograd() -> None:
        leaf_w.grad = leaf_b.grad = None
        article.forward(X, leaf_w, leaf_b, Y)[2].backward()  # type: ignore[no-untyped-call]

    def eager() -> None:
        te.backward(te.mse(te.relu(te.lin(X, w, b)), Y), wrt=(w, b))

    def program(backend: str) -> te.Program:
        with te.record() as tape:
            C = te.mse(te.relu(te.lin(X, w, b)), Y)
        made: te.Program = tape.program(inputs=(X, Y), outputs=C, wrt=(w, b), backend=backend)
        return made

    cases = [
        Case("torch.autograd, eager", autograd),
        Case("tape_engine, eager (te.lin, te.relu, te.mse)", eager),
        *replays(program, [X, Y]),
    ]
    if others:
        expected = torch.autograd.grad(_shifted(X, leaf_w, leaf_b, 0.0, 0.0, Y), (leaf_w, leaf_b))
        cases += by_torch_compile(lambda w, b: _shifted(X, w, b, 0.0, 0.0, Y), (w, b), expected, close=CLOSE)
        cases += by_jax(
            lambda w, b, X, Y: _shifted_by_numpy(X, w, b, 0.0, 0.0, Y), (w, b), expected, constants=(X, Y), close=CLOSE
        )
    cases.append(Case("one read of X", X.sum))
    title = "the same, with the gradients of w and b alone"
    return measure(title, cases, rounds, on_run=on_run)


def _shifted(X: Tensor, w: Tensor, b: Tensor, z: Any, u: Any, Y: Tensor) -> Tensor:
    """The article's loss in plain torch, with something added to `Z` and to `U`."""
    U: Tensor = torch.relu(X @ w + b + z) + u
    return (U.squeeze(-1) - Y).pow(2).mean()


def _shifted_by_numpy(X: Any, w: Any, b: Any, z: Any, u: Any, Y: Any) -> Any:
    """The same of arrays of JAX."""
    import jax

    return (((jax.nn.relu(X @ w + b + z) + u)[:, 0] - Y) ** 2).mean()


def _read(*tensors: Tensor) -> article.Gradients:
    return article.Gradients(*(tensor.g for tensor in tensors))  # type: ignore[attr-defined]


def _agree(ways: dict[str, Callable[[], Any]]) -> None:
    """Only ways to the same gradients are compared."""
    first, *others = ways.items()
    expected = first[1]()
    for name, way in others:
        for value, g, e in zip(expected._fields, way(), expected, strict=True):
            difference = largest_difference(g.detach(), e)
            if not difference <= CLOSE:
                raise AssertionError(f"{name}: {value}.g differs by {difference:.1e} from {first[0]}")
