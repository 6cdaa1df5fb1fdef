"""The user's own words: on which line an operation was called, and what its values are called there.

At recording time only a code object and the index of an instruction are noted, which costs nothing;
file, line, source text and variable names are worked out from them when somebody asks.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import linecache
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

import executing
import torch

from .tape import Node, Told, Value

__all__ = ["call_site", "code_line", "local_name", "names_of", "source_segment", "user_frame", "where"]

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_SKIPPED = (_HERE, os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, contextlib.__file__, "<frozen ")
_OPEN = (_HERE + "cli.py", _HERE + "demo.py")  # rooms of ours that are user code to the engine
_is_user_file: dict[str, bool] = {}


def user_frame(frame: FrameType | None = None) -> FrameType | None:
    """The innermost frame that is neither torch's nor the engine's, from `frame` outwards."""
    if frame is None:
        frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        ours = _is_user_file.get(filename)
        if ours is None:
            path = filename if filename.startswith("<") else os.path.abspath(filename)
            ours = _is_user_file[filename] = path in _OPEN or not path.startswith(_SKIPPED)
        if ours:
            return frame
        frame = frame.f_back
    return None


def called_by_user() -> bool:
    """Whether the function that asks was called straight from the user's code, not by torch or the engine."""
    frame = sys._getframe(2)
    return user_frame() is frame


def local_name(frame: FrameType | None, tensor: torch.Tensor) -> str | None:
    """The name under which `tensor` stands in `frame`, if it stands there."""
    if frame is None:
        return None
    names = frame.f_locals
    found = _name_in(names, tensor)
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and sys.version_info < (3, 13) and sys.getrefcount(names) == 3:
        names.clear()  # the frame's copy of a function's variables, which would keep its tensors alive
    return found or _name_in(frame.f_globals, tensor)


def _name_in(names: dict[str, Any], tensor: torch.Tensor) -> str | None:
    for name, held in names.items():
        if held is tensor and name.isidentifier() and not name.startswith("_"):
            return name
    return None


