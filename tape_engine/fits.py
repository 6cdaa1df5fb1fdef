"""Whether the operands of the article's operations fit each other; and if not, what would.

Each check raises before anything is computed, and says which operands are off, by the user's own
names, with their shapes, and one fix. The fix is not guessed: it is the first of the usual remedies
(a transpose, a missing dimension, a cast) with which the check itself passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from .errors import DTypeError, InputError, ShapeError, TapeError, message
from .names import call_site, operand_texts, user_frame
from .tape import describe

__all__ = ["lin", "mse", "relu"]

Tensor = torch.Tensor


class _Operands:
    """The operands of a call under the user's own names, for the text of an error."""

    def __init__(self, op: str, **tensors: Any) -> None:
        self.op = op
        self.tensors = tensors
        self.frame = user_frame()
        given = operand_texts(self.frame.f_code, self.frame.f_lasti) if self.frame is not None else {}
        texts = {own: given.get(i, given.get(own, own)) for i, own in enumerate(tensors)}
        self.names = {own: text if len(text) < 40 else own for own, text in texts.items()}

    def refuse(self, kind: type[TapeError], what: str, fix: str | None) -> NoReturn:
        rows = [
            (self.names[own], describe(each) if isinstance(each, Tensor) else f"{type(each).__name__} {each!r:.40}")
            for own, each in self.tensors.items()
            if each is not None
        ]
        raise kind(message(f"{self.op}: {what}", where=call_site(self.frame), operands=rows, fix=fix))

    def remedy(self, fits: Callable[..., bool], remedies: Sequence[tuple[str, str]]) -> str | None:
        """The first remedy ``(operand, expression of it)`` with which `fits` holds: ``w.t()``."""
        for own, expression in remedies:
            if self.tensors[own] is None:
                continue
            try:
                tried = eval(f"t{expression}", {"t": self.tensors[own].detach(), "torch": torch})  # our own expressions
                if fits(**{**self.tensors, own: tried}):
                    name = self.names[own]
                    if name.endswith(expression):  # what was one step too many
                        return f"{name.removesuffix(expression)} in the place of {name}"
                    text = f"{name if name.isidentifier() else f'({name})'}{expression}"
                    return f"{text} in the place of {name}"
            except (RuntimeError, IndexError, TypeError):
                continue
        return None


def _tensors(op: str, optional: tuple[str, ...] = (), **operands: Any) -> None:
    """Every operand is a tensor, of one device and one dtype that can have a gradient."""
    for own, each in operands.items():
        if not isinstance(each, Tensor) and not (each is None and own in optional):
            given = _Operands(op, **operands)
            given.refuse(
                DTypeError,
                f"{given.names[own]} is {type(each).__name__}, not a tensor.",
                _as_tensor(each, given.names[own]),
            )
    present = {own: each for own, each in operands.items() if each is not None}
    if len({each.device for each in present.values()}) > 1:
        given = _Operands(op, **operands)
        first = next(iter(present.values())).device
        off = next(own for own, each in present.items() if each.device != first)
        given.refuse(InputError, "its operands are on different devices.", f'{given.names[off]}.to("{first}")')


def _as_tensor(given: Any, name: str) -> str | None:
    try:
        torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return None
    return f"torch.as_tensor({name})"


def _same_dtype(op: str, wanted: torch.dtype, **operands: Any) -> None:
    """Every operand is of the dtype `wanted`; where that is an integer dtype, of the first that is not."""
    present = {own: each for own, each in operands.items() if each is not None}
    if not (wanted.is_floating_point or wanted.is_complex):
        able = [each.dtype for each in present.values() if each.dtype.is_floating_point or each.dtype.is_complex]
        wanted = able[0] if able else torch.float32
    off = next((own for own, each in present.items() if each.dtype != wanted), None)
    if off is not None:
        given = _Operands(op, **operands)
        same = len({each.dtype for each in present.values()}) == 1
        what = f"{given.names[off]} is of an integer dtype." if same else "its operands have different dtypes."
        given.refuse(DTypeError, what, f"{given.names[off]}.to({wanted})")


# -- lin ---------------------------------------------------------------------------------------------


def _lin_fits(X: Tensor, w: Tensor, b: Tensor | None) -> bool:
    return (
        X.ndim >= 2
        and w.ndim == 2
        and X.shape[-1] == w.shape[0]
        and (b is None or tuple(b.shape) in ((w.shape[1],), (1,)))
    )


def _count(dimensions: int) -> str:
    return f"{dimensions} dimension" + "s" * (dimensions != 1)


