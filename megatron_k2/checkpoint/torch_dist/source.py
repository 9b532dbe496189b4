"""A ``torch_dist`` checkpoint as the weights of a model: which bytes make which Hugging Face
tensor.

Reads what any layout saved: chunks of TP, PP and EP ranks, a padded vocabulary, experts stacked or
one by one (``singleton_local_shards``), layers by number or stacked, multi-token-prediction
layers. Optimizer state, random states and the like are skipped; a model tensor that the table does
not know is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_k2.adapters import is_adapter
from megatron_k2.checkpoint.errors import ConversionRefused, CorruptSourceError, refuse
from megatron_k2.checkpoint.hf.model import ModelShape
from megatron_k2.checkpoint.hf.safetensors_header import ITEM_BYTES
from megatron_k2.checkpoint.names import Region, regions
from megatron_k2.checkpoint.stream.kernels import cast
from megatron_k2.checkpoint.stream.units import Matrix, Part, Slab, as_matrix, take_rows
from megatron_k2.checkpoint.torch_dist.blobs import find_tensor, make_frame
from megatron_k2.checkpoint.torch_dist.folder import Chunk, GlobalTensor, TorchDistFolder

_NO_WEIGHTS = ("optimizer.", "rng_state", "rerun_state", "chained_", "opt_param_scheduler")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class MegatronSource:
    """A checked checkpoint: every region of the model is there, and no tensor beside them."""

    folder: TorchDistFolder
    shape: ModelShape
    places: Mapping[str, tuple[GlobalTensor, tuple[int, ...]]]  # by Hugging Face name
    regions: tuple[Region, ...] = field(repr=False)
    skipped_bytes: int = 0  # of optimizer state and the like
    _starts: dict[tuple[str, int], int] = field(default_factory=dict, repr=False)
    _by_expert: dict[str, dict[int, list[Chunk]]] = field(default_factory=dict, repr=False)

    @cached_property
    def _by_name(self) -> dict[str, Region]:
        return {region.name: region for region in self.regions}

    def dtype(self, name: str) -> str:
        """Return the dtype that a Hugging Face tensor has on Megatron's side."""
        return self.places[name][0].dtype

    def matrix(self, region: Region) -> Matrix:
        """Return a region's bytes, from all chunks that hold some of it.

        Raises:
            CorruptSourceError: a chunk is not readable.
            ConversionRefused: no chunk holds a part of it.
        """
        tensor, offset = self.places[region.name]
        rows, columns = as_matrix(region.shape)
        slabs, covered = [], 0
        for chunk in self._near(region, tensor, offset):
            slab = self._overlap(tensor.dtype, chunk, offset, (rows, columns))
            if slab is not None:
                slabs.append(slab)
                covered += slab.rows * slab.width
        if covered != rows * columns * ITEM_BYTES[tensor.dtype]:
            refuse([f"{region.name}: its chunks hold {covered} bytes of it"], str(self.folder.path))
        return Matrix(tensor.dtype, rows, columns, tuple(slabs))

    def part(self, name: str, dtype: str, first: int, last: int) -> Part:
        """Return the part that makes rows ``[first, last)`` of a Hugging Face tensor."""
        piece = take_rows(self.matrix(self._by_name[name]), first, last)
        kernel = cast(piece.dtype, dtype)
        return Part(0, kernel, dtype, (last - first, piece.columns), (piece,), name=name)

    def _near(
        self, region: Region, tensor: GlobalTensor, offset: tuple[int, ...]
    ) -> Sequence[Chunk]:
        """Return the chunks that hold some of one expert; of a matrix, all chunks."""
        if len(tensor.shape) < 3:
            return tensor.chunks
        if region.key not in self._by_expert:
            table: dict[int, list[Chunk]] = {}
            for chunk in tensor.chunks:
                for index in range(chunk.offset[0], chunk.offset[0] + chunk.size[0]):
                    table.setdefault(index, []).append(chunk)
            self._by_expert[region.key] = table
        return self._by_expert[region.key].get(offset[0], [])

    def _overlap(
        self, dtype: str, chunk: Chunk, offset: tuple[int, ...], size: tuple[int, int]
    ) -> Slab | None:
        """Return the part of a chunk that lies in a region of ``size`` at ``offset``."""
        *lead, chunk_row, chunk_column = _pad(chunk.offset)
        *lead_size, chunk_rows, chunk_columns = _pad(chunk.size, fill=1)
        *wanted, row, column = _pad(offset)
        index = 0
        for at, begin, count in zip(wanted, lead, lead_size, strict=True):
            if not begin <= at < begin + count:
                return None
            index = index * count + at - begin
        first, last = max(row, chunk_row), min(row + size[0], chunk_row + chunk_rows)
        left = max(column, chunk_column)
        right = min(column + size[1], chunk_column + chunk_columns)
        if first >= last or left >= right:
            return None
        item = ITEM_BYTES[dtype]
        place = (index * chunk_rows + first - chunk_row) * chunk_columns + left - chunk_column
        return Slab(
            str(chunk.path),
            self._start(chunk, dtype) + place * item,
            last - first,
            (right - left) * item,
            chunk_columns * item,
            first - row,
            (left - column) * item,
        )

    def _start(self, chunk: Chunk, dtype: str) -> int:
        """Return where a chunk's bytes begin in its file."""
        key = (str(chunk.path), chunk.start)
        if key not in self._starts:
            try:
                descriptor = os.open(chunk.path, os.O_RDONLY)
            except OSError as error:
                raise CorruptSourceError(f"{chunk.path}: {error.strerror or error}") from error
            try:
                self._starts[key] = _start_of(descriptor, chunk, dtype)
            finally:
                os.close(descriptor)
        return self._starts[key]


