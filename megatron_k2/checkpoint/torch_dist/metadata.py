"""Writes ``.metadata``: the pickle of torch.distributed.checkpoint's Metadata, without torch.

Field for field torch 2.14's dataclasses (torch/distributed/checkpoint/metadata.py, and
``_StorageInfo`` of filesystem.py); ``folder.py`` reads it back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.checkpoint.torch_dist.blobs import DTYPES
from megatron_k2.checkpoint.torch_dist.inert_pickle import (
    Record,
    new_record,
    record_class,
    write_pickle,
)

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_VERSION = "1.0.0"  # of torch's CURRENT_DCP_VERSION
_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """One chunk of a global tensor and where its archive lies."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: str
    path: str
    start: int  # of its archive
    num_bytes: int  # of its archive


def encode_metadata(chunks: Iterable[Place], objects: Mapping[str, tuple[str, int, int]]) -> bytes:
    """Return the bytes of ``.metadata``.

    Args:
        chunks: of all global tensors, in any order.
        objects: key to (file, start, bytes) of everything that is no tensor.
    """
    entries: dict[str, Record] = {}
    places: dict[Record, Record] = {}
    for chunk in chunks:
        offset, size = _size(chunk.offset), _size(chunk.size)
        if chunk.key not in entries:
            state = {
                "properties": new_record(_METADATA, "TensorProperties", _properties(chunk.dtype)),
                "size": _size(chunk.global_shape),
                "chunks": [],
            }
            entries[chunk.key] = new_record(_METADATA, "TensorStorageMetadata", state)
        where = {"offsets": offset, "sizes": size}
        entries[chunk.key]["chunks"].append(new_record(_METADATA, "ChunkStorageMetadata", where))
        places[_index(chunk.key, offset)] = _info(chunk.path, chunk.start, chunk.num_bytes)
    for key, place in objects.items():
        entries[key] = new_record(_METADATA, "BytesStorageMetadata", {})
        places[_index(key, None)] = _info(*place)
    digest = hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()
    meta: dict[str, Any] = {"checkpoint_id": None, "save_id": digest[:32], "load_id": None}
    meta["modules"] = []
    root = {
        "state_dict_metadata": entries,
        "planner_data": None,
        "storage_data": places,
        "storage_meta": new_record(_METADATA, "StorageMeta", meta),
        "version": _VERSION,
    }
    return write_pickle(new_record(_METADATA, "Metadata", root))


def _size(shape: tuple[int, ...]) -> Record:
    return record_class("torch", "Size")(shape)


def _index(key: str, offset: Record | None) -> Record:
    return new_record(_METADATA, "MetadataIndex", {"fqn": key, "index": None, "offset": offset})


def _info(path: str, start: int, num_bytes: int) -> Record:
    state = {"relative_path": path, "offset": start, "length": num_bytes}
    return new_record(_FILESYSTEM, "_StorageInfo", state)


def _properties(dtype: str) -> tuple[Any, ...]:
    """Return TensorProperties' state: dtype, layout, requires_grad, memory format, pinned."""
    layout = record_class("torch.serialization", "_get_layout")("torch.strided")
    memory_format = record_class(_METADATA, "_MEM_FORMAT_ENCODING")(0)  # contiguous
    return record_class("torch", _NAMES[dtype]), layout, False, memory_format, False