@lru_cache(maxsize=4096)
def line_of(code: CodeType, lasti: int) -> int:
    """The line of an instruction."""
    positions = next(itertools.islice(code.co_positions(), lasti // 2, None), (None,))
    return positions[0] or code.co_firstlineno


def call_site(frame: FrameType | None) -> str | None:
    """``file:line    source line`` of a frame, as messages show it."""
    if frame is None:
        return None
    return _site(frame.f_code.co_filename, frame.f_lineno)


def _site(filename: str, line: int) -> str:
    text = _text(filename, line)
    return f"{_short(filename)}:{line}" + (f"    {text}" if text else "")


def _text(filename: str, line: int) -> str:
    """A line of source, stripped; empty where there is none.

    From Python 3.13 on all code without a file seems to lie in what was given to ``python -c``.
    """
    return "" if filename == "<string>" else linecache.getline(filename, line).strip()


def _short(filename: str) -> str:
    """How messages call a file: its last part; ``In[5]`` for a cell of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cell = None if shell is None else shell.compile.format_code_name(filename)
    if cell:
        return str(cell[1]) if isinstance(cell, tuple) else str(cell)
    return filename if filename.startswith("<") else os.path.basename(filename)


def where(node: Node) -> str | None:
    """``file:line`` of the call that recorded `node`."""
    code, lasti = node.site
    if code is None:
        return None
    if isinstance(code, Told):
        return f"{code.file}:{code.line}"
    return f"{_short(code.co_filename)}:{line_of(code, lasti)}"


def located(node: Node) -> str | None:
    """``file:line    source line`` of the call that recorded `node`, as messages show it."""
    code, lasti = node.site
    if isinstance(code, Told):
        return f"{code.file}:{code.line}" + (f"    {code.text}" if code.text else "")
    return None if code is None else _site(code.co_filename, line_of(code, lasti))


def code_line(node: Node) -> str | None:
    """The source line of the call that recorded `node`, stripped; ``None`` where there is no source."""
    code, lasti = node.site
    if code is None:
        return None
    if isinstance(code, Told):
        return code.text or None
    return _text(code.co_filename, line_of(code, lasti)) or None


class _Site:
    """What `executing` asks of a frame, for one that is gone."""

    def __init__(self, code: CodeType, lasti: int) -> None:
        self.f_code, self.f_lasti, self.f_lineno = code, lasti, line_of(code, lasti)
        self.f_globals: dict[str, Any] = {}


@lru_cache(maxsize=4096)
def expression(code: CodeType, lasti: int) -> ast.AST | None:
    """The expression (a call, an operator, a subscript) that an instruction runs, if it can be told."""
    site: Any = _Site(code, lasti)
    try:
        return executing.Source.executing(site).node
    except Exception:  # source that changed since, or that executing cannot read: no names then
        return None


def source_segment(node: Node) -> str | None:
    """The user's source text of the expression that recorded `node`: ``X @ w``."""
    code, lasti = node.site
    found = None if code is None or isinstance(code, Told) else expression(code, lasti)
    try:
        return None if found is None else ast.unparse(found)
    except (AttributeError, ValueError, RecursionError):
        return None


def operand_names(code: CodeType, lasti: int) -> list[str | None]:
    """The plain names given to a call, in order, keywords after; ``None`` for other expressions."""
    call = expression(code, lasti)
    if not isinstance(call, ast.Call):
        return []
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [spelled(each) for each in given]


def operand_texts(code: CodeType, lasti: int) -> dict[int | str, str]:
    """The source text of what a call was given, by position or keyword; nothing if it cannot be told."""
    call = expression(code, lasti)
    if not isinstance(call, ast.Call) or any(isinstance(each, ast.Starred) for each in call.args):
        return {}
    found: dict[int | str, str] = {i: ast.unparse(each) for i, each in enumerate(call.args)}
    found.update((each.arg, ast.unparse(each.value)) for each in call.keywords if each.arg)
    return found


def spelled(expression: ast.expr) -> str | None:
    """The text of a name or a dotted name; ``None`` for anything else."""
    if isinstance(expression, ast.Name):
        return expression.id
    if isinstance(expression, ast.Attribute) and (owner := spelled(expression.value)):
        return f"{owner}.{expression.attr}"
    return None


def _assigned(code: CodeType, lasti: int) -> list[str]:
    """The names that the result of an expression is assigned to: ``["Z"]`` for ``Z = te.lin(X, w, b)``."""
    found = expression(code, lasti)
    statement = getattr(found, "parent", None)  # executing links every node with its parent
    if isinstance(statement, ast.AugAssign) or isinstance(found, ast.AugAssign):
        target = statement.target if isinstance(statement, ast.AugAssign) else found.target  # type: ignore[union-attr]
        return [name] if (name := spelled(target)) else []
    if isinstance(statement, (ast.AnnAssign, ast.NamedExpr)) and statement.value is found:
        return [name] if (name := spelled(statement.target)) else []
    if not isinstance(statement, ast.Assign) or statement.value is not found:
        return []
    target = statement.targets[0]
    elements = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    return [spelled(each) or "" for each in elements]


def _raw_names(nodes: list[Node]) -> dict[int, str]:
    """Names as the source has them, by ``id`` of the value: several values may bear one name."""
    names: dict[int, str] = {}
    for value in (v for node in nodes for v in node.inputs if v.leaf and v.name):
        names[id(value)] = value.name or ""
    for here, after in zip(nodes, [*nodes[1:], None], strict=False):
        code, lasti = here.site
        if isinstance(code, Told):  # its values were named when the program was saved
            names.update((id(value), value.name) for value in here.outputs if value.name)
            continue
        if code is None:
            continue
        # One call of torch may run as several operations: the last of them bears the name.
        last = here.op.is_named or after is None or after.site != here.site or _starts_again(here, after)
        assigned = _assigned(code, lasti) if last else []
        if len(assigned) == 1 and here.outputs_tuple and _gives_all(here):
            assigned = []  # the name of the tuple, not of what is in it
        for value, name in zip(here.outputs, assigned, strict=False):
            if name:
                names[id(value)] = name
        if here.op.is_named:
            given = operand_names(code, lasti)
            for value, spelt in zip(here.inputs, given if len(given) == len(here.args) else [], strict=False):
                if spelt and value.leaf:
                    names.setdefault(id(value), spelt)
    return names


def _gives_all(node: Node) -> bool:
    """Whether the user gets all that the operation returned: torch hands on only the first of some tuples."""
    schema = getattr(node.op.forward, "_schema", None)
    return schema is None or any("List" in str(each.type) for each in schema.returns)


def _starts_again(here: Node, after: Node) -> bool:
    """Whether `after` is the next turn of a loop rather than the next step of the same call."""
    return here.op is after.op and any(v is w for v in here.outputs for w in after.inputs)


def names_of(nodes: Iterable[Node]) -> dict[int, str]:
    """A name for every value of `nodes`, by ``id`` of the value; no two are the same.

    The user's own variable where the source tells it (``Z``), the name in the module for a parameter
    (``0.weight``), otherwise the operation's (``relu``); further ones of a name are ``x#2``, ``x#3``.
    """
    listed = list(nodes)
    raw = _raw_names(listed)
    used: dict[str, int] = {}
    names: dict[int, str] = {}

    def name(value: Value, fallback: str) -> None:
        if id(value) in names:
            return
        wanted = raw.get(id(value), fallback)
        used[wanted] = count = used.get(wanted, 0) + 1
        names[id(value)] = wanted if count == 1 else f"{wanted}#{count}"

    for node in listed:
        parameters = node.op.parameters
        for i, value in enumerate(node.inputs):
            name(value, parameters[i] if node.op.is_named and i < len(parameters) else "leaf")
        for value in node.outputs:
            name(value, node.op.name)
    return names
