"""What an export imitates: another folder's shards, keys, index, small files and FP8 scales.

Either the ``hf`` folder that ``to-megatron`` keeps beside a checkpoint, or a Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused, CorruptSourceError
from megatron_k2.checkpoint.hf.folder import CONFIG, INDEX, open_folder, read_json
from megatron_k2.checkpoint.hf.safetensors_header import Header, Tensor, parse_header, read_header
from megatron_k2.checkpoint.hf.source import SCALE
from megatron_k2.checkpoint.names import IGNORED_SUFFIX

BESIDE = "hf"
CARRIED = "carried.safetensors"
RECORD = "conversion.json"


@dataclass(frozen=True)
class Pattern:
    """The shape of an export."""

    path: Path
    headers: tuple[Header, ...]
    index: bytes | None
    small_files: tuple[Path, ...]
    carried: Mapping[str, Tensor]
    config: Mapping[str, Any]


def open_pattern(path: Path) -> Pattern:
    """Read a pattern's headers and names.

    Raises:
        ConversionRefused: it is neither of the two, or was kept of a checkpoint whose files cannot
        be
            rebuilt (INT4, a multimodal wrapper).
    """
    if not (path / RECORD).is_file():
        folder = open_folder(path)
        kept = {
            name: tensor
            for name, tensor in folder.tensors.items()
            if name.endswith((SCALE, IGNORED_SUFFIX))
        }
        return Pattern(
            path, folder.headers, folder.index, tuple(folder.small_files()), kept, folder.config
        )
    record = read_json(path / RECORD)
    if not record.get("can_be_rebuilt"):
        raise ConversionRefused(
            f"{path}: kept of a release that is INT4, fp16 or multimodal, whose files cannot be "
            "rebuilt; leave out --like"
        )
    headers = []
    for name in record["shards"]:
        if Path(name).name != name:
            raise CorruptSourceError(f"{path / RECORD}: shard name {name!r}")
        raw = (path / f"{name}.header").read_bytes()
        headers.append(parse_header(path / name, raw, None))
    carried = {tensor.name: tensor for tensor in read_header(path / CARRIED).tensors}
    own = {RECORD, CARRIED, INDEX} | {f"{header.path.name}.header" for header in headers}
    small = sorted(entry for entry in path.iterdir() if entry.name not in own)
    index = (path / INDEX).read_bytes() if (path / INDEX).is_file() else None
    return Pattern(path, tuple(headers), index, tuple(small), carried, read_json(path / CONFIG))
