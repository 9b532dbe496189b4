"""Plans ``torch_dist`` -> Hugging Face: every byte of the folder, before any tensor is read.

With a *pattern* (the files kept beside a converted checkpoint, or another Hugging Face folder)
shard split, order of keys, headers, index and small files are the pattern's. Without one, shards of
``shard_bytes`` in the order of layers, and a config.json made from the run's arguments.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused, refuse
from megatron_k2.checkpoint.fp8_blocks import BLOCK, num_blocks
from megatron_k2.checkpoint.hf.folder import INDEX
from megatron_k2.checkpoint.hf.pattern import Pattern
from megatron_k2.checkpoint.hf.safetensors_header import ITEM_BYTES, encode_header
from megatron_k2.checkpoint.hf.small_files import index, small_files
from megatron_k2.checkpoint.hf.weights import SCALE
from megatron_k2.checkpoint.names import IGNORED_SUFFIX, Region, repeated
from megatron_k2.checkpoint.stream.kernels import cast
from megatron_k2.checkpoint.stream.run import Plan, check_units
from megatron_k2.checkpoint.stream.units import (
    Matrix,
    Part,
    Unit,
    as_matrix,
    cut_rows,
    join_parts,
    literal,
    take_rows,
    whole,
)
from megatron_k2.checkpoint.torch_dist.source import MegatronSource

WEIGHTS = ("bf16", "fp8", "fp32")
SHARD_BYTES = 5_000_000_000  # what transformers writes
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Request:
    """What the export is to look like."""

    weights: str  # bf16, fp8 or fp32
    original_scales: bool  # the pattern's, for weights that nobody trained
    pattern: Pattern | None
    config: Mapping[str, Any]  # what config.json is made from
    small_files: tuple[Path, ...] = ()
    extra_files: Mapping[str, bytes] = field(default_factory=dict)  # name to contents
    as_released: bool = False  # the pattern's own files, byte for byte
    mtp_num_layers: int = 0
    shard_bytes: int = SHARD_BYTES


def plan_to_hf(source: MegatronSource, request: Request) -> Plan:
    """Plan the folder of a checked checkpoint.

    Raises:
        ConversionRefused: the pattern is of another model, or lacks the scales that are asked for.
    """
    by_name = {region.name: region for region in source.regions}
    shards = _shards(source, request)
    files: dict[str, int] = {}
    units: list[Unit] = []
    weight_map: dict[str, str] = {}
    maker = _Maker(source, request, by_name, repeated(source.shape))
    for file, (header, entries) in shards.items():
        parts = [literal(0, header)]
        for name, dtype, shape in entries:
            parts += maker.parts(name, dtype, shape)
            weight_map[name] = file
        files[file] = sum(part.num_bytes for part in parts)
        units += join_parts(file, parts)
    num_bytes = sum(_num_bytes(e) for _, entries in shards.values() for e in entries)
    for file, data in _beside(request, weight_map, num_bytes, len(shards)).items():
        files[file] = len(data)
        units += join_parts(file, [literal(0, data)])
    check_units(units, files)
    options = {"direction": "to-hf", "weights": request.weights}
    return Plan(tuple(units), files, options)


class _Maker:
    """Makes the parts of one tensor after another."""

    def __init__(
        self,
        source: MegatronSource,
        request: Request,
        regions: Mapping[str, Region],
        repeats: Mapping[str, str],
    ) -> None:
        self._source, self._request = source, request
        self._regions, self._repeats = regions, repeats

    def parts(self, name: str, dtype: str, shape: tuple[int, ...]) -> list[Part]:
        """Return the parts of a tensor, cut by rows."""
        region = self._regions.get(self._repeats.get(name, name))
        if region is not None:
            return list(self._weight(name, dtype, region))
        if name.endswith(SCALE) and not self._request.original_scales:
            region = self._regions[name.removesuffix(SCALE)]
            matrix = self._source.matrix(region)
            return [Part(0, "fresh_scales", dtype, as_matrix(shape), (matrix,), name=name)]
        return [Part(0, "copy", dtype, as_matrix(shape), (self._carried(name),), name=name)]

    def _weight(self, name: str, dtype: str, region: Region) -> Iterator[Part]:
        matrix = self._source.matrix(region)
        rows, columns = as_matrix(region.shape)
        row_bytes = columns * max(ITEM_BYTES[dtype], ITEM_BYTES[matrix.dtype])
        scales = None
        if dtype == "F8_E4M3" and self._request.original_scales:
            scales = self._carried(name + SCALE)
        for first, last in cut_rows(rows, row_bytes):
            piece = take_rows(matrix, first, last)
            shape = (last - first, columns)
            if scales is not None:
                blocks = take_rows(scales, first // BLOCK, -(-last // BLOCK))
                yield Part(0, "requantise_fp8", dtype, shape, (piece, blocks), name=name)
            elif dtype == "F8_E4M3":
                yield Part(0, "quantise_fp8", dtype, shape, (piece,), name=name)
            else:
                yield Part(0, cast(piece.dtype, dtype), dtype, shape, (piece,), name=name)

    def _carried(self, name: str) -> Matrix:
        pattern = self._request.pattern
        tensor = pattern.carried.get(name) if pattern is not None else None
        if tensor is None:
            raise ConversionRefused(f"{name}: neither on Megatron's side nor kept beside it")
        return whole(str(tensor.path), tensor.start, tensor.dtype, tensor.shape)


def _shards(source: MegatronSource, request: Request) -> dict[str, tuple[bytes, list[Entry]]]:
    """Return the header and the tensors of every shard, in their order."""
    pattern = request.pattern
    if pattern is None:
        return _fresh_shards(source, request)
    known = {region.name: region.shape for region in source.regions}
    known |= {name: known[main] for name, main in repeated(source.shape).items()}
    fp32 = {region.name for region in source.regions if region.fp32}
    problems, found = [], {}
    seen = set()
    for header in pattern.headers:
        entries: list[Entry] = []
        for tensor in header.tensors:
            if _layer_of(tensor.name) >= source.shape.num_layers + source.shape.mtp_num_layers:
                continue  # a prediction layer that was not trained
            seen.add(tensor.name)
            main = tensor.name.removesuffix(SCALE)
            expected = known.get(main)
            if expected is not None and main != tensor.name:
                expected = num_blocks(expected)
            if expected is None and not tensor.name.endswith(IGNORED_SUFFIX):
                problems.append(f"{tensor.name}: the checkpoint has no such tensor")
            elif expected is not None and tensor.shape != expected:
                problems.append(f"{tensor.name}: {tensor.shape}, the checkpoint says {expected}")
            else:
                given = (tensor.name, tensor.dtype, tensor.shape)
                as_given = request.as_released or expected is None or tensor.name in fp32
                entries += [given] if as_given else _like(*given, request, pattern.has_fp8)
        if [(t.name, t.dtype, t.shape) for t in header.tensors] == entries:
            found[header.path.name] = (header.raw, entries)
        elif entries:  # else all of it were prediction layers
            entries = _aligned(entries)
            found[header.path.name] = (encode_header(entries, header.metadata), entries)
    lost = [name for name in known if name not in seen and name not in repeated(source.shape)]
    problems += [f"{name}: the pattern has no such tensor" for name in lost]
    refuse(problems, f"{pattern.path} is of another model than {source.folder.path}")
    return found


def _layer_of(name: str) -> int:
    """Return the layer's number in a tensor's name, -1 without one."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _like(
    name: str, dtype: str, shape: tuple[int, ...], request: Request, has_fp8: bool
) -> list[Entry]:
    """Return the entries that take the place of a pattern's tensor.

    A pattern in FP8 says itself which weights are; of another, those that releases store so.
    """
    plain = {"bf16": "BF16", "fp32": "F32", "fp8": "BF16"}[request.weights]
    if name.endswith(SCALE):
        wide = dtype if request.original_scales else "F32"
        return [(name, wide, shape)] if request.weights == "fp8" else []
    is_fp8 = dtype == "F8_E4M3" if has_fp8 else is_linear(name, shape)
    if request.weights != "fp8" or not is_fp8:
        return [(name, plain, shape)]
    scale = [] if has_fp8 else [(name + SCALE, "F32", num_blocks(shape))]
    return [(name, "F8_E4M3", shape), *scale]


