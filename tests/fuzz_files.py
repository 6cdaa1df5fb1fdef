"""Mutations of program files by the hundred thousand: ``python -m tests.fuzz_files --count 300000``.

A file of some program is changed, byte by byte or part by part of its header, and loaded. It must be refused with
`LoadError`, or be a program: the same one, or another that can be printed, saved and loaded again. Anything else
that is raised, a load that takes more than a second, or memory that grows ends the run with status 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import tape_engine as te
from tape_engine.program.file import written

Tensor = torch.Tensor

SECOND = 1.0
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 255, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, -(1 << 63), 10**30, 0.5,
    -0.0, 1e308, "", "x", "float32", "int64", "bool", "cpu", "cuda:0", "meta", "aten::mm.default",
    "aten::from_file.default", "aten::add_.Tensor", "aten::zeros.default", "ops::scale", "tape_engine::lin",
    "__metadata__", "\ud800", "\x00", "\ufb01", "torch", "a\nb", [], [[]], {}, {"value": 0}, {"value": -1},
    {"tuple": []}, {"float": "nan"}, {"dtype": "float64"}, {"device": "cpu"}, {"slice": [0, 1, 2]}, {"dict":
    [["a", 1]]}, {"ellipsis": True}, {"complex": [0.0, 1.0]}, [10**12], [1, 1], [2, 3], "9" * 5000,
)  # fmt: skip


# -- files to begin with ---------------------------------------------------------------------------------------


@te.op
def scale(x: Tensor, factor: float, how: tuple[int, ...] = (1, 2)) -> Tensor:
    """A named operation of the user's; it draws, so that it is not opened up."""
    return x * factor * torch.rand(())


@scale.rule
def scale_grad(g, out, x, factor, how):  # type: ignore[no-untyped-def]
    return g * factor


def product() -> te.Program:
    x, w = torch.randn(3), torch.randn(3)
    with te.record() as tape:
        y = x * w
        out = y.sum()
    program: te.Program = tape.program(inputs=x, outputs=out)
    return program


def article() -> te.Program:
    X, w, b, Y = torch.randn(6, 3), torch.randn(3, 1), torch.randn(1), torch.randn(6)
    with te.record() as tape:
        Z = te.lin(X, w, b)
        U = te.relu(Z)
        C = te.mse(U, Y)
    program: te.Program = tape.program(inputs=(X, Y), outputs=C)
    return program


def network() -> te.Program:
    layers = torch.nn
    net = layers.Sequential(
        layers.Conv2d(1, 2, 2), layers.BatchNorm2d(2), layers.ReLU(), layers.Dropout(), layers.Flatten(),
        layers.Linear(8, 3),
    )  # fmt: skip
    x, labels = torch.randn(2, 1, 3, 3), torch.tensor([0, 2])
    with te.record() as tape:
        loss = torch.nn.functional.cross_entropy(net(x), labels)
    program: te.Program = tape.program(inputs=(x, labels), outputs=loss)
    return program


def writes() -> te.Program:
    both = torch.randn(4, 3)
    x, state, other = torch.randn(3, 3), both[:3], both[1:]
    with te.record() as tape:
        y = x * 2
        y[1] = state[0].sin()
        y.t()[0].mul_(3.0)
        state.add_(y)
        parts = (y @ other).unbind(0)
        out = parts[0].sum() * parts[2].amax() + torch.stack(parts).chunk(2)[0].sum()
    program: te.Program = tape.program(inputs=x, outputs=(out, y))
    return program


def mixed() -> te.Program:
    x, z, table = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.complex128), torch.randn(4, 2)
    at = torch.tensor([1, 3, 1])
    with te.record() as tape:
        with te.scope("head"):
            y = torch.fft.fft(x * z).abs().sum() * float("inf" if x.sum().item() > 1e9 else 1.5)
        half = scale(table[at], 0.5).half()
        total = y + half.sum().double() + torch.where(x > 0, x, x * -1.0).max() + x[::2].sum()
    program: te.Program = tape.program(inputs=(x, at), outputs=total, wrt=[x, table, y])
    return program


def strided() -> te.Program:
    x, w = torch.randn(3, 2), torch.randn(2, 3).t()
    with te.record() as tape:
        h = x * w
        flat = h.reshape(-1)
        flat.add_(1)
        out = (h * flat.view(3, 2)).sum()
    program: te.Program = tape.program(inputs=x, outputs=out)
    return program


