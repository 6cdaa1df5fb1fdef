"""LLVM compiles the kernels: their sources, with what they may use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .drivers import DRIVERS, RUNNERS
from .kernels import KINDS, parts_of, sources
from .scalars import scalars
from .tiles import dots, lines, packed, panel, tile, twelve

__all__ = ["build"]

#: What rounding the loops may change: sums in another order, never what becomes of NaN and infinity.
SUMS = ("reassoc", "contract", "nsz")
PLAIN = ("contract",)

#: Tiles of a product: lines of the result, and registers of a line.
TILES = ((8, 1), (4, 2), (1, 4))
PANELS = ((12, 2), (12, 1), (4, 2), (1, 2))


def build(name: str, symbol: str, machine: Any) -> Any:
    """A module of LLVM's with a kernel in it, ready for machine code.

    Args:
        name: the kernel's.
        symbol: what its function is called in the module.
        machine: LLVM's record of the processor.
    """
    import llvmlite.binding as llvm

    from .translator import WORD, Emitted, functions, translated

    stem, kind, _ = parts_of(name)
    words = WORD.as_pointer()
    types = [words, words] if stem in DRIVERS else [WORD] * 9
    if stem in RUNNERS:
        types = [words, WORD, words, words, WORD, WORD] if name == "run" else [words]
    flags = SUMS if stem in ("sum", "product_lines", "product_dots") else PLAIN
    apart = "C" if stem in ("product_lines", "product_dots", "product_past") else ""  # the result of a product
    (function,) = functions(sources(name)).values()
    names = {**_names(kind), **{name: Emitted(each) for name, each in _inmost(stem, kind).items()}}
    made = translated(function, types, names, symbol=symbol, flags=flags, inner=PLAIN, apart=apart)
    module = llvm.parse_assembly(str(made))
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization, tuning.slp_vectorization = True, False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return module


def _inmost(stem: str, kind: str) -> dict[str, Any]:
    """The inmost parts of a product that a kernel calls."""
    width, ahead = 32 if kind == "f" else 64, stem.endswith("_ahead")
    if stem == "product_tiles":
        return {f"tile_{kind}_{rows}_{many}": tile(width, rows, many) for rows, many in TILES}
    if stem in ("product_large", "recurrence"):
        tiles = {f"panel_{kind}_{rows}_{many}": panel(width, rows, many) for rows, many in PANELS}
        return {f"packed_{kind}": packed(width), f"twelve_{kind}": twelve(width), **tiles}
    if stem.startswith("product_dot_tiles"):
        return {f"dots_{kind}_{rows}": dots(width, rows, ahead=ahead and rows > 1) for rows in (8, 1)}
    if stem.startswith("product_line_tiles"):
        return {f"lines_{kind}_{rows}": lines(width, rows, ahead=ahead and rows > 1) for rows in (8, 1, 0)}
    return {}


@functools.cache
def _names(kind: str) -> dict[str, Any]:
    """What kernels of a kind may use: types, pointers, calls through addresses, functions and constants."""
    from .translator import BYTE, DOUBLE, FLOAT, WORD, Emitted, functions

    types = dict(zip(KINDS, (FLOAT, DOUBLE, WORD, BYTE), strict=True))
    found: dict[str, Any] = {KINDS[letter]: each for letter, each in types.items()}
    found.update({f"pointer_{letter}": Emitted(_pointer(each)) for letter, each in types.items()})
    found.update({each.__name__: Emitted(each) for each in (asked, moved)}, min="<", max=">")
    found.update({name: Emitted(functools.partial(_call, words=words)) for name, words in CALLS.items()})
    if kind in ("f", "d"):
        width = 32 if kind == "f" else 64
        found.update(scalars(width))
        found[f"stream_{kind}"] = Emitted(functools.partial(stream, types[kind], 512 // width))
    return {**found, **functions(CHOICES)}


#: Calls through addresses, and which of their arguments are addresses of words.
CALLS: dict[str, tuple[int, ...]] = {"call_map": (), "call_driver": (), "call_run": (0, 2, 3), "call_part": (0,)}

CHOICES = """
def lower(a, b):
    return a if (a < b or a != a) else b

def higher(a, b):
    return a if (a > b or a != a) else b

def moment(first, second, step, t):
    return first if t == 0 else second + (t - 1) * step
"""


# -- what is no arithmetic: functions of LLVM's builder and the arguments ------------------------------------


def _pointer(kind: Any) -> Callable[..., Any]:
    return lambda builder, address: builder.inttoptr(address, kind.as_pointer())


def _call(builder: Any, address: Any, *given: Any, words: tuple[int, ...] = (), result: Any = None) -> Any:
    """Calls a function through its address; `words` are those of its arguments that point to words."""
    from llvmlite import ir

    there = ir.IntType(64).as_pointer()
    given = tuple(builder.inttoptr(x, there) if i in words else x for i, x in enumerate(given))
    kind = ir.FunctionType(result or ir.VoidType(), [x.type for x in given])
    return builder.call(builder.inttoptr(address, kind.as_pointer()), given)


def asked(builder: Any, function: Any) -> Any:
    """What a C function without arguments says, an int."""
    from llvmlite import ir

    return builder.sext(_call(builder, function, result=ir.IntType(32)), ir.IntType(64))


def stream(low: Any, lanes: int, builder: Any, to: Any, source: Any, x: Any) -> None:
    """Writes a number times a line of 64 bytes to where a line of the cache begins, past the cache."""
    from llvmlite import ir

    vector = ir.VectorType(low, lanes)
    line = builder.load(builder.inttoptr(source, vector.as_pointer()), align=64 // lanes)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.IntType(32)(0))
    spread = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)
    store = builder.store(builder.fmul(line, spread), builder.inttoptr(to, vector.as_pointer()), align=64)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


def moved(builder: Any, w: Any, by: Any) -> Any:
    """A pointer moved on by so many words."""
    return builder.gep(w, [by])
