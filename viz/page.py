"""A picture as a page of its own: the SVG, zoomed and moved with mouse or keys, and the description in words."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

__all__ = ["accessible", "page", "size"]


def size(svg: bytes) -> tuple[float, float]:
    """Width and height of a Graphviz SVG, in points; ``(0, 0)`` where it does not tell."""
    head = re.search(rb'<svg[^>]*?width="([\d.]+)pt"[^>]*?height="([\d.]+)pt"', svg)
    return (float(head[1]), float(head[2])) if head else (0.0, 0.0)


def accessible(svg: bytes, title: str, description: str, ident: str) -> bytes:
    """The SVG with its title and its description in words, for readers that speak; `ident` sets it apart."""
    told = f'<title id="{ident}-title">{escape(title)}</title>\n'
    told += f'<desc id="{ident}-desc">{escape(_clean(description))}</desc>\n'
    text = svg.decode()
    head = re.search(r"<svg\b[^>]*>", text)
    if head is None:
        return svg
    named = head[0][:-1] + f' role="img" aria-labelledby="{ident}-title" aria-describedby="{ident}-desc">'
    return (text[: head.start()] + named + "\n" + told + text[head.end() :]).encode()


def _clean(text: str) -> str:
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def inline(svg: bytes) -> str:
    """The SVG as it stands inside a page: without the declarations of a document of its own."""
    text = svg.decode()
    return text[max(0, text.find("<svg")) :]


def page(svg: bytes, title: str, description: str) -> str:
    """A self-contained HTML page around an SVG; nothing is loaded from elsewhere."""
    parts = {"title": escape(title), "description": escape(_clean(description)), "svg": inline(svg)}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # All at once: what is put in may itself hold the marks.
    return re.sub(r"\{\{(title|description|svg)\}\}", lambda mark: parts[mark[1]], template)
