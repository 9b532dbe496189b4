"""Plans Hugging Face -> ``torch_dist``: every byte of the release folder, before any tensor is
read.

One Hugging Face tensor becomes one chunk of one global tensor (large ones several, cut by rows), in
archives that begin at page edges so that they can be written past the page cache. A chunk is found
by any TP, PP, VPP, EP and DP layout, because Megatron asks for rectangles of global tensors. What
Megatron has no place for is kept beside it in ``hf/``: FP8 scales, headers, index, tokenizer,
configuration.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.hf.arguments import arguments_from_config
from megatron_k2.checkpoint.hf.folder import INDEX
from megatron_k2.checkpoint.hf.model import ModelShape
from megatron_k2.checkpoint.hf.pattern import BESIDE, CARRIED, RECORD
from megatron_k2.checkpoint.hf.safetensors_header import encode_header
from megatron_k2.checkpoint.hf.source import HFSource
from megatron_k2.checkpoint.hf.weights import Weight
from megatron_k2.checkpoint.names import Region, extra_state_keys
from megatron_k2.checkpoint.stream.direct_io import pages_up
from megatron_k2.checkpoint.stream.run import Plan, check_units
from megatron_k2.checkpoint.stream.units import (
    UNIT_BYTES,
    Matrix,
    Part,
    Unit,
    as_matrix,
    cut_rows,
    join_parts,
    literal,
    moved,
    take_rows,
    whole,
)
from megatron_k2.checkpoint.torch_dist.blobs import make_frame, save_archive
from megatron_k2.checkpoint.torch_dist.folder import COMMON_KEY, METADATA
from megatron_k2.checkpoint.torch_dist.folder import CONFIG as DIST_CONFIG
from megatron_k2.checkpoint.torch_dist.metadata import Place, encode_metadata

FILE_BYTES = 4 << 30
CHECKPOINT_VERSION = 3.0  # of Megatron's own state; 3.0 since 2021


@dataclass(frozen=True)
class Stored(Place):
    """One chunk of a global tensor, where it lies, and how its bytes are made."""

    parts: tuple[Part, ...]  # positions count from the archive's begin


def plan_to_megatron(source: HFSource, dtype: str = "source") -> Plan:
    """Plan the release folder of a checked source.

    Args:
        source: the Hugging Face folder.
        dtype: ``source`` (quantised weights become bf16), ``bf16`` or ``fp32``.

    Returns:
        The plan; only ``metadata.json``, which makes it a checkpoint, is not in it.

    Raises:
        ConversionRefused: Megatron has no arguments for what config.json says.
    """
    chunks = list(_lay_out(source, dtype))
    files: dict[str, int] = {}
    for chunk in chunks:
        files[chunk.path] = chunk.start + pages_up(chunk.num_bytes)
    units = list(_units(chunks))
    written = directory(source.folder.config, source.shape, chunks)
    known = {path: [literal(0, data)] for path, data in written.items()}
    for path, data in (_beside(source, dtype) | known).items():
        files[path] = sum(part.num_bytes for part in data)
        units += join_parts(path, data)
    check_units(units, files)
    return Plan(
        units=tuple(units),
        files=files,
        options={"direction": "to-megatron", "dtype": dtype},
        finish=finish,
    )


def _lay_out(source: HFSource, dtype: str) -> Iterator[Stored]:
    """Yield all chunks in the order of layers, at page edges of files of about ``FILE_BYTES``."""
    number, position = 0, 0
    doubles = {main: name for name, main in source.repeats.items()}
    for region in source.regions:
        weight = source.weights[region.name]
        target = _target_dtype(region, weight, dtype)
        for offset, size, rows in _cut(region, target):
            frame = make_frame(target, size)
            data = weight.part(len(frame.before), target, *rows)
            parts = [literal(0, frame.before), data]
            if region.name in doubles:
                parts.append(_equality(source, doubles[region.name], weight, rows))
            parts.append(literal(len(frame.before) + data.num_bytes, frame.after))
            num_bytes = len(frame.before) + data.num_bytes + len(frame.after)
            if position + num_bytes > FILE_BYTES and position:
                number, position = number + 1, 0
            yield Stored(
                region.key, region.global_shape, offset, size, target, f"__{number}_0.distcp",
                position, num_bytes, tuple(parts),
            )  # fmt: skip
            position += pages_up(num_bytes)


def _target_dtype(region: Region, weight: Weight, dtype: str) -> str:
    if region.fp32 or dtype == "fp32":
        return "F32"
    return weight.plain_dtype if dtype == "source" else "BF16"


def _cut(
    region: Region, dtype: str
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]]:
    """Yield (offset, size, rows) of a region's chunks; the rows are its matrix's."""
    rows, columns = as_matrix(region.shape)
    if len(region.shape) == 1:
        yield region.offset, region.size, (0, 1)
        return
    for first, last in cut_rows(rows, columns * (4 if dtype == "F32" else 2)):
        offset = (*region.offset[:-2], region.offset[-2] + first, region.offset[-1])
        yield offset, (*region.size[:-2], last - first, columns), (first, last)


def _equality(source: HFSource, name: str, weight: Weight, rows: tuple[int, int]) -> Part:
    """Return a part without bytes: a repeated tensor's rows must be the main one's."""
    tensor = source.folder.tensors[source.prefix + name]
    other = whole(str(tensor.path), tensor.start, tensor.dtype, tensor.shape)
    inputs: tuple[Matrix, ...] = (take_rows(other, *rows), weight.rows(*rows)[0])
    return Part(0, "require_equal", "U8", (1, 0), inputs, name=name)


def _units(chunks: list[Stored]) -> Iterator[Unit]:
    """Yield units of whole chunks, each up to ``UNIT_BYTES`` or one chunk."""
    group: list[Stored] = []
    for chunk in chunks:
        full = group and (
            group[0].path != chunk.path
            or chunk.start + chunk.num_bytes - group[0].start > UNIT_BYTES
        )
        if full:
            yield _unit(group)
            group = []
        group.append(chunk)
    yield _unit(group)


def _unit(group: list[Stored]) -> Unit:
    begin = group[0].start
    end = group[-1].start + pages_up(group[-1].num_bytes)
    parts = [moved(part, part.at + chunk.start - begin) for chunk in group for part in chunk.parts]
    return Unit(group[0].path, begin, end - begin, tuple(parts))


def _beside(source: HFSource, dtype: str) -> dict[str, list[Part]]:
    """Return the parts of each file in ``hf/``."""
    folder = source.folder
    found: dict[str, list[Part]] = {}
    for path in folder.small_files():
        found[f"{BESIDE}/{path.name}"] = [literal(0, path.read_bytes())]
    record = {
        "converted_from": folder.path.name,
        "dtype": dtype,
        "can_be_rebuilt": source.can_be_rebuilt,
        "shards": [header.path.name for header in folder.headers],
    }
    found[f"{BESIDE}/{RECORD}"] = [literal(0, (json.dumps(record, indent=1) + "\n").encode())]
    if source.can_be_rebuilt:
        for shard in folder.headers:
            found[f"{BESIDE}/{shard.path.name}.header"] = [literal(0, shard.raw)]
        if folder.index is not None:
            found[f"{BESIDE}/{INDEX}"] = [literal(0, folder.index)]
        carried = sorted(source.carried, key=lambda tensor: tensor.name)
        header = encode_header([(t.name, t.dtype, t.shape) for t in carried], {"format": "pt"})
        found[f"{BESIDE}/{CARRIED}"] = [literal(0, header)] + [
            Part(
                0, "copy", tensor.dtype, as_matrix(tensor.shape),
                (whole(str(tensor.path), tensor.start, tensor.dtype, tensor.shape),),
                name=tensor.name,
            )
            for tensor in carried
        ]  # fmt: skip
    return {path: [part for part in parts if part.num_bytes] for path, parts in found.items()}


def directory(
    config: dict[str, Any], shape: ModelShape, chunks: Sequence[Place]
) -> dict[str, bytes]:
    """Return the common state and the pickled metadata: what Megatron finds the chunks by.

    Args:
        config: config.json, for the arguments in the common state.
        shape: of the model.
        chunks: of all its tensors.

    Returns:
        File name to contents.
    """
    common = save_archive([_common_state(config)])
    empty = save_archive([None])
    objects = {COMMON_KEY: (0, len(common))}
    for key in extra_state_keys(shape):
        objects[key] = (len(common), len(empty))
    name = "__objects_0.distcp"
    metadata = encode_metadata(chunks, {key: (name, *at) for key, at in objects.items()})
    return {name: common + empty, METADATA: metadata}


def finish(folder: Path) -> None:
    """Write ``metadata.json``, which makes the folder a checkpoint."""
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / DIST_CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _common_state(config: dict[str, Any]) -> dict[str, Any]:
    arguments = arguments_from_config(config) | {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
    }
    return {
        "args": argparse.Namespace(**dict(sorted(arguments.items()))),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False},
    }
