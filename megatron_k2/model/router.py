"""K2's router: sigmoid scores, top-k by score plus expert bias, normalised and scaled.

Upstream's ``TopKRouter`` computes it (DeepSeek-V3's auxiliary-loss-free balancing, arXiv
2412.19437, with a small sequence-level auxiliary loss). Added here: counts and bias stay fp32 under
``Float16Module`` (upstream lets the counts fall to bf16, exact only to 256), padded tokens are left
out of the counts, the global load of the last step is kept for logging, and the rule by which
Moonlight (arXiv 2502.16982, figure 6) sets the scaling factor for a new number of experts. The two
bias rules are in ``updated_expert_bias``; ``patches/megatron_core/expert_bias_rule.py`` calls it.
"""

from __future__ import annotations

import functools

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_DRAWS = 65536
"""Draws of the Monte-Carlo rule; standard error below 4e-4, the published digits need 5e-4."""


class K2TopKRouter(TopKRouter):
    """TopKRouter that keeps its statistics exact and remembers the last step's load.

    Attributes:
        last_tokens_per_expert: [experts] fp32 tokens of the last global batch, over all ranks, or
            None before the first optimizer step.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        """Build upstream's router; see ``TopKRouter``."""
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.last_tokens_per_expert: Tensor | None = None

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the bias, and the counts it is moved by, in fp32."""
        super()._maintain_float32_expert_bias()
        counts = self.local_tokens_per_expert
        if counts is not None and counts.dtype != torch.float32:
            counts.data = counts.data.to(torch.float32)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert, training forwards only.

        Args:
            routing_map: [tokens, experts] bool.
            padding_mask: [tokens] bool, True for padding, or None.
        """
        if not (self.enable_expert_bias and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask[:, None]
            self.local_tokens_per_expert += routing_map.sum(dim=0)


def updated_expert_bias(
    expert_bias: Tensor, tokens_per_expert: Tensor, update_rate: float, rule: str
) -> Tensor:
    """Return the expert bias after one step.

    ``e_i`` is the mean load minus the load of expert i. ``sign``: ``b_i + u sign(e_i)``
    (DeepSeek-V3). ``mean_centred``: ``b_i + u (sign(e_i) - mean_j sign(e_j))`` (Moonlight 2.4),
    which selects the same experts - a constant moves no top-k - but keeps the biases' sum.

    Args:
        expert_bias: [..., experts] fp32.
        tokens_per_expert: [..., experts] counts over the global batch.
        update_rate: u, ``--moe-router-bias-update-rate``.
        rule: ``sign`` or ``mean_centred``.

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in ("sign", "mean_centred"):
        raise ValueError(f"--k2-router-bias-rule {rule!r} is not one of sign, mean_centred")
    load = tokens_per_expert.to(expert_bias.dtype)
    step = torch.sign(load.mean(dim=-1, keepdim=True) - load)
    if rule == "mean_centred":
        step = step - step.mean(dim=-1, keepdim=True)
    return expert_bias + step * update_rate


@functools.cache
def published_scaling_factor(num_experts: int, topk: int) -> float:
    """Return the routed scaling factor for a number of experts (Moonlight, figure 6).

    With standard-normal logits, the mean of ``1 / norm(p)`` over draws, where p are the top-k
    sigmoid scores normalised to sum one: it gives the routed sum the size of one expert's output.
    Deterministic Monte-Carlo; (64, 6) gives Moonlight's 2.446, (384, 8) gives 2.8277 (K2: 2.827).

    Args:
        num_experts: routed experts.
        topk: experts of a token.

    Raises:
        ValueError: ``topk`` is not between 1 and ``num_experts``.
    """
    if not 1 <= topk <= num_experts:
        raise ValueError(f"--moe-router-topk {topk} is not in 1..{num_experts} (--num-experts)")
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    chunk = 4096
    for _ in range(_DRAWS // chunk):
        logits = torch.randn(chunk, num_experts, generator=generator, dtype=torch.float64)
        scores = logits.sigmoid().topk(topk, dim=-1).values
        p = scores / scores.sum(-1, keepdim=True)
        total += float(p.square().sum(-1).rsqrt().sum())
    return total / _DRAWS
