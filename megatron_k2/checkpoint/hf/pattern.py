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
from megatron_k2.checkpoint.hf.weights import SCALE
from megatron_k2.checkpoint.names import IGNORED_SUFFIX

BESIDE = "hf"
INT4 = "_packed"
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

    @property
    def has_fp8(self) -> bool:
        """Whether any weight is stored in FP8."""
        return any(tensor.dtype == "F8_E4M3" for h in self.headers for tensor in h.tensors)


def open_pattern(path: Path) -> Pattern:
    """Read a pattern's headers and names.

    Raises:
        ConversionRefused: it is neither of the two, is INT4, or was kept of a release whose files
            cannot be rebuilt (INT4, fp16, a multimodal wrapper).
    """
    if not (path / RECORD).is_file():
        folder = open_folder(path)
        packed = next((name for name in folder.tensors if name.endswith(INT4)), None)
        if packed is not None:
            raise ConversionRefused(
                f"{path}: {packed}: INT4 is not written; leave out --like, or give a folder in "
                "BF16 or FP8"
            )
        kept = {
            name: tensor
            for name, tensor in folder.tensors.items()
            if name.endswith((SCALE, IGNORED_SUFFIX))
        }
        return Pattern(
            path, folder.headers, folder.index, tuple(folder.small_files()), kept, folder.config
        )
    if not can_be_rebuilt(path):
        raise ConversionRefused(
            f"{path}: kept of a release that is INT4, fp16 or multimodal, whose files cannot be "
            "rebuilt; leave out --like"
        )
    headers = []
    for name in _shard_names(path):
        try:
            raw = (path / f"{name}.header").read_bytes()
        except OSError as error:
            raise CorruptSourceError(f"{path / name}.header: {error.strerror}") from error
        headers.append(parse_header(path / name, raw, None))
    carried = {tensor.name: tensor for tensor in read_header(path / CARRIED).tensors}
    index = (path / INDEX).read_bytes() if (path / INDEX).is_file() else None
    small = tuple(kept_files(path))
    return Pattern(path, tuple(headers), index, small, carried, read_json(path / CONFIG))


def can_be_rebuilt(path: Path) -> bool:
    """Tell whether what is kept beside a checkpoint gives back its release's files."""
    return read_json(path / RECORD).get("can_be_rebuilt") is True


def kept_files(path: Path) -> list[Path]:
    """Return the small files that are kept beside a checkpoint: tokenizer, configurations, code."""
    own = {RECORD, CARRIED, INDEX} | {f"{name}.header" for name in _shard_names(path)}
    return sorted(entry for entry in path.iterdir() if entry.name not in own)


def _shard_names(path: Path) -> list[str]:
    names = read_json(path / RECORD).get("shards")
    if not isinstance(names, list):
        raise CorruptSourceError(f"{path / RECORD}: names no shards")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptSourceError(f"{path / RECORD}: shard name {name!r}")
    return names
