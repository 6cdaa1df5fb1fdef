"""What an operation computes, as one line of code with the user's own names: ``Z = X @ w + b``."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
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


def formula(node: Node, names: Mapping[int, str], read: Container[int] = ()) -> str:
    """What an operation makes and how, as the user would have written it.

    Args:
        node: the operation.
        names: of its inputs and outputs, by ``id`` of the value.
        read: the ``id`` of every value that something reads; of several outputs the others are not named.
    """
    right = _given(node, names) if node.op.formula else _spelled(node, names)
    made = [v for v in node.outputs if id(v) in read][:3] or list(node.outputs[:1])
    left = ", ".join(names.get(id(v), "?") for v in made) + (", …" if len(node.outputs) > len(made) else "")
    assigns = re.match(r"[^=<>!]*[^=<>!]=[^=]", right.split("(")[0])  # `x += y` says itself what it makes
    text = f"{left} = {right}" if left and not assigns else right
    if not node.outputs and node.result is not None:  # a guard: what came out
        text += f" → {_argument(node.result, names)}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def params_text(node: Node) -> str:
    """The params that an operation's formula does not tell: ``dim=[0], keepdim=True``."""
    if not node.op.formula:  # the call itself is shown, and tells them all
        return ""
    told = set(_meanings(node).values())
    shown = {name: each for name, each in node.params.items() if name not in told and each is not False and each != []}
    text = ", ".join(f"{name}={_argument(each, {})}" for name, each in shown.items())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _meanings(node: Node) -> dict[str, str]:
    """Which parameter of the operation each word of its formula means.

    A word is the parameter's own name, or the one that the rule gives it; single letters that are neither stand
    for the parameters that are left, in order.
    """
    own = node.op.parameters
    by_rule = dict(zip(node.op.rule_parameters[2:], own, strict=False))
    text = node.op.formula or ""
    words = [found[0] for found in _WORD.finditer(text) if not text[found.end() :].startswith("(")]
    meanings = {word: word if word in own else by_rule[word] for word in words if word in own or word in by_rule}
    letters = [word for word in dict.fromkeys(words) if len(word) == 1 and word not in meanings]
    left = [name for name in own if name not in meanings.values()]
    return meanings | dict(zip(letters, left, strict=False))


def _given(node: Node, names: Mapping[int, str]) -> str:
    """The formula that the operation's record carries, its words replaced by what was given."""
    arguments = dict(zip(node.op.parameters, node.args, strict=False)) | node.kwargs
    text, replaced = node.op.formula or "", dict[str, str]()
    for word, name in _meanings(node).items():
        if (given := arguments.get(name)) is None:  # `+ b` of a layer without a bias
            text = re.sub(rf"\s*[+]\s*{re.escape(word)}(?!\w)", "", text)
        else:
            replaced[word] = _argument(given, names)
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
    told = {key: each for key, each in keywords.items() if each is not None and each is not False}
    if str(told.get("device")) == "cpu":
        del told["device"]
    spelled = [f"{key}={_argument(each, names)}" for key, each in told.items()]
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
