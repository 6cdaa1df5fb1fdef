"""Numba compiles the kernels: their sources, with what they may use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .kernels import DRIVERS, KINDS, RUNNERS, parts_of, sources
from .scalars import scalars
from .tiles import dots, lines, tile

__all__ = ["build"]

#: What rounding the loops may change: sums in another order, never what becomes of NaN and infinity.
SUMS = {"reassoc", "contract", "nsz"}
PLAIN = {"contract"}

#: Tiles of a product: lines of the result, and registers of a line.
TILES = ((8, 1), (4, 2), (1, 4))


def build(names: list[str]) -> dict[str, tuple[str, str]]:
    """Compiles kernels; for each its machine-independent code (LLVM's, as text) and the name of its function in it."""
    import numba
    from numba import types

    space = _space()
    line = types.int64
    words = types.CPointer(types.int64)
    of_map = types.void(*[line] * 9)
    of_driver = types.void(words, words)
    of_runners = {"run": types.void(words, line, words, words, line, line)}
    found = {}
    for name in names:
        stem, kind, _ = parts_of(name)
        local = {**space, **_numbers(kind)}
        local.update(_inmost(stem, kind))
        exec(compile(sources(name), f"<kernel {name}>", "exec"), local)
        signature = of_driver if stem in DRIVERS else of_map
        if name in RUNNERS:
            signature = of_runners.get(name, types.void(words))
        sums = stem in ("sum", "product_lines", "product_dots")
        compiled = numba.cfunc(
            signature, nopython=True, forceinline=True, error_model="numpy", fastmath=SUMS if sums else PLAIN
        )
        made = compiled(local[name])
        found[name] = made.inspect_llvm(), made.native_name
    return found


def _inmost(stem: str, kind: str) -> dict[str, Any]:
    """The inmost parts of a product that a kernel calls."""
    width, ahead = 32 if kind == "f" else 64, stem.endswith("_ahead")
    if stem == "product_tiles":
        return {f"tile_{kind}_{rows}_{many}": tile(width, rows, many) for rows, many in TILES}
    if stem.startswith("product_dot_tiles"):
        return {f"dots_{kind}_{rows}": dots(width, rows, ahead=ahead and rows > 1) for rows in (8, 1)}
    if stem.startswith("product_line_tiles"):
        return {f"lines_{kind}_{rows}": lines(width, rows, ahead=ahead and rows > 1) for rows in (8, 1, 0)}
    return {}


_scalars: dict[str, dict[str, Any]] = {}


def _numbers(kind: str) -> dict[str, Any]:
    """The functions and constants that kernels of a kind use."""
    if kind not in ("f", "d"):
        return {}
    if kind not in _scalars:
        _scalars[kind] = scalars(32 if kind == "f" else 64)
    return _scalars[kind]


_shared: dict[str, Any] = {}


def _space() -> dict[str, Any]:
    """What every kernel may use: pointers, and calls through addresses."""
    if _shared:
        return _shared
    import math

    import numba
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    words = types.CPointer(types.int64)
    low_word, low_words = ir.IntType(64), ir.IntType(64).as_pointer()

    def pointer(kind: Any) -> Callable[..., Any]:
        def at(context: Any, address: Any) -> Any:
            def make(code: Any, builder: Any, signature: Any, args: Any) -> Any:
                return builder.inttoptr(args[0], code.get_value_type(signature.return_type))

            return types.CPointer(kind)(types.int64), make

        found: Callable[..., Any] = intrinsic(at)
        return found

    def call_map(
        context: Any, f: Any, n: Any, o: Any, so: Any, a: Any, sa: Any, b: Any, sb: Any, c: Any, sc: Any
    ) -> Any:
        def make(code: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [low_word] * 9)
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
            return code.get_dummy_value()

        return types.void(*[types.int64] * 10), make

    def call_run(context: Any, f: Any, w: Any, count: Any, regs: Any, steps: Any, many: Any, blocks: Any) -> Any:
        def make(code: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [low_words, low_word, low_words, low_words, low_word, low_word])
            given = [builder.inttoptr(x, t) if t is low_words else x for x, t in zip(args[1:], kind.args, strict=True)]
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)
            return code.get_dummy_value()

        return types.void(*[types.int64] * 7), make

    def call_part(context: Any, f: Any, w: Any) -> Any:
        def make(code: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [low_words])
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(args[1], low_words)])
            return code.get_dummy_value()

        return types.void(types.int64, types.int64), make

    def asked(context: Any, f: Any) -> Any:
        """What a C function without arguments says, an int."""

        def make(code: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.IntType(32), [])
            return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), low_word)

        return types.int64(types.int64), make

    def call_driver(context: Any, f: Any, w: Any, regs: Any) -> Any:
        def make(code: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [low_words, low_words])
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
            return code.get_dummy_value()

        return types.void(types.int64, words, words), make

    def stream(low: Any, lanes: int, kind: Any) -> Any:
        """Writes a number times a line of 64 bytes to where a line of the cache begins, past the cache."""

        def streamed(context: Any, to: Any, source: Any, x: Any) -> Any:
            def make(code: Any, builder: Any, signature: Any, args: Any) -> Any:
                vector = ir.VectorType(low, lanes)
                line = builder.load(builder.inttoptr(args[1], vector.as_pointer()), align=64 // lanes)
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
                first = builder.insert_element(ir.Constant(vector, ir.Undefined), args[2], ir.IntType(32)(0))
                spread = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)
                store = builder.store(
                    builder.fmul(line, spread), builder.inttoptr(args[0], vector.as_pointer()), align=64
                )
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
                return code.get_dummy_value()

            return types.void(types.int64, types.int64, kind), make

        found: Callable[..., Any] = intrinsic(streamed)
        return found

    def moved(context: Any, w: Any, by: Any) -> Any:
        def make(code: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.gep(args[0], [args[1]])

        return words(words, types.int64), make

    def lower(a: Any, b: Any) -> Any:
        return a if (a < b or a != a) else b

    def higher(a: Any, b: Any) -> Any:
        return a if (a > b or a != a) else b

    _shared.update({f"pointer_{kind}": pointer(getattr(types, name)) for kind, name in KINDS.items()})
    _shared.update({name: getattr(types, name) for name in KINDS.values()})
    _shared.update(
        stream_f=stream(ir.FloatType(), 16, types.float32), stream_d=stream(ir.DoubleType(), 8, types.float64)
    )
    calls = (call_map, call_driver, call_run, call_part, asked, moved)
    _shared.update({each.__name__: intrinsic(each) for each in calls}, math=math)
    _shared.update(lower=numba.njit(forceinline=True)(lower), higher=numba.njit(forceinline=True)(higher))
    return _shared
