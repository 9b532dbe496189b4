"""config.json in Megatron's arguments, and back: what a released checkpoint's common state says.

The names of numbers are those of ``presets.hf_config``; here are the fields with more than a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.model import shape_from_config, text_config
from megatron_k2.presets.hf_config import CONFIG_NAMES, YARN_NAMES

_FIXED_ARGUMENTS: Mapping[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "add_position_embedding": False,
    "hidden_dropout": 0.0,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
    "moe_grouped_gemm": True,
    "group_query_attention": False,
}
"""What every model of the family has."""

_CONFIG_DEFAULTS: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
}
"""DeepseekV3Config's own values of fields that a config.json may leave out; Megatron's differ."""

_FIXED_CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "seq_aux": True,
    "use_cache": True,
    "pretraining_tp": 1,
    "ep_size": 1,
}
"""Fields that transformers has defaults for, and vLLM and SGLang read."""


def arguments_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Megatron arguments that decide the model.

    Args:
        config: a config.json; a multimodal wrapper's text model is taken.

    Raises:
        ConversionRefused: it describes no model of the family.
    """
    shape = shape_from_config(config)
    config = text_config(config)
    config = {**_CONFIG_DEFAULTS, **config}
    arguments = {
        dest: config[name] for name, dest in CONFIG_NAMES.items() if config.get(name) is not None
    }
    num_sparse = shape.num_layers - shape.num_dense_layers
    arguments |= _FIXED_ARGUMENTS
    arguments |= {
        "q_lora_rank": shape.q_lora_rank,
        "moe_layer_freq": [0] * shape.num_dense_layers + [1] * num_sparse,
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size or None,
        "mtp_num_layers": shape.mtp_num_layers or None,
        "padded_vocab_size": shape.vocab_size,
        "rotary_base": int(rope_theta(config)),
        "rope_type": "rope",
        "moe_aux_loss_coeff": config.get("aux_loss_alpha", 0.0),
    }
    if config.get("n_group") not in (None, 1):
        arguments["moe_router_num_groups"] = config["n_group"]
        arguments["moe_router_group_topk"] = config.get("topk_group")
    yarn = rope_scaling(config)
    if yarn:
        arguments["rope_type"] = "yarn"
        arguments |= {dest: yarn[name] for name, dest in YARN_NAMES.items() if name in yarn}
    return arguments


def config_from_arguments(
    arguments: Mapping[str, Any], vocab_size: int | None = None
) -> dict[str, Any]:
    """Return a complete config.json for what a Megatron run trained.

    Args:
        arguments: the run's, as its checkpoint keeps them.
        vocab_size: of the tokenizer; None takes ``--vocab-size`` (NullTokenizer adds one to it),
            then the padded size.

    Raises:
        ConversionRefused: the run's model is not one of the family.
    """
    for name, value in _FIXED_ARGUMENTS.items():
        needed = name not in ("add_position_embedding", "moe_router_dtype", "moe_grouped_gemm")
        if needed and arguments.get(name, value) != value:
            raise ConversionRefused(
                f"the checkpoint was trained with {name} {arguments[name]!r}; only {value!r} has a "
                "place in a DeepSeek-V3 config.json"
            )
    if not arguments.get("multi_latent_attention"):
        raise ConversionRefused(
            "the checkpoint keeps no arguments of a multi-latent-attention model"
        )
    config = dict(_FIXED_CONFIG)
    config |= {name: arguments.get(dest) for name, dest in CONFIG_NAMES.items()}
    width = arguments["moe_ffn_hidden_size"]
    config |= {
        "vocab_size": vocab_size or _vocab_size(arguments),
        "q_lora_rank": arguments.get("q_lora_rank"),
        "n_shared_experts": (arguments.get("moe_shared_expert_intermediate_size") or 0) // width,
        "first_k_dense_replace": _num_dense(arguments),
        "n_group": arguments.get("moe_router_num_groups") or 1,
        "topk_group": arguments.get("moe_router_group_topk") or 1,
        "num_nextn_predict_layers": arguments.get("mtp_num_layers") or 0,
        "rope_theta": float(arguments.get("rotary_base", 10000)),
        "rope_scaling": None,
        "aux_loss_alpha": _first(arguments.get("moe_aux_loss_coeff", 0.0)),
        "torch_dtype": "bfloat16",
    }
    if arguments.get("rope_type") == "yarn" and arguments.get("rotary_scaling_factor", 1) != 1:
        yarn = {name: arguments[dest] for name, dest in YARN_NAMES.items()}
        config["rope_scaling"] = {"type": "yarn", **yarn}
    shape_from_config(config)
    return config


def rope_scaling(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return YaRN's settings, from ``rope_scaling`` or transformers 5's ``rope_parameters``.

    Raises:
        ConversionRefused: another kind of scaling.
    """
    settings = config.get("rope_scaling") or config.get("rope_parameters")
    kind = (settings or {}).get("type") or (settings or {}).get("rope_type")
    if not settings or kind in (None, "default"):
        return None
    if kind != "yarn":
        raise ConversionRefused(f"config.json: rope_scaling of type {kind!r}; only yarn")
    return settings


def rope_theta(config: Mapping[str, Any]) -> float:
    """Return the base of the rotary embedding."""
    inner = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or inner.get("rope_theta") or 10000.0)


def _vocab_size(arguments: Mapping[str, Any]) -> int:
    given = arguments.get("vocab_size")
    if not given:
        return int(arguments["padded_vocab_size"])
    return int(given) + (arguments.get("tokenizer_type") == "NullTokenizer")


def _num_dense(arguments: Mapping[str, Any]) -> int:
    pattern = arguments.get("moe_layer_freq")
    if pattern == 1:
        return 0
    if not isinstance(pattern, list):
        raise ConversionRefused(
            f"the checkpoint's moe_layer_freq {pattern!r} is no list of 0 and 1"
        )
    dense = pattern.index(1) if 1 in pattern else len(pattern)
    if any(kind != 1 for kind in pattern[dense:]):
        raise ConversionRefused(
            f"the checkpoint's moe_layer_freq {pattern!r}: config.json can only say how many "
            "layers at the beginning are dense"
        )
    return dense


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value or 0.0)
