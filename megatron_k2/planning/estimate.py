"""Memory, messages and least time of a candidate, added up from its pieces.

Optimistic by design, so that it is a bound: products run at the GPU's peak or at the speed of its
memory, whichever is slower; all else on the GPU is free; messages run at their link's rate without
latency, and hide wherever the schedule lets them. Recomputation is paid, the pipeline's bubble and
Newton-Schulz too. Memory: state by numbers of weights (the buffers' padding, exact in
``finalist.py``, is left out), saved activations of all microbatches in flight at the worst
moment, and the largest piece's transients. On a GPU kernels may save other tensors than the local
modules do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_k2.layouts import parse_pipeline_layout
from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.pieces import Piece, Product
from megatron_k2.planning.pipeline import ChunkTimes, Schedule, simulate
from megatron_k2.planning.settings import Candidate
from megatron_k2.planning.wire import Message

PARAMETER, GRADIENT, MAIN, MOMENT = 2, 4, 4, 4
"""Bytes: bf16 weights, fp32 gradients, fp32 weights, one fp32 moment."""

STEADY_PERIODS = 4
"""Microbatches simulated, in pipeline lengths; the rest repeats the steady state."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    host: float = 0.0
    """In host memory: optimizer state between steps."""

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.transient


@dataclass(frozen=True)
class Estimate:
    """What a candidate comes to.

    Attributes:
        candidate: the layout.
        memory: of each pipeline rank.
        step_s: least seconds of a step.
        parts_s: of ``step_s``: the steady pipeline, its bubble, Newton-Schulz, exposed reductions,
            optimizer state from the host and back.
        model_flops: products of a step without recomputation, all GPUs.
        bubble: share of the pipeline's time in which the average rank waits.
        sent_bytes: what the busiest rank sends a step, by kind of traffic.
        chunk_times: [rank][chunk].
    """

    candidate: Candidate
    memory: tuple[Memory, ...]
    step_s: float
    parts_s: Mapping[str, float]
    model_flops: float
    bubble: float
    sent_bytes: Mapping[str, float]
    chunk_times: tuple[tuple[ChunkTimes, ...], ...]

    def mfu(self, cluster: Cluster) -> float:
        """Return model FLOPs over the peak's, in bf16."""
        return self.model_flops / (self.step_s * cluster.num_gpus * cluster.bf16_flops)

    @property
    def peak_bytes(self) -> float:
        """Bytes of the fullest rank."""
        return max(one.total for one in self.memory)

    @property
    def host_bytes(self) -> float:
        """Host memory of the fullest rank."""
        return max(one.host for one in self.memory)


def stage_kinds(candidate: Candidate, layer_kinds: Sequence[str]) -> list[list[list[str]]]:
    """Return the pieces of every chunk, [rank][chunk]."""
    if candidate.pp == 1:
        return [[["embedding", *layer_kinds, "head"]]]
    layers = iter(layer_kinds)
    names = {"E": "embedding", "L": "head"}
    stages = parse_pipeline_layout(candidate.layout(len(layer_kinds)))
    chunks = [[next(layers) if one == "t" else names[one] for one in stage] for stage in stages]
    return [chunks[rank :: candidate.pp] for rank in range(candidate.pp)]


