"""MuonClip's real optimizer under one layout, with gradients and logits given by name.

``steps`` builds a preset through Megatron's own builder and DDP, the optimizer through
``get_megatron_optimizer``, and fills main gradients (as if they had just been reduced) and recorded
logits from tensors that depend on the parameter's name and the step alone. Gradient norms, whose
sum order depends on the layout, are injected. What it returns are the pieces of every state tensor
that this rank holds, with their places in the whole one.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import batched
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.utils import get_model_config, unwrap_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_k2 import parallel
from megatron_k2.max_logit import (
    bind_max_logit_buffer,
    recorded_layers,
    recording_attentions,
    reset_max_logits,
)
from megatron_k2.optimizer.config import MuonClipConfig
from megatron_k2.optimizer.state import OptimizerState, _tensors
from megatron_k2.optimizer.telemetry import Telemetry
from tests.distributed.matrix import NUM_SEQUENCES
from tests.distributed.muonclip_models import builder_of
from tests.distributed.training_job import Routing, _one_step, initialize
from tests.distributed.training_job import Run as TrainingRun
from tests.distributed.watchers import Allocations, Collectives, Counted, HostReads

INJECTED_NORM = 3.0
THRESHOLD = 60.0


@dataclass(frozen=True)
class Run:
    """What one job does."""

    layout: dict[str, Any] = field(default_factory=dict)
    first_step: int = 0
    num_steps: int = 20
    bf16: bool = False
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Fields of MuonClipConfig."""
    bucket_size: int | None = None
    load: str = ""
    save: str = ""
    clip: bool = True
    zero_logits: bool = False
    """Leave the record empty, as after a step that saw no token."""
    model: str = "k2"
    """As ``muonclip_models.builder_of`` names it."""


def whole_tensor(key: str, shape: tuple[int, ...], what: int) -> torch.Tensor:
    """Return the whole tensor of a name: ``what`` is a step, or -1 for the initial weights."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) + 7919 * (what + 1))
    values = torch.randn(shape, generator=generator)
    return values * (0.02 if what < 0 else 1e-3) + (1.0 if what < 0 and "norm" in key else 0.0)


def boxes(
    model: list[Any],
) -> Iterator[tuple[torch.nn.Parameter, int, str, Any, tuple[slice, ...]]]:
    """Yield (parameter, where in it, name, whole shape, place in the whole) of contiguous boxes."""
    for chunk in unwrap_model(model):
        described, _ = extract_sharded_tensors_and_factories(chunk.sharded_state_dict(metadata={}))
        metadata = {id(one.data): one for one in nested_values(described)}
        for parameter in chunk.parameters():
            for part, begin in _tensors(metadata[id(parameter)], parameter):
                extent = (*[1] * part.prepend_axis_num, *part.data.shape)
                place = tuple(
                    slice(offset, offset + size)
                    for offset, size in zip(part.global_offset, extent, strict=True)
                )
                yield parameter, begin, part.key, part.global_shape, place


def build(run: Run, groups: Any, *, gloo: bool = True) -> tuple[list[Any], Any]:
    """Build this rank's chunks and MuonClip."""
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    pipeline = run.layout.get("pipeline_model_parallel_size", 1)
    virtual = run.layout.get("virtual_pipeline_model_parallel_size")
    builder = builder_of(
        run.model, bf16=run.bf16, params_dtype=dtype, pipeline_dtype=dtype,
        overlap_p2p_comm=pipeline > 1 and virtual is not None, batch_p2p_comm=virtual is None,
        **run.layout,
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, bucket_size=run.bucket_size,
        overlap_grad_reduce=run.bucket_size is not None,
    )  # fmt: skip
    model = builder.build_distributed_models(groups, ddp, data_parallel_random_init=False)
    fields = dict(
        lr=0.02, clip_grad=1.0, bf16=run.bf16, params_dtype=dtype, qk_clip_threshold=THRESHOLD,
        muon_fp32_matmul_prec="high", k2_qk_clip=run.clip,
    ) | run.optimizer  # fmt: skip
    optimizer = get_megatron_optimizer(
        MuonClipConfig(**fields), model, use_gloo_process_groups=gloo
    )
    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return model, optimizer


