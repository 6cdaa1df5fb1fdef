"""Kernels' sources, translated and run: against Python, which runs the same text."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import pytest

pytest.importorskip("llvmlite")

WHOLE = (-7, -1, 0, 1, 2, 5, 300)
REAL = (-2.5, -0.0, 0.0, 0.25, 1.0, 3.0, math.inf, -math.inf, math.nan)


@functools.cache
def translated(source: str) -> tuple[Any, Any]:
    """The machine code of a function of words (and the engine that holds it): given whole and real numbers, results."""
    import llvmlite.binding as llvm

    from tape_engine.program.backends.native import builder, translator

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    (function,) = translator.functions(source).values()
    types = [translator.WORD.as_pointer(), translator.DOUBLE.as_pointer()] * 2
    made = translator.translated(function, types, builder._names("d"), symbol="tried", flags=())
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(made)), machine)
    engine.finalize_object()
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)(engine.get_function_address("tried")), engine


def both(body: str, whole: tuple[int, ...], real: tuple[float, ...]) -> tuple[list[Any], list[Any]]:
    """What a body leaves in `I` and `R`, by Python and by machine code."""
    source = "def tried(i, r, I, R):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    space: dict[str, Any] = {"int64": int, "float64": float}
    exec(source, space)
    python: list[Any] = [[0] * 8, [0.0] * 8]
    space["tried"]([*whole], [*real], *python)
    kernel, _engine = translated(source)
    given = (ctypes.c_int64 * len(whole))(*whole), (ctypes.c_double * len(real))(*real)
    found = (ctypes.c_int64 * 8)(), (ctypes.c_double * 8)()
    kernel(*[ctypes.addressof(each) for each in (*given, *found)])
    return [*python[0], *(repr(float(x)) for x in python[1])], [*found[0], *map(repr, found[1])]


BODIES = {
    "arithmetic": ("I[0] = i[0] + i[1] * 3 - -i[0]\nI[1] = i[0] // 4\nR[0] = r[0] * r[1] - r[0] / 4.0\nR[1] = -r[1]"),
    "bits": "I[0] = (i[0] & 63) | (i[1] << 2)\nI[1] = i[0] >> 1\nI[2] = i[0] ^ i[1]",
    "comparisons": (
        "I[0] = 1 if i[0] < i[1] else 0\nI[1] = 1 if r[0] <= r[1] else 0\nI[2] = 1 if r[0] != r[1] else 0\n"
        "I[3] = 1 if (r[0] > r[1] or r[0] == r[1]) else 0\nI[4] = 1 if (i[0] >= 0 and r[0] != 0) else 0"
    ),
    "two types": "R[0] = i[0] * r[0]\nR[1] = float64(i[1])\nR[2] = r[1] + 1\nR[3] = 2 if i[0] > 0 else r[0]",
    "smaller and larger": "I[0] = min(i[0], i[1])\nI[1] = max(i[0], 4)",
    "loops": (
        "n = 0\nfor k in range(5):\n    n += k * i[0]\n    for l in range(k, 4):\n        n += l\nI[0] = n\n"
        "k = 0\nwhile k < 6 and k != 4:\n    I[1] += k\n    k += 1\nI[2] = k\n"
        "for k in range(i[0], i[0]):\n    I[3] = 1"
    ),
    "branches": (
        "if i[0] < 0:\n    I[0] = 1\n    if i[1] < 0:\n        return\n"
        "elif i[0] == 0:\n    I[0] = 2\nelse:\n    I[0] = 3\n"
        "I[1] = 4"
    ),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_it_does_what_python_does(body: str) -> None:
    for a in WHOLE:
        for b in WHOLE[:4]:
            for x in (-2.5, 0.25):
                python, kernel = both(body, (a, b), (x, -x * a))
                assert python == kernel, (a, b, x)


def test_comparisons_of_what_is_no_number() -> None:
    for x in REAL:
        for y in REAL:
            python, kernel = both(BODIES["comparisons"], (1, 2), (x, y))
            assert python == kernel, (x, y)


@pytest.mark.parametrize(
    "body",
    [
        "I[0] = i[0] % 2", "I[0] = i[0] // 3", "I[0] = unheard(i[0])", "x, y = 1, 2",
        "for x in i:\n    I[0] = x", "I[0] = not i[0]", "return 1", "raise ValueError", "I[0] = 'a'", "i.x = 1",
    ],
)  # fmt: skip
def test_what_there_is_none_of_is_refused(body: str) -> None:
    with pytest.raises(NotImplementedError, match="a kernel cannot have this: "):
        translated("def tried(i, r, I, R):\n" + "".join(f"    {line}\n" for line in body.splitlines()))
