"""A rule without what nobody asked for.

A rule returns one gradient for each tensor argument, ``return g @ w.mH, X.mH @ g, g.sum(0)``, but a sweep may
need only some of them. As rules are pure, the others can be left out: their expressions in the
return, and then the assignments that nobody reads any more. A rule that returns what one kernel gives
tells that kernel by a list named ``wanted``, an entry a gradient: those not needed become False. Where all numbers
are real the conjugates of our own rules are left out as well: ``g * b.conj()`` is ``g * b`` then. That is done once
for each rule and each choice of arguments, on the rule's source; a rule without readable source is run whole.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

__all__ = ["specialise"]

Rule = Callable[..., Any]

#: The name by which a rule tells a kernel which gradients to give.
WANTED = "wanted"

#: Where the rules stand in which ``conj`` and ``mH`` are what they are in torch.
OURS = "tape_engine.rules."

#: What was made so far, for real numbers and for all, by the rule and what is needed of it.
_for_reals: dict[Rule, dict[tuple[bool, ...], Rule]] = {}
_for_all: dict[Rule, dict[tuple[bool, ...], Rule]] = {}


def specialise(rule: Rule, needs: tuple[bool, ...], real: bool = False) -> Rule:
    """`rule` without what `needs` marks as not needed, and for `real` numbers without conjugates.

    It returns None in the place of a gradient that is not needed.
    """
    try:
        return (_for_reals if real else _for_all)[rule][needs]
    except KeyError:
        made = (_for_reals if real else _for_all).setdefault(rule, {})
        found = made[needs] = _narrowed(rule, needs, real) or rule
        return found


def _narrowed(rule: Rule, needs: tuple[bool, ...], real: bool) -> Rule | None:
    if not isinstance(rule, FunctionType):
        return None
    partly = len(needs) > 1 and False in needs
    real = real and rule.__module__.startswith(OURS)
    definition = _definition(rule) if partly or real else None
    if definition is None:
        return None
    without = _Unconjugated()
    if real:
        without.visit(definition)
    dropped = partly and _drop(definition, needs)
    return _compiled(rule, definition) if dropped or without.found else None


class _Unconjugated(ast.NodeTransformer):
    """Leaves out the conjugates of real numbers: ``x.conj()``, ``conj(x)``, and that in ``x.mH``."""

    found = False

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        called = node.func
        if isinstance(called, ast.Name) and called.id == "conj" and len(node.args) == 1:
            self.found = True
            return node.args[0]
        if isinstance(called, ast.Attribute) and called.attr == "conj" and not node.args:
            self.found = True
            return called.value
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr == "mH":
            self.found = True
            node.attr = "mT"
        return node


def _drop(definition: ast.FunctionDef, needs: tuple[bool, ...]) -> bool:
    """Takes out of a rule's body what `needs` marks as not needed; says whether it could."""
    returns = [node for node in ast.walk(definition) if isinstance(node, ast.Return)]
    last = definition.body[-1]
    if len(returns) != 1 or returns[0] is not last or not isinstance(last, ast.Return):
        return False
    if isinstance(last.value, ast.Call):
        return _masked(definition.body, last.value, needs)
    if not isinstance(last.value, ast.Tuple) or len(last.value.elts) != len(needs):
        return False
    if any(isinstance(each, ast.Starred) for each in last.value.elts):
        return False
    dropped = [each for each, need in zip(last.value.elts, needs, strict=True) if not need]
    if any(isinstance(inside, ast.NamedExpr) for each in dropped for inside in ast.walk(each)):
        return False
    pairs = zip(last.value.elts, needs, strict=True)
    last.value.elts = [each if need else ast.copy_location(ast.Constant(None), each) for each, need in pairs]
    definition.body = _alive(definition.body)
    return True


def _masked(body: list[ast.stmt], kernel: ast.Call, needs: tuple[bool, ...]) -> bool:
    """Narrows the list ``wanted = [True, True, b is not None]`` that the kernel is given; says whether there is one.

    An argument that may be None stands last: it has no place in `needs` then.
    """
    if not any(isinstance(given, ast.Name) and given.id == WANTED for given in kernel.args):
        return False
    for statement in body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.List):
            (target, *others), mask = statement.targets, statement.value.elts
            if not others and isinstance(target, ast.Name) and target.id == WANTED and len(mask) >= len(needs):
                for i, need in enumerate(needs):
                    if not need:
                        mask[i] = ast.copy_location(ast.Constant(False), mask[i])
                return True
    return False


def _definition(rule: FunctionType) -> ast.FunctionDef | None:
    """The rule's own syntax tree, without decorators and annotations."""
    try:
        linecache.checkcache(rule.__code__.co_filename)
        tree = ast.parse(textwrap.dedent(inspect.getsource(rule)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    definition = tree.body[0] if tree.body else None
    if not isinstance(definition, ast.FunctionDef) or definition.name != rule.__code__.co_name:
        return None
    definition.decorator_list = []
    definition.returns = None
    arguments = definition.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    arguments.defaults = []  # taken over from the rule as they are
    arguments.kw_defaults = [None] * len(arguments.kwonlyargs)
    return definition


def _alive(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a straight-line body whose results are read; all of them, if it branches."""
    if any(not isinstance(each, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)) for each in body):
        return body
    kept: list[ast.stmt] = []
    read: set[str] = set()
    for statement in reversed(body):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            written = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            targets = {n.id for t in written for n in ast.walk(t) if isinstance(n, ast.Name)}
            plain = all(isinstance(t, (ast.Name, ast.Tuple, ast.List)) for t in written)
            if plain and not targets & read:
                continue
            if plain:
                read -= targets
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        kept.append(statement)
        read |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return kept[::-1]


def _compiled(rule: FunctionType, definition: ast.FunctionDef) -> Rule | None:
    """A function of the new body with the old one's globals, closure and defaults."""
    free = rule.__code__.co_freevars
    outer = ast.parse("def _outer():\n    pass").body[0]
    assert isinstance(outer, ast.FunctionDef)
    # An enclosing function that owns the free names, so that they compile to closure cells.
    bound = [ast.parse(f"{name} = None").body[0] for name in free]
    outer.body = [*bound, definition, ast.parse(f"return {definition.name}").body[0]] if free else [definition]
    module = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    code = compile(module, f"<{rule.__name__}, in part>", "exec")
    inner = next((each for each in _codes(code) if each.co_name == definition.name), None)
    if inner is None:
        return None
    cells = dict(zip(free, rule.__closure__ or (), strict=True))
    try:
        closure = tuple(cells[name] for name in inner.co_freevars)
    except KeyError:
        return None
    made = FunctionType(inner, rule.__globals__, rule.__name__, rule.__defaults__, closure)
    made.__kwdefaults__ = rule.__kwdefaults__
    return made


def _codes(code: CodeType) -> list[CodeType]:
    found = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += [constant, *_codes(constant)]
    return found
