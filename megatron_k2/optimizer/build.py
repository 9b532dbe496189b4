"""Builds ``--optimizer muonclip`` for Megatron's model chunks, as ``get_megatron_optimizer`` would.

Upstream's registry of optimizers cannot wrap one of its own in the distributed optimizer (0.19.2,
``core/optimizer/__init__.py:1038``), so the patch ``muonclip-optimizer`` sends the name here.
Groups of parameters, buffers and process groups come from upstream's own functions.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import optimizer as upstream
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_k2.max_logit import (
    bind_max_logit_buffer,
    recorded_layers,
    recording_attentions,
)
from megatron_k2.optimizer import telemetry
from megatron_k2.optimizer.checks import Chunks, refuse_unsupported
from megatron_k2.optimizer.config import MuonClipConfig
from megatron_k2.optimizer.directions import UpdateRule
from megatron_k2.optimizer.distributed import MuonClipInstance, MuonClipOptimizer, attach
from megatron_k2.optimizer.homes import ShardedParameter
from megatron_k2.optimizer.layout import (
    BufferLayout,
    Stage,
    muon_parameters,
    names_of,
    plan_stage,
    stage_of,
)
from megatron_k2.optimizer.matrices import Rule, assign, declared_matrices, model_rules
from megatron_k2.optimizer.muonclip import MuonClip
from megatron_k2.optimizer.qk_clip import (
    ClippedRows,
    QKClip,
    fused_row_factors,
    key_value_row_factors,
    query_row_factors,
)
from megatron_k2.optimizer.table import announce
from megatron_k2.parallel import k2_groups, stage_places


def get_muonclip_optimizer(
    config: MuonClipConfig,
    model_chunks: Chunks,
    config_overrides: Mapping[Any, Any] | None = None,
    use_gloo_process_groups: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
) -> MuonClipOptimizer:
    """Return MuonClip for model chunks wrapped in DDP with the distributed optimizer.

    Args:
        config: what to build; of upstream's class see ``MuonClipConfig.from_upstream``.
        model_chunks: of this pipeline stage.
        config_overrides: per parameter, upstream's; None for its standard ones.
        use_gloo_process_groups: as upstream.
        pg_collection: groups; None for parallel_state's.

    Raises:
        ValueError: a setting that MuonClip does not support, a parameter that no rule names, or
            attention whose logits the clip cannot see.

    Collective: every rank must call.
    """
    if not isinstance(config, MuonClipConfig):
        config = MuonClipConfig.from_upstream(config)
    rule = config.update_rule()  # imports a module of the user's, which may declare matrices
    refuse_unsupported(config, model_chunks)
    model_config = get_model_config(model_chunks[0])
    rules = (
        *declared_matrices(),
        *model_rules(model_config, config.k2_muon_split, config.muon_split_qkv),
    )
    names = names_of(model_chunks)
    overrides = _overrides(config, config_overrides, rules)
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        pg_collection, list(model_chunks), use_gloo_process_groups
    )
    instances = [
        _instance(config, model_chunks, overrides, groups, rule, expert=expert)
        for expert in (False, True)
    ]
    pgs = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    for one in instances:
        one.grad_stats_parallel_group = groups["intra_dist_opt_group"]
        one.tp_group, one.expert_tp_group = pgs.tp, pgs.expt_tp
    present = [one for one in instances if not one.is_stub_optimizer]
    _plan(config, present, names, rules, rule, pgs, model_chunks)
    announce(config, names, rules, pgs)
    optimizer = MuonClipOptimizer(present)
    optimizer.layer_numbers = tuple(
        number for chunk in model_chunks for number in recorded_layers(chunk)
    )
    telemetry.live = weakref.ref(optimizer)
    return optimizer


def _overrides(
    config: MuonClipConfig, given: Mapping[Any, Any] | None, rules: Sequence[Rule]
) -> dict[Any, Any]:
    """Return upstream's overrides with the reports' weight decay, and the algorithm by name.

    Upstream exempts every vector from weight decay; Moonlight decays norm gains and exempts biases.
    """
    standard = upstream.get_standard_config_overrides(config)
    overrides = {key: value for key, value in (given or {}).items() if key not in standard}
    overrides |= {key: value for key, value in standard.items() if value != {"wd_mult": 0.0}}
    overrides[ParamKey(name="*.bias")] = ParamGroupOverride(wd_mult=0.0)
    for algorithm in ("muon", "adamw"):
        predicate = ParamWithNamePredicate(
            name=f"under_{algorithm}",
            fn=lambda parameter, name, algorithm=algorithm: (
                assign(name, parameter.shape, rules).rule.algorithm == algorithm
            ),
        )
        key = ParamKey(with_name_predicate=predicate)
        overrides[key] = {"algorithm": algorithm}
    return overrides


def _instance(
    config: MuonClipConfig,
    model_chunks: Chunks,
    overrides: dict[Any, Any],
    groups: dict[str, Any],
    rule: UpdateRule,
    *,
    expert: bool,
) -> MuonClipInstance:
    """Return the instance over the dense or the expert parameters."""
    param_groups, buffers = upstream._get_param_groups_and_buffers(
        list(model_chunks),
        model_chunk_offset=0,
        config=config,
        config_overrides=overrides,
        filter_fn=lambda group: group["is_expert_parallel"] == expert,
        buffer_name="expert_parallel_buffers" if expert else "buffers",
    )
    kind = "expt_" if expert else ""
    inner = None
    if param_groups:
        inner = MuonClip(
            param_groups,
            lr=config.lr or 0.0,
            momentum=config.muon_momentum,
            nesterov=config.muon_nesterov,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            rule=rule,
            momentum_dtype=config.momentum_dtype,
            max_batch_bytes=config.batch_bytes(next(model_chunks[0].parameters()).device),
        )
    idx_group = groups["expt_tp_pp_with_egtp_remat_group" if expert else "mp_group"]
    data_group = f"intra_{kind}dp_group" if expert else "intra_dp_cp_group"
    return MuonClipInstance(
        inner,
        config,
        _grad_scaler(config),
        lambda opt, config=None: None,
        model_chunks=list(model_chunks),
        per_model_buffers=buffers,
        data_parallel_group=groups[data_group],
        data_parallel_group_gloo=groups[f"{data_group}_gloo"],
        data_parallel_group_idx=idx_group.rank(),
        distributed_optimizer_instance_id=0,
    )


def _grad_scaler(config: MuonClipConfig) -> Any:
    """Return upstream's loss scaler for the configuration, as its own builder chooses it."""
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


