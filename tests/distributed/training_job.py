"""One training run under one layout, by Megatron's own builder, DDP, optimizer and schedule.

``train`` runs in every rank of the worker pool. It builds a preset at fp32 or bf16, loads a
torch_dist checkpoint, trains on seeded synthetic tokens with the routing recorded or replayed
(upstream ``core/transformer/moe/router_replay.py``), and returns what the layout matrix compares:
losses by sequence, gradient norms, and digests of gradients and weights by parameter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import batched
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_k2 import parallel
from megatron_k2.model.specs import get_k2_decoder_block_spec
from megatron_k2.planning.stage import preset_config
from megatron_k2.presets import load_preset
from tests.distributed.matrix import NUM_SEQUENCES

SEED = 1234
SEQ_LENGTH = 64
GROUP_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass(frozen=True)
class Run:
    """What one job does."""

    layout: dict[str, Any] = field(default_factory=dict)
    """Fields of K2TransformerConfig that place the model, upstream's names."""
    checkpoint: str = ""
    save_initial: bool = False
    """Write the freshly initialised model to ``checkpoint`` instead of loading it."""
    routing: str = ""
    """File of recorded top-k indices, replayed when ``record`` is False."""
    record: bool = False
    num_steps: int = 10
    learning_rate: float = 1e-3
    bf16: bool = False
    use_distributed_optimizer: bool = False
    micro_batch_size: int = 1
    order: tuple[int, ...] = tuple(range(NUM_SEQUENCES))
    """Sequences of a step in the order of their microbatches."""
    digest: bool = False
    """Also return a SHA-256 of each gradient after the first step and each weight at the end."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of K2TransformerConfig."""


def initialize(layout: dict[str, Any]) -> Any:
    """Create the layout's process groups; return them. Collective: every rank of the job."""
    groups = parallel.initialize_model_parallel(
        **{name: layout[name] for name in GROUP_SIZES if name in layout}
    )
    model_parallel_cuda_manual_seed(SEED)
    torch.manual_seed(SEED)
    return groups


def build(run: Run, groups: Any, **overrides: Any) -> tuple[list[Any], Any]:
    """Build this rank's DDP-wrapped model chunks and the optimizer."""
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    pipeline = run.layout.get("pipeline_model_parallel_size", 1)
    config = preset_config(
        "k2-micro", moe_enable_routing_replay=True, bf16=run.bf16, params_dtype=dtype,
        pipeline_dtype=dtype, overlap_p2p_comm=pipeline > 1 and _virtual(run) is not None,
        batch_p2p_comm=_virtual(run) is None, **run.layout, **overrides,
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=run.use_distributed_optimizer,
        delay_wgrad_compute=config.delay_wgrad_compute,
    )  # fmt: skip
    model_config = GPTModelConfig(
        transformer=config, transformer_layer_spec=get_k2_decoder_block_spec,
        vocab_size=int(load_preset("k2-micro").value("vocab_size")),  # type: ignore[call-overload]
        seq_length=SEQ_LENGTH, position_embedding_type="rope",
    )  # fmt: skip
    model = GPTModelBuilder(model_config).build_distributed_models(
        groups, ddp, data_parallel_random_init=False
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=run.learning_rate, weight_decay=0.1, adam_beta1=0.9,
            adam_beta2=0.95, adam_eps=1e-5,
            clip_grad=1e6,  # never reached: the norm is computed, no gradient is scaled by it
            bf16=run.bf16, params_dtype=dtype,
            use_distributed_optimizer=run.use_distributed_optimizer,
        ),
        model,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return model, optimizer


def _virtual(run: Run) -> int | None:
    return run.layout.get("virtual_pipeline_model_parallel_size")


def load_or_save_initial(run: Run, model: list[Any], optimizer: Any) -> None:
    """Start from the shared torch_dist checkpoint, or write it. Collective."""
    whole: dict[str, Any] = {}
    chunks = unwrap_model(model)
    for index, chunk in enumerate(chunks):
        whole[f"model{index}"] = chunk.sharded_state_dict()
    if run.save_initial:
        os.makedirs(run.checkpoint, exist_ok=True)
        dist_checkpointing.save(whole, run.checkpoint)
        return
    loaded = dist_checkpointing.load(whole, run.checkpoint)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)
    optimizer.reload_model_params()


