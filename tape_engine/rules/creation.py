"""Factories: what is made anew depends on nothing."""

from __future__ import annotations

from ..registry import declare
from .common import aten

declare(
    aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.ones.default, aten.ones_like.default,
    aten.new_ones.default, aten.full.default, aten.full_like.default, aten.new_full.default,
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default, aten.empty_permuted.default, aten._efficientzerotensor.default,
    aten.scalar_tensor.default, aten.arange.default, aten.arange.start, aten.arange.start_step,
    aten.linspace.default, aten.logspace.default, aten.eye.default, aten.eye.m, aten.hann_window.default,
    # written over: nothing is left of what was there
    aten.fill.Scalar, aten.zero.default,
    # what leaves for Python
    aten._local_scalar_dense.default, aten._linalg_check_errors.default,
    # the state of a gradient scaler
    aten._amp_update_scale.default, aten._amp_foreach_non_finite_check_and_unscale.default,
)  # fmt: skip
