"""The container of a program file: a safetensors file, whose ``__metadata__`` holds the program as JSON.

Writing is left to the safetensors package. Reading is done here, so that each size is held against the size of
the file before anything of that size is made, and the bytes go straight into the memory of the tensors.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ...errors import DTypeError, LoadError, PathError, SaveError, message
from ...names import call_site, user_frame
from .checked import Place, integer, listed, record, refuse, shown

__all__ = ["FORMAT", "VERSION", "Payload", "opened_file", "path_of", "write"]

Tensor = torch.Tensor

FORMAT, VERSION = "tape_engine program", "1"

#: How the container writes the dtypes. It knows no complex128: that is written as pairs of F64.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

LONGEST_HEADER = 100_000_000  # bytes; the limit that safetensors sets


def path_of(path: Any, caller: str) -> Path:
    """`path` as a path.

    Raises:
        DTypeError: for what is no path.
    """
    try:
        return Path(os.fsdecode(path))
    except TypeError:
        what = f"{caller} takes a path, a string or os.PathLike: not {type(path).__name__}."
        raise DTypeError(message(what, where=call_site(user_frame()), fix=f'{caller}("step.te")')) from None


# -- writing ---------------------------------------------------------------------------------------------------


def write(path: Path, header: dict[str, Any], payload: dict[str, Tensor]) -> None:
    """Writes a program file: whole, or not at all.

    Raises:
        PathError: for a folder that is not there, or a file that cannot be written.
        SaveError: if the header is longer than the container can hold.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        what = "program.save needs the package safetensors, which is not here."
        raise SaveError(message(what, where=call_site(user_frame()), fix="pip install 'tape-engine[files]'")) from None
    text = json.dumps(header, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    if len(text) + text.count('"') + text.count("\\") + (1 << 16) + 256 * len(payload) > LONGEST_HEADER:
        what = f"the program's header would have {len(text):,} characters, and the format ends at 100 million."
        raise SaveError(message(what, where=call_site(user_frame()), fix="freeze a shorter recording"))
    metadata = {"format": FORMAT, "version": VERSION, "program": text}
    with _in_place_of(Path(os.path.realpath(path))) as temporary:
        save_file(payload, temporary, metadata)


@contextmanager
def _in_place_of(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place once it is written in full."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder", str(path))
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))  # less what the umask takes
        try:
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            if path.exists():
                temporary.chmod(mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _path_error(path, "written", error) from error
    except Exception as error:  # of a class of the package's own
        if type(error).__module__.partition(".")[0] != "safetensors":
            raise
        raise _path_error(path, "written", error) from error


def _path_error(path: Path, done: str, error: Exception) -> PathError:
    folder = path.parent
    fix = None
    if not folder.is_dir():
        fix = f"make the folder first: {folder}"
    elif done == "read" and not path.exists():
        fix = "give the path that program.save was given"
    reason = getattr(error, "strerror", None) or str(error)
    what = f"{path} cannot be {done}: {reason[:1].lower()}{reason[1:].rstrip('.')}."
    return PathError(message(what, where=call_site(user_frame()), fix=fix))


# -- reading ---------------------------------------------------------------------------------------------------


class Payload:
    """The tensors of an open file: their dtype and size are known and checked, their bytes not yet read."""

    def __init__(self, file: BinaryIO, start: int, entries: dict[str, tuple[torch.dtype, int, int]]) -> None:
        self._file = file
        self._start = start
        self.entries = entries

    def nbytes(self, name: str) -> int:
        return self.entries[name][2] - self.entries[name][1]

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor, in memory of their own: uint8."""
        _, begin, end = self.entries[name]
        found = torch.empty(end - begin, dtype=torch.uint8)
        self._file.seek(self._start + begin)
        if end > begin and self._file.readinto(found.numpy()) != end - begin:  # type: ignore[attr-defined]
            refuse(("payload", name), "the file ends before it.")
        return found


@contextmanager
def opened_file(path: Path) -> Iterator[tuple[Any, Payload]]:
    """The header of a program file, as JSON gives it, and its payload.

    Raises:
        PathError: for a file that cannot be read.
        LoadError: for one that is not a program file, or not whole.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its other end
            raise OSError(None, "it is no regular file")
        with path.open("rb") as file:
            yield _read(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        if isinstance(error, PathError):
            raise
        raise _path_error(path, "read", error) from error
    except LoadError as error:
        raise LoadError(message(f"{path.name} cannot be loaded.\n  {error}")) from None


def _read(file: BinaryIO, size: int) -> tuple[Any, Payload]:
    if size < 8:
        refuse((), f"the file has {size} bytes: no room for the 8 that tell the length of its header.")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, LONGEST_HEADER):
        refuse((), f"its length is said to be {length} bytes, in a file of {size}: damaged, or no safetensors file.")
    outer = parsed(file.read(length), ("the container",))
    if type(outer) is not dict:
        refuse((), "the header of a safetensors file is an object.")
    metadata = outer.pop("__metadata__", None)
    if type(metadata) is not dict or metadata.get("format") != FORMAT:
        refuse(("__metadata__", "format"), f"{FORMAT!r} is wanted: a safetensors file, but no program file.")
    version = metadata.get("version")
    if version != VERSION:
        fix = "update tape_engine, or save the program again with the version that is here"
        refuse(("__metadata__", "version"), f"this tape_engine reads version {VERSION}, not {shown(version)}.", fix)
    record(metadata, ("__metadata__",), ("format", "version", "program"))
    entries = {name: _entry(each, ("payload", name[:80]), size - 8 - length) for name, each in outer.items()}
    _without_gaps(entries, size - 8 - length)
    if type(metadata["program"]) is not str:
        refuse(("__metadata__", "program"), "a string is wanted.")
    return parsed(metadata["program"], ("the program",)), Payload(file, 8 + length, entries)


def parsed(text: bytes | str, place: Place) -> Any:
    """JSON as the standard has it, in which no key stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    def unknown(constant: str) -> Any:
        raise ValueError(f"{constant} is not in the standard")

    try:
        return json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=unique,
            parse_constant=unknown,
        )
    except RecursionError:
        refuse(place, "nested too deep.")
    except ValueError as error:
        refuse(place, f"no JSON: {str(error)[:120]}.")


def _entry(entry: Any, place: Place, size: int) -> tuple[torch.dtype, int, int]:
    """Dtype, begin and end of a tensor in the payload."""
    record(entry, place, ("dtype", "shape", "data_offsets"))
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        refuse((*place, "dtype"), f"{shown(entry['dtype'])} is no dtype that is known here.")
    shape = [integer(each, (*place, "shape", i)) for i, each in enumerate(listed(entry["shape"], (*place, "shape")))]
    count = 0 if 0 in shape else 1
    for length in shape:
        count *= length
        if count > size:  # no element takes less than a byte
            refuse((*place, "shape"), f"more elements than the file has bytes ({size}).")
    begin, end = [
        integer(each, (*place, "data_offsets", i), 0, size)
        for i, each in enumerate(listed(entry["data_offsets"], (*place, "data_offsets"), 2))
    ]
    if end - begin != count * dtype.itemsize:
        refuse((*place, "data_offsets"), f"{end - begin} bytes, where dtype and shape need {count * dtype.itemsize}.")
    return dtype, begin, end


def _without_gaps(entries: dict[str, tuple[torch.dtype, int, int]], size: int) -> None:
    at = 0
    for name, (_, begin, end) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != at:
            refuse(("payload", name[:80], "data_offsets"), f"it begins at byte {begin}, where {at} is the next.")
        at = end
    if at != size:
        refuse(("payload",), f"it ends at byte {at}, and the file has {size} of them: cut off, or longer than it says.")
