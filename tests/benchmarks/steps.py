"""What recording and sweeping cost beside the arithmetic: tiny operations, and steps of a small network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import tape_engine as te

from .others import by_jax, by_torch_compile
from .replay import replays
from .timing import Case, Table, measure

__all__ = ["chain", "perceptron"]

Tensor = torch.Tensor


# torch's own functions under names of their own, so that each call is one node of the global tape
@te.op
def times(x: Tensor, w: Tensor) -> Tensor:
    return x * w


@times.rule
def times_grad(g: Tensor, out: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return g * w, g * x


@te.op
def tanh(x: Tensor) -> Tensor:
    return x.tanh()


@tanh.rule
def tanh_grad(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return g * (1 - out * out)


def chain(length: int, rounds: int, *, on_run: Callable[[str], None] = lambda _: None) -> Table:
    """`length` times ``x = tanh(x * w)`` on 8 x 8 elements, then back to `x` and `w`: seconds an operation."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)
    leaves = [each.clone().requires_grad_() for each in (x, w)]

    def plain(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(length):
            x = torch.tanh(x * w)
        return x.sum()

    def autograd() -> None:
        torch.autograd.grad(plain(*leaves), leaves)

    def named() -> None:
        y = x
        for _ in range(length):
            y = tanh(times(y, w))
        te.backward(y, torch.ones_like(y), wrt=(x, w))

    def recorded() -> None:
        with te.record():
            C = plain(x, w)
        te.backward(C, wrt=(x, w))

    def spread() -> None:
        te.backward(plain(times(x, w), w), wrt=(x, w))

    frozen = x.clone(), w.clone()  # of its own: a tape goes on listening to its leaves
    with te.record() as tape:
        C = plain(*frozen)

    def program(backend: str) -> te.Program:
        made: te.Program = tape.program(inputs=(frozen[0],), outputs=C, wrt=frozen, backend=backend)
        return made

    units = 2 * length + 1
    cases = [
        Case("torch.autograd, eager", autograd, units=units),
        Case("tape_engine, named operations on the global tape", named, units=units),
        Case("tape_engine, te.record() over plain torch", recorded, units=units),
        Case("tape_engine, plain torch on the global tape", spread, units=units),
        *replays(program, [x], number=5, units=units),
    ]
    title = f"{length} times x = tanh(x * w) on 8 x 8, forward and back, for each operation"
    return measure(title, cases, rounds, unit="operation", on_run=on_run)


def perceptron(
    batch: int, rounds: int, *, others: bool = False, on_run: Callable[[str], None] = lambda _: None
) -> Table:
    """A step of a network of 784, 50 and 10 features, forward and back to its parameters."""
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(batch, 784, generator=generator)
    Y = torch.rand(batch, 10, generator=generator)
    W1, b1 = torch.randn(784, 50, generator=generator) / 28, torch.zeros(50)
    W2, b2 = torch.randn(50, 10, generator=generator) / 7, torch.zeros(10)
    parameters = (W1, b1, W2, b2)
    leaves = [each.clone().requires_grad_() for each in parameters]

    def plain(W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
        return ((X @ W1 + b1).relu() @ W2 + b2 - Y).pow(2).mean()

    def autograd() -> None:
        for leaf in leaves:
            leaf.grad = None
        plain(*leaves).backward()  # type: ignore[no-untyped-call]

    def named() -> Tensor:
        C: Tensor = te.mse(te.lin(te.relu(te.lin(X, W1, b1)), W2, b2), Y)
        return C

    def eager() -> None:
        te.backward(named(), wrt=parameters)

    def recorded() -> None:
        with te.record():
            C = plain(*parameters)
        te.backward(C, wrt=parameters)

    def program(backend: str) -> te.Program:
        with te.record() as tape:  # while it lives, operations on X and Y are recorded: eager torch's too
            C = named()
        made: te.Program = tape.program(inputs=(X, Y), outputs=C, wrt=parameters, backend=backend)
        return made

    number = 10 if batch <= 64 else 2
    cases = [
        Case("torch.autograd, eager", autograd, number=number),
        Case("tape_engine, eager (te.lin, te.relu, te.mse)", eager, number=number),
        Case("tape_engine, te.record() over plain torch", recorded, number=number),
        *replays(program, [X, Y], number=number),
        *(_perceptron_by_others(X, Y, parameters, plain, number) if others else ()),
    ]
    return measure(f"a step of a 784-50-10 network, batch {batch}", cases, rounds, on_run=on_run)


def _perceptron_by_others(
    X: Tensor, Y: Tensor, parameters: Sequence[Tensor], plain: Callable[..., Tensor], number: int
) -> list[Case]:
    leaves = [each.clone().requires_grad_() for each in parameters]
    expected = torch.autograd.grad(plain(*leaves), leaves)

    def by_numpy(W1: Any, b1: Any, W2: Any, b2: Any, X: Any, Y: Any) -> Any:
        import jax

        hidden = jax.nn.relu(X @ W1 + b1)
        return ((hidden @ W2 + b2 - Y) ** 2).mean()

    return [
        *by_torch_compile(plain, parameters, expected, number=number),
        *by_jax(by_numpy, parameters, expected, constants=(X, Y), number=number),
    ]
