"""``torchrun -m megatron_k2.training.pretrain ARGS``: pretraining for people without a checkout.

Megatron's own training loop (``megatron.training.pretrain``) with Megatron's arguments and K2's;
what the wheel lacks is the script around it: batches, loss and datasets of a GPT. Same arguments
and same numbers as the stock ``pretrain_gpt.py`` under ``torchrun -m megatron_k2``, but for
``--tokenizer-type``, here SentencePieceTokenizer where none is given; flags of other objectives
(``refuse_unsupported``) are refused.

example (two processes on a laptop, random tokens):
  torchrun --nproc-per-node 2 -m megatron_k2.training.pretrain --k2-preset k2-micro --mock-data \\
    --tokenizer-type NullTokenizer --vocab-size 1023 --expert-model-parallel-size 2 \\
    --use-distributed-optimizer --micro-batch-size 2 --train-iters 20 --lr 1e-3
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron_k2.inputs import UsageError, check_splits, require_data
from megatron_k2.training.batch import context_mean, get_batch, needs_data
from megatron_k2.training.command_line import document_, run_as_command
from megatron_k2.training.stage_data import (
    add_stage_args,
    check_stage_args,
    far_mask,
    samples_of_stage,
    split_losses,
    views_of_stage,
)
from megatron_k2.training.starting_weights import add_load_hooks_

Report = dict[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Report]]


def loss_func(
    loss_mask: Tensor, output_tensor: Tensor, far: Tensor | None = None
) -> tuple[Tensor, Tensor, Report]:
    """Return the summed loss, the number of tokens in it and what to report.

    Args:
        loss_mask: fp32 [b, s], 1 where a token counts.
        output_tensor: per-token cross entropy in nats, [b, s].
        far: bool [1, s], tokens whose loss is also reported apart (``--k2-loss-beyond``).

    Returns:
        Scalar sum in nats, int32 token count (both of ``context_mean``), and ``{"lm loss": [sum,
        count]}``, which Megatron reduces over the data-parallel group and divides.

    Raises:
        Whatever Megatron's rerun machinery raises for a loss that is NaN or infinite
        (``--check-for-nan-in-loss-and-grad``) or far above the usual (``--check-for-spiky-loss``).
    """
    losses = output_tensor.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    check_loss(loss)
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    if far is not None:
        from megatron.training import get_args

        report |= split_losses(output_tensor.detach(), loss_mask, far, get_args().k2_loss_beyond)
    return *context_mean(loss, num_tokens), report


SPIKY_LOSS_FACTOR = 10
"""``--check-for-spiky-loss`` reports a loss above this multiple of the largest one before it."""


def check_loss(loss: Tensor) -> None:
    """Hand the loss to Megatron's rerun state machine, as the stock script does."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, rejects in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            machine.validate_result(
                result=loss,
                rejection_func=rejects,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,  # a forward pass is deterministic
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


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
    from megatron.training import get_args

    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    inputs = (batch.tokens, batch.position_ids, batch.attention_mask)
    targets: dict[str, Any] = {"labels": batch.labels, "loss_mask": batch.loss_mask}
    if return_schedule_plan:
        output = model.build_schedule_plan(*inputs, **targets)
    else:
        output = model(*inputs, **targets, packed_seq_params=batch.packed)
    far = far_mask(get_args(), batch.loss_mask)
    return output, partial(loss_func, cast("Tensor", batch.loss_mask), far=far)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Build the training, validation and test sets of this rank.

    Args:
        num_samples: sequences needed of each.
        vp_stage: virtual pipeline stage, None without interleaving.

    Raises:
        UsageError: ``--split`` leaves a set that is evaluated without any document.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args

    from megatron_k2 import parallel

    args = get_args()
    check_splits(args)
    tp_rank = parallel.get_pg_collection().tp.rank()
    datasets = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        samples_of_stage(args, num_samples),
        lambda: tp_rank == 0 and needs_data(args, vp_stage),
        dataset_config(args),
    ).build()
    return tuple(views_of_stage(args, datasets))


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron looks for it.


