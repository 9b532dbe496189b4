"""Causal attention on the CPU in tiles of query rows, with each head's exact largest logit.

Torch's CPU flash kernel needs equal head widths (Kimi K2: q/k 192, v 128) and hides the softmax
input. This one runs on batched GEMMs: the logits in fp32 (bf16 inputs are widened first, so they
equal the dense fp32 computation), the softmax in fp32, every other product in the inputs' dtype.
At 4 x 512 tokens and 8 heads it takes 0.45 of the padded flash kernel's time, forward and backward
(``tools/bench/attention.py``); the largest logit costs one more read of a tile in cache.
Limits: causal, no dropout, as many keys as queries. Pure torch: no process groups, no Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_ROWS = 128
"""Query rows of a tile: 256 was slower, 64 no faster, at head widths 48 and 192 (AVX512-bf16)."""

TILE_BYTES = 2 << 20
"""fp32 logits of one tile, all its heads together: about the L2 cache of one core."""

KEEP_PROBABILITIES_TOKENS = 1024
"""Longer sequences recompute the probabilities in the backward pass, so that memory stays linear
in the sequence; up to here they are kept (half of 2 bytes x tokens^2 a head), 25 % faster."""


class _Tile:
    """One tile: queries ``rows`` see keys ``keys``; ``diagonal`` is the masked square's place."""

    __slots__ = ("diagonal", "heads", "keys", "rows", "widths")

    def __init__(self, heads: slice, start: int, first: int, last: int) -> None:
        self.heads = heads
        self.rows = slice(first, last)
        self.keys = slice(start, last)
        self.diagonal = slice(first - start, last - start)
        self.widths = last - first


