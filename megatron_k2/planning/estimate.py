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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_k2.layouts import parse_pipeline_layout, propose_pipeline_layout
from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.pipeline import ChunkTimes, Schedule, simulate
from megatron_k2.planning.price import Price, Prices, Weights, merge_sent
from megatron_k2.planning.settings import Candidate
from megatron_k2.planning.wire import Message

PARAMETER, GRADIENT, MAIN, MOMENT = 2, 4, 4, 4
"""Bytes: bf16 weights, fp32 gradients, fp32 weights, one fp32 moment."""

STEADY_PERIODS = 4
"""Microbatches simulated, in pipeline lengths; the rest repeats the steady state."""


Stages = tuple[tuple[tuple[str, ...], ...], ...]
"""Kinds of pieces, [rank][chunk][place]."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    host_optimizer: float = 0.0
    """In host memory: optimizer state between steps."""
    host_activations: float = 0.0
    """In host memory: offloaded activations."""

    @property
    def host(self) -> float:
        """Bytes in host memory."""
        return self.host_optimizer + self.host_activations

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
        bubble: share of the pipeline's time that filling and draining it costs.
        imbalance: share in which the average rank waits for the busiest.
        sent_bytes: what the busiest rank sends a step, by kind of traffic.
        chunk_times: [rank][chunk].
    """

    candidate: Candidate
    memory: tuple[Memory, ...]
    step_s: float
    parts_s: Mapping[str, float]
    model_flops: float
    bubble: float
    imbalance: float
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


def stage_kinds(candidate: Candidate, layer_kinds: Sequence[str]) -> Stages:
    """Return the pieces of every chunk, [rank][chunk]."""
    return _stage_kinds(candidate.pp, candidate.vpp, tuple(layer_kinds))


@lru_cache(maxsize=1024)
def _stage_kinds(num_stages: int, num_chunks: int, layer_kinds: tuple[str, ...]) -> Stages:
    if num_stages == 1:
        return ((("embedding", *layer_kinds, "head"),),)
    layers = iter(layer_kinds)
    names = {"E": "embedding", "L": "head"}
    stages = parse_pipeline_layout(
        propose_pipeline_layout(len(layer_kinds), num_stages, num_chunks)
    )
    chunks = [tuple(next(layers) if one == "t" else names[one] for one in some) for some in stages]
    return tuple(tuple(chunks[rank::num_stages]) for rank in range(num_stages))