def _fresh_shards(source: MegatronSource, request: Request) -> dict[str, tuple[bytes, list[Entry]]]:
    groups: list[list[Entry]] = [[]]
    filled = 0
    for name, shape, fp32 in _all_tensors(source):
        entries = [(name, "F32", shape)] if fp32 else _like(name, "BF16", shape, request, False)
        num_bytes = sum(map(_num_bytes, entries))
        if groups[-1] and filled + num_bytes > request.shard_bytes:
            groups.append([])
            filled = 0
        groups[-1] += entries
        filled += num_bytes
    count = len(groups)
    names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    return {
        name: (encode_header(_aligned(group), {"format": "pt"}), _aligned(group))
        for name, group in zip(names, groups, strict=True)
    }


def _all_tensors(source: MegatronSource) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield name, shape and whether it is always fp32, with what prediction layers repeat."""
    shapes = {region.name: region.shape for region in source.regions}
    yield from ((region.name, region.shape, region.fp32) for region in source.regions)
    yield from ((name, shapes[main], False) for name, main in repeated(source.shape).items())


def _aligned(entries: list[Entry]) -> list[Entry]:
    """Return a shard's tensors, wide items first: then each begins at a multiple of its items."""
    return sorted(entries, key=lambda entry: -ITEM_BYTES[entry[1]])


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether the releases store a matrix in FP8: attention and feed-forward, not the gate."""
    if len(shape) != 2 or name.endswith((".mlp.gate.weight", ".eh_proj.weight")):
        return False
    return ".self_attn." in name or ".mlp." in name


def _num_bytes(entry: Entry) -> int:
    return math.prod(entry[2]) * ITEM_BYTES[entry[1]]


def _beside(
    request: Request, weight_map: Mapping[str, str], num_bytes: int, num_shards: int
) -> dict[str, bytes]:
    """Return the small files and the index; the pattern's own bytes where they are right."""
    if request.as_released:
        found = {path.name: path.read_bytes() for path in request.small_files}
    else:
        found = small_files(
            request.small_files, request.config, request.weights, request.mtp_num_layers
        )
    found |= request.extra_files
    given = request.pattern.index if request.pattern is not None else None
    kept = json.loads(given) if given is not None else {}
    if given is not None and kept["weight_map"] == weight_map:
        total = (kept.get("metadata") or {}).get("total_size")
        if request.as_released or total == num_bytes:
            return found | {INDEX: given}
    if given is not None or num_shards > 1:
        found[INDEX] = index(weight_map, num_bytes)
    return found
