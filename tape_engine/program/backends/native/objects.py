"""Kernels as machine code: compiled once for a machine, kept in the user's cache folder, loaded when asked for.

A kernel's file is named by a digest of all that its machine code depends on: its source, the version of
llvmlite, the processor. It begins with a digest of its content, so that a damaged one is known and made anew; it is
written beside its name and then renamed, so that two processes never see half of one. Where no folder can be
written to, kernels live as long as the process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import builder, kernels

__all__ = ["CACHE_VARIABLE", "Loaded", "available", "folder", "load", "loaded"]

#: The environment variable that names the folder to keep kernels in; empty: keep none.
CACHE_VARIABLE = "TAPE_ENGINE_CACHE"

MAGIC = b"tape_engine kernel 1\n"

#: What makes machine code of a kernel's source: each part of its digest.
SOURCES = ("builder.py", "drivers.py", "kernels.py", "scalars.py", "tiles.py", "translator.py")


@functools.cache
def available() -> bool:
    """Whether llvmlite is installed; it is not imported for that."""
    return importlib.util.find_spec("llvmlite") is not None


def folder() -> Path | None:
    """Where kernels are kept: in the user's cache folder, and nowhere that another user may write to."""
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None and not named:
        return None
    try:
        if named:
            path = Path(named)
        elif sys.platform == "win32":
            path = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tape_engine"
        elif sys.platform == "darwin":
            path = Path.home() / "Library" / "Caches" / "tape_engine"
        else:
            path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tape_engine"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid"):
            told = path.stat()
            if told.st_uid != os.getuid() or told.st_mode & 0o022:
                return None
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        return None
    return path


class Loaded:
    """The kernels of this process: an address for each name.

    Attributes:
        seconds: what compiling took so far; `compiled` and `read` count the kernels made and found.
    """

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.seconds = 0.0
        self.compiled = 0
        self.read = 0
        self._lock = threading.RLock()
        self._engine: Any = None
        self._machine: Any = None
        self._about = b""

    def load(self, names: Iterable[str]) -> dict[str, int]:
        """The addresses of kernels, compiled or read where they are not there yet."""
        with self._lock:
            missing = sorted({*names} - self.addresses.keys())
            if missing:
                start = time.perf_counter()
                self._add(missing)
                self.seconds += time.perf_counter() - start
            return self.addresses

    def _add(self, names: list[str]) -> None:
        self._start()
        objects = {name: found for name in names if (found := self._read(name)) is not None}
        self.read += len(objects)
        absent = [name for name in names if name not in objects]
        if absent:
            objects.update(self._compile(absent))
            self.compiled += len(absent)
        import llvmlite.binding as llvm

        for _, code in objects.values():
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        for name, (symbol, _) in objects.items():
            self.addresses[name] = self._engine.get_function_address(symbol)

    def _start(self) -> None:
        if self._engine is not None:
            return
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        target = llvm.Target.from_default_triple()
        self._machine = target.create_target_machine(
            cpu=cpu, features=features, opt=3, reloc="default", codemodel="jitdefault"
        )
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._machine)
        about = [cpu, features, target.triple, importlib.metadata.version("llvmlite"), f"{sys.version_info[:2]}"]
        texts = [pkgutil.get_data(__package__, name) or b"" for name in SOURCES]
        self._about = hashlib.sha256("\n".join(about).encode() + b"".join(texts)).digest()

    def _file(self, name: str) -> Path | None:
        place = folder()
        if place is None:
            return None
        digest = hashlib.sha256(self._about + name.encode() + kernels.sources(name).encode()).hexdigest()
        return place / f"{name}-{digest[:32]}.kernel"

    def _read(self, name: str) -> tuple[str, bytes] | None:
        file = self._file(name)
        if file is None:
            return None
        try:
            content = file.read_bytes()
        except OSError:
            return None
        start, digest, rest = content[: len(MAGIC)], content[len(MAGIC) :][:32], content[len(MAGIC) + 32 :]
        if start != MAGIC or hashlib.sha256(rest).digest() != digest:
            return None
        symbol, _, code = rest.partition(b"\n")
        return symbol.decode(), code

    def _compile(self, names: list[str]) -> dict[str, tuple[str, bytes]]:
        made = {}
        for name in names:
            own = f"tape_engine_{name}"
            made[name] = own, self._machine.emit_object(builder.build(name, own, self._machine))
            self._write(name, *made[name])
        return made

    def _write(self, name: str, symbol: str, code: bytes) -> None:
        file = self._file(name)
        if file is None:
            return
        rest = symbol.encode() + b"\n" + code
        try:
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
                part.write(MAGIC + hashlib.sha256(rest).digest() + rest)
            try:
                os.replace(part.name, file)
            except OSError:
                os.unlink(part.name)
        except OSError:  # a full disk, a folder that may not be written to: it is compiled again next time
            return


_loaded = Loaded()


def load(names: Iterable[str]) -> dict[str, int]:
    """The addresses of kernels in this process."""
    return _loaded.load(names)


def loaded() -> Loaded:
    """The kernels of this process."""
    return _loaded
