"""What distributed MuonClip sends, stores and computes on the real kimi-k2 shapes, by plan.

``.venv/bin/python tools/bench/muonclip_traffic.py`` builds every pipeline stage of kimi-k2 at
PP16 x EP16 on the meta device under a fake process group, lays its parameters in buffers with
Megatron's own layout code, and plans homes with the code that trains: for each (data-parallel,
expert data-parallel) size flat and in buckets of 40 M elements. Bytes are those that a rank sends a
step, over those of AdamW under ZeRO-1 (fp32 gradients reduce-scattered, bf16 parameters gathered,
ring), with pieces in 16 bits on the wire and, apart, in fp32. Upstream's layer-wise layout stands
beside, with its own layout code. No byte is sent and nothing ran on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from report import print_json, print_table

PIPELINE, EXPERTS = 16, 16
SIZES = ((16, 1), (32, 2), (128, 8))
BUCKET = 40_000_000
GRAD_BYTES, PARAM_BYTES = 4, 2
"""fp32 gradients are reduced, bf16 parameters gathered."""


@dataclass
class Totals:
    """Figures of all ranks of one setting; one entry a rank."""

    adam_bytes: list[float] = field(default_factory=list)
    dense_bytes: list[float] = field(default_factory=list)
    expert_bytes: list[float] = field(default_factory=list)
    fp32_bytes: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    state: list[float] = field(default_factory=list)
    adam_state: list[float] = field(default_factory=list)
    waves: list[int] = field(default_factory=list)
    layer_wise_bytes: list[float] = field(default_factory=list)


def stage_model(stage: int, data_parallel: int) -> Any:
    """Build a stage on the meta device in a world of its size that does not exist."""
    from megatron_k2.layouts import propose_pipeline_layout
    from megatron_k2.planning.stage import build_stage, enter_fake_world

    sizes = dict(
        pipeline_model_parallel_size=PIPELINE,
        expert_model_parallel_size=EXPERTS,
    )
    groups = enter_fake_world(stage * data_parallel, PIPELINE * data_parallel, **sizes)
    layout = propose_pipeline_layout(61, PIPELINE)
    return build_stage(groups, "kimi-k2", pipeline_model_parallel_layout=layout, **sizes)


def buffers_of(
    parameters: Sequence[Any], bucket: int | None, sizes: tuple[int, int], layout_of: Any
) -> tuple[list[Any], list[Any]]:
    """Return (dense, expert) buffer layouts by the given upstream layout function."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_k2.optimizer.layout import BufferLayout

    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    full = layout_of(
        list(parameters), bucket, sizes[0], ddp, expert_data_parallel_world_size=sizes[1]
    )
    found: tuple[list[Any], list[Any]] = ([], [])
    for key, one in full.layouts.items():
        expert = bool(key.is_expert_parallel)
        buffer = BufferLayout(one.param_index_map, one.bucket_indices, sizes[expert])
        found[expert].append(buffer)
    return found


def zero1_bytes(buffers: Sequence[Any], ranks: int) -> float:
    """Return what a rank sends to reduce gradients and gather parameters of some buffers."""
    numel = sum(last - first for one in buffers for first, last in one.bucket_ranges)
    return (GRAD_BYTES + PARAM_BYTES) * numel * (ranks - 1) / ranks


def shard_numel(buffers: Sequence[Any], parameters: set[Any] | None, shard: int) -> int:
    """Return the elements of a rank's shard that belong to some parameters (None: to any)."""
    from megatron_k2.optimizer.layout import shard_ranges

    total = 0
    for one in buffers:
        for parameter, (start, stop, bucket) in one.param_index_map.items():
            if parameters is None or parameter in parameters:
                first, last = one.bucket_ranges[bucket]
                size = (last - first) // one.num_shards
                a, b = shard_ranges(start - first, stop - first, size, one.num_shards)[shard]
                total += b - a
    return total


