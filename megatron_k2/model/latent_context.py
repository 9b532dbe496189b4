"""Context parallelism of latent attention: ranks exchange latents, never keys and values.

Upstream's context parallelism lies in Transformer Engine's attention and moves expanded keys and
values, 64 heads x (192 + 128) numbers a token in Kimi K2. They all follow from the latent and the
one rotary key that the heads share (512 + 64), so that here these are gathered over the
context-parallel group, one all-gather a layer (backward: one reduce-scatter), and every rank
expands the whole row for its heads. Core attention, K2's or Transformer Engine's, then sees plain
queries and keys, once for each of the rank's two chunks (sequence_chunks.py), and knows of no
context parallelism. The price, in K2 at 128k tokens on 8 ranks: every rank does the expansion's
products for the row, 5 % of its attention's, and holds 5.4 GB of keys and values while a layer
runs; recomputing ``mla_up_proj`` keeps the gathered latents alone. Nothing hides the gather behind
compute. Left out: inference, packed documents that are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import multi_latent_attention as upstream
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_k2.model.sequence_chunks import (
    RowShare,
    hides_only_the_future,
    packed_share,
    parts_of,
    plain_share,
    sequence_order,
)

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class LatentContext:
    """Mixin of an MLA layer: queries of this rank's tokens, keys and values of the whole row."""

    config: Any
    pg_collection: Any

    @property
    def gathers_latents(self) -> bool:
        """Tell whether context parallelism is ours to do."""
        exchange = getattr(self.config, "k2_context_exchange", "latent")
        return self.pg_collection.cp.size() > 1 and exchange == "latent"

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, ...]:
        """Derive query, key and value as upstream does; key and value are of the whole row.

        Args:
            hidden_states: [tokens of this rank, batch, hidden], a share under sequence parallelism.
            key_value_states, position_ids: unused, as upstream.
            packed_seq_params: places of the documents in the whole row.
            inference_context: must be None under context parallelism.
            inference_params: likewise.

        Returns:
            query [tokens of this rank, batch, heads, width], key and value [tokens of the row,
            batch, heads, width], without the batch axis for packed documents; and the latents of
            query and of key and value, for callers that keep them.

        Raises:
            ValueError: inference, or documents packed in another way than ours.

        Collective: all-gather over ``pg_collection.cp`` (backward: reduce-scatter), beside those of
        the projections over ``pg_collection.tp``.
        """
        if not self.gathers_latents:
            return cast(
                "tuple[Tensor, ...]",
                super().get_query_key_value_tensors(  # type: ignore[misc]
                    hidden_states,
                    key_value_states,
                    position_ids,
                    packed_seq_params,
                    inference_context,
                    inference_params=inference_params,
                ),
            )
        if inference_context is not None or inference_params is not None:
            raise ValueError(
                f"--context-parallel-size {self.pg_collection.cp.size()}: inference takes whole "
                "sequences; run it with 1"
            )
        layer = cast("Any", self)
        queries, combined = layer._qkv_down_projection(hidden_states)
        latent, rotary = combined.split(
            [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1
        )
        if self.config.q_lora_rank is not None:
            queries = layer.q_layernorm(queries)
        latent, rotary = self._gathered(layer.kv_layernorm(latent), rotary)
        share = self._share(rotary.size(0), rotary.device, packed_seq_params)
        expand = self._expander(share, packed_seq_params, hidden_states.dtype)
        if layer.recompute_up_proj:
            quantised = self.config.fp8 or self.config.fp4
            layer.qkv_up_checkpoint = CheckpointWithoutOutput(fp8=quantised)
            query, key, value = layer.qkv_up_checkpoint.checkpoint(expand, queries, latent, rotary)
        else:
            query, key, value = expand(queries, latent, rotary)
        return query, key, value, queries, latent

    def _gathered(self, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of the row for the up-projection, and its rotary keys in order.

        Under sequence parallelism the up-projection itself gathers its input over the
        tensor-parallel group: the latents then stay apart by rank, and their order is mended after
        the expansion (``_expander``).
        """
        width, group = latent.size(-1), self.pg_collection.cp
        gathered = gather_from_sequence_parallel_region(
            torch.cat((latent, rotary), dim=-1), group=group
        )
        latent, rotary = gathered.tensor_split([width], dim=-1)
        tp_size = self._sequence_ranks()
        if tp_size > 1:
            rotary = gather_from_sequence_parallel_region(rotary, group=self.pg_collection.tp)
            latent = latent.contiguous()
        else:
            latent = sequence_order(latent, group.size())
        return latent, sequence_order(rotary, group.size(), tp_size)

    def _sequence_ranks(self) -> int:
        """Return over how many tensor-parallel ranks tokens are shared."""
        return int(self.pg_collection.tp.size()) if self.config.sequence_parallel else 1

    def _share(self, length: int, device: torch.device, packed: PackedSeqParams | None) -> RowShare:
        """Return this rank's part of a row of ``length`` tokens."""
        group = self.pg_collection.cp
        if packed is None:
            return plain_share(length, group.rank(), group.size(), device)
        return packed_share(packed, length, group.rank(), group.size())

    def _expander(
        self, share: RowShare, packed: PackedSeqParams | None, dtype: torch.dtype
    ) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Return the function from (query latents, latents, rotary keys) to query, key and value.

        It is what ``mla_up_proj`` recomputes. Collective: those of the up-projections.
        """
        layer, config = cast("Any", self), self.config
        widths = [config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim]
        heads = layer.num_attention_heads_per_partition
        ranks = self.pg_collection.cp.size(), self._sequence_ranks()
        rotate = self._rotation(share, packed, dtype)
        project = layer.linear_q_proj if config.q_lora_rank is None else layer.linear_q_up_proj

        def expand(
            queries: Tensor, latent: Tensor, rotary: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            query = project(queries)[0].unflatten(-1, (heads, widths[0] + widths[1]))
            pair = layer.linear_kv_up_proj(latent)[0].unflatten(-1, (heads, widths[0] + widths[2]))
            if ranks[1] > 1:
                pair = sequence_order(pair, *ranks)
            found = rotate(query, pair, rotary.unsqueeze(-2))
            if packed is not None:
                found = [x.squeeze(1) for x in found]
            query, key, value = (x.contiguous() for x in found)
            return query, key, value

        return expand

    def _rotation(
        self, share: RowShare, packed: PackedSeqParams | None, dtype: torch.dtype
    ) -> Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]:
        """Return the function from (query, key and value, rotary key) to rotated query, key, value.

        Positions are looked up token by token, for documents and chunks alike, so that upstream's
        functions need not know of either.
        """
        layer, config = cast("Any", self), self.config
        nope, rope, v_width = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        length = len(share.key_positions)
        if packed is not None:
            length = max(packed.max_seqlen_q, packed.max_seqlen_kv)
        if config.apply_rope_fusion:
            tables = layer.rotary_pos_emb.get_cached_cos_sin(length, dtype=dtype, packed_seq=True)
            of_queries, of_keys = (
                [table[places].contiguous() for table in tables]
                for places in (share.query_positions, share.key_positions)
            )

            def rotate_fused(query: Tensor, pair: Tensor, rotary: Tensor) -> Sequence[Tensor]:
                query = upstream.fused_apply_mla_rope_for_q(query, *of_queries, nope, rope)
                return query, *upstream.fused_apply_mla_rope_for_kv(
                    pair, rotary, *of_keys, rope, nope, v_width
                )

            return rotate_fused

        angles: Any = layer.rotary_pos_emb(length, packed_seq=True)
        angles, scale = angles if isinstance(angles, tuple) else (angles, 1.0)

        def turned(x: Tensor, places: Tensor) -> Tensor:
            return cast(
                "Tensor",
                apply_rotary_pos_emb(
                    x, angles[places], config=config, mscale=scale,
                    cp_group=self.pg_collection.cp, mla_rotary_interleaved=True,
                ),
            )  # fmt: skip

        def rotate(query: Tensor, pair: Tensor, rotary: Tensor) -> Sequence[Tensor]:
            still, turning = query.split([nope, rope], dim=-1)
            query = torch.cat((still, turned(turning, share.query_positions)), dim=-1)
            key, value = pair.split([nope, v_width], dim=-1)
            shared = turned(rotary, share.key_positions).expand(-1, -1, key.size(2), -1)
            return query, torch.cat((key, shared), dim=-1), value

        return rotate

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend, once for each chunk of this rank's queries.

        Args:
            query: [tokens of this rank, batch, heads, width]; packed without the batch axis.
            key: of the whole row; ``value`` likewise.
            value: see ``key``.
            attention_mask: None, or bool [batch or 1, 1, tokens of this rank, tokens of the row].
            packed_seq_params: places of the documents in the whole row.
            attn_mask_type: must be causal under context parallelism; None is the layer's.
            kwargs: passed on to core attention.

        Returns:
            [tokens of this rank, batch, heads x width], or as upstream for packed documents.

        Raises:
            ValueError: a mask type that is not causal.
        """
        attend: Any = super()._run_core_attention  # type: ignore[misc]
        if not self.gathers_latents:
            return cast(
                "Tensor",
                attend(
                    query, key, value, attention_mask, packed_seq_params=packed_seq_params,
                    attn_mask_type=attn_mask_type, **kwargs,
                ),
            )  # fmt: skip
        mask_type = attn_mask_type or cast("Any", self).attn_mask_type
        if mask_type not in _CAUSAL:
            raise ValueError(
                f"--context-parallel-size {self.pg_collection.cp.size()} needs causal attention, "
                f"not {mask_type.name}"
            )
        share = self._share(key.size(0), key.device, packed_seq_params)
        is_plain = attention_mask is not None and packed_seq_params is None
        if is_plain and hides_only_the_future(cast("Tensor", attention_mask), share):
            attention_mask = None
        places = [run.keys for run in share.runs]
        outputs = []
        for run, keys, values in zip(
            share.runs, parts_of(key, places), parts_of(value, places), strict=True
        ):
            mask = attention_mask
            if mask is not None:
                mask = mask[..., run.queries, run.keys]
            kind = AttnMaskType.causal if run.is_square else AttnMaskType.causal_bottom_right
            outputs.append(
                attend(
                    query[run.queries], keys, values, mask, packed_seq_params=run.packed,
                    attn_mask_type=kind, **kwargs,
                )
            )  # fmt: skip
        return torch.cat(outputs)
