"""The same computations by others: torch.compile, where a C++ compiler is there, and JAX, where it is installed.

JAX computes on threads of its own, which sleep between its calls; every one of its runs is waited for.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tape_engine.program.backends import inductor

from .timing import Case

__all__ = ["JAX", "TORCH_COMPILE", "by_jax", "by_torch_compile", "compiler", "has_compiler", "has_jax", "numbers"]

Tensor = torch.Tensor

TORCH_COMPILE, JAX = "torch.compile", "JAX, jit"


def has_compiler() -> bool:
    """Whether torch.compile has what it needs."""
    return inductor.missing(torch.device("cpu")) is None


def compiler() -> str | None:
    """What C++ compiler torch.compile uses, and its version; ``None`` where there is none."""
    if not has_compiler():
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    told = subprocess.run([get_cpp_compiler(), "--version"], capture_output=True, text=True)
    return told.stdout.partition("\n")[0] or None


def has_jax() -> bool:
    """Whether JAX is installed."""
    return importlib.util.find_spec("jax") is not None


def by_torch_compile(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], expected: Sequence[Tensor], *,
    number: int = 1, units: int = 1, close: float = 1e-3,
) -> list[Case]:  # fmt: skip
    """The gradients of a compiled function at `leaves`; no case where that cannot be compiled.

    Raises:
        AssertionError: if they are not the `expected` ones, relative to the largest of each.
    """
    if not has_compiler():
        return []
    leaves = [each.detach().clone().requires_grad_() for each in leaves]
    compiled: Any = torch.compile(function, dynamic=False)

    def run() -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.autograd.grad(compiled(*leaves), leaves)
        return found

    _agree(TORCH_COMPILE, run(), expected, close)
    return [Case(TORCH_COMPILE, run, number=number, units=units)]


def by_jax(
    function: Callable[..., Any], leaves: Sequence[Tensor], expected: Sequence[Tensor], *,
    constants: Sequence[Tensor] = (), number: int = 1, units: int = 1, close: float = 1e-3,
) -> list[Case]:  # fmt: skip
    """The value of ``function(*leaves, *constants)`` and its gradients at `leaves`; no case without JAX.

    `function` is one of ``jax.numpy``; arrays have the dtypes of the tensors.
    """
    if not has_jax():
        return []
    import jax

    given = [numbers(each) for each in (*leaves, *constants)]
    step = jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(leaves)))))

    def run() -> Any:
        return jax.block_until_ready(step(*given))

    _agree(JAX, [torch.from_numpy(_writable(g)) for g in run()[1]], expected, close)
    return [Case(JAX, run, number=number, units=units)]


def numbers(tensor: Tensor) -> Any:
    """A tensor as an array of JAX, of the same dtype."""
    import jax

    jax.config.update("jax_enable_x64", True)  # else float64 is made float32
    return jax.numpy.asarray(tensor.detach().numpy())


def _writable(array: Any) -> Any:
    import numpy

    return numpy.array(array)


def _agree(name: str, found: Sequence[Tensor], expected: Sequence[Tensor], close: float) -> None:
    """Only ways to the same gradients are compared."""
    for g, e in zip(found, expected, strict=True):
        scale = max(1e-12, float(e.abs().max()))
        if g.dtype != e.dtype or not float((g - e).abs().max()) <= close * scale:
            raise AssertionError(f"{name}: {g.dtype} gradients that differ from torch's")
