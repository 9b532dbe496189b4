"""``torchrun -m megatron_k2.training.sft ARGS``: supervised fine-tuning on packed dialogues.

Megatron's own training loop over the rows of ``tools/preprocess_sft.py``: dialogues of a row do not
see each other, and the loss is that of what assistants say. The mean is over all learned tokens of
the global batch, or over its dialogues (``--k2-sft-weighting dialogue``), whatever the layout and
the micro-batches. Routers keep their biases to the bit, and nothing balances the experts, unless
asked: Kimi K2 says nothing of this, and a bias that follows a few thousand dialogues would undo
pretraining's.
A rate, a schedule and ``--optimizer muonclip`` are given as in pretraining.

the optimizer: ``--load BASE --finetune`` begins afresh, at iteration 0. To carry momenta and step
counts over from pretraining, leave ``--finetune`` out, give ``--k2-stage-start ITERATION``, the
iteration of BASE's checkpoint, and ``--train-iters`` beyond it, as a stage of a recipe does; the
schedule is that of the flags, at the run's count of samples.

example (two processes on a laptop, from a Hugging Face folder):
  torchrun --nproc-per-node 2 -m megatron_k2.training.sft --k2-load-hf out/pretrain/hf \\
    --tokenizer-model KIMI --train-data-path data/chat_train --valid-data-path data/chat_heldout \\
    --seq-length 512 --micro-batch-size 2 --train-iters 100 \\
    --optimizer muonclip --lr 1e-4 --expert-model-parallel-size 2 --use-distributed-optimizer
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from megatron_k2.inputs import UsageError, check_splits
from megatron_k2.training.batch import get_batch, needs_data
from megatron_k2.training.command_line import document_, run_as_command
from megatron_k2.training.pretrain import (
    LossFunction,
    Report,
    check_loss,
    dataset_config,
    train_with,
)
from megatron_k2.training.stage_data import add_stage_args, samples_of_stage, views_of_stage

WEIGHTINGS = ("token", "dialogue")
SFT_DEFAULTS: dict[str, Any] = {
    "tokenizer_type": "KimiTiktokenTokenizer",
    "dataloader_inter_document_masking": True,
    # The mean over learned tokens must not depend on how rows fall into micro-batches.
    "calculate_per_token_loss": True,
    "moe_router_bias_update_rate": 0.0,
    "moe_aux_loss_coeff": 0.0,
    # Where the optimizer is carried over, its schedule is not: the flags' holds.
    "override_opt_param_scheduler": True,
}
"""Laid over the preset's; an explicit flag wins."""


def add_sft_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of fine-tuning, and its defaults, to Megatron's parser."""
    add_stage_args(parser)
    document_(parser, __doc__)
    group = parser.add_argument_group("K2 fine-tuning")
    group.add_argument(
        "--k2-sft-weighting",
        choices=WEIGHTINGS,
        default="token",
        help="The loss is the mean over learned tokens, or over dialogues of their means.",
    )
    parser.set_defaults(**SFT_DEFAULTS)
    return parser


def check_sft_args(args: Any) -> None:
    """Check the flags of fine-tuning.

    Raises:
        UsageError: packed rows or their loss cannot be had in this way.
    """
    if args.use_checkpoint_opt_param_scheduler:
        args.override_opt_param_scheduler = False  # our default; upstream takes one of the two
    for name, flag in (
        ("dataloader_inter_document_masking", "--dataloader-inter-document-masking"),
        ("calculate_per_token_loss", "--calculate-per-token-loss"),
    ):
        if not getattr(args, name):
            raise UsageError(f"{flag} cannot be turned off: rows are packed")
    if args.mock_data:
        raise UsageError(
            "--mock-data: give --train-data-path, packed by megatron-k2 preprocess-sft"
        )
    if args.reset_position_ids or args.reset_attention_mask or args.eod_mask_loss:
        raise UsageError(
            "--reset-position-ids, --reset-attention-mask and --eod-mask-loss are for pretraining: "
            "packed rows have their boundaries"
        )


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, Report]:
    """Return the weighted sum of the loss, what it is divided by, and what to report.

    Args:
        loss_mask: fp32 [b, s / cp], weights: 1 or 0, or a dialogue's sum up to 1.
        output_tensor: per-token cross entropy in nats, the same shape.

    Returns:
        Scalar sum in nats; int32 count of learned tokens, or of dialogues; ``{"lm loss": [sum,
        count]}``. Megatron adds up both over the data- and context-parallel ranks.

    Collective: where dialogues are counted, all-reduce over the context-parallel group - every rank
    of it must call.
    """
    from megatron.training import get_args

    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    count = _dialogues(mask) if get_args().k2_sft_weighting == "dialogue" else mask.sum()
    count = count.detach().round().to(torch.int)
    check_loss(loss)
    return loss, count, {"lm loss": torch.cat([loss.detach().view(1), count.view(1)])}


def _dialogues(mask: Tensor) -> Tensor:
    """Return the number of dialogues whose weights these are; on one context-parallel rank alone.

    A dialogue may reach over several ranks, whose shares of its weight are no whole numbers.
    """
    from megatron_k2 import parallel

    group = parallel.get_pg_collection(["cp"]).cp
    total = mask.sum()
    if group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
        if group.rank() != 0:
            total.zero_()
    return total


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, LossFunction]:
    """Run one microbatch forward; Megatron's schedules call it.

    Args:
        data_iterator: yields rows on the first rank of the tensor-parallel group.
        model: a (wrapped) GPTModel chunk.

    Returns:
        The output (per-token loss [b, s / cp] on the last stage), and the loss function.
    """
    from megatron.core.utils import get_attr_wrapped_model

    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch.tokens,
        batch.position_ids,
        batch.attention_mask,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=batch.packed,
    )
    return output, partial(loss_func, cast("Tensor", batch.loss_mask))


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Build the training, validation and test sets of this rank; see ``pretrain``.

    Raises:
        UsageError: a data path is not packed, or is packed for longer rows.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.training import get_args

    from megatron_k2 import parallel
    from megatron_k2.data.packed_dialogues import DialogueConfig, PackedDialogues

    args = get_args()
    check_splits(args)
    tp_rank = parallel.get_pg_collection().tp.rank()
    stock = dataset_config(args)
    given = {one.name: getattr(stock, one.name) for one in fields(stock) if one.init}
    datasets = BlendedMegatronDatasetBuilder(
        PackedDialogues,
        samples_of_stage(args, num_samples),
        lambda: tp_rank == 0 and needs_data(args, vp_stage),
        DialogueConfig(**given, weighting=args.k2_sft_weighting),
    ).build()
    return tuple(views_of_stage(args, datasets))


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron looks for it.


def main() -> None:
    """Parse the command line, build the model and fine-tune."""
    train_with(add_sft_args, check_sft_args, datasets_provider, forward_step)


def cli() -> int:
    """Register K2 and run ``main``: the command ``megatron-k2 sft``."""
    return run_as_command(main)


if __name__ == "__main__":
    sys.exit(cli())
