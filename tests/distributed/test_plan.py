"""A dry run's bytes are those of the real run: weights, gradients, optimizer, messages, memory."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

import pytest

from megatron_k2.planning.cluster import load_cluster
from megatron_k2.planning.dry_run import dry_rank
from megatron_k2.planning.memory import state_bytes
from megatron_k2.planning.model import Model
from megatron_k2.planning.pipeline import ChunkTimes, Schedule, simulate
from megatron_k2.planning.search import finish, search
from megatron_k2.planning.settings import Candidate
from megatron_k2.planning.trace import LiveStorages
from megatron_k2.planning.wire import sent_bytes_by
from tests.distributed.matrix import evidence_apart
from tests.distributed.plan_job import counted_step
from tests.distributed.pool import Pool

COMMAND = [
    "--k2-preset=k2-micro", "--vocab-size=1023", "--tokenizer-type=NullTokenizer",
    "--seq-length=64", "--micro-batch-size=2", "--global-batch-size=8", "--train-iters=20",
    "--lr=1e-3", "--optimizer=muonclip", "--use-distributed-optimizer", "--eval-iters=0",
]  # fmt: skip
TP2 = ["--tensor-model-parallel-size=2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size=2"]
EP2 = ["--expert-model-parallel-size=2"]
ETP1 = ["--expert-tensor-parallel-size=1"]
VPP2 = ["--num-virtual-stages-per-pipeline-rank=2"]
REPORT = [
    "--recompute-granularity=selective", "--recompute-modules", "layernorm", "moe_act",
    "mla_up_proj", "--k2-fp8-activations", "moe_up_proj_input", "swiglu_input",
]  # fmt: skip
OFFLOAD = [
    "--seq-length=256",  # activations are the peak
    "--fine-grained-activation-offloading", "--offload-modules", "attn_norm", "qkv_linear",
    "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act", "--min-offloaded-tensor-size=1",
]  # fmt: skip
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "DP2": (2, []),
    "TP2": (2, [*TP2, *ETP1]),
    "TP2 x EP2 x ETP2": (4, [*TP2, *EP2]),
    "EP2": (2, EP2),
    "EP2, the report's memory": (2, [*EP2, *REPORT]),
    "EP2, activations offloaded": (2, [*EP2, *OFFLOAD]),
    "PP2": (2, PP2),
    "PP2 x VPP2, activations offloaded": (2, [*PP2, *VPP2, *OFFLOAD]),
    "PP2 x VPP2": (2, [*PP2, *VPP2]),
    "EP2 x PP2": (4, [*EP2, *PP2]),
    "TP2 x PP2 x EP2": (8, [*TP2, *PP2, *EP2, *ETP1]),
}
WIDE = set(LAYOUTS) - {"EP2, the report's memory"}
KINDS = ("forward", "backward")
ACTIVATIONS = 0.03  # the bar
PEAK = {"TP2 x EP2 x ETP2": 0.08}
"""A real run holds what the optimizer sends until it has arrived, a plan does not."""


def planned(command: list[str], rank: int, world_size: int) -> dict[str, Any]:
    """Return what a dry run of the same two steps holds and sends in the second."""
    with dry_rank(command, rank, world_size, device="cpu") as (built, trace):
        built.train_step()
        before, trace.storages = len(trace.messages), LiveStorages()
        most = counted_step(built, trace)
        return {
            "state": state_bytes(built.chunks, built.optimizer),
            "sent": sent_bytes_by(trace.messages[before:]),
            **most,
            "host": trace.host_storages.peak_bytes,
        }


@pytest.mark.parametrize("name", evidence_apart(LAYOUTS, WIDE))
def test_planned_bytes_are_the_measured_ones(pool: Pool, name: str) -> None:
    world_size, flags = LAYOUTS[name]
    command = [*COMMAND, *flags]
    measured = pool.run(
        "tests.distributed.plan_job:measure", world_size, kwargs=dict(command=command)
    )
    for rank in sorted({0, world_size - 1}):  # first and last stage; others are like them
        found = measured[rank]
        wanted = planned(command, rank, world_size)
        print(name, rank, found, wanted["peak"], wanted["activations"], wanted["host"])
        assert bool(wanted["host"]) is ("offloaded" in name)
        assert found["state"] == wanted["state"]
        assert found["sent"] == wanted["sent"]
        assert found["activations"] == pytest.approx(wanted["activations"], rel=ACTIVATIONS)
        assert found["peak"] == pytest.approx(wanted["peak"], rel=PEAK.get(name, ACTIVATIONS))


@pytest.mark.evidence
@pytest.mark.parametrize("memory", ["keep", "compact", "report"])
def test_a_sum_of_pieces_is_the_memory_of_a_whole_step(memory: str) -> None:
    model = Model("k2-nano", ("--min-offloaded-tensor-size=1",))
    candidate = Candidate(
        4, pp=2, vpp=2, ep=2, global_batch_size=16, seq_length=512, memory=memory
    )  # fmt: skip
    (guess,) = search(model, load_cluster("h100", 4), [candidate]).fitting
    finalist = finish(model, load_cluster("h100", 4), guess)
    command = [*finalist.command, "--train-iters=20", "--lr=1e-3"]
    for rank in (0, 3):
        with dry_rank(command, rank, 4) as (built, trace):
            built.train_step()
            trace.storages = LiveStorages()
            peak = counted_step(built, trace)["activations"]
        there = finalist.estimate.memory[rank // 2]
        print(memory, rank, peak, there.activations, there.transient)
        assert peak == pytest.approx(there.activations + there.transient, rel=0.10)


@pytest.mark.evidence  # a matter of milliseconds: it wants two cores to itself
def test_the_simulated_timeline_is_that_of_a_real_pipeline_of_two(pool: Pool) -> None:
    command = [*COMMAND, *PP2, "--seq-length=256", "--global-batch-size=16"]
    target = "tests.distributed.plan_job:timeline"
    runs = pool.run(target, 2, kwargs=dict(command=command, steps=6))
    errors = []
    for passes in list(zip(*runs, strict=True))[2:]:  # the first steps warm up
        seconds = [
            [fmean(stop - start for name, start, stop in one if name == kind) for kind in KINDS]
            for one in passes
        ]
        begin = min(start for one in passes for _, start, _ in one)
        real = max(stop for one in passes for _, _, stop in one) - begin
        schedule = Schedule(len(passes[0]) // 2, 2)
        times = [[ChunkTimes(forward, backward)] for forward, backward in seconds]
        errors.append(simulate(schedule, times).duration / real - 1)
    print("simulated over real - 1:", errors)
    assert abs(median(errors)) < 0.10  # the bar