SEEDS: dict[str, Callable[[], te.Program]] = {
    "product": product, "article": article, "network": network, "writes": writes, "mixed": mixed,
    "strided": strided,
}  # fmt: skip


def corpus(folder: Path) -> dict[str, bytes]:
    """The files from which mutations are made."""
    torch.manual_seed(0)
    found = {}
    for name, make in SEEDS.items():
        path = folder / f"{name}.te"
        make().save(path)
        found[name] = path.read_bytes()
    return found


# -- mutations -------------------------------------------------------------------------------------------------


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The container's header without the program, the program's, and the payload."""
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer["__metadata__"].pop("program"))
    return outer, inner, data[8 + length :]


def joined(outer: dict[str, Any], inner: Any, payload: bytes) -> bytes:
    """A file of these parts."""
    outer = copy.deepcopy(outer)
    if isinstance(outer.get("__metadata__"), dict):
        outer["__metadata__"]["program"] = inner if isinstance(inner, str) else json.dumps(inner)
    text = json.dumps(outer).encode()
    return len(text).to_bytes(8, "little") + text + payload


def places(tree: Any, dice: random.Random) -> tuple[Any, Any]:
    """A random container in a JSON tree with one of its keys."""
    here = tree
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return None, None
        key = dice.choice(keys)
        below = here[key]
        if not isinstance(below, (dict, list)) or not below or dice.random() < 0.15:
            return here, key
        here = below


def change(tree: Any, dice: random.Random) -> None:
    """One change somewhere in a JSON tree."""
    here, key = places(tree, dice)
    if here is None:
        return
    how = dice.randrange(9)
    there, other = places(tree, dice)
    if how == 0:
        del here[key]
    elif how == 1 and there is not None:
        here[key] = copy.deepcopy(there[other])
    elif how == 2 and isinstance(here[key], int):
        here[key] += dice.choice((-2, -1, 1, 2, 7, 1 << 40))
    elif how == 3 and isinstance(here, list):
        here.insert(key, copy.deepcopy(here[key]))
    elif how == 4 and isinstance(here, list):
        dice.shuffle(here)
    elif how == 5 and isinstance(here, dict):
        here[dice.choice(("x", "value", "device", "guard", "kwargs", "inputs", "gaps", "tensor"))] = here[key]
    elif how == 6 and isinstance(here[key], str) and here[key]:
        at = dice.randrange(len(here[key]))
        here[key] = here[key][:at] + chr(dice.choice((32, 48, 65, 95, 0x2028, 0xD800, 0x1F600))) + here[key][at + 1 :]
    elif how == 7:
        deep: Any = here[key]
        for _ in range(dice.choice((1, 3, 70, 2000 if dice.random() < 0.05 else 5))):
            deep = [deep]
        here[key] = deep
    else:
        here[key] = copy.deepcopy(dice.choice(NASTY))


def mutated(data: bytes, dice: random.Random) -> bytes:
    """A mutation of a file."""
    try:
        return changed(data, dice)
    except (RecursionError, ValueError):  # nested deeper than json and copy can follow
        return data[: dice.randrange(len(data))]


def changed(data: bytes, dice: random.Random) -> bytes:
    """A file with some bytes changed, or some parts."""
    how = dice.random()
    if how < 0.2:
        return scratched(data, dice)
    outer, inner, payload = parts(data)
    if how < 0.3:
        metadata = outer.pop("__metadata__")
        for _ in range(dice.randrange(1, 3)):
            change(outer, dice)
        outer["__metadata__"] = metadata
        if dice.random() < 0.1:
            change(metadata, dice)
    elif how < 0.35:
        payload = scratched(payload, dice) if payload else b"\0"
    else:
        for _ in range(dice.choice((1, 1, 1, 1, 2, 3))):
            change(inner, dice)
    return joined(outer, inner, payload)


def scratched(data: bytes, dice: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, or cut off."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at = dice.randrange(len(found)) if found else 0
        how = dice.randrange(6)
        if how == 0:
            found[at : at + 1] = bytes([dice.randrange(256)])
        elif how == 1 and found:
            found[at] ^= 1 << dice.randrange(8)
        elif how == 2:
            del found[at : at + dice.choice((1, 2, 8, 100))]
        elif how == 3:
            found[at:at] = found[at : at + dice.choice((1, 8, 50))]
        elif how == 4:
            found[at:at] = dice.choice((b"[" * 300, b'"', b"{", b"}", b"9" * 30, b"1e999", b"NaN", b"\\ud800", b"\0"))
        elif dice.random() < 0.2:
            del found[at:]
        elif len(found) >= 8:
            found[:8] = dice.choice((0, 1, 1 << 63, len(found), at, 1 << 27)).to_bytes(8, "little")
    return bytes(found)


# -- what comes of them ----------------------------------------------------------------------------------------


def outcome(path: Path, data: bytes, *, run: bool = False) -> tuple[str, float]:
    """What became of a file, and the seconds of processor time that loading took.

    Raises:
        Exception: whatever loading raises that it should not.
    """
    path.write_bytes(data)
    began = time.process_time()  # of this process alone: others may be busy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", te.TapeWarning)
            program = te.load(path, ops=[scale])
    except te.LoadError:
        return "refused", time.process_time() - began
    taken = time.process_time() - began
    frozen = program._frozen
    again = written(frozen, copy=program._copy, shared=program._given.shared)  # whatever was loaded can be saved
    original = next((each for each in ORIGINALS if each == again.header), None)
    repr(program), str(program.tape), program.params, program.wrt
    if run:
        replayed(program)
    return ("equal" if original is not None else "another"), taken


#: The headers of the files of the corpus, as loading and saving gives them.
ORIGINALS: list[dict[str, Any]] = []


def replayed(program: te.Program) -> None:
    """Replays a program that needs no more than some megabytes; it may refuse, as running the code might."""
    frozen = program._frozen
    values = {v for node in (*frozen.forward, *frozen.backward) for v in (*node.inputs, *node.outputs)}
    if sum(v.nbytes for v in values) + sum(t.numel() * t.element_size() for t in frozen.given) > 1 << 22:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = [torch.ones(t.shape, dtype=t.dtype) for t in frozen.given]
            _ = program.code
            seed = torch.ones(frozen.seed.shape, dtype=frozen.seed.dtype)
            program.step(*inputs, seed=seed) if frozen.gradients else program(*inputs)
    except (te.TapeError, RuntimeError, IndexError, ValueError, TypeError):
        return


def fuzz(count: int, seed: int, *, run: bool = False, report: Callable[[int, Counter[str]], None] | None = None) -> Any:
    """Makes and loads `count` mutations; gives the outcomes, the slowest load with its number, and the failures."""
    outcomes: Counter[str] = Counter()
    slowest, failures = (0.0, -1), list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = list(corpus(folder).values())
        ORIGINALS[:] = []
        for i, data in enumerate(files):
            (folder / "one.te").write_bytes(data)
            program = te.load(folder / "one.te", ops=[scale])
            again = written(program._frozen, copy=True, shared=program._given.shared)
            ORIGINALS.append(again.header)
            assert outcome(folder / "one.te", data)[0] == "equal", f"file {i}"
        path, weights = folder / "mutated.te", [1 / len(data) for data in files]  # as many of each in the same time
        for i in range(count):
            dice = random.Random(seed * 1_000_003 + i)
            data = mutated(dice.choices(files, weights)[0], dice)
            try:
                what, taken = outcome(path, data, run=run)
            except Exception:
                what, taken = "FAILED", 0.0
                failures.append(f"mutation {i} of seed {seed}:\n{traceback.format_exc()}")
            outcomes[what] += 1
            slowest = max(slowest, (taken, i))
            if report is not None and (i + 1) % 10_000 == 0:
                report(i + 1, outcomes)
    return outcomes, slowest, failures


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz_files", description=__doc__)
    options.add_argument("--count", type=int, default=100_000, help="mutations (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="another seed makes other mutations")
    options.add_argument("--run", action="store_true", help="replay what was loaded, too, if it is small")
    given = options.parse_args(argv)
    torch.set_num_threads(1)
    fuzz(200, 1, run=given.run)  # what is loaded at first use
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()

    def report(done: int, outcomes: Counter[str]) -> None:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        print(f"{done:,}: {dict(outcomes)}; {time.perf_counter() - began:.0f} s, {grown:.0f} MB more", flush=True)

    outcomes, (slowest, number), failures = fuzz(given.count, given.seed, run=given.run, report=report)
    report(given.count, outcomes)
    print(f"slowest load: {slowest:.3f} s (mutation {number})")
    for failure in failures[:20]:
        print(failure)
    return 1 if failures or slowest > SECOND else 0


if __name__ == "__main__":
    sys.exit(main())
