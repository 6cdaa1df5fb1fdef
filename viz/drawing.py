"""`draw`, and the picture that it gives."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import networkx as nx

from tape_engine.errors import message

from .collapse import BUDGET, plan
from .describe import describe
from .errors import LayoutError, NotSweptError, OptionError, caller, choice, seconds
from .graph import Group, build
from .layout import CHEAPER, ENGINES, OutOfTime, Picture, engines, render
from .markup import counted
from .mermaid import mermaid
from .page import accessible, inline, page, size
from .recording import Recording, recording
from .style import dot

__all__ = ["Drawing", "draw"]

VIEWS = ("both", "forward", "backward")
DETAILS = ("auto", "full", "shapes", "scopes")
DIRECTIONS = ("TB", "LR")
FORMATS = ("png", "svg", "pdf", "dot", "html", "mmd")
_DPI = 144
#: Beyond these a PNG is shrunk: what image readers open, and what a picture may take of memory (4 bytes a pixel).
_MOST_SIDE, _MOST_PIXELS = 30_000, 60_000_000
_MOST_PDF = 14_400  # points; a PDF's page can be no larger


def draw(
    root: Any,
    *,
    view: str = "both",
    detail: str = "auto",
    engine: str = "auto",
    rankdir: str = "TB",
    timeout: float = 20,
) -> Drawing:
    """Draws a recorded computation, with the shapes of its values and gradients.

    Args:
        root: a tape, a program, or a recorded tensor (then: all that it was computed from).
        view: ``"forward"`` shows the values, ``"backward"`` the gradients, ``"both"`` both.
        detail: ``"full"`` draws every operation; ``"shapes"`` too, each as a small card of its name and shapes;
            ``"scopes"`` draws each call of an outermost scope or module as one (of those inside it, where there is
            only one); ``"auto"`` draws every operation of a small recording, and of a large one as much as fits
            about fifty cards.
        engine: ``"dot"`` (on PATH), ``"pygraphviz"`` (the Graphviz in its wheel), or ``"auto"``: the first of these
            that succeeds.
        rankdir: ``"TB"``, values run from top to bottom, or ``"LR"``, from left to right.
        timeout: seconds that the layout may take. A picture that takes longer is laid out more plainly, then with
            less detail, and ``Drawing.warnings`` says so.

    Returns:
        The picture, laid out. If this machine has no engine at all its ``engine`` is ``None``, and it can still be
        saved as ``.dot`` and ``.mmd`` and read as ``description``.

    Raises:
        OptionError: for an argument that is none of these values.
        NotRecordedError: for a tensor that no recorded operation made.
        DTypeError: for a root of another kind.
        NotSweptError: for ``view="backward"`` where no sweep has passed.
        LayoutError: if the engine asked for is missing, or none could lay it out in time.
    """
    choice("view", view, VIEWS)
    choice("detail", detail, DETAILS)
    choice("engine", engine, ("auto", *ENGINES))
    choice("rankdir", rankdir, DIRECTIONS)
    limit = seconds("timeout", timeout)
    source = recording(root)
    if view == "backward" and not source.gradients:
        raise NotSweptError(
            message(
                "there is no reverse sweep to draw: no value of this recording has a gradient.",
                where=caller(),
                fix="call te.backward(C) first, or draw with view='forward'",
            )
        )
    warnings = []
    if view == "both" and not source.gradients:
        warnings.append("no sweep has passed over this recording yet: no gradients are shown")
    versions = _versions(source, view, detail, rankdir)
    if engine == "auto" and not engines():
        graph, text, _, left_out = next(versions)
        warnings += [*left_out, "no Graphviz was found: only .dot, .mmd and the description are to be had"]
        return Drawing(graph, text, None, view=view, rankdir=rankdir, timeout=limit, warnings=warnings)
    deadline, last = time.monotonic() + limit, None
    for share, (graph, text, settings, left_out) in zip((0.5, 0.6, 1.0), versions, strict=False):
        left = deadline - time.monotonic()
        try:
            picture = render(text, "svg", engine=engine, timeout=max(share * left, 0.001), settings=settings)
        except LayoutError as failure:  # too slow, or a fault of Graphviz, which a plainer version may not meet
            last = failure
            continue
        warnings += [*left_out, *picture.remarks]
        return Drawing(graph, text, picture, settings, view=view, rankdir=rankdir, timeout=limit, warnings=warnings)
    if last is not None and not isinstance(last, OutOfTime):
        raise last
    raise OutOfTime(
        message(
            f"the picture of {counted(len(source.nodes), 'operation')} could not be laid out within {limit:g} s.",
            where=caller(),
            fix="draw with a longer timeout=, or with detail='scopes'",
        )
    ) from last


Version = tuple["nx.MultiDiGraph[str]", str, Sequence[str], list[str]]


def _versions(source: Recording, view: str, detail: str, rankdir: str) -> Iterator[Version]:
    """The picture as asked for, then more plainly laid out, then with less in it."""
    groups = plan(source.nodes, detail)
    graph = build(source, groups)
    text = dot(graph, view=view, detail=detail, rankdir=rankdir)
    left_out = _left_out(source, groups, detail)
    yield graph, text, (), left_out
    plainly = "laid out more plainly, with straight lines: the layout took too long or failed"
    yield graph, text, CHEAPER, [*left_out, plainly]
    fewer = plan(source.nodes, "auto", BUDGET // 2)
    graph = build(source, fewer)
    text = dot(graph, view=view, detail=detail, rankdir=rankdir)
    yield graph, text, CHEAPER, [*_left_out(source, fewer, detail), plainly]


def _left_out(source: Recording, groups: Sequence[Group], detail: str) -> list[str]:
    inside = sum(group.stop - group.start for group in groups)
    if not inside or detail == "scopes":
        return []
    boxes = "one card" if len(groups) == 1 else f"{len(groups)} cards"
    return [
        f"{inside:,} of {counted(len(source.nodes), 'operation')} are drawn together as {boxes}; "
        "detail='full' draws every one"
    ]


class Drawing:
    """A laid-out picture of a recorded computation; made by `draw`.

    Attributes:
        graph: what is drawn, as `viz.graph` describes it; a node of kind ``group`` stands for several operations.
        source: the DOT text.
        engine: what laid it out, ``"dot"`` or ``"pygraphviz"``; ``None`` if this machine has neither.
        warnings: what was left out, simplified or shrunk, a sentence each.
        description: the picture in words.
    """

    def __init__(
        self,
        graph: nx.MultiDiGraph[str],
        source: str,
        picture: Picture | None,
        settings: Sequence[str] = (),
        *,
        view: str = "both",
        rankdir: str = "TB",
        timeout: float = 20.0,
        warnings: Sequence[str] = (),
    ) -> None:
        self.graph = graph
        self.source = source
        self.engine = None if picture is None else picture.engine
        self.warnings = list(warnings)
        self.description = describe(graph, view=view)
        self._svg = b"" if picture is None else picture.data
        self._settings, self._view, self._rankdir, self._timeout = tuple(settings), view, rankdir, timeout
        self._kept: dict[str, bytes] = {}

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return "Computation graph: " + self.description.partition("\n")[0].removeprefix("A computation of ").rstrip(".")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture to a file, in the format that the suffix names; returns the path.

        ``.png`` (144 dots an inch; a very large picture fewer), ``.svg``, ``.pdf``, ``.dot`` (the source), ``.html``
        (a page by itself, to zoom and search in, with the description) or ``.mmd`` (Mermaid). Folders are made.

        Raises:
            OptionError: for another suffix.
            LayoutError: if there is no engine to draw it, or drawing it in this format fails.
        """
        target = Path(path)
        suffix = target.suffix.lower().removeprefix(".")
        if suffix not in FORMATS:
            listed = ", ".join(f".{each}" for each in FORMATS)
            what = f"the suffix {target.suffix!r} of path={str(target)!r} names none of the formats {listed}."
            raise OptionError(message(what, where=caller(), fix=f"drawing.save({str(target.with_suffix('.png'))!r})"))
        data = self._bytes(suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return target

    def _bytes(self, kind: str) -> bytes:
        if kind == "dot":
            return self.source.encode()
        if kind == "mmd":
            return mermaid(self.graph, view=self._view, rankdir=self._rankdir).encode()
        if self.engine is None:
            raise LayoutError(
                message(
                    "no Graphviz was found: there is no `dot` on PATH, and pygraphviz is not installed.",
                    where=caller(),
                    fix="pip install pygraphviz (its wheel carries Graphviz), or save as .dot or .mmd",
                )
            )
        if kind == "svg":
            return self.svg
        if kind == "html":
            return page(self._svg, self.title, self.description).encode()
        if kind not in self._kept:
            settings = self._png_settings() if kind == "png" else self._pdf_settings()
            chosen = (*self._settings, *settings)
            self._kept[kind] = render(
                self.source, kind, engine=self.engine, timeout=self._timeout, settings=chosen
            ).data
        return self._kept[kind]

    @property
    def svg(self) -> bytes:
        """The picture as SVG, with its description in words inside."""
        ident = "drawing-" + hashlib.sha256(self.source.encode()).hexdigest()[:12]
        return accessible(self._svg, self.title, self.description, ident)

    def _png_settings(self) -> list[str]:
        width, height = size(self._svg)
        dpi = float(_DPI)
        if width and height:
            dpi = min(dpi, 72 * _MOST_SIDE / max(width, height), 72 * (_MOST_PIXELS / (width * height)) ** 0.5)
        if dpi < _DPI:
            self._warn(f"the PNG is shrunk to {dpi:.0f} dots an inch; an SVG, PDF or HTML page shows every detail")
        return [f"dpi={dpi:.2f}"]

    def _pdf_settings(self) -> list[str]:
        longest = max(size(self._svg))
        if longest <= _MOST_PDF:
            return []
        self._warn(f"the PDF is shrunk to {_MOST_PDF / longest:.0%}: no page can be larger")
        inches = _MOST_PDF / 72 - 1
        return [f"size={inches:.0f},{inches:.0f}"]

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """For notebooks: the SVG, and the description as its alternative."""
        bundle = {"text/plain": self.description}
        if self.engine is not None:
            bundle["image/svg+xml"] = inline(self.svg)
        wanted = set(include) if include else set(bundle)
        return {kind: data for kind, data in bundle.items() if kind in wanted - set(exclude or ())}

    def __repr__(self) -> str:
        laid_out = f"laid out by {self.engine}" if self.engine else "not laid out"
        return f"<drawing of {counted(self.graph.graph['operations'], 'operation')}, {laid_out}>"
