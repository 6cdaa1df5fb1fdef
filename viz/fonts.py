"""Text needs a font, and a bare machine may have none: the renderer then leaves every text out without a word.

Whether there is one is asked of the renderer itself, once for each: without a font every text is as wide in
small print as in large. The remedy is a font of matplotlib's, where that is installed, or the project's own
plain lettering, made known by a configuration for that process alone.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from xml.sax.saxutils import escape

from .lettering import FAMILY, font_file
from .palette import FONT

__all__ = ["font_environment"]

_PROBE = (
    f'digraph probe {{ node [shape=plain, fontname="{FONT}"]; '
    'small [label="MMMM", fontsize=10]; large [label="MMMM", fontsize=40] }'
)
_found: dict[tuple[str, str], tuple[dict[str, str], list[str]]] = {}


def font_environment(
    engine: str, path: str, run: Callable[[str, str, dict[str, str]], tuple[bytes, str]]
) -> tuple[dict[str, str], list[str]]:
    """The environment in which an engine has a font, and what there is to say about it.

    Args:
        engine: which engine it is; each is asked once.
        path: the program, where the engine is one.
        run: takes DOT text, a format and an environment, and gives what the engine makes of it.
    """
    if sys.platform in ("darwin", "win32"):  # fonts come with the system
        return {}, []
    key = (engine, path + os.environ.get("FONTCONFIG_FILE", ""))
    if key not in _found:
        _found[key] = ({}, []) if _has_font(run) else _remedy()
    return _found[key]


def _has_font(run: Callable[[str, str, dict[str, str]], tuple[bytes, str]]) -> bool:
    answer, _ = run(_PROBE, "plain", {})
    widths = re.findall(rb"^node (?:small|large) \S+ \S+ (\S+)", answer, re.MULTILINE)
    return len(widths) != 2 or widths[0] != widths[1]


def _remedy() -> tuple[dict[str, str], list[str]]:
    spec = importlib.util.find_spec("matplotlib")
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" if spec and spec.origin else None
    if folder is not None and (folder / "DejaVuSans.ttf").exists():
        return {"FONTCONFIG_FILE": str(_configuration(folder))}, []
    said = f"this machine has no font: texts are drawn in {FAMILY}, a plain lettering for such a case"
    return {"FONTCONFIG_FILE": str(_configuration(None))}, [said]


@lru_cache(maxsize=2)
def _configuration(folder: Path | None) -> Path:
    """A fontconfig file that names `folder`, or one with our own lettering; removed when Python ends."""
    place = _temporary()
    if folder is None:
        folder = place / "fonts"
        folder.mkdir(exist_ok=True)
        for name, bold in (("regular.ttf", False), ("bold.ttf", True)):
            (folder / name).write_bytes(font_file(bold=bold))
    file = place / "fonts.conf"
    file.write_text(
        '<?xml version="1.0"?>\n<!DOCTYPE fontconfig SYSTEM "fonts.dtd">\n<fontconfig>\n'
        f"  <dir>{escape(str(folder))}</dir>\n  <cachedir>{escape(str(place / 'cache'))}</cachedir>\n"
        '  <match target="font">\n    <edit name="antialias" mode="assign"><bool>true</bool></edit>\n'
        '    <edit name="hinting" mode="assign"><bool>false</bool></edit>\n  </match>\n</fontconfig>\n',
        encoding="utf-8",
    )
    return file


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _temporary() -> Path:
    _folders.append(tempfile.TemporaryDirectory(prefix="viz-fonts-"))
    return Path(_folders[-1].name)
