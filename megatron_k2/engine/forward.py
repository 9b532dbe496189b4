"""The engine's own forward pass: the training model's arithmetic without its modules.

A decoding step of a small model is mostly the overhead of calls: Megatron's modules take some 700
operators a token step through wrappers for pipelines, recomputation and offloading, and cache
expanded keys. Here rows of all sequences go through a few functions over the same weights
(weights.py), with latents in pages (cache.py). Tests hold it to the model's own logits. Ranks of
tensor and expert parallelism all compute the same rows and sum their parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_k2.engine import host_kernels
from megatron_k2.engine.attention import attend, turned
from megatron_k2.engine.batch import StepBatch
from megatron_k2.engine.cache import LatentCache
from megatron_k2.engine.experts import choose, expert_mlp, gated_mlp
from megatron_k2.engine.weights import (
    GatedWeights,
    LatentWeights,
    LayerWeights,
    ModelWeights,
    Norm,
)


class Reduce:
    """Sums of partial results over the tensor-parallel and the experts' groups.

    Args:
        tp: group over which heads, MLPs and vocabulary are cut; None or one rank: nothing to do.
        experts: group over which routed experts are cut.
    """

    def __init__(self, tp: Any = None, experts: Any = None) -> None:
        self.tp = tp if tp is not None and tp.size() > 1 else None
        self.experts = experts if experts is not None and experts.size() > 1 else None

    def over(self, group: Any, x: Tensor) -> Tensor:
        """Sum ``x`` in place. Collective: all-reduce over ``group`` unless it is None."""
        if group is not None:
            torch.distributed.all_reduce(x, group=group)
        return x

    def joined(self, logits: Tensor) -> Tensor:
        """Join [rows, vocabulary / tp]. Collective: all-gather over ``tp``."""
        if self.tp is None:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.tp.size())]
        torch.distributed.all_gather(parts, logits.contiguous(), group=self.tp)
        return torch.cat(parts, -1)


def forward(
    weights: ModelWeights,
    cache: LatentCache,
    batch: StepBatch,
    reduce: Reduce,
    routes: list[Tensor] | None = None,
) -> Tensor:
    """Write the new tokens' latents and return logits.

    Args:
        weights: of this rank.
        cache: its pages; those of ``batch.pages`` are written.
        batch: the step.
        reduce: the groups that share the work.
        routes: if given, the experts [outputs, topk] of each MoE layer are appended.

    Returns:
        fp32 [outputs, padded vocabulary], whole on every rank.

    Collective: a few over the groups of ``reduce`` - every rank must call with the same batch.
    """
    x = _embedded(weights, batch.ids, reduce)
    for layer, pages in zip(weights.layers, cache.pages, strict=True):
        x = x + _attention(layer.attention, x, pages, batch, reduce)
        x = x + _mlp(layer, x, batch.logit_rows, reduce, routes)
    if batch.logit_rows is not None:
        x = x.index_select(0, batch.logit_rows)
    return reduce.joined(host_kernels.linear(_normed(x, weights.norm), weights.output)).float()


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    if host_kernels.suit(x):
        return host_kernels.rms_norm(x, norm.weight, norm.eps)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _embedded(weights: ModelWeights, ids: Tensor, reduce: Reduce) -> Tensor:
    """Look up [rows, hidden]; ids of other ranks' vocabularies give zero and are summed."""
    if reduce.tp is None:
        return F.embedding(ids, weights.embedding)
    local = ids - weights.first_id
    outside = (local < 0) | (local >= weights.embedding.size(0))
    x = F.embedding(local.masked_fill(outside, 0), weights.embedding)
    return reduce.over(reduce.tp, x.masked_fill_(outside[:, None], 0))


def _attention(
    weights: LatentWeights, x: Tensor, pages: Tensor, batch: StepBatch, reduce: Reduce
) -> Tensor:
    """Return the attention's output [rows, hidden] and write the rows' latents."""
    heads, nope, rank = weights.k_up.shape
    rope = pages.size(1) - rank
    down = host_kernels.linear(_normed(x, weights.norm), weights.down)
    first, latent, key = down.tensor_split([down.size(1) - rank - rope, down.size(1) - rope], -1)
    if weights.q_up is not None:
        first = host_kernels.linear(_normed(first, weights.q_norm), weights.q_up)
    query = first.contiguous().view(-1, heads, nope + rope)
    if host_kernels.suit(query):
        norm = weights.kv_norm
        host_kernels.place(
            down[:, -rank - rope :], None if norm is None else norm.weight,
            0.0 if norm is None else norm.eps, weights.turns, batch.positions, batch.pages, pages,
            query,
        )  # fmt: skip
    else:
        query = _placed(weights, latent, key, query, pages, batch)
    attended = attend(weights, query, pages, batch.groups, batch.chunks)
    return reduce.over(reduce.tp, host_kernels.linear(attended, weights.out))


def _placed(
    weights: LatentWeights, latent: Tensor, key: Tensor, query: Tensor, pages: Tensor,
    batch: StepBatch,
) -> Tensor:  # fmt: skip
    """Write the rows' normed latents and rotated keys into pages; return the rotated query."""
    turns = weights.turns.index_select(0, batch.positions)
    latents = torch.cat((_normed(latent, weights.kv_norm), turned(key, turns)), -1)
    pages.index_copy_(0, batch.pages, latents)
    still, turning = query.tensor_split([weights.k_up.size(1)], -1)
    return torch.cat((still, turned(turning, turns[:, None])), -1)


def _mlp(
    layer: LayerWeights,
    x: Tensor,
    logit_rows: Tensor | None,
    reduce: Reduce,
    routes: list[Tensor] | None,
) -> Tensor:
    """Return the dense or expert MLP's output [rows, hidden]."""
    weights, x = layer.mlp, _normed(x, layer.mlp_norm)
    if isinstance(weights, GatedWeights):
        return reduce.over(reduce.tp, gated_mlp(weights, x))
    experts, probs = choose(weights, x)
    if routes is not None:
        routes.append(experts if logit_rows is None else experts.index_select(0, logit_rows))
    output = reduce.over(reduce.experts, expert_mlp(weights, x, experts, probs))
    if weights.shared is not None:
        output = output + reduce.over(reduce.tp, gated_mlp(weights.shared, x))
    return output
