"""Core attention of K2's MLA on the local path, without Transformer Engine.

Tiles on the CPU, torch's fused kernels on CUDA; head widths of q/k and v may differ, sequences may
be packed and have more keys than queries. Beside its output it records each head's largest softmax
input for QK-Clip (max_logit.py); the same for Transformer Engine is in te_attention.py. Context
parallelism is outside, in latent_context.py. The CUDA branch (padded v,
``scaled_dot_product_attention``) is tested on the CPU only.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

from megatron_k2.max_logit import (
    MaxLogitRecord,
    chunked_max_logits,
    max_logits,
    reset_max_logits,
)
from megatron_k2.model.tiled_attention import tiled_causal_attention

__all__ = ["K2CoreAttention", "max_logits", "reset_max_logits"]

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)
_UNMASKED = (AttnMaskType.no_mask, AttnMaskType.padding)
_known_causal_masks = WeakIdKeyDictionary()


def _is_causal_mask(mask: Tensor) -> bool:
    """Tell whether a bool mask [.., queries, keys] (True hides) is the plain causal one.

    Megatron's data loader hands the same mask tensor to every layer: the answer is remembered.
    """
    if mask not in _known_causal_masks:
        size = mask.shape[-2:]
        plain = torch.ones(size, dtype=torch.bool, device=mask.device).triu_(1)
        _known_causal_masks[mask] = size[0] == size[1] and bool((mask == plain).all())
    return cast("bool", _known_causal_masks[mask])


class K2CoreAttention(MaxLogitRecord, MegatronModule):
    """Scaled dot-product attention without Transformer Engine, on CPU and CUDA.

    Args:
        config: attention dropout and the K2 fields.
        softmax_scale: factor of ``q k^T``, YaRN's mscale included.
        k_channels: width of a query and key head.
        v_channels: width of a value head; may differ.
        pg_collection: needs ``tp``; heads are split over it.

    Raises:
        ValueError: the configuration asks for something this path does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        del attention_type, cp_comm_type  # self-attention only; context parallelism is outside
        super().__init__(config=config)
        _refuse_unsupported(config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.k_channels = k_channels or config.kv_channels
        self.v_channels = v_channels or config.kv_channels
        self.softmax_scale = softmax_scale or cast("int", self.k_channels) ** -0.5
        self.attention_dropout = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.num_attention_heads_per_partition = divide(
            config.num_attention_heads, pg_collection.tp.size()
        )
        self.records_max_logits = getattr(config, "k2_max_attention_logit", True)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, k_channels], or packed [t, heads, k_channels].
            key: like ``query``; may hold more tokens, the last of which is the last query's.
            value: [keys, b, heads, width] or [keys, heads, width].
            attention_mask: None, or bool [b or 1, 1, s, keys] with True where a key is hidden.
            attn_mask_type: overrides the constructor's; all causal ones mean the same here.
            packed_seq_params: ``thd`` sequences; ``cu_seqlens_*_padded`` give their places.

        Returns:
            [s, b, heads x width], or packed [t, heads x width].

        Raises:
            ValueError: an attention bias, a mask on packed sequences, or another mask type.
        """
        if attention_bias is not None:
            raise ValueError("K2CoreAttention takes no attention_bias")
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if mask_type not in _CAUSAL + _UNMASKED:
            raise ValueError(f"K2CoreAttention does not support the mask type {mask_type.name}")
        causal = mask_type in _CAUSAL
        if packed_seq_params is not None:
            return self._forward_packed(
                query, key, value, attention_mask, causal, packed_seq_params
            )
        if attention_mask is not None:
            if query.size(0) == key.size(0) and _is_causal_mask(attention_mask):
                causal, attention_mask = True, None
            else:
                causal = False
        batch = query.size(1)
        q, k, v = (x.flatten(1, 2) for x in (query, key, value))
        output = self._attend(q, k, v, causal, attention_mask, batch)
        return output.reshape(query.size(0), batch, -1)

    def _forward_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        causal: bool,
        packed: PackedSeqParams,
    ) -> Tensor:
        """Attend within each of the packed sequences; [t, heads x width]."""
        if attention_mask is not None and not _is_causal_mask(attention_mask):
            raise ValueError("packed sequences take no attention mask besides the causal one")
        bounds, lengths = _places(packed.cu_seqlens_q, packed.cu_seqlens_q_padded, query)
        key_bounds, key_lengths = _places(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded, key)
        true_lengths, true_key_lengths = (
            [b - a for a, b in pairwise(places.tolist())]
            for places in (packed.cu_seqlens_q, packed.cu_seqlens_kv)
        )
        padded = [*true_lengths, 0] != lengths or [*true_key_lengths, 0] != key_lengths
        record = self.wants_max_logits()
        if self._tiles(query, key, causal):
            output, maxima = tiled_causal_attention(
                query,
                key,
                value,
                self.softmax_scale,
                lengths,
                key_lengths,
                with_max=record and not padded,
            )
        else:
            parts = zip(
                query.split(lengths), *(x.split(key_lengths) for x in (key, value)), strict=True
            )
            output = torch.cat([self._fused(q, k, v, causal, None, 1) for q, k, v in parts])
            padded = True  # nothing recorded yet
        if record and padded:
            maxima = chunked_max_logits(
                query,
                key,
                self.softmax_scale,
                causal=causal,
                starts=bounds[:-1],
                lengths=true_lengths,
                key_starts=key_bounds[:-1],
                key_lengths=true_key_lengths,
            )
        if record:
            self.record_max_logits_(maxima)
        return output.flatten(1)

    def _tiles(self, query: Tensor, key: Tensor, causal: bool) -> bool:
        """Tell whether the CPU tiles apply."""
        dropping = self.attention_dropout > 0 and self.training
        return not query.is_cuda and causal and not dropping

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, batch: int
    ) -> Tensor:
        """Attend over [tokens, batch x heads, width] tensors and record the largest logits."""
        record = self.wants_max_logits()
        if self._tiles(q, k, causal):
            output, maxima = tiled_causal_attention(q, k, v, self.softmax_scale, with_max=record)
            if record:
                self.record_max_logits_(maxima)
            return output
        if record:
            heads_mask = None
            if mask is not None:
                heads_mask = mask.expand(batch, self.num_local_heads, -1, -1).flatten(0, 1)
            found = chunked_max_logits(q, k, self.softmax_scale, causal=causal, mask=heads_mask)
            self.record_max_logits_(found)
        return self._fused(q, k, v, causal, mask, batch)

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, batch: int
    ) -> Tensor:
        """Call torch's fused attention; v is padded to q's width, which the flash kernels need."""
        if q.size(0) == 0:
            return v
        width = v.size(-1)
        v = pad(v, [0, q.size(-1) - width]) if width < q.size(-1) else v
        q, k, v = (x.unflatten(1, (batch, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
        keep = None if mask is None else ~mask
        if causal and q.size(2) != k.size(2):  # the queries are the last tokens of the keys
            keep = causal_lower_right(q.size(2), k.size(2))  # flash on CUDA, a mask elsewhere
        attend = functools.partial(
            scaled_dot_product_attention,
            attn_mask=keep,
            is_causal=causal and keep is None,
            scale=self.softmax_scale,
        )
        if self.attention_dropout > 0 and self.training:
            with get_cuda_rng_tracker().fork():  # heads differ between tensor-parallel ranks
                output = attend(q, k, v, dropout_p=self.attention_dropout)
        else:
            output = attend(q, k, v)
        return output[..., :width].permute(2, 0, 1, 3).flatten(1, 2)


def _places(cu_seqlens: Tensor, padded: Tensor | None, x: Tensor) -> tuple[list[int], list[int]]:
    """Return where packed sequences begin and the lengths of their places in ``x``.

    The lengths end with that of the tokens after the last sequence.
    """
    bounds = (cu_seqlens if padded is None else padded).tolist()
    return bounds, [b - a for a, b in pairwise([*bounds, x.size(0)])]


def _refuse_unsupported(config: TransformerConfig) -> None:
    """Raise ValueError for what the local path does not do."""
    exchange = getattr(config, "k2_context_exchange", "latent")
    if config.context_parallel_size > 1 and exchange != "latent":
        raise ValueError(
            f"--k2-context-exchange {exchange} needs --transformer-impl transformer_engine; the "
            "local attention takes whole keys (allowed: latent)"
        )
    if config.window_size is not None:
        raise ValueError(f"--window-size {config.window_size} is not supported by K2's attention")
    if config.softmax_type != "vanilla":
        raise ValueError(f"--softmax-type {config.softmax_type}: only vanilla is supported locally")
    if config.num_query_groups not in (None, config.num_attention_heads):
        raise ValueError(
            f"--num-query-groups {config.num_query_groups} must equal --num-attention-heads "
            f"{config.num_attention_heads}: MLA has one key head per query head"
        )
