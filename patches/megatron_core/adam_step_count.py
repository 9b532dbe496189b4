"""Counts torch Adam's steps in the parameter groups of the distributed optimizer.

Transformer Engine's and apex's FusedAdam keep ``step`` in each parameter group, torch's keeps a
tensor per parameter. A rank whose shard of an optimizer is empty (expert optimizer on a dense
pipeline stage, say) then knows no step at all, and upstream saves the parameter groups of rank 0
only. A post-step hook counts in the groups, as FusedAdam does, on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_k2.patches.patch import Patch


def count_step(optimizer: torch.optim.Optimizer, args: Any = None, kwargs: Any = None) -> None:
    """Add one to ``step`` of every parameter group."""
    for group in optimizer.param_groups:
        group["step"] = int(group.get("step", 0)) + 1


def uses_torch_adam(distributed_optimizer: Any) -> bool:
    """Return whether the inner optimizer is torch's Adam or AdamW (not FusedAdam, not offload)."""
    inner = distributed_optimizer.optimizer
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def _replacement(original: Callable[..., None]) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        """Construct, then count the steps of torch's Adam."""
        original(self, *args, **kwargs)
        if uses_torch_adam(self):
            self.optimizer.register_step_post_hook(count_step)

    return __init__


def _still_needed() -> bool:
    """Upstream still registers no counter of its own."""
    source = inspect.getsource(inspect.unwrap(PATCH.original()))
    return "register_step_post_hook" not in source


PATCH = Patch(
    id="adam-step-count",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="27507ad691f2",
    why="a rank without a shard of torch's Adam knows no step, and rank 0's is the one saved",
    upstream="megatron/core/optimizer/distrib_optimizer.py:838",
    remove_when="DistributedOptimizer counts steps itself or torch's Adam keeps them in its groups",
    still_needed=_still_needed,
)
