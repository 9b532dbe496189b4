"""A step of reinforcement learning on paper: rollouts, training, and the weights between the two.

Colocated as in Kimi K2 (report, section 3.3): trainer and engine share the GPUs in turn, and the
one that waits keeps its state in host memory (gradients are freed). Apart: each has its own GPUs.
After a step all weights go to every engine as in the report's checkpoint engine: each trainer rank
copies its part from the host, every node receives the whole model (simpler than sending only what
is needed, and in practice not slower), and each engine GPU keeps its shard. Synchronous: nothing
overlaps; "ahead by one" is the bound of rollouts that run while the step before is trained. Bounds
as in ``estimate.py``; engines are full all the time, although answers differ in length.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.search import Finalist
from megatron_k2.planning.serving import Engine, Traffic


@dataclass(frozen=True)
class Cycle:
    """One step.

    Attributes:
        colocated: trainer and engine share GPUs.
        trainer_gpus, engine_gpus: how many each has.
        answers: of a step.
        rollout_s: all answers, engines full all the time.
        train_s: of the trainer's plan.
        swap_s: trainer state to the host and back, where GPUs are shared.
        copy_s: of the sync, the trainer's weights over its link to the host.
        broadcast_s: of the sync, the whole model to every node.
        host_bytes: of a GPU's share of the host, while the engine runs.
        fits: that share is there.
    """

    colocated: bool
    trainer_gpus: int
    engine_gpus: int
    answers: int
    rollout_s: float
    train_s: float
    swap_s: float
    copy_s: float
    broadcast_s: float
    host_bytes: float
    fits: bool

    @property
    def sync_s(self) -> float:
        """Seconds until all engines have new weights."""
        return self.copy_s + self.broadcast_s

    @property
    def step_s(self) -> float:
        """Seconds of a synchronous step."""
        return self.rollout_s + self.train_s + self.swap_s + self.sync_s

    @property
    def ahead_s(self) -> float:
        """Seconds of a step whose rollouts run while the step before is trained; apart only."""
        if self.colocated:
            return self.step_s
        return max(self.rollout_s, self.train_s) + self.sync_s


def cycle(
    trainer: Finalist,
    trainer_cluster: Cluster,
    engine: Engine,
    engine_cluster: Cluster,
    traffic: Traffic,
    *,
    colocated: bool,
) -> Cycle:
    """Add one step up.

    Args:
        trainer: its plan, built; each sequence of its batch is one answer.
        trainer_cluster: its GPUs.
        engine: an instance.
        engine_cluster: all GPUs of the engines; the trainer's where they are shared.
        traffic: lengths of prompts and answers.
        colocated: trainer and engine share GPUs.
    """
    answers = trainer.estimate.candidate.global_batch_size
    replicas = engine_cluster.num_gpus // engine.tp
    at_once = min(engine.requests, -(-answers // replicas))
    rounds = -(-answers // (replicas * at_once))
    rollout = rounds * (at_once * engine.prefill_s + traffic.response * engine.decode_s)
    weights = max(one.state.parameters for one in trainer.built)
    kept = max(one.state.total - one.state.gradients for one in trainer.built)
    on_gpu = max(trainer.state_bytes(one) - one.state.gradients for one in trainer.built)
    host = kept if colocated else weights
    there = trainer_cluster.host_bytes / trainer_cluster.node_gpus
    whole = engine.weight_bytes * engine.num_gpus
    return Cycle(
        colocated=colocated,
        trainer_gpus=trainer_cluster.num_gpus,
        engine_gpus=engine_cluster.num_gpus,
        answers=answers,
        rollout_s=rollout,
        train_s=trainer.estimate.step_s,
        swap_s=2 * on_gpu / trainer_cluster.host_bandwidth if colocated else 0.0,
        copy_s=weights / trainer_cluster.host_bandwidth,
        broadcast_s=_broadcast_seconds(whole, engine_cluster),
        host_bytes=host,
        fits=host <= there,
    )


def _broadcast_seconds(whole: float, cluster: Cluster) -> float:
    """Return the least seconds until every node has received the whole model."""
    if cluster.num_gpus <= cluster.node_gpus:
        return whole / cluster.num_gpus / cluster.node_bandwidth
    return whole / (cluster.node_gpus * cluster.network_bandwidth)
