"""Loads a fully reshardable checkpoint into another number of chained optimizers.

Expert parameters get an optimizer of their own when EP > 1, so EP2 has two chained optimizers and
EP1 one. Tensors are keyed by parameter name and fit either way; the rest (parameter groups, step,
gradient scaler) is laid out per optimizer and does not. Groups are matched by their identifier
tuple, which holds ``is_expert_parallel``: a group saved without an expert twin serves as its twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[[Any, Any], None]) -> Any:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        """Load what was saved by any number of chained distributed optimizers."""
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        chained = self.chained_optimizers
        if not isinstance(state_dict, dict) or not _is_reshardable(state_dict):
            return original(self, state_dict)
        if not all(isinstance(optimizer, DistributedOptimizer) for optimizer in chained):
            return original(self, state_dict)
        per_optimizer = redistribute(state_dict, len(chained))
        return original(self, per_optimizer[0] if len(chained) == 1 else per_optimizer)

    return load_state_dict


def _entries(state_dict: dict[Any, Any]) -> list[dict[str, Any]]:
    """Return what each optimizer saved, in order; one optimizer saves without an index."""
    if "optimizer" in state_dict:
        return [state_dict]
    indices = sorted(index for index in state_dict if isinstance(index, int))
    return [state_dict[index] for index in indices if "optimizer" in state_dict[index]]


def _is_reshardable(state_dict: dict[Any, Any]) -> bool:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    formats = {entry.get("param_state_sharding_type") for entry in _entries(state_dict)}
    return (
        len(formats) == 1 and formats <= DistributedOptimizer.checkpoint_fully_reshardable_formats
    )


def redistribute(state_dict: dict[Any, Any], count: int) -> list[dict[str, Any]]:
    """Return one state dict for each of ``count`` optimizers.

    Args:
        state_dict: what ``dist_checkpointing.load`` merged: the saved layout of everything but
            tensors, and the present layout of ``param_state``.
        count: number of chained optimizers now.
    """
    saved = _entries(state_dict)
    groups = [group for entry in saved for group in entry["optimizer"]["param_groups"]]
    # Earlier entries lose against later ones with the same identifiers.
    twins = [{**group, "is_expert_parallel": not group["is_expert_parallel"]} for group in groups]
    result = []
    for index in range(count):
        own = saved[index] if len(saved) == count else saved[0]
        live = state_dict if count == 1 else state_dict[index]
        own_groups = own["optimizer"]["param_groups"]
        entry = {key: value for key, value in own.items() if isinstance(key, str)}
        entry["optimizer"] = {**own["optimizer"], "param_groups": [*twins, *groups, *own_groups]}
        entry["param_state"] = live["param_state"]
        result.append(entry)
    return result


def _still_needed() -> bool:
    """Upstream still refuses two optimizers' state for one, or takes it for one's own."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    chained = object.__new__(ChainedOptimizer)
    chained.chained_optimizers = [None, None]
    try:
        PATCH.original()(chained, {"optimizer": {}, 0: {}, 1: {}})
    except RuntimeError:
        return True
    except AttributeError:
        return False
    return False


PATCH = Patch(
    id="chained-optimizer-count",
    target="megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="403774c7dde1",
    why="EP2 -> EP1 and EP1 -> EP2 change the number of chained optimizers",
    upstream="megatron/core/optimizer/optimizer.py:1580",
    remove_when="a fully reshardable optimizer checkpoint loads at any EP",
    still_needed=_still_needed,
)
