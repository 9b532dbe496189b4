"""The distributed optimizer's ``state_dict`` before torch's Adam has any state.

Loading a torch_dist checkpoint asks ``state_dict()`` for the template to fill, at a moment when no
step has been taken. Upstream reads ``step`` from the (empty) state and asserts. The step is taken
from the parameter groups, where ``adam_step_count`` counts it; before the first step it is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_k2.patches.megatron_core.adam_step_count import uses_torch_adam
from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[[Any], dict[str, Any]]) -> Any:
    def state_dict(self: Any) -> dict[str, Any]:
        """Return the optimizer variables that belong to no parameter, with ``step`` an int."""
        if not uses_torch_adam(self):
            return original(self)
        inner = self.optimizer.state_dict()
        inner.pop("state")
        for group in inner["param_groups"]:
            del group["params"]
            group["step"] = int(group.get("step", 0))
        result: dict[str, Any] = {"optimizer": inner}
        if self.grad_scaler:
            result["grad_scaler"] = self.grad_scaler.state_dict()
        return result

    return state_dict


def _still_needed() -> bool:
    """Upstream's ``state_dict`` of a torch AdamW without state still fails."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    if HAVE_APEX_OR_TE:
        return True
    optimizer = object.__new__(DistributedOptimizer)
    optimizer.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    optimizer.grad_scaler = None
    try:
        PATCH.original()(optimizer)
    except AssertionError:
        return True
    return False


PATCH = Patch(
    id="adam-state-dict",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="fe621ae6a622",
    why="resuming asserts: state_dict() is asked before torch's Adam has state",
    upstream="megatron/core/optimizer/distrib_optimizer.py:1532 -> 838",
    remove_when="state_dict() of a fresh optimizer over torch's Adam works",
    still_needed=_still_needed,
)
