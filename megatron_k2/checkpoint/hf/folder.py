"""A Hugging Face model folder as one table of tensors, from headers and the index alone.

``model.safetensors`` or ``model.safetensors.index.json`` with its shards. Refused: a shard name
that leaves the folder, a tensor that the index puts into another shard than the headers do, a name
in two shards, shards that the index does not name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused, CorruptSourceError, refuse
from megatron_k2.checkpoint.hf.safetensors_header import Header, Tensor, read_header
from megatron_k2.checkpoint.intact import MANIFEST

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
SMALL_FILE_BYTES = 1 << 28  # tokenizers are a few MB; weights in another format are not carried
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class HFFolder:
    """The tensors of a folder and its small files."""

    path: Path
    config: dict[str, Any]
    headers: tuple[Header, ...]  # by file name
    index: bytes | None  # of model.safetensors.index.json, as it stands

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Name to place of every tensor, in the order of files and data."""
        return {tensor.name: tensor for header in self.headers for tensor in header.tensors}

    def small_files(self) -> list[Path]:
        """Return the files beside the weights: tokenizer, chat template, configurations, code."""
        known = {header.path.name for header in self.headers} | {INDEX, MANIFEST}
        return sorted(
            entry
            for entry in self.path.iterdir()
            if entry.is_file()
            and entry.name not in known
            and not entry.name.startswith(".")
            and not entry.name.endswith(_WEIGHTS)
            and entry.stat().st_size <= SMALL_FILE_BYTES
        )


def open_folder(path: str | Path) -> HFFolder:
    """Read config.json, the index and all headers; no tensor is read.

    Raises:
        ConversionRefused: there is no model here, or it is not whole.
    """
    path = Path(path)
    config = read_json(path / CONFIG)
    index_path = path / INDEX
    index = index_path.read_bytes() if index_path.is_file() else None
    if index is None:
        names, weight_map = [SINGLE], None
        if not (path / SINGLE).is_file():
            raise ConversionRefused(f"{path}: neither {INDEX} nor {SINGLE} is there")
    else:
        weight_map = _weight_map(index_path)
        names = sorted(set(weight_map.values()))
        stray = {entry.name for entry in path.glob("*.safetensors")} - set(names)
        refuse([f"{path / n}: not in {INDEX}" for n in sorted(stray)], "shards left over")
    headers = tuple(read_header(path / name) for name in names)
    _check_names(headers, weight_map)
    return HFFolder(path, config, headers, index)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        ConversionRefused: it is missing, unreadable or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionRefused(f"{path}: not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptSourceError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptSourceError(f"{path}: not a JSON object")
    return value


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptSourceError(f"{path}: no weight_map")
    shards = {shard if isinstance(shard, str) else "" for shard in weight_map.values()}
    wrong = {shard for shard in shards if not _is_plain(shard)}
    for name, shard in weight_map.items() if wrong else ():
        if not isinstance(shard, str) or shard in wrong:
            raise CorruptSourceError(
                f"{path}: shard {shard!r} of {name!r} is not the plain name of a .safetensors file"
            )
    return weight_map


def _is_plain(shard: str) -> bool:
    plain = shard == Path(shard).name and not shard.startswith(".") and shard.isprintable()
    return plain and shard.endswith(".safetensors")


def _check_names(headers: tuple[Header, ...], weight_map: dict[str, str] | None) -> None:
    found: dict[str, str] = {}
    problems = []
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in found:
                problems.append(f"{tensor.name}: in {found[tensor.name]} and {header.path.name}")
            found[tensor.name] = header.path.name
    for name, shard in (weight_map or {}).items():
        if found.get(name) != shard:
            where = found.get(name, "no shard")
            problems.append(f"{name}: the index says {shard}, the headers say {where}")
    if weight_map is not None:
        missing = sorted(set(found) - set(weight_map))
        problems += [f"{name}: in {found[name]}, but not in the index" for name in missing]
    refuse(problems, "headers and index do not agree")


def model_config(folder: str | Path) -> dict[str, Any]:
    """Return a folder's config.json; beside a converted checkpoint it lies in ``release/hf``.

    Raises:
        ConversionRefused: there is none, or it cannot be read.
    """
    places = (Path(folder), Path(folder) / "hf", Path(folder) / "release" / "hf")
    place = next((one for one in places if (one / "config.json").is_file()), places[0])
    return read_json(place / "config.json")