def _start_of(descriptor: int, chunk: Chunk, dtype: str) -> int:
    frame = make_frame(dtype, chunk.size)  # as this converter writes it
    if os.pread(descriptor, len(frame.before), chunk.start) == frame.before:
        return chunk.start + len(frame.before)
    where = f"{chunk.path} at byte {chunk.start}"
    found = find_tensor(descriptor, chunk.start, chunk.num_bytes, where)
    if (found.dtype, found.shape) != (dtype, chunk.size):
        raise CorruptSourceError(
            f"{where}: {found.dtype} {found.shape}, the metadata says {dtype} {chunk.size}"
        )
    return found.start


def open_source(folder: TorchDistFolder, shape: ModelShape) -> MegatronSource:
    """Check a checkpoint against the name table; no tensor is read.

    Raises:
        ConversionRefused: missing, extra or mis-shaped tensors; every problem in one message.
    """
    problems: list[str] = []
    places = {}
    used = set()
    wanted = tuple(regions(shape))
    for region in wanted:
        found = _locate(folder, region)
        if found is None:
            problems.append(f"{region.key}: missing (for {region.name})")
            continue
        key, tensor, whole, offset = found
        used.add(key)
        padded = region.key in _VOCABULARY and tensor.shape[0] >= whole[0]
        if tensor.shape != whole and not (padded and tensor.shape[1:] == whole[1:]):
            problems.append(f"{key}: {tensor.shape}, the configuration says {whole}")
        elif tensor.dtype not in ("BF16", "F32", "F16"):
            problems.append(f"{key}: {tensor.dtype} is not among the dtypes that are read")
        else:
            places[region.name] = (tensor, offset)
    skipped = [key for key in folder.tensors if key.startswith(_NO_WEIGHTS)]
    extra = [key for key in folder.tensors if key not in used and not key.startswith(_NO_WEIGHTS)]
    if any(is_adapter(key) for key in extra):
        raise ConversionRefused(
            f"{folder.path}: holds adapters; `megatron-k2 lora export` writes them as PEFT's, "
            "and `megatron-k2 lora merge` adds those to the Hugging Face folder of their base"
        )
    problems += [f"{key}: nothing on Hugging Face's side takes it" for key in extra]
    refuse(problems, f"{folder.path} does not fit its configuration")
    num_bytes = sum(chunk.num_bytes for key in skipped for chunk in folder.tensors[key].chunks)
    return MegatronSource(folder, shape, places, wanted, num_bytes)


def _locate(
    folder: TorchDistFolder, region: Region
) -> tuple[str, GlobalTensor, tuple[int, ...], tuple[int, ...]] | None:
    """Return (key, tensor, expected global shape, offset) in the form the tensor was saved in."""
    for key, whole, offset in _forms(folder, region):
        if key in folder.tensors:
            return key, folder.tensors[key], whole, offset
    return None


def _forms(
    folder: TorchDistFolder, region: Region
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    forms = [(region.key, region.global_shape, region.offset)]
    if len(region.global_shape) == 3:  # experts saved one by one, gate and up apart
        stem = region.key.replace(".experts.experts.", f".experts.experts.{region.offset[0]}.")
        half = region.global_shape[1] != region.size[1]
        forms.append((stem, region.global_shape[1:], region.offset[1:]))
        if half:
            suffix = "_w" if region.offset[1] == 0 else "_v"
            forms.append((stem + suffix, region.size[1:], (0, 0)))
    elif region.global_shape != region.size:  # a dense gate or up projection, apart
        suffix = "_w" if region.offset[0] == 0 else "_v"
        forms.append((region.key + suffix, region.size, (0, 0)))
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", region.key)
    if layer:  # layers stacked along a leading axis
        key = f"decoder.layers.{layer[2]}"
        if key in folder.tensors:
            depth = folder.tensors[key].shape[0]
            forms.append((key, (depth, *region.global_shape), (int(layer[1]), *region.offset)))
    return forms


def _pad(values: tuple[int, ...], fill: int = 0) -> tuple[int, ...]:
    """Return at least two axes: a vector is one row."""
    return values if len(values) > 1 else (fill, *values)
