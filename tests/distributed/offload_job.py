"""A training run that also reports what fine-grained offloading moved, and evaluates on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.pipeline_parallel import fine_grained_activation_offload as upstream
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

from tests.distributed.training_job import (
    SEQ_LENGTH,
    Routing,
    Run,
    build,
    initialize,
    microbatch,
    train_steps,
)


def train_offloaded(run: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Train from the seed's weights with further configuration fields.

    After the steps it evaluates and takes one step more; the digests of weights are those after it.

    Returns the record and, where ``overrides`` offload, ``offloaded_bytes`` a microbatch by group
    and ``lent_bytes`` of the arena between two steps.
    """
    job = Run(**run)
    groups = initialize(job.layout)
    model, optimizer = build(job, groups, **overrides)
    routing = Routing(job, groups)
    record = train_steps(job, groups, model, optimizer, routing)
    record["evaluated"] = evaluate(job, model)
    unset_num_microbatches_calculator()
    after = train_steps(replace(job, num_steps=1), groups, model, optimizer, routing)
    for name in ("losses", "grad_norm", "parameter_norms"):
        record[name] += after[name]
    record["weight_digests"] = after["weight_digests"]
    if overrides.get("fine_grained_activation_offloading"):
        manager = upstream.PipelineOffloadManager.get_instance()
        arena = manager.cpu_tensor_pool.arena
        record["offloaded_bytes"] = manager.offload_summary_bytes
        record["lent_bytes"] = arena.mapped_bytes - arena.free_bytes
    return record


def evaluate(run: Run, model: list[Any], num_microbatches: int = 10) -> list[float]:
    """Return the losses of more microbatches than a step has, without gradients."""
    losses: list[float] = []

    def forward_step(data: Any, chunk: Any) -> Any:
        batch = microbatch(99, (next(data),) * run.micro_batch_size)

        def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            losses.append(float(output.float().mean()))
            return output.float().mean(), {}

        return chunk(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"]
        ), loss_func

    for chunk in model:
        chunk.eval()
    config = unwrap_model(model[0]).config
    virtual = config.virtual_pipeline_model_parallel_size is not None
    data = [iter(range(num_microbatches)) for _ in model]
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if virtual else data[0],
            model=model if virtual else model[0],
            num_microbatches=num_microbatches,
            seq_length=SEQ_LENGTH,
            micro_batch_size=run.micro_batch_size,
            forward_only=True,
        )
    for chunk in model:
        chunk.train()
    return losses
