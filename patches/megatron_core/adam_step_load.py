"""The ``step`` of torch's Adam after a load: one tensor a parameter, not one for all.

Upstream's ``load_state_dict`` gives every parameter the same 0-dim ``step`` tensor. Torch keeps it
(no copy for ``step``) and its single-tensor Adam adds one in place per parameter, so after a resume
the bias correction runs ahead by the number of parameters: wrong losses and no error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_k2.patches.megatron_core.adam_step_count import uses_torch_adam
from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[[Any, dict[str, Any]], None]) -> Any:
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        """Load, then give every parameter a ``step`` of its own, equal to its group's."""
        original(self, state_dict)
        if not uses_torch_adam(self):
            return
        for group in self.optimizer.param_groups:
            on_device = group.get("capturable") or group.get("fused")
            for param in group["params"]:
                self.optimizer.state[param]["step"] = torch.tensor(
                    float(group["step"]), device=param.device if on_device else "cpu"
                )

    return load_state_dict


def _still_needed() -> bool:
    """Upstream still hands the same tensor to every parameter."""
    source = inspect.getsource(inspect.unwrap(PATCH.original()))
    return 's["step"] = step\n' in source


PATCH = Patch(
    id="adam-step-load",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="7e5f988b86b4",
    why="after a resume all parameters share one step tensor, which each of them increments",
    upstream="megatron/core/optimizer/distrib_optimizer.py:1028-1032",
    remove_when="load_state_dict clones step per parameter",
    still_needed=_still_needed,
)
