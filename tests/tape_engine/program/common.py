"""What the tests of replay share: recording and freezing in one line, and references from torch.autograd."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch._ops import OpOverload

import tape_engine as te
from tests.helpers import Overloads, agree, close, each_tensor, g_of, plain, reference

Tensor = torch.Tensor
F32, F64, C128 = torch.float32, torch.float64, torch.complex128


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Normal numbers from torch's generator."""
    return torch.randn(shape, dtype=dtype)


def freeze(
    function: Callable[..., Any], inputs: Sequence[Tensor], params: Sequence[Tensor] = (), **options: Any
) -> te.Program:
    """The program of ``function(*inputs, *params)``, in which `params` are live."""
    with te.record() as tape:
        outputs = function(*inputs, *params)
    program: te.Program = tape.program(inputs=tuple(inputs), outputs=outputs, **options)
    return program


def follows(
    program: te.Program,
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    params: Sequence[Tensor] = (),
    *,
    seed: Tensor | None = None,
    tol: float = 1e-10,
) -> None:
    """Asserts that a replay on `inputs` gives, forward and in every ``.g``, what torch.autograd gives on these values.

    The function must not draw random numbers or write to its arguments.
    """
    with torch.no_grad():
        wanted = each_tensor(function(*map(plain, inputs), *map(plain, params)))
    for got in (program(*inputs), program.step(*inputs, seed=seed)):
        made = each_tensor(got)
        assert len(made) == len(wanted)
        for t, w in zip(made, wanted, strict=True):
            close(t, w, tol)

    def weighted(*tensors: Tensor) -> Tensor:
        out = each_tensor(function(*tensors))[0]
        weight = torch.ones_like(out) if seed is None else seed.to(out.dtype)
        total = (weight.conj() * out).sum()
        return total.real if total.is_complex() else total  # type: ignore[no-any-return]

    agree([*inputs, *params], reference(weighted, *inputs, *params), tol)


def snapshot(*tensors: Tensor) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """What an error must leave as it was: contents, and ``.g`` itself with its contents."""
    found = []
    for t in tensors:
        g = g_of(t)
        found.append((plain(t), g, None if g is None else plain(g)))
    return found


def unchanged(before: list[tuple[Tensor, Tensor | None, Tensor | None]], *tensors: Tensor) -> None:
    """Asserts that the tensors and their ``.g`` are as in `before`."""
    for (contents, g, of_g), t in zip(before, tensors, strict=True):
        assert torch.equal(plain(t), contents), "a tensor has changed"
        assert g_of(t) is g, "a .g was replaced"
        if g is not None and of_g is not None:
            assert torch.equal(plain(g), of_g), "a .g has changed"


@contextmanager
def counted(part: str = "tape_engine") -> Iterator[list[int]]:
    """Counts the lines of Python that run in files under `part` (a measure of work that knows no clock)."""
    count = [0]

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            count[0] += 1
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if part in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield count
    finally:
        sys.settrace(before)


class Spy(Overloads):  # type: ignore[no-untyped-call]
    """Notes every ATen overload that runs inside it."""

    @property
    def names(self) -> list[str]:
        """The names of what ran, without overloads and views."""
        return [each._schema.name.removeprefix("aten::") for each in self.heard if not is_view(each)]


def is_view(overload: OpOverload) -> bool:
    """Whether an overload computes nothing: its result looks into an argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in overload._schema.returns)


def out_kernel(overload: OpOverload) -> OpOverload | None:
    """The overload that computes the same into given memory, where torch has more than a copy for it."""
    if any(a.is_out for a in overload._schema.arguments):
        return None
    wanted = [(a.name, str(a.type)) for a in overload._schema.arguments]
    for name in overload.overloadpacket.overloads():
        found: OpOverload = getattr(overload.overloadpacket, name)
        arguments = found._schema.arguments
        if torch.Tag.generated in found.tags or not any(a.is_out for a in arguments):
            continue
        if [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return found
    return None


def ran(call: Callable[[], Any]) -> Spy:
    """What a call runs, once what it makes at its first run is there."""
    call()
    with Spy() as spy:
        call()
    return spy  # type: ignore[no-any-return]
