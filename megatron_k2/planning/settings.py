"""A candidate: parallel sizes and memory settings, and the flags that say so to Megatron.

What a candidate leaves open follows the example of Kimi K2's report: ZeRO-1 with overlapped
reductions, and where experts are spread and stages interleaved, expert messages under the products
of another microbatch and gradients of weights apart. Whether Megatron takes the flags is not
decided here: ``dry_run.py`` asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.layouts import propose_pipeline_layout

_KEPT_HERE = "--no-fine-grained-activation-offloading"
_RECOMPUTED = (
    "--recompute-granularity", "selective", "--recompute-modules", "layernorm", "moe_act",
    "mla_up_proj",
)  # fmt: skip
_COMPACT = (
    *_RECOMPUTED, "moe_down_proj", "--k2-fp8-activations", "moe_up_proj_input", "swiglu_input",
)  # fmt: skip
MEMORY: dict[str, tuple[str, ...]] = {
    "keep": ("--no-recompute", "--k2-fp8-activations", _KEPT_HERE),
    "recompute": (*_RECOMPUTED, "--k2-fp8-activations", _KEPT_HERE),
    "compact": (*_COMPACT, _KEPT_HERE),
    "report": (
        *_COMPACT, "--fine-grained-activation-offloading", "--offload-modules", "attn_norm",
        "qkv_linear", "core_attn", "attn_proj", "mlp_norm",
    ),
    "host": (
        *_COMPACT, "--fine-grained-activation-offloading", "--offload-modules", "attn_norm",
        "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act",
    ),
    "full": (
        "--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", "1", "--k2-fp8-activations", _KEPT_HERE,
    ),
}  # fmt: skip
"""What happens to activations (the report's section 2.4.3): all kept; its selective recomputation;
with its FP8 storage; and the rest offloaded to the host, as in the preset kimi-k2; what is stored
in FP8 offloaded too; or instead of all that, whole layers recomputed."""

USUAL = ("keep", "compact", "report", "host", "full")
"""Tried unless others are asked for."""

OFFLOAD = ("none", "moments", "all")
"""Of ``--k2-optimizer-offload``."""


@dataclass(frozen=True)
class Candidate:
    """One layout on a number of GPUs.

    Attributes:
        world_size: GPUs.
        tp, pp, vpp, ep, etp, cp: parallel sizes; ``vpp`` is chunks a rank.
        micro_batch_size: sequences.
        global_batch_size: sequences of a step.
        seq_length: tokens.
        memory: of ``MEMORY``.
        optimizer_offload: of ``OFFLOAD``.
        fp8: experts compute in FP8 (blockwise).
        overlap: expert messages may hide under another microbatch's products.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seq_length: int = 4096
    memory: str = "report"
    optimizer_offload: str = "none"
    fp8: bool = False
    overlap: bool = True

    @property
    def dp(self) -> int:
        """Replicas of the dense weights, context parallelism apart."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step in each pipeline."""
        return self.global_batch_size // (self.dp * self.micro_batch_size)

    @property
    def overlaps_experts(self) -> bool:
        """Whether expert messages hide under another microbatch's products."""
        possible = self.ep > 1 and (self.pp == 1 or self.vpp > 1) and self.memory != "full"
        return possible and self.overlap

    def layout(self, num_layers: int) -> str:
        """Return the pipeline's layout string."""
        return propose_pipeline_layout(num_layers, self.pp, self.vpp)

    def model_flags(self) -> list[str]:
        """Return what decides a layer's work and memory: no pipeline, no optimizer."""
        flags = ["--bf16", "--micro-batch-size", str(self.micro_batch_size)]
        flags += ["--seq-length", str(self.seq_length)]
        if self.tp > 1:
            flags += ["--tensor-model-parallel-size", str(self.tp), "--sequence-parallel"]
        if self.cp > 1:
            flags += ["--context-parallel-size", str(self.cp)]
        if self.ep > 1:
            flags += ["--expert-model-parallel-size", str(self.ep)]
        if self.etp != self.tp:
            flags += ["--expert-tensor-parallel-size", str(self.etp)]
        flags += MEMORY[self.memory]
        if self.fp8:
            flags += ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]
        return flags

    def flags(self, num_layers: int) -> list[str]:
        """Return all flags but the preset's, the data's and the length of the run."""
        flags = self.model_flags()
        if self.pp > 1:
            flags += ["--pipeline-model-parallel-size", str(self.pp)]
            flags += ["--pipeline-model-parallel-layout", self.layout(num_layers)]
        if self.overlaps_experts:
            flags += ["--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"]
        flags += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
        flags += ["--optimizer", "muonclip", "--k2-muon-wire", "bf16"]
        if self.optimizer_offload != "none":
            flags += ["--k2-optimizer-offload", self.optimizer_offload]
        return [*flags, "--global-batch-size", str(self.global_batch_size)]


