"""What an operation computes, as one line of code with the user's own names: ``Z = X @ w + b``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from tape_engine.tape import Node, Value

from .roles import base_name

__all__ = ["formula", "params_text"]

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "mm": "@", "bmm": "@", "mv": "@", "dot": "@",
    "matmul": "@", "remainder": "%", "floor_divide": "//", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^", "logical_and": "and",
    "logical_or": "or",
}  # fmt: skip
_BINDS = {"**": 4, "@": 3, "*": 3, "/": 3, "%": 3, "//": 3, "+": 2, "-": 2}
_PREFIX = {"neg": "-", "bitwise_not": "~", "logical_not": "not "}
_WORD = re.compile(r"(?<![\w.])[A-Za-z_][A-Za-z0-9_]*")  # `x` of `xᵀ` as well
_LONGEST = 96


def formula(node: Node, names: Mapping[int, str]) -> str:
    """The right and left side of an operation, as the user would have written it.

    Args:
        node: the operation.
        names: of its inputs and outputs, by ``id`` of the value.
    """
    right = _given(node, names) if node.op.formula else _spelled(node, names)
    left = ", ".join(names.get(id(v), "?") for v in node.outputs[:3]) + (", …" if len(node.outputs) > 3 else "")
    assigns = re.match(r"[^=<>!]*[^=<>!]=[^=]", right.split("(")[0])  # `x += y` says itself what it makes
    text = f"{left} = {right}" if left and not assigns else right
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def params_text(node: Node) -> str:
    """The params that an operation's formula does not tell: ``dim=[0], keepdim=True``."""
    if not node.op.formula:  # the call itself is shown, and tells them all
        return ""
    words = set(_WORD.findall(node.op.formula))
    formal = dict(zip(node.op.parameters, node.op.rule_parameters[2:], strict=False))
    told = {name for name in node.op.parameters if name in words or formal.get(name) in words}
    shown = {name: each for name, each in node.params.items() if name not in told and each is not False and each != []}
    text = ", ".join(f"{name}={_argument(each, {})}" for name, each in shown.items())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _given(node: Node, names: Mapping[int, str]) -> str:
    """The formula that the operation's record carries, its parameters replaced by what was given."""
    text = node.op.formula or ""
    arguments = dict(zip(node.op.parameters, node.args, strict=False)) | node.kwargs
    # A rule may call the arguments by other names than the operation does: g, the output, then all of them.
    formal = dict(zip(node.op.rule_parameters[2:], node.op.parameters, strict=False))
    arguments |= {name: arguments.get(own) for name, own in formal.items()}
    for name in arguments | dict.fromkeys(node.op.parameters):
        if arguments.get(name, None) is None:  # `+ b` of a layer without a bias
            text = re.sub(rf"\s*[+]\s*{re.escape(name)}(?!\w)", "", text)
    replaced = {name: _argument(given, names) for name, given in arguments.items() if given is not None}
    made = node.op.rule_parameters[1:2]
    if made and len(node.outputs) == 1:
        replaced.setdefault(made[0], names.get(id(node.outputs[0]), made[0]))
    return _WORD.sub(lambda found: replaced.get(found[0], found[0]), text)


def _spelled(node: Node, names: Mapping[int, str]) -> str:
    """The call itself, as an operator where it is one."""
    base, keywords = base_name(node), dict(node.kwargs)
    given = [_argument(each, names) for each in node.args]
    if node.op.is_named:
        return _call(node.op.name, given, keywords, names)
    if base in _INFIX and len(given) == 2 and set(keywords) <= {"alpha"}:
        sign, factor = _INFIX[base], keywords.get("alpha", 1)
        right = given[1] if factor == 1 else f"{factor} * {given[1]}"
        if node.mutates and sign in _BINDS:
            return f"{given[0]} {sign}= {right}"
        return f"{given[0]} {sign} {right}"
    if base in _PREFIX and len(given) == 1:
        return _PREFIX[base] + given[0]
    if base in ("t", "numpy_T") and len(given) == 1:
        return f"{given[0]}.T"
    if base == "addmm" and len(given) == 3 and not keywords:
        return f"{given[1]} @ {given[2]} + {given[0]}"
    return _call(node.op.name.split(".", 1)[0], given, keywords, names)


def _call(name: str, given: list[str], keywords: Mapping[str, Any], names: Mapping[int, str]) -> str:
    spelled = [f"{key}={_argument(each, names)}" for key, each in keywords.items() if each is not None]
    return f"{name}({', '.join([*given, *spelled])})"


def _argument(given: Any, names: Mapping[int, str]) -> str:
    if isinstance(given, Value):
        return names.get(id(given), "?")
    if isinstance(given, (tuple, list)):
        inside = [_argument(each, names) for each in given[:6]] + (["…"] if len(given) > 6 else [])
        return f"[{', '.join(inside)}]"
    if isinstance(given, float):
        return f"{given:g}"
    if isinstance(given, (torch.dtype, torch.memory_format, torch.layout)):
        return str(given).removeprefix("torch.")
    text = getattr(given, "__name__", None) or (f"'{given}'" if isinstance(given, torch.device) else repr(given))
    return text if len(text) <= 24 else text[:23] + "…"