@torch.no_grad()
def fill_gradients(model: list[Any], step: int) -> None:
    """Write the step's whole gradients into this rank's main gradients."""
    for parameter, begin, key, shape, place in boxes(model):
        if not parameter.requires_grad:
            continue
        piece = whole_tensor(key, shape, step)[place]
        parameter.main_grad.view(-1)[begin : begin + piece.numel()] = piece.reshape(-1)


def fill_logits(model: list[Any], groups: Any, step: int) -> None:
    """Write recorded logits: of each head one data-parallel rank has the largest."""
    heads = groups.tp.size()
    for chunk in model:
        buffer = bind_max_logit_buffer(chunk)
        for row, number in zip(buffer, recorded_layers(chunk), strict=True):
            whole = whole_tensor(f"logits{number}", (len(row) * heads,), step)
            whole = 5e4 * whole + 20
            mine = whole.chunk(heads)[groups.tp.rank()]
            owner = (torch.arange(len(row)) + step) % groups.dp_cp.size()
            row.copy_(torch.where(owner == groups.dp_cp.rank(), mine, mine.clamp(max=0) - 1))


def steps(run: dict[str, Any]) -> dict[str, Any]:
    """Run ``Run(**run)``; return pieces [(name, place, array)] and counts."""
    job = Run(**run)
    groups = initialize(job.layout)
    model, optimizer = build(job, groups)
    with torch.no_grad():
        for parameter, begin, key, shape, place in boxes(model):
            piece = whole_tensor(key, shape, -1)[place]
            parameter.view(-1)[begin : begin + piece.numel()] = piece.reshape(-1)
    optimizer.reload_model_params()
    optimizer.get_grad_norm = lambda: INJECTED_NORM
    if job.load:
        load(job.load, model, optimizer)
    counted = []
    for instance in optimizer.instances:
        instance.optimizer.rule = Counted(instance.optimizer.rule)
        counted.append(instance.optimizer.rule)
    collectives, allocations = Collectives(), Allocations()
    for step in range(job.first_step, job.first_step + job.num_steps):
        optimizer.zero_grad()
        fill_gradients(model, step)
        if not job.zero_logits:
            fill_logits(model, groups, step)
        with collectives, allocations:
            successful, norm, _ = optimizer.step()
        assert successful and norm == INJECTED_NORM
    if job.save:
        os.makedirs(job.save, exist_ok=True)
        save(job.save, model, optimizer)
    config = get_model_config(model[0])
    report = optimizer.report(config.num_layers + (config.mtp_num_layers or 0))
    exchanges = [instance.optimizer.exchange for instance in optimizer.instances]
    stores = [
        store
        for one in optimizer.instances
        for store in (one.optimizer.moments, one.optimizer.masters)
    ]
    return {
        "report": report,
        "peak_bytes": allocations.peak,
        "num_waves": max(len(one.routes) for one in exchanges),
        "resident_bytes": sum(store.resident_bytes for store in stores),
        "offloaded_bytes": sum(store.offloaded_bytes for store in stores),
        "moved_bytes": sum(store.moved_bytes for store in stores),
        "pieces": state_pieces(model, optimizer),
        "weights": weights(model),
        "matrices": sum(one.count for one in counted),
        "collectives": collectives.log,
        "sent_bytes": sum(one.sent_bytes for one in exchanges),
        "planned_numel": [one.plan.sent_numel(one.member) for one in exchanges],
    }


def _state_dicts(model: list[Any], optimizer: Any, *, loading: bool) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for index, chunk in enumerate(unwrap_model(model)):
        whole[f"model{index}"] = chunk.sharded_state_dict(metadata={})
    state = optimizer.sharded_state_dict(whole, is_loading=loading)
    return {**whole, "optimizer": state}


def save(path: str, model: list[Any], optimizer: Any) -> None:
    """Save weights and state. Collective."""
    dist_checkpointing.save(_state_dicts(model, optimizer, loading=False), path)


def load(path: str, model: list[Any], optimizer: Any) -> None:
    """Load what another layout saved. Collective."""
    loaded = dist_checkpointing.load(_state_dicts(model, optimizer, loading=True), path)
    for index, chunk in enumerate(unwrap_model(model)):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])


def state_pieces(model: list[Any], optimizer: Any) -> list[tuple[str, Any, Any, Any]]:
    """Return (key, whole shape, offset, array) of every piece of state that this rank holds."""
    described = [chunk.sharded_state_dict(metadata={}) for chunk in unwrap_model(model)]
    state = OptimizerState(optimizer.instances, described)
    return [
        (key, one.global_shape, (one.global_offset, one.local_shape), one.data.float().numpy())
        for key, some in state.tensors.items()
        for one in some
    ]


