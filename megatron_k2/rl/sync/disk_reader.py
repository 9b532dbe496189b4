"""The engine's side of a sync by disk: every byte of a version is checked before one is loaded.

The small files have a manifest; each tensor is summed as it lies in its file and compared with the
trainer's fingerprint, so that a refusal names the tensor and the engine still has its old weights.
The second reading, into the model, comes from the page cache where memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.folder import open_folder
from megatron_k2.checkpoint.hf.safetensors_header import Tensor as StoredTensor
from megatron_k2.checkpoint.hf.source import open_source
from megatron_k2.checkpoint.intact import MANIFEST, verify_manifest
from megatron_k2.checkpoint.load_hf import load_
from megatron_k2.checkpoint.tensors import TensorReader
from megatron_k2.rl.sync.disk_writer import FINGERPRINT
from megatron_k2.rl.sync.fingerprint import (
    Fingerprint,
    SyncRefused,
    TensorSum,
    refuse_differences,
    sum_differences,
)
from megatron_k2.rl.sync.live import TORCH
from megatron_k2.rl.sync.sums import partial_sum


def read_fingerprint(folder: Path, version: int) -> Fingerprint:
    """Check a version's small files; return the trainer's fingerprint.

    Raises:
        SyncRefused: it is not there, a file is damaged, or it is of another version.
    """
    if not (folder / MANIFEST).is_file():
        raise SyncRefused(f"{folder}: there is no such version")
    refuse_differences(verify_manifest(folder), version)
    found = Fingerprint.from_json((folder / FINGERPRINT).read_text(encoding="utf-8"))
    if found.version != version:
        raise SyncRefused(f"{folder}: holds version {found.version}, not {version}")
    return found


def check(folder: Path, version: int) -> Fingerprint:
    """Read every byte of a version; return the trainer's fingerprint.

    Raises:
        SyncRefused: names each tensor or file that is not what the trainer wrote.
    """
    wanted = read_fingerprint(folder, version)
    try:
        found = dict(_stored_sums(open_folder(folder).tensors.values()))
    except ConversionRefused as error:
        raise SyncRefused(f"weights {version} are refused, no rollout: {error}") from error
    problems = [f"{folder}: {one}" for one in sum_differences(wanted.tensors or {}, found)]
    refuse_differences(problems, version)
    return wanted


def load_into_(chunks: list[Any], folder: Path) -> None:
    """Fill model chunks, of any layout, from a version's folder.

    Raises:
        ConversionRefused: the folder is of another model.
    """
    reader = TensorReader(open_source(folder))
    try:
        for chunk in unwrap_model(chunks):
            load_(chunk, reader)
    finally:
        reader.close()


def _stored_sums(tensors: Any) -> Iterator[tuple[str, TensorSum]]:
    for stored in tensors:
        total = partial_sum(_read(stored), (0,) * len(stored.shape))
        value = f"{int(total) % 2**64:016x}"
        yield stored.name, TensorSum(stored.dtype, stored.shape, value)


def _read(stored: StoredTensor) -> Tensor:
    if stored.dtype not in TORCH:
        raise ConversionRefused(f"{stored.path}: {stored.name} is {stored.dtype}, not BF16 or F32")
    data = np.fromfile(stored.path, np.uint8, stored.num_bytes, offset=stored.start)
    return torch.from_numpy(data).view(TORCH[stored.dtype]).view(stored.shape)
