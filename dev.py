#!/usr/bin/env python3
"""The one-command loop of the project: set-up, demo, tests, checks, docs, benchmarks.

``python3 dev.py demo`` and ``python3 dev.py test`` need nothing but Python 3.11 or later with pip and venv. Each
command first makes what it needs in ``.venv``, once; the next call starts at once. Standard library only.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - whoever starts it with an old Python is to read this, not a traceback
    import shutil

    _found = [name for name in ("python3.14", "python3.13", "python3.12", "python3.11") if shutil.which(name)]
    _fix = "this machine has a newer one: " + _found[0] if _found else "install a newer one, then: python3.11"
    _line = " ".join(sys.argv)
    sys.exit(f"dev.py needs Python 3.11 or later; this is {sys.version.split()[0]}.\n  fix: {_fix} {_line}")

import argparse
import collections
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sysconfig
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
SYSTEM_TORCH = "TAPE_ENGINE_SYSTEM_TORCH"
OLDEST_TORCH = (2, 8)
SCRIPTS, SUFFIX = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")

#: Where packages lie in an environment, on Linux and macOS, and on Windows.
SITES = ("lib/python*/site-packages", "Lib/site-packages")

#: What each extra must have made importable; the nameless one is the package itself.
MODULES = {
    "": "torch executing graphviz networkx numpy pygraphviz rich sklearn tape_engine".split(),
    "test": "pytest expecttest hypothesis pytest_benchmark pytest_timeout xdist safetensors".split(),
    "dev": "mypy ruff".split(),
    "native": ["llvmlite"],
    "bench": ["jax"],
    "docs": "sphinx furo myst_nb safetensors".split(),
}

#: Asked of the environment's own Python: its version, its torch, what is missing, whether it has pip.
PROBE = """
import importlib.metadata, importlib.util, json, sys
def has(name):
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = None
print(json.dumps([list(sys.version_info[:3]), torch, [name for name in sys.argv[1:] if not has(name)], has("pip")]))
"""

NO_VENV = (
    "this Python cannot make environments: its venv or ensurepip module is missing.\n"
    f"  fix: on Debian and Ubuntu, sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    " (or python3-venv); then run the same command again"
)


class Failure(Exception):
    """What stops a command, as the user is to read it."""


class Probe(NamedTuple):
    """What the Python of an environment said of itself."""

    version: list[int]
    torch: str | None
    missing: list[str]
    pip: bool


class Note(NamedTuple):
    """What dev.py writes into an environment: whether it made it, and for what a set-up was finished in it."""

    ours: bool = False
    root: str = ""
    system: bool = False
    extras: Sequence[str] = ()
    key: str | None = None  # None where a set-up was begun and not finished


def say(text: str) -> None:
    """Tells the user; on stderr, so that a command's own output stays clean."""
    print(text, file=sys.stderr, flush=True)


def child_environ(**more: str) -> dict[str, str]:
    """The environment of a child process, without what would lead its Python elsewhere."""
    away = ("PYTHONHOME", "PYTHONPATH", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in away} | more


# -- a step of the set-up, shown while it runs -----------------------------------------------------------