def _plan(
    config: MuonClipConfig,
    instances: Sequence[MuonClipInstance],
    names: dict[torch.nn.Parameter, str],
    rules: Sequence[Rule],
    rule: UpdateRule,
    pgs: ProcessGroupCollection,
    model_chunks: Chunks,
) -> None:
    """Plan homes over both instances and attach shards, exchange and clip."""
    by_kind = {one.param_groups[0]["is_expert_parallel"]: one for one in instances}
    stage, member = _stage(apart=True in by_kind)
    expert_table = stage.experts[pgs.ep.rank()] if stage.experts else ((),)
    own: dict[bool, list[tuple[torch.nn.Parameter, ShardedParameter]]] = {
        expert: muon_parameters(
            [_layout_of(buffer) for buffer in by_kind[expert].buffers], names, rules, table
        )
        if expert in by_kind
        else []
        for expert, table in ((False, stage.dense), (True, expert_table))
    }
    dense, experts = ([one for _, one in own[expert]] for expert in (False, True))
    plans = plan_stage(stage, dense, experts, rule, config.wave_bytes)
    group = k2_groups.get("optimizer_exchange") if len(stage.ranks) > 1 else None
    wire = config.wire_dtype
    narrow = min(wire, config.compute_dtype, key=lambda dtype: dtype.itemsize)
    for expert, plan in zip((False, True), plans, strict=True):
        if expert not in by_kind:
            continue
        instance = by_kind[expert]
        parameters: list[torch.nn.Parameter | None] = [p for p, _ in own[expert]]
        if expert:  # the plan has everybody's
            before = len(parameters) * pgs.ep.rank()
            after = len(plan.parameters) - before - len(parameters)
            parameters = [*[None] * before, *parameters, *[None] * after]
        clip = _clip(config, model_chunks, instance) if config.k2_qk_clip and not expert else None
        attach(
            instance,
            parameters,
            plan,
            member,
            stage.ranks,
            group,
            (wire, narrow),
            clip,
            config.k2_log_optimizer_interval or 0,
            config.k2_optimizer_offload,
        )


def _stage(*, apart: bool) -> tuple[Stage, int]:
    """Return this rank's stage and its own place in it.

    Collective: over the ranks of the stage.
    """
    places = stage_places()
    stage = stage_of(places, apart=apart)
    return stage, stage.ranks.index(torch.distributed.get_rank())


def _layout_of(buffer: Any) -> BufferLayout:
    """Return a live buffer's layout."""
    ranges = [(one.offset, one.offset + one.grad_data.numel()) for one in buffer.buckets]
    return BufferLayout(buffer.param_index_map, ranges, buffer.data_parallel_group.size())


def _clip(
    config: MuonClipConfig, model_chunks: Chunks, instance: MuonClipInstance
) -> QKClip | None:
    """Return QK-Clip over this rank's layers, or None for a stage without attention."""
    model_config = get_model_config(model_chunks[0])
    owned = {id(p): (shard, start) for p, shard, start in instance.parameter_shards()}
    rows, layer, recording = [], 0, []
    for chunk in model_chunks:
        attentions = recording_attentions(chunk)
        if attentions:
            recording.append(chunk)
        for attention in attentions:
            for weight, factors in _clipped_weights(attention, model_config, config.qk_clip_alpha):
                if id(weight) in owned:
                    shard, start = owned[id(weight)]
                    columns = weight.shape[1:].numel()  # 1 for a bias
                    rows.append(ClippedRows(layer, shard, start, columns, factors))
            layer += 1
    if not recording:
        return None

    def record() -> torch.Tensor:
        return torch.cat([bind_max_logit_buffer(chunk) for chunk in recording])

    return QKClip(config.qk_clip_threshold, rows, record, k2_groups.get("max_logit"))


def _clipped_weights(attention: Any, config: Any, alpha: float) -> list[tuple[Any, Any]]:
    """Return the projections of one attention layer that the clip shrinks, with their factors."""
    if not config.multi_latent_attention:
        groups = attention.num_query_groups_per_partition
        factors = partial(
            fused_row_factors, num_query_groups=groups, kv_channels=config.kv_channels, alpha=alpha
        )
        fused = attention.linear_qkv
        return [(one, factors) for one in (fused.weight, fused.bias) if one is not None]
    query = attention.linear_q_proj if config.q_lora_rank is None else attention.linear_q_up_proj
    content, rotary, value = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
    return [
        (
            query.weight,
            partial(
                query_row_factors, qk_head_dim=content, qk_pos_emb_head_dim=rotary, alpha=alpha
            ),
        ),
        (
            attention.linear_kv_up_proj.weight,
            partial(key_value_row_factors, qk_head_dim=content, v_head_dim=value, alpha=alpha),
        ),
    ]