def lin(X: Any, w: Any, b: Any = None) -> None:
    """Refuses what ``lin(X, w, b)`` cannot take: X (..., N, D), w (D, M), b (M,), (1,) or none.

    Raises:
        ShapeError: naming the operand that is off, and what would fit.
        DTypeError: for an operand that is no tensor, or of another dtype than the others.
        InputError: for operands on different devices.
    """
    _tensors("lin", ("b",), X=X, w=w, b=b)
    if _lin_fits(X, w, b):
        if (
            X.dtype == w.dtype
            and (b is None or b.dtype == w.dtype)
            and (w.dtype.is_floating_point or w.dtype.is_complex)
        ):
            return
        _same_dtype("lin", w.dtype, X=X, w=w, b=b)
    given = _Operands("lin", X=X, w=w, b=b)
    x_name, w_name, b_name = given.names["X"], given.names["w"], given.names["b"]
    if X.ndim < 2:
        what = f"{x_name} has {_count(X.ndim)}; it takes rows of features, (N, D) or with more leading dimensions."
    elif w.ndim != 2:
        what = f"{w_name} has {_count(w.ndim)}; it takes a matrix (D, M)."
    elif X.shape[-1] != w.shape[0]:
        what = f"the last dimension of {x_name}, {X.shape[-1]}, is not the first of {w_name}, {w.shape[0]}."
    else:
        what = (
            f"{b_name} of shape {tuple(b.shape)} is neither ({w.shape[1]},), one for each column of {w_name}, nor (1,)."
        )
    fix = given.remedy(
        _lin_fits,
        [
            ("w", ".t()"), ("X", ".t()"), ("w", ".unsqueeze(-1)"), ("X", ".unsqueeze(0)"), ("X", ".unsqueeze(-1)"),
            ("X", ".flatten(1)"), ("b", ".reshape(-1)"), ("b", ".squeeze(0)"),
        ],
    )  # fmt: skip
    if fix is None and X.ndim < 2:
        fix = f"make {x_name} of shape (N, {w.shape[0] if w.ndim else 'D'})"
    elif fix is None and (w.ndim != 2 or X.shape[-1] != w.shape[0]):
        fix = f"make {w_name} of shape ({X.shape[-1]}, {w.shape[-1] if w.ndim else 1})"
    elif fix is None:
        fix = f"make {b_name} of shape ({w.shape[1]},)"
    given.refuse(ShapeError, what, fix)


# -- relu --------------------------------------------------------------------------------------------


def relu(Z: Any) -> None:
    """Refuses what ``relu(Z)`` cannot take.

    Raises:
        DTypeError: for anything but a real floating tensor.
    """
    _tensors("relu", Z=Z)
    if not Z.dtype.is_floating_point:
        given = _Operands("relu", Z=Z)
        fix = None if Z.dtype.is_complex else f"{given.names['Z']}.to(torch.float32)"
        given.refuse(
            DTypeError, f"{given.names['Z']} is {str(Z.dtype).removeprefix('torch.')}, not a real floating dtype.", fix
        )


# -- mse ---------------------------------------------------------------------------------------------


def _mse_fits(U: Tensor, Y: Tensor) -> bool:
    return U.shape == Y.shape or (U.ndim == 2 and U.shape[1] == 1 and tuple(Y.shape) == (U.shape[0],))


def mse(U: Any, Y: Any) -> None:
    """Refuses what ``mse(U, Y)`` cannot take: equal shapes, or U (N, 1) with Y (N,).

    Raises:
        ShapeError: for any other pair: torch would broadcast (N, 1) with (1, N) to (N, N).
        DTypeError: for a U that is not real and floating, a Y that is complex, or no tensors.
        InputError: for operands on different devices.
    """
    _tensors("mse", U=U, Y=Y)
    if not U.dtype.is_floating_point or Y.dtype.is_complex:
        given = _Operands("mse", U=U, Y=Y)
        own = "Y" if U.dtype.is_floating_point else "U"
        fix = None if given.tensors[own].dtype.is_complex else f"{given.names[own]}.to(torch.float32)"
        given.refuse(DTypeError, f"{given.names[own]} is not of a real floating dtype.", fix)
    if _mse_fits(U, Y):
        return
    given = _Operands("mse", U=U, Y=Y)
    fix = given.remedy(
        _mse_fits,
        [
            ("Y", ".squeeze(-1)"), ("Y", ".unsqueeze(-1)"), ("U", ".squeeze(-1)"), ("Y", ".t()"),
            ("U", ".unsqueeze(-1)"), ("Y", ".reshape(-1)"),
            ("U", ".reshape(-1)"), ("Y", ".squeeze()"), ("U", ".squeeze()"),
        ],
    )  # fmt: skip
    what = (
        f"{given.names['U']} {tuple(U.shape)} and {given.names['Y']} {tuple(Y.shape)} do not pair element by element."
    )
    given.refuse(ShapeError, what, fix or f"make {given.names['Y']} of shape {tuple(U.shape)}")
