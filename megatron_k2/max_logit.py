"""Each head's exact largest softmax input: computed in tiles, kept in one buffer a model chunk.

Kimi K2's QK-Clip (arXiv 2507.20534, section 2.1) needs the signed maximum of ``scale * q k^T``
under the mask, over all microbatches of a step. The logits of a tile are fp32 products of the given
(bf16) values: on CUDA by a bf16 GEMM with an fp32 result, elsewhere by widening the inputs; both
equal the dense fp32 computation up to the order of an fp32 sum, and no tokens x tokens matrix
exists. Transformer Engine's own figure is rounded to bf16 (0.4 %) instead. Not here: reductions
over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""fp32 logits held at once: cache size on a CPU; on a GPU enough rows to fill the machine."""


def _logits(query: Tensor, key: Tensor, softmax_scale: float) -> Tensor:
    """Return fp32 ``scale * q k^T`` [heads, rows, keys]."""
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        product = torch.bmm(query, key.transpose(1, 2), out_dtype=torch.float32)
        return product.mul_(softmax_scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key_t = query.to(wide), key.to(wide).transpose(1, 2)
    return torch.baddbmm(query.new_empty(()), query, key_t, beta=0, alpha=softmax_scale)


def _sequence_max(
    query: Tensor, key: Tensor, softmax_scale: float, causal: bool, mask: Tensor | None
) -> Tensor:
    """Return the largest logit [heads] of one sequence, query and key [heads, tokens, width]."""
    num_heads, num_queries, num_keys = query.size(0), query.size(1), key.size(1)
    budget = TILE_BYTES.get(query.device.type, TILE_BYTES["cpu"])
    rows = max(1, min(num_queries, budget // (4 * max(1, num_heads * num_keys))))
    offset = num_keys - num_queries
    wide = torch.promote_types(query.dtype, torch.float32)
    maxima = torch.full((num_heads,), -torch.inf, dtype=wide, device=query.device)
    for first in range(0, num_queries, rows):
        last = min(first + rows, num_queries)
        stop = last + offset if causal else num_keys
        logits = _logits(query[:, first:last], key[:, :stop], softmax_scale)
        if causal:
            upper = torch.ones(last - first, last - first, dtype=torch.bool, device=query.device)
            logits[..., first + offset : stop].masked_fill_(upper.triu_(1), -torch.inf)
        if mask is not None:
            logits = logits.masked_fill_(mask[..., first:last, :stop], -torch.inf)
        maxima = torch.maximum(maxima, logits.flatten(1).amax(1))
    return maxima


@torch.no_grad()
def chunked_max_logits(
    query: Tensor,
    key: Tensor,
    softmax_scale: float,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    key_starts: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return each head's largest softmax input over all sequences given.

    Args:
        query: [tokens, heads, width], any float dtype; ``heads`` may be batch x heads.
        key: [tokens, heads, width]; may hold more tokens than ``query`` (the last ones align).
        softmax_scale: factor of ``q k^T``.
        causal: a query sees no later key.
        mask: bool [heads or 1, queries, keys], True hides a key; one sequence only.
        starts: first token of each packed sequence (padding may lie between them).
        lengths: length of each packed sequence without padding.
        key_starts: likewise of the keys, where they lie elsewhere than the queries.
        key_lengths: likewise; the last key of a sequence aligns with its last query.

    Returns:
        fp32 [heads] (fp64 for fp64 inputs) on the device of ``query``; -inf where nothing is seen.
    """
    q, k = query.transpose(0, 1), key.transpose(0, 1)
    if starts is None or lengths is None:
        return _sequence_max(q, k, softmax_scale, causal, mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    maxima = torch.full((q.size(0),), -torch.inf, dtype=wide, device=query.device)
    places = zip(starts, lengths, key_starts or starts, key_lengths or lengths, strict=True)
    for start, length, key_start, key_length in places:
        queries, keys = q[:, start : start + length], k[:, key_start : key_start + key_length]
        found = _sequence_max(queries, keys, softmax_scale, causal, None)
        maxima = torch.maximum(maxima, found)
    return maxima


class MaxLogitRecord:
    """Mixin of a core attention: one fp32 row [heads of this rank] with the running maximum."""

    layer_number: int
    softmax_scale: float
    records_max_logits: bool
    max_attention_logits: Tensor | None = None

    def record_max_logits_(self, maxima: Tensor) -> None:
        """Raise the running maximum to ``maxima`` ([heads] or [batch x heads], any float dtype)."""
        maxima = maxima.detach().float().view(-1, self.num_local_heads).amax(0)
        row = self.max_attention_logits
        if row is None or row.device != maxima.device:
            self.max_attention_logits = maxima
        else:
            torch.maximum(row, maxima, out=row)

    @property
    def num_local_heads(self) -> int:
        """Heads of this tensor-parallel rank."""
        return cast("int", self.num_attention_heads_per_partition)  # type: ignore[attr-defined]

    def set_softmax_scale_(self, softmax_scale: float) -> None:
        """Change the factor of ``q k^T`` here and in the kernels' modules below."""
        for module in cast("torch.nn.Module", self).modules():
            if hasattr(module, "softmax_scale"):
                module.softmax_scale = softmax_scale  # type: ignore[assignment]

    def wants_max_logits(self) -> bool:
        """Tell whether this forward is one to record: training, with gradients.

        Under activation recomputation the first forward runs without gradients and its repetition
        with them, so each microbatch counts once; evaluation never counts.
        """
        training = cast("bool", self.training)  # type: ignore[attr-defined]
        return self.records_max_logits and training and torch.is_grad_enabled()


def _records(model_chunk: torch.nn.Module) -> dict[int, MaxLogitRecord]:
    """Return the recording leaves of a model chunk by 1-based layer number, in layer order."""
    found: dict[int, MaxLogitRecord] = {}
    for name, module in model_chunk.named_modules():
        if isinstance(module, MaxLogitRecord) and module.records_max_logits:
            number = module.layer_number
            if ".mtp." in f".{name}":  # MTP layers count from 1 again
                number += cast("int", module.config.num_layers)  # type: ignore[attr-defined]
            found[number] = module
    return dict(sorted(found.items()))


def recorded_layers(model_chunk: torch.nn.Module) -> list[int]:
    """Return the 1-based numbers of a chunk's recording layers, in the order of its buffer."""
    return list(_records(model_chunk))


def recording_attentions(model_chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the attention layers of a chunk, in the order of the rows of its buffer."""
    parents = {
        id(module.core_attention): module
        for module in model_chunk.modules()
        if isinstance(getattr(module, "core_attention", None), MaxLogitRecord)
    }
    return [parents[id(record)] for record in _records(model_chunk).values()]


def bind_max_logit_buffer(model_chunk: torch.nn.Module) -> Tensor:
    """Give all layers of a chunk one buffer and keep what they recorded; idempotent.

    Call it before CUDA graphs are captured; ``max_logits`` calls it otherwise.

    Returns:
        fp32 [layers of this chunk, heads of this rank], -inf where nothing was recorded; not part
        of the state dict.
    """
    records = list(_records(model_chunk).values())
    heads = records[0].num_local_heads if records else 0
    rows = [record.max_attention_logits for record in records]
    first = next((row for row in rows if row is not None), None)
    base = None if first is None else first._base
    if (
        base is not None
        and len(base) == len(rows)
        and all(r is not None and r._base is base for r in rows)
    ):
        return base
    device = first.device if first is not None else next(model_chunk.parameters()).device
    buffer = torch.full((len(records), heads), -torch.inf, device=device)
    for record, row, slot in zip(records, rows, buffer, strict=True):
        if row is not None:
            slot.copy_(row)
        record.max_attention_logits = slot
    return buffer


def max_logits(model_chunk: torch.nn.Module) -> dict[int, Tensor]:
    """Return the recorded maxima of this rank's layers and heads since the last reset.

    Returns:
        1-based layer number -> fp32 [heads of this tensor-parallel rank], views of the chunk's
        static buffer (data-parallel ranks hold different values; reduce with MAX).
    """
    bind_max_logit_buffer(model_chunk)
    records = _records(model_chunk)
    return {n: cast("Tensor", r.max_attention_logits) for n, r in records.items()}


def reset_max_logits(model_chunk: torch.nn.Module) -> None:
    """Set the chunk's buffer to -inf, in place."""
    bind_max_logit_buffer(model_chunk).fill_(-torch.inf)
