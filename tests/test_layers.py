"""The walls of the house, read off the source of every module; and what `import tape_engine` does not do.

The checks are functions of a folder, so that the last part of this file can show them a house with broken walls.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]

#: The rooms of `tape_engine`, from the ground up; each imports from those above it in this list alone, inside
#: functions too. `__init__` is the public surface, which nothing but the command line stands upon.
ROOMS = (
    "errors",
    "registry",
    "plans",
    "specialise",
    "heap",
    "modules",
    "tape",
    "collector",
    "names",
    "listing",
    "places",
    "regions",
    "aliases",
    "warned",
    "compiler",
    "exits",
    "recorder",
    "fits",
    "ops",
    "rules",
    "gradients",
    "refusals",
    "steps",
    "walk",
    "sweep",
    "bridge",
    "program",
    "checks",
    "data",
    "article",
    "demo",
    "__init__",
    "cli",
    "__main__",
)

#: What may be imported against the order, inside a function alone, and why.
EXCEPTIONS = {
    ("demo", "viz"): "the demonstration shows the whole way, the picture too",
    ("cli", "viz"): "the command line is where the engine and the pictures meet",
}

#: The rooms of `tape_engine` that `viz` knows: the tape as data, and what tells of it.
SEEN_BY_VIZ = {"errors", "registry", "tape", "names", "listing", "program"}

#: All that a gradient rule is built of, besides the registry and what rules share.
SEEN_BY_RULES = {"__future__", "cmath", "collections.abc", "math", "torch", "typing"}

#: The interception of torch, and the only room that knows of it.
INTERCEPTION = {"TorchDispatchMode", "TorchFunctionMode", "__torch_dispatch__", "__torch_function__"}
INTERCEPTOR = "tape_engine/recorder"

#: Files of more than `LINES` lines, each with its reason.
LINES = 400
LONG = {
    "tape_engine/tape.py": "the data model, which is best read in one place",
    "tape_engine/registry.py": "an operation's whole record, with the samples that it carries",
    "tape_engine/recorder/writing.py": "to read a value may be to write nodes, and the other way round",
    "tape_engine/exits.py": "the one list of what torch does unheard: a wrapper of a few lines for each",
    "tape_engine/program/backends/python.py": "a writer whose methods all write to one function",
    "dev.py": "it stands alone: it runs before anything is installed",
}

#: Words of other systems for what has a name of its own here.
BANNED = re.compile(r"(pullback|cotangent|adjoint|tracer|primal)s?", re.IGNORECASE)

#: Where such a word is torch's own name for an argument, which a rule has to take as it is.
TORCHS_OWN = {("tape_engine/rules/decompositions.py", "adjoint")}  # linalg.lu_solve


# -- reading the source ------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One import: by which module, of which, where, and whether inside a function."""

    by: str
    of: str
    line: int
    lazy: bool


class Source:
    """The modules below a root, by dotted name, and what they import."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = {self.dotted(path): path for top in ("tape_engine", "viz") for path in (root / top).rglob("*.py")}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.paths.items()}
        self.imports = [found for name, tree in self.trees.items() for found in self.walk(name, tree)]

    def dotted(self, path: Path) -> str:
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, found: Import) -> str:
        return f"{self.paths[found.by].relative_to(self.root).as_posix()}:{found.line}"

    def walk(self, by: str, node: ast.AST, lazy: bool = False) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for of in self.targets(by, child):
                yield Import(by, of, child.lineno, lazy)  # type: ignore[attr-defined]
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from self.walk(by, child, lazy or inside)

    def targets(self, by: str, node: ast.AST) -> Iterator[str]:
        """The modules that a statement imports, in full; of ``from package import name`` the module it means."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = by.split(".") if self.paths[by].name == "__init__.py" else by.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in self.paths else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def room(module: str) -> str:
    """The room of `tape_engine` in which a module stands."""
    return [*module.split("."), "__init__"][1]


def top(module: str) -> str:
    return module.partition(".")[0]


# -- the checks: each gives a complaint a fault ------------------------------------------------------------


