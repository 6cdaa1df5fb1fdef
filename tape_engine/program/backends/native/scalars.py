"""The functions of one number that the kernels are written in, such that a loop over them fills vector registers.

Numba would call the C library for each element. These are short series instead, without branches: a loop over them
takes a tenth of the time. They are right to about two units in the last place, and treat infinities and NaN as
torch does.

- exp: x = k ln 2 + r, |r| ≤ ln(2)/2, and Taylor's series for exp(r) - 1.
- log: x = 2^k m, m from √½ to √2, and log m = 2 artanh((m - 1) / (m + 1)) by its series.
- tanh: expm1(2x) / (expm1(2x) + 2), which is exact near zero too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

__all__ = ["scalars"]

LN2 = Fraction("0.693147180559945309417232121458176568075500134360255254")


def scalars(width: int) -> dict[str, Any]:
    """The functions and constants for floating-point numbers of `width` bits, compiled into whatever calls them."""
    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    real, whole = (types.float32, types.int32) if width == 32 else (types.float64, types.int64)
    low = ir.FloatType() if width == 32 else ir.DoubleType()
    mantissa, bias = (23, 127) if width == 32 else (52, 1023)
    terms = 8 if width == 32 else 14
    steps = 5 if width == 32 else 11
    digits = 11 if width == 32 else 31
    shift, half_shift, offset = whole(mantissa), whole(1), whole(bias)
    magic = real(1.5 * 2**mantissa)  # adding and subtracting it rounds to a whole number
    per_ln2 = real(float(1 / LN2))
    # ln 2 in two parts, the first with so few digits that its multiples are exact
    high = Fraction(math.floor(LN2 * 2**digits), 2**digits)
    ln2_high, ln2_low = real(float(high)), real(float(LN2 - high))
    smallest = real(2.0 ** (1 - bias))
    lift, unlift = real(2.0**mantissa), whole(mantissa)
    zero, half, one, two = real(0.0), real(0.5), real(1.0), real(2.0)
    top = real(float((bias + 2) * LN2))  # exp is infinite from here on, and zero below its negative less the mantissa
    bottom = real(float(-(bias + mantissa + 2) * LN2))
    flat = real(float((mantissa + 4) * LN2 / 2))  # tanh is one from here on
    infinity, nothing = real(math.inf), real(math.nan)
    fraction_bits = whole((1 << mantissa) - 1)
    one_bits = whole(bias << mantissa)
    root2 = real(math.sqrt(2))
    third = real(1 / 3)

    def bitcast(there: Any, back: Any, kind: Any) -> Any:
        def cast(context: Any, x: Any) -> Any:
            def build(_: Any, builder: Any, signature: Any, args: Any) -> Any:
                return builder.bitcast(args[0], kind)

            return there(back), build

        return intrinsic(cast)

    bits = bitcast(whole, real, ir.IntType(width))
    number = bitcast(real, whole, low)

    def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
        found: Callable[..., Any] = numba.njit(forceinline=True, error_model="numpy", fastmath={"contract"})(function)
        return found

    def series(coefficients: list[float], name: str) -> Callable[..., Any]:
        """Horner's rule, written out."""
        body = f"real({coefficients[-1]!r})"
        for each in coefficients[-2::-1]:
            body = f"({body} * x + real({each!r}))"
        space: dict[str, Any] = {"real": real}
        exec(f"def {name}(x):\n    return {body}\n", space)
        return inlined(space[name])

    exp_rest = series([1 / math.factorial(n) for n in range(2, terms)], "exp_rest")  # (exp(x) - 1 - x) / x²
    artanh_rest = series([1 / (2 * n + 1) for n in range(1, steps + 1)], "artanh_rest")

    def expm1_scaled(x: Any) -> Any:  # x within the exponents of normal numbers
        k = (x * per_ln2 + magic) - magic
        r = (x - k * ln2_high) - k * ln2_low
        p = exp_rest(r) * r * r + r
        scale = number((whole(k) + offset) << shift)
        return p * scale + (scale - one)

    expm1_scaled = inlined(expm1_scaled)

    def exp(x: Any) -> Any:
        y = min(max(x, bottom), top)
        k = (y * per_ln2 + magic) - magic
        r = (y - k * ln2_high) - k * ln2_low
        p = exp_rest(r) * r * r + r + one
        i = whole(k)
        j = i >> half_shift  # in two steps, so that neither power leaves the normal numbers
        found = p * number((j + offset) << shift) * number((i - j + offset) << shift)
        return found if x == x else x

    exp = inlined(exp)

    def expm1(x: Any) -> Any:
        y = min(max(x, -lift), flat * two)
        small = expm1_scaled(max(y, -flat * two))
        large = exp(x) - one
        return (small if x < flat * two else large) if x == x else x

    expm1 = inlined(expm1)

    def tanh(x: Any) -> Any:
        a = min(abs(x), flat)
        e = expm1_scaled(a + a)
        return math.copysign(e / (e + two), x) if x == x else x

    tanh = inlined(tanh)

    def sigmoid(x: Any) -> Any:
        return one / (one + exp(-x))

    sigmoid = inlined(sigmoid)

    def log(x: Any) -> Any:
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

    log = inlined(log)

    def log1p(x: Any) -> Any:
        # log(u) (x / (u - 1)) with u = 1 + x rounded: the rounding of u cancels
        u = one + x
        d = u - one
        found = log(u) + (x - d) / u
        small = x * (one - x * (half - x * third))
        found = small if abs(x) < real(1e-4 if width == 32 else 1e-8) else found
        found = infinity if x == infinity else found
        return -infinity if x == -one else found

    log1p = inlined(log1p)
    return {
        "exp": exp, "expm1": expm1, "tanh": tanh, "sigmoid": sigmoid, "log": log, "log1p": log1p,
        "real": real, "zero": zero, "one": one, "half": half, "two": two,
    }  # fmt: skip
