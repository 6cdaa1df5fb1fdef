"""The colours: legible, and apart for every kind of colour vision."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from viz.palette import FAINT, GRADIENT, GROUP, INK, PAPER, QUIET, ROLE, SCOPE, VALUE

Array = npt.NDArray[np.float64]

#: Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
#: severity 1, on linear sRGB.
VISION = {
    "trichromat": np.eye(3),
    "protanope": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranope": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanope": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
LINES = {role: paint.line for role, paint in ROLE.items()} | {"gradient": GRADIENT.line, "group": GROUP.line}


def linear(color: str) -> Array:
    """Linear sRGB (IEC 61966-2-1)."""
    c = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: Array) -> Array:
    """CIE Lab of linear sRGB, white D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    t = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    light, dark = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("eyes", VISION)
def test_lines_are_apart_for_every_kind_of_colour_vision(eyes: str) -> None:
    for (one, a), (other, b) in combinations(LINES.items(), 2):
        apart = float(np.linalg.norm(lab(VISION[eyes] @ linear(a)) - lab(VISION[eyes] @ linear(b))))
        assert apart >= 20, f"{one} and {other}: {apart:.1f}"


def test_every_role_has_a_shape_of_its_own() -> None:
    assert len({paint.shape for paint in ROLE.values()}) == len(ROLE)


def test_text_is_legible_on_every_ground() -> None:
    grounds = [PAPER, SCOPE.fill, VALUE.fill, GROUP.fill, GRADIENT.fill, *(paint.fill for paint in ROLE.values())]
    for ground in grounds:
        assert contrast(INK, ground) >= 7
        assert contrast(QUIET, ground) >= 4.5
        assert contrast(GRADIENT.line, ground) >= 4.5


def test_lines_are_seen_on_paper() -> None:
    assert all(contrast(line, PAPER) >= 3 for line in [*LINES.values(), FAINT])
