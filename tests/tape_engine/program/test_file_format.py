"""A reader of program files written from ``docs/reference/program-file.md`` alone: json, struct, torch's operations.

It shares no line with the engine's own reader, knows none of its classes, and replays programs of every feature.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tape_engine as te
from tests.fuzz_files import scale
from tests.helpers import close, plain
from tests.tape_engine.program.common import C128, F32, F64, draw

Tensor = torch.Tensor

#: The dtypes of the container, as safetensors names them.
CONTAINER = {
    "F64": F64, "F32": F32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


class Refused(Exception):
    """A guard came out differently."""


class Reader:
    """A program file, read and replayed as the page describes it."""

    def __init__(self, path: Path, ops: dict[str, Callable[..., Any]] | None = None) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        container = json.loads(data[8 : 8 + length])
        metadata = container.pop("__metadata__")
        assert metadata["format"] == "tape_engine program"
        assert metadata["version"] == "1"
        self.it = json.loads(metadata["program"])
        body = data[8 + length :]
        payload = {name: bytearray(body[slice(*row["data_offsets"])]) for name, row in container.items()}
        memory: dict[str, Tensor] = {}
        self.tensors = []
        for row in self.it["tensors"]:
            dtype = getattr(torch, row["dtype"])
            held = row["payload"]
            if held not in memory:
                octets = payload[held] or bytearray(16)
                memory[held] = torch.frombuffer(octets, dtype=torch.uint8).clone()
            flat = torch.empty(0, dtype=dtype).set_(memory[held].untyped_storage(), 0, (0,), (1,))
            made = flat.set_(flat.untyped_storage(), row["offset"], row["shape"], row["strides"])
            if row.get("parameter"):
                made = torch.nn.Parameter(made, requires_grad=row.get("requires_grad", False))
            self.tensors.append(made)
        self.ops = ops or {}
        self.same = dict(self.it["same"])

    def described(self, value: int) -> tuple[list[int], list[int], torch.dtype]:
        kind = self.it["types"][self.it["values"][value]["type"]]
        return kind["shape"], kind["strides"], getattr(torch, kind["dtype"])

    def one(self, value: int) -> int:
        while value in self.same:
            value = self.same[value]
        return value

    def argument(self, thing: Any, held: dict[int, Tensor]) -> Any:
        if isinstance(thing, list):
            return [self.argument(each, held) for each in thing]
        if not isinstance(thing, dict):
            return thing
        ((word, inner),) = thing.items()
        if word == "value":
            value = self.one(inner)
            if value not in held:  # of which only the description is read
                shape, strides, dtype = self.described(inner)
                return torch.empty_strided(shape, strides, dtype=dtype)
            return held[value]
        made: dict[str, Callable[[], Any]] = {
            "tuple": lambda: tuple(self.argument(each, held) for each in inner),
            "float": lambda: float(inner),
            "complex": lambda: complex(*[self.argument(each, held) for each in inner]),
            "slice": lambda: slice(*[self.argument(each, held) for each in inner]),
            "ellipsis": lambda: ...,
            "dict": lambda: {key: self.argument(each, held) for key, each in inner},
            "device": lambda: torch.device(inner),
        }
        return made[word]() if word in made else getattr(torch, inner)

    def operation(self, name: str) -> Callable[..., Any]:
        space, _, rest = name.partition("::")
        if space == "aten":
            packet, _, overload = rest.partition(".")
            found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
            return found
        if space == "ops":
            return self.ops[rest]
        ours: dict[str, Callable[..., Any]] = {
            "read_view": read_view, "write_view": write_view, "tolist": Tensor.tolist
        }  # fmt: skip
        return ours[rest]

    def run(self, inputs: list[Tensor], seed: Tensor | None = None) -> tuple[Any, list[Tensor]]:
        """The outputs, and with a seed the gradients in the order of the file; then the writes are done."""
        it, held = self.it, {}
        for row, tensor in zip(it["inputs"], inputs, strict=True):
            if row["value"] is not None:
                held[self.one(row["value"])] = tensor
        for row in it["live"]:
            held[row["value"]] = self.tensors[row["tensor"]]
        targets = dict(held)
        for value in [*(row["value"] for row in it["inputs"]), *(row["value"] for row in it["live"])]:
            if value is not None:
                held[self.one(value)] = self.laid(held[self.one(value)], value)
        if seed is not None:
            held[self.one(it["seed"])] = seed
        for i in [*it["forward"], *(it["backward"] if seed is not None else [])]:
            self.node(it["nodes"][i], held)
        outputs = [held[self.one(value)].clone() for value in it["outputs"]]
        gradients = [held[self.one(row["g"])].clone() for row in it["gradients"]] if seed is not None else []
        after = [(targets[self.one(leaf)], held[self.one(value)].clone()) for leaf, value in it["writes"]]
        with torch.no_grad():
            for target, contents in after:
                target.copy_(contents)
        return (outputs[0] if it["single"] else tuple(outputs)), gradients

    def laid(self, tensor: Tensor, value: int) -> Tensor:
        """In the recorded layout, by which `view` and `write_view` go."""
        shape, strides, dtype = self.described(value)
        if list(tensor.stride()) == strides or 0 in strides:
            return tensor.detach()
        return torch.empty_strided(shape, strides, dtype=dtype).copy_(tensor.detach())

    def node(self, node: dict[str, Any], held: dict[int, Tensor]) -> None:
        run = self.operation(self.it["ops"][node["op"]]["name"])
        args = [self.argument(each, held) for each in node["args"]]
        kwargs = {name: self.argument(each, held) for name, each in node.get("kwargs", {}).items()}
        with torch.no_grad():
            made = run(*args, **kwargs)
        if "guard" in node:
            if made != self.argument(node["guard"], held):
                raise Refused
            return
        each_made = list(made) if node.get("tuple") else [made]
        each_made = [each for i, each in enumerate(each_made) if i not in node.get("gaps", [])]
        for value, tensor in zip(node["outputs"], each_made, strict=True):
            if list(tensor.shape) != self.described(value)[0]:
                raise Refused
            held[self.one(value)] = tensor


def read_view(base: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    return base.as_strided(size, stride, base.storage_offset() + offset)


def write_view(base: Tensor, part: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Tensor:
    made = torch.empty_strided(base.shape, base.stride(), dtype=base.dtype).copy_(base)
    made.as_strided(size, stride, offset).copy_(part)
    return made


# -- programs ------------------------------------------------------------------------------------------------------


Made = tuple[te.Program, list[Tensor]]


def article() -> Made:
    X, w, b, Y = draw(6, 3), torch.nn.Parameter(draw(3, 1)), torch.nn.Parameter(draw(1)), draw(6)
    with te.record() as tape:
        C = te.mse(te.relu(te.lin(X, w, b)), Y)
    return tape.program(inputs=(X, Y), outputs=C), [draw(6, 3), draw(6)]


def network() -> Made:
    layers = torch.nn
    net = layers.Sequential(
        layers.Conv2d(1, 2, 2), layers.BatchNorm2d(2), layers.ReLU(), layers.Dropout(), layers.Flatten(),
        layers.Linear(8, 3),
    )  # fmt: skip
    x, labels = draw(2, 1, 3, 3, dtype=F32), torch.tensor([0, 2])
    with te.record() as tape:
        loss = torch.nn.functional.cross_entropy(net(x), labels)
    return tape.program(inputs=(x, labels), outputs=loss), [draw(2, 1, 3, 3, dtype=F32), torch.tensor([1, 1])]


def written() -> Made:
    both = draw(4, 3)
    x, state, other = draw(3, 3), both[:3], both[1:]
    with te.record() as tape:
        y = x * 2
        y[1] = state[0].sin()
        y.t()[0].mul_(3.0)
        state.add_(y)
        parts = (y @ other).unbind(0)
        out = parts[0].sum() * parts[2].amax() + torch.stack(parts).chunk(2)[0].sum()
    return tape.program(inputs=x, outputs=(out, y)), [draw(3, 3)]


def laid_otherwise() -> Made:
    x, w = draw(4, 3), draw(3, 4).t()
    with te.record() as tape:
        y = x.view(2, 6)
        y[0].mul_(2)
        out = (x * w.reshape(-1).view(4, 3)).sum() + y.t()[1:].square().sum()
    return tape.program(inputs=x, outputs=out), [draw(4, 3)]


def mixed() -> Made:
    x, z, table, at = draw(3), draw(3, dtype=C128), draw(4, 2), torch.tensor([1, 3, 1])
    with te.record() as tape:
        with te.scope("head"):
            y = torch.fft.fft(x * z).abs().sum() * float("inf" if x.sum().item() > 1e9 else 1.5)
        half = scale(table[at], 0.5).half()
        total = y + half.sum().double() + torch.where(x > 0, x, x * -1.0).max() + x[::2].sum() + z.conj().real.sum()
    return tape.program(inputs=(x, at), outputs=total, wrt=[x, table, y]), [x.clone(), at.clone()]


def counted() -> Made:
    x, unread, count = draw(4), draw(2), torch.zeros((), dtype=torch.int64)
    table = torch.arange(6, dtype=torch.bfloat16).view(2, 3).expand(3, 2, 3)
    with te.record() as tape:
        count.add_(1)
        picked = x[x > 0]
        out = picked.sum() * len(picked) + (table.double() * 2).sum() + torch.zeros_like(x).sum() + count
    return tape.program(inputs=(x, unread), outputs=(out, picked), wrt=[x, unread]), [x.abs().copysign(x), unread]


def swept_twice() -> Made:
    x, w = draw(3), draw(3, 3)
    with te.record() as tape:
        loss = (x @ w).tanh().pow(3).sum()
        te.backward(loss, record=True)
        out = (x.g * w[0]).sum()  # type: ignore[attr-defined]
    return tape.program(inputs=x, outputs=out), [draw(3)]


PROGRAMS: list[Callable[[], Made]] = [
    article, network, written, laid_otherwise, mixed, counted, swept_twice,
]  # fmt: skip


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda f: f.__name__)
def test_a_reader_written_from_the_page_replays_to_the_same_numbers(make: Callable[[], Made], tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, inputs = make()
    program.save(tmp_path / "p.te")
    reader = Reader(tmp_path / "p.te", {"scale": scale.forward})
    loaded = te.load(tmp_path / "p.te", ops=[scale])
    for turn in range(2):
        mine, given = [plain(each) for each in inputs], [plain(each) for each in inputs]
        torch.manual_seed(turn)
        shape, _, dtype = reader.described(reader.it["seed"])
        outputs, gradients = reader.run(mine, torch.ones(shape, dtype=dtype))
        stream = torch.get_rng_state()
        torch.manual_seed(turn)
        got = loaded.step(*given)
        assert torch.equal(stream, torch.get_rng_state())
        for ours, theirs in zip(each_of(outputs), each_of(got), strict=True):
            close(ours, theirs, 1e-6)
        for row, g in zip(reader.it["gradients"], gradients, strict=True):
            target = given[row["input"]] if "input" in row else None
            if target is None:
                name = reader.it["tensors"][row["tensor"]]["name"]
                target = {**loaded.params, **loaded.wrt}[name]
            close(vars(target)["g"], g, 1e-6)
        for ours, theirs in zip(mine, given, strict=True):
            close(ours, theirs)
        by_name = {row["name"]: tensor for row, tensor in zip(reader.it["tensors"], reader.tensors, strict=True)}
        for name, tensor in loaded.params.items():
            close(plain(tensor), plain(by_name[name]), 1e-6)


def each_of(outputs: Any) -> Iterator[Tensor]:
    """The tensors that a program returned."""
    yield from (outputs if isinstance(outputs, tuple) else (outputs,))


def test_the_reader_refuses_what_a_replay_refuses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, (x, unread) = counted()
    program.save(tmp_path / "p.te")
    reader = Reader(tmp_path / "p.te")
    with pytest.raises(Refused):
        reader.run([x.abs() * 0 - 1, unread])
    with pytest.raises(te.GuardError):
        te.load(tmp_path / "p.te")(x.abs() * 0 - 1, unread)


def test_what_the_page_says_of_layouts_is_in_the_file(tmp_path: Path) -> None:
    x = draw(4, 3)
    with te.record() as tape:
        x.reshape(-1).add_(1)
        out = x.sum()
    tape.program(inputs=x, outputs=out).save(tmp_path / "p.te")
    reader = Reader(tmp_path / "p.te")
    ((value, conjugated, negated),) = reader.it["lying"]
    assert reader.described(value)[:2] == ([4, 3], [3, 1])
    assert (conjugated, negated) == (False, False)
    assert value == reader.it["inputs"][0]["value"]
