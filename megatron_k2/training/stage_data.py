"""What one stage of a recipe asks of the pretraining loop: its own data, and losses by position.

Stages share one count of iterations and samples, so that weights, momenta, step counts and the
place in the schedule are simply loaded. Only the data begin anew: ``--k2-stage-start`` says at
which iteration. Upstream's ``--phase-transition-iterations`` does the same for stages of one batch
size; with 4k and 32k sequences the batch changes, which it refuses (``check_checkpoint_args``).
``--k2-loss-beyond`` splits the evaluation's loss at a position, in any parallel layout.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from megatron_k2.inputs import UsageError

_START = "--k2-stage-start"
_BEYOND = "--k2-loss-beyond"


def add_stage_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of a stage to Megatron's parser."""
    group = parser.add_argument_group("K2 recipe stage")
    group.add_argument(
        _START,
        type=int,
        metavar="ITERATION",
        help="Iteration at which this stage's data begin: sample 0 of the data path comes there. "
        "Default: the data count from iteration 0, as in Megatron.",
    )
    group.add_argument(
        _BEYOND,
        type=int,
        metavar="POSITION",
        help="With --skip-train: also report the loss of the tokens at this position of their "
        "sequence and later, and of those before it.",
    )
    return parser


def check_stage_args(args: Any) -> None:
    """Check the flags of a stage.

    Raises:
        UsageError: one is out of its range or has no meaning here.
    """
    start, beyond = args.k2_stage_start, args.k2_loss_beyond
    if start is not None and (args.train_iters is None or not 0 <= start < args.train_iters):
        raise UsageError(f"{_START} {start} must be from 0 to below --train-iters")
    if beyond is None:
        return
    if not 0 < beyond < args.seq_length:
        raise UsageError(f"{_BEYOND} {beyond} must be above 0 and below --seq-length")
    if not args.skip_train:
        raise UsageError(f"{_BEYOND} is for evaluations: give --skip-train")
    if args.dataloader_inter_document_masking:
        raise UsageError(
            f"{_BEYOND}: under --dataloader-inter-document-masking positions count within "
            "documents; leave that flag out of the evaluation"
        )


class StageView(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A dataset whose sample 0 stands at another index of the run; it repeats after its end.

    Args:
        base: a map-style dataset.
        first: index that gives sample 0; smaller ones are never asked for.
        num_samples: indices of the view, those before ``first`` included.
    """

    def __init__(self, base: Any, first: int, num_samples: int) -> None:
        self.base, self.first, self.num_samples = base, first, num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Any:
        return self.base[(index - self.first) % len(self.base)]

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):  # not set yet while a worker unpickles it
            raise AttributeError(name)
        return getattr(self.base, name)


def samples_of_stage(args: Any, num_samples: list[int]) -> list[int]:
    """Return the samples to build of each split; of the training split what the stage reads."""
    if args.k2_stage_start is None:
        return list(num_samples)
    train = (args.train_iters - args.k2_stage_start) * args.global_batch_size
    return [train, *num_samples[1:]]


def views_of_stage(args: Any, datasets: list[Any]) -> list[Any]:
    """Place the training and validation sets where the run's counts of samples stand.

    Args:
        args: with ``iteration`` and the consumed samples that the checkpoint restored.
        datasets: training, validation and test set; None, or lists, where there are such.
    """
    if args.k2_stage_start is None:
        return list(datasets)
    train, valid, *rest = datasets
    if train is not None:
        done = (args.iteration - args.k2_stage_start) * args.global_batch_size
        first = args.consumed_train_samples - done
        train = StageView(train, first, first + len(train))
    if valid is not None and not args.full_validation:
        # The count goes on over stages whose validation sets have other sizes.
        valid = StageView(valid, 0, args.consumed_valid_samples + len(valid))
    return [train, valid, *rest]


def far_mask(args: Any, loss_mask: Tensor | None) -> Tensor | None:
    """Return which tokens of this rank's sequences stand at ``--k2-loss-beyond`` or later.

    Args:
        args: Megatron's.
        loss_mask: of the microbatch; None where this pipeline stage draws no batch.

    Returns:
        Bool [1, seq_length / cp], as context parallelism deals the sequence out; None without the
        flag.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron_k2 import parallel

    beyond = getattr(args, "k2_loss_beyond", None)
    if beyond is None or loss_mask is None:
        return None
    positions = torch.arange(args.seq_length, device=loss_mask.device)[None]
    group = parallel.get_pg_collection().cp
    if group.size() > 1:
        batch = {"position_ids": positions}
        positions = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)[
            "position_ids"
        ]
    return positions >= beyond


def split_losses(losses: Tensor, loss_mask: Tensor, far: Tensor, beyond: int) -> dict[str, Tensor]:
    """Return the summed loss and the tokens in it, before and from a position on.

    Args:
        losses: cross entropy in nats, [b, s].
        loss_mask: fp32 [b, s].
        far: bool [1, s].
        beyond: the position, for the names.

    Returns:
        "lm loss within N" and "lm loss beyond N", each fp32 [2]: sum in nats, tokens.
    """
    losses, loss_mask = losses.float().view_as(loss_mask), loss_mask.float()
    report = {}
    for word, chosen in (("within", ~far), ("beyond", far)):
        mask = loss_mask * chosen
        report[f"lm loss {word} {beyond}"] = torch.stack([(losses * mask).sum(), mask.sum()])
    return report
