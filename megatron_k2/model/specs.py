"""Layer specs of Kimi K2: upstream's GPT decoder block with its leaves swapped.

``--spec megatron_k2.model.specs get_k2_decoder_block_spec`` names the first function. The stock
block spec decides layers, dense or expert, per pipeline stage (uneven layouts and virtual stages
included); here it is copied and the attention, norms and expert modules are replaced: K2's own on
the local path, thin subclasses over Transformer Engine's otherwise. No patch; every module is a
subclass of upstream's, which the overlapped expert-parallel schedule needs.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_k2 import compat
from megatron_k2.model.core_attention import K2CoreAttention
from megatron_k2.model.local_linear import K2TransformerLayer
from megatron_k2.model.lora import AdaptedTransformerLayer, freeze_base
from megatron_k2.model.mla import K2FusedMLASelfAttention, K2MLASelfAttention
from megatron_k2.model.moe import get_k2_dense_mlp_spec, get_k2_moe_spec
from megatron_k2.model.norm import K2RMSNorm

# Checkpoints hold Transformer Engine's names, which fuses these norms into the linear after them,
# so that a run begun on the local path resumes with Transformer Engine and the other way round.
_NORM_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_DENSE_NORM_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def get_k2_decoder_block_spec(
    model_config: Any, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the block spec of this pipeline stage, as upstream's ``GPTModelBuilder`` asks for it.

    Args:
        model_config: upstream's ``GPTModelConfig``; its ``transformer`` is read.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: the configuration is not one of multi-latent attention.
    """
    if getattr(model_config.transformer, "k2_lora_rank", 0):
        hooks = model_config.pre_wrap_hooks
        if freeze_base not in hooks:  # whoever builds the model asks here, and wraps it afterwards
            hooks.append(freeze_base)
    return get_k2_layer_specs(model_config.transformer, vp_stage=vp_stage)


def get_k2_layer_specs(
    config: MLATransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """Return the block spec of one pipeline stage from a transformer configuration.

    Args:
        config: ``config.transformer_impl`` chooses between ``local`` and ``transformer_engine``.
        vp_stage: virtual pipeline stage.
        pp_rank: pipeline rank; None asks parallel_state.

    Raises:
        ValueError: the configuration is not one of multi-latent attention, or names an
            implementation that K2 has no leaves for.
        ImportError: Transformer Engine is asked for and not installed.
    """
    if not config.multi_latent_attention:
        raise ValueError("the K2 layer spec needs --multi-latent-attention")
    if config.transformer_impl not in ("local", "transformer_engine"):
        raise ValueError(
            f"--transformer-impl {config.transformer_impl}: K2 has leaves for local and "
            "transformer_engine"
        )
    use_te = config.transformer_impl == "transformer_engine"
    if use_te and getattr(config, "k2_lora_rank", 0):
        raise ValueError("--k2-lora-rank needs --transformer-impl local")
    if use_te and not compat.te_importable():
        compat.optional("transformer_engine").require()
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    layers = [
        _k2_layer(layer, config, use_te, f"decoder.layers.{index}")
        for index, layer in enumerate(block.layer_specs)
    ]
    norm = block.layer_norm if use_te else K2RMSNorm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _k2_layer(
    layer: ModuleSpec, config: MLATransformerConfig, use_te: bool, name: str
) -> ModuleSpec:
    """Return a copy of a stock layer spec with K2's leaves."""
    stock = cast("TransformerLayerSubmodules", layer.submodules)
    submodules = copy.copy(stock)
    submodules.self_attention = _k2_attention(stock.self_attention, config, use_te)
    submodules.mlp = _k2_mlp(stock, config, use_te)
    if use_te:  # upstream's block gives its layers no name, which decides what weights hold FP8
        params = layer.params | {"name": name}
        return ModuleSpec(module=layer.module, params=params, submodules=submodules)
    submodules.input_layernorm = K2RMSNorm
    submodules.pre_mlp_layernorm = K2RMSNorm
    submodules.sharded_state_dict_keys_map = dict(_NORM_KEYS)
    if not _is_moe(stock):
        submodules.sharded_state_dict_keys_map |= _DENSE_NORM_KEYS
    has_adapters = getattr(config, "k2_lora_rank", 0)
    module = AdaptedTransformerLayer if has_adapters else K2TransformerLayer
    return ModuleSpec(module=module, params=layer.params, submodules=submodules)


def _k2_mlp(stock: TransformerLayerSubmodules, config: MLATransformerConfig, use_te: bool) -> Any:
    """Return K2's feed-forward of a dense or an expert layer."""
    build_mlp = get_k2_moe_spec if _is_moe(stock) else get_k2_dense_mlp_spec
    return build_mlp(config, use_te)


def _is_moe(stock: TransformerLayerSubmodules) -> bool:
    """Tell whether a stock layer holds experts: its mlp is a partial over MoELayer."""
    module = getattr(stock.mlp, "func", getattr(stock.mlp, "module", stock.mlp))
    return isinstance(module, type) and issubclass(module, MoELayer)


def _k2_attention(stock: Any, config: MLATransformerConfig, use_te: bool) -> ModuleSpec:
    """Return a copy of the stock attention spec with K2's attention and core attention."""
    submodules: MLASelfAttentionSubmodules = copy.copy(stock.submodules)
    if use_te:
        from megatron_k2.model.te_attention import K2TECoreAttention

        submodules.core_attention = K2TECoreAttention
        fused = config.mla_down_proj_fusion and config.q_lora_rank is not None
        module: type = K2FusedMLASelfAttention if fused else K2MLASelfAttention
        return ModuleSpec(module=module, params=stock.params, submodules=submodules)
    if config.mla_down_proj_fusion:
        raise ValueError("--mla-down-proj-fusion needs --transformer-impl transformer_engine")
    norm = K2RMSNorm if config.qk_layernorm else IdentityOp
    submodules.core_attention = K2CoreAttention
    submodules.q_layernorm = norm if config.q_lora_rank is not None else IdentityOp
    submodules.kv_layernorm = norm
    return ModuleSpec(module=K2MLASelfAttention, params=stock.params, submodules=submodules)
