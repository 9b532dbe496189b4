"""The load of the experts: moving the router's bias by it, and reporting it.

The bias of every expert moves once per global batch by ``updated_expert_bias`` (both published
rules). The counts reduced for that are kept on the routers, and their ratio of largest to mean load
(Moonlight's MaxVio plus one; 1 is perfect balance) goes through upstream's MoE metrics to
TensorBoard and the iteration line as ``expert balance``, and the number of experts that saw no
token in the step, whose update is momentum alone, as ``cold experts``. Upstream reports only the
names that its training loop lists, hence ``patches/megatron_core/expert_balance_log.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_k2.model.router import K2TopKRouter, updated_expert_bias

METRIC = "expert balance"
COLD = "cold experts"


def load_ratio(tokens_per_expert: Tensor) -> Tensor:
    """Return the largest load over the mean load.

    Args:
        tokens_per_expert: [..., experts] counts.

    Returns:
        [...] fp32, 1 for uniform loads and for no tokens at all.
    """
    load = tokens_per_expert.to(torch.float32)
    mean = load.mean(dim=-1)
    return torch.where(mean > 0, load.amax(dim=-1) / mean.clamp(min=1e-30), torch.ones_like(mean))


def _routers(model: Sequence[torch.nn.Module]) -> Iterator[Any]:
    """Yield the modules of all chunks that hold an expert bias."""
    for chunk in model:
        for module in get_attr_wrapped_model(chunk, "modules")():
            if getattr(module, "expert_bias", None) is not None:
                yield module


@torch.no_grad()
def update_expert_bias_(
    model: Sequence[torch.nn.Module],
    config: TransformerConfig,
    tp_dp_cp_group: torch.distributed.ProcessGroup | None,
) -> None:
    """Move the bias of every training router by its global load, and keep that load.

    Args:
        model: chunks of this pipeline stage.
        config: gives ``moe_router_bias_update_rate`` and ``k2_router_bias_rule``.
        tp_dp_cp_group: ranks whose tokens share the routers.

    Collective: all-reduce over ``tp_dp_cp_group`` - every rank of the stage must call.
    """
    routers = [
        router
        for router in _routers(model)
        if router.training and not getattr(router, "frozen_expert_bias", False)
    ]
    if not routers:
        return
    tokens = torch.stack([router.local_tokens_per_expert for router in routers])
    torch.distributed.all_reduce(tokens, group=tp_dp_cp_group)
    bias = torch.stack([router.expert_bias for router in routers])
    rule = getattr(config, "k2_router_bias_rule", "sign")
    updated = updated_expert_bias(bias, tokens, config.moe_router_bias_update_rate, rule)
    cold = (tokens == 0).sum(dim=-1).float()
    for router, new_bias, load, ratio, none in zip(
        routers, updated, tokens, load_ratio(tokens), cold, strict=True
    ):
        router.expert_bias.copy_(new_bias)
        if isinstance(router, K2TopKRouter) and not router.is_mtp_layer:
            router.last_tokens_per_expert = load
            for name, value in ((METRIC, ratio), (COLD, none)):
                get_moe_metrics_tracker().record(
                    name, value, router.layer_number, config.num_layers, needs_dp_avg=False
                )


def expert_balance(model: Sequence[torch.nn.Module]) -> dict[int, Tensor]:
    """Return the last global batch's load of this stage's MoE layers.

    Returns:
        layer number (from 1) -> [experts] fp32 tokens; empty before the first optimizer step.
    """
    return {
        router.layer_number: router.last_tokens_per_expert
        for router in _routers(model)
        if getattr(router, "last_tokens_per_expert", None) is not None
    }


def report_balance(
    tracker: MoEMetricsTracker,
    iteration: int,
    writer: Any = None,
    wandb_writer: Any = None,
    per_layer_logging: bool = False,
    num_layers: int | None = None,
    mtp_num_layers: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    **unused: Any,
) -> str:
    """Write the step's load ratios and return the piece of the iteration line.

    Args are ``MoEMetricsTracker.report``'s. Without ``num_layers`` nothing is reported.

    Returns:
        `` expert balance: 1.31 | cold experts: 0 |``, the mean over MoE layers and the sum, or an
        empty string without routers.

    Collective: all-reduce over the pipeline group - every rank must call.
    """
    if num_layers is None:
        return ""
    for name in (METRIC, COLD):
        tracker.ensure_initialized(name, num_layers)
        tracker.metrics[name].needs_dp_avg = False
    tracker._sync_metrics([METRIC, COLD], pg_collection)
    ratios, cold = (tracker._metrics.pop(name).values.tolist() for name in (METRIC, COLD))
    layers = {index + 1: ratio for index, ratio in enumerate(ratios) if ratio > 0}
    if not layers:
        return ""
    mean = sum(layers.values()) / len(layers)
    scalars = {METRIC: mean, COLD: sum(cold)}
    if per_layer_logging:
        scalars |= {f"moe/{METRIC}_layer_{layer}": ratio for layer, ratio in layers.items()}
        scalars |= {f"moe/{COLD}_layer_{layer}": cold[layer - 1] for layer in layers}
    tracker._log_scalars(scalars, iteration, writer, wandb_writer)
    return f"{tracker._format({METRIC: mean})} {COLD}: {sum(cold):.0f} |"