def candidates(
    world_size: int,
    shape: dict[str, Any],
    *,
    seq_length: int,
    global_batch_size: int,
    node_gpus: int,
    memory: Sequence[str] = tuple(MEMORY),
    offload: Sequence[str] = OFFLOAD,
    fp8: Sequence[bool] = (False,),
    micro_batch_sizes: Sequence[int] = (1,),
    expert_splits: Sequence[int] = (1,),
    overlap: bool = True,
) -> list[Candidate]:
    """Return every layout that can be, by sizes alone.

    Args:
        world_size: GPUs.
        shape: ``num_layers``, ``num_attention_heads``, ``num_experts`` (0: dense) and
            ``moe_ffn_hidden_size`` of the model.
        seq_length: tokens.
        global_batch_size: sequences of a step.
        node_gpus: tensor parallelism stays within a node.
        memory: choices of ``MEMORY``.
        offload: choices of ``OFFLOAD``.
        fp8: whether experts compute in FP8.
        micro_batch_sizes: sequences.
        expert_splits: expert tensor parallel sizes; 1, or that of tensor parallelism.
        overlap: of ``Candidate``.
    """
    found: list[Candidate] = []
    heads, experts = shape["num_attention_heads"], shape["num_experts"]
    contexts = [1] if seq_length <= 8192 else [1, 2, 4, 8, 16]
    for tp, pp, cp in _products(world_size, _powers(node_gpus), contexts):
        if heads % tp or pp > shape["num_layers"] or seq_length % (2 * cp * tp):
            continue
        for ep, etp in _expert_sizes(world_size // pp, tp, experts, node_gpus, expert_splits):
            for size in micro_batch_sizes:
                dp = world_size // (tp * pp * cp)
                if global_batch_size % (dp * size):
                    continue
                number = global_batch_size // (dp * size)
                for vpp in range(1, 5):
                    if vpp > 1 and (pp == 1 or number % pp or pp * vpp > shape["num_layers"]):
                        continue
                    found.extend(
                        Candidate(world_size, tp, pp, vpp, ep, etp, cp, size, global_batch_size,
                                  seq_length, kept, moved, eight, overlap)
                        for kept in memory for moved in offload for eight in fp8
                    )  # fmt: skip
    return found


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _products(
    world_size: int, tensor: Sequence[int], context: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return (tp, pp, cp) whose product divides the world."""
    stages = [n for n in range(1, min(world_size, 64) + 1) if world_size % n == 0]
    return [
        (tp, pp, cp) for tp in tensor for pp in stages for cp in context
        if world_size % (tp * pp * cp) == 0
    ]  # fmt: skip


def _expert_sizes(
    ranks: int, tp: int, experts: int, node_gpus: int, splits: Sequence[int]
) -> list[tuple[int, int]]:
    """Return (ep, etp) for the ranks of a stage."""
    if not experts:
        return [(1, tp)]
    sizes = [n for n in range(1, min(ranks, experts, 8 * node_gpus) + 1)
             if experts % n == 0 and ranks % n == 0]  # fmt: skip
    return [
        (ep, etp) for ep in sizes for etp in splits if ranks % (ep * etp) == 0 and etp in (1, tp)
    ]
