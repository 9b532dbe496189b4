"""From Megatron's buffers to plans of homes: who holds which range of which matrix.

Megatron lays the parameters of a chunk one after the other in buckets and gives each data-parallel
rank an even part of every bucket (``PerBufferParamLayout``, megatron-core 0.19.2,
``core/optimizer/param_layout.py``), so ranges follow from the layout alone: for a live buffer or
for one of a world that does not exist. The dense and the expert instance are planned together,
because one rank works for both. No process groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_k2.optimizer.directions import UpdateRule
from megatron_k2.optimizer.geometry import Sharding, logical_matrices
from megatron_k2.optimizer.homes import (
    MAX_WAVE_BYTES,
    HomePlan,
    ShardedParameter,
    plan_homes,
    work_limit,
)
from megatron_k2.optimizer.matrices import Rule, assign


@dataclass(frozen=True)
class BufferLayout:
    """A buffer: where its parameters and buckets lie, in elements.

    Attributes:
        param_index_map: parameter -> (start, stop, bucket).
        bucket_ranges: [start, stop) of each bucket, padding included.
        num_shards: data-parallel ranks that share it evenly, bucket by bucket.
    """

    param_index_map: Mapping[torch.nn.Parameter, tuple[int, int, int]]
    bucket_ranges: Sequence[tuple[int, int]]
    num_shards: int


@dataclass(frozen=True)
class Replicas:
    """The ranks that share one instance's flat layout.

    Attributes:
        ranks: global ranks [tensor parallel][data parallel].
        tensor_parallel_rank, data_parallel_rank: of this process.
    """

    ranks: tuple[tuple[int, ...], ...]
    tensor_parallel_rank: int
    data_parallel_rank: int

    @property
    def members(self) -> tuple[int, ...]:
        """Global rank of each member, in the order of ``geometry.Piece.member``."""
        return tuple(rank for ranks in self.ranks for rank in ranks)

    @property
    def member(self) -> int:
        """This process's."""
        return self.tensor_parallel_rank * len(self.ranks[0]) + self.data_parallel_rank


def names_of(model_chunks: Sequence[torch.nn.Module]) -> dict[torch.nn.Parameter, str]:
    """Return each parameter's name, without wrappers and, of several chunks, with its chunk's."""
    found: dict[torch.nn.Parameter, str] = {}
    for index, chunk in enumerate(model_chunks):
        prefix = f"chunk{index}." if len(model_chunks) > 1 else ""
        for name, parameter in chunk.named_parameters():
            found[parameter] = prefix + name.replace("module.", "")
    return found


def muon_parameters(
    buffers: Iterable[BufferLayout],
    names: dict[torch.nn.Parameter, str],
    rules: Sequence[Rule],
    tensor_parallel_size: int,
) -> list[tuple[torch.nn.Parameter, ShardedParameter]]:
    """Return the parameters under Muon, in the order of the buffers, with everybody's ranges."""
    found = []
    for buffer in buffers:
        for parameter, (start, stop, bucket_id) in buffer.param_index_map.items():
            rule = assign(names[parameter], parameter.shape, rules).rule
            if rule.algorithm != "muon":
                continue
            first, last = buffer.bucket_ranges[bucket_id]
            size = (last - first) // buffer.num_shards
            ranges = shard_ranges(start - first, stop - first, size, buffer.num_shards)
            dim = None
            if tensor_parallel_size > 1 and getattr(parameter, "tensor_model_parallel", False):
                dim = parameter.partition_dim - (parameter.ndim - 2)  # type: ignore[attr-defined]
            sharding = Sharding(tensor_parallel_size, dim)
            shape = tuple(parameter.shape)
            one = ShardedParameter(names[parameter], shape, rule.cut, sharding, ranges)
            found.append((parameter, one))
    return found


def shard_ranges(
    start: int, stop: int, shard_numel: int, num_shards: int
) -> tuple[tuple[int, int], ...]:
    """Return the range of a parameter at [start, stop) of a bucket that lies in each shard."""
    found = []
    for shard in range(num_shards):
        first = max(start, shard * shard_numel) - start
        last = min(stop, (shard + 1) * shard_numel) - start
        found.append((first, last) if first < last else (0, 0))
    return tuple(found)


def total_work(parameters: Sequence[ShardedParameter], rule: UpdateRule) -> tuple[float, float]:
    """Return the work of all logical matrices of some parameters, and of the largest one."""
    work = [
        rule.flops(matrix.rows, matrix.columns)
        for index, one in enumerate(parameters)
        for matrix in logical_matrices(index, one.shape, one.cut, one.sharding)
    ]
    return sum(work), max(work, default=0.0)


Group = tuple[Replicas, Sequence[ShardedParameter]]
"""Who shares which parameters."""


def plan_together(
    dense: Group,
    experts: Sequence[Group],
    rule: UpdateRule,
    teams: Sequence[int],
    wave_bytes: int = MAX_WAVE_BYTES,
) -> tuple[HomePlan, list[HomePlan]]:
    """Plan the dense instance, then the experts', so that a rank's work is balanced over both.

    Args:
        dense: of all ranks of a pipeline stage.
        experts: one group for each set of ranks that share the same experts (a rank needs its own
            alone), or none where experts belong to the dense instance.
        rule: for the work of a matrix.
        teams: of each dense member: equal for those that share the same experts.
        wave_bytes: see ``plan_homes``.
    """
    replicas, parameters = dense
    width = len(replicas.ranks)
    if not experts:
        return plan_homes(parameters, rule.flops, width, wave_bytes=wave_bytes), []
    total, largest = total_work(parameters, rule)
    expert_replicas, expert_parameters = experts[0]
    expert_total, expert_largest = total_work(expert_parameters, rule)
    members, share = len(replicas.members), expert_total / len(expert_replicas.members)
    limit = work_limit(total + share * members, members, max(largest, expert_largest))
    plan = plan_homes(parameters, rule.flops, width, [share] * members, limit, teams, wave_bytes)
    load = dict(zip(replicas.members, plan.work_flops, strict=True))
    expert_plans = [
        plan_homes(
            some,
            rule.flops,
            len(own.ranks),
            [load[rank] for rank in own.members],
            limit,
            wave_bytes=wave_bytes,
        )
        for own, some in experts
    ]
    return plan, expert_plans
