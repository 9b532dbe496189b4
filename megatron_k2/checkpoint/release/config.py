"""config.json field by field, and where generation stops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.folder import CONFIG, read_json
from megatron_k2.checkpoint.release.check import DIFFERS, Check, absent, compare, none_of
from megatron_k2.checkpoint.release.expected import Expected

GENERATION = "generation_config.json"
_NOT_READ = ("auto_map",)  # names code of the release, which is never run
_NOT_THERE = "not in the file"
_NOTES: Mapping[str, Mapping[Any, str]] = {
    "max_position_embeddings": {262144: "as in K2-Instruct-0905"},
    "rope_scaling.factor": {64.0: "as in K2-Instruct-0905"},
    "rms_norm_eps": {1e-5: "as in K2.5 and later"},
}


def check_config(folder: Path, expected: Expected) -> Iterator[Check]:
    """Yield the checks of config.json."""
    if not (folder / CONFIG).is_file():
        yield absent(CONFIG, "every field", f"{len(expected.config)} fields", CONFIG)
        return
    try:
        found = flatten(read_json(folder / CONFIG))
    except ConversionRefused as error:
        yield Check(CONFIG, "readable", "a JSON object", str(error), DIFFERS)
        return
    assumed = flatten(expected.config)
    for name in sorted(assumed):
        value = found.get(name, None if assumed[name] is None else _NOT_THERE)
        note = _NOTES.get(name, {}).get(value, "") if isinstance(value, int | float) else ""
        yield compare(CONFIG, name, assumed[name], value, note)
    unknown = [
        name for name in found if name not in assumed and name.split(".")[0] not in _NOT_READ
    ]
    yield none_of(CONFIG, "other fields", unknown, limit=10)


def check_generation(folder: Path, expected: Expected) -> Iterator[Check]:
    """Yield the check of generation_config.json."""
    name, assumed = "eos_token_id", list(expected.eos_ids)
    if not (folder / GENERATION).is_file():
        yield absent(GENERATION, name, assumed, GENERATION)
        return
    try:
        found = read_json(folder / GENERATION).get(name, _NOT_THERE)
    except ConversionRefused as error:
        yield Check(GENERATION, "readable", "a JSON object", str(error), DIFFERS)
        return
    yield compare(GENERATION, name, assumed, [found] if isinstance(found, int) else found)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return fields of nested objects under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