def estimate(
    candidate: Candidate,
    pieces: Mapping[str, Piece],
    layer_kinds: Sequence[str],
    hidden_size: int,
    muon_flops_per_weight: float,
    cluster: Cluster,
    *,
    simulated: bool = True,
) -> Estimate:
    """Add a candidate up.

    Args:
        candidate: the layout.
        pieces: of ``trace_pieces`` for the candidate's own sizes.
        layer_kinds: ``dense`` or ``moe`` for every layer.
        hidden_size: of the model; what travels between stages.
        muon_flops_per_weight: Newton-Schulz work of a weight, on average.
        cluster: what it runs on.
        simulated: run the pipeline's schedule on paper; else take its closed form, which is exact
            for stages that are all alike, and thousands of times faster.
    """
    stages = stage_kinds(candidate, layer_kinds)
    costs = {kind: _times(piece, candidate, cluster) for kind, piece in pieces.items()}
    times = tuple(tuple(_sum(costs[k] for k in chunk) for chunk in stage) for stage in stages)
    saved = [[sum(pieces[k].saved_bytes for k in chunk) for chunk in stage] for stage in stages]
    pipeline = _pipeline if simulated else _closed_form
    schedule, pipeline_s, bubble, flight = pipeline(candidate, times, saved, hidden_size, cluster)
    memory = tuple(
        _memory(
            candidate, stage, pieces, sum(n * b for n, b in zip(flight[r], saved[r], strict=True))
        )
        for r, stage in enumerate(stages)
    )
    weights = [_weights(stage, pieces) for stage in stages]
    sync_s, sync_bytes = _reductions(candidate, weights, cluster)
    last = max(sum(t.backward + t.weight for t in stage) for stage in times)
    exposed = max(0.0, sync_s - last)
    work = [
        dense / candidate.dp / candidate.cp + expert / candidate.edp for dense, expert in weights
    ]
    muon_s = muon_flops_per_weight * max(work) / cluster.bf16_flops
    ideal = max(sum(_alone(t, schedule) for t in stage) for stage in times)
    steady = candidate.num_microbatches * ideal
    flops = sum(sum(p.flops for p in pieces[k].forward) for s in stages for c in s for k in c)
    parts = {
        "pipeline": steady, "bubble": pipeline_s - steady, "newton_schulz": muon_s,
        "reductions": exposed,
        # In and out at once: the link has two directions.
        "optimizer offload": max(one.host for one in memory) / cluster.host_bandwidth,
    }  # fmt: skip
    sent = _sent(candidate, stages, pieces, hidden_size) | {"gradients and weights": sync_bytes}
    replicas = candidate.dp * candidate.cp * candidate.tp
    return Estimate(
        candidate, memory, sum(parts.values()), parts,
        3 * flops * candidate.num_microbatches * replicas, bubble, sent, times,
    )  # fmt: skip


def _seconds(products: Sequence[Product], rate: float, bandwidth: float) -> float:
    return sum(max(one.flops / rate, one.bytes / bandwidth) for one in products)


def _times(piece: Piece, candidate: Candidate, cluster: Cluster) -> ChunkTimes:
    """Return a piece's seconds; expert messages apart, as a schedule can hide them."""
    rate = cluster.fp8_flops if candidate.fp8 and piece.kind == "moe" else cluster.bf16_flops
    ahead = _seconds(piece.forward, rate, cluster.memory_bandwidth)
    back = _seconds(piece.backward, rate, cluster.memory_bandwidth)
    weighted = [one for one in piece.forward if one.has_weight]
    weight = _seconds(weighted, rate, cluster.memory_bandwidth)
    messages = [_split(some, cluster) for some in (piece.forward_messages, piece.backward_messages)]
    (other_f, expert_f), (other_b, expert_b) = messages
    return ChunkTimes(
        ahead + other_f, max(back - weight, 0.0) + other_b, weight, expert_f, expert_b
    )


def _split(messages: Sequence[Message], cluster: Cluster) -> tuple[float, float]:
    """Return seconds of all other messages, and of the experts' all-to-all."""
    sums = [0.0, 0.0]
    for one in messages:
        sums[one.kind == "all-to-all"] += cluster.seconds(one)
    return sums[0], sums[1]


def _sum(parts: object) -> ChunkTimes:
    rows = [(t.forward, t.backward, t.weight, t.forward_messages, t.backward_messages)
            for t in parts]  # type: ignore[attr-defined]  # fmt: skip
    return ChunkTimes(*(sum(column) for column in zip(*rows, strict=True)))


def _alone(times: ChunkTimes, schedule: Schedule) -> float:
    """Return a microbatch's seconds in the steady state."""
    work = times.forward + times.backward + times.weight
    messages = times.forward_messages + times.backward_messages
    return max(work, messages) if schedule.overlapped else work + messages


def _pipeline(
    candidate: Candidate,
    times: Sequence[Sequence[ChunkTimes]],
    saved: Sequence[Sequence[float]],
    hidden_size: int,
    cluster: Cluster,
) -> tuple[Schedule, float, float, Sequence[Sequence[int]]]:
    """Simulate the first microbatches and extend the steady state to all."""
    number = candidate.num_microbatches
    overlapped = candidate.overlaps_experts
    most = STEADY_PERIODS * candidate.pp * candidate.vpp
    few = min(number, most)
    schedule = Schedule(few, candidate.pp, candidate.vpp, overlapped, overlapped)
    message_s = _hidden_bytes(candidate, hidden_size) / cluster.network_bandwidth
    timeline = simulate(schedule, times, message_s, saved)
    ideal = max(sum(_alone(t, schedule) for t in stage) for stage in times)
    total = timeline.duration + (number - few) * ideal
    busy = sum(sum(_alone(t, schedule) for t in stage) for stage in times) / len(times) * number
    return schedule, total, 1 - busy / total, timeline.in_flight


