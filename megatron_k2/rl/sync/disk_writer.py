"""The trainer's side of a sync by disk: a version's folder in Hugging Face's format.

What every file holds is known from config.json before a weight is read, so each rank writes its own
rectangles at their places in the same files: nothing is gathered and nobody waits for another but
at the beginning and the end. Checksums are of what is written, on its way there. Ranks of several
machines need one file system, as for Megatron's checkpoints; K2 itself found that no network file
system keeps up with a thousand GPUs and broadcasts (checkpoint_engine.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_k2.checkpoint.hf.folder import CONFIG, INDEX, SINGLE
from megatron_k2.checkpoint.hf.safetensors_header import ITEM_BYTES, encode_header
from megatron_k2.checkpoint.intact import publish_text, write_manifest
from megatron_k2.checkpoint.names import regions
from megatron_k2.rl.sync.fingerprint import Fingerprint, Top
from megatron_k2.rl.sync.live import LivePart, LiveWeights, Tally
from megatron_k2.rl.sync.versions import begin, partial_folder, publish

FINGERPRINT = "fingerprint.json"
SHARD_BYTES = 5 * 10**9  # transformers' own default of save_pretrained


@dataclass
class DiskWriter:
    """Writes versions of a trainer's weights.

    Attributes:
        folder: of the versions; the same on every rank.
        weights: of the trainer.
        config: config.json of the model, such as ``config_from_arguments`` makes.
        keep: so many versions stay, 2 at least.
        small_files: name to bytes of tokenizer and templates, for servers that want them.
        shard_bytes: a file's tensors are at most this, unless one alone is more.
    """

    folder: Path
    weights: LiveWeights
    config: Mapping[str, Any]
    keep: int = 2
    small_files: Mapping[str, bytes] = field(default_factory=dict)
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise ValueError(
                f"keep {self.keep} must be 2 or more: readers may have the last but one"
            )

    def write(self, version: int, top: tuple[Top, ...]) -> Fingerprint:
        """Write a version and publish it; return the fingerprint that lies in it.

        Args:
            version: names the folder.
            top: the trainer's log-probabilities, see ``probe.trainer_top``.

        Collective: two barriers and an all-reduce over the trainer's group.
        """
        group = self.weights.group
        is_first = group is None or group.rank() == 0
        partial = partial_folder(self.folder, version)
        shards = self._shards()
        if is_first:
            begin(self.folder, version)
            for name, tensors in shards.items():
                _allocate(partial / name, tensors)
        self._barrier()
        sums = self._write_parts(partial, shards)
        found = Fingerprint(version, sums, top)
        self._barrier()
        if is_first:
            self._finish(partial, shards, found)
            publish(self.folder, version, self.keep)
        self._barrier()
        return found

    def _write_parts(self, partial: Path, shards: Mapping[str, list[_Entry]]) -> Any:
        """Write this rank's rectangles; return all checksums."""
        places = {}
        for name, entries in shards.items():
            position = len(_header(entries))
            for tensor, dtype, shape in entries:
                places[tensor] = (name, position)
                position += math.prod(shape) * ITEM_BYTES[dtype]
        tally, files = Tally(self.weights), {}
        try:
            for part in self.weights.parts():
                values = self.weights.wire(part).contiguous()
                tally.add(part, values)
                name, start = places[part.region.name]
                if name not in files:
                    files[name] = os.open(partial / name, os.O_WRONLY)
                _write_rectangle(files[name], start, part, values)
            for handle in files.values():
                os.fsync(handle)
        finally:
            for handle in files.values():
                os.close(handle)
        return tally.finish()

    def _shards(self) -> dict[str, list[_Entry]]:
        """Return file name to entries; in a file wide items first, so that all are aligned."""
        groups: list[list[_Entry]] = [[]]
        filled = 0
        for region in regions(self.weights.shape):
            entry = (region.name, self.weights.dtype_of(region), region.shape)
            num_bytes = math.prod(region.shape) * ITEM_BYTES[entry[1]]
            if groups[-1] and filled + num_bytes > self.shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(entry)
            filled += num_bytes
        ordered = [sorted(group, key=lambda entry: -ITEM_BYTES[entry[1]]) for group in groups]
        if len(ordered) == 1:
            return {SINGLE: ordered[0]}
        count = len(ordered)
        return {f"model-{n + 1:05d}-of-{count:05d}.safetensors": g for n, g in enumerate(ordered)}

    def _finish(
        self, partial: Path, shards: Mapping[str, list[_Entry]], found: Fingerprint
    ) -> None:
        """Write everything but the weights; the manifest, of these files, is last."""
        for name, data in self.small_files.items():
            (partial / name).write_bytes(data)
        publish_text(partial / CONFIG, json.dumps(dict(self.config), indent=2) + "\n")
        if SINGLE not in shards:
            where = {entry[0]: name for name, entries in shards.items() for entry in entries}
            publish_text(partial / INDEX, json.dumps({"metadata": {}, "weight_map": where}))
        publish_text(partial / FINGERPRINT, found.to_json())
        write_manifest(partial, {}, skip=shards)

    def _barrier(self) -> None:
        if self.weights.group is not None:
            torch.distributed.barrier(group=self.weights.group)


_Entry = tuple[str, str, tuple[int, ...]]


def _header(entries: list[_Entry]) -> bytes:
    return encode_header(entries, {"format": "pt"})


def _allocate(path: Path, entries: list[_Entry]) -> None:
    """Make a file of its full size with its header."""
    header = _header(entries)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(math.prod(s) * ITEM_BYTES[d] for _, d, s in entries))


def _write_rectangle(handle: int, start: int, part: LivePart, values: Tensor) -> None:
    """Write a rectangle at its place in a tensor that begins at byte ``start``.

    A stretch of whole rows is one write, a cut along columns one a row.
    """
    columns = part.region.shape[-1]
    width, left = values.shape[-1], part.offset[-1]
    top = part.offset[0] if values.ndim == 2 else 0
    size = values.element_size()
    data = memoryview(values.cpu().view(torch.uint8).numpy()).cast("B")
    begin_at = start + (top * columns + left) * size
    if width == columns:
        _write_at(handle, data, begin_at)
        return
    for row in range(values.numel() // max(width, 1)):
        line = data[row * width * size : (row + 1) * width * size]
        _write_at(handle, line, begin_at + row * columns * size)


def _write_at(handle: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(handle, data, position)
        data, position = data[written:], position + written
