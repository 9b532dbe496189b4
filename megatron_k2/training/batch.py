"""One microbatch of a GPT on this rank: drawn, shared over tensor parallelism, packed or not.

What the stock ``pretrain_gpt.py`` does between its data iterator and its model, from upstream's own
pieces. With ``--dataloader-inter-document-masking`` documents do not see each other: the batch is
one packed row, and every stage of the pipeline needs the documents' places. Under context
parallelism a rank takes its two chunks of every row, packed or not (model/sequence_chunks.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DRAWN = (
    *("tokens", "labels", "loss_mask", "attention_mask", "position_ids"),
    *("cu_seqlens", "cu_seqlens_padded", "max_seqlen"),
    *("hybrid_cp_group", "local_cp_size"),  # looked up by upstream's broadcast, never set here
)


@dataclass(frozen=True)
class Batch:
    """A microbatch. On a middle pipeline stage every tensor is None.

    Attributes:
        tokens, labels, position_ids: int64 [micro_batch_size, seq_length / cp], packed documents
            [1, micro_batch_size * seq_length / cp].
        loss_mask: fp32, the same shape; 1 where a token counts.
        attention_mask: bool [micro_batch_size or 1, 1, s / cp, s], True hides; None is causal.
        packed: places of the packed documents in the whole row, or None.
    """

    tokens: Tensor | None = None
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    loss_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    packed: Any = None


def needs_data(args: Any, vp_stage: int | None) -> bool:
    """Tell whether this pipeline stage draws batches."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return args.dataloader_inter_document_masking or is_first_or_last_pipeline_stage(vp_stage)


def get_batch(data_iterator: Any, vp_stage: int | None = None) -> Batch:
    """Return this rank's microbatch.

    Args:
        data_iterator: yields batches on the first rank of the tensor-parallel group.
        vp_stage: virtual pipeline stage, None without interleaving.

    Collective: broadcasts over the tensor-parallel group - every rank of it must call.
    """
    from megatron.core.utils import (
        flatten_batch_for_packed_sequences,
        get_batch_on_this_cp_rank,
        get_batch_on_this_tp_rank,
    )
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    from megatron_k2 import parallel

    args = get_args()
    if not needs_data(args, vp_stage):
        return Batch()
    groups = parallel.get_pg_collection()
    packs = args.dataloader_inter_document_masking
    batch: dict[str, Any] = {}
    if groups.tp.rank() == 0:
        drawn = next(data_iterator)
        batch = {key: _moved(drawn.get(key)) for key in _DRAWN}
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
        has_cu_seqlens=packs,
        is_hybrid_cp=False,
    )
    batch = flatten_batch_for_packed_sequences(batch)
    packed = _packed_params(batch, args.seq_length)
    if not is_first_or_last_pipeline_stage(vp_stage):
        return Batch(packed=packed)
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=groups.cp, use_per_sequence_balancing=packs
    )
    names = ("tokens", "labels", "position_ids", "loss_mask", "attention_mask")
    return Batch(**{name: batch.get(name) for name in names}, packed=packed)


def context_mean(loss: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sum and a count whose quotient averages over ranks to the mean over tokens.

    Megatron divides each rank's sum by that rank's count and averages the ranks, which is another
    number where the context-parallel ranks' chunks hold different numbers of masked tokens. Under
    ``--calculate-per-token-loss`` it adds up the counts itself, and nothing changes here.

    Args:
        loss: scalar, summed over this rank's tokens, in nats.
        num_tokens: int32 scalar, how many they are.

    Collective: all-reduce over the context-parallel group - every rank of it must call.
    """
    from megatron.training import get_args

    from megatron_k2 import parallel

    group = parallel.get_pg_collection(["cp"]).cp
    if group.size() == 1 or get_args().calculate_per_token_loss:
        return loss, num_tokens
    whole = num_tokens.clone()
    torch.distributed.all_reduce(whole, group=group)
    return loss * group.size(), whole


def _packed_params(batch: dict[str, Any], seq_length: int) -> Any:
    """Return upstream's ``PackedSeqParams`` of a flattened batch, or None if it is not packed.

    Also counts the documents for Megatron's own FLOPs figure.
    """
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    if batch.get("cu_seqlens") is None:
        return None
    places = batch["cu_seqlens"].squeeze(0)
    longest = int(batch["max_seqlen"].item())
    update_seqlen_stats_from_cu_seqlens(places)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=places,
        cu_seqlens_kv=places,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=seq_length,
    )


def _moved(value: Tensor | None) -> Tensor | None:
    """Return the tensor on the device (``Tensor.cuda`` is the host's on the CPU device)."""
    return None if value is None else value.cuda(non_blocking=True)
