"""Slow, readable twins of K2's mixture of experts, token by token in the dtype they are given.

Kimi K2 report (arXiv 2507.20534), DeepSeek-V3 report (arXiv 2412.19437) equations 12-19, Moonlight
report (arXiv 2502.16982) section 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_twin(z: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up * weight for z [rows, 2 * ffn], gate before up."""
    gate, up = z.chunk(2, dim=-1)
    out = gate / (1 + torch.exp(-gate)) * up
    return out if weight is None else out * weight[:, None]


def grouped_mlp_twin(
    x: Tensor, probs: Tensor, fc1: Tensor, fc2: Tensor, rows_per_expert: list[int]
) -> Tensor:
    """Return every row's expert output; rows lie expert after expert."""
    outputs = []
    row = 0
    for expert, count in enumerate(rows_per_expert):
        for _ in range(count):
            activated = swiglu_twin(fc1[expert] @ x[row])
            outputs.append(fc2[expert] @ activated * probs[row])
            row += 1
    return torch.stack(outputs) if outputs else x.new_zeros(x.shape)


def routing_twin(
    logits: Tensor, bias: Tensor, topk: int, scaling_factor: float
) -> tuple[list[list[int]], list[Tensor]]:
    """Return each token's experts (best first) and their weights."""
    experts, weights = [], []
    for token in logits:
        scores = 1 / (1 + torch.exp(-token))
        ranked = sorted(range(len(token)), key=lambda e: -float(scores[e] + bias[e]))[:topk]
        chosen = scores[ranked]
        experts.append(ranked)
        weights.append(chosen / chosen.sum() * scaling_factor)
    return experts, weights


def moe_twin(
    x: Tensor,
    router: Tensor,
    bias: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    shared: tuple[Tensor, Tensor],
    topk: int,
    scaling_factor: float,
) -> Tensor:
    """Return the MoE layer's output for tokens x [tokens, hidden]."""
    experts, weights = routing_twin(x @ router.T, bias, topk, scaling_factor)
    rows = []
    for token, chosen, share in zip(x, experts, weights, strict=True):
        row = shared[1] @ swiglu_twin(shared[0] @ token)
        for expert, weight in zip(chosen, share, strict=True):
            row = row + weight * (fc2[expert] @ swiglu_twin(fc1[expert] @ token))
        rows.append(row)
    return torch.stack(rows)


def sequence_aux_loss_twin(logits: Tensor, topk: int, coefficient: float) -> Tensor:
    """Return DeepSeek-V3's sequence-wise balance loss of one sequence [tokens, experts]."""
    num_tokens, num_experts = logits.shape
    loss = logits.new_zeros(())
    scores = [1 / (1 + torch.exp(-token)) for token in logits]
    for expert in range(num_experts):
        chosen = sum(expert in score.topk(topk).indices.tolist() for score in scores)
        fraction = num_experts / (topk * num_tokens) * chosen
        probability = sum(score[expert] / score.sum() for score in scores) / num_tokens
        loss = loss + coefficient * fraction * probability
    return loss


def bias_twin(bias: list[float], tokens: list[float], rate: float, rule: str) -> list[float]:
    """Return the expert bias after one step of either published rule."""
    mean = sum(tokens) / len(tokens)
    signs = [(mean > load) - (mean < load) for load in tokens]
    shift = sum(signs) / len(signs) if rule == "mean_centred" else 0.0
    return [b + rate * (sign - shift) for b, sign in zip(bias, signs, strict=True)]