def weights(model: list[Any]) -> list[tuple[str, Any, Any, Any]]:
    """Return the model's own weights in the same form."""
    return [
        (
            f"weight.{key}",
            shape,
            (tuple(s.start for s in place), tuple(s.stop - s.start for s in place)),
            parameter.detach().float().view(-1)[begin : begin + _numel(place)].numpy(),
        )
        for parameter, begin, key, shape, place in boxes(model)
    ]


def _numel(place: tuple[slice, ...]) -> int:
    count = 1
    for one in place:
        count *= one.stop - one.start
    return count


def frozen_batch(run: dict[str, Any], heat: float) -> dict[str, Any]:
    """Heat some heads, train one step at learning rate 0, and look at the same batch again.

    Each attention layer is given the same inputs again: those of later layers depend on the clip of
    earlier ones. Returns the largest logits before and after, by layer, reduced over data-parallel
    ranks; and whether every row of query and key projections of a cool head kept its bits.
    """
    job = Run(**run)
    groups = initialize(job.layout)
    model, optimizer = build(job, groups)
    training = TrainingRun(layout=job.layout, bf16=job.bf16, num_steps=1, micro_batch_size=2)
    mine = list(batched(range(NUM_SEQUENCES)[groups.dp.rank() :: groups.dp.size()], 2))
    init_num_microbatches_calculator(0, None, NUM_SEQUENCES, 2, groups.dp.size())
    attentions = [one for chunk in model for one in recording_attentions(chunk)]
    with torch.no_grad():
        for index, attention in enumerate(attentions):
            for rows in _heated(attention, index % 2):
                rows *= heat
    optimizer.reload_model_params()
    inputs: dict[int, list[torch.Tensor]] = {id(one): [] for one in attentions}

    def record(attention: Any, given: Any) -> None:
        inputs[id(attention)].append(given[0].detach().clone())

    def replay(attention: Any, given: Any) -> Any:
        return (inputs[id(attention)].pop(0).requires_grad_(), *given[1:])

    def largest() -> torch.Tensor:
        for chunk in model:
            reset_max_logits(chunk)
        _one_step(training, model, optimizer, Routing(training, groups), mine, 0, {})
        maxima = torch.cat([bind_max_logit_buffer(chunk).clone() for chunk in model])
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=groups.dp_cp)
        return maxima

    hooks = [one.register_forward_pre_hook(record) for one in attentions]
    before = largest()
    for hook, one in zip(hooks, attentions, strict=True):
        hook.remove()
        one.register_forward_pre_hook(replay)
    weights = [_projections(one) for one in attentions]
    assert optimizer.step()[0]
    kept = []
    for maxima, one, old in zip(before, attentions, weights, strict=True):
        for now, was in zip(_projections(one), old, strict=True):
            same = (now == was).flatten(1).all(1)
            cool = (maxima <= THRESHOLD).view(len(same), -1).all(1)  # a group of queries at once
            kept.append(bool(cool.any() and same[cool].all()))
    return {"before": before.numpy(), "after": largest().numpy(), "cool_heads_kept": all(kept)}


def _heated(attention: Any, first: int) -> Iterator[torch.Tensor]:
    """Yield the query rows of every other head from ``first`` on (0 or 1).

    Of grouped queries: of the first head of every other group.
    """
    if hasattr(attention, "linear_qkv"):
        groups = attention.num_query_groups_per_partition
        width = attention.hidden_size_per_attention_head
        for one in (attention.linear_qkv.weight, attention.linear_qkv.bias):
            yield one.unflatten(0, (groups, -1))[first::2, :width]
    else:
        heads = attention.num_attention_heads_per_partition
        yield attention.linear_q_up_proj.weight.unflatten(0, (heads, -1))[first::2]


def _projections(attention: Any) -> list[torch.Tensor]:
    """Return copies of what the clip scales, [heads or groups of queries, rows, columns]."""
    if hasattr(attention, "linear_qkv"):
        count = attention.num_query_groups_per_partition
        scaled = [attention.linear_qkv.weight, attention.linear_qkv.bias]
    else:
        count = attention.num_attention_heads_per_partition
        scaled = [attention.linear_q_up_proj.weight, attention.linear_kv_up_proj.weight]
    return [one.detach().clone().unflatten(0, (count, -1)) for one in scaled]


