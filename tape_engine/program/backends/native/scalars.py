"""The functions of one number that the kernels are written in, such that a loop over them fills vector registers.

A call of the C library for each element would take ten times as long. These are short series instead, without
branches. They are right to about two units in the last place, and treat infinities and NaN as torch does.

- exp: x = k ln 2 + r, |r| ≤ ln(2)/2, and Taylor's series for exp(r) - 1.
- log: x = 2^k m, m from √½ to √2, and log m = 2 artanh((m - 1) / (m + 1)) by its series.
- tanh: expm1(2x) / (expm1(2x) + 2), which is exact near zero too.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

__all__ = ["scalars"]

LN2 = Fraction("0.693147180559945309417232121458176568075500134360255254")

#: The functions that LLVM knows, by its names, and those of the C library, whose names for a float end in f.
OF_LLVM = {name: name for name in ("sqrt", "sin", "cos", "pow", "copysign")} | {"abs": "fabs"}
OF_C = ("tan", "atan", "atan2", "erf")

#: `real` and `whole` are the types of a number and of a whole one of as many bits; `bits` and `number` take the one
#: for the other, bit by bit.
SOURCE = """
def expm1_scaled(x):  # x within the exponents of normal numbers
    k = (x * per_ln2 + magic) - magic
    r = (x - k * ln2_high) - k * ln2_low
    p = exp_rest(r) * r * r + r
    scale = number((whole(k) + offset) << shift)
    return p * scale + (scale - one)

def exp(x):
    y = min(max(x, bottom), top)
    k = (y * per_ln2 + magic) - magic
    r = (y - k * ln2_high) - k * ln2_low
    p = exp_rest(r) * r * r + r + one
    i = whole(k)
    j = i >> half_shift  # in two steps, so that neither power leaves the normal numbers
    found = p * number((j + offset) << shift) * number((i - j + offset) << shift)
    return found if x == x else x

def expm1(x):
    y = min(max(x, -lift), flat * two)
    small = expm1_scaled(max(y, -flat * two))
    large = exp(x) - one
    return copysign(small if x < flat * two else large, x) if x == x else x  # of -0.0 too

def tanh(x):
    a = min(abs(x), flat)
    e = expm1_scaled(a + a)
    return copysign(e / (e + two), x) if x == x else x

def sigmoid(x):
    return one / (one + exp(-x))

def log(x):
    tiny = x < smallest
    y = x * lift if tiny else x
    i = bits(y)
    k = (i >> shift) - offset - (unlift if tiny else whole(0))
    m = number((i & fraction_bits) | one_bits)
    above = m > root2
    m = m * half if above else m
    k = k + whole(1) if above else k
    s = (m - one) / (m + one)
    z = s * s
    e = real(k)
    found = e * ln2_high + (e * ln2_low + two * s * z * artanh_rest(z) + two * s)
    found = infinity if x == infinity else found
    found = -infinity if x == zero else found
    return found if x >= zero else nothing

def log1p(x):
    # log(u) (x / (u - 1)) with u = 1 + x rounded: the rounding of u cancels
    u = one + x
    d = u - one
    found = log(u) + (x - d) / u
    small = x * (one - x * (half - x * third))
    found = small if abs(x) < near else found
    found = infinity if x == infinity else found
    return -infinity if x == -one else found
"""


def scalars(width: int) -> dict[str, Any]:
    """The functions and constants for floating-point numbers of `width` bits, which become part of what calls them."""
    from .translator import DOUBLE, FLOAT, HALF_WORD, WORD, Emitted, functions

    real, whole = (FLOAT, HALF_WORD) if width == 32 else (DOUBLE, WORD)
    mantissa, bias = (23, 127) if width == 32 else (52, 1023)
    digits = 11 if width == 32 else 31
    # ln 2 in two parts, the first with so few digits that its multiples are exact
    high = Fraction(math.floor(LN2 * 2**digits), 2**digits)
    reals = {
        "zero": 0.0, "half": 0.5, "one": 1.0, "two": 2.0, "third": 1 / 3, "root2": math.sqrt(2),
        "magic": 1.5 * 2**mantissa,  # adding and subtracting it rounds to a whole number
        "per_ln2": float(1 / LN2), "ln2_high": float(high), "ln2_low": float(LN2 - high),
        "smallest": 2.0 ** (1 - bias), "lift": 2.0**mantissa,
        # exp is infinite from the top on, and zero below its negative less the mantissa
        "top": float((bias + 2) * LN2), "bottom": float(-(bias + mantissa + 2) * LN2),
        "flat": float((mantissa + 4) * LN2 / 2),  # tanh is one from here on
        "near": 1e-4 if width == 32 else 1e-8,  # log1p is its series up to here
        "infinity": math.inf, "nothing": math.nan,
    }  # fmt: skip
    wholes = {
        "shift": mantissa, "half_shift": 1, "offset": bias, "unlift": mantissa,
        "fraction_bits": (1 << mantissa) - 1, "one_bits": bias << mantissa,
    }  # fmt: skip
    terms, steps = (8, 5) if width == 32 else (14, 11)
    series = [
        _series("exp_rest", [1 / math.factorial(n) for n in range(2, terms)]),  # (exp(x) - 1 - x) / x²
        _series("artanh_rest", [1 / (2 * n + 1) for n in range(1, steps + 1)]),
    ]
    return {
        **functions("".join([*series, SOURCE])),
        **{name: real(each) for name, each in reals.items()},
        **{name: whole(each) for name, each in wholes.items()},
        "real": real, "whole": whole,
        "bits": Emitted(lambda builder, x: builder.bitcast(x, whole)),
        "number": Emitted(lambda builder, x: builder.bitcast(x, real)),
        **{name: Emitted(_called(f"llvm.{known}.f{width}", real)) for name, known in OF_LLVM.items()},
        **{name: Emitted(_called(name if width == 64 else f"{name}f", real)) for name in OF_C},
    }  # fmt: skip


def _series(name: str, coefficients: list[float]) -> str:
    """The source of Horner's rule, written out."""
    body = f"real({coefficients[-1]!r})"
    for each in coefficients[-2::-1]:
        body = f"({body} * x + real({each!r}))"
    return f"def {name}(x):\n    return {body}\n"


def _called(symbol: str, kind: Any) -> Any:
    """A function of numbers of a kind, of LLVM's or of the C library."""
    from llvmlite import ir

    def emitted(builder: Any, *given: Any) -> Any:
        known = builder.module.globals.get(symbol)
        if known is None:
            known = ir.Function(builder.module, ir.FunctionType(kind, [kind] * len(given)), symbol)
        return builder.call(known, given)

    return emitted
