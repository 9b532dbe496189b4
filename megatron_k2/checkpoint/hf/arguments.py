"""config.json in Megatron's arguments, and back: what a released checkpoint's common state says.

The names of numbers are those of ``presets.hf_config``; here are the fields with more than a name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.bounds import require_possible
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
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}
"""DeepseekV3Config's own values of fields that a config.json may leave out; Megatron's differ."""

_FIXED_CONFIG: dict[str, Any] = {
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
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Fields that transformers has defaults for, and vLLM and SGLang read. A run's arguments do not say
which ids begin and end a text; left out, transformers would stop at id 1."""

_MEGATRON_NONE: Mapping[str, Any] = {"moe_router_topk_scaling_factor": 1.0}
"""What Megatron takes None for."""

_FUNCTION = (
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim",
    "v_head_dim", "moe_router_topk", "moe_router_topk_scaling_factor", "moe_router_num_groups",
    "moe_router_group_topk", "layernorm_epsilon", "rotary_base", "rope_type", *YARN_NAMES.values(),
)  # fmt: skip
"""Arguments that change a model's function; some of them no tensor's shape."""


def arguments_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Megatron arguments that decide the model.

    Args:
        config: a config.json; a multimodal wrapper's text model is taken.

    Raises:
        ConversionRefused: it describes no model of the family, has a number that is impossible, or
            not all of YaRN's settings, of which Megatron's defaults are not transformers'.
    """
    shape = shape_from_config(config)
    config = {**_CONFIG_DEFAULTS, **text_config(config)}
    arguments: dict[str, Any] = {
        dest: _number(config, name)
        for name, dest in CONFIG_NAMES.items()
        if config.get(name) is not None
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
        "moe_aux_loss_coeff": _number({"aux_loss_alpha": 0.0, **config}, "aux_loss_alpha"),
    }
    yarn = rope_scaling(config)
    if yarn:
        arguments["rope_type"] = "yarn"
        arguments |= {dest: _number(yarn, name) for name, dest in YARN_NAMES.items()}
    require_possible(config, yarn, shape)
    if config["n_group"] not in (None, 1):
        arguments["moe_router_num_groups"] = _number(config, "n_group", int)
        arguments["moe_router_group_topk"] = _number(config, "topk_group", int)
        _require_pairs(arguments, "config.json")
    return arguments


def config_from_arguments(
    arguments: Mapping[str, Any], vocab_size: int | None = None
) -> dict[str, Any]:
    """Return a complete config.json for what a Megatron run trained.

    Args:
        arguments: the run's, as its checkpoint keeps them.
        vocab_size: of the tokenizer; None takes ``--vocab-size``, the number of a NullTokenizer's
            tokens too (megatron-core 0.19.2), then the padded size.

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
    numbers = {
        name: _argument(arguments, dest, _MEGATRON_NONE.get(dest))
        for name, dest in CONFIG_NAMES.items()
        if name != "vocab_size"
    }
    shared = _argument(arguments, "moe_shared_expert_intermediate_size", 0)
    config = _FIXED_CONFIG | numbers
    config |= {
        "vocab_size": vocab_size or _vocab_size(arguments),
        "q_lora_rank": arguments.get("q_lora_rank"),
        "n_shared_experts": shared // max(1, numbers["moe_intermediate_size"]),
        "first_k_dense_replace": _num_dense(arguments),
        "n_group": _argument(arguments, "moe_router_num_groups", 1),
        "topk_group": _argument(arguments, "moe_router_group_topk", 1),
        "num_nextn_predict_layers": _argument(arguments, "mtp_num_layers", 0),
        "rope_theta": float(_argument(arguments, "rotary_base", 10000)),
        "rope_scaling": None,
        "aux_loss_alpha": _first(arguments.get("moe_aux_loss_coeff")),
        "torch_dtype": "bfloat16",
    }
    if arguments.get("rope_type") == "yarn" and arguments.get("rotary_scaling_factor", 1) != 1:
        yarn = {name: _argument(arguments, dest) for name, dest in YARN_NAMES.items()}
        config["rope_scaling"] = {"type": "yarn", **yarn}
    _require_pairs(arguments, "the checkpoint")
    arguments_from_config(config)
    return config


def differences(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Return where a config.json describes another function than a run trained, a line each.

    Args:
        config: a config.json.
        arguments: the run's; those that are absent are not compared.
    """
    wanted = arguments_from_config(config)
    is_yarn = wanted["rope_type"] == "yarn"
    found = []
    for dest in _FUNCTION:
        if dest not in arguments or (dest in YARN_NAMES.values() and not is_yarn):
            continue
        ours, theirs = arguments[dest], wanted.get(dest)
        if dest == "rope_type" and arguments.get("rotary_scaling_factor", 1) == 1:
            ours = "rope"
        if dest.startswith("moe_router") and not (ours or theirs):
            continue
        if ours != theirs:
            found.append(f"{dest}: {ours!r} in the checkpoint, config.json says {theirs!r}")
    return found


def _require_pairs(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse groups of experts that Megatron and the released models score differently.

    The models take the sum of a group's two best; Megatron that of its ``topk // group_topk`` best
    (``megatron/core/transformer/moe/moe_utils.py`` group_limited_topk).
    """
    groups, kept = (arguments.get(f"moe_router_{n}") for n in ("num_groups", "group_topk"))
    if groups and kept != groups and (not kept or arguments["moe_router_topk"] // kept != 2):
        raise ConversionRefused(
            f"{where}: top {arguments['moe_router_topk']} experts from {kept} of {groups} groups; "
            "a group's score is the same in Megatron only with two experts a chosen group"
        )


def rope_scaling(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return YaRN's settings, from ``rope_scaling`` or transformers 5's ``rope_parameters``.

    Raises:
        ConversionRefused: another kind of scaling.
    """
    settings = config.get("rope_scaling") or config.get("rope_parameters")
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise ConversionRefused(f"config.json: rope_scaling {settings!r} is no object")
    kind = settings.get("type") or settings.get("rope_type")
    if kind in (None, "default"):
        return None
    if kind != "yarn":
        raise ConversionRefused(f"config.json: rope_scaling of type {kind!r}; only yarn")
    return settings


def rope_theta(config: Mapping[str, Any]) -> float:
    """Return the base of the rotary embedding."""
    inner = config.get("rope_parameters")
    for given in (config, inner if isinstance(inner, Mapping) else {}):
        if given.get("rope_theta") is not None:
            theta = float(_number(given, "rope_theta"))
            if theta != int(theta) or theta < 1:
                raise ConversionRefused(f"config.json: rope_theta {theta}; Megatron's is whole")
            return theta
    return 10000.0


def _number(config: Mapping[str, Any], name: str, kind: Any = (int, float)) -> Any:
    value = config.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
        raise ConversionRefused(f"config.json: {name} {value!r} is not a number")
    return value


def _vocab_size(arguments: Mapping[str, Any]) -> int:
    if not arguments.get("vocab_size"):
        return int(_argument(arguments, "padded_vocab_size"))
    return int(_argument(arguments, "vocab_size"))


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
    """Return the first of the balance losses' coefficients, 0 without one."""
    given = value[0] if isinstance(value, list) and value else value
    return float(_argument({"moe_aux_loss_coeff": given}, "moe_aux_loss_coeff", 0.0))


def _argument(arguments: Mapping[str, Any], dest: str, missing: Any = None) -> Any:
    """Return a number among a run's arguments; ``missing`` if it is not given."""
    value = arguments.get(dest)
    value = missing if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ConversionRefused(f"the checkpoint's arguments: {dest} {value!r} is not a number")
    return value
