"""The kernels: what a program's instructions call, each a loop in plain Python, which is translated for LLVM.

A *map* works on `n` elements of up to four operands, the first of which is its result; each operand has an
address and the distance from one element to the next, and for every combination of those there is a map of its own.
A *driver* reads an instruction: it finds the operands' addresses, and calls a map for each line of elements, or does
the work itself (products, rows picked by indices).

An instruction is a row of 64-bit words::

    driver, how many words, the driver's own ...

and an operand in it a register (the address of a tensor, or of memory of the program's own) with an offset in
bytes. So the same words serve whatever tensors a replay is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from .drivers import DRIVERS

__all__ = ["KINDS", "MAPS", "parts_of", "sources"]

#: Letters for the dtypes that kernels know, with the names of their types; a bool is a byte, nought or one.
SIZES = {"f": "4", "d": "8", "l": "8", "b": "1"}
LANES = {"f": "16", "d": "8", "l": "8", "b": "64"}  # elements in 64 bytes
KINDS = {"f": "float32", "d": "float64", "l": "int64", "b": "uint8"}


@dataclass(frozen=True)
class Map:
    """A map: the expression of an element, of operands `a`, `b`, `c` of one kind each.

    Attributes:
        text: the expression; `o` is what the result holds already.
        operands: how many it reads.
        masks: which of them are bytes, whatever the others are.
        result: the kind of its result, if not that of its operands.
        gathers: whether it adds to what is there: over a line with one result, it runs up a total.
    """

    text: str
    operands: int
    masks: str = ""
    result: str = ""
    gathers: bool = False


UNARY = {
    "copy": "a", "neg": "-a", "square": "a * a", "cube": "a * a * a", "exp": "exp(a)", "expm1": "expm1(a)",
    "log": "log(a)", "log1p": "log1p(a)", "tanh": "tanh(a)", "sigmoid": "sigmoid(a)", "sqrt": "sqrt(a)",
    "rsqrt": "one / sqrt(a)", "reciprocal": "one / a", "sin": "sin(a)", "cos": "cos(a)",
    "abs": "abs(a)", "erf": "erf(a)",
    "sign": "one if a > zero else (-one if a < zero else zero)",
    "relu": "zero if a < zero else a", "silu": "a * sigmoid(a)", "atan": "atan(a)", "tan": "tan(a)",
    "relu_whole": "a if a > 0 else 0",
}  # fmt: skip

BINARY = {
    "add": "a + b", "sub": "a - b", "mul": "a * b", "div": "a / b", "pow": "pow(a, b)",
    "atan2": "atan2(a, b)",
    "maximum": "a if (a > b or a != a) else b", "minimum": "a if (a < b or a != a) else b",
    "tanh_backward": "a * (one - b * b)", "sigmoid_backward": "a * ((one - b) * b)",
    "and": "a & b", "or": "a | b", "xor": "a ^ b",
    "silu_backward": "a * sigmoid(b) * (one + b * (one - sigmoid(b)))",
}  # fmt: skip

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

TERNARY = {
    "threshold_backward": "zero if b <= c else a",
    "clamp": "lower(higher(a, b), c)",
    "add_scaled": "a + b * c",  # rounded once, as torch does it: a product that would overflow alone need not
}

MAPS: dict[str, Map] = {
    **{name: Map(text, 1) for name, text in UNARY.items()},
    **{name: Map(text, 2) for name, text in BINARY.items()},
    **{name: Map(f"1 if a {sign} b else 0", 2, result="b") for name, sign in COMPARISONS.items()},
    **{name: Map(text, 3) for name, text in TERNARY.items()},
    "where": Map("b if a != 0 else c", 3, masks="a"),
    "masked_fill": Map("c if b != 0 else a", 3, masks="b"),
    "not": Map("1 if a == 0 else 0", 1, result="b"),
    "isnan": Map("1 if a != a else 0", 1, result="b"),
    "softplus": Map("a if a * b > c else log1p(exp(a * b)) / b", 3),
    "softplus_backward": Map("a if b > c else a * (exp(b) / (exp(b) + one))", 3),
    "sum": Map("o + a", 1, gathers=True),
    "largest": Map("a if (a > o or a != a) else o", 1, gathers=True),
    "smallest": Map("a if (a < o or a != a) else o", 1, gathers=True),
    **{f"to_{kind}": Map("1 if a != 0 else 0" if kind == "b" else "a", 1, result=kind) for kind in KINDS},
}


def map_source(name: str, kind: str, pattern: str) -> str:
    """The source of a map for operands of a kind.

    The pattern tells the distances of the result and the operands, a letter each: ``0`` where all is one element, ``1``
    where elements follow each other, ``s`` for any other. So the loop is one that the compiler knows all about.
    """
    each = MAPS[name]
    letters = "abc"[: each.operands]
    steps = dict(zip("o" + letters, pattern, strict=True))
    places = {x: {"0": "0", "1": "i", "s": f"i * s{x}"}[step] for x, step in steps.items()}
    total = each.gathers and steps["o"] == "0"
    fixed = [f"{x} = p{x}[0]" for x in letters if steps[x] == "0"]
    inside = [f"{x} = p{x}[{places[x]}]" for x in letters if steps[x] != "0"]
    if total:
        fixed.append("o = p[0]")
        inside.append(f"o = {each.text}")
    else:
        inside += [f"o = p[{places['o']}]"] if each.gathers else []
        inside.append(f"p[{places['o']}] = {KINDS[each.result or kind]}({each.text})")
    lines = [
        f"def {name}_{kind}_{pattern}(n, o_, so, a_, sa, b_, sb, c_, sc):",
        f"    p = pointer_{each.result or kind}(o_)",
        *(f"    p{x} = pointer_{'b' if x in each.masks else kind}({x}_)" for x in letters),
        *(f"    {line}" for line in fixed),
        "    for i in range(n):",
        *(f"        {line}" for line in inside),
        *(["    p[0] = o"] if total else []),
    ]
    return "\n".join(lines) + "\n"


def parts_of(name: str) -> tuple[str, str, str]:
    """The parts of a kernel's name: ``add_f_110`` is a map, its kind and pattern, ``take_f`` a driver and its kind."""
    if name in DRIVERS:
        return name, "", ""
    stem, _, kind = name.rpartition("_")
    if stem in DRIVERS:
        return stem, kind, ""
    stem, _, pattern = name.rpartition("_")
    stem, _, kind = stem.rpartition("_")
    return stem, kind, pattern


def sources(name: str) -> str:
    """The source of the kernel of that name."""
    stem, kind, pattern = parts_of(name)
    if stem not in DRIVERS:
        return map_source(stem, kind, pattern)
    if not kind:
        return DRIVERS[stem]
    return DRIVERS[stem].replace("_K", f"_{kind}").replace("SIZE", SIZES[kind]).replace("LANES", LANES[kind])
