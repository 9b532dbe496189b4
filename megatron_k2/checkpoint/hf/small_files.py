"""The files beside the weights of an export: config.json, the index, tokenizer and the like.

What nobody asked to change stays as it stands in the pattern, byte for byte; else config.json says
how the weights are stored now, for transformers, vLLM and SGLang to read, and names the model as
transformers does: its conversion_mapping.py chooses by ``model_type`` whether experts are merged,
and for kimi_k2, which it does not know, leaves every routed expert as it was initialised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.fp8_blocks import BLOCK
from megatron_k2.checkpoint.hf.folder import CONFIG, read_json

FP8_CONFIG: Mapping[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip
AS_TRANSFORMERS: Mapping[str, Any] = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
}  # fmt: skip
HOW_TO_OPEN = """\
config = DeepseekV3Config.from_pretrained({folder!r}, model_type="deepseek_v3")
model = DeepseekV3ForCausalLM.from_pretrained({folder!r}, config=config)"""
"""What opens a folder whose config.json is a release's own, in transformers without its code."""
_DTYPE_NAMES = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}


def small_files(
    paths: Iterable[Path], config: Mapping[str, Any], weights: str, mtp_num_layers: int
) -> dict[str, bytes]:
    """Return name to contents of the small files.

    Args:
        paths: those of the pattern; its config.json is kept if it says the same, whatever it calls
            the model.
        config: what config.json is made from.
        weights: bf16, fp8 or fp32.
        mtp_num_layers: that are written.
    """
    found = {path.name: path.read_bytes() for path in paths}
    made = dict(config)
    made["num_nextn_predict_layers"] = mtp_num_layers
    made.pop("quantization_config", None)
    if weights == "fp8":
        given = config.get("quantization_config") or {}
        is_fp8 = given.get("quant_method") == "fp8"
        made["quantization_config"] = given if is_fp8 else dict(FP8_CONFIG)
    made.pop("dtype", None)  # transformers 5's name for it
    made["torch_dtype"] = _DTYPE_NAMES[weights]
    kept = json.loads(found[CONFIG]) if CONFIG in found else None
    if kept is not None and "dtype" in kept:
        kept["torch_dtype"] = kept.pop("dtype")
    if kept is None or {"num_nextn_predict_layers": 0, **kept} != made:
        found[CONFIG] = (json.dumps({**made, **AS_TRANSFORMERS}, indent=2) + "\n").encode()
    return found


def opening_note(folder: Path) -> str:
    """Return how transformers opens a folder that keeps a release's ``model_type``, else ''."""
    kind = read_json(folder / CONFIG).get("model_type")
    if kind == AS_TRANSFORMERS["model_type"]:
        return ""
    return (
        f"note: config.json is the release's, model_type {kind!r}. transformers opens it with the "
        "release's own code, or so; any other way its experts would be random:\n"
        + HOW_TO_OPEN.format(folder=str(folder))
    )


def index(weight_map: Mapping[str, str], num_bytes: int) -> bytes:
    """Return the index of shards, names sorted, as transformers writes it."""
    value = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(value, indent=2) + "\n").encode()
