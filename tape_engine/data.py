"""Handwritten digits: the set that scikit-learn bundles, and MNIST from a folder or the internet.

Every reader returns `Digits`: images as rows of a float32 matrix with elements from 0 to 1, their labels, and the
names of the classes. Nothing in a file is trusted: what an IDX header says is held against what the file has before
memory is taken for it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import DataError, DTypeError, message

__all__ = ["Digits", "digits", "download_mnist", "load", "mnist_folder"]


@dataclass(frozen=True, eq=False)
class Digits:
    """Images of digits and what they show.

    Attributes:
        images: `(N, D)` float32, a row an image, its pixels line by line, 0 (paper) to 1 (ink).
        labels: `(N,)` int64, which digit each image shows.
        names: the names of the classes; ``names[label]`` is the digit as text.
        size: height and width of an image in pixels; their product is `D`.
        source: where they came from, for a report.
        test: images held out for testing, where the set has such a part.
    """

    images: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...]
    size: tuple[int, int]
    source: str
    test: Digits | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        held = f", {len(self.test)} for testing" if self.test is not None else ""
        return f"<digits: {len(self)} images of {self.size[0]} x {self.size[1]}{held}, from {self.source}>"


NAMES = tuple("0123456789")


def load(which: str | os.PathLike[str]) -> Digits:
    """The digits that `which` names: ``"digits"``, ``"mnist"``, or a folder of IDX files.

    ``"digits"`` is the set bundled with scikit-learn, ``"mnist"`` is downloaded once (see `download_mnist`).

    Raises:
        DataError: there is no such folder, or what it holds is not MNIST's files; no download was possible.
        DTypeError: `which` is neither text nor a path.
    """
    if which == "digits":
        return digits()
    if which == "mnist":
        return mnist_folder(download_mnist())
    if not isinstance(which, (str, os.PathLike)):
        raise DTypeError(
            message(
                f"load: a data set is named by text or a path, not by {type(which).__name__}.",
                fix='load("digits"), load("mnist") or load(FOLDER)',
            )
        )
    return mnist_folder(which)


def digits() -> Digits:
    """1,797 digits of 8 x 8 pixels, as scikit-learn bundles them: no file or network is needed.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _error(
            "digits: the bundled set comes with scikit-learn, which is not here.", [], "pip install scikit-learn"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.data).to(torch.float32).div_(16)  # 17 levels of ink
    return Digits(images, torch.from_numpy(bunch.target).to(torch.int64), NAMES, (8, 8), "scikit-learn's digits")


# -- IDX files ---------------------------------------------------------------------------------------------

# An IDX file: two bytes 0, a byte for the type of the elements (8: unsigned bytes), a byte for the number of
# dimensions, each dimension in four bytes, most significant first, then the elements, the last dimension fastest.
UNSIGNED_BYTES = 8
LARGEST = 2**30  # bytes of elements; MNIST's largest file has 47 million
MOST_PACKED = 1032  # deflate makes no more than so many bytes of one

IMAGES = ("images", 3)
LABELS = ("labels", 1)


def mnist_folder(folder: str | os.PathLike[str]) -> Digits:
    """MNIST (or a set in its form) from a folder of IDX files, gzipped or not.

    Reads ``train-images-idx3-ubyte`` with ``train-labels-idx1-ubyte`` and ``t10k-images-idx3-ubyte`` with
    ``t10k-labels-idx1-ubyte``; also with ``.idx`` in place of ``-idx``, and ``.gz`` at the end. Where both pairs
    are there, the second is `Digits.test`; one of them is enough. A folder made by torchvision is fine: its
    ``MNIST/raw`` is looked into.

    Raises:
        DataError: the folder or a file is missing, or a file is not what its name says.
    """
    given = Path(folder).expanduser()
    if not given.is_dir():
        found = "a file" if given.exists() else "nothing there"
        raise _error(
            "data: this is not a folder of IDX files.",
            [(str(folder), found)],
            'a folder with train-images-idx3-ubyte.gz and its labels; or the words "digits" and "mnist"',
        )
    try:
        return _read_folder(given)
    except OSError as error:
        raise _error(
            f"data: {given} cannot be read.",
            [(type(error).__name__, str(error))],
            "allow it to be read, or copy it to a place of your own",
        ) from error


