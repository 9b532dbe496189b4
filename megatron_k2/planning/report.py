"""A plan as tables and as JSON; its picture is in ``picture.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.estimate import Estimate, Memory
from megatron_k2.planning.reinforcement import Cycle
from megatron_k2.planning.search import Finalist
from megatron_k2.planning.serving import Engine, Traffic

GB = 1e9


def gigabytes(size: float) -> str:
    """Return bytes in GB, in at least two digits."""
    return f"{size / GB:.1f}" if size >= 10 * GB or not size else f"{size / GB:.2g}"


def name_of(guess: Estimate) -> str:
    """Return a candidate in one line."""
    one = guess.candidate
    sizes = [("TP", one.tp), ("PP", one.pp), ("VPP", one.vpp), ("EP", one.ep), ("CP", one.cp)]
    if one.etp > 1 and one.ep > 1:
        sizes.append(("ETP", one.etp))
    text = " ".join(f"{name}{size}" for name, size in sizes if size > 1)
    return f"{text or 'one rank'} DP{one.dp} {one.memory}" + (
        "" if one.optimizer_offload == "none" else f" offload-{one.optimizer_offload}"
    )


def rows(finalists: Sequence[Finalist], cluster: Cluster) -> list[list[str]]:
    """Return the table's rows: one a finalist, best first."""
    found = []
    for one in finalists:
        guess = one.estimate
        worst = max(guess.memory, key=lambda memory: memory.total)
        found.append([
            name_of(guess), gigabytes(one.peak_bytes), *memory_cells(worst),
            f"{guess.step_s:.3g}", f"{guess.mfu(cluster):.1%}", f"{guess.bubble:.1%}",
            f"{max(guess.imbalance, 0):.1%}",
            f"{guess.parts_s['newton_schulz']:.2g}", one.refusal or "built",
        ])  # fmt: skip
    return found


def sent_rows(finalists: Sequence[Finalist]) -> list[list[str]]:
    """Return, for each layout, GB that its busiest rank sends a step and seconds of the parts."""
    found = []
    for one in finalists:
        sent, parts = one.estimate.sent_bytes, one.estimate.parts_s
        found.append(
            [name_of(one.estimate), *(gigabytes(sent.get(name, 0.0)) for name in SENT)]
            + [f"{parts[name]:.2g}" for name in PARTS]
        )
    return found


SENT = ("experts", "tensor and context", "stages", "gradients and weights")
PARTS = ("pipeline", "bubble", "newton_schulz", "reductions", "optimizer offload")
SENT_HEADER = (
    "layout", *(f"{name} GB sent" for name in SENT),
    *(f"{name} s".replace("_", "-") for name in PARTS),
)  # fmt: skip

HEADER = (
    "layout", "GB a GPU", "weights", "gradients", "optimizer", "activations", "transient",
    "host GB", "step s", "MFU at most", "bubble", "imbalance", "Newton-Schulz s", "Megatron",
)  # fmt: skip


KINDS = ("weights", "gradients", "optimizer", "activations", "transient", "host")


def memory_cells(memory: Memory) -> list[str]:
    """Return GB by ``KINDS``."""
    values = (
        memory.parameters, memory.gradients, memory.optimizer, memory.activations,
        memory.transient, memory.host,
    )  # fmt: skip
    return [gigabytes(value) for value in values]


ENGINE_HEADER = (
    "GPUs", "TP", "DP", "EP", "weights GB", "cache GB", "cached tokens", "requests at once",
    "tokens/s a request", "tokens/s a GPU", "prompt tokens/s a GPU", "answers/s a GPU",
)  # fmt: skip


def engine_rows(engines: Sequence[Engine], traffic: Traffic) -> list[list[str]]:
    """Return the rows of a table of engines: one an instance; rates are upper bounds."""
    return [
        [
            str(one.num_gpus), str(one.tp), str(one.replicas), str(one.ep),
            gigabytes(one.weight_bytes), gigabytes(one.cached_tokens * one.token_bytes),
            f"{one.cached_tokens:,}", f"{one.requests * one.replicas:,}",
            f"{1 / one.decode_s:,.0f}", f"{one.decoded_per_s:,.0f}",
            f"{one.prefilled_per_s * traffic.prompt:,.0f}",
            f"{one.answers_per_s(traffic):.3g}",
        ]
        for one in engines
    ]  # fmt: skip


CYCLE_HEADER = (
    "trainer GPUs", "engine GPUs", "rollouts s", "training s", "swap s", "sync s", "step s",
    "ahead by one s", "host GB a GPU",
)  # fmt: skip


def cycle_row(one: Cycle) -> list[str]:
    """Return the row of a step of reinforcement learning; seconds are lower bounds."""
    seconds = (one.rollout_s, one.train_s, one.swap_s, one.sync_s, one.step_s, one.ahead_s)
    engine_gpus = "the same" if one.colocated else str(one.engine_gpus)
    host = f"{gigabytes(one.host_bytes)}{'' if one.fits else ' (too much)'}"
    return [str(one.trainer_gpus), engine_gpus, *(f"{s:.3g}" for s in seconds), host]


def engine_flags(one: Engine, traffic: Traffic) -> str:
    """Return vLLM's flags for an instance (its documentation's; not run here)."""
    flags = f"vllm serve MODEL --tensor-parallel-size {one.tp}"
    if one.replicas > 1:
        flags += f" --data-parallel-size {one.replicas}"
    if one.ep > 1:
        flags += " --enable-expert-parallel"
    length = traffic.prompt + traffic.response
    return f"{flags} --max-num-seqs {one.requests} --max-model-len {length}"


def as_json(finalists: Sequence[Finalist], cluster: Cluster) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "cluster": asdict(cluster),
        "layouts": [
            {
                "candidate": asdict(one.estimate.candidate),
                "command": list(one.command),
                "refusal": one.refusal,
                "peak_bytes": one.peak_bytes,
                "step_s": one.estimate.step_s,
                "parts_s": dict(one.estimate.parts_s),
                "mfu_bound": one.estimate.mfu(cluster),
                "bubble": one.estimate.bubble,
                "imbalance": one.estimate.imbalance,
                "sent_bytes": dict(one.estimate.sent_bytes),
                "ranks": [
                    asdict(memory) | {"total": memory.total} for memory in one.estimate.memory
                ],
                "built": [asdict(stage) for stage in one.built],
            }
            for one in finalists
        ],
    }