def run_shown(command: Sequence[str], label: str, log: Path, cwd: Path) -> None:
    """Runs `command` with its output in the file `log` alone, and tells the user how far it is.

    Raises `Failure`, with the last lines of the output, where the command fails.
    """
    environ = child_environ(PYTHONUNBUFFERED="1", PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1")
    child = subprocess.Popen(
        command, cwd=cwd, env=environ, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    tail: collections.deque[str] = collections.deque(maxlen=25)
    doing = [""]

    def read() -> None:
        assert child.stdout is not None
        with child.stdout as lines, log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n")
            for line in lines:
                file.write(line)
                tail.append(line.rstrip())
                doing[0] = in_short(line) or doing[0]

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        show_progress(child, label, doing)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    reader.join()
    if child.returncode:
        said = textwrap.indent("\n".join(tail), "    ")
        raise Failure(f"set-up failed while {label}:\n{said}\n  the whole output: {log}")


def in_short(line: str) -> str | None:
    """What a line of pip's output tells, in a word or two, if anything."""
    words = line.split()
    if words[:1] == ["Collecting"]:
        return f"looking for {words[1]}"
    if words[:1] == ["Downloading"]:
        return " ".join(["downloading", Path(words[1]).name, *words[2:4]])
    if words[:1] == ["Processing"]:
        return f"reading {Path(words[1]).name}"
    return f"unpacking {len(words) - 3} packages" if words[:2] == ["Installing", "collected"] else None


def show_progress(child: "subprocess.Popen[str]", label: str, doing: Sequence[str]) -> None:
    """Waits for `child`; tells `label` and the time on one line of a terminal, or else every half minute."""
    live = sys.stderr.isatty()
    start = told_at = time.monotonic()
    if not live:
        say(f"set-up: {label}")
    while child.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.2)
        now = time.monotonic()
        line = f"set-up: {label} ({now - start:.0f} s) {doing[0]}"
        if live:
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        elif now - told_at >= 30:
            told_at = now
            say(line)
    if live:
        say(f"\r\x1b[Kset-up: {label} ({time.monotonic() - start:.0f} s)")


# -- the environment ---------------------------------------------------------------------------------------


class Environment:
    """The ``.venv`` of a repository: made, filled, and mended.

    A file in it, `note`, tells that dev.py made it, and for which project, Python and extras a set-up was finished.
    An environment that dev.py did not make is somebody's own: where it works it is added to and its torch stays;
    where it does not, it is moved aside, never deleted.

    Args:
        root: the folder of ``pyproject.toml``.
        system: whether to use the torch of the machine; ``None`` for what was asked when it was made (at first: no).
    """

    def __init__(self, root: Path, system: bool | None = None) -> None:
        self.root = root
        self.system = system
        self.folder = root / ".venv"
        self.note = self.folder / "tape-engine-setup.json"
        self.log = self.folder / "tape-engine-setup.log"
        self.constraints = root / ".ci" / "constraints.txt"

    def script(self, name: str) -> str:
        """The path of the command `name` in it."""
        return str(self.folder / SCRIPTS / (name + SUFFIX))

    def environ(self) -> dict[str, str]:
        """The environment variables under which its commands run."""
        path = f"{self.folder / SCRIPTS}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        more = {"PATH": path, "VIRTUAL_ENV": str(self.folder)}
        if self.read_note().system and "PYTHONPATH" in os.environ:
            more["PYTHONPATH"] = os.environ["PYTHONPATH"]  # on some machines this is where torch is found
        return child_environ(**more)

    def read_note(self) -> Note:
        """What dev.py wrote into it; an empty note where that is nothing, or not to be read."""
        try:
            return Note(**json.loads(self.note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Note()

    def write_note(self, note: Note) -> None:
        """Replaces the note, whole or not at all."""
        part = self.note.with_suffix(".part")
        part.write_text(json.dumps(note._asdict()), encoding="utf-8")
        part.replace(self.note)

    def probe(self, modules: Sequence[str] = ()) -> Probe | None:
        """What its Python says of itself; ``None`` if that does not run."""
        try:
            answer = subprocess.run(
                [self.script("python"), "-c", PROBE, *modules], cwd=self.folder, env=self.environ(),
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
            return Probe(*json.loads(answer.stdout))
        except (OSError, ValueError, TypeError, subprocess.SubprocessError):
            return None

    def key(self, probe: Probe) -> str:
        """A digest that changes with everything a finished set-up rests on."""
        project = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))
        parts = [project.get("build-system"), project.get("project"), project.get("tool", {}).get("hatch")]
        text = json.dumps([parts, self.constraints.read_text(encoding="utf-8"), probe.version, str(self.root)])
        return hashlib.sha256(text.encode()).hexdigest()

    def intact(self) -> bool:
        """Whether every file that its packages list is there."""
        for listing in itertools.chain(*(self.folder.glob(f"{site}/*.dist-info") for site in SITES)):
            try:
                lines = (listing / "RECORD").read_text(encoding="utf-8").splitlines()
            except OSError:
                return False
            names = [line.rsplit(",", 2)[0].strip('"') for line in lines]
            if not all((listing.parent / name).exists() for name in names if not name.endswith(".pyc")):
                return False
        return True

    def ready(self, extras: Sequence[str]) -> bool:
        """Whether a finished set-up covers `extras`, and nothing of it went missing since."""
        note = self.read_note()
        if note.key is None or not {*extras} <= {*note.extras} or self.unlike_asked(note):
            return False
        probe = self.probe(modules_of(extras))
        if probe is None or probe.missing or not probe.pip or not os.path.exists(self.script("tape-engine")):
            return False
        return note.key == self.key(probe)

    def ensure(self, extras: Sequence[str], *, thorough: bool = False) -> None:
        """Makes sure that the package is installed with `extras`; `thorough` looks at every file of every package.

        Raises `Failure` where it cannot be done.
        """
        if not thorough and self.ready(extras):
            return
        with self.locked():
            if not thorough and self.ready(extras):
                return  # another call did it while this one waited
            start = time.monotonic()
            why = self.why_make()
            if why:
                self.make(why)
            self.install(sorted({*extras, *self.read_note().extras}))
            say(f"set-up: done in {time.monotonic() - start:.0f} s")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one set-up at a time pass, where the machine has file locks."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        with (self.root / ".venv.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("set-up: another one is at work here; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def unlike_asked(self, note: Note) -> bool:
        """Whether it was made with the machine's packages and is now asked for without, or the other way."""
        return self.system is not None and note.ours and note.system != self.system

    def why_make(self) -> str | None:
        """Why it is to be made (anew); ``None`` if it can be used as it is.

        Raises `Failure` where it is somebody's own and works, but cannot serve.
        """
        if not os.path.lexists(self.folder):
            return "making .venv"
        note, probe = self.read_note(), self.probe()
        if probe is None:
            return "making .venv anew: its Python does not run"
        if not note.ours:
            if probe.version < [3, 11]:
                raise Failure(
                    f"{self.folder} was not made by dev.py, and is of Python {probe.version[0]}.{probe.version[1]}.\n"
                    "  fix: move it away, and run the same command again"
                )
            return None if probe.pip or self.add_pip() else "making .venv anew: it has no pip"
        if probe.version[:2] != [*sys.version_info[:2]]:
            return f"making .venv anew: it is of Python {probe.version[0]}.{probe.version[1]}"
        if self.unlike_asked(note):
            return f"making .venv anew: {'with' if self.system else 'without'} the machine's own packages"
        if note.root != str(self.root):
            return "making .venv anew: the repository has moved"
        if not (probe.pip or self.add_pip()):
            return "making .venv anew: it has no pip"
        if not self.intact():
            return "making .venv anew: packages in it are damaged"
        return None

    def add_pip(self) -> bool:
        """Puts pip into it; whether that went well."""
        command = [self.script("python"), "-m", "ensurepip"]
        return subprocess.run(command, env=self.environ(), capture_output=True, check=False).returncode == 0

    def make(self, why: str) -> None:
        """Makes it, empty. What stood in its place is removed if dev.py made it, else moved aside."""
        if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
            raise Failure(NO_VENV)
        note = self.read_note()
        system = note.system if self.system is None else self.system
        if note.ours:
            empty(self.folder)
        elif os.path.lexists(self.folder) and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            names = (self.root / f".venv.aside-{n}" for n in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            self.folder.rename(aside)
            say(f"set-up: the .venv that was here does not work; it is {aside.name} now")
        self.folder.mkdir(exist_ok=True)
        # before all else, so that one left half-made is known for dev.py's own
        self.write_note(Note(ours=True, root=str(self.root), system=system))
        # started by the environment that is being made anew, this must not be its Python
        inside = Path(sys.prefix).resolve() == self.folder.resolve()
        python = sys._base_executable if inside else sys.executable  # type: ignore[attr-defined]
        flags = ["--system-site-packages"] if system else []
        try:
            run_shown([python, "-m", "venv", *flags, str(self.folder)], why, self.log, self.root)
        except Failure as failure:
            raise Failure(NO_VENV if "ensurepip" in str(failure) else str(failure)) from None
        if system and sys.prefix != sys.base_prefix:
            # started by an environment: the torch meant is in that one, which venv passes over
            show = [self.script("python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
            site = Path(subprocess.check_output(show, text=True, env=self.environ()).strip())
            paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
            (site / "tape-engine-parent.pth").write_text("\n".join([*paths, ""]), encoding="utf-8")

    def install(self, extras: Sequence[str]) -> None:
        """Installs the package with `extras`, editable, and notes that it is done."""
        note, before = self.read_note(), self.probe()
        constraints = self.constraints_kept(note, before)
        self.write_note(note._replace(key=None))
        target = f".[{','.join(extras)}]" if extras else "."
        first = "" if before and before.torch else " (minutes, the first time)"
        label = f"installing tape-engine{target[1:]}{first}"
        pip = [self.script("python"), *"-m pip install --progress-bar off --no-input --no-color --no-compile".split()]
        try:
            run_shown([*pip, "--constraint", str(constraints), "--editable", target], label, self.log, self.root)
        except Failure:
            if note.key and self.intact():
                self.write_note(note)  # nothing was changed: what worked before still does, without a network too
            raise
        run_shown([self.script("python"), "-c", "import torch"], "importing torch", self.log, self.folder)
        probe = self.probe(modules_of(extras))
        if probe is None or probe.missing:
            missing = ", ".join(probe.missing) if probe else "its Python"
            raise Failure(
                f"set-up ended without an error, yet this does not import: {missing}\n"
                f"  fix: move .venv away, and run the same command again (the whole output: {self.log})"
            )
        self.write_note(note._replace(extras=extras, key=self.key(probe)))

    def constraints_kept(self, note: Note, probe: Probe | None) -> Path:
        """The constraints of an installation: the project's, save that a torch which dev.py did not install stays.

        Raises `Failure` where such a torch is too old, or was asked for and is not there.
        """
        if note.ours and not note.system:
            return self.constraints
        oldest = ".".join(map(str, OLDEST_TORCH))
        torch = probe.torch if probe else None
        if torch is None:
            if not (note.system or self.system):
                return self.constraints
            raise Failure(
                f"the machine's own torch was asked for, and {sys.executable} has none.\n"
                f"  fix: run dev.py by a Python that has torch {oldest} or later, or set {SYSTEM_TORCH}=0"
            )
        if tuple(map(int, re.findall(r"\d+", torch)[:2])) < OLDEST_TORCH:
            raise Failure(
                f"the torch here is {torch}, tape_engine needs {oldest} or later, and dev.py replaces none that it "
                f"did not install.\n  fix: upgrade that torch; or move .venv away and set {SYSTEM_TORCH}=0"
            )
        lines = self.constraints.read_text(encoding="utf-8").splitlines()
        kept = self.folder / "tape-engine-constraints.txt"
        kept.write_text("\n".join([*(x for x in lines if not x.startswith("torch==")), f"torch=={torch}", ""]))
        return kept


def modules_of(extras: Sequence[str]) -> list[str]:
    """The modules that must be importable with these extras."""
    return [name for extra in ("", *extras) for name in MODULES.get(extra, [])]


def empty(folder: Path) -> None:
    """Removes what is in `folder`; the folder itself, perhaps a link to one elsewhere, stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# -- the commands ------------------------------------------------------------------------------------------


def call(environment: Environment, command: Sequence[str], cwd: Path | None = None) -> int:
    """Runs `command` in the environment, in the terminal's own input and output; its exit status."""
    with subprocess.Popen(command, cwd=cwd, env=environment.environ()) as child:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.wait()  # it was interrupted as well, and ends in its own way
            raise
        return code if code >= 0 else 128 - code


def setup(environment: Environment, args: Sequence[str]) -> int:
    """Makes .venv with all that demo, test, check and bench need; looks at every file, and mends what is broken."""
    environment.ensure(["dev", "native", "test"], thorough=True)
    return 0


def demo(environment: Environment, args: Sequence[str]) -> int:
    """Records, sweeps, checks, draws and replays lin -> relu -> mse on real handwritten digits.

    [--data digits|mnist|FOLDER] [--out DIR]
    """
    environment.ensure([])
    return call(environment, [environment.script("tape-engine"), "demo", *args])


def test(environment: Environment, args: Sequence[str]) -> int:
    """Runs the whole test suite; arguments go to pytest (-x, -k WORD, a path from the root), and then it is not split.

    [PYTEST ARGUMENTS]
    """
    environment.ensure(["native", "test"])
    return pytest(environment, args or side_by_side())


def pytest(environment: Environment, args: Sequence[str]) -> int:
    """Runs pytest at the root."""
    return call(environment, [environment.script("python"), "-m", "pytest", *args], environment.root)


def side_by_side() -> list[str]:
    """The arguments by which pytest uses every core, up to eight; none where there is one alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["-n", str(min(cores, 8))] if cores > 1 else []


def check(environment: Environment, args: Sequence[str]) -> int:
    """Lints, checks formatting and types, and runs the quick tests: under a minute."""
    environment.ensure(["dev", "native", "test"])
    python = environment.script("python")
    steps: dict[str, Callable[[], int]] = {
        "ruff check": lambda: call(environment, [python, "-m", "ruff", "check"], environment.root),
        "ruff format": lambda: call(environment, [python, "-m", "ruff", "format", "--check"], environment.root),
        "mypy": lambda: call(environment, [python, "-m", "mypy"], environment.root),
        "quick tests": lambda: pytest(environment, [*side_by_side(), "-q", "-m", "not slow"]),
    }
    results = []
    for name, step in steps.items():
        say(f"check: {name}")
        start = time.monotonic()
        code = step()
        results.append(f"  {'failed' if code else 'passed'}  {name} ({time.monotonic() - start:.0f} s)")
    say("\n".join(["check:", *results]))
    return int(any("failed" in line for line in results))


def docs(environment: Environment, args: Sequence[str]) -> int:
    """Builds the documentation into docs/_build/html; every cell runs, and a warning is an error."""
    environment.ensure(["docs"])
    folder = environment.root / "docs"
    sphinx = [environment.script("python"), "-m", "sphinx", "-W", "--keep-going", "-b", "html"]
    code = call(environment, [*sphinx, "-d", str(folder / "_build/doctrees"), str(folder), str(folder / "_build/html")])
    if code == 0:
        say(f"docs: {folder / '_build/html/index.html'}")
    return code


def bench(environment: Environment, args: Sequence[str]) -> int:
    """Runs the benchmarks, side by side in one table; --others adds torch.compile, and JAX, which it installs.

    [--others] [ARGUMENTS of tests/benchmarks]
    """
    environment.ensure(["native", "test", *["bench"] * ("--others" in args)])
    return call(environment, [environment.script("python"), "-m", "tests.benchmarks", *args], environment.root)


COMMANDS = {command.__name__: command for command in (setup, demo, test, check, docs, bench)}
TAKES_ARGUMENTS = (demo, test, bench)


def parser() -> argparse.ArgumentParser:
    """What dev.py itself understands; the rest of the line is the command's."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary(command)}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="dev.py",
        usage="python3 dev.py [--system-site-packages] COMMAND [ARGUMENTS]",
        description="\n".join(
            ["The one-command loop. Each command first makes what it needs in .venv, once.", "", *lines]
        ),
        epilog="'python3 dev.py COMMAND --help' tells more of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--system-site-packages",
        action="store_true",
        default=None,
        help=f"use the torch that this Python has (2.8 or later) instead of installing one; it is remembered. "
        f"{SYSTEM_TORCH}=1 asks the same, and =0 takes it back",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("args", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def summary(command: Callable[..., int]) -> str:
    """The first line of what a command says of itself."""
    return (command.__doc__ or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    options = parser().parse_args(argv)
    if options.command is None:
        parser().print_help()
        return 2
    command, args = COMMANDS[options.command], list(options.args)
    if command is setup and "--system-site-packages" in args:
        args.remove("--system-site-packages")
        options.system_site_packages = True
    if args[:1] in (["-h"], ["--help"]):
        _, _, arguments = (command.__doc__ or "").partition("\n")
        print(f"usage: python3 dev.py {options.command} {arguments.strip()}".rstrip() + f"\n\n{summary(command)}")
        return 0
    if args and command not in TAKES_ARGUMENTS:
        parser().error(f"{options.command} takes no arguments, and was given: {' '.join(args)}")
    asked = os.environ.get(SYSTEM_TORCH, "")
    try:
        if asked not in ("", "0", "1"):
            raise Failure(f"{SYSTEM_TORCH} is {asked!r}.\n  fix: set it to 1, to 0, or not at all")
        system = options.system_site_packages or {"1": True, "0": False}.get(asked)
        return command(Environment(ROOT, system), args)
    except (Failure, OSError) as failure:
        say(f"dev.py: {failure}")
    except KeyboardInterrupt:
        say("\ndev.py: interrupted")
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
