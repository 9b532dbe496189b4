"""One rank of a training command, built by the code that trains: arguments, chunks, optimizer.

The command line is parsed and checked by Megatron's and K2's own code, and Megatron builds this
rank's model chunks, DDP buffers and optimizer as ``megatron_k2.training.pretrain`` would. A step is
Megatron's own ``train_step``, on tokens that are all zero. In a world of real processes this is a
training rank without data; ``dry_run.py`` makes the world and the numbers up. Not here: datasets,
checkpoints, validation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TrainingRank:
    """A rank, built.

    Attributes:
        args: Megatron's, checked.
        chunks: model chunks, in DDP if there is an optimizer.
        optimizer: Megatron's, or None where it was not asked for.
        scheduler: of the learning rate, or None.
    """

    args: Any
    chunks: list[Any]
    optimizer: Any
    scheduler: Any

    def train_step(self) -> None:
        """Run Megatron's own ``train_step``: all microbatches and the optimizer.

        Collective: every rank of the run must call.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.utils import get_model_config
        from megatron.training.training import train_step

        from megatron_k2.training.pretrain import forward_step

        batches = [RerunDataIterator(_batches(self.args)) for _ in self.chunks]
        train_step(
            forward_step, batches if len(batches) > 1 else batches[0], self.chunks, self.optimizer,
            self.scheduler, get_model_config(self.chunks[0]), get_forward_backward_func(),
            iteration=0,
        )  # fmt: skip


@contextlib.contextmanager
def command_line(command: Sequence[str]) -> Iterator[None]:
    """Let this process have been started with a command's arguments."""
    before, sys.argv = sys.argv, ["pretrain", *command]
    try:
        yield
    finally:
        sys.argv = before


def parse() -> tuple[Any, Any]:
    """Return Megatron's arguments and configuration from this process's command line.

    Both are Megatron's global ones until ``forget``.

    Raises:
        ValueError: Megatron or K2 refuse the command.
    """
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_k2.training.pretrain import add_stage_args

    defaults = {"tokenizer_type": "NullTokenizer"}
    args = parse_and_validate_args(add_stage_args, args_defaults=defaults)
    return args, pretrain_cfg_container_from_args(args, gpt_config_from_args(args))


def build(args: Any, container: Any, *, with_optimizer: bool = True) -> TrainingRank:
    """Create the process groups and build this rank.

    Args:
        args: of ``parse``.
        container: of ``parse``.
        with_optimizer: build it too; without, chunks have no DDP buffers either.

    Collective: every rank of the run must call.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.utils import get_model_config
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    from megatron_k2 import parallel
    from megatron_k2.training.pretrain import embedding_ranks

    _forget_auxiliary_losses()  # of whatever ran before here: upstream would go on writing there
    initialize_megatron(get_embedding_ranks=embedding_ranks)
    args.skip_train = not with_optimizer
    chunks, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder, checkpointing_context={}, cfg_container=container,
        pg_collection=parallel.get_pg_collection(),
    )  # fmt: skip
    config = get_model_config(chunks[0])
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce and with_optimizer:
        hooks = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return TrainingRank(args, chunks, optimizer, scheduler)


def forget() -> None:
    """Take back what ``parse`` and ``build`` left in Megatron's globals, process groups too."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    from megatron_k2 import parallel

    parallel.destroy_model_parallel()
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    offload.PipelineOffloadManager.OFFLOAD_MGR = None
    _forget_auxiliary_losses()


def _forget_auxiliary_losses() -> None:
    """Set class-wide scales back to those before any step; drop sums that have a model's depth."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)


def _batches(args: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield microbatches [micro_batch_size, seq_length] as Megatron's datasets make them."""
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        tokens = torch.zeros(shape, dtype=torch.int64)
        batch = {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }
        if args.create_attention_mask_in_dataloader:  # one more broadcast over tensor parallelism
            mask = torch.ones(shape[1], shape[1], dtype=torch.bool).triu(1)
            batch["attention_mask"] = mask.expand(shape[0], 1, *mask.shape)
        yield batch
