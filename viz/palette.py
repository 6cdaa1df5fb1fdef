"""The colours of a picture, chosen so that roles stay apart for colour-blind readers and in grey.

The line colours are those that Okabe and Ito proposed for figures ("Color Universal Design", 2008), darkened
where they carry text, so that every text has a contrast of at least 4.5 to its ground. Colour never stands
alone: a role has a shape of its own, and gradients are dashed.
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
    "input": Paint("#0072B2", "#E1EFF8", "tab"),
    "parameter": Paint("#A86400", "#FFF0D0", "cylinder"),
    "target": Paint("#00775A", "#DCF2EA", "octagon"),
    "constant": Paint("#6F6F6F", "#EEEEEE", "note"),
}
VALUE = Paint("#8A8F98", "#F0F2F4")
GRADIENT = Paint("#C24A00", "#FDEBE0")
GROUP = Paint("#8A5A86", "#F7EFF5")
SCOPE = Paint("#C3C8CF", "#F8F9FA")
