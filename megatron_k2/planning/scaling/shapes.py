"""A preset's shape at another size, its weights and the FLOPs of training it.

FLOPs count matrix products only, two for a multiply-add, three times the forward pass (Kaplan et
al. 2020, arXiv 2001.08361, table 1; the terms are those of Megatron's
`num_floating_point_operations`, which leaves the router out and counts two norms of MLA):
6 x (weights one token meets, output layer included, embedding lookup not), and for attention
6 x heads x (query + value width) x sequence / 2 a layer, as the mask leaves half. The optimizer and
recomputation are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_k2.presets import Preset

WIDTH_STEP = 8
"""Widths are multiples of this: half a tile of a tensor core, and no width is rounded to zero."""


@dataclass(frozen=True)
class Shape:
    """What decides weights and FLOPs of a model of K2's form; names are Megatron's.

    `dense_layers` first layers have no experts. `q_lora_rank` 0 means no query compression.
    """

    num_layers: int
    dense_layers: int
    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    ffn_hidden_size: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int
    num_experts: int
    moe_router_topk: int
    vocab_size: int
    seq_length: int

    @property
    def sparsity(self) -> float:
        """All routed experts over those that see a token (K2R 2.3)."""
        return self.num_experts / self.moe_router_topk

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention, norms left out."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        query = heads * (self.qk_head_dim + self.qk_pos_emb_head_dim)
        rank = self.q_lora_rank
        return (
            (rank * (hidden + query) if rank else hidden * query)
            + hidden * (self.kv_lora_rank + self.qk_pos_emb_head_dim)
            + self.kv_lora_rank * heads * (self.qk_head_dim + self.v_head_dim)
            + heads * self.v_head_dim * hidden
        )

    @property
    def body_weights(self) -> int:
        """Weights one token meets without router, embedding and output: equal at any sparsity."""
        moe_layers = self.num_layers - self.dense_layers
        expert = 3 * self.hidden_size * self.moe_ffn_hidden_size
        shared = 3 * self.hidden_size * self.moe_shared_expert_intermediate_size
        return (
            self.num_layers * self.attention_weights
            + self.dense_layers * 3 * self.hidden_size * self.ffn_hidden_size
            + moe_layers * (self.moe_router_topk * expert + shared)
        )

    @property
    def active_weights(self) -> int:
        """Weights in the products of one token: body, routers and output layer."""
        moe_layers = self.num_layers - self.dense_layers
        routers = moe_layers * self.hidden_size * self.num_experts
        return self.body_weights + routers + self.hidden_size * self.vocab_size

    @property
    def total_weights(self) -> int:
        """All weights, embedding and output layer included, norms left out."""
        idle = self.num_experts - self.moe_router_topk
        moe_layers = self.num_layers - self.dense_layers
        idle_weights = moe_layers * idle * 3 * self.hidden_size * self.moe_ffn_hidden_size
        return self.active_weights + idle_weights + self.hidden_size * self.vocab_size

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs a token, see the module."""
        widths = self.qk_head_dim + self.qk_pos_emb_head_dim + self.v_head_dim
        attention = self.num_attention_heads * widths * self.seq_length / 2
        return 6.0 * (self.active_weights + self.num_layers * attention)

    def flags(self) -> list[str]:
        """Return Megatron's flags that lay this shape over its preset."""
        moe_layers = self.num_layers - self.dense_layers
        named = {
            "num-layers": self.num_layers,
            "moe-layer-freq": f"([0]*{self.dense_layers}+[1]*{moe_layers})",
            "hidden-size": self.hidden_size,
            "num-attention-heads": self.num_attention_heads,
            "kv-lora-rank": self.kv_lora_rank,
            "ffn-hidden-size": self.ffn_hidden_size,
            "moe-ffn-hidden-size": self.moe_ffn_hidden_size,
            "moe-shared-expert-intermediate-size": self.moe_shared_expert_intermediate_size,
            "num-experts": self.num_experts,
            "moe-router-topk": self.moe_router_topk,
            "moe-router-topk-scaling-factor": gate_scaling(self.num_experts, self.moe_router_topk),
            "seq-length": self.seq_length,
        }
        if self.q_lora_rank:
            named["q-lora-rank"] = self.q_lora_rank
        return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def preset_shape(preset: Preset) -> Shape:
    """Return the shape of a preset.

    Raises:
        ValueError: it is not of K2's form.
    """

    def number(dest: str) -> int:
        value = preset.value(dest)
        if not isinstance(value, int):
            raise ValueError(f"--k2-preset {preset.name}: has no {dest}")
        return value

    pattern = str(preset.value("moe_layer_freq", "1"))
    dense = pattern.removeprefix("([0]*").partition("+")[0] if "[0]*" in pattern else "0"
    names = set(Shape.__dataclass_fields__) - {"dense_layers", "q_lora_rank"}
    rank = preset.value("q_lora_rank")
    return Shape(
        dense_layers=int(dense),
        q_lora_rank=rank if isinstance(rank, int) else 0,
        **{name: number(name) for name in names},
    )


def scaled_shape(
    base: Shape,
    num_layers: int,
    hidden_size: int,
    num_experts: int,
    topk: int,
    vocab_size: int,
    seq_length: int,
    heads_per_layer: float | None = None,
) -> Shape:
    """Return a shape of another size: widths in proportion to `hidden_size`, head widths kept.

    Args:
        base: the shape to scale.
        num_layers: of the new model; as many dense ones as the base has.
        hidden_size: of the new model.
        num_experts: routed experts a layer.
        topk: of them, those that see a token.
        vocab_size: rows of the embedding.
        seq_length: tokens of a sequence.
        heads_per_layer: heads as a multiple of the layers (K2R 2.3 compares 1 and 2); None scales
            the base's heads with the width.
    """
    ratio = hidden_size / base.hidden_size

    def width(value: int) -> int:
        return max(1, round(value * ratio / WIDTH_STEP)) * WIDTH_STEP if value else 0

    if heads_per_layer is None:
        heads = max(1, round(base.num_attention_heads * ratio))
    else:
        heads = max(1, round(heads_per_layer * num_layers))
    return Shape(
        num_layers=num_layers,
        dense_layers=min(base.dense_layers, num_layers),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        q_lora_rank=width(base.q_lora_rank),
        kv_lora_rank=width(base.kv_lora_rank),
        qk_head_dim=base.qk_head_dim,
        qk_pos_emb_head_dim=base.qk_pos_emb_head_dim,
        v_head_dim=base.v_head_dim,
        ffn_hidden_size=width(base.ffn_hidden_size),
        moe_ffn_hidden_size=width(base.moe_ffn_hidden_size),
        moe_shared_expert_intermediate_size=width(base.moe_shared_expert_intermediate_size),
        num_experts=num_experts,
        moe_router_topk=topk,
        vocab_size=vocab_size,
        seq_length=seq_length,
    )


@cache
def gate_scaling(num_experts: int, topk: int) -> float:
    """Return the router's scaling factor by Moonlight's rule (arXiv 2502.16982, figure 6).

    The mean of 1 / sqrt(sum p^2) over normal logits, p the normalised top-k sigmoids; from 20,000
    draws, three decimals.
    """
    logits = np.random.default_rng(0).standard_normal((20_000, num_experts))
    scores = np.sort(1 / (1 + np.exp(-logits)), axis=1)[:, -topk:]
    p = scores / scores.sum(axis=1, keepdims=True)
    return round(float((1 / np.sqrt((p**2).sum(axis=1))).mean()), 3)