def fake_cuda_step(world_size: int, **fields: Any) -> dict[str, Any]:
    """Step the real optimizer of rank 0 of a fake world on fake CUDA tensors.

    Built on the CPU, then every tensor of it is replaced by a fake one on ``cuda``: reading one
    raises, and moving one to the host is counted. Returns operations and reads, of the inner step
    and the copy to the model's parameters.
    """
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    groups = parallel.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    _, optimizer = build(Run(layout={}, bf16=True, optimizer=fields), groups, gloo=False)
    (instance,) = optimizer.instances
    inner = instance.optimizer
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # upstream looks at parameters' classes
    replaced: dict[int, torch.Tensor] = {}

    def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            with mode:
                fake = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
                )
                fake.grad = None if tensor.grad is None else torch.empty_like(fake)
            replaced[id(tensor)] = fake
        return replaced[id(tensor)]

    optimizer.prepare_grads()
    with mode:
        maxima = torch.empty_like(inner.clip.record(), device="cuda")
    states = {
        on_cuda(shard): {key: on_cuda(value) for key, value in state.items()}
        for shard, state in inner.state.items()
    }
    for group in inner.param_groups:
        group["params"] = [on_cuda(shard) for shard in group["params"]]
    inner.state.clear()
    inner.state.update(states)
    shards = [None if shard is None else on_cuda(shard) for shard in inner.shards]
    clip = inner.clip
    clip.rows = [replace(rows, shard=on_cuda(rows.shard)) for rows in clip.rows]
    clip.record = lambda: maxima
    inner.exchange.device = torch.device("cuda")
    with mode:
        inner.attach(inner.exchange, shards, clip, Telemetry(1, torch.device("cuda")))
    for name in ("shard_fp32_from_float16_groups", "shard_fp32_groups", "shard_float16_groups"):
        setattr(instance, name, [[on_cuda(t) for t in some] for some in getattr(instance, name)])
    for buffer in instance.buffers:
        for bucket in buffer.buckets:
            bucket.param_data = on_cuda(bucket.param_data)
    reads = HostReads()
    with mode, reads:
        inner.step()
        instance._copy_main_params_to_model_params()
    return {
        "reads": reads.found,
        "num_operations": reads.num_operations,
        "num_waves": len(inner.exchange.routes),
        "num_clipped": len(clip.rows),
    }


def reads_seen() -> dict[str, Any]:
    """Return what ``HostReads`` notes of one copy to the host, and what reading a scalar raises."""
    with FakeTensorMode(), HostReads() as reads:
        tensor = torch.empty(3, device="cuda")
        tensor.cpu()
        try:
            tensor.sum().item()
        except Exception as error:
            return {"cpu": len(reads.found), "item": type(error).__name__}
    return {}


def reads_of_whole_step(optimizer: str) -> int:
    """Return how many scalars a step with clipping by norm reads, after the first one."""
    model, built = build(Run(), parallel.get_pg_collection())
    if optimizer == "adam":
        built = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=0.02, use_distributed_optimizer=True, clip_grad=1.0
            ),
            model,
        )  # fmt: skip
    fill_gradients(model, 0)
    built.step()
    with HostReads() as reads:
        built.step()
    return len(reads.found)


def skipped_step() -> dict[str, bool]:
    """Skip a step over hot logits, as a loss scaler does on overflow; return what stayed."""
    groups = parallel.get_pg_collection()
    model, optimizer = build(Run(), groups)
    before = [parameter.detach().clone() for parameter in model[0].parameters()]
    fill_gradients(model, 0)
    bind_max_logit_buffer(model[0]).fill_(10 * THRESHOLD)
    prepare = optimizer.prepare_grads
    optimizer.prepare_grads = lambda: prepare() or True  # an overflow was found
    successful = optimizer.step()[0]
    kept = all(map(torch.equal, before, model[0].parameters()))
    optimizer.prepare_grads = prepare
    optimizer.zero_grad()
    (instance,) = optimizer.instances
    fill_gradients(model, 1)
    assert optimizer.step()[0]
    clip = instance.optimizer.clip
    return {"skipped": not successful, "kept": kept, "cool": bool((clip.gamma == 1).all())}
