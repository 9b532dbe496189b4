"""The experts that the engine chose, replayed in training.

A token whose expert flips between engine and trainer has another probability there; K2-class models
are trained with the engine's choices. Prompt tokens have no record: there the router chooses
(``model/router.py`` takes -1 for that). Upstream's ``RouterReplay`` holds a layer's target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def replay(routes: Tensor | None, tp: ProcessGroup) -> None:
    """Set the next microbatch's experts; they hold until the next call: recomputation needs them.

    Args:
        routes: int16 [1, s, layers * k] of this context-parallel rank, -1: the router chooses;
            None: it always does.
        tp: with sequence parallelism its ranks hold a slice each of the tokens.

    Raises:
        ValueError: the model does not replay, or has another number of expert layers.
    """
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    instances: list[Any] = RouterReplay.global_router_replay_instances
    if routes is not None and not instances:
        raise ValueError(
            "the engine recorded experts, but the model has no --moe-enable-routing-replay"
        )
    RouterReplay.clear_global_indices()
    if routes is None:
        RouterReplay.clear_global_router_replay_action()
        return
    if routes.shape[2] % len(instances):
        raise ValueError(f"{routes.shape[2]} recorded experts a token, {len(instances)} layers")
    layers = routes[0].to(torch.long).unflatten(1, (len(instances), -1))
    for layer, instance in enumerate(instances):
        instance.set_target_indices(_slice_of_rank(layers[:, layer], tp))
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def _slice_of_rank(experts: Tensor, tp: ProcessGroup) -> Tensor:
    """Return a tensor-parallel rank's part [s / tp, k]: Megatron's MoE has sequence parallelism."""
    if tp.size() == 1:
        return experts
    return experts.chunk(tp.size(), dim=0)[tp.rank()]
