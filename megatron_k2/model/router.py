"""K2's router: sigmoid scores, top-k by score plus expert bias, normalised and scaled.

DeepSeek-V3's auxiliary-loss-free balancing (arXiv 2412.19437) with a small sequence-level auxiliary
loss, as upstream's ``TopKRouter``, on masks instead of sorted indices: half the time on a CPU.
Added: counts stay fp32 under ``Float16Module`` (upstream lets them fall to bf16, exact only to
256), padded tokens are left out of them, the last step's global load is kept for logging, and the
rule by which Moonlight (arXiv 2502.16982, figure 6) sets the scaling factor for a new number of
experts. ``patches/megatron_core/expert_bias_rule.py`` makes upstream use ``updated_expert_bias``.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

EPSILON = 1e-20
"""Upstream's guard of the normalisation (``moe_utils.topk_routing_with_score_function``)."""

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
        self._routes_by_mask = (
            self.score_function == "sigmoid"
            and self.topk > 1
            and self.routing_type not in ("sinkhorn", "quantile_balancing")
            and (config.moe_router_num_groups or 1) == 1
            and not config.moe_router_fusion
            and config.moe_expert_capacity_factor is None
        )

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose the experts of every token and weigh them.

        Options that K2 does not use (groups, capacity, other scores, fusion) take upstream's path.

        Args:
            logits: [sequence, batch, experts].
            padding_mask: [sequence, batch] bool, True for padding, or None.

        Returns:
            probs [tokens, experts], zero where not routed, each row summing to the scaling factor,
            and the routing map [tokens, experts] bool.
        """
        if not self._routes_by_mask:
            return super().routing(logits, padding_mask)
        sequence_length, batch_size = logits.shape[:2]
        logits = logits.view(-1, self.config.num_moe_experts)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        scores = torch.sigmoid(logits.float())
        routing_map = self._choose(scores.detach())
        chosen = scores * routing_map
        probs = chosen / (chosen.sum(dim=-1, keepdim=True) + EPSILON)
        if self.config.moe_router_topk_scaling_factor:
            probs = probs * self.config.moe_router_topk_scaling_factor
        probs = probs.type_as(logits)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs = self._with_aux_losses(probs, scores, sequence_length, batch_size, padding_mask)
        self._apply_expert_bias(routing_map, padding_mask=padding_mask)
        return probs, routing_map

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the routing map for scores [tokens, experts]: by score plus bias, or replayed."""
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        if self.router_replay is None:
            return topk_mask(scores, self.topk)
        experts = self._replayed(scores)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, experts, True)

    def _replayed(self, scores: Tensor) -> Tensor:
        """Return experts [tokens, k]: replayed, where the target is -1 or there is none chosen."""
        replay = self.router_replay

        def compute_topk(scores: Tensor, topk: int, *groups: int, **unused: int) -> Any:
            return torch.topk(scores, k=topk, dim=1)

        if replay.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            target = replay.target_topk_idx.to(scores.device)
            chosen: Tensor = compute_topk(scores, self.topk)[1]
            return torch.where(target < 0, chosen, target)
        _, experts = replay.get_replay_topk(scores, self.topk, default_compute_topk=compute_topk)
        return cast("Tensor", experts)

    def _with_aux_losses(
        self,
        probs: Tensor,
        scores: Tensor,
        sequence_length: int,
        batch_size: int,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Attach upstream's auxiliary losses; they see the unbiased top-k of normalised scores."""
        scores = scores / (scores.sum(dim=-1, keepdim=True) + EPSILON)
        chosen = topk_mask(scores.detach(), self.topk)
        padded = padding_mask is not None
        if padding_mask is not None:
            chosen, scores = chosen & ~padding_mask[:, None], scores * ~padding_mask[:, None]
        probs = self._apply_aux_loss(probs, scores, chosen, with_padding_mask=padded)
        probs = self._apply_seq_aux_loss(
            probs, scores, chosen, sequence_length, batch_size, with_padding_mask=padded
        )
        return self._apply_global_aux_loss(probs, scores, chosen, with_padding_mask=padded)

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


def topk_mask(scores: Tensor, topk: int) -> Tensor:
    """Return the mask of each row's ``topk`` largest scores.

    Takes the maximum ``topk`` times, a quarter of ``torch.topk``'s time for [2048, 32] on a CPU;
    rows with equal scores or NaN at the border are decided by ``torch.topk``.

    Args:
        scores: [tokens, experts], without gradient.
        topk: scores to mark.

    Returns:
        [tokens, experts] bool, ``topk`` True in each row.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":  # elsewhere the check below would wait for the device
        rest = scores.clone()
        for _ in range(topk):
            largest = rest == rest.amax(dim=-1, keepdim=True)
            mask |= largest
            rest.masked_fill_(largest, -torch.inf)
        if bool((mask.sum(dim=-1) == topk).all()):
            return mask
    experts = torch.topk(scores, k=topk, dim=-1).indices
    return mask.zero_().scatter_(-1, experts, True)


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