def unknown_rooms(source: Source) -> Iterator[str]:
    for name in source.paths:
        if top(name) == "tape_engine" and room(name) not in ROOMS:
            yield f"{name} is no room of the list: say where it stands"


def wrong_ways(source: Source) -> Iterator[str]:
    """Imports against the order of the rooms."""
    for found in source.imports:
        here, there = room(found.by), room(found.of)
        if top(found.by) == "tape_engine" and top(found.of) == "viz":
            if (here, "viz") not in EXCEPTIONS or not found.lazy:
                yield f"{source.at(found)}: tape_engine imports viz"
        elif top(found.by) == top(found.of) == "tape_engine" and here != there and {here, there} <= {*ROOMS}:
            allowed = (here, there) in EXCEPTIONS and found.lazy
            if ROOMS.index(there) > ROOMS.index(here) and not allowed:
                yield f"{source.at(found)}: {here} imports {there}, which stands below it"
        elif top(found.by) == "viz" and top(found.of) == "tape_engine" and there not in SEEN_BY_VIZ:
            yield f"{source.at(found)}: viz imports {there}"


def unclean_rules(source: Source) -> Iterator[str]:
    """Imports of the rules that are neither mathematics nor the registry."""
    for found in source.imports:
        if room(found.by) == "rules" and top(found.by) == "tape_engine":
            ours = top(found.of) == "tape_engine" and room(found.of) in ("rules", "registry")
            if not (ours or found.of in SEEN_BY_RULES or top(found.of) == "torch"):
                yield f"{source.at(found)}: rules import {found.of}"


def circles(source: Source) -> Iterator[str]:
    """Modules of one room, or of `viz`, that import each other in a circle; `wrong_ways` sees those of several."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for found in source.imports:
        together = top(found.by) == top(found.of) and (top(found.by) == "viz" or room(found.by) == room(found.of))
        # a package's own __init__ gathers its modules, and they say its name only to reach each other
        known = {found.by, found.of} <= source.paths.keys()
        if together and known and all(source.paths[name].stem != "__init__" for name in (found.by, found.of)):
            graph.add_edge(found.by, found.of)
    for circle in nx.simple_cycles(graph):
        yield "a circle of imports: " + " -> ".join(sorted(circle))


def interceptions(source: Source) -> Iterator[str]:
    for path in source.paths.values():
        name = path.relative_to(source.root).as_posix()
        if not name.startswith((f"{INTERCEPTOR}.", f"{INTERCEPTOR}/")):
            with path.open("rb") as file:
                for token in tokenize.tokenize(file.readline):
                    if token.type == tokenize.NAME and token.string in INTERCEPTION:
                        yield f"{name}:{token.start[0]}: {token.string} outside of {INTERCEPTOR}"


def long_files(source: Source) -> Iterator[str]:
    for path in [*source.paths.values(), source.root / "dev.py"]:
        name = path.relative_to(source.root).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LINES and name not in LONG:
            yield f"{name} has {lines} lines: shorten it, or give the reason in LONG"
        if lines <= LINES and name in LONG:
            yield f"{name} has {lines} lines, and stands in LONG for nothing"


def foreign_words(source: Source) -> Iterator[str]:
    """Words of other systems in the names that a module gives, in its docstrings, and in its comments."""
    for path in source.paths.values():
        if not BANNED.search(path.read_text(encoding="utf-8")):
            continue  # most have none anywhere, and to take a file apart takes long
        name = path.relative_to(source.root).as_posix()
        with path.open("rb") as file:
            tokens = [*tokenize.tokenize(file.readline)]
        for line, text in [*given_names(ast.parse(path.read_bytes())), *comments(tokens)]:
            words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)
            for word in words:
                if BANNED.fullmatch(word) and (name, word) not in TORCHS_OWN:
                    yield f"{name}:{line}: the word {word}"


def given_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def comments(tokens: list[tokenize.TokenInfo]) -> Iterator[tuple[int, str]]:
    return ((token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT)


CHECKS: list[Callable[[Source], Iterator[str]]] = [
    unknown_rooms,
    wrong_ways,
    unclean_rules,
    circles,
    interceptions,
    long_files,
    foreign_words,
]


# -- this house ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(ROOT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_walls(check: Callable[[Source], Iterator[str]], source: Source) -> None:
    assert "\n".join(check(source)) == ""


def test_every_module_is_read(source: Source) -> None:
    assert {"tape_engine", "tape_engine.errors", "tape_engine.rules", "tape_engine.recorder", "viz"} <= {*source.paths}
    assert Import("tape_engine.ops", "tape_engine.registry", 27, False)._replace(line=0) in {
        found._replace(line=0) for found in source.imports
    }


IMPORT = """
import json, sys, threading, warnings
warnings.simplefilter("error")
import torch
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