def dataset_config(args: Any) -> Any:
    """Return Megatron's ``GPTDatasetConfig`` of the parsed arguments."""
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
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=_sequences_per_dataset(args),
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def _sequences_per_dataset(args: Any) -> dict[str, int] | None:
    """Return what ``--per-dataset-sequences-path`` holds: sequences of each data path."""
    if args.per_dataset_sequences_path is None:
        return None
    text = Path(args.per_dataset_sequences_path).read_text(encoding="utf-8")
    return cast("dict[str, int]", json.loads(text))


def refuse_unsupported(args: Any) -> None:
    """Refuse what the stock ``pretrain_gpt.py`` does and this runner does not.

    Raises:
        UsageError: a flag whose meaning would be lost.
    """
    refused = {
        "--sft": args.sft,
        "--fim-data": args.fim_data,
        "--hybrid-context-parallel": args.hybrid_context_parallel,
        "--logits-load-dir": args.logits_load_dir is not None,
        "--mtp-num-layers": bool(args.mtp_num_layers),
    }
    for flag, is_asked in refused.items():
        if is_asked:
            raise UsageError(
                f"{flag}: not supported by megatron_k2.training.pretrain; run "
                "`torchrun -m megatron_k2 pretrain_gpt.py` with a Megatron-LM checkout"
            )
    if args.dataloader_inter_document_masking and args.overlap_moe_expert_parallel_comm:
        raise UsageError(
            "--dataloader-inter-document-masking: the schedule of "
            "--overlap-moe-expert-parallel-comm takes no packed sequences; drop one of the two"
        )
    stages, size = args.pipeline_model_parallel_size, args.micro_batch_size
    packs = args.dataloader_inter_document_masking
    if packs and stages > 1 and size > 1 and not args.variable_seq_lengths:
        raise UsageError(
            f"--micro-batch-size {size}: with --dataloader-inter-document-masking and "
            f"--pipeline-model-parallel-size {stages} it must be 1, because packing makes one row "
            "of a microbatch and the stages expect its shape unpacked"
        )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Return the ranks of a pipeline that hold word embeddings: the first, and the last if tied."""
    from megatron.training import get_args

    tied = not get_args().untie_embeddings_and_output_weights
    return sorted({pp_ranks[0], *(pp_ranks[-1:] if tied else ())})


def train_with(
    add_args: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
    check_args: Callable[[Any], None],
    provider: Callable[..., tuple[Any, ...]],
    step: Callable[..., Any],
    args_defaults: dict[str, Any] | None = None,
) -> None:
    """Parse the command line, build the model and run Megatron's loop.

    Args:
        add_args: adds an objective's flags to Megatron's parser.
        check_args: refuses what the objective cannot do.
        provider: builds the datasets.
        step: one microbatch forward.
        args_defaults: for flags that nobody gives a value.

    Raises:
        UsageError: the flags cannot work.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(add_args, args_defaults=args_defaults or {})
    refuse_unsupported(args)
    check_stage_args(args)
    check_args(args)
    require_data(args)
    if args.train_iters is None and args.train_samples is None:
        raise UsageError("no length of the run: give --train-iters or --train-samples")
    if args.lr is None and not args.skip_train:
        raise UsageError("no learning rate: give --lr, or a --k2-preset that has one")
    model_config = gpt_config_from_args(args)
    add_load_hooks_(args, model_config)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        provider,
        ModelType.encoder_or_decoder,
        step,
        get_embedding_ranks=embedding_ranks,
    )


def add_pretrain_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of a recipe's stage, and this text, to Megatron's parser."""
    document_(parser, __doc__)
    return add_stage_args(parser)


def main() -> None:
    """Parse the command line, build the model and train."""
    train_with(
        add_pretrain_args,
        lambda args: None,
        datasets_provider,
        forward_step,
        {"tokenizer_type": "SentencePieceTokenizer"},
    )


def cli() -> int:
    """Register K2 and run ``main``: the command ``megatron-k2 pretrain``."""
    return run_as_command(main)


if __name__ == "__main__":
    sys.exit(cli())