def _closed_form(
    candidate: Candidate,
    times: Sequence[Sequence[ChunkTimes]],
    saved: Sequence[Sequence[float]],
    hidden_size: int,
    cluster: Cluster,
) -> tuple[Schedule, float, float, Sequence[Sequence[float]]]:
    """Return what ``_pipeline`` would if all stages were alike."""
    stages, chunks, number = candidate.pp, candidate.vpp, candidate.num_microbatches
    overlapped = candidate.overlaps_experts
    schedule = Schedule(number, stages, chunks, overlapped, overlapped)
    each = [sum(_alone(t, schedule) for t in stage) for stage in times]
    lost = (stages - 1) / chunks * sum(each) / stages
    total = number * max(each) + lost
    flight = []
    for rank in range(stages):
        ahead = stages - rank - 1
        if chunks > 1:
            ahead = 2 * ahead + (chunks - 1) * stages + int(overlapped)
        flight.append([min(ahead + 1, number * chunks) / chunks] * chunks)
    return schedule, total, 1 - number * sum(each) / stages / total, flight


def _hidden_bytes(candidate: Candidate, hidden_size: int) -> float:
    """Return the bytes of one microbatch between two stages."""
    tokens = candidate.micro_batch_size * candidate.seq_length / (candidate.cp * candidate.tp)
    return PARAMETER * hidden_size * tokens


def _weights(stage: Sequence[Sequence[str]], pieces: Mapping[str, Piece]) -> tuple[int, int]:
    kinds = [kind for chunk in stage for kind in chunk]
    return sum(pieces[k].dense_numel for k in kinds), sum(pieces[k].expert_numel for k in kinds)


def _memory(
    candidate: Candidate,
    stage: Sequence[Sequence[str]],
    pieces: Mapping[str, Piece],
    activations: float,
) -> Memory:
    dense, expert = _weights(stage, pieces)
    kinds = [kind for chunk in stage for kind in chunk]
    ends = sum(pieces[k].dense_numel for k in kinds if k in ("embedding", "head"))
    shard = dense / (candidate.dp * candidate.cp) + expert / candidate.edp
    main = MAIN * shard
    moments = MOMENT * (shard + ends / (candidate.dp * candidate.cp))  # AdamW has two
    there = {"none": 0.0, "moments": moments, "all": main + moments}[candidate.optimizer_offload]
    return Memory(
        parameters=PARAMETER * (dense + expert),
        gradients=GRADIENT * (dense + expert),
        optimizer=main + moments - there,
        activations=activations,
        transient=max(pieces[k].transient_bytes for k in kinds),
        host=there,
    )


def _reductions(
    candidate: Candidate, weights: Sequence[tuple[int, int]], cluster: Cluster
) -> tuple[float, float]:
    """Return seconds and bytes of the busiest rank's gradients and weights of a step."""
    worst = (0.0, 0.0)
    for dense, expert in weights:
        seconds = total = 0.0
        for numel, ranks, stride in (
            (dense, candidate.dp * candidate.cp, candidate.tp),
            (expert, candidate.edp, candidate.ep * candidate.etp),
        ):
            group = tuple(range(0, ranks * stride, stride))
            for one in (
                Message("reduce-scatter", group, "", GRADIENT * numel),
                Message("all-gather", group, "", PARAMETER * numel // max(ranks, 1)),
            ):
                seconds += cluster.seconds(one)
                total += one.sent_bytes
        worst = max(worst, (seconds, total))
    return worst


def _sent(
    candidate: Candidate,
    stages: Sequence[Sequence[Sequence[str]]],
    pieces: Mapping[str, Piece],
    hidden_size: int,
) -> dict[str, float]:
    """Return what the busiest rank sends a step in its layers, by kind of traffic."""
    each = {kind: _sent_by(piece) for kind, piece in pieces.items()}
    best: dict[str, float] = {}
    for stage in stages:
        counts = Counter(kind for chunk in stage for kind in chunk)
        found: dict[str, float] = {}
        for kind, count in counts.items():
            for name, sent in each[kind].items():
                found[name] = found.get(name, 0.0) + sent * count * candidate.num_microbatches
        if sum(found.values()) >= sum(best.values()):
            best = found
    if candidate.pp > 1:
        per_batch = 2 * candidate.vpp * _hidden_bytes(candidate, hidden_size)
        best["stages"] = per_batch * candidate.num_microbatches
    return best


def _sent_by(piece: Piece) -> dict[str, float]:
    """Return the bytes of one microbatch in one piece, by kind of traffic."""
    found: dict[str, float] = {}
    for one in (*piece.forward_messages, *piece.backward_messages):
        name = "experts" if one.kind == "all-to-all" else "tensor and context"
        found[name] = found.get(name, 0.0) + one.sent_bytes
    return found
