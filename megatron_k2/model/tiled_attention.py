"""Causal attention on the CPU in tiles of query rows, with each head's exact largest logit.

Torch's CPU flash kernel needs equal head widths (Kimi K2: q/k 192, v 128) and hides the softmax
input. This one runs on batched GEMMs: the logits in fp32 (bf16 inputs are widened first, so they
equal the dense fp32 computation), the softmax in fp32, every other product in the inputs' dtype.
At 4 x 512 tokens and 8 heads it takes 0.45 of the padded flash kernel's time, forward and backward
(``tools/bench/attention.py``); the largest logit costs one more read of a tile in cache.
Short sequences in a row share a tile, each hidden from the others: a loop over the 28 of a row of
1024 costs more than their products.
A sequence may have more keys than queries: the last query then sees the last key (context
parallelism, cached keys). Limits: causal, no dropout. Pure torch: no process groups, no Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
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


class _Piece:
    """Some heads of one sequence, or of short ones: ``queries`` and ``keys`` are its tokens.

    Attributes:
        lengths: of its sequences, where they are more than one.
    """

    __slots__ = ("heads", "keys", "lengths", "queries")

    def __init__(
        self, heads: slice, queries: slice, keys: slice, lengths: tuple[int, ...] = ()
    ) -> None:
        self.heads, self.queries, self.keys, self.lengths = heads, queries, keys, lengths

    @property
    def num_keys(self) -> int:
        """Keys of the sequence."""
        return int(self.keys.stop - self.keys.start)


class _Tile:
    """One tile of a piece: its query rows ``rows`` see the first ``num_keys`` keys.

    Attributes:
        rows, diagonal: within the piece's queries and keys; ``diagonal`` is the masked square.
        all_rows, all_keys: the same queries and keys among all tokens.
    """

    __slots__ = ("all_keys", "all_rows", "diagonal", "num_keys", "rows")

    def __init__(self, piece: _Piece, first: int, last: int) -> None:
        start = piece.queries.start
        more = piece.keys.stop - piece.keys.start - (piece.queries.stop - start)
        self.rows = slice(first, last)
        self.all_rows = slice(start + first, start + last)
        self.num_keys = last + more
        self.all_keys = slice(piece.keys.start, piece.keys.start + self.num_keys)
        self.diagonal = slice(first + more, self.num_keys)


def _heads_per_tile(num_heads: int, num_keys: int) -> int:
    return max(1, min(num_heads, TILE_BYTES // (4 * QUERY_ROWS * max(num_keys, 1))))


def _pieces(query: Tensor, lengths: Sequence[int], key_lengths: Sequence[int]) -> Iterator[_Piece]:
    """Yield every piece of work; by shapes alone, without a cache to fit, all heads at once."""
    start, key_start, num_heads = 0, 0, query.size(1)
    for together in _together(lengths, key_lengths):
        length, key_length = (sum(some) for some in together)
        queries, keys = slice(start, start + length), slice(key_start, key_start + key_length)
        several = together[0] if len(together[0]) > 1 else ()
        step = num_heads if query.is_meta else _heads_per_tile(num_heads, key_length)
        for head in range(0, num_heads, step):
            yield _Piece(slice(head, min(head + step, num_heads)), queries, keys, several)
        start, key_start = queries.stop, keys.stop


@lru_cache(maxsize=64)
def _together(
    lengths: tuple[int, ...], key_lengths: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return lengths of the sequences of each piece: one, or short ones that fill a tile."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    room = 0
    for length, key_length in zip(lengths, key_lengths, strict=True):
        is_short = length == key_length <= QUERY_ROWS // 2
        if is_short and length <= room:
            found[-1] = (*found[-1][0], length), (*found[-1][1], key_length)
        else:
            found.append(((length,), (key_length,)))
            room = QUERY_ROWS if is_short else 0
        room -= length
    return found


def _tiles(piece: _Piece) -> Iterator[_Tile]:
    length = piece.queries.stop - piece.queries.start
    for first in range(0, length, QUERY_ROWS):
        yield _Tile(piece, first, min(first + QUERY_ROWS, length))


def _upper_triangle(device: torch.device) -> Tensor:
    return torch.ones(QUERY_ROWS, QUERY_ROWS, dtype=torch.bool, device=device).triu_(1)


def _hidden(piece: _Piece, upper: Tensor) -> Tensor:
    """Return what a tile's diagonal square hides, bool: later tokens, and other sequences."""
    if not piece.lengths:
        return upper
    lengths = torch.tensor(piece.lengths, device=upper.device)
    total = sum(piece.lengths)
    number = torch.arange(len(lengths), device=upper.device)
    number = number.repeat_interleave(lengths, output_size=total)
    return upper[:total, :total] | (number[:, None] != number)


