"""The readers are held against files written here byte by byte, the download against a server of this process."""

from __future__ import annotations

import errno
import gzip
import hashlib
import re
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tape_engine import data
from tape_engine.errors import DataError, DTypeError, TapeError

#: MNIST's test half as published, where a checkout has it beside it.
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "mnist"


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file of `array`, as the format's description has it."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def made(count: int = 7, height: int = 5, width: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, height, width)), generator.integers(0, 10, count)


def write(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def write_split(
    folder: Path, split: str, mark: str = "-", end: str = "", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = made(seed=seed)
    write(folder, f"{split}-images{mark}idx3-ubyte{end}", idx(images))
    write(folder, f"{split}-labels{mark}idx1-ubyte{end}", idx(labels))
    return images, labels


def assert_holds(read: data.Digits, images: np.ndarray, labels: np.ndarray) -> None:
    assert read.images.dtype == torch.float32
    assert read.labels.dtype == torch.int64
    assert read.images.shape == (len(images), images[0].size)
    assert read.size == images[0].shape
    np.testing.assert_allclose(read.images.double().numpy() * 255, images.reshape(len(images), -1), atol=1e-4)
    assert read.labels.tolist() == labels.tolist()


# -- the bundled set ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [data.digits, lambda: data.load("digits")])
def test_digits_are_those_of_scikit_learn(read: Callable[[], data.Digits]) -> None:
    found = read()
    bundled = load_digits()
    assert found.images.shape == (1797, 64)
    assert found.images.dtype == torch.float32
    assert found.labels.dtype == torch.int64
    assert (float(found.images.min()), float(found.images.max())) == (0.0, 1.0)
    assert np.array_equal(found.images.numpy() * 16, bundled.images.reshape(1797, 64))
    assert found.labels.tolist() == bundled.target.tolist()
    assert [found.names[label] for label in found.labels[:3]] == ["0", "1", "2"]
    assert repr(found) == "<digits: 1797 images of 8 x 8, from scikit-learn's digits>"
    assert len(found) == 1797


def test_digits_are_the_callers_own() -> None:
    data.digits().images.zero_()
    assert data.digits().images.sum() > 0


# -- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("split", ["train", "t10k"])
def test_one_half_is_enough(tmp_path: Path, split: str, mark: str, end: str) -> None:
    images, labels = write_split(tmp_path, split, mark, end)
    found = data.mnist_folder(tmp_path)
    assert_holds(found, images, labels)
    assert found.test is None


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_both_halves(tmp_path: Path, below: str) -> None:
    train = write_split(tmp_path / below, "train", seed=1)
    test = write_split(tmp_path / below, "t10k", ".", ".gz", seed=2)
    found = data.load(str(tmp_path))
    assert_holds(found, *train)
    assert found.test is not None
    assert_holds(found.test, *test)
    assert "7 images of 5 x 3, 7 for testing" in repr(found)


def test_a_folder_may_be_called_like_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_split(tmp_path / "digits", "train")
    monkeypatch.chdir(tmp_path)
    assert_holds(data.load("./digits"), images, labels)
    assert_holds(data.load(Path("digits")), images, labels)


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_split(tmp_path / "mine", "train")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert_holds(data.load("~/mine"), images, labels)


def test_published_files() -> None:
    """The checksums and lengths are those of the files that are there; every one of them reads."""
    assert len({file.name for file in data.FILES}) == 4
    there = [file for file in data.FILES if (PUBLISHED / file.name).is_file()]
    for file in there:
        content = (PUBLISHED / file.name).read_bytes()
        assert (len(content), hashlib.md5(content).hexdigest()) == (file.size, file.md5)
    if {file.name for file in there} >= {"t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"}:
        found = data.mnist_folder(PUBLISHED)
        found = found.test or found
        assert found.images.shape == (10_000, 784)
        assert found.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        raw = gzip.decompress((PUBLISHED / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
        assert int((found.images * 255).round().to(torch.int64).sum()) == sum(raw)


# -- what is not as it should be ------------------------------------------------------------------------------


def header(*sizes: int, magic: tuple[int, ...] | None = None) -> bytes:
    return bytes(magic or (0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes)


IMAGES, LABELS = (idx(array) for array in made())

BROKEN = {
    "empty": (b"", LABELS, "images", "00 00 08 03", "an empty file"),
    "another magic": (b"\x89PNG" + IMAGES[4:], LABELS, "images", "00 00 08 03", "89 50 4e 47"),
    "labels as images": (LABELS, LABELS, "images", "3 dimensions", "00 00 08 01"),
    "images as labels": (IMAGES, IMAGES, "labels", "1 dimensions", "00 00 08 03"),
    "floats": (header(7, 5, 3, magic=(0, 0, 13, 3)), LABELS, "images", "unsigned bytes", "00 00 0d 03"),
    "half a header": (IMAGES[:10], LABELS, "images", "a header of 16 bytes", "10 bytes"),
    "short": (IMAGES[:-1], LABELS, "images", "7 x 5 x 3", None),
    "long": (IMAGES + b"\0", LABELS, "images", "7 x 5 x 3 = 105 elements", "more"),
    "no images": (header(0, 5, 3), LABELS, "images", "1 to", "0 x 5 x 3"),
    "no pixels": (header(7, 0, 3), LABELS, "images", "1 to", "7 x 0 x 3"),
    "no labels": (IMAGES, header(0), "labels", "1 to", "0"),
    "huge": (header(2**32 - 1, 2**32 - 1, 2**32 - 1), LABELS, "images", "1 to", "4294967295 x 4294967295"),
    "larger than the file": (header(2**20, 28, 28), LABELS, "images", "1048576 x 28 x 28", "a file of"),
    "a label that is no digit": (IMAGES, LABELS[:-1] + b"\x0a", "labels", "0 to 9", "label 10 at row 6"),
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, name: str, end: str) -> None:
    images, labels, which, expected, found = BROKEN[name]
    paths = {
        "images": write(tmp_path, f"train-images-idx3-ubyte{end}", images),
        "labels": write(tmp_path, f"train-labels-idx1-ubyte{end}", labels),
    }
    with pytest.raises(DataError) as caught:
        data.mnist_folder(tmp_path)
    said = str(caught.value)
    first, told_expected, told_found, fix = said.splitlines()
    assert first == f"data: {paths[which]} is not what its name says."
    assert "expected" in told_expected
    assert expected in told_expected
    assert "found" in told_found
    assert found is None or found in told_found
    assert fix == "  fix: copy or download the file again, whole"


def test_a_message_word_for_word(tmp_path: Path) -> None:
    write(tmp_path, "train-images-idx3-ubyte", idx(made(4, 2, 2)[0]))
    write(tmp_path, "train-labels.idx1-ubyte.gz", idx(made(3)[1]))
    with pytest.raises(DataError) as caught:
        data.mnist_folder(tmp_path)
    assert str(caught.value) == (
        "data: there are not as many labels as images.\n"
        "  train-images-idx3-ubyte       4 images\n"
        "  train-labels.idx1-ubyte.gz    3 labels\n"
        f"  fix: take both files of one set ({tmp_path})"
    )


@pytest.mark.parametrize(
    "damage", [lambda z: z[:-9], lambda z: z[:20], lambda z: z[:12] + b"\xff" * 9 + z[21:], lambda z: b"no"]
)
def test_a_damaged_gzip_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_split(tmp_path, "t10k", end=".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path.name} is not what its name says"):
        data.mnist_folder(tmp_path)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    "content",
    [
        header(2**32 - 1, 2**32 - 1, 2**32 - 1),
        header(2**15, 2**7, 2**7) + bytes(64),  # within the limit on elements, but not in the file
        header(1, 2, 2) + bytes(2**25),  # a few bytes announced, and no end of them
    ],
    ids=["huge", "announced", "endless"],
)
def test_memory_is_taken_for_what_is_there(tmp_path: Path, content: bytes, end: str) -> None:
    write_split(tmp_path, "train", end=end)
    write(tmp_path, f"train-images-idx3-ubyte{end}", content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="is not what its name says"):
            data.mnist_folder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("gone", ["images-idx3", "labels-idx1"])
def test_a_missing_half_of_a_pair(tmp_path: Path, gone: str) -> None:
    write_split(tmp_path, "train")
    (tmp_path / f"train-{gone}-ubyte").unlink()
    with pytest.raises(DataError) as caught:
        data.mnist_folder(tmp_path)
    assert f"has no {gone.partition('-')[0]} beside it" in str(caught.value)
    assert f"train-{gone}-ubyte, or the same with .gz" in str(caught.value)


def test_halves_of_different_sizes(tmp_path: Path) -> None:
    write_split(tmp_path, "train")
    images, labels = made(height=4)
    write(tmp_path, "t10k-images-idx3-ubyte", idx(images))
    write(tmp_path, "t10k-labels-idx1-ubyte", idx(labels))
    with pytest.raises(DataError, match=r"train +5 x 3 pixels\n  t10k +4 x 3 pixels"):
        data.mnist_folder(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"minst +nothing there\n  fix: .*\"digits\" and \"mnist\""):
        data.load(tmp_path / "minst")
    with pytest.raises(DataError, match=r"x +a file"):
        data.load(write(tmp_path, "x", b""))
    with pytest.raises(DataError, match=r"found +x\n"):
        data.load(tmp_path)
    (tmp_path / "x").unlink()
    with pytest.raises(DataError, match=r"found +an empty folder\n"):
        data.load(tmp_path)


def test_a_set_is_named_by_text_or_a_path() -> None:
    with pytest.raises(DTypeError, match="not by int"):
        data.load(3)  # type: ignore[arg-type]


def test_errors_are_the_engines_and_the_builtins() -> None:
    assert issubclass(DataError, TapeError)
    assert issubclass(DataError, ValueError)


# -- the download ------------------------------------------------------------------------------------------------


class Server:
    """A mirror in this process: `files` by name; `treat` may answer a request in a way of its own."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.treat: Callable[[BaseHTTPRequestHandler, bytes], None] = self.answer
        self.address = ""

    @staticmethod
    def answer(request: BaseHTTPRequestHandler, body: bytes) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    server = Server()
    server.files = files

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            server.asked.append(name)
            if name in server.files:
                server.treat(self, server.files[name])
            else:
                self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.address = f"http://127.0.0.1:{http.server_port}/mnist"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four small files in the place of MNIST's."""
    content = {}
    for seed, split in enumerate(("train", "t10k")):
        images, labels = made(seed=seed)
        content[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(idx(images))
        content[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels))
    remotes = [data._Remote(name, len(body), hashlib.md5(body).hexdigest()) for name, body in content.items()]
    monkeypatch.setattr(data, "FILES", tuple(remotes))
    monkeypatch.setenv("no_proxy", "*")
    return content


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[Server]:
    with serving(files) as server:
        yield server


def nobody() -> str:
    """An address at which no server listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        port = http.server_port
    return f"http://127.0.0.1:{port}/"


def test_download(tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    folder = data.download_mnist(tmp_path / "a" / "b", mirrors=[server.address])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == server.files
    assert_holds(data.mnist_folder(folder), *made(seed=0))
    assert capfd.readouterr() == ("", "")  # no terminal, no progress


def test_what_is_there_is_not_downloaded_again(tmp_path: Path, server: Server) -> None:
    data.download_mnist(tmp_path, mirrors=[server.address])
    assert len(server.asked) == 4
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"short")
    spoilt = tmp_path / "t10k-images-idx3-ubyte.gz"
    spoilt.write_bytes(bytes(len(spoilt.read_bytes())))
    data.download_mnist(tmp_path, mirrors=[server.address])
    assert sorted(server.asked[4:]) == ["t10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == server.files
    assert data.download_mnist(tmp_path, mirrors=[]) == tmp_path


def test_the_cache_folder(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.download_mnist(mirrors=[server.address]) == tmp_path / "cache" / "tape-engine" / "mnist"
    for relative in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert data.cache_folder() == tmp_path / "home" / ".cache" / "tape-engine"


def test_load_downloads_once(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data.download_mnist, "__kwdefaults__", {"mirrors": [server.address], "timeout": 5.0})
    for _ in range(2):
        found = data.load("mnist")
        assert found.test is not None
        assert_holds(found.test, *made(seed=1))
    assert len(server.asked) == 4


def corrupt(request: BaseHTTPRequestHandler, body: bytes) -> None:
    Server.answer(request, bytes(len(body)))


def truncate(request: BaseHTTPRequestHandler, body: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body[:10])


def go_on(request: BaseHTTPRequestHandler, body: bytes) -> None:
    Server.answer(request, body + bytes(2**20))


def fall_silent(request: BaseHTTPRequestHandler, body: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body[:10])
    request.wfile.flush()
    time.sleep(1)


def refuse(request: BaseHTTPRequestHandler, body: bytes) -> None:
    request.send_error(503)


def babble(request: BaseHTTPRequestHandler, body: bytes) -> None:
    request.wfile.write(b"hello\r\n\r\n")


@pytest.mark.parametrize(
    ("treat", "said"),
    [
        (corrupt, r"gave another file: its MD5 is [0-9a-f]{32}, expected [0-9a-f]{32}"),
        (truncate, r"(gave 10, expected \d+ bytes|broke off after 10 bytes: .*)"),
        (go_on, r"gave more, expected \d+ bytes"),
        (refuse, r"answered 503 Service Unavailable"),
        (babble, r"broke off after 0 bytes: .*"),
    ],
)
def test_a_bad_mirror_gives_way_to_the_next(
    tmp_path: Path, files: dict[str, bytes], treat: Callable[[BaseHTTPRequestHandler, bytes], None], said: str
) -> None:
    with serving(files) as bad, serving(files) as good:
        bad.treat = treat
        with pytest.raises(DataError) as caught:
            data.download_mnist(tmp_path / "a", mirrors=[nobody(), bad.address])
        assert list((tmp_path / "a").iterdir()) == []
        data.download_mnist(tmp_path / "b", mirrors=[bad.address, good.address])
    lines = str(caught.value).splitlines()
    assert lines[0] == "data: train-images-idx3-ubyte.gz could not be downloaded."
    assert "not reached: " in lines[1]
    assert lines[2].startswith(f"  {bad.address} ")
    assert re.fullmatch(said, lines[2].removeprefix(f"  {bad.address} ").strip())
    assert "--data FOLDER" in lines[3]
    assert "--data digits" in lines[3]
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == files


def test_a_silent_mirror_is_given_up(tmp_path: Path, server: Server) -> None:
    server.treat = fall_silent
    with pytest.raises(DataError, match=r"was silent for 0\.2 s, after (0|10) bytes"):
        data.download_mnist(tmp_path, mirrors=[server.address], timeout=0.2)
    assert list(tmp_path.iterdir()) == []


def test_no_connection(tmp_path: Path, files: dict[str, bytes]) -> None:
    address = nobody()
    with pytest.raises(DataError) as caught:
        data.download_mnist(tmp_path, mirrors=[address])
    refused = f"[Errno {errno.ECONNREFUSED}] Connection refused"
    assert str(caught.value) == (
        "data: train-images-idx3-ubyte.gz could not be downloaded.\n"
        f"  {address}    not reached: {refused}\n"
        "  fix: without internet: --data FOLDER with MNIST's IDX files, or --data digits, which needs no download"
    )


def test_an_interrupted_download_leaves_no_part(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(request: BaseHTTPRequestHandler, body: bytes) -> None:
        if len(server.asked) > 1:
            monkeypatch.setattr(Path, "replace", stop)
        Server.answer(request, body)

    def stop(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    server.treat = interrupt
    with pytest.raises(KeyboardInterrupt):
        data.download_mnist(tmp_path, mirrors=[server.address])
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["train-images-idx3-ubyte.gz"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, files: dict[str, bytes]) -> None:
    write(tmp_path, "a", b"")
    with pytest.raises(DataError, match=r"cannot be kept in .*a/b\.\n .*\n  fix: set XDG_CACHE_HOME"):
        data.download_mnist(tmp_path / "a" / "b", mirrors=[])


def test_progress_is_shown_on_a_terminal(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich this is a terminal
    data.download_mnist(tmp_path, mirrors=[server.address])
    out, err = capfd.readouterr()
    assert out == ""
    assert "MNIST" in err
