"""Attention over cached latents: decoding rows together, prompt chunks one by one.

MLA's keys and values are linear in the latent, so that ``q k^T = (q W_k) c^T`` and
``p v = (p c) W_v^T`` (DeepSeek-V2, arXiv 2405.04434, section 2.1): *absorbed*, queries move into
the latent's space and the cache is read as it lies. The other way *expands* the cached latents to
keys and values. ``absorbs`` says which needs fewer products; a single query always absorbs. On
the CPU the cache is gathered by page table and multiplied in two batched products; the gather
costs a third of what attention over unpaged slots does (32 sequences of 128, one thread).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_k2.engine import host_kernels
from megatron_k2.engine.batch import Chunk, DecodeGroup
from megatron_k2.engine.weights import LatentWeights


def absorbs(queries: int, keys: int, nope: int, rope: int, v_width: int, rank: int) -> bool:
    """Tell whether absorbing needs no more multiplications than expanding, per head.

    Args:
        queries: new tokens.
        keys: tokens that the last query sees.
        nope: width of the unrotated part of a query.
        rope: width of the rotated part.
        v_width: width of a value head.
        rank: ``kv_lora_rank``.
    """
    expansion = rank * (nope + v_width)  # a token's, of either kind: the same two matrices
    absorbed = queries * (expansion + keys * (2 * rank + rope))
    expanded = keys * (expansion + queries * (nope + rope + v_width))
    return absorbed <= expanded


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate neighbours of ``x`` [rows, ..., rope], by ``turns`` complex64 [rows, ..., rope / 2].

    Queries and keys keep Hugging Face's order of neighbours; upstream then moves the pairs' halves
    apart in both, which no product of theirs sees.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def attend(
    weights: LatentWeights,
    query: Tensor,
    pages: Tensor,
    groups: tuple[DecodeGroup, ...],
    chunks: tuple[Chunk, ...],
) -> Tensor:
    """Return every row's heads' outputs.

    Args:
        weights: of the layer.
        query: [rows, heads, nope + rope], the last part rotated.
        pages: the layer's cache [cache rows, kv_lora_rank + rope], the new latents written.
        groups: decoding rows.
        chunks: prompt rows.

    Returns:
        [rows, heads x v].
    """
    parts = [_decode(weights, query[group.rows], pages, group) for group in groups]
    for chunk in chunks:
        parts.append(_prefill(weights, query[chunk.rows], pages, chunk))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _absorbed(weights: LatentWeights, query: Tensor) -> Tensor:
    """Return queries in the latent's space, [rows, heads, kv_lora_rank + rope]."""
    still, turning = query.tensor_split([weights.k_up.size(1)], dim=-1)
    return torch.cat((torch.bmm(still.transpose(0, 1), weights.k_up).transpose(0, 1), turning), -1)


def _values(weights: LatentWeights, mixed: Tensor) -> Tensor:
    """Return [rows, heads x v] for mixed latents [heads, rows, kv_lora_rank]."""
    return torch.bmm(mixed, weights.v_up.transpose(1, 2)).transpose(0, 1).flatten(1)


def _decode(weights: LatentWeights, query: Tensor, pages: Tensor, group: DecodeGroup) -> Tensor:
    """Attend one query a sequence; [sequences, heads x v]. Softmax and its inputs are fp32."""
    sequences, _, length = group.mask.shape
    absorbed = _absorbed(weights, query)
    latent = query.size(-1) - weights.k_up.size(1)
    rank = pages.size(-1) - latent
    if host_kernels.suit(absorbed):
        places = group.pages.view(sequences, length)
        mixed = host_kernels.attend(absorbed, rank, pages, places, group.ends, weights.scale)
        return _values(weights, mixed.transpose(0, 1))
    cached = pages.index_select(0, group.pages).view(sequences, length, -1).float()
    scores = torch.baddbmm(
        group.mask, absorbed.float(), cached.transpose(1, 2), alpha=weights.scale
    )
    mixed = torch.bmm(torch.softmax(scores, -1), cached[..., :rank])
    return _values(weights, mixed.transpose(0, 1).to(query.dtype))


def _prefill(weights: LatentWeights, query: Tensor, pages: Tensor, chunk: Chunk) -> Tensor:
    """Attend a chunk's queries; [new tokens, heads x v]."""
    heads, nope, rank = weights.k_up.shape
    cached = pages.index_select(0, chunk.pages)
    rope, v_width = cached.size(-1) - rank, weights.v_up.size(1)
    if absorbs(query.size(0), cached.size(0), nope, rope, v_width, rank):
        key = cached.expand(heads, -1, -1)
        mixed = _causal(_absorbed(weights, query).transpose(0, 1), key, key, weights.scale, chunk)
        return _values(weights, mixed[..., :rank])
    latent, turning = cached.tensor_split([rank], dim=-1)
    key = torch.matmul(latent, weights.k_up.transpose(1, 2))
    key = torch.cat((key, turning.expand(heads, -1, -1)), -1)
    value = torch.matmul(latent, weights.v_up.transpose(1, 2))
    missing = max(0, key.size(-1) - v_width)  # equal widths take torch's fused kernel
    mixed = _causal(query.transpose(0, 1), key, pad(value, [0, missing]), weights.scale, chunk)
    return mixed[..., :v_width].transpose(0, 1).flatten(1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, chunk: Chunk) -> Tensor:
    """Return [heads, queries, width] of causal attention."""
    return scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=chunk.mask,
        is_causal=chunk.mask is None, scale=scale,
    )[0]  # fmt: skip
