# mypy: allow-untyped-defs
"""Attention, recurrent layers, and what sequences of unequal length need."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import rule, sample, spec
from .common import Tensor, aten, kernels
from .indexing import indices, to_shape

# -- attention ---------------------------------------------------------------------------------------


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    formula="softmax(q kᵀ) v",
    samples=[
        sample(spec(1, 2, 3, 4), spec(1, 2, 3, 4), spec(1, 2, 3, 4)),
        sample(spec(1, 2, 3, 4), spec(1, 2, 5, 4), spec(1, 2, 5, 4), scale=0.3),
        sample(spec(1, 2, 3, 4), spec(1, 2, 3, 4), spec(1, 2, 3, 4), 0.0, True),
    ],
)
def scaled_dot_product_attention_cpu_grad(
    g, out, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None
):
    by_q, by_k, by_v = kernels._scaled_dot_product_flash_attention_for_cpu_backward(
        g[0], q, k, v, out[0], out[1], dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return by_q, by_k, by_v, None if attn_mask is None else _mask_grad(g[0], q, k, v, attn_mask, scale)


def _mask_grad(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """With ``P = softmax(s q kᵀ + mask)``: ``P (g vᵀ - rowsum(P g vᵀ))``; the kernel itself does not give it."""
    p = ((q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale) + mask).softmax(-1)
    gp = g @ v.mT
    return to_shape(p * (gp - (p * gp).sum(-1, keepdim=True)), mask.shape)


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
def scaled_dot_product_attention_cpu_backward_grad(
    g, out, gy, q, k, v, y, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    """With P the softmax of ``S = s q kᵀ``: dV = Pᵀ gy, dS = P (gy Vᵀ - rowsum(gy y)), dQ = s dS k, dK = s dSᵀ q."""
    by_q, by_k, by_v = (torch.zeros_like(t) if each is None else each for each, t in zip(g, (q, k, v), strict=True))
    s = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT) * s
    if attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = torch.where(ones.tril(), scores, float("-inf"))
    p = scores.softmax(-1)
    gp = gy @ v.mT
    ds = p * (gp - (p * gp).sum(-1, keepdim=True))
    # what reaches dS through dQ and dK, then P and gP through dS and dV
    to_ds = s * (by_q @ k.mT + q @ by_k.mT)
    mean = (to_ds * p).sum(-1, keepdim=True)
    to_gp = p * (to_ds - mean)
    to_p = to_ds * (gp - (p * gp).sum(-1, keepdim=True)) - gp * mean + gy @ by_v.mT
    to_sum = p * (to_p - (p * to_p).sum(-1, keepdim=True))
    to_scores = s * to_sum
    return (
        p @ by_v + to_gp @ v,
        to_scores @ k + s * (ds @ by_k),
        to_scores.mT @ q + s * (ds.mT @ by_q),
        to_gp.mT @ gy,
        None,
        None,
        None if attn_mask is None else to_shape(to_sum, attn_mask.shape),
    )


# -- recurrent layers --------------------------------------------------------------------------------


_f32 = torch.float32


@rule(
    aten.mkldnn_rnn_layer.default,
    formula="lstm(x)",
    samples=[
        sample(
            spec(3, 2, 4, dtype=_f32), spec(20, 4, dtype=_f32), spec(20, 5, dtype=_f32), spec(20, dtype=_f32),
            spec(20, dtype=_f32), spec(2, 5, dtype=_f32), spec(2, 5, dtype=_f32), False, [], 2, 5, 1, True, False,
            False, train,
        )
        for train in (True, False)
    ],
)  # fmt: skip
def mkldnn_rnn_layer_grad(
    g, out, x, w0, w1, w2, w3, hx, cx, reverse, batch_sizes, mode, hidden_size, num_layers, has_biases, bidirectional,
    batch_first, train,
):  # fmt: skip
    by_out, by_h, by_c = (torch.zeros_like(y) if each is None else each for each, y in zip(g[:3], out[:3], strict=True))
    if len(out) < 4 or out[3] is None:  # run without grad mode, as in a replay, the layer makes no workspace
        with torch.enable_grad():
            out = kernels.mkldnn_rnn_layer(
                x, w0, w1, w2, w3, hx, cx, reverse, batch_sizes, mode, hidden_size, num_layers, has_biases,
                bidirectional, batch_first, train,
            )  # fmt: skip
    by_x, by_w0, by_w1, by_w2, by_w3, by_hx, by_cx = kernels.mkldnn_rnn_layer_backward(
        x, w0, w1, w2, w3, hx, cx, out[0], out[1], out[2], by_out, by_h, by_c, reverse, mode, hidden_size,
        num_layers, has_biases, train, bidirectional, batch_sizes, batch_first, out[3],
    )  # fmt: skip
    return by_x, by_w0, by_w1, by_w2, by_w3, by_hx, by_cx


@rule(aten._pack_padded_sequence.default, samples=[sample(spec(3, 2, 2), indices(3, 1), False)])
def pack_padded_sequence_grad(g, out, x, lengths, batch_first):
    if g[0] is None:
        return None, None
    return kernels._pack_padded_sequence_backward(g[0], x.shape, out[1], batch_first), None


# -- losses over alignments --------------------------------------------------------------------------

# given outright, as finite differences do not apply: the kernel takes it that each row is a log softmax
_logs = spec(4, 2, 3, values=[-1.2, -0.9, -1.4, -2.0, -0.5, -1.3] * 4)
_targets = indices(1, 2, 2, 1, shape=(2, 2))


@rule(aten._ctc_loss.default, samples=[sample(_logs, _targets, [4, 3], [2, 1])])
@rule(aten._ctc_loss.Tensor, samples=[sample(_logs, _targets, indices(4, 3), indices(2, 1))])
def ctc_loss_grad(g, out, x, targets, input_lengths, target_lengths, blank=0, zero_infinity=False):
    if g[0] is None:
        return None, *_no_lengths(input_lengths)
    by_x = kernels._ctc_loss_backward(
        g[0], x, targets, input_lengths, target_lengths, out[0], out[1], blank, zero_infinity
    )
    return by_x, *_no_lengths(input_lengths)


def _no_lengths(lengths: Any) -> list[None]:
    """No gradient for the targets, nor for the lengths where they are tensors."""
    return [None] * (3 if isinstance(lengths, torch.Tensor) else 1)


# -- bags of embeddings ------------------------------------------------------------------------------


_bag = indices(1, 3, 1, 0), indices(0, 0, 0, 1), indices(3, 1), indices(1, 3)  # indices, their bags, sizes, places


@rule(
    aten._embedding_bag.default,
    samples=[
        *[sample(spec(4, 3), indices(1, 3, 1, 0), indices(0, 3), False, mode) for mode in (0, 1, 2)],
        sample(spec(4, 3), indices(1, 3, 1, 0), indices(0, 3), False, 0, False, spec(4)),
    ],
)
@rule(aten._embedding_bag_forward_only.default)  # where nothing requires a gradient of torch's own
def embedding_bag_grad(
    g, out, weight, index, offsets, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=None,
    include_last_offset=False, padding_idx=-1,
):  # fmt: skip
    if g[0] is None:
        return None, None, None, None
    if include_last_offset:
        offsets = offsets[:-1]
    _, bags, sizes, places = out
    if bags.numel() == 0:  # the kernel did not need to tell which bag an index is in
        bags = torch.searchsorted(offsets, torch.arange(index.numel(), device=index.device), right=True) - 1
        bags = bags.to(index.dtype)
    by_weight = kernels._embedding_bag_dense_backward(
        g[0], index, bags, sizes, places, weight.shape[0], scale_grad_by_freq, mode, per_sample_weights, padding_idx
    )
    if per_sample_weights is None:
        return by_weight, None, None, None
    by_each = kernels._embedding_bag_per_sample_weights_backward(g[0], weight, index, offsets, bags, mode, padding_idx)
    return by_weight, None, None, by_each


@rule(
    aten._embedding_bag_dense_backward.default,
    samples=[sample(spec(2, 3), *_bag, 4, scale, mode, None) for mode in (0, 1) for scale in (False, True)]
    + [sample(spec(2, 3), *_bag, 4, scale, 0, spec(4)) for scale in (False, True)],
)
def embedding_bag_dense_backward_grad(
    g, out, gy, index, bags, sizes, places, rows, scale_grad_by_freq, mode, per_sample_weights=None, padding_idx=-1
):
    if mode == 2:
        return g.gather(0, places), None, None, None, None, None
    picked = torch.where((index == padding_idx).unsqueeze(-1), 0, g.index_select(0, index))
    if scale_grad_by_freq:  # each row by what the kernel divides it by, which on the CPU is not always its own count
        ones, how = torch.ones_like(gy.narrow(1, 0, 1)), (index, bags, sizes, places, rows)
        whole, scaled = (kernels._embedding_bag_dense_backward(ones, *how, scale, 0, None) for scale in (False, True))
        picked = picked * torch.where(whole == 0, 0, scaled / whole).index_select(0, index)
    by_weights = None
    if per_sample_weights is not None:
        by_weights = (picked * gy.index_select(0, bags)).sum(-1)
        picked = picked * per_sample_weights.unsqueeze(-1)
    if mode == 1:
        picked = picked / sizes.index_select(0, bags).unsqueeze(-1)
    return torch.zeros_like(gy).index_add(0, bags, picked), None, None, None, None, by_weights


@rule(
    aten._embedding_bag_per_sample_weights_backward.default,
    samples=[sample(spec(2, 3), spec(4, 3), indices(1, 3, 1, 0), indices(0, 3), indices(0, 0, 0, 1), 0)],
)
def embedding_bag_per_sample_weights_backward_grad(g, out, gy, weight, index, offsets, bags, mode, padding_idx=-1):
    each = torch.where(index == padding_idx, 0, g).unsqueeze(-1)
    by_gy = torch.zeros_like(gy).index_add(0, bags, each * weight.index_select(0, index))
    by_weight = torch.zeros_like(weight).index_add(0, index, each * gy.index_select(0, bags))
    return by_gy, by_weight, None, None, None
