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


def replay(model: torch.nn.Module, routes: Tensor | None, tp: ProcessGroup) -> None:
    """Set the next microbatch's experts; they hold until the next call: recomputation needs them.

    Args:
        model: a chunk, wrapped or not.
        routes: int16 [1, s, layers * k] of this context-parallel rank, -1: the router chooses;
            None: it always does.
        tp: with sequence parallelism its ranks hold a slice each of the tokens.

    Raises:
        ValueError: the model does not replay, or has another number of expert layers.
    """
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    found = (getattr(module, "router_replay", None) for module in model.modules())
    routers: list[Any] = [one for one in found if one is not None]
    if routes is not None and not routers:
        raise ValueError(
            "the engine recorded experts, but the model has no --moe-enable-routing-replay"
        )
    if routes is not None and routes.shape[2] % len(routers):
        raise ValueError(f"{routes.shape[2]} recorded experts a token, {len(routers)} layers")
    for number, router in enumerate(routers):
        router.clear_indices()
        router.clear_router_replay_action()
        if routes is not None:
            layer = routes[0].to(torch.long).unflatten(1, (len(routers), -1))[:, number]
            router.set_target_indices(_slice_of_rank(layer, tp))
            router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def _slice_of_rank(experts: Tensor, tp: ProcessGroup) -> Tensor:
    """Return a tensor-parallel rank's part [s / tp, k]: Megatron's MoE has sequence parallelism."""
    if tp.size() == 1:
        return experts
    return experts.chunk(tp.size(), dim=0)[tp.rank()]
