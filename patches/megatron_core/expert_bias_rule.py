"""The router's expert bias, moved by the rule the configuration names.

Upstream knows the sign rule only, and throws the reduced load of the experts away. The bias is a
buffer that ``finalize_model_grads`` updates through a module function without a hook.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[..., None]) -> Any:
    def _update_router_expert_bias(
        model: list[torch.nn.Module],
        config: Any,
        tp_dp_cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Move every training router's bias by ``config.k2_router_bias_rule``.

        Collective: all-reduce over ``tp_dp_cp_group`` - every rank of the stage must call.
        """
        if tp_dp_cp_group is None or not hasattr(config, "k2_router_bias_rule"):
            original(model, config, tp_dp_cp_group)
            return
        from megatron_k2.model.balance import update_expert_bias_

        update_expert_bias_(model, config, tp_dp_cp_group)

    return _update_router_expert_bias


def _still_needed() -> bool:
    """Upstream still moves the bias by the sign alone."""
    from megatron.core.transformer.moe import moe_utils

    source = inspect.getsource(moe_utils.get_updated_expert_bias)
    return "expert_bias + torch.sign(offset) * expert_bias_update_rate" in source


PATCH = Patch(
    id="expert-bias-rule",
    target="megatron.core.distributed.finalize_model_grads:_update_router_expert_bias",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="4f72a525f62b",
    why="Moonlight's mean-centred bias rule is missing, and the experts' global load is not kept",
    upstream="megatron/core/distributed/finalize_model_grads.py:334",
    remove_when="upstream takes the bias rule from the configuration and keeps the reduced load",
    still_needed=_still_needed,
)
