"""The engines that lay out DOT text and draw it: ``dot`` on PATH first, then the Graphviz in pygraphviz's wheel.

Either runs in a process of its own, with a time limit; what it started goes with it when the time is up.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tape_engine.errors import message

from .errors import LayoutError
from .fonts import font_environment

__all__ = ["CHEAPER", "ENGINES", "Picture", "engines", "render"]

ENGINES = ("dot", "pygraphviz")
#: Settings under which a layout takes a fraction of the time, and looks plainer.
CHEAPER = ("splines=line", "nslimit=1", "nslimit1=1", "mclimit=0.1", "searchsize=5")
_CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_child.py")
_COMPLETE: dict[str, Callable[[bytes], bool]] = {
    "png": lambda data: data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-12:],
    "svg": lambda data: b"<svg" in data and data.rstrip().endswith(b"</svg>"),
    "pdf": lambda data: data.startswith(b"%PDF") and b"%%EOF" in data[-32:],
}


@dataclass(frozen=True)
class Picture:
    """What an engine drew, which engine it was, and what the others (or it itself) had to say."""

    data: bytes
    engine: str
    remarks: tuple[str, ...] = ()


class _Failed(Exception):
    """One engine could not draw; its text says why."""


class OutOfTime(LayoutError):
    """No engine was done in the time given."""


def engines(engine: str = "auto") -> list[str]:
    """The engines to try, in order, that this machine has: of `engine`, or of all for ``"auto"``."""
    wanted = ENGINES if engine == "auto" else (engine,)
    return [each for each in wanted if (shutil.which("dot") if each == "dot" else _wheel())]


@lru_cache(maxsize=1)
def _wheel() -> str | None:
    """The folder that holds the package pygraphviz; nothing of it is imported here."""
    spec = importlib.util.find_spec("pygraphviz")
    if spec is None or spec.origin is None or not sys.executable:
        return None
    return os.path.dirname(os.path.dirname(spec.origin))


def render(
    source: str, picture_format: str, *, engine: str = "auto", timeout: float = 20.0, settings: Sequence[str] = ()
) -> Picture:
    """Lays out DOT text and draws it.

    Args:
        source: the DOT text.
        picture_format: ``"png"``, ``"svg"``, ``"pdf"``, or another that Graphviz knows.
        engine: ``"dot"``, ``"pygraphviz"``, or ``"auto"`` for the first of these that succeeds.
        timeout: seconds for all of it.
        settings: graph attributes to set, each as ``"name=value"``.

    Raises:
        OutOfTime: (a `LayoutError`) if no engine was done in time.
        LayoutError: if no engine was found, or each failed.
    """
    deadline = time.monotonic() + timeout
    found = engines(engine)
    if not found:
        raise LayoutError(_nothing_found(engine))
    remarks: list[str] = []
    late = False
    for i, each in enumerate(found):
        started = time.monotonic()
        # An engine that hangs leaves the next one its share.
        share = (deadline - started) / (len(found) - i)
        try:
            data, said = _draw(each, source, picture_format, settings, started + share)
        except subprocess.TimeoutExpired:
            late = True
            remarks.append(f"{each} was not done after {share:.3g} s")
        except _Failed as failure:
            remarks.append(str(failure))
        else:
            return Picture(data, each, (*remarks, *said))
    what = f"the picture could not be laid out: {'; '.join(remarks)}."
    if late:
        raise OutOfTime(message(what, fix="a longer timeout=, or detail='scopes' for a smaller picture"))
    raise LayoutError(message(what, fix="save it as .dot or .mmd, which need no layout, or install Graphviz anew"))


def _nothing_found(engine: str) -> str:
    if engine == "auto":
        return message(
            "no Graphviz was found: there is no `dot` on PATH, and pygraphviz is not installed.",
            fix="pip install pygraphviz (its wheel carries Graphviz), or save as .dot or .mmd, which need no layout",
        )
    missing = "no `dot` was found on PATH" if engine == "dot" else "pygraphviz is not installed"
    return message(f"engine={engine!r} was asked for, but {missing}.", fix="engine='auto'")


def _draw(
    engine: str, source: str, picture_format: str, settings: Sequence[str], deadline: float
) -> tuple[bytes, list[str]]:
    def run(text: str, kind: str, environment: dict[str, str]) -> tuple[bytes, str]:
        chosen = settings if text is source else ()
        return _run(engine, _command(engine, kind, chosen), text, environment, deadline)

    environment, font_remarks = font_environment(engine, shutil.which("dot") or "", run)
    data, said = run(source, picture_format, environment)
    complete = _COMPLETE.get(picture_format)
    if complete is not None and not complete(data):
        raise _Failed(f"{engine} gave no complete {picture_format.upper()}" + (f" ({said[:200]})" if said else ""))
    return data, [*font_remarks, *([f"{engine} says: {said[:400]}"] if said else [])]


def _command(engine: str, picture_format: str, settings: Sequence[str]) -> list[str]:
    if engine == "dot":
        return [shutil.which("dot") or "dot", f"-T{picture_format}", *(f"-G{each}" for each in settings)]
    # -P: the folder of the script, full of modules with everyday names, stays off the path.
    return [sys.executable, "-P", _CHILD, _wheel() or "", picture_format, *settings]


def _run(
    engine: str, command: Sequence[str], source: str, environment: dict[str, str], deadline: float
) -> tuple[bytes, str]:
    """Runs an engine to its end or to the deadline, whichever comes first; nothing of it is left running.

    Raises:
        subprocess.TimeoutExpired: at the deadline.
        _Failed: if it ended with an error.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
            # A group of its own: `dot` may be a script, and what that started has to be ended as well.
            start_new_session=os.name == "posix",
        )
    except OSError as failure:  # not a program after all
        raise _Failed(f"{engine} could not be started ({failure})") from failure
    try:
        data, said = process.communicate(source.encode(), timeout=max(0.01, deadline - time.monotonic()))
    except BaseException:
        _end(process)
        raise
    text = _worth_saying(said.decode(errors="replace"))
    if process.returncode:
        last = text.splitlines()[-1] if text else "without a word"
        raise _Failed(f"{engine} ended with status {process.returncode} ({last[:200]})")
    return data, text


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that it started, and waits for it: no zombie stays."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()


#: Remarks about the machine's font files and about the size of a graph, which a user can do nothing with.
_IDLE = re.compile(r"Fontconfig (warning|error)|layout may take a long time|^\s*$|UserWarning|warnings\.warn")


def _worth_saying(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if not _IDLE.search(line))
