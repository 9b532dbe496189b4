"""Routed experts of a step: every chosen expert computes every row, none is dropped.

Scores, choice and weights are the router's (model/router.py) without its masks. In fp32 on a host
compiled kernels compute the chosen experts (host_kernels.py): 32 rows of k2-nano take 1.7 ms a
layer on one thread. Elsewhere rows sorted by expert go through ``grouped_mm``, which reads only
the weights of experts that have rows and takes 3.5 ms there for its products alone.
Under expert parallelism every rank has all rows and computes those of its experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_k2.engine import host_kernels
from megatron_k2.engine.weights import ExpertWeights, GatedWeights
from megatron_k2.model.router import EPSILON
from megatron_k2.model.swiglu import swiglu_forward


def gated_mlp(weights: GatedWeights, x: Tensor) -> Tensor:
    """Return SwiGLU of ``x`` [rows, hidden]; a partial sum over tensor parallelism."""
    if weights.is_packed:
        rows = x.size(0)
        only = torch.zeros(rows, 1, dtype=torch.int64)
        return host_kernels.experts(x, only, x.new_ones(rows, 1), 0, weights.fc1, weights.fc2)
    return F.linear(swiglu_forward(F.linear(x, weights.fc1)), weights.fc2)


def choose(weights: ExpertWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's experts and their weights.

    Args:
        weights: of the layer.
        x: [rows, hidden].

    Returns:
        global expert indices int64 [rows, topk], best first, and fp32 [rows, topk], whose sum over
        a row is the scaling factor.
    """
    scores = torch.sigmoid(host_kernels.linear(x.to(weights.router.dtype), weights.router).float())
    biased = scores if weights.bias is None else scores + weights.bias
    experts = torch.topk(biased, weights.topk, dim=-1).indices
    chosen = scores.gather(1, experts)
    return experts, chosen.div_(chosen.sum(-1, keepdim=True).add_(EPSILON)).mul_(weights.scaling)


def expert_mlp(weights: ExpertWeights, x: Tensor, experts: Tensor, probs: Tensor) -> Tensor:
    """Return the weighted sum of each row's experts that are on this rank.

    Args:
        weights: of the layer.
        x: [rows, hidden].
        experts: [rows, topk], see ``choose``.
        probs: [rows, topk].

    Returns:
        [rows, hidden], a partial sum over expert and expert tensor parallelism.
    """
    if weights.is_packed:
        return host_kernels.experts(x, experts, probs, weights.first, weights.fc1, weights.fc2)
    rows, topk = experts.shape
    local, first = weights.fc1.size(0), weights.first
    by_expert = experts.flatten()
    order = by_expert.argsort(stable=True)
    counts = torch.bincount(by_expert, minlength=first + local)
    parts = x.new_zeros(rows * topk, x.size(1))
    if counts.numel() > local:  # other ranks hold experts before or after these
        begin, mine = int(counts[:first].sum()), counts[first : first + local]
        order, counts = order[begin : begin + int(mine.sum())], mine
        if not order.numel():
            return parts[:rows]
    ends = counts.cumsum(0, dtype=torch.int32)
    z = grouped_product(x.index_select(0, order // topk), weights.fc1, ends)
    activated = swiglu_forward(z, probs.flatten().index_select(0, order))
    parts.index_copy_(0, order, grouped_product(activated, weights.fc2, ends))
    return parts.view(rows, topk, -1).sum(1)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return ``x @ weight[expert]`` for rows that lie expert after expert.

    Args:
        x: [rows, in].
        weight: [experts, in, out], its last axis or the one before it contiguous.
        ends: int32 [experts], where each expert's rows end.
    """
    widths = x.stride(0), max(weight.stride(1), weight.stride(2))
    if all(width * x.element_size() % 16 == 0 for width in widths):
        return F.grouped_mm(x, weight, offs=ends)
    places = ends.tolist()  # torch's kernel wants rows of whole 16 bytes
    starts = [0, *places[:-1]]
    return torch.cat([x[a:b] @ one for a, b, one in zip(starts, places, weight, strict=True)])
