"""The index and the shards that are there: names, sizes, dtypes, shapes, scales and headers.

What should be there follows from the name table and from the rule by which an export writes FP8.
No tensor is read; a folder without shards is checked by its index alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.fp8_blocks import num_blocks
from megatron_k2.checkpoint.hf.folder import INDEX, SINGLE, read_json
from megatron_k2.checkpoint.hf.model import shape_from_config
from megatron_k2.checkpoint.hf.safetensors_header import ITEM_BYTES, Header, Tensor, read_header
from megatron_k2.checkpoint.hf.source import SCALE
from megatron_k2.checkpoint.names import IGNORED_SUFFIX, regions
from megatron_k2.checkpoint.release.check import (
    DIFFERS,
    MISSING,
    OK,
    Check,
    compare,
    listed,
    none_of,
)
from megatron_k2.checkpoint.release.check import absent as absent_check
from megatron_k2.checkpoint.release.expected import Expected
from megatron_k2.checkpoint.to_hf import is_linear

Kind = tuple[str, tuple[int, ...]]  # dtype, shape


@dataclass(frozen=True)
class Assumed:
    """The tensors of a release: weights, scales of those in FP8, and its rotary buffers."""

    weights: Mapping[str, Kind]
    num_layers: int
    buffer: Kind | None

    @cached_property
    def buffers(self) -> frozenset[str]:
        """Names of the buffers, which a release has all or none of."""
        layers = range(self.num_layers)
        return frozenset(f"model.layers.{layer}{IGNORED_SUFFIX}" for layer in layers)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all weights and scales."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.weights.values())

    def kind(self, name: str) -> Kind | None:
        """Return a tensor's dtype and shape, None where nothing is assumed."""
        return self.buffer if name in self.buffers else self.weights.get(name)


def assumed_tensors(expected: Expected) -> Assumed:
    """Return the tensors that a release should have."""
    shape = shape_from_config(expected.config)
    fp8 = (expected.config.get("quantization_config") or {}).get("quant_method") == "fp8"
    weights: dict[str, Kind] = {}
    for region in regions(shape):
        if fp8 and is_linear(region.name, region.shape):
            weights[region.name] = ("F8_E4M3", region.shape)
            weights[region.name + SCALE] = ("F32", num_blocks(region.shape))
        else:
            weights[region.name] = ("F32" if region.fp32 else "BF16", region.shape)
    return Assumed(weights, shape.num_layers, expected.buffer)


def check_tensors(folder: Path, expected: Expected) -> Iterator[Check]:
    """Yield the checks of the index and of every shard that is there."""
    assumed = assumed_tensors(expected)
    try:
        index = _read_index(folder)
    except ConversionRefused as error:
        yield Check("index", "readable", "names and shards", str(error), DIFFERS)
        return
    if index is None:
        yield absent_check("index", "every tensor", f"{len(assumed.weights):,} tensors", INDEX)
        return
    weight_map: dict[str, str] = index["weight_map"]
    yield from _check_index(weight_map, index.get("metadata") or {}, assumed)
    yield from _check_shards(folder, weight_map, assumed, expected.metadata)


