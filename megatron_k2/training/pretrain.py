"""``torchrun -m megatron_k2.training.pretrain ARGS``: pretraining for people without a checkout.

Megatron's own training loop (``megatron.training.pretrain``) with Megatron's arguments and K2's;
what the wheel lacks is the script around it: batches, loss and datasets of a GPT. Same arguments
and same numbers as the stock ``pretrain_gpt.py`` under ``torchrun -m megatron_k2``.

example (two processes on a laptop, random tokens):
  torchrun --nproc-per-node 2 -m megatron_k2.training.pretrain --k2-preset k2-micro --mock-data \\
    --tokenizer-type NullTokenizer --vocab-size 1023 --expert-model-parallel-size 2 \\
    --use-distributed-optimizer --micro-batch-size 2 --train-iters 20 --lr 1e-3
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from megatron_k2.inputs import require_data
from megatron_k2.training.command_line import run_as_command

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
# What upstream's broadcast looks up besides; packed sequences are not read by this runner.
UPSTREAM_KEYS = (
    *BATCH_KEYS,
    "cu_seqlens",
    "cu_seqlens_padded",
    "hybrid_cp_group",
    "local_cp_size",
    "max_seqlen",
)
Report = dict[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Report]]


def get_batch(data_iterator: Any, vp_stage: int | None = None) -> dict[str, Tensor | None]:
    """Return this rank's microbatch; every entry is None on a middle pipeline stage.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` int64 and ``loss_mask`` fp32, each
        [micro_batch_size, seq_length / cp]; ``attention_mask`` None (causal).

    Collective: broadcast over the tensor-parallel group - every rank of it must call.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    from megatron_k2 import parallel

    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    groups = parallel.get_pg_collection()
    batch: dict[str, Any] = {}
    if groups.tp.rank() == 0:
        drawn = next(data_iterator)
        batch = {key: _moved(drawn.get(key)) for key in UPSTREAM_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=torch.distributed.get_global_rank(groups.tp, 0),
        broadcast_group=groups.tp,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=groups.tp.rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=groups.pp.rank() == 0,
        is_pipeline_last_stage=groups.pp.rank() == groups.pp.size() - 1,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=groups.cp)
    return {key: batch.get(key) for key in BATCH_KEYS}


def _moved(value: Tensor | None) -> Tensor | None:
    """Return the tensor on the device (``Tensor.cuda`` is the host's on the CPU device)."""
    return None if value is None else value.cuda(non_blocking=True)


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, Report]:
    """Return the summed loss, the number of tokens in it and what to report.

    Args:
        loss_mask: fp32 [b, s], 1 where a token counts.
        output_tensor: per-token cross entropy in nats, [b, s].

    Returns:
        Scalar sum in nats, int32 token count, and ``{"lm loss": [sum, count]}``, which Megatron
        reduces over the data-parallel group and divides.
    """
    losses = output_tensor.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}


def forward_step(
    data_iterator: Any, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, LossFunction]:
    """Run one microbatch forward; Megatron's schedules call it.

    Args:
        data_iterator: yields batches on the first rank of the tensor-parallel group.
        model: a (wrapped) GPTModel chunk.
        return_schedule_plan: return the layers' plan for the overlapped expert-parallel schedule
            instead of the output.

    Returns:
        The output (per-token loss [b, s] on the last stage) or the plan, and the loss function.
    """
    from megatron.core.utils import get_attr_wrapped_model

    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_func, cast("Tensor", batch["loss_mask"]))


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Build the training, validation and test sets of this rank.

    Args:
        num_samples: sequences needed of each.
        vp_stage: virtual pipeline stage, None without interleaving.

    Raises:
        UsageError: the data holds no document, or a token outside the vocabulary.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    from megatron_k2 import parallel

    args = get_args()
    tp_rank = parallel.get_pg_collection().tp.rank()
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        lambda: tp_rank == 0 and is_first_or_last_pipeline_stage(vp_stage),
        _dataset_config(args),
    ).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron looks for it.


def _dataset_config(args: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Return the ranks of a pipeline that hold word embeddings: the first, and the last if tied."""
    from megatron.training import get_args

    tied = not get_args().untie_embeddings_and_output_weights
    return sorted({pp_ranks[0], *(pp_ranks[-1:] if tied else ())})


def main() -> None:
    """Parse the command line, build the model and train."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults={"tokenizer_type": "SentencePieceTokenizer"})
    require_data(args)
    model_config = gpt_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )


def cli() -> int:
    """Register K2 and run ``main``: the entry point of ``megatron-k2-pretrain``."""
    return run_as_command(main)


if __name__ == "__main__":
    sys.exit(cli())