def microbatch(step: int, sequences: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return tokens, labels and positions ``[micro batch, sequence]`` of some global sequences."""
    texts = []
    for sequence in sequences:
        generator = torch.Generator().manual_seed(SEED + 1000 * step + sequence)
        # A skewed distribution, so that ten steps have something to learn.
        texts.append(torch.rand(SEQ_LENGTH + 1, generator=generator).pow(3).mul(512).long())
    text = torch.stack(texts)
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "position_ids": torch.arange(SEQ_LENGTH).expand(len(sequences), -1),
    }


class Routing:
    """Records or replays every router's choice by (step, sequence, layer).

    Stored indices are ``[position, top-k]``; a sequence-parallel rank takes its part of them.
    """

    def __init__(self, run: Run, groups: Any) -> None:
        self.record, self.groups = run.record, groups
        self.sequence_parallel = bool(run.layout.get("sequence_parallel"))
        self.table: dict[tuple[int, int, int], torch.Tensor] = {}
        if run.routing and not run.record:
            self.table = torch.load(run.routing)

    def routers(self, chunk: Any) -> list[TopKRouter]:
        """Return the chunk's routers, in layer order."""
        return [module for module in chunk.modules() if isinstance(module, TopKRouter)]

    def before(self, chunk: Any, step: int, sequences: tuple[int, ...]) -> None:
        """Set what the chunk's routers replay in the coming forward pass."""
        for router in self.routers(chunk):
            replay = router.router_replay
            if not self.table or self.record:
                replay.set_router_replay_action(RouterReplayAction.RECORD)
                continue
            layer = replay.layer_number
            chosen = torch.stack([self.table[step, index, layer] for index in sequences], dim=1)
            if self.sequence_parallel:
                chosen = chosen.chunk(self.groups.tp.size())[self.groups.tp.rank()]
            replay.clear_indices()
            replay.set_target_indices(chosen.reshape(-1, chosen.size(-1)))
            replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def after(self, chunk: Any, step: int, sequences: tuple[int, ...]) -> None:
        """Keep what the chunk's routers chose in the forward pass just run."""
        for router in self.routers(chunk) if self.record else []:
            indices = router.router_replay.get_recorded_indices()
            chosen = indices.view(SEQ_LENGTH, len(sequences), -1).unbind(1)
            for index, one in zip(sequences, chosen, strict=True):
                self.table[step, index, router.router_replay.layer_number] = one.clone()


def train(run: dict[str, Any]) -> dict[str, Any]:
    """Train as ``Run(**run)`` says; return losses, norms and digests (see ``_Record``)."""
    job = Run(**run)
    groups = initialize(job.layout)
    model, optimizer = build(job, groups, **job.fields)
    load_or_save_initial(job, model, optimizer)
    routing = Routing(job, groups)
    record = train_steps(job, groups, model, optimizer, routing)
    if job.record:
        torch.save(routing.table, job.routing)
    return record


def train_steps(
    run: Run, groups: Any, model: list[Any], optimizer: Any, routing: Routing
) -> dict[str, Any]:
    """Run the schedule ``num_steps`` times; return the record of the run."""
    data_parallel = groups.dp.size()
    init_num_microbatches_calculator(0, None, NUM_SEQUENCES, run.micro_batch_size, data_parallel)
    mine = list(batched(run.order[groups.dp.rank() :: data_parallel], run.micro_batch_size))
    losses: list[dict[int, float]] = []
    record: dict[str, Any] = {"losses": losses, "grad_norm": [], "parameter_norms": []}
    for step in range(run.num_steps):
        losses.append({})
        _one_step(run, model, optimizer, routing, mine, step, losses[-1])
        record["parameter_norms"].append(_parameter_norms(model))
        if run.digest and step == 0:
            record["gradient_digests"] = _digests(model, "main_grad")
        successful, grad_norm, _ = optimizer.step()
        assert successful
        record["grad_norm"].append(float(grad_norm))
    if run.digest:
        record["weight_digests"] = _digests(model, "data")
    return record


def _one_step(
    run: Run,
    model: list[Any],
    optimizer: Any,
    routing: Routing,
    mine: list[tuple[int, ...]],
    step: int,
    losses: dict[int, float],
) -> None:
    def forward_step(
        data: Iterator[tuple[int, ...]], chunk: Any, return_schedule_plan: bool = False
    ) -> Any:
        sequences = next(data)
        batch = microbatch(step, sequences)
        inner = unwrap_model(chunk)
        routing.before(inner, step, sequences)
        inputs = (batch["tokens"], batch["position_ids"], None)

        def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            losses.update(zip(sequences, output.detach().float().mean(1).tolist(), strict=True))
            return output.float().mean(), {}

        if return_schedule_plan:
            return inner.build_schedule_plan(*inputs, labels=batch["labels"]), loss_func
        output = chunk(*inputs, labels=batch["labels"])
        routing.after(inner, step, sequences)
        return output, loss_func

    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    iterators = [iter(mine) for _ in model]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(mine),
        seq_length=SEQ_LENGTH,
        micro_batch_size=run.micro_batch_size,
        forward_only=False,
    )


def named_parameters(model: list[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield parameters under layout-independent names: global layer numbers, no wrapper prefix."""
    for chunk in unwrap_model(model):
        numbers = {
            name: module.layer_number - 1
            for name, module in chunk.named_modules()
            if isinstance(module, TransformerLayer)
        }
        for name, parameter in chunk.named_parameters():
            for prefix, number in numbers.items():
                if name.startswith(prefix + "."):
                    head = prefix.rpartition(".")[0]
                    name = f"{head}.{number}.{name[len(prefix) + 1 :]}"
                    break
            yield name, parameter


def _parameter_norms(model: list[Any]) -> dict[str, float]:
    parameters = ((name, p) for name, p in named_parameters(model) if p.requires_grad)
    return {name: torch.norm(p.main_grad).item() for name, p in parameters}


def _digests(model: list[Any], attribute: str) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            getattr(p, attribute).detach().float().contiguous().numpy().tobytes()
        ).hexdigest()
        for name, p in named_parameters(model)
        if hasattr(p, attribute)  # a frozen weight has no gradient
    }