def _read_folder(given: Path) -> Digits:
    """The first set that lies in `given`, or where torchvision would put it below."""
    for place in (given, given / "raw", given / "MNIST" / "raw"):
        parts = {split: part for split in ("train", "t10k") if (part := _read_split(place, split)) is not None}
        if "train" in parts and "t10k" in parts:
            if parts["train"].size != parts["t10k"].size:
                raise _error(
                    f"data: the two halves of {place} are of different sizes.",
                    [(split, f"{part.size[0]} x {part.size[1]} pixels") for split, part in parts.items()],
                    "keep the files of one set in one folder",
                )
            train = parts["train"]
            return Digits(train.images, train.labels, NAMES, train.size, train.source, parts["t10k"])
        if parts:
            return next(iter(parts.values()))
    files = sorted(path.name for path in given.iterdir())
    raise _error(
        f"data: no IDX files of MNIST in {given}.",
        [
            ("expected", "train-images-idx3-ubyte[.gz], or t10k-images-idx3-ubyte[.gz]"),
            ("found", ", ".join([*files[:6], *(["..."] if len(files) > 6 else [])]) or "an empty folder"),
        ],
        'give the folder of the files themselves, or use the bundled "digits"',
    )


def _read_split(folder: Path, split: str) -> Digits | None:
    """The images of ``train`` or ``t10k`` in `folder`; ``None`` if there are none."""
    paths = {}
    for kind, ndim in (IMAGES, LABELS):
        names = [f"{split}-{kind}{mark}idx{ndim}-ubyte{end}" for end in ("", ".gz") for mark in "-."]
        paths[kind] = next((path for name in names if (path := folder / name).is_file()), None)
    images_path, labels_path = paths["images"], paths["labels"]
    if images_path is None and labels_path is None:
        return None
    if images_path is None or labels_path is None:
        missing, there = ("images", labels_path) if images_path is None else ("labels", images_path)
        ndim = dict([IMAGES, LABELS])[missing]
        raise _error(
            f"data: {there} has no {missing} beside it.",
            [("expected", f"{split}-{missing}-idx{ndim}-ubyte, or the same with .gz")],
            f"put the file of the {missing} into the same folder",
        )
    images = _read_idx(images_path, *IMAGES)
    labels = _read_idx(labels_path, *LABELS)
    if len(images) != len(labels):
        raise _error(
            "data: there are not as many labels as images.",
            [(images_path.name, f"{len(images)} images"), (labels_path.name, f"{len(labels)} labels")],
            f"take both files of one set ({folder})",
        )
    if int(labels.max()) >= len(NAMES):
        row = int((labels >= len(NAMES)).nonzero()[0])
        raise _damaged(labels_path, "labels from 0 to 9", f"label {int(labels[row])} at row {row}")
    count, height, width = images.shape
    pixels = images.reshape(count, height * width).to(torch.float32).div_(255)
    return Digits(pixels, labels.to(torch.int64), NAMES, (height, width), str(images_path))


def _read_idx(path: Path, kind: str, ndim: int) -> torch.Tensor:
    """The unsigned bytes of an IDX file of `ndim` dimensions, none of them empty."""
    try:
        packed = path.stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            magic = bytes([0, 0, UNSIGNED_BYTES, ndim])
            if header[:4] != magic:
                expected = f"the first bytes {magic.hex(' ')} ({kind}: unsigned bytes in {ndim} dimensions)"
                raise _damaged(path, expected, header[:4].hex(" ") or "an empty file")
            if len(header) < 4 + 4 * ndim:
                raise _damaged(path, f"a header of {4 + 4 * ndim} bytes", f"{len(header)} bytes")
            sizes = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
            shown = " x ".join(map(str, sizes))
            count = math.prod(sizes)
            if not 0 < count <= LARGEST:
                raise _damaged(path, f"1 to {LARGEST} elements", f"a header that tells of {shown}")
            room = packed * MOST_PACKED if path.suffix == ".gz" else packed - len(header)
            if count > room:
                raise _damaged(path, f"{shown} elements, as its header says", f"a file of {packed} bytes")
            # one byte more than there should be, so that a file that goes on is noticed
            elements = bytearray().join(_pieces(file, count + 1))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, "a whole gzip file", str(error)) from error
    if len(elements) != count:
        found = f"{len(elements)}" if len(elements) < count else "more"
        raise _damaged(path, f"{shown} = {count} elements, as its header says", found)
    return torch.frombuffer(elements, dtype=torch.uint8).reshape(sizes)


def _pieces(file: io.BufferedIOBase, most: int) -> Iterator[bytes]:
    """What `file` has left, up to `most` bytes, piece by piece: memory is taken for what is there alone."""
    while most > 0 and (piece := file.read(min(most, 1 << 20))):
        most -= len(piece)
        yield piece


