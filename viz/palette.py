"""The colours of a picture, chosen so that roles stay apart for colour-blind readers and in grey.

The line colours began as those that Okabe and Ito proposed for figures ("Color Universal Design", 2008) and were
moved apart in lightness, until any two differ clearly (by 20 or more in CIE Lab) also for protanopes,
deuteranopes and tritanopes as Machado, Oliveira and Fernandes model them (2009). Text has a contrast of at least
4.5 to its ground. Colour never stands alone: a role has a shape of its own, and gradients are dashed.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAINT", "FONT", "GRADIENT", "GROUP", "INK", "LINE", "PAPER", "QUIET", "ROLE", "SCOPE", "VALUE", "Paint"]


class Paint(NamedTuple):
    """A line colour, the fill inside it, and (of leaves) the Graphviz shape."""

    line: str
    fill: str
    shape: str = "box"


#: Verdana and DejaVu Sans are equally wide, and hardly any font is wider: text laid out in the one that a machine
#: has fits its box in whichever a reader's machine shows it.
FONT = "DejaVu Sans,Verdana,Bitstream Vera Sans,Helvetica,Arial,sans-serif"
PAPER = "#FFFFFF"
INK = "#1B1E23"
LINE = "#33383F"
QUIET = "#4A4F57"  # shapes, places in the source
FAINT = "#8A8F98"
ROLE = {
    "input": Paint("#0B57A8", "#D9E8F6", "tab"),
    "parameter": Paint("#D08400", "#FFEDBF", "cylinder"),
    "target": Paint("#009E73", "#D2F1E4", "octagon"),
    "constant": Paint("#484848", "#E4E4E4", "note"),
}
VALUE = Paint("#8A8F98", "#F0F2F4")
GRADIENT = Paint("#B03A10", "#FCE4D8")
GROUP = Paint("#A05A92", "#F8F0F6")
SCOPE = Paint("#C3C8CF", "#F8F9FA")
