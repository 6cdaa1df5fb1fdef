"""Reading and writing a place of a base."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tape_engine import places


@pytest.mark.parametrize(
    ("shape", "size", "stride", "offset"),
    [
        ((4, 3), (2, 3), (3, 1), 3),
        ((4, 3), (3,), (4,), 0),
        ((5,), (3, 2), (1, 1), 1),
        ((4,), (), (), 2),
        ((3,), (0,), (1,), 0),
        ((2, 3), (3, 2), (1, 3), 0),
    ],
)
def test_read_view_and_write_view(shape: Any, size: Any, stride: Any, offset: int) -> None:
    base = torch.rand(shape)
    got = places.read_view.forward(base, size, stride, offset)
    assert torch.equal(got, base.as_strided(size, stride, offset))
    part = torch.rand(size)
    if len(set(places.positions(size, stride, offset, base.device).tolist())) == part.numel():
        written = places.write_view.forward(base, part, size, stride, offset)
        wanted = base.clone()
        wanted.as_strided(size, stride, offset).copy_(part)
        assert torch.equal(written, wanted)
        assert written.stride() == base.stride()


def test_within_is_true_only_of_what_a_base_has() -> None:
    """Held against the positions themselves, for slices of slices, and for places that are no slices."""
    generator = torch.Generator().manual_seed(0)

    def number(stop: int) -> int:
        return int(torch.randint(stop, (), generator=generator))

    found = 0
    for _ in range(2000):
        base = torch.empty(4, 5, 6)[number(2) :, :: 1 + number(3), number(3) :: 1 + number(2)]
        if number(2):
            base = base.transpose(number(3), number(3))
        shape, strides = tuple(base.shape), base.stride()
        if number(2):
            part = base[number(shape[0]) :].select(1 + number(2), 0)[..., :: 1 + number(2)]
            if number(2):
                part = part[..., None].as_strided((*part.shape, 1), (*part.stride(), number(4)))
            if number(2):
                part = part[..., None].as_strided((*part.shape, 1), (*part.stride(), number(4)))
            place: Any = tuple(part.shape), part.stride(), part.storage_offset() - base.storage_offset()
            assert places.within(place, shape, strides)
        else:
            place = (1 + number(3), 1 + number(3)), (number(9), number(4)), number(60)
        has = set(places.positions(shape, strides, 0, base.device).tolist())
        size, stride, offset = place
        of_part = set(places.positions(size, stride, offset, base.device).tolist())
        if places.within(place, shape, strides):
            found += 1
            assert of_part <= has
    assert found > 1000


def test_a_flat_view_of_rows_without_a_gap_between_them_is_within() -> None:
    assert places.within(((16,), (2,), 0), (4, 4), (8, 2))
    assert places.within(((6, 2), (4, 2), 2), (4, 4), (8, 2))
    assert not places.within(((17,), (2,), 0), (4, 4), (8, 2))
    assert not places.within(((16,), (2,), 0), (4, 4), (10, 2))


@pytest.mark.parametrize(
    ("shape", "strides", "wanted"),
    [
        ((2, 3), (3, 1), False),
        ((2, 2), (3, 2), False),  # x[:2, ::2] of rows of three
        ((3, 2), (1, 1), True),
        ((2, 3), (0, 1), True),
        ((1, 3), (0, 1), False),
        ((2, 2), (2, 2), True),
    ],
)
def test_overlapping(shape: Any, strides: Any, wanted: bool) -> None:
    assert places.overlapping(shape, strides) is wanted
