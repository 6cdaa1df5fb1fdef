"""What a replay is given: inputs and live tensors must be what was recorded, or the call is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DTypeError, InputError, ShapeError, message
from ..names import call_site, user_frame
from ..regions import overlap, storage_of
from ..tape import Value, describe, unbind
from .buffers import laid, overlapping
from .data import Frozen

__all__ = ["Given"]

Tensor = torch.Tensor

STRIDED = torch.strided


class Given:
    """The checks of a replay's arguments.

    Attributes:
        live: the live tensors, with the values that they stand for.
        shared: which tensors share memory with one that is written to, and how far apart they begin; a program
            from a file brings it along, as its inputs have no memory.
    """

    def __init__(self, frozen: Frozen, shared: list[tuple[int, int, int]] | None = None) -> None:
        self._frozen = frozen
        self._specs = [(given.shape, given.dtype, given.device) for given in frozen.given]
        self.live = frozen.read_anew
        self._held = [(tensor, value.shape, value.dtype, value.device) for value, tensor in self.live]
        # How some of the inputs, by their place, and of the live tensors, by their value, must lie.
        self._lying: dict[int | Value, tuple[tuple[int, ...], tuple[bool, bool]]] = {}
        for value, turned in frozen.lying.items():
            place = next((i for i, each in enumerate(frozen.inputs) if each is value), value)
            self._lying[place] = tuple(value.strides), turned
        self._laid_inputs = [(i, wanted) for i, wanted in self._lying.items() if isinstance(i, int)]
        self._laid_live = [(t, self._lying[value]) for value, t in self.live if value in self._lying]
        self._written = self._write_targets()
        self.shared = self._sharing(frozen.given) if shared is None else shared

    # -- shapes, dtypes, devices ---------------------------------------------------------------------------

    def check(self, inputs: Sequence[Any], caller: str = "program") -> None:
        """Refuses inputs (or live tensors) that are not as recorded, naming all that differ.

        Raises:
            InputError: also where tensors share memory in another way than the recorded ones, and one is written to.
        """
        if len(inputs) != len(self._specs):
            self._refuse(inputs, caller)
        for tensor, (shape, dtype, device) in zip(inputs, self._specs):  # noqa: B905 - as many, and each µs counts
            if (
                not isinstance(tensor, Tensor)
                or tensor.shape != shape
                or tensor.dtype is not dtype
                or tensor.device != device
                or tensor.layout is not STRIDED
            ):
                self._refuse(inputs, caller)
        for tensor, shape, dtype, device in self._held:
            if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
                self._refuse(inputs, caller)
        if self._lying:
            for i, wanted in self._laid_inputs:
                if not _lies(inputs[i], *wanted):
                    self._refuse(inputs, caller)
            for tensor, wanted in self._laid_live:
                if not _lies(tensor, *wanted):
                    self._refuse(inputs, caller)
        if self._written:
            self._check_writes(inputs)

    def _refuse(self, inputs: Sequence[Any], caller: str) -> None:
        frozen = self._frozen
        titles = frozen.titles
        if len(inputs) != len(titles):
            takes = ", ".join(titles)
            what = f"the program takes {len(titles)} input{'s'[: len(titles) != 1]} ({takes}), not {len(inputs)}."
            rows = [(name, f"recorded {describe(given)}") for name, given in zip(titles, frozen.given, strict=True)]
            raise InputError(message(what, where=call_site(user_frame()), operands=rows, fix=f"{caller}({takes})"))
        rows = []
        for i, (name, given, tensor) in enumerate(zip(titles, frozen.given, inputs, strict=True)):
            if not _fits(tensor, given):
                rows.append((name, f"recorded {describe(given)}, given {_described(tensor, given)}"))
            elif i in self._lying and not _lies(tensor, *self._lying[i]):
                rows.append((name, f"recorded {_lying(given, *self._lying[i])}, given {_lying_now(tensor)}"))
        for value, tensor in self.live:
            name = frozen.title(value) or "live"
            if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
                rows.append((name, f"recorded {describe(value)}, now {describe(tensor)}"))
            elif value in self._lying and not _lies(tensor, *self._lying[value]):
                rows.append((name, f"recorded {_lying(value, *self._lying[value])}, now {_lying_now(tensor)}"))
        what = f"{len(rows)} {'tensor does' if len(rows) == 1 else 'tensors do'} not fit what was recorded."
        fix = "give inputs of the recorded shape, dtype and device, or record again on these"
        if all("strides" in text for _, text in rows):
            what += (
                " The recorded code does something else with a tensor that lies otherwise in memory:"
                " it goes by strides, or writes where they give a copy or a view."
            )
            fix = "record again on these"
        raise InputError(message(what, where=call_site(user_frame()), operands=rows, fix=fix))

    # -- shared memory ---------------------------------------------------------------------------------------

    def _write_targets(self) -> list[int | Tensor]:
        """The tensors that a replay writes to: inputs by their place, live ones."""
        places = {value: i for i, value in enumerate(self._frozen.inputs) if value is not None}
        leaves = [self._frozen.canonical(leaf) for leaf, _ in self._frozen.writes]
        return [places[leaf] if leaf in places else self._frozen.live[leaf] for leaf in leaves]

    def _sharing(self, inputs: Sequence[Tensor]) -> list[tuple[int, int, int]]:
        """Which tensors share memory with one that is written to, and how far apart they begin."""
        tensors = [*inputs, *(tensor for _, tensor in self.live)]
        written = [t if isinstance(t, int) else self._place(t, len(inputs)) for t in self._written]
        by_storage: dict[int, list[int]] = {}
        for i, tensor in enumerate(tensors):
            by_storage.setdefault(storage_of(tensor), []).append(i)
        return [
            (i, j, int(tensors[j].storage_offset() - tensors[i].storage_offset()))
            for i in written
            for j in by_storage[storage_of(tensors[i])]
            if i != j and overlap(tensors[i], tensors[j])
        ]

    def _place(self, tensor: Tensor, start: int) -> int:
        return next(start + i for i, (_, other) in enumerate(self.live) if other is tensor)

    def _check_writes(self, inputs: Sequence[Tensor]) -> None:
        """Refuses what the last lines of a replay could not write to as the recorded code did."""
        for target in self._written:
            tensor = inputs[target] if isinstance(target, int) else target
            if overlapping(tensor.shape, tensor.stride()):
                what = "a tensor that the recorded code writes to has elements that share one place in memory."
                self._refuse_write(what)
        sharing = self._sharing(inputs)
        if sharing != self.shared and {*sharing} != {*self.shared}:  # a file may tell them in another order
            self._refuse_sharing(sharing)

    def forget_written(self, inputs: Sequence[Tensor]) -> None:
        """After a replay: what it wrote to is a leaf to the next recording, as after ``opt.step()``."""
        for target in self._written:
            unbind(inputs[target] if isinstance(target, int) else target)

    def _refuse_sharing(self, sharing: list[tuple[int, int, int]]) -> None:
        """Names a pair that shares memory now and did not, or the other way round, or elsewhere."""
        now = next((pair for pair in sharing if pair not in self.shared), None)
        written, other, _ = now or next(pair for pair in self.shared if pair not in sharing)
        titles = [*self._frozen.titles, *(self._frozen.title(value) or "a live tensor" for value, _ in self.live)]
        one, two = titles[min(written, other)], titles[max(written, other)]  # inputs come first: these can be changed
        if now is None:  # a copy of what is given now would not help: nor does it share memory
            what = f"the recorded code writes to memory that {one} and {two} shared, and share no more."
            fix = f"record on tensors of their own: {one} = {one}.clone() before the block"
            raise InputError(message(what, where=call_site(user_frame()), fix=fix))
        self._refuse_write(
            f"the recorded code writes to memory that {one} and {two} share in another way than recorded."
        )

    def _refuse_write(self, what: str) -> None:
        raise InputError(message(what, where=call_site(user_frame()), fix="give a copy: .clone()"))

    # -- the seed, and what is there to be added to --------------------------------------------------------------

    def seed(self, seed: Tensor | None, one: Tensor, caller: str = "program.step") -> Tensor:
        """The gradient of the first output: `seed`, checked, or `one`.

        Raises:
            ShapeError: if the first output has several elements and no seed, or the seed another shape.
            DTypeError: for a seed that is no tensor, or complex where the output is real.
        """
        wanted = self._frozen.seed
        if seed is None and wanted.numel() == 1:
            return one
        name = self._frozen.names.get(id(self._frozen.outputs[0])) or "the output"
        where = call_site(user_frame())
        row = (name, describe(wanted))
        if seed is None:
            what = f"{caller}: {name} has {wanted.numel()} elements; its gradient needs a seed of its shape."
            fix = f"{caller}(..., seed=torch.ones({tuple(wanted.shape)}))"
            raise ShapeError(message(what, where=where, operands=[row], fix=fix))
        if not isinstance(seed, Tensor):
            raise DTypeError(
                message(
                    f"the seed must be a tensor, not {type(seed).__name__}.",
                    where=where,
                    fix=f"seed=torch.ones({tuple(wanted.shape)})",
                )
            )
        rows = [row, ("seed", describe(seed))]
        if seed.shape != wanted.shape:
            what, fix = (
                f"{caller}: the seed has another shape than {name}.",
                f"give a seed of shape {tuple(wanted.shape)}",
            )
            raise ShapeError(message(what, where=where, operands=rows, fix=fix))
        if seed.is_complex() and not wanted.is_complex():
            what = f"{caller}: the seed is complex, and {name} is real."
            raise DTypeError(message(what, where=where, operands=rows, fix="give a real seed, such as seed.real"))
        return laid(seed.to(wanted.device, wanted.dtype), wanted.strides)  # rules were recorded for these strides

    def olds(self, targets: Sequence[Tensor]) -> list[Tensor | None]:
        """The ``.g`` of the targets, which a sweep adds to.

        Raises:
            ShapeError, DTypeError: for one that is not a tensor of the gradient's shape.
        """
        found = []
        for tensor, (_, g) in zip(targets, self._frozen.gradients, strict=True):
            old = getattr(tensor, "g", None)
            if old is not None and (not isinstance(old, Tensor) or old.shape != g.shape):
                kind = ShapeError if isinstance(old, Tensor) else DTypeError
                raise kind(
                    message(
                        "accumulate=True: the .g that is there cannot be added to.",
                        where=call_site(user_frame()),
                        operands=[(".g", _described(old, g)), ("new .g", describe(g))],
                        fix="del it before the sweep",
                    )
                )
            found.append(old)
        return found


def _fits(tensor: Any, given: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == given.shape
        and tensor.dtype == given.dtype
        and tensor.device == given.device
        and tensor.layout == given.layout
    )


def _lies(tensor: Tensor, strides: tuple[int, ...], turned: tuple[bool, bool]) -> bool:
    """Whether the elements of a tensor lie as those of the recorded one did; along one element no step is taken."""
    if (tensor.is_conj(), tensor.is_neg()) != turned:
        return False
    now = tensor.stride()
    return (
        now == strides
        or not all(tensor.shape)
        or all(a == b for a, b, length in zip(now, strides, tensor.shape, strict=True) if length > 1)
    )


def _lying(like: Value | Tensor, strides: tuple[int, ...], turned: tuple[bool, bool]) -> str:
    """A description with strides, and what is done lazily to the elements."""
    lazily = "".join(f"  {word}" for word, is_so in zip(("conjugated", "negated"), turned, strict=True) if is_so)
    return f"{describe(like)}  strides {strides}{lazily}"


def _lying_now(tensor: Tensor) -> str:
    return _lying(tensor, tensor.stride(), (tensor.is_conj(), tensor.is_neg()))


def _described(tensor: Any, like: Any) -> str:
    if not isinstance(tensor, Tensor):
        return f"{type(tensor).__name__}, not a tensor"
    layout = "" if tensor.layout == torch.strided else f"  {str(tensor.layout).removeprefix('torch.')}"
    return describe(tensor) + layout
