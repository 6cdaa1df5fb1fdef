"""The lettering's TrueType files, read by an independent reader of the tables."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise

import pytest

from viz.lettering import font_file


def tables(data: bytes) -> dict[bytes, bytes]:
    """The tables of a font, after checking directory and checksums."""
    version, count, search, selector, shift = struct.unpack(">IHHHH", data[:12])
    assert version == 0x10000
    assert search == 16 * 2**selector <= 16 * count < 2 * search
    assert shift == 16 * count - search
    records = [struct.unpack(">4sIII", data[12 + 16 * i : 28 + 16 * i]) for i in range(count)]
    assert [tag for tag, *_ in records] == sorted(tag for tag, *_ in records)
    found = {}
    for tag, checksum, offset, length in records:
        assert offset % 4 == 0
        table = data[offset : offset + length]
        whole = table[:8] + bytes(4) + table[12:] if tag == b"head" else table
        assert _sum(whole) == checksum
        found[tag] = table
    assert _sum(data) == 0xB1B0AFBA
    return found


def _sum(data: bytes) -> int:
    padded = data + bytes(-len(data) % 4)
    words: tuple[int, ...] = struct.unpack(f">{len(padded) // 4}I", padded)
    return sum(words) % 2**32


def cmap(table: bytes) -> Iterator[tuple[int, int]]:
    """Every character with its glyph, as format 4 has it."""
    (offset,) = struct.unpack(">I", table[8:12])
    sub = table[offset:]
    form, length, _, twice = struct.unpack(">HHHH", sub[:8])
    assert (form, length) == (4, len(sub))
    n = twice // 2
    ends = struct.unpack(f">{n}H", sub[14 : 14 + twice])
    starts = struct.unpack(f">{n}H", sub[16 + twice : 16 + 2 * twice])
    deltas = struct.unpack(f">{n}H", sub[16 + 2 * twice : 16 + 3 * twice])
    assert ends[-1] == starts[-1] == 0xFFFF
    assert list(ends) == sorted(ends)
    for start, end, delta in zip(starts[:-1], ends[:-1], deltas[:-1], strict=True):
        for code in range(start, end + 1):
            yield code, (code + delta) % 2**16


@pytest.mark.parametrize("bold", [False, True])
def test_the_file_is_whole(bold: bool) -> None:
    found = tables(font_file(bold=bold))
    assert set(found) == {b"OS/2", b"cmap", b"glyf", b"head", b"hhea", b"hmtx", b"loca", b"maxp", b"name", b"post"}
    (count,) = struct.unpack(">H", found[b"maxp"][4:6])
    places = [place for (place,) in struct.iter_unpack(">I", found[b"loca"])]
    assert len(places) == count + 1
    assert places[-1] == len(found[b"glyf"])
    assert all(a <= b for a, b in pairwise(places))
    assert len(found[b"hmtx"]) == 4 * count
    characters = dict(cmap(found[b"cmap"]))
    assert max(characters.values()) == count - 1
    assert set(map(chr, characters)) >= set(map(chr, range(32, 127))) | set("·×−→²ᵀ…σΣ∂√")


@pytest.mark.parametrize("bold", [False, True])
def test_glyphs_lie_inside_their_boxes_and_lines(bold: bool) -> None:
    found = tables(font_file(bold=bold))
    places = [place for (place,) in struct.iter_unpack(">I", found[b"loca"])]
    ascent, descent = struct.unpack(">hh", found[b"hhea"][4:8])
    most_points, most_contours = struct.unpack(">HH", found[b"maxp"][6:10])
    for start, stop in pairwise(places):
        if start == stop:
            continue
        glyph = found[b"glyf"][start:stop]
        contours, left, low, right, high = struct.unpack(">hhhhh", glyph[:10])
        ends = struct.unpack(f">{contours}H", glyph[10 : 10 + 2 * contours])
        points, at = ends[-1] + 1, 12 + 2 * contours
        flags, at = glyph[at : at + points], at + points
        assert all(flag & ~0x40 == 1 for flag in flags)  # on the curve, coordinates of two bytes
        xs = struct.unpack(f">{points}h", glyph[at : at + 2 * points])
        ys = struct.unpack(f">{points}h", glyph[at + 2 * points : at + 4 * points])
        for steps, least, most in ((xs, left, right), (ys, low, high)):
            seen, now = [], 0
            for step in steps:
                now += step
                seen.append(now)
            assert (min(seen), max(seen)) == (least, most)
        assert points <= most_points
        assert contours <= most_contours
        assert descent - 60 <= low
        assert high <= ascent


def test_bold_is_wider_and_both_are_always_the_same() -> None:
    regular, bold = (tables(font_file(bold=each))[b"hmtx"] for each in (False, True))
    pairs = zip(struct.iter_unpack(">Hh", regular), struct.iter_unpack(">Hh", bold), strict=True)
    assert all(thick[0] > thin[0] for thin, thick in pairs)
    assert zlib.crc32(font_file()) == zlib.crc32(font_file())
