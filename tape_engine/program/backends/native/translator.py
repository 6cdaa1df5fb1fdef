"""The kernels' small part of Python in LLVM's terms.

A kernel is a loop over numbers whose types are plain from its arguments: so nothing is inferred, and a kernel is ready
in milliseconds where a compiler for the whole of Python needs a hundred. What there is:

- names, one type each; ``range``, ``while``, ``if`` and ``return`` without a value;
- arithmetic and comparisons; of two types the wider counts, a byte is a number as soon as it is read. ``//`` is by a
  power of two. ``and``, ``or`` and ``x if c else y`` work out both sides, which suits vector registers;
- pointers with an index; calls of what the kernel's names hold: a type, a function of the builder (`Emitted`), or
  another function of this kind, which becomes part of the kernel.

Everything else is a `NotImplementedError` with the source of what it is.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from llvmlite import ir  # noqa: TID253 - this file is loaded to compile a kernel, and for nothing else

__all__ = ["BYTE", "DOUBLE", "FLAG", "FLOAT", "HALF_WORD", "WORD", "Emitted", "functions", "repeated", "translated"]

FLAG, BYTE, HALF_WORD, WORD = (ir.IntType(bits) for bits in (1, 8, 32, 64))
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
RANKS = {FLAG: 0, BYTE: 1, HALF_WORD: 2, WORD: 3, FLOAT: 4, DOUBLE: 5}

Names = Mapping[str, Any]


@dataclass(frozen=True)
class Emitted:
    """A function that a kernel may call: given the builder and the arguments, it appends what computes its result."""

    emit: Callable[..., Any]


def functions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a source, by name."""
    return {each.name: each for each in ast.parse(source).body if isinstance(each, ast.FunctionDef)}


def translated(
    function: ast.FunctionDef,
    types: Sequence[Any],
    names: Names,
    *,
    symbol: str,
    flags: Sequence[str],
    inner: Sequence[str] = (),
    apart: str = "",
) -> ir.Module:
    """A module with a function without a result.

    Args:
        function: its source.
        types: those of its arguments.
        names: what it may use.
        symbol: what it is called in the module.
        flags: what rounding may change in it.
        inner: the same in the functions that become part of it.
        apart: the name of a pointer to memory that no other pointer of the function looks into. LLVM would else ask
            at each loop whether they overlap, and have a slow way for that.

    Raises:
        NotImplementedError: for what there is none of here.
    """
    module = ir.Module(symbol)
    made = ir.Function(module, ir.FunctionType(ir.VoidType(), types), symbol)
    made.attributes.add("nounwind")
    entry, start = made.append_basic_block("entry"), made.append_basic_block("start")
    at = _Translator(ir.IRBuilder(start), names, flags, inner)
    if apart:
        domain = module.add_metadata([ir.MetaDataString(module, "memory")])
        scope = module.add_metadata([ir.MetaDataString(module, apart), domain])
        at.apart, at.scopes = apart, module.add_metadata([scope])
    for argument, value in zip(function.args.args, made.args, strict=True):
        at.assign(argument.arg, value)
    at.statements(function.body)
    if not at.builder.block.is_terminated:
        at.builder.ret_void()
    at.builder.position_at_end(entry)
    at.builder.branch(start)
    return module


@contextmanager
def repeated(builder: ir.IRBuilder, count: Any, *, first: Any = None, variable: Any = None) -> Iterator[Any]:
    """A loop: what is appended inside is done for the number that it gives, from `first` (or nought) up to `count`."""
    variable = variable or _variable(builder, WORD)
    builder.store(first or WORD(0), variable)
    with _looped(builder, lambda: builder.icmp_signed("<", builder.load(variable), count)):
        yield builder.load(variable)
        builder.store(builder.add(builder.load(variable), WORD(1), flags=["nsw"]), variable)


@contextmanager
def _looped(builder: ir.IRBuilder, test: Callable[[], Any]) -> Iterator[None]:
    head, inside, end = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    builder.cbranch(test(), inside, end)
    builder.position_at_end(inside)
    yield
    builder.branch(head)
    builder.position_at_end(end)


def _variable(builder: ir.IRBuilder, kind: Any, name: str = "") -> Any:
    """A place for a number, in the function's first block: LLVM makes a register of it."""
    with builder.goto_entry_block():
        return builder.alloca(kind, name=name)


