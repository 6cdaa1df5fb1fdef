"""Pieces of DOT's HTML-like labels, and the texts that stand in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise

__all__ = [
    "attributes",
    "counted",
    "font",
    "html",
    "quoted",
    "row",
    "shape_text",
    "shorten",
    "stack",
    "table",
    "wrapped",
]

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def shape_text(shape: Sequence[int] | None) -> str:
    """``(64, 784)``, ``(1,)``, ``()``."""
    return "" if shape is None else str(tuple(shape))


def shorten(text: str, most: int = 24) -> str:
    """`text` cut to `most` characters; of a dotted name the end is kept."""
    if len(text) <= most:
        return text
    return "…" + text[-(most - 1) :] if "." in text and " " not in text else text[: most - 1] + "…"


def counted(count: int, one: str, many: str | None = None) -> str:
    """``1 leaf``, ``3,000 operations``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def wrapped(text: str, width: int = 40, most: int = 4) -> list[str]:
    """`text` in lines of at most `width` characters, broken at spaces where there are any; `most` lines of it."""
    breaks = [0, *(m.end() for m in re.finditer(r" +|(?<=[,(\[])(?=\w)", text)), len(text)]
    lines = [""]
    for start, stop in pairwise(breaks):
        piece = text[start:stop]
        while len(piece) > width:  # nothing to break at: cut anywhere
            lines.append(piece[:width])
            piece = piece[width:]
        if len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    lines = [line.strip() for line in lines if line.strip()]
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][: width - 1] + "…"]


def html(text: str) -> str:
    r"""`text` for an HTML-like label: characters of the markup escaped, those that XML forbids replaced.

    A backslash stands alone inside a tag: Graphviz would read ``\N`` as the node's name, and has no way to say
    that it means a backslash.
    """
    escaped = escape(_NOT_XML.sub("\ufffd", text), quote=True)
    return escaped.replace("\n", " ").replace("\\", "<font>&#92;</font>")


def quoted(text: str) -> str:
    """`text` as a quoted DOT string that shows as it is."""
    return '"' + _NOT_XML.sub("\ufffd", text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def attributes(pairs: Mapping[str, str]) -> str:
    """An attribute list, its values already quoted where they have to be."""
    return ", ".join(f"{name}={value}" for name, value in pairs.items())


def font(text: str, *, size: float | None = None, color: str | None = None) -> str:
    """Markup `text` in another size (in points) or colour."""
    chosen = (f' point-size="{size:g}"' if size else "") + (f' color="{color}"' if color else "")
    return f"<font{chosen}>{text}</font>"


def table(rows: str, *, spacing: int = 0, padding: int = 0, look: str = 'border="0"') -> str:
    """A table without lines of its own, `spacing` points between its cells and `padding` inside them."""
    return f'<table {look} cellborder="0" cellspacing="{spacing}" cellpadding="{padding}">{rows}</table>'


def row(cells: Iterable[str]) -> str:
    """One row of cells."""
    return f"<tr>{''.join(cells)}</tr>"


def stack(lines: Iterable[str]) -> str:
    """Lines of text under each other, with air above each.

    A line is as high as the largest text in it: a wide space before and after keeps it off the line above. (A
    table of lines would do as well, but is pulled apart where its cell is higher than it.)
    """
    small, large = font(" ", size=13), font(" ", size=15)
    spaced: list[str] = []
    for line in lines:
        air = small if "point-size" in line else large if spaced else ""
        spaced.append(f"{air}{line}{air}")
    return "<br/>".join(spaced)