def _damaged(path: Path, expected: str, found: str) -> DataError:
    operands = [("expected", expected), ("found", found)]
    return _error(f"data: {path} is not what its name says.", operands, "copy or download the file again, whole")


def _error(what: str, operands: Iterable[tuple[str, str]], fix: str) -> DataError:
    return DataError(message(what, operands=operands, fix=fix))


# -- the download ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Remote:
    """A file as published: its length in bytes and its MD5 sum."""

    name: str
    size: int
    md5: str


#: The four files of MNIST.
FILES = (
    _Remote("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    _Remote("train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
    _Remote("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
    _Remote("t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
)

#: Where they lie, tried in turn.
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

TIMEOUT = 20.0  # seconds without a byte


def cache_folder() -> Path:
    """Where downloads are kept: ``tape-engine`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"  # as XDG says: a relative one is ignored
    return base / "tape-engine"


def download_mnist(
    to: str | os.PathLike[str] | None = None, *, mirrors: Sequence[str] = MIRRORS, timeout: float = TIMEOUT
) -> Path:
    """Downloads the four files of MNIST into `to`, 11 MB in all, and gives the folder.

    A file that is there already and has the right checksum is not fetched again. Each file is written beside its
    place and moved there only when its checksum is right, so the folder never holds half a file. On a terminal the
    progress is shown.

    Args:
        to: the folder; by default one in the user's cache (``$XDG_CACHE_HOME``, ``~/.cache``).
        mirrors: addresses of folders that hold the files, tried in turn.
        timeout: seconds without a byte after which a mirror is given up.

    Raises:
        DataError: no mirror gave a file whole, or `to` cannot be written.
    """
    folder = Path(to).expanduser() if to is not None else cache_folder() / "mnist"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [file for file in FILES if not _is_whole(folder / file.name, file)]
        if wanted:
            with _progress(sum(file.size for file in wanted)) as advance:
                for file in wanted:
                    _fetch(file, folder, mirrors, timeout, advance)
    except OSError as error:
        raise _error(
            f"data: MNIST cannot be kept in {folder}.",
            [(type(error).__name__, str(error))],
            "set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return folder


def _is_whole(path: Path, file: _Remote) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return _md5(path.read_bytes()) == file.md5


def _fetch(file: _Remote, folder: Path, mirrors: Sequence[str], timeout: float, advance: Callable[[int], None]) -> None:
    """Downloads one file into `folder` from the first mirror that gives it whole."""
    failed: list[tuple[str, str]] = []
    for mirror in mirrors:
        body = bytearray()
        why = _download(mirror.rstrip("/") + "/" + file.name, body, file.size, timeout, advance)
        if why is None and len(body) != file.size:
            found = "more" if len(body) > file.size else f"{len(body)}"
            why = f"gave {found}, expected {file.size} bytes"
        if why is None and (found := _md5(body)) != file.md5:
            why = f"gave another file: its MD5 is {found}, expected {file.md5}"
        if why is None:
            _write_whole(folder / file.name, body)
            return
        failed.append((mirror, why))
        advance(-len(body))
    raise _error(
        f"data: {file.name} could not be downloaded.",
        failed,
        "without internet: --data FOLDER with MNIST's IDX files, or --data digits, which needs no download",
    )


def _download(address: str, body: bytearray, size: int, timeout: float, advance: Callable[[int], None]) -> str | None:
    """Adds what lies at `address` to `body`, little more than `size` bytes; why it broke off, if it did."""
    request = urllib.request.Request(address, headers={"User-Agent": "tape-engine"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            while len(body) <= size and (piece := answer.read(1 << 16)):
                body += piece
                advance(len(piece))
    except urllib.error.HTTPError as error:
        error.close()
        return f"answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"not reached: {error.reason}"
    except TimeoutError:
        return f"was silent for {timeout:g} s, after {len(body)} bytes"
    except (OSError, http.client.HTTPException) as error:
        return f"broke off after {len(body)} bytes: {' '.join(str(error).split())}"
    return None


def _write_whole(path: Path, body: bytes | bytearray) -> None:
    """Writes a file so that it is never seen in part: beside its place, then moved there."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(body)
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)


def _md5(body: bytes | bytearray) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of `total` bytes on the terminal; where there is none, nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("MNIST"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("MNIST", total=total)
        yield lambda count: progress.advance(task, count)
