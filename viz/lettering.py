"""A plain lettering of our own, for machines without a font: strokes of one width, made into TrueType files.

Each glyph is an advance and strokes, in tenths of the font size: x from the left, y up from the baseline; small
letters are 5.4 high, capitals 7.3. A stroke is a line through points (``x y x y …``) or an arc of an ellipse
(``@ x y rx ry from to``, in degrees against the clock), strokes parted by ``;``. The advances are about those of
DejaVu Sans and Verdana, so that a text laid out with this fits its box in those as well.

The files have the ten tables that a TrueType font needs, after the OpenType specification, version 1.9:
https://learn.microsoft.com/typography/opentype/spec/otff
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["FAMILY", "font_file"]

FAMILY = "Tape Lettering"
_UNITS = 1000
_ASCENT, _DESCENT = 930, 240

_GLYPHS = """
A 6.8 .6 0 3.4 7.3 6.2 0 ; 1.6 2.5 5.2 2.5
B 6.9 1.2 0 1.2 7.3 3.6 7.3 ; @ 3.6 5.5 1.9 1.8 -90 90 ; 1.2 3.7 3.8 3.7 ; @ 3.8 1.85 2.1 1.85 -90 90 ; 3.8 0 1.2 0
C 7 @ 4.2 3.65 3.4 3.65 48 312
D 7.7 1.2 0 1.2 7.3 3.4 7.3 ; @ 3.4 3.65 3.5 3.65 -90 90 ; 3.4 0 1.2 0
E 6.3 5.5 7.3 1.2 7.3 1.2 0 5.6 0 ; 1.2 3.9 5.2 3.9
F 5.8 5.2 7.3 1.2 7.3 1.2 0 ; 1.2 3.9 4.8 3.9
G 7.8 @ 4.2 3.65 3.4 3.65 48 325 ; 4.5 3.5 6.9 3.5 6.9 1.1
H 7.5 1.2 0 1.2 7.3 ; 6.3 0 6.3 7.3 ; 1.2 3.9 6.3 3.9
I 3 1.5 0 1.5 7.3
J 3.2 1.8 7.3 1.8 0 ; @ .4 0 1.4 1.5 -90 0
K 6.6 1.2 0 1.2 7.3 ; 5.8 7.3 1.2 3.2 ; 2.7 4.5 6.2 0
L 5.6 1.2 7.3 1.2 0 5.2 0
M 8.6 1.2 0 1.2 7.3 4.3 2.4 7.4 7.3 7.4 0
N 7.5 1.2 0 1.2 7.3 6.3 0 6.3 7.3
O 7.9 @ 3.95 3.65 3.2 3.65 0 360
P 6 1.2 0 1.2 7.3 3.2 7.3 ; @ 3.2 5.3 2.1 2 -90 90 ; 3.2 3.3 1.2 3.3
Q 7.9 @ 3.95 3.65 3.2 3.65 0 360 ; 4.4 1.6 6.6 -1
R 7 1.2 0 1.2 7.3 3.4 7.3 ; @ 3.4 5.3 2 2 -90 90 ; 3.4 3.3 1.2 3.3 ; 3.6 3.3 6.3 0
S 6.4 @ 3.2 5.45 2 1.85 40 270 ; @ 3.2 1.8 2.2 1.8 -140 90
T 6.1 .4 7.3 5.7 7.3 ; 3.05 7.3 3.05 0
U 7.3 1.2 7.3 1.2 2.5 ; @ 3.65 2.5 2.45 2.5 180 360 ; 6.1 2.5 6.1 7.3
V 6.8 .6 7.3 3.4 0 6.2 7.3
W 9.9 .6 7.3 2.7 0 4.95 7 7.2 0 9.3 7.3
X 6.9 .8 7.3 6.1 0 ; .8 0 6.1 7.3
Y 6.1 .4 7.3 3.05 3.6 5.7 7.3 ; 3.05 3.6 3.05 0
Z 6.9 .9 7.3 6 7.3 .9 0 6.1 0
a 6.1 @ 2.9 3.5 2.1 1.9 0 145 ; 5 3.5 5 0 ; @ 2.8 1.6 2 1.6 0 360
b 6.4 1.1 7.6 1.1 0 ; @ 3.2 2.7 2.2 2.7 0 360
c 5.5 @ 3.2 2.7 2.4 2.7 52 308
d 6.4 5.3 7.6 5.3 0 ; @ 3.2 2.7 2.2 2.7 0 360
e 6.2 .8 2.9 5.4 2.9 ; @ 3.1 2.7 2.35 2.7 5 315
f 3.6 @ 3.1 6.2 1.4 1.4 80 180 ; 1.7 6.2 1.7 0 ; .4 5.3 3.3 5.3
g 6.4 @ 3.2 2.7 2.2 2.7 0 360 ; 5.3 5.4 5.3 -.2 ; @ 3.1 -.2 2.2 1.9 -145 0
h 6.3 1.1 7.6 1.1 0 ; @ 3.2 3.3 2.1 2.1 0 180 ; 5.3 3.3 5.3 0
i 2.8 1.4 5.4 1.4 0 ; 1.4 7.35 1.4 7.4
j 2.8 1.4 5.4 1.4 -.8 ; @ .2 -.8 1.2 1.3 -90 0 ; 1.4 7.35 1.4 7.4
k 5.8 1.1 7.6 1.1 0 ; 4.9 5.4 1.1 2.2 ; 2.5 3.4 5.3 0
l 2.8 1.4 7.6 1.4 0
m 9.7 1.1 5.4 1.1 0 ; @ 3 3.4 1.9 2 0 180 ; 4.9 3.4 4.9 0 ; @ 6.8 3.4 1.9 2 0 180 ; 8.7 3.4 8.7 0
n 6.3 1.1 5.4 1.1 0 ; @ 3.2 3.3 2.1 2.1 0 180 ; 5.3 3.3 5.3 0
o 6.1 @ 3.05 2.7 2.3 2.7 0 360
p 6.4 1.1 5.4 1.1 -2.1 ; @ 3.2 2.7 2.2 2.7 0 360
q 6.4 5.3 5.4 5.3 -2.1 ; @ 3.2 2.7 2.2 2.7 0 360
r 4.1 1.1 5.4 1.1 0 ; @ 3.1 3.2 2 2.2 75 180
s 5.2 @ 2.6 4.05 1.65 1.35 35 270 ; @ 2.6 1.35 1.8 1.35 -145 90
t 3.9 1.7 7 1.7 1.5 ; @ 3 1.5 1.3 1.5 180 280 ; .4 5.3 3.5 5.3
u 6.3 1.1 5.4 1.1 2.1 ; @ 3.2 2.1 2.1 2.1 180 360 ; 5.3 5.4 5.3 0
v 5.9 .6 5.4 2.95 0 5.3 5.4
w 8.2 .6 5.4 2.3 0 4.1 5.1 5.9 0 7.6 5.4
x 5.9 .7 5.4 5.2 0 ; .7 0 5.2 5.4
y 5.9 .6 5.4 2.95 0 ; 5.3 5.4 2.95 0 2.2 -1.5 .9 -2
z 5.3 .7 5.4 4.6 5.4 .7 0 4.7 0
0 6.4 @ 3.2 3.65 2.3 3.65 0 360
1 6.4 1.4 6.4 3.3 7.3 3.3 0 ; 1.4 0 5.2 0
2 6.4 @ 3 5.3 2.1 2 -25 155 ; 4.9 4.45 .9 0 5.3 0
3 6.4 @ 2.9 5.55 2 1.75 -90 140 ; @ 2.9 1.9 2.3 1.9 -145 90 ; 2.3 3.8 2.9 3.8
4 6.4 4.5 0 4.5 7.3 .7 2 5.7 2
5 6.4 5 7.3 1.5 7.3 1.4 4 ; @ 2.9 2.3 2.3 2.3 -140 130
6 6.4 @ 3.2 2.3 2.2 2.3 0 360 ; @ 4.2 3.4 3.2 3.9 75 190
7 6.4 .9 7.3 5.4 7.3 2.4 0
8 6.4 @ 3.2 5.6 1.9 1.7 0 360 ; @ 3.2 1.95 2.2 1.95 0 360
9 6.4 @ 3.2 5 2.2 2.3 0 360 ; @ 2.2 3.9 3.2 3.9 -105 10
. 3.2 1.6 .1 1.6 .2
, 3.2 1.7 .3 1.2 -1.3
: 3.4 1.7 .1 1.7 .2 ; 1.7 4.4 1.7 4.5
; 3.4 1.8 .3 1.3 -1.3 ; 1.7 4.4 1.7 4.5
! 4 2 7.3 2 2.3 ; 2 .1 2 .2
? 5.3 @ 2.4 5.4 1.8 1.9 -60 160 ; 3.3 3.8 2.3 2.9 2.3 2 ; 2.3 .1 2.3 .2
' 2.8 1.4 7.3 1.4 4.9
" 4.6 1.5 7.3 1.5 4.9 ; 3.1 7.3 3.1 4.9
( 3.9 @ 5.6 3 4.2 5.6 135 225
) 3.9 @ -1.7 3 4.2 5.6 -45 45
[ 3.9 3.1 7.6 1.2 7.6 1.2 -1.3 3.1 -1.3
] 3.9 .8 7.6 2.7 7.6 2.7 -1.3 .8 -1.3
{ 6.4 5 7.6 3.3 7 3.2 4.2 1.6 3.2 3.2 2.2 3.3 -.7 5 -1.3
} 6.4 1.4 7.6 3.1 7 3.2 4.2 4.8 3.2 3.2 2.2 3.1 -.7 1.4 -1.3
< 8.4 7.2 5.8 1.2 3.2 7.2 .6
> 8.4 1.2 5.8 7.2 3.2 1.2 .6
/ 3.4 .2 -.8 3.2 7.3
\\ 3.4 3.2 -.8 .2 7.3
| 3.4 1.7 7.6 1.7 -2.2
_ 5 0 -2.1 5 -2.1
- 3.6 .7 2.7 2.9 2.7
+ 8.4 1.2 3.1 7.2 3.1 ; 4.2 .1 4.2 6.1
= 8.4 1.2 4.2 7.2 4.2 ; 1.2 2 7.2 2
* 5 2.5 7.3 2.5 3.7 ; .8 6.4 4.2 4.6 ; 4.2 6.4 .8 4.6
# 8.4 3.6 7.2 2.1 0 ; 6.4 7.2 4.9 0 ; 1.3 4.8 7.6 4.8 ; .8 2.4 7.1 2.4
% 9.5 @ 2.4 5.5 1.6 1.8 0 360 ; @ 7.1 1.8 1.6 1.8 0 360 ; 7 7.3 2.5 0
& 7.8 7 0 2.1 5 ; @ 3.4 5.8 1.6 1.5 20 215 ; @ 3.3 2 2.4 2 110 325 ; 5.3 .9 6.7 3.8
@ 10 @ 5 2.8 1.7 1.9 0 360 ; @ 5 2.7 4.2 4.2 0 310 ; 6.7 4.7 6.7 2 ; @ 7.95 2.4 1.25 1.6 190 360
$ 6.4 @ 3.2 5.2 1.9 1.5 40 270 ; @ 3.2 2.1 2.1 1.6 -140 90 ; 3.2 8 3.2 -.9
^ 8.4 1.6 4.6 4.2 7.3 6.8 4.6
~ 8.4 @ 2.8 2.7 1.6 1 20 180 ; @ 5.6 3.3 1.6 1 -160 0
` 5 1.6 8 3 6.4
° 5 @ 2.5 5.9 1.3 1.4 0 360
· 3.2 1.6 3 1.6 3.1
× 8.4 1.8 5.5 6.6 .7 ; 1.8 .7 6.6 5.5
− 8.4 1.2 3.1 7.2 3.1
\u2217 8.4 4.2 5 4.2 1.2 ; 2.5 4.1 5.9 2.1 ; 5.9 4.1 2.5 2.1
→ 8.4 .7 3.1 7.7 3.1 ; 5.4 5.2 7.7 3.1 5.4 1
² 4 @ 1.9 6.5 1.2 1 -30 160 ; 2.9 5.9 .8 3.9 3.3 3.9
³ 4 @ 1.9 6.7 1.1 .9 -90 150 ; @ 1.9 4.9 1.3 1 -145 90
ᵀ 4 .6 7.3 3.4 7.3 ; 2 7.3 2 3.9
… 10 1.7 .1 1.7 .2 ; 5 .1 5 .2 ; 8.3 .1 8.3 .2
σ 6.3 @ 3 2.6 2.3 2.6 0 360 ; 3 5.2 6 5.2
Σ 6.3 5.5 7.3 1 7.3 3.6 3.8 1 0 5.7 0
∂ 5.2 @ 2.5 2.1 2 2.2 0 360 ; 4.5 2.3 4.2 5.4 3.2 7 1.5 7.2
√ 6.4 .4 3.4 1.4 3.8 2.8 0 5.4 7.8 6.2 7.8
‖ 5 1.6 7.6 1.6 -2.2 ; 3.4 7.6 3.4 -2.2
α 6.6 @ 2.9 2.7 2.1 2.7 0 360 ; 5.6 5.4 5 2.7 5 1.2 6 0
β 6.4 1.1 -2.1 1.1 5.6 ; @ 2.9 5.8 1.8 1.8 -80 180 ; @ 3 2 2.3 2 -130 90
γ 5.9 .6 5.2 2.95 0 2.95 -2.1 ; 5.3 5.4 2.95 0
λ 5.9 1 7.6 1.9 7.3 5.4 0 ; 2.9 4.4 .7 0
μ 6.4 1.1 5.4 1.1 -2.1 ; @ 3.2 2.1 2.1 2.1 180 360 ; 5.3 5.4 5.3 0
θ 6.1 @ 3.05 3.7 2.2 3.8 0 360 ; .9 3.7 5.2 3.7
"""

Point = tuple[float, float]


def font_file(*, bold: bool = False) -> bytes:
    """A TrueType file of the lettering, in one of its two weights."""
    stroke, widening = (150, 1.12) if bold else (92, 1.0)
    glyphs: list[tuple[int, float, list[list[Point]]]] = [(0, 6.0, [[(1, 0), (1, 7.3), (5, 7.3), (5, 0), (1, 0)]])]
    glyphs.append((0x20, 3.2, []))
    for line in _GLYPHS.strip().splitlines():
        letter, advance, strokes = line.split(" ", 2)
        glyphs.append((ord(letter), float(advance), [_points(each) for each in strokes.split(" ; ")]))
    glyphs = [glyphs[0], *sorted(glyphs[1:])]
    outlines = [[_pen(a, b, stroke / 2, widening) for s in drawn for a, b in _pairs(s)] for _, _, drawn in glyphs]
    advances = [round(advance * 100 * widening) for _, advance, _ in glyphs]
    return _sfnt(_tables([code for code, _, _ in glyphs], advances, outlines, bold=bold))


def _points(stroke: str) -> list[Point]:
    if not stroke.startswith("@"):
        numbers = [float(each) for each in stroke.split()]
        return list(zip(numbers[::2], numbers[1::2], strict=True))
    x, y, rx, ry, start, stop = (float(each) for each in stroke[1:].split())
    steps = max(4, round(abs(stop - start) / 15))
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def _pairs(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    return list(pairwise(points))


def _pen(start: Point, stop: Point, radius: float, widening: float) -> list[tuple[int, int]]:
    """The outline that a round pen leaves between two points, clockwise, in font units."""
    (x0, y0), (x1, y1) = ((x * 100 * widening, y * 100) for x, y in (start, stop))
    along = math.atan2(y1 - y0, x1 - x0)
    outline = []
    for (x, y), first in (((x1, y1), along + math.pi / 2), ((x0, y0), along - math.pi / 2)):
        for i in range(7):
            angle = first - math.pi * i / 6
            outline.append((round(x + radius * math.cos(angle)), round(y + radius * math.sin(angle))))
    return [point for i, point in enumerate(outline) if point != outline[i - 1]]


# -- the file ------------------------------------------------------------------------------------------


def _glyph(contours: Sequence[Sequence[tuple[int, int]]]) -> bytes:
    if not contours:
        return b""
    points = [point for contour in contours for point in contour]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ends, at = [], -1
    for contour in contours:
        at += len(contour)
        ends.append(at)
    flags = bytearray([1] * len(points))
    flags[0] |= 0x40  # the contours overlap
    data = struct.pack(">hhhhh", len(contours), min(xs), min(ys), max(xs), max(ys))
    data += struct.pack(f">{len(ends)}HH", *ends, 0) + bytes(flags)
    for values in (xs, ys):
        data += struct.pack(f">{len(values)}h", *(b - a for a, b in zip([0, *values], values, strict=False)))
    return data + b"\0" * (-len(data) % 4)


def _tables(
    codes: Sequence[int],
    advances: Sequence[int],
    outlines: Sequence[Sequence[Sequence[tuple[int, int]]]],
    *,
    bold: bool,
) -> dict[bytes, bytes]:
    glyphs = [_glyph(each) for each in outlines]
    places = [0]
    for each in glyphs:
        places.append(places[-1] + len(each))
    flat = [point for outline in outlines for contour in outline for point in contour]
    box = (
        min(x for x, _ in flat), min(y for _, y in flat), max(x for x, _ in flat), max(y for _, y in flat),
    )  # fmt: skip
    most_points = max(sum(map(len, outline)) for outline in outlines)
    most_contours = max(map(len, outlines))
    bearings = [min((x for contour in outline for x, _ in contour), default=0) for outline in outlines]
    widest = max(advances)
    metrics = b"".join(struct.pack(">Hh", *pair) for pair in zip(advances, bearings, strict=True))
    mean = round(sum(advances) / len(advances))
    style = "Bold" if bold else "Regular"
    os2 = struct.pack(
        ">HhHHHhhhhhhhhhhh10sIIII4sHHHhhhHHII hhHHH".replace(" ", ""),
        4, mean, 700 if bold else 400, 5, 0, 650, 600, 0, 75, 650, 600, 0, 350, 50, 300, 0, bytes(10), 1, 0, 0, 0,
        b"TAPE", 0x20 if bold else 0x40, min(codes[1:]), max(codes), _ASCENT, -_DESCENT, 0, _ASCENT, _DESCENT, 1, 0,
        540, 730, 0, 32, 1,
    )  # fmt: skip
    return {
        b"OS/2": os2,
        b"cmap": _cmap(codes),
        b"glyf": b"".join(glyphs),
        b"head": struct.pack(
            ">IIIIHHqqhhhhHHhhh", 0x10000, 0x10000, 0, 0x5F0F3CF5, 3, _UNITS, 0, 0, *box, int(bold), 8, 2, 1, 0
        ),
        b"hhea": struct.pack(
            ">IhhhHhhhhhhhhhhhH", 0x10000, _ASCENT, -_DESCENT, 0, widest, min(bearings), 0, box[2], 1, 0, 0, 0, 0, 0, 0,
            0, len(codes),
        ),
        b"hmtx": metrics,
        b"loca": struct.pack(f">{len(places)}I", *places),
        b"maxp": struct.pack(
            ">IHHHHHHHHHHHHHH", 0x10000, len(codes), most_points, most_contours, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0
        ),
        b"name": _names(style),
        b"post": struct.pack(">IiHHIIIII", 0x30000, 0, 0xFF9C, 50, 0, 0, 0, 0, 0),
    }  # fmt: skip


def _cmap(codes: Sequence[int]) -> bytes:
    """Character to glyph, in format 4: runs of consecutive characters, each a segment."""
    runs: list[list[int]] = []
    for glyph, code in enumerate(codes[1:], 1):
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code, glyph])
    runs.append([0xFFFF, 0xFFFF, 0])
    count = len(runs)
    reach = 2 ** int(math.log2(count))
    body = struct.pack(">HHHH", 2 * count, 2 * reach, int(math.log2(reach)), 2 * (count - reach))
    body += struct.pack(f">{count}HH", *(run[1] for run in runs), 0)
    body += struct.pack(f">{count}H", *(run[0] for run in runs))
    body += struct.pack(f">{count}H", *((run[2] - run[0]) & 0xFFFF if run[2] else 1 for run in runs))
    body += struct.pack(f">{count}H", *[0] * count)
    return struct.pack(">HHHHIHHH", 0, 1, 3, 1, 12, 4, len(body) + 6, 0) + body


def _names(style: str) -> bytes:
    texts = {1: FAMILY, 2: style, 3: f"{FAMILY} {style} 1", 4: f"{FAMILY} {style}", 5: "Version 1.0",
             6: f"{FAMILY.replace(' ', '')}-{style}"}  # fmt: skip
    records, data = b"", b""
    for ident, text in texts.items():
        encoded = text.encode("utf-16-be")
        records += struct.pack(">HHHHHH", 3, 1, 0x409, ident, len(encoded), len(data))
        data += encoded
    return struct.pack(">HHH", 0, len(texts), 6 + len(records)) + records + data


def _checksum(data: bytes) -> int:
    padded = data + b"\0" * (-len(data) % 4)
    words: tuple[int, ...] = struct.unpack(f">{len(padded) // 4}I", padded)
    return sum(words) & 0xFFFFFFFF


def _sfnt(tables: dict[bytes, bytes]) -> bytes:
    """The tables as one file, with its directory and checksums."""
    count = len(tables)
    reach = 2 ** int(math.log2(count))
    head = struct.pack(">IHHHH", 0x10000, count, 16 * reach, int(math.log2(reach)), 16 * (count - reach))
    at, directory, body = 12 + 16 * count, b"", b""
    for tag, data in sorted(tables.items()):
        directory += struct.pack(">4sIII", tag, _checksum(data), at + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    file = head + directory + body
    place = file.index(tables[b"head"]) + 8
    return file[:place] + struct.pack(">I", (0xB1B0AFBA - _checksum(file)) & 0xFFFFFFFF) + file[place + 4 :]
