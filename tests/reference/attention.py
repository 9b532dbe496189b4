"""Dense attention and dense maxima in fp64 (or the dtype asked for), one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_logits(query: Tensor, key: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return scale q k^T under the causal mask, [heads, queries, keys], from [tokens, heads, d]."""
    logits = torch.einsum("qhd,khd->hqk", query.to(dtype), key.to(dtype)) * scale
    offset = key.size(0) - query.size(0)
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + offset)
    return logits.masked_fill(hidden, -torch.inf)


def dense_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int]
) -> Tensor:
    """Return causal attention within each packed sequence, fp64 [tokens, heads, v width]."""
    parts = zip(*(x.double().split(list(lengths)) for x in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in parts:
        weights = torch.softmax(dense_logits(q, k, scale, torch.float64), dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def dense_max_logits(
    query: Tensor,
    key: Tensor,
    scale: float,
    lengths: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return each head's largest causal logit over the packed sequences, [heads]."""
    found = []
    for q, k in zip(query.split(list(lengths)), key.split(list(lengths)), strict=True):
        if len(q):
            found.append(dense_logits(q, k, scale, dtype).amax((1, 2)))
    return torch.stack(found).amax(0)


def dense_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm in fp64."""
    x, weight = x.double(), weight.double()
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
