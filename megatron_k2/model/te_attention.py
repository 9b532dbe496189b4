"""Transformer Engine's core attention with K2's record of each head's largest softmax input.

A thin leaf over ``megatron.core.extensions.transformer_engine.TEDotProductAttention``. The exact
chunked maximum is computed beside TE's kernel, so FlashAttention stays on and any TE version
serves. With upstream's ``--qk-clip`` or ``--log-max-attention-logit`` (TE >= 2.9, recent cuDNN)
TE's own figure is recorded instead: rounded to bf16, within 0.4 %, FlashAttention off. Under our
context parallelism (latent_context.py) TE is built without any: it sees a chunk of queries at the
end of their keys, which it calls cross-attention aligned to the bottom right. Import this module
only when Transformer Engine is usable. Its forward needs a GPU and has not been run.
"""

from __future__ import annotations

import copy
import enum
from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

from megatron_k2.max_logit import MaxLogitRecord, chunked_max_logits


class _PackedMask(enum.Enum):
    """The mask type that upstream's ``AttnMaskType`` lacks, by Transformer Engine's name."""

    padding_causal_bottom_right = 1


class K2TECoreAttention(MaxLogitRecord, TEDotProductAttention):  # type: ignore[misc]
    """``TEDotProductAttention`` that records each head's largest logit.

    Raises:
        ValueError: context parallelism without TE's own figure, or a mask that is not causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        exchange = getattr(config, "k2_context_exchange", "latent")
        if config.context_parallel_size > 1 and exchange == "latent":
            config = copy.copy(config)  # the attention around this leaf holds the row's keys
            config.context_parallel_size = 1
            attention_type = "cross"  # "self" means as many keys as queries
        self.records_max_logits = getattr(config, "k2_max_attention_logit", True)
        self.takes_te_figure = config.qk_clip or config.log_max_attention_logit
        if self.records_max_logits and not self.takes_te_figure:
            _refuse_inexact(config, attn_mask_type)
        super().__init__(config, layer_number, attn_mask_type, attention_type, *args, **kwargs)
        self.layer_number = max(1, layer_number)
        self.softmax_scale = kwargs["softmax_scale"]
        self.num_attention_heads_per_partition = divide(
            config.num_attention_heads, config.tensor_model_parallel_size
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attend as upstream does, then record; shapes as in ``K2CoreAttention``."""
        mask_type: Any = attn_mask_type
        if packed_seq_params is not None and mask_type == AttnMaskType.causal_bottom_right:
            mask_type = _PackedMask.padding_causal_bottom_right
        output = super().forward(
            query,
            key,
            value,
            attention_mask,
            mask_type,
            attention_bias,
            packed_seq_params,
            num_splits,
        )
        if self.wants_max_logits():
            if self.takes_te_figure:
                self.record_max_logits_(self.current_max_attn_logits)  # type: ignore[has-type]
                self.current_max_attn_logits = None  # the running maximum is kept in our record
            else:
                self.record_max_logits_(self._exact_max_logits(query, key, packed_seq_params))
        return output

    def _exact_max_logits(
        self, query: Tensor, key: Tensor, packed: PackedSeqParams | None
    ) -> Tensor:
        """Return the causal maxima, fp32 [heads] or [batch x heads]."""
        if packed is None:
            return chunked_max_logits(query.flatten(1, 2), key.flatten(1, 2), self.softmax_scale)
        starts, key_starts = (
            (places if padded is None else padded)[:-1].tolist()
            for places, padded in (
                (packed.cu_seqlens_q, packed.cu_seqlens_q_padded),
                (packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded),
            )
        )
        return chunked_max_logits(
            query,
            key,
            self.softmax_scale,
            starts=starts,
            lengths=packed.cu_seqlens_q.diff().tolist(),
            key_starts=key_starts,
            key_lengths=packed.cu_seqlens_kv.diff().tolist(),
        )


def _refuse_inexact(config: TransformerConfig, attn_mask_type: AttnMaskType) -> None:
    """Raise ValueError where the chunked maximum would not see what TE attends to."""
    if config.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {config.context_parallel_size}: the exact largest attention "
            "logit needs all keys on one rank; use --k2-context-exchange latent, or add "
            "--log-max-attention-logit (Transformer Engine's figure, within 0.4 %) or "
            "--no-k2-max-attention-logit"
        )
    if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        raise ValueError(
            f"the largest logit is recorded for causal attention, not {attn_mask_type}"
        )