def state():
    return repr([
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
        torch.get_rng_state().sum(), _get_current_function_mode_stack(), _get_current_dispatch_mode_stack(),
        [getattr(hooks, name) for name in sorted(vars(hooks)) if name.startswith("_global_")],
        vars(torch.Tensor).keys(), vars(torch.nn.Module).keys(), torch.nn.Module.__call__, torch.Tensor.backward,
        threading.active_count(), sys.path, sys.excepthook, sys.gettrace(), sys.getprofile(), warnings.filters,
    ])

modules, before = set(sys.modules), state()
import tape_engine
after = state()
print(json.dumps({
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - modules} - sys.stdlib_module_names),
    "loaded": sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names),
    "before": before, "after": after, "nodes": len(tape_engine.global_tape()),
}))
"""


@pytest.mark.slow
def test_import_does_nothing_but_registration() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    # more of torch, and `executing`, which finds the source text of a call
    assert {*told["new"]} <= {"tape_engine", "torch", "executing"}
    absent = set("viz graphviz pygraphviz networkx rich sklearn scipy llvmlite safetensors sympy".split())
    assert absent.isdisjoint(told["loaded"])
    assert told["after"] == told["before"]
    assert told["nodes"] == 0


# -- a house with broken walls -----------------------------------------------------------------------------------

SOUND = {
    "dev.py": "",
    "tape_engine/__init__.py": "from .ops import lin\nfrom . import rules",
    "tape_engine/errors.py": '"""Every error."""',
    "tape_engine/registry.py": "from .errors import E",
    "tape_engine/tape.py": "import torch\nfrom . import registry\nfrom .errors import E",
    "tape_engine/recorder.py": "from .tape import Tape\nclass Mode(TorchDispatchMode):\n    pass",
    "tape_engine/ops.py": "def lin():\n    from . import recorder\n    from tape_engine.tape import Tape",
    "tape_engine/rules/__init__.py": "from . import nn",
    "tape_engine/rules/common.py": "import math\nimport torch.nn.functional as F\nfrom ..registry import rule",
    "tape_engine/rules/nn.py": "from typing import Any\nfrom .common import C\nfrom .. import registry",
    "tape_engine/cli.py": "import tape_engine as te\ndef main():\n    from viz import draw",
    "viz/__init__.py": "from .drawing import draw",
    "viz/graph.py": "from tape_engine.tape import Tape\nimport networkx",
    "viz/drawing.py": "from .graph import graph\nfrom tape_engine import errors",
}

FAULTS = {
    "an unknown room": ({"tape_engine/attic.py": ""}, "tape_engine.attic is no room of the list: say where it stands"),
    "a room below": (
        {"tape_engine/registry.py": "from .tape import Tape"},
        "tape_engine/registry.py:1: registry imports tape, which stands below it",
    ),
    "a room below, in a function": (
        {"tape_engine/tape.py": "class Tape:\n    def f(self):\n        import tape_engine.recorder"},
        "tape_engine/tape.py:3: tape imports recorder, which stands below it",
    ),
    "a room below, by name": (
        {"tape_engine/errors.py": "from . import tape"},
        "tape_engine/errors.py:1: errors imports tape, which stands below it",
    ),
    "a room below, for its types": (
        {"tape_engine/registry.py": "if TYPE_CHECKING:\n    from .rules.nn import x"},
        "tape_engine/registry.py:2: registry imports rules, which stands below it",
    ),
    "a room below, at run time": (
        {"tape_engine/tape.py": "import importlib\nx = importlib.import_module('tape_engine.ops')"},
        "tape_engine/tape.py:2: tape imports ops, which stands below it",
    ),
    "the public surface": (
        {"tape_engine/ops.py": "from . import lin"},
        "tape_engine/ops.py:1: ops imports __init__, which stands below it",
    ),
    "viz": ({"tape_engine/ops.py": "def f():\n    import viz.graph"}, "tape_engine/ops.py:2: tape_engine imports viz"),
    "viz, by the command line at once": (
        {"tape_engine/cli.py": "from viz import draw"},
        "tape_engine/cli.py:1: tape_engine imports viz",
    ),
    "viz, by its name": ({"tape_engine/ops.py": "__import__('viz')"}, "tape_engine/ops.py:1: tape_engine imports viz"),
    "the recorder, by viz": (
        {"viz/graph.py": "from tape_engine.recorder import record"},
        "viz/graph.py:1: viz imports recorder",
    ),
    "the whole engine, by viz": ({"viz/graph.py": "import tape_engine"}, "viz/graph.py:1: viz imports __init__"),
    "the tape, by a rule": (
        {"tape_engine/rules/nn.py": "from ..tape import Tape"},
        "tape_engine/rules/nn.py:1: rules import tape_engine.tape",
    ),
    "a library, by a rule": (
        {"tape_engine/rules/nn.py": "def f(g):\n    import numpy"},
        "tape_engine/rules/nn.py:2: rules import numpy",
    ),
    "a circle": (
        {"viz/graph.py": "def f():\n    from .drawing import draw"},
        "a circle of imports: viz.drawing -> viz.graph",
    ),
    "a second interception": (
        {"viz/graph.py": "from torch.overrides import TorchFunctionMode"},
        "viz/graph.py:1: TorchFunctionMode outside of tape_engine/recorder",
    ),
    "a second dispatch": (
        {"tape_engine/ops.py": "class T:\n    def __torch_function__(cls): ..."},
        "tape_engine/ops.py:2: __torch_function__ outside of tape_engine/recorder",
    ),
    "a long file": (
        {"viz/graph.py": "x = 1\n" * 400},
        "viz/graph.py has 401 lines: shorten it, or give the reason in LONG",
    ),
    "a foreign word in a function's name": (
        {"viz/graph.py": "\ndef make_pullback(): ..."},
        "viz/graph.py:2: the word pullback",
    ),
    "a foreign word in a class's name": (
        {"viz/graph.py": "class OpTracer: ..."},
        "viz/graph.py:1: the word Tracer",
    ),
    "a foreign word in an argument": ({"viz/graph.py": "def f(primals): ..."}, "viz/graph.py:1: the word primals"),
    "a foreign word in a docstring": (
        {"viz/graph.py": 'def f():\n    """The adjoint of f."""'},
        "viz/graph.py:1: the word adjoint",
    ),
    "a foreign word in a comment": ({"viz/graph.py": "x = 1  # its cotangent"}, "viz/graph.py:1: the word cotangent"),
}


def build(root: Path, files: dict[str, str]) -> Source:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return Source(root)


@pytest.fixture
def no_long_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LONG", {})


@pytest.mark.usefixtures("no_long_files")
def test_a_sound_house_passes(tmp_path: Path) -> None:
    source = build(tmp_path, SOUND)
    assert [complaint for check in CHECKS for complaint in check(source)] == []


@pytest.mark.usefixtures("no_long_files")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_wall_is_found(tmp_path: Path, fault: str) -> None:
    change, complaint = FAULTS[fault]
    source = build(tmp_path, SOUND | change)
    assert [found for check in CHECKS for found in check(source)] == [complaint]


def test_a_reason_for_nothing_is_found(tmp_path: Path) -> None:
    source = build(tmp_path, SOUND)
    assert "dev.py has 1 lines, and stands in LONG for nothing" in [*long_files(source)]