def estimate(
    candidate: Candidate,
    prices: Prices,
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
        prices: of the pieces with the candidate's own sizes.
        layer_kinds: ``dense`` or ``moe`` for every layer.
        hidden_size: of the model; what travels between stages.
        muon_flops_per_weight: Newton-Schulz work of a weight, on average.
        cluster: what it runs on.
        simulated: run the pipeline's schedule on paper; else take its closed form, which is exact
            for stages that are all alike, and thousands of times faster.
    """
    stages = stage_kinds(candidate, layer_kinds)
    chunks = [[prices.of(chunk) for chunk in stage] for stage in stages]
    times = tuple(tuple(one.times for one in stage) for stage in chunks)
    saved = [[one.saved_bytes for one in stage] for stage in chunks]
    offloaded = [[one.offloaded_bytes for one in stage] for stage in chunks]
    pipeline = _pipeline if simulated else _closed_form
    schedule, pipeline_s, waiting, flight = pipeline(candidate, times, saved, hidden_size, cluster)
    weights = [sum((one.weights for one in stage), Weights()) for stage in chunks]
    memory = tuple(
        _memory(candidate, stage, weights[r], _held(flight[r], saved[r], offloaded[r]))
        for r, stage in enumerate(chunks)
    )
    sync_s, sync_bytes = _reductions(candidate, weights, cluster)
    last = max(sum(t.backward + t.weight for t in stage) for stage in times)
    exposed = max(0.0, sync_s - last)
    work = [
        w.trained_dense / candidate.dp / candidate.cp + w.trained_expert / candidate.edp
        for w in weights
    ]
    muon_s = muon_flops_per_weight * max(work) / cluster.bf16_flops
    ideal = max(sum(_alone(t, schedule) for t in stage) for stage in times)
    steady = candidate.num_microbatches * ideal
    flops = sum(one.flops for stage in chunks for one in stage)
    parts = {
        "pipeline": steady, "bubble": pipeline_s - steady, "newton_schulz": muon_s,
        "reductions": exposed,
        # In and out at once: the link has two directions.
        "optimizer offload": max(one.host_optimizer for one in memory) / cluster.host_bandwidth,
    }  # fmt: skip
    sent = _sent(candidate, chunks, hidden_size) | {"gradients and weights": sync_bytes}
    replicas = candidate.dp * candidate.cp * candidate.tp
    return Estimate(
        candidate, memory, sum(parts.values()), parts,
        3 * flops * candidate.num_microbatches * replicas,
        1 - steady / pipeline_s, waiting - (1 - steady / pipeline_s), sent, times,
    )  # fmt: skip


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


def _held(
    flight: Sequence[float], saved: Sequence[float], offloaded: Sequence[float]
) -> tuple[float, float]:
    """Return a rank's bytes of all microbatches in flight: on the GPU, on the host."""
    return (
        sum(n * b for n, b in zip(flight, saved, strict=True)),
        sum(n * b for n, b in zip(flight, offloaded, strict=True)),
    )


def _memory(
    candidate: Candidate,
    chunks: Sequence[Price],
    weights: Weights,
    activations: tuple[float, float],
) -> Memory:
    replicas = candidate.dp * candidate.cp
    shard = weights.trained_dense / replicas + weights.trained_expert / candidate.edp
    main = MAIN * shard
    moments = MOMENT * (shard + weights.trained_ends / replicas)  # AdamW has two
    there = {"none": 0.0, "moments": moments, "all": main + moments}[candidate.optimizer_offload]
    return Memory(
        parameters=PARAMETER * (weights.dense + weights.expert),
        gradients=GRADIENT * (weights.trained_dense + weights.trained_expert),
        optimizer=main + moments - there,
        activations=activations[0],
        transient=max(one.transient_bytes for one in chunks),
        host_optimizer=there,
        host_activations=activations[1],
    )


def _reductions(
    candidate: Candidate, weights: Sequence[Weights], cluster: Cluster
) -> tuple[float, float]:
    """Return seconds and bytes of the busiest rank's gradients and weights of a step."""
    worst = (0.0, 0.0)
    for one in set(weights):
        seconds = total = 0.0
        for numel, ranks, stride in (
            (one.trained_dense, candidate.dp * candidate.cp, candidate.tp),
            (one.trained_expert, candidate.edp, candidate.ep * candidate.etp),
        ):
            group = tuple(range(0, ranks * stride, stride))
            for message in (
                Message("reduce-scatter", group, "", GRADIENT * numel),
                Message("all-gather", group, "", PARAMETER * numel // max(ranks, 1)),
            ):
                seconds += cluster.seconds(message)
                total += message.sent_bytes
        worst = max(worst, (seconds, total))
    return worst


def _sent(
    candidate: Candidate, chunks: Sequence[Sequence[Price]], hidden_size: int
) -> dict[str, float]:
    """Return what the busiest rank sends a step in its layers, by kind of traffic."""
    stages = [merge_sent(one.sent_bytes for one in stage) for stage in chunks]
    busiest = max(stages, key=lambda sent: sum(sent.values()))
    found = {name: sent * candidate.num_microbatches for name, sent in busiest.items()}
    if candidate.pp > 1:
        per_batch = 2 * candidate.vpp * _hidden_bytes(candidate, hidden_size)
        found["stages"] = per_batch * candidate.num_microbatches
    return found