def _heads_per_tile(num_heads: int, length: int) -> int:
    return max(1, min(num_heads, TILE_BYTES // (4 * QUERY_ROWS * max(length, 1))))


def _head_groups(num_heads: int, lengths: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """Yield (heads, first token, last token + 1) of every piece of work."""
    start = 0
    for length in lengths:
        step = _heads_per_tile(num_heads, length)
        for head in range(0, num_heads, step):
            yield slice(head, min(head + step, num_heads)), start, start + length
        start += length


def _tiles(heads: slice, start: int, stop: int) -> Iterator[_Tile]:
    for first in range(start, stop, QUERY_ROWS):
        yield _Tile(heads, start, first, min(first + QUERY_ROWS, stop))


def _upper_triangle(device: torch.device) -> Tensor:
    return torch.ones(QUERY_ROWS, QUERY_ROWS, dtype=torch.bool, device=device).triu_(1)


def _masked_logits(
    query: Tensor, key_t: Tensor, tile: _Tile, start: int, scale: float, upper: Tensor
) -> Tensor:
    """Return fp32 ``scale * q k^T`` [heads, rows, keys] of one tile, -inf above the diagonal."""
    rows = slice(tile.rows.start - start, tile.rows.stop - start)
    logits = torch.baddbmm(
        query.new_empty(()), query[:, rows], key_t[..., : rows.stop], beta=0, alpha=scale
    )
    mask = upper[: tile.widths, : tile.widths]
    logits[..., tile.diagonal].masked_fill_(mask, -torch.inf)
    return logits


class _TiledCausalAttention(torch.autograd.Function):
    """Autograd node of ``tiled_causal_attention``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        lengths: tuple[int, ...],
        with_max: bool,
    ) -> tuple[Tensor, Tensor]:
        num_heads = query.size(1)
        wide = torch.promote_types(query.dtype, torch.float32)
        output = value.new_empty(*query.shape[:2], value.size(-1))
        maxima = torch.full((num_heads,), -torch.inf, dtype=wide, device=query.device)
        log_sums = maxima.new_empty(num_heads, query.size(0))
        upper = _upper_triangle(query.device)
        probabilities: list[Tensor] = []
        q, k, v, out = (x.transpose(0, 1) for x in (query, key, value, output))
        for heads, start, stop in _head_groups(num_heads, lengths):
            q_wide = q[heads, start:stop].to(wide)
            k_wide_t = k[heads, start:stop].to(wide).transpose(1, 2)
            for tile in _tiles(heads, start, stop):
                logits = _masked_logits(q_wide, k_wide_t, tile, start, scale, upper)
                if with_max:
                    maxima[heads] = torch.maximum(maxima[heads], logits.flatten(1).amax(1))
                if stop - start <= KEEP_PROBABILITIES_TOKENS:
                    weights = torch.softmax(logits, -1).to(value.dtype)
                    probabilities.append(weights)
                else:
                    log_sum = torch.logsumexp(logits, -1, keepdim=True)
                    log_sums[heads, tile.rows] = log_sum.squeeze(-1)
                    weights = logits.sub_(log_sum).exp_().to(value.dtype)
                out[heads, tile.rows] = torch.bmm(weights, v[heads, tile.keys])
        ctx.save_for_backward(query, key, value, log_sums, *probabilities)
        ctx.scale, ctx.lengths = scale, lengths
        ctx.mark_non_differentiable(maxima)
        return output, maxima

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor, _grad_maxima: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, log_sums, *probabilities = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        views = [x.transpose(0, 1) for x in (query, key, value, grad_output)]
        grad_views = [x.transpose(0, 1) for x in grads]
        upper = _upper_triangle(query.device)
        kept = iter(probabilities)
        for heads, start, stop in _head_groups(query.size(1), ctx.lengths):
            q, k, v, d_out = (x[heads, start:stop].contiguous() for x in views)
            d_q = torch.empty_like(q)
            d_k = torch.zeros(k.shape, dtype=log_sums.dtype, device=k.device)
            d_v = torch.zeros(v.shape, dtype=log_sums.dtype, device=v.device)
            recompute = stop - start > KEEP_PROBABILITIES_TOKENS
            wide = (q.to(d_k.dtype), k.to(d_k.dtype).transpose(1, 2)) if recompute else None
            for tile in _tiles(heads, start, stop):
                if wide is not None:
                    logits = _masked_logits(*wide, tile, start, ctx.scale, upper)
                    weights = logits.sub_(log_sums[heads, tile.rows, None]).exp_().to(v.dtype)
                else:
                    weights = next(kept)
                rows = slice(tile.rows.start - start, tile.rows.stop - start)
                _accumulate_tile_((d_q, d_k, d_v), (q, k, v, d_out), weights, rows, scale=ctx.scale)
            for grad, part in zip(grad_views, (d_q, d_k.mul_(ctx.scale), d_v), strict=True):
                grad[heads, start:stop] = part
        return *grads, None, None, None


def _accumulate_tile_(
    grads: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Tensor,
    rows: slice,
    *,
    scale: float,
) -> None:
    """Write one tile's query gradient and add its (unscaled) key and value gradients."""
    d_q, d_k, d_v = grads
    q, k, v, d_out = inputs
    d_rows = d_out[:, rows]
    d_v[:, : rows.stop] += torch.bmm(weights.transpose(1, 2), d_rows)
    d_weights = torch.bmm(d_rows, v[:, : rows.stop].transpose(1, 2))
    d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    torch.baddbmm(
        q.new_empty(()), d_logits, k[:, : rows.stop], beta=0, alpha=scale, out=d_q[:, rows]
    )
    d_k[:, : rows.stop] += torch.bmm(d_logits.transpose(1, 2), q[:, rows])


def tiled_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float,
    lengths: Sequence[int] | None = None,
    *,
    with_max: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute causal attention and each head's largest softmax input.

    Args:
        query: [tokens, heads, qk width], any float dtype; ``heads`` may be batch x heads.
        key: [tokens, heads, qk width].
        value: [tokens, heads, v width]; its width may differ from that of the keys.
        softmax_scale: factor of ``q k^T``.
        lengths: lengths of the sequences packed along the first axis; their sum is ``tokens``.
            None means one sequence.
        with_max: find the largest logits; without, they are -inf.

    Returns:
        The output [tokens, heads, v width] in the inputs' dtype, and the largest masked and scaled
        logit [heads] in fp32 (fp64 for fp64 inputs), which carries no gradient.

    Raises:
        ValueError: ``lengths`` do not add up to the tokens given, or keys and queries differ.
    """
    if query.shape != key.shape or query.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"causal tiles need equal query and key shapes and as many values, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    lengths = (query.size(0),) if lengths is None else tuple(lengths)
    if sum(lengths) != query.size(0):
        raise ValueError(f"sequence lengths {lengths} do not add up to {query.size(0)} tokens")
    result = _TiledCausalAttention.apply(query, key, value, softmax_scale, lengths, with_max)
    return cast("tuple[Tensor, Tensor]", result)
