"""The releases that this package speaks of: every assumption in one place, with its source.

config.json comes from the preset and from the fields below: for Kimi K2 they give back the
published file byte for byte (tests/unit/checkpoint/test_doctor.py, by its SHA-256). Counts and
sizes of tensors follow from the name table. ``published`` holds SHA-256 sums of small files as
public repositories record them, with the revision on Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.chat.special_tokens import CONTROL_TOKENS
from megatron_k2.presets import load_preset
from megatron_k2.presets.hf_config import hf_config

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """What a release's folder should be.

    Attributes:
        label: whose release.
        config: every field of config.json that means something here.
        eos_ids: where generation stops, in generation_config.json.
        num_ranks: lines of tiktoken.model.
        named: name -> id of ``added_tokens_decoder``.
        buffer: dtype and shape of a layer's rotary ``inv_freq``, None where it is not known.
        metadata: ``__metadata__`` of the shards, one of these.
        known_ids: texts and their ids; names of control tokens count as such.
        functions: digests of the functions of tokenization_kimi.py that the tokenizer follows.
        published: file -> SHA-256 -> whose.
    """

    label: str
    config: Mapping[str, Any]
    eos_ids: Ids
    num_ranks: int
    named: Mapping[str, int]
    buffer: tuple[str, Ids] | None = None
    metadata: tuple[Mapping[str, str], ...] = ({"format": "pt"},)
    known_ids: tuple[tuple[str, Ids], ...] = ()
    functions: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


_BLOCK_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
_FAMILY: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 163584,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "kimi-k2": {
        "eos_token_id": 163585,
        "model_type": "kimi_k2",
        "quantization_config": _BLOCK_FP8,
        "transformers_version": "4.48.3",
    },
    "moonlight-16b-a3b": {
        "eos_token_id": 163586,
        "ep_size": 1,
        "model_type": "deepseek_v3",
        "transformers_version": "4.46.3",
    },
}
RELEASES = tuple(_OWN)
"""Presets of which there is a release."""

_RANK_FILE = {
    "b6c497a7469b33ced9c38afb1ad6e47f03f5e5dc05f15930799210ec050c5103": "all Kimi releases "
    "(Moonlight, K2, K2-0905, Kimi-Linear, K2.5, K3)"
}
_PUBLISHED: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "kimi-k2": {
        "config.json": {
            "8c13ae1049df55f29b3bdcae69a562433f243ff70dac251d819ecad8dbdf7439": "K2-Instruct "
            "fd1984e2, K2-Base ce72df01",
            "4cd10b0f3cb1c1dfdbfcdd2f303057500f570b24f671ce5eb7650b6a511807cc": "K2-Instruct-0905 "
            "ac6c49f0",
        },
        "model.safetensors.index.json": {
            "5f26b4bacf121bef4a80b64e6d557c32bdcb1aa9a7e5bebc6cff5cc698558602": "K2-Instruct",
            "c1f1d16c853f20467ae81361d2a92223650d39efa005f9c872a7cc14425ddcbc": "K2-Base ce72df01",
        },
        "chat_template.jinja": {
            "00938c355ca7195fd4f9c923e93af063846d4d5005e06999274f8db57b65bb0b": "K2-Instruct-0905 "
            "ac6c49f0",
        },
        "tiktoken.model": _RANK_FILE,
    },
    "moonlight-16b-a3b": {"tiktoken.model": _RANK_FILE},
}
_KNOWN_IDS: tuple[tuple[str, Ids], ...] = (
    # github.com/ml-rust/splintr, tests: tiktoken over Moonshot's own files.
    ("Hello, world!", (19180, 11, 2695, 0)),
    ("1234567890", (6694, 12972, 16242, 15)),
    ("中文English混合", (16717, 44372, 13935)),
    ("   \t\n   ", (274, 5427, 274)),
    ("HTTPRequestHandler", (17819, 3188, 5321)),
)
_KNOWN_CALL: tuple[str, Ids] = (
    # github.com/YS-OH-CORE/canitoolcall, fixtures/kimi: K2-Instruct-0905's own class.
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    '<|tool_call_argument_begin|>{"city": "Paris", "unit": "celsius"}<|tool_call_end|>'
    "<|tool_calls_section_end|>",
    (
        *(163595, 163597, 41937, 1150, 21055, 2800, 25, 15, 163598, 8264, 37666, 1289, 414),
        *(113476, 665, 414, 8175, 1289, 414, 78841, 14211, 16934, 163599, 163596),
    ),
)
_FUNCTIONS: Mapping[str, str] = {
    # github.com/troy12x/quasar-kimi carries the file; the copies of K2.5 have the same two.
    "encode": "67c1ec44067d",
    "_split_whitespaces_or_nonwhitespaces": "2a0902cd9b4d",
}
_METADATA: Mapping[str, tuple[Mapping[str, str], ...]] = {
    # The header of K2-Instruct's second shard is 293,368 bytes long (README of
    # github.com/RohanAdwankar/sploosh), which is our own length of it without metadata.
    "kimi-k2": ({},),
}
_ANY_METADATA: tuple[Mapping[str, str], ...] = ({}, {"format": "pt"})
_BUFFERS = {"kimi-k2": ("BF16", (56,))}
"""Of K2-Instruct: 61 buffers of 56 bf16 numbers, by a public listing of its tensors."""


def expected(preset: str) -> Expected:
    """Return what the release of a preset should be.

    Raises:
        ValueError: there is no release of that preset.
    """
    if preset not in RELEASES:
        raise ValueError(f"--k2-preset {preset}: no release of it; allowed: {', '.join(RELEASES)}")
    config = _config(preset)
    num_ranks = config["vocab_size"] - 256
    is_k2 = preset == "kimi-k2"
    return Expected(
        label=preset,
        config=config,
        eos_ids=(num_ranks + CONTROL_TOKENS["<|im_end|>"],),
        num_ranks=num_ranks,
        named={name: num_ranks + offset for name, offset in CONTROL_TOKENS.items()},
        buffer=_BUFFERS.get(preset),
        metadata=_METADATA.get(preset, _ANY_METADATA),
        known_ids=(*_KNOWN_IDS, _KNOWN_CALL) if is_k2 else _KNOWN_IDS,
        functions=_FUNCTIONS,
        published=_PUBLISHED[preset],
    )


def _config(preset: str) -> dict[str, Any]:
    loaded = load_preset(preset)
    config = {**hf_config(loaded), **_FAMILY, **_OWN[preset]}
    config["aux_loss_alpha"] = loaded.value("moe_aux_loss_coeff")
    config.pop("pad_token_id")
    scaling = config.pop("rope_scaling")
    if scaling:
        del scaling["rope_type"]  # transformers' later word for `type`
        config["rope_scaling"] = scaling
    return config
