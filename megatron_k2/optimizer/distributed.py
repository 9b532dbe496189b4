"""MuonClip as the inner optimizer of Megatron's distributed optimizer.

Buckets, reduce-scatter, parameter all-gather, main parameters, gradient clipping and FP8 gather
stay upstream's; what is here hands ``MuonClip`` its flat shards with a plan of homes
(``layout.py``), and saves state by name (``state.py``). Dense and expert parameters are two
instances, as upstream has them. Megatron-core 0.19.2, ``core/optimizer/distrib_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_k2.max_logit import reset_max_logits
from megatron_k2.optimizer.exchange import Exchange
from megatron_k2.optimizer.homes import HomePlan
from megatron_k2.optimizer.muonclip import MuonClip, Offload
from megatron_k2.optimizer.qk_clip import QKClip
from megatron_k2.optimizer.state import OptimizerState
from megatron_k2.optimizer.telemetry import Telemetry, report


class MuonClipInstance(DistributedOptimizer):  # type: ignore[misc]
    """Upstream's distributed optimizer around a ``MuonClip``; arguments as upstream's."""

    optimizer: MuonClip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the record of logits that a skipped step left."""
        super().zero_grad(set_to_none)
        if not self.is_stub_optimizer and self.optimizer.clip is not None:
            for chunk in self.model_chunks:
                reset_max_logits(chunk)

    def _copy_main_params_to_model_params(self) -> None:
        super()._copy_main_params_to_model_params()
        self.optimizer.release_shards()

    def _copy_main_params_to_param_buffer(self) -> None:
        self.optimizer.fetch_shards()
        super()._copy_main_params_to_param_buffer()
        self.optimizer.release_shards()

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        self.optimizer.fetch_shards()
        super()._copy_model_params_to_main_params(state_dict)
        self.optimizer.release_shards()

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Refuse: shards differ in their state, so upstream's formats do not fit."""
        raise RuntimeError("MuonClip saves by name: use --ckpt-format torch_dist")

    def state_dict(self) -> dict[str, Any]:
        """Return what is not a tensor: parameter groups with their step, and the loss scaler."""
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        state: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def parameter_shards(self) -> Iterator[tuple[torch.nn.Parameter, Tensor, int]]:
        """Yield each model parameter of which this rank has a shard, the shard and its start."""
        for ranges in self.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, place in bucket["param_map"].items():
                        yield parameter, self.shard_of(parameter), place["param"].start

    def shard_of(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return this rank's fp32 shard of a model parameter."""
        group, order = self.model_param_group_index_map[parameter]
        shard: Tensor = self.optimizer.param_groups[group]["params"][order]
        return shard


class MuonClipOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """Dense and expert instances as one optimizer, whose state does not depend on the layout."""

    chained_optimizers: list[MuonClipInstance]
    layer_numbers: tuple[int, ...] = ()
    """From 1, of the rows of the clip's maxima."""

    def report(self, num_layers: int) -> dict[str, float]:
        """Return the figures of the last measured step (``telemetry.report``).

        Collective: two all-reduces over the default group - every rank must call.
        """
        inner = [one.optimizer for one in self.instances]
        clip = next((one.clip for one in inner if one.clip is not None), None)
        device = next(self.model_chunks[0].parameters()).device
        return report(
            [one.telemetry for one in inner], clip, self.layer_numbers, num_layers, device
        )

    @property
    def instances(self) -> list[MuonClipInstance]:
        """The instances that have parameters on this rank."""
        return [one for one in self.chained_optimizers if not one.is_stub_optimizer]

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the state by parameter name, whatever the layout (``state.py``)."""
        self.loading = OptimizerState(self.instances, model_sharded_state_dict)
        return self.loading.sharded_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``sharded_state_dict(is_loading=True)`` was filled with."""
        self.loading.load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return what is not a tensor."""
        return {"groups": [one.state_dict() for one in self.instances]}


def attach(
    instance: MuonClipInstance,
    parameters: Sequence[torch.nn.Parameter | None],
    plan: HomePlan,
    member: int,
    ranks: Sequence[int],
    group: torch.distributed.ProcessGroup | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    clip: QKClip | None = None,
    telemetry_interval: int = 0,
    offload: Offload = "none",
) -> None:
    """Give an instance's ``MuonClip`` its shards, plan and clip.

    Args:
        instance: to be stepped.
        parameters: of the plan, in its order; None for those of other expert-parallel ranks.
        plan: of homes.
        member: this rank's place in it.
        ranks: global rank of each member.
        group: the members' own; None for one member.
        dtypes: number format of pieces on their way to a home, and of results.
        clip: applied after the update.
        telemetry_interval: steps between measurements, 0 for none.
        offload: what lies in host memory between steps.
    """
    device = next(instance.model_chunks[0].parameters()).device
    exchange = Exchange(plan, member, ranks, group, *dtypes, device)
    owned = instance.model_param_group_index_map
    shards = [instance.shard_of(p) if p is not None and p in owned else None for p in parameters]
    telemetry = Telemetry(telemetry_interval, device)
    instance.optimizer.attach(exchange, shards, clip, telemetry, offload)
