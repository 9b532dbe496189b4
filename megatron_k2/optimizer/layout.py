"""From Megatron's buffers to plans of homes: who holds which range of which matrix.

Megatron lays the parameters of a chunk one after the other in buckets and gives each data-parallel
rank an even part of every bucket (``PerBufferParamLayout``, megatron-core 0.19.2,
``core/optimizer/param_layout.py``), so ranges follow from the layout alone: for a live buffer or
for one of a world that does not exist. The dense and the expert instance are planned together,
because one rank works for both. No process groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_k2.optimizer.directions import UpdateRule
from megatron_k2.optimizer.geometry import Sharding
from megatron_k2.optimizer.homes import (
    MAX_WAVE_BYTES,
    HomePlan,
    ShardedParameter,
    part_of_plan,
    plan_homes,
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


Table = tuple[tuple[int, ...], ...]
"""Members [tensor-parallel rank][data-parallel rank] that share one flat layout."""


@dataclass(frozen=True)
class Stage:
    """The ranks of one pipeline stage, by what they hold.

    Attributes:
        ranks: global rank of each member.
        dense: who shares the dense parameters.
        experts: who shares the experts of each expert-parallel rank; () where experts belong to
            the dense instance.
    """

    ranks: tuple[int, ...]
    dense: Table
    experts: tuple[Table, ...] = ()


def stage_of(places: Sequence[tuple[int, int, int, int, int, int]], *, apart: bool) -> Stage:
    """Return the stage of ranks with the given places.

    Args:
        places: (global rank, tensor-parallel rank, data-parallel rank, expert-parallel rank,
            expert tensor-parallel rank, expert data-parallel rank) of each member.
        apart: experts have an instance of their own.
    """
    dense = {(one[1], one[2]): member for member, one in enumerate(places)}
    experts: dict[int, dict[tuple[int, int], int]] = {}
    for member, one in enumerate(places):
        experts.setdefault(one[3], {})[one[4], one[5]] = member
    tables = [_table(experts[rank]) for rank in sorted(experts)] if apart else []
    return Stage(tuple(one[0] for one in places), _table(dense), tuple(tables))


def _table(found: Mapping[tuple[int, int], int]) -> Table:
    rows = sorted({row for row, _ in found})
    columns = sorted({column for _, column in found})
    return tuple(tuple(found[row, column] for column in columns) for row in rows)


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
    members: Table,
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
            if len(members) > 1 and getattr(parameter, "tensor_model_parallel", False):
                dim = parameter.partition_dim - (parameter.ndim - 2)  # type: ignore[attr-defined]
            sharding = Sharding(len(members), dim)
            shape = tuple(parameter.shape)
            one = ShardedParameter(names[parameter], shape, rule.cut, sharding, ranges, members)
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


def plan_stage(
    stage: Stage,
    dense: Sequence[ShardedParameter],
    experts: Sequence[ShardedParameter],
    rule: UpdateRule,
    wave_bytes: int = MAX_WAVE_BYTES,
) -> tuple[HomePlan, HomePlan]:
    """Plan both instances of a stage at once, so that each rank's work is balanced over both.

    An expert may find its home on another expert-parallel rank, where a large dense matrix leaves
    its own too much to do.

    Args:
        stage: who holds what.
        dense: parameters of the dense instance.
        experts: parameters of any one expert-parallel rank; the others' lie alike.
        rule: for the work of a matrix.
        wave_bytes: see ``plan_homes``.

    Returns:
        the dense instance's plan and the experts', which holds the parameters of all
        expert-parallel ranks, one after the other.
    """
    everyones = [
        replace(one, name=f"ep{rank}.{one.name}", members=members)
        for rank, members in enumerate(stage.experts)
        for one in experts
    ]
    plan = plan_homes([*dense, *everyones], rule.flops, len(stage.ranks), wave_bytes)
    count = len(dense)
    first, second = range(count), range(count, count + len(everyones))
    return part_of_plan(plan, first, wave_bytes), part_of_plan(plan, second, wave_bytes)