def _read_index(folder: Path) -> dict[str, Any] | None:
    """Return the index; of a single file, one made from its header; None without either."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConversionRefused(f"{folder / INDEX}: no weight_map")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ConversionRefused(f"{folder / INDEX}: {name} is in {shard!r}, no plain name")
        return index
    if not (folder / SINGLE).is_file():
        return None
    return {
        "weight_map": dict.fromkeys((t.name for t in read_header(folder / SINGLE).tensors), SINGLE)
    }


def _check_index(
    weight_map: Mapping[str, str], metadata: Mapping[str, Any], assumed: Assumed
) -> Iterator[Check]:
    buffers = assumed.buffers & set(weight_map)
    count = len(assumed.weights) + len(buffers)
    yield compare("index", "number of tensors", count, len(weight_map))
    lost = [name for name in assumed.weights if name not in weight_map]
    more = [name for name in weight_map if name not in assumed.weights and name not in buffers]
    yield none_of("index", "tensors that are not there", lost)
    yield none_of("index", "tensors beside these", more)
    scaled = {name.removesuffix(SCALE) for name in weight_map if name.endswith(SCALE)}
    fp8 = {name for name, (dtype, _) in assumed.weights.items() if dtype == "F8_E4M3"}
    found = (
        listed(sorted(scaled ^ fp8)) if len(scaled) == len(fp8) and scaled != fp8 else len(scaled)
    )
    yield compare("index", "weights with scales (FP8)", len(fp8), found)
    apart = [n for n in sorted(scaled) if weight_map.get(n) != weight_map[n + SCALE]]
    note = "harmless here: scales are found by name"
    yield none_of("index", "scales in another shard than their weight", apart, note)
    some = 0 < len(buffers) < assumed.num_layers
    yield Check(
        "index", "rotary inv_freq buffers", f"one a layer ({assumed.num_layers}) or none",
        len(buffers), DIFFERS if some else OK,
    )  # fmt: skip
    yield _check_size(metadata.get("total_size"), len(buffers), assumed)


def _check_size(total: Any, num_buffers: int, assumed: Assumed) -> Check:
    """Compare total_size, which follows from dtypes and shapes: the weights need not be there."""
    name = "total_size (bytes)"
    if total is None:
        return Check("index", name, assumed.num_bytes, "not in the index", MISSING)
    if num_buffers == 0 or assumed.buffer is not None:
        dtype, shape = assumed.buffer or ("BF16", ())
        each = math.prod(shape) * ITEM_BYTES[dtype] if num_buffers else 0
        return compare("index", name, assumed.num_bytes + num_buffers * each, total)
    rest = total - assumed.num_bytes
    fits = 0 < rest <= 1024 * num_buffers and rest % num_buffers == 0
    what = f"{assumed.num_bytes} and {num_buffers} equal small buffers"
    return Check("index", name, what, total, OK if fits else DIFFERS)


def _check_shards(
    folder: Path,
    weight_map: Mapping[str, str],
    assumed: Assumed,
    metadata: tuple[Mapping[str, str], ...],
) -> Iterator[Check]:
    wanted = sorted(set(weight_map.values()))
    here = [name for name in wanted if (folder / name).is_file()]
    away = [name for name in wanted if name not in here]
    if away:
        found = f"{len(here)} are here; not {listed(away)}"
        yield Check("shards", "files", f"{len(wanted)} of the index", found, MISSING)
    else:
        yield compare("shards", "files", f"{len(wanted)} of the index", f"{len(here)} of the index")
    stray = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in wanted)
    yield none_of("shards", "files that the index does not name", stray)
    headers, broken = [], []
    for name in here:
        try:
            headers.append(read_header(folder / name))
        except ConversionRefused as error:
            broken.append(str(error))
    if here:
        yield none_of("shards", "files that are cut short or damaged", broken)
    if headers:
        yield from _check_contents(headers, weight_map, assumed)
        yield from _check_headers(headers, metadata)


def _check_contents(
    headers: list[Header], weight_map: Mapping[str, str], assumed: Assumed
) -> Iterator[Check]:
    tensors = [tensor for header in headers for tensor in header.tensors]
    moved = [t.name for t in tensors if weight_map.get(t.name) != t.path.name]
    names = {tensor.name for tensor in tensors}
    present = {header.path.name for header in headers}
    moved += [n for n, shard in weight_map.items() if shard in present and n not in names]
    yield none_of("shards", "tensors elsewhere than the index says", moved)
    for what, place in (("dtype", 0), ("shape", 1)):
        wrong = list(_unlike(tensors, assumed, place))
        count = f"{len(tensors):,} tensors as assumed"
        yield compare("shards", f"{what}s", count, listed(wrong) or count)


def _check_headers(
    headers: list[Header], metadata: tuple[Mapping[str, str], ...]
) -> Iterator[Check]:
    unordered, odd = [], []
    for header in headers:
        entries = json.loads(header.raw[8:])
        entries.pop("__metadata__", None)
        if list(entries) != [tensor.name for tensor in header.tensors]:
            unordered.append(header.path.name)
        if len(header.raw) % 8:
            odd.append(header.path.name)
    note = "harmless here: headers are kept as they are"
    yield none_of("headers", "keys not in the order of data", unordered, note)
    yield none_of("headers", "data not at a multiple of 8", odd, note)
    known = {json.dumps(kind, sort_keys=True) for kind in metadata}
    kinds = {json.dumps(header.metadata, sort_keys=True) for header in headers}
    status = OK if kinds <= known else DIFFERS
    said, found = (" or ".join(sorted(values)) for values in (known, kinds))
    yield Check("headers", "__metadata__", said, found, status, note if status == DIFFERS else "")


def _unlike(tensors: list[Tensor], assumed: Assumed, place: int) -> Iterator[str]:
    """Yield the tensors whose dtype (place 0) or shape (place 1) is not the assumed one."""
    for tensor in tensors:
        kind = assumed.kind(tensor.name)
        if kind is None:
            continue  # told by the index's checks, or a buffer of unknown kind
        found = (tensor.dtype, tensor.shape)[place]
        if found != kind[place]:
            yield f"{tensor.name} {_said(found)}, not {_said(kind[place])}"


def _said(value: str | tuple[int, ...]) -> str:
    return value if isinstance(value, str) else " x ".join(map(str, value)) or "a scalar"
