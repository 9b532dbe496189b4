"""Grouped-query attention with K2's record of logits, so that QK-Clip serves such models too.

``--spec megatron_k2.model.grouped_query get_grouped_query_block_spec`` is upstream's local GPT
layer with two leaves swapped: a core attention that records each head's largest softmax input, and
an RMSNorm that knows sequence parallelism. No preset uses it; Kimi K2 has latent attention. Not
here: Transformer Engine, packed sequences, windows.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_k2.max_logit import MaxLogitRecord, chunked_max_logits
from megatron_k2.model.norm import K2RMSNorm


class GroupedQueryCoreAttention(MaxLogitRecord, DotProductAttention):  # type: ignore[misc]
    """Upstream's local ``DotProductAttention`` that records each query head's largest logit.

    Raises:
        ValueError: a mask that is not causal, a window, or logits scaled by the layer's number.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"the record of logits is causal; found {attn_mask_type.name}")
        if config.window_size is not None or config.apply_query_key_layer_scaling:
            raise ValueError(
                "--window-size and --apply-query-key-layer-scaling: the record of logits knows "
                "neither"
            )
        self.records_max_logits = getattr(config, "k2_max_attention_logit", True)
        super().__init__(config, layer_number, attn_mask_type, *args, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Record, then attend as upstream does.

        Args:
            query: [s, b, heads, width].
            key: [s, b, groups, width], each for ``heads / groups`` query heads in a row.
            value: like ``key``.
            attention_mask: None for causal, or bool [b or 1, 1, s, s] with True where hidden.
            args, kwargs: upstream's.

        Returns:
            [s, b, heads x width].
        """
        if self.wants_max_logits():
            batch, heads = query.size(1), query.size(2)
            keys = key.repeat_interleave(heads // key.size(2), dim=2)
            mask = None
            if attention_mask is not None:
                mask = attention_mask.expand(batch, heads, -1, -1).flatten(0, 1)
            self.record_max_logits_(
                chunked_max_logits(
                    query.flatten(1, 2), keys.flatten(1, 2), self.softmax_scale,
                    causal=mask is None, mask=mask,
                )
            )  # fmt: skip
        return cast("Tensor", super().forward(query, key, value, attention_mask, *args, **kwargs))


def get_grouped_query_block_spec(
    model_config: Any, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the block spec of this pipeline stage, as upstream's ``GPTModelBuilder`` asks for it.

    Args:
        model_config: upstream's ``GPTModelConfig``; its ``transformer`` is read.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: the configuration is one of latent attention, or asks for Transformer Engine.
    """
    config = model_config.transformer
    if config.multi_latent_attention or config.transformer_impl != "local":
        raise ValueError(
            "the grouped-query spec needs --transformer-impl local and no --multi-latent-attention"
        )
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    rms = config.normalization == "RMSNorm"
    layers = [_recording(layer, rms=rms) for layer in block.layer_specs]
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=K2RMSNorm if rms else block.layer_norm
    )


def _recording(layer: ModuleSpec, *, rms: bool) -> ModuleSpec:
    """Return a copy of a stock layer spec whose attention records."""
    layer = copy.copy(layer)
    layer.submodules = submodules = copy.copy(layer.submodules)
    attention = copy.copy(submodules.self_attention)
    attention.submodules = copy.copy(attention.submodules)
    attention.submodules.core_attention = GroupedQueryCoreAttention
    submodules.self_attention = attention
    if rms:
        submodules.input_layernorm = submodules.pre_mlp_layernorm = K2RMSNorm
    return layer