class _Translator:
    def __init__(self, builder: ir.IRBuilder, names: Names, flags: Sequence[str], inner: Sequence[str]) -> None:
        self.builder, self.names, self.flags, self.inner = builder, names, flags, inner
        self.variables: dict[str, Any] = {}
        self.apart = ""
        self.scopes: Any = None  # what tells LLVM that `apart` is apart

    # -- statements --------------------------------------------------------------------------------------------

    def statements(self, nodes: Sequence[ast.stmt]) -> None:
        for node in nodes:
            getattr(self, f"do_{type(node).__name__}", _unknown)(node)

    def do_Assign(self, node: ast.Assign) -> None:
        (target,) = node.targets
        self.put(target, self.value(node.value))

    def do_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Subscript):
            place = self.place(node.target)
            before = self.read(place, node.target)
            self.store(self.arithmetic(node, node.op, before, self.value(node.value)), place, node.target)
        else:
            before = self.value(ast.Name(node.target.id) if isinstance(node.target, ast.Name) else node.target)
            self.put(node.target, self.arithmetic(node, node.op, before, self.value(node.value)))

    def do_Expr(self, node: ast.Expr) -> None:
        self.value(node.value)

    def do_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            _unknown(node)
        self.builder.ret_void()

    def do_If(self, node: ast.If) -> None:
        test = self.truth(self.value(node.test))
        then, other, end = (self.builder.append_basic_block() for _ in range(3))
        self.builder.cbranch(test, then, other)
        for block, body in ((then, node.body), (other, node.orelse)):
            self.builder.position_at_end(block)
            self.statements(body)
            if not self.builder.block.is_terminated:
                self.builder.branch(end)
        self.builder.position_at_end(end)

    def do_While(self, node: ast.While) -> None:
        with _looped(self.builder, lambda: self.truth(self.value(node.test))):
            self.statements(node.body)

    def do_For(self, node: ast.For) -> None:
        call, target = node.iter, node.target
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"):
            _unknown(node)
        if not isinstance(target, ast.Name):
            _unknown(node)
        *first, last = (self.value(each) for each in call.args)
        start, variable = first[0] if first else None, self.variable(target.id, WORD)
        with repeated(self.builder, last, first=start, variable=variable):
            self.statements(node.body)

    def put(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Subscript):
            self.store(value, self.place(target), target)
        elif isinstance(target, ast.Name):
            self.assign(target.id, value)
        else:
            _unknown(target)

    def assign(self, name: str, value: Any) -> None:
        self.builder.store(value, self.variable(name, value.type))

    def variable(self, name: str, kind: Any) -> Any:
        if name not in self.variables:
            self.variables[name] = _variable(self.builder, kind, name)
        return self.variables[name]

    # -- memory ------------------------------------------------------------------------------------------------

    def place(self, node: ast.Subscript) -> Any:
        return self.builder.gep(self.value(node.value), [self.value(node.slice)])

    def read(self, place: Any, node: ast.Subscript) -> Any:
        found = self.builder.load(place)
        self.tell_apart(found, node)
        return self.builder.zext(found, WORD) if found.type == BYTE else found

    def store(self, value: Any, place: Any, node: ast.Subscript) -> None:
        if place.type.pointee == BYTE:
            value = self.cast(value, BYTE)
        self.tell_apart(self.builder.store(value, place), node)

    def tell_apart(self, instruction: Any, node: ast.Subscript) -> None:
        if self.scopes is not None:
            own = isinstance(node.value, ast.Name) and node.value.id == self.apart
            instruction.set_metadata("alias.scope" if own else "noalias", self.scopes)

    # -- values ------------------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Any:
        return getattr(self, f"of_{type(node).__name__}", _unknown)(node)

    def of_Constant(self, node: ast.Constant) -> Any:
        kind = {int: WORD, float: DOUBLE}.get(type(node.value)) or _unknown(node)
        return ir.Constant(kind, node.value)

    def of_Name(self, node: ast.Name) -> Any:
        variable = self.variables.get(node.id)
        return self.names[node.id] if variable is None else self.builder.load(variable)

    def of_Subscript(self, node: ast.Subscript) -> Any:
        return self.read(self.place(node), node)

    def of_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if not isinstance(node.op, ast.USub):
            _unknown(node)
        x = self.value(node.operand)
        return self.builder.fneg(x, flags=self.flags) if _real(x) else self.builder.neg(x)

    def of_BinOp(self, node: ast.BinOp) -> Any:
        return self.arithmetic(node, node.op, self.value(node.left), self.value(node.right))

    def arithmetic(self, node: ast.AST, op: ast.operator, a: Any, b: Any) -> Any:
        a, b = self.alike(a, b)
        build = self.builder
        if _real(a):
            real = {ast.Add: build.fadd, ast.Sub: build.fsub, ast.Mult: build.fmul, ast.Div: build.fdiv}
            return real.get(type(op), _unknown_of(node))(a, b, flags=self.flags)
        if isinstance(op, ast.FloorDiv) and isinstance(b, ir.Constant) and b.constant & (b.constant - 1) == 0:
            return build.ashr(a, a.type(b.constant.bit_length() - 1))
        whole = {
            ast.Add: build.add, ast.Sub: build.sub, ast.Mult: build.mul, ast.BitAnd: build.and_, ast.BitOr: build.or_,
            ast.BitXor: build.xor, ast.LShift: build.shl, ast.RShift: build.ashr,
        }  # fmt: skip
        return whole.get(type(op), _unknown_of(node))(a, b)

    def of_Compare(self, node: ast.Compare) -> Any:
        (op,), (right,) = node.ops, node.comparators
        sign = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}[type(op)]
        return self.compare(sign, *self.alike(self.value(node.left), self.value(right)))

    def compare(self, sign: str, a: Any, b: Any) -> Any:
        if not _real(a):
            return self.builder.icmp_signed(sign, a, b)
        with_nan = self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered
        return with_nan(sign, a, b)

    def of_BoolOp(self, node: ast.BoolOp) -> Any:
        found, *others = (self.truth(self.value(each)) for each in node.values)
        for each in others:
            found = self.builder.and_(found, each) if isinstance(node.op, ast.And) else self.builder.or_(found, each)
        return found

    def of_IfExp(self, node: ast.IfExp) -> Any:
        test = self.truth(self.value(node.test))
        return self.builder.select(test, *self.alike(self.value(node.body), self.value(node.orelse)))

    def of_Call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else _unknown(node)
        called = self.names.get(name) or _unknown(node)
        given = [self.value(each) for each in node.args]
        if isinstance(called, Emitted):
            return called.emit(self.builder, *given)
        if isinstance(called, ast.FunctionDef):
            return self.inlined(called, given)
        if isinstance(called, ir.Type):
            return self.cast(given[0], called)
        sign: str = called  # the larger or the smaller of two
        a, b = self.alike(*given)
        return self.builder.select(self.compare(sign, a, b), a, b)

    def inlined(self, function: ast.FunctionDef, given: Sequence[Any]) -> Any:
        """The result of a function of this kind, which is straight on: its last statement returns it."""
        within = _Translator(self.builder, self.names, self.inner, self.inner)
        for argument, value in zip(function.args.args, given, strict=True):
            within.assign(argument.arg, value)
        *statements, last = function.body
        within.statements(statements)
        if not isinstance(last, ast.Return) or last.value is None:
            _unknown(last)
        return within.value(last.value)

    # -- types -------------------------------------------------------------------------------------------------

    def alike(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Two numbers in the wider of their types."""
        if a.type == b.type:
            return a, b
        kind = max(a.type, b.type, key=RANKS.__getitem__)
        return self.cast(a, kind), self.cast(b, kind)

    def cast(self, x: Any, kind: Any) -> Any:
        if x.type == kind:
            return x
        if isinstance(x, ir.Constant):
            return ir.Constant(kind, float(x.constant) if kind in (FLOAT, DOUBLE) else int(x.constant))
        if _real(x):
            if kind in (FLOAT, DOUBLE):
                return self.builder.fpext(x, kind) if kind == DOUBLE else self.builder.fptrunc(x, kind)
            return self.builder.fptosi(x, kind)
        if kind in (FLOAT, DOUBLE):
            return self.builder.sitofp(x, kind)
        if x.type.width > kind.width:
            return self.builder.trunc(x, kind)
        return self.builder.zext(x, kind) if x.type == FLAG else self.builder.sext(x, kind)

    def truth(self, x: Any) -> Any:
        return x if x.type == FLAG else self.compare("!=", x, x.type(0))


def _real(x: Any) -> bool:
    return x.type in (FLOAT, DOUBLE)


def _unknown(node: ast.AST) -> NoReturn:
    raise NotImplementedError(f"a kernel cannot have this: {ast.unparse(node)}")


def _unknown_of(node: ast.AST) -> Callable[..., Any]:
    return lambda *_, **__: _unknown(node)
