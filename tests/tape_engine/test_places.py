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