def _masked_logits(
    query: Tensor, key_t: Tensor, tile: _Tile, scale: float, hidden: Tensor
) -> Tensor:
    """Return fp32 ``scale * q k^T`` [heads, rows, keys] of one tile, -inf where it is hidden."""
    logits = torch.baddbmm(
        query.new_empty(()), query[:, tile.rows], key_t[..., : tile.num_keys], beta=0, alpha=scale
    )
    num_rows = tile.rows.stop - tile.rows.start
    logits[..., tile.diagonal].masked_fill_(hidden[:num_rows, :num_rows], -torch.inf)
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
        lengths: tuple[tuple[int, ...], tuple[int, ...]],
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
        for piece in _pieces(query, *lengths):
            heads = piece.heads
            q_wide = q[heads, piece.queries].to(wide)
            k_wide_t = k[heads, piece.keys].to(wide).transpose(1, 2)
            hidden = _hidden(piece, upper)
            for tile in _tiles(piece):
                logits = _masked_logits(q_wide, k_wide_t, tile, scale, hidden)
                if with_max:
                    maxima[heads] = torch.maximum(maxima[heads], logits.flatten(1).amax(1))
                if piece.num_keys <= KEEP_PROBABILITIES_TOKENS:
                    weights = torch.softmax(logits, -1).to(value.dtype)
                    probabilities.append(weights)
                else:
                    log_sum = torch.logsumexp(logits, -1, keepdim=True)
                    log_sums[heads, tile.all_rows] = log_sum.squeeze(-1)
                    weights = logits.sub_(log_sum).exp_().to(value.dtype)
                out[heads, tile.all_rows] = torch.bmm(weights, v[heads, tile.all_keys])
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
        grad_q, grad_k, grad_v = (x.transpose(0, 1) for x in grads)
        queries, keys, values, d_outs = (
            x.transpose(0, 1) for x in (query, key, value, grad_output)
        )
        upper = _upper_triangle(query.device)
        kept = iter(probabilities)
        for piece in _pieces(query, *ctx.lengths):
            heads = piece.heads
            q, d_out = (x[heads, piece.queries].contiguous() for x in (queries, d_outs))
            k, v = (x[heads, piece.keys].contiguous() for x in (keys, values))
            d_q = torch.empty_like(q)
            d_k = torch.zeros(k.shape, dtype=log_sums.dtype, device=k.device)
            d_v = torch.zeros(v.shape, dtype=log_sums.dtype, device=v.device)
            recompute = piece.num_keys > KEEP_PROBABILITIES_TOKENS
            wide = (q.to(d_k.dtype), k.to(d_k.dtype).transpose(1, 2)) if recompute else None
            hidden = _hidden(piece, upper) if recompute else upper
            for tile in _tiles(piece):
                if wide is not None:
                    logits = _masked_logits(*wide, tile, ctx.scale, hidden)
                    weights = logits.sub_(log_sums[heads, tile.all_rows, None]).exp_().to(v.dtype)
                else:
                    weights = next(kept)
                _accumulate_tile_((d_q, d_k, d_v), (q, k, v, d_out), weights, tile, scale=ctx.scale)
            grad_q[heads, piece.queries] = d_q
            grad_k[heads, piece.keys] = d_k.mul_(ctx.scale)
            grad_v[heads, piece.keys] = d_v
        return *grads, None, None, None


def _accumulate_tile_(
    grads: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Tensor,
    tile: _Tile,
    *,
    scale: float,
) -> None:
    """Write one tile's query gradient and add its (unscaled) key and value gradients."""
    d_q, d_k, d_v = grads
    q, k, v, d_out = inputs
    rows, seen = tile.rows, slice(tile.num_keys)
    d_rows = d_out[:, rows]
    d_v[:, seen] += torch.bmm(weights.transpose(1, 2), d_rows)
    d_weights = torch.bmm(d_rows, v[:, seen].transpose(1, 2))
    d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    torch.baddbmm(q.new_empty(()), d_logits, k[:, seen], beta=0, alpha=scale, out=d_q[:, rows])
    d_k[:, seen] += torch.bmm(d_logits.transpose(1, 2), q[:, rows])


def tiled_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax_scale: float,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    *,
    with_max: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute causal attention and each head's largest softmax input.

    Args:
        query: [tokens, heads, qk width], any float dtype; ``heads`` may be batch x heads.
        key: [keys, heads, qk width].
        value: [keys, heads, v width]; its width may differ from that of the keys.
        softmax_scale: factor of ``q k^T``.
        lengths: lengths of the sequences packed along the first axis; their sum is ``tokens``.
            None means one sequence.
        key_lengths: likewise of the keys; the last query of a sequence sees all of its keys. None:
            as many as queries, or all keys for one sequence.
        with_max: find the largest logits; without, they are -inf.

    Returns:
        The output [tokens, heads, v width] in the inputs' dtype, and the largest masked and scaled
        logit [heads] in fp32 (fp64 for fp64 inputs), which carries no gradient.

    Raises:
        ValueError: lengths do not add up to the tokens given, a sequence has fewer keys than
            queries, or shapes do not fit each other.
    """
    if query.shape[1:] != key.shape[1:] or key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"causal tiles need query and key heads of equal width and as many values as keys, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if lengths is None:
        lengths, key_lengths = (query.size(0),), (key.size(0),)
    both = tuple(lengths), tuple(lengths if key_lengths is None else key_lengths)
    for name, some, tokens in zip(("sequence", "key"), both, (query, key), strict=True):
        if sum(some) != tokens.size(0):
            raise ValueError(f"{name} lengths {some} do not add up to {tokens.size(0)} tokens")
    if any(length > keys for length, keys in zip(*both, strict=True)):
        raise ValueError(f"sequences of {both[0]} queries cannot be causal over {both[1]} keys")
    result = _TiledCausalAttention.apply(query, key, value, softmax_scale, both, with_max)
    return cast("tuple[Tensor, Tensor]", result)
