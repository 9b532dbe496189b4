"""A ``torch_dist`` checkpoint folder as a table of global tensors and their chunks.

``.metadata`` (a pickle of torch.distributed.checkpoint's Metadata) names every chunk of every
global tensor with its offset, size, file and place; any layout that saved it looks the same.
Neither torch nor Megatron is imported, and nothing in the pickles is run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint import intact
from megatron_k2.checkpoint.errors import ConversionRefused, CorruptSourceError
from megatron_k2.checkpoint.torch_dist.blobs import DTYPES, read_object
from megatron_k2.checkpoint.torch_dist.inert_pickle import name_of, read_pickle

METADATA = ".metadata"
CONFIG = "metadata.json"
COMMON_KEY = "common_state/shard_0_1"


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a global tensor and the archive that holds it."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int  # of the archive


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor as all ranks together know it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class TorchDistFolder:
    """One saved iteration."""

    path: Path
    tensors: Mapping[str, GlobalTensor]
    objects: Mapping[str, tuple[Path, int, int]]  # file, start, bytes

    @cached_property
    def common_state(self) -> dict[str, Any]:
        """What is saved once for all ranks: the arguments, the iteration, the content metadata."""
        if COMMON_KEY not in self.objects:
            raise ConversionRefused(
                f"{self.path}: no common state; checkpoints of Megatron-Core before 0.19 keep it "
                "in common.pt: load and save it once with 0.19"
            )
        path, start, length = self.objects[COMMON_KEY]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CorruptSourceError(f"{path}: {error.strerror or error}") from error
        try:
            value = read_object(descriptor, start, length, f"{path}: common state")
        finally:
            os.close(descriptor)
        state = value[0] if isinstance(value, list) and value else value
        if not isinstance(state, dict):
            raise CorruptSourceError(f"{path}: the common state is no dictionary")
        return state

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the run that saved it; enums and the like are inert records."""
        state = getattr(self.common_state.get("args"), "state", None)
        return state if isinstance(state, dict) else {}

    @property
    def iteration(self) -> int:
        """Steps done when it was saved; 0 in a release."""
        return int(self.common_state.get("iteration", 0))


def resolve(path: str | Path) -> Path:
    """Return the folder of one iteration: the given one, or that which the tracker names.

    Raises:
        ConversionRefused: there is no torch_dist checkpoint.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return path
    tracker = path / intact.TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        folder = path / intact.RELEASE if text == intact.RELEASE else None
        if text.isdigit():
            folder = intact.iteration_directory(path, int(text))
        if folder is not None and (folder / CONFIG).is_file():
            return folder
        raise ConversionRefused(f"{tracker} names {text!r}, and no whole checkpoint is there")
    raise ConversionRefused(
        f"{path}: no Megatron checkpoint: neither {CONFIG} nor {intact.TRACKER} is there"
    )


def is_checkpoint(path: str | Path) -> bool:
    """Tell whether a folder is a Megatron checkpoint, or holds some."""
    path = Path(path)
    return (path / CONFIG).is_file() or (path / intact.TRACKER).is_file()


def open_folder(path: str | Path) -> TorchDistFolder:
    """Read the metadata of a checkpoint; no tensor is read.

    Args:
        path: an iteration's folder, or the folder given with ``--save``.

    Raises:
        ConversionRefused: it is not there or of another format.
        CorruptSourceError: its metadata cannot be read.
    """
    folder = resolve(path)
    if (folder / intact.MANIFEST).is_file():  # a flipped bit in a pickle can ask for all memory
        problems = intact.verify_manifest(folder, only=(METADATA,))
        if problems:
            raise CorruptSourceError(problems[0])
    try:
        root = read_pickle((folder / METADATA).read_bytes())
        entries, places = root["state_dict_metadata"], root["storage_data"]
        located: dict[tuple[str, tuple[int, ...] | None], tuple[Path, int, int]] = {}
        for index, place in places.items():
            offset = index.state.get("offset")
            where = (index["fqn"], None if offset is None else _size(offset))
            file = folder / place["relative_path"]
            if file.parent != folder:
                raise ValueError(f"a file outside the folder: {place['relative_path']!r}")
            located[where] = (file, int(place["offset"]), int(place["length"]))
        tensors, objects = {}, {}
        for key, entry in entries.items():
            if name_of(entry).endswith(".BytesStorageMetadata"):
                objects[key] = located[key, None]
            else:
                tensors[key] = _global_tensor(key, entry, located)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CorruptSourceError(f"{folder / METADATA}: unreadable ({error})") from error
    except OSError as error:
        raise CorruptSourceError(f"{folder / METADATA}: {error.strerror or error}") from error
    return TorchDistFolder(folder, tensors, objects)


def _global_tensor(key: str, entry: Any, located: Mapping[Any, Any]) -> GlobalTensor:
    dtype = name_of(entry["properties"].state[0]).removeprefix("torch.")
    chunks = tuple(
        Chunk(
            _size(chunk["offsets"]), _size(chunk["sizes"]), *located[key, _size(chunk["offsets"])]
        )
        for chunk in entry["chunks"]
    )
    return GlobalTensor(DTYPES[dtype], _size(entry["size"]), chunks)


def _size(value: Any) -> tuple[int, ...]:
    """Return a torch.Size, as a record or as a tuple."""
    return tuple(int(n) for n in (value.args[0] if name_of(value) == "torch.Size" else value))
