"""Models under MuonClip in the distributed tests: K2's, with prediction layers, grouped queries.

Upstream's builder would make prediction layers of stock modules, which keep no record of logits;
``WithPrediction`` makes them of K2's, as ``conversion_job.py`` does.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_k2.model.grouped_query import get_grouped_query_block_spec
from megatron_k2.model.norm import K2RMSNorm
from megatron_k2.model.specs import get_k2_decoder_block_spec, get_k2_layer_specs
from megatron_k2.planning.stage import preset_config
from megatron_k2.presets import load_preset


class WithPrediction(GPTModelBuilder):  # type: ignore[misc]
    """Upstream's builder, with K2's layers in the block of multi-token prediction as well."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build one stage."""
        given = self._model_config
        config = given.transformer
        block = get_k2_layer_specs(config, vp_stage)
        prediction = get_gpt_mtp_block_spec(
            config, block, use_transformer_engine=False, vp_stage=vp_stage
        )
        for layer in prediction.layer_specs if prediction else ():
            norms = layer.submodules  # upstream's local norm refuses sequence parallelism
            norms.enorm = norms.hnorm = norms.layer_norm = K2RMSNorm
        return GPTModel(
            config, block, given.vocab_size, given.seq_length, position_embedding_type="rope",
            mtp_block_spec=prediction, pre_process=pre_process, post_process=post_process,
            pg_collection=pg_collection, vp_stage=vp_stage,
        )  # fmt: skip


def grouped_query_config(**fields: Any) -> TransformerConfig:
    """Return a dense model of 2 layers: 8 query heads and 4 key heads of width 16, biases too."""
    return TransformerConfig(
        num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=8,
        num_query_groups=4, kv_channels=16, add_bias_linear=False, add_qkv_bias=True,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, normalization="RMSNorm",
        hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
        bias_activation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False, use_cpu_initialization=True,
        transformer_impl="local", deallocate_pipeline_outputs=True, **fields,
    )  # fmt: skip


def builder_of(model: str, **fields: Any) -> GPTModelBuilder:
    """Return a model's builder: ``k2``, ``prediction``, ``lora``, ``grouped``, ``stock grouped``.

    Args:
        model: which.
        fields: of its transformer's configuration.
    """
    vocabulary = int(load_preset("k2-micro").value("vocab_size"))  # type: ignore[call-overload]
    common = dict(vocab_size=vocabulary, seq_length=64, position_embedding_type="rope")
    if "grouped" in model:
        config = grouped_query_config(**fields)
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        return GPTModelBuilder(
            GPTModelConfig(
                transformer=config, **common,
                transformer_layer_spec=get_grouped_query_block_spec if model == "grouped" else spec,
            )
        )  # fmt: skip
    if model == "prediction":
        fields |= dict(mtp_num_layers=1)
    if model == "lora":
        fields |= dict(k2_lora_rank=4)
    config = preset_config("k2-micro", moe_enable_routing_replay=True, **fields)
    given = GPTModelConfig(
        transformer=config, transformer_layer_spec=get_k2_decoder_block_spec, **common
    )
    return WithPrediction(given) if model == "prediction" else GPTModelBuilder(given)
