"""Loading optimizer shards: ``step`` of torch's Adam is not one of them.

``step`` is a tensor in torch's state, so upstream looks for it among the loaded shards, where the
fully reshardable format has none: ``KeyError: 'step'``. The step comes with the parameter groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[[Any, Any, dict[str, Any]], None]) -> Any:
    def _set_main_param_and_optimizer_states(
        self: Any, model_param: Any, tensors: dict[str, Any]
    ) -> None:
        """Copy the shards of one parameter in place; upstream skips what is no tensor."""
        original(self, model_param, {**tensors, "step": None})

    return _set_main_param_and_optimizer_states


def _still_needed() -> bool:
    """Upstream still indexes the loaded shards by every tensor of the state."""
    source = inspect.getsource(inspect.unwrap(PATCH.original()))
    return "isinstance(tensors[key], torch.Tensor)" in source and "step" not in source


PATCH = Patch(
    id="adam-step-is-no-shard",
    target=(
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer._set_main_param_and_optimizer_states"
    ),
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="40cab7846597",
    why="a fully reshardable load raises KeyError 'step' with torch's Adam",
    upstream="megatron/core/optimizer/distrib_optimizer.py:2405 -> 1223",
    remove_when="_set_main_param_and_optimizer_states skips step",
    still_needed=_still_needed,
)