def measure(model: Any, sizes: tuple[int, int], bucket: int | None, totals: Totals) -> None:
    """Add the figures of one stage's ranks."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.utils import get_model_config

    from megatron_k2.optimizer.config import MuonClipConfig
    from megatron_k2.optimizer.layout import muon_parameters, names_of, plan_stage, stage_of
    from megatron_k2.optimizer.matrices import model_rules

    dp, edp = sizes
    rule, rules = MuonClipConfig().update_rule(), model_rules(get_model_config(model))
    parameters = list(model.parameters())
    dense_buffers, expert_buffers = buffers_of(
        parameters, bucket, sizes, DistributedOptimizer.compute_full_param_layout
    )
    names = names_of([model])
    stage = stage_of([(d, 0, d, d % EXPERTS, 0, d // EXPERTS) for d in range(dp)], apart=True)
    dense = muon_parameters(dense_buffers, names, rules, stage.dense)
    expert = muon_parameters(expert_buffers, names, rules, stage.experts[0])
    dense_plan, expert_plan = plan_stage(
        stage, [one for _, one in dense], [one for _, one in expert], rule
    )
    work = dense_plan.work_flops
    largest = max(
        rule.flops(one.matrix.rows, one.matrix.columns)
        for one in (*dense_plan.matrices, *expert_plan.matrices)
    )
    unavoidable = max(sum(work) / dp, largest)
    muon = {p for p, _ in dense} | {p for p, _ in expert}
    for parameter in muon:
        parameter.is_managed_by_layer_wise_optimizer = True
    layer_wise = buffers_of(
        parameters, bucket, sizes, LayerWiseDistributedOptimizer.compute_full_param_layout
    )
    adam = zero1_bytes(dense_buffers, dp) + zero1_bytes(expert_buffers, edp)
    upstream = zero1_bytes(layer_wise[0], dp) + zero1_bytes(layer_wise[1], edp)
    for parameter in muon:
        del parameter.is_managed_by_layer_wise_optimizer
    sent = [[plan.sent_numel(rank) for plan in (dense_plan, expert_plan)] for rank in range(dp)]
    for rank, (of_dense, of_expert) in enumerate(sent):
        totals.adam_bytes.append(adam)
        totals.layer_wise_bytes.append(upstream)
        totals.dense_bytes.append(2 * sum(of_dense))
        totals.expert_bytes.append(2 * sum(of_expert))
        extra = 2 * (of_dense[0] + of_expert[0])
        totals.fp32_bytes.append(2 * (sum(of_dense) + sum(of_expert)) + extra)
        totals.balance.append(work[rank] / unavoidable)
        numel = [shard_numel(dense_buffers, some, rank) for some in (None, muon)]
        numel = [
            a + shard_numel(expert_buffers, some, rank // EXPERTS)
            for a, some in zip(numel, (None, muon), strict=True)
        ]
        totals.adam_state.append(12 * numel[0])
        totals.state.append(12 * numel[0] - 4 * numel[1])
    totals.waves.append(max(len(dense_plan.waves), len(expert_plan.waves)))


def main(argv: list[str] | None = None) -> int:
    """Plan all settings, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=list(range(PIPELINE)))
    options = parser.parse_args(argv)
    import megatron_k2

    megatron_k2.register("cpu", [])
    rows, figures = [], {}
    for sizes in SIZES:
        models = [stage_model(stage, sizes[0]) for stage in options.stages]
        for bucket in (None, BUCKET):
            totals = Totals()
            for model in models:
                measure(model, sizes, bucket, totals)
            adam = sum(totals.adam_bytes)
            dense, expert = sum(totals.dense_bytes), sum(totals.expert_bytes)
            ratio = 1 + (dense + expert) / adam
            largest = 1 + max(
                (a + b) / c
                for a, b, c in zip(
                    totals.dense_bytes, totals.expert_bytes, totals.adam_bytes, strict=True
                )
            )
            state = sum(totals.state) / sum(totals.adam_state)
            name = f"dp{sizes[0]}_edp{sizes[1]}" + ("_buckets" if bucket else "")
            figures[name] = dict(
                bytes_vs_adam_zero1=round(ratio, 4), largest_rank=round(largest, 4),
                fp32_wire=round(1 + sum(totals.fp32_bytes) / adam, 4),
                memory_vs_adam_zero1=round(state, 4), work_imbalance=round(max(totals.balance), 4),
                layer_wise_bytes=round(sum(totals.layer_wise_bytes) / adam, 4),
            )  # fmt: skip
            rows.append((
                f"({sizes[0]}, {sizes[1]}) {'buckets' if bucket else 'flat'}",
                f"{ratio:.4f}", "1.05", f"{largest:.4f}",
                f"{1 + sum(totals.fp32_bytes) / adam:.4f}",
                f"{dense / adam:.4f}", f"{expert / adam:.4f}", f"{state:.4f}",
                f"{max(totals.balance):.3f}", "1.10", max(totals.waves),
                f"{sum(totals.layer_wise_bytes) / adam:.2f}",
            ))  # fmt: skip
    print_table(
        "kimi-k2 at PP16 x EP16 against AdamW under ZeRO-1 (bytes sent a rank and step)",
        ("(dp, expert dp)", "bytes", "bar", "largest rank", "fp32 wire", "of dense", "of experts",
         "state bytes", "work", "bar", "waves", "layer-wise layout's bytes"),
        rows,
    )  # fmt: skip
    print_json(**figures)
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
