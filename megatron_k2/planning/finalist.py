"""A candidate built: every pipeline stage's real modules, buffers and optimizer, byte by byte.

The command line is handed to Megatron under a fake process group (dry_run.py), once for the first
rank of each stage that differs from the others; a refusal is Megatron's own. State is what was
allocated, work and traffic of the optimizer are those of MuonClip's own plan of homes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_k2.planning.dry_run import dry_rank
from megatron_k2.planning.memory import StateBytes, state_bytes
from megatron_k2.planning.workers import Mapper


@dataclass(frozen=True)
class BuiltStage:
    """One pipeline rank, built.

    Attributes:
        stages: pipeline ranks that hold the same.
        state: bytes between steps.
        num_weights: of this rank.
        muon_flops: Newton-Schulz work of the busiest rank of the stage.
        muon_sent_bytes: what this rank sends of matrices, a step.
    """

    stages: tuple[int, ...]
    state: StateBytes
    num_weights: int
    muon_flops: float
    muon_sent_bytes: float


def build_stages(
    command: Sequence[str],
    world_size: int,
    stages: Sequence[Sequence[Sequence[str]]],
    mapper: Mapper = map,
) -> list[BuiltStage]:
    """Build each stage that differs.

    Args:
        command: the whole command line.
        world_size: GPUs.
        stages: pieces by [rank][chunk], as ``estimate.stage_kinds`` returns them.
        mapper: of ``workers``; by default everything happens in this process.

    Returns:
        one entry for each different stage.

    Raises:
        ValueError: Megatron or K2 refuse the command.
    """
    alike: dict[str, list[int]] = {}
    for place, stage in enumerate(stages):
        alike.setdefault(repr(stage), []).append(place)
    places = [tuple(same) for same in alike.values()]
    per_stage = world_size // len(stages)
    return list(mapper(partial(_build, tuple(command), per_stage, world_size), places))


def _build(
    command: Sequence[str], per_stage: int, world_size: int, places: tuple[int, ...]
) -> BuiltStage:
    """Build the first rank of the first of some stages that are alike."""
    with dry_rank(command, places[0] * per_stage, world_size) as (rank, _):
        flops, sent = _optimizer_work(rank.optimizer)
        return BuiltStage(
            places, state_bytes(rank.chunks, rank.optimizer),
            sum(p.numel() for chunk in rank.chunks for p in chunk.parameters()), flops, sent,
        )  # fmt: skip


def _optimizer_work(optimizer: Any) -> tuple[float, float]:
    """Return (largest Newton-Schulz FLOPs of a rank, bytes this rank sends), by MuonClip's plan."""
    flops, sent = 0.0, 0.0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        exchange = getattr(getattr(part, "optimizer", None), "exchange", None)
        if exchange is None:
            continue
        flops = max(flops, max(exchange.plan.work_flops, default=0.0))
        there, back = exchange.plan.sent_numel(exchange.member)
        reply = exchange.reply_dtype or exchange.wire_dtype
        sent += there * exchange.wire_dtype.itemsize + back * reply.itemsize
    return flops, sent
