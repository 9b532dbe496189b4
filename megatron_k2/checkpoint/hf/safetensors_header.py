"""Headers of safetensors files, read strictly and written byte for byte as asked.

The format (https://github.com/huggingface/safetensors, README, Format): eight bytes of header
length, little endian; a JSON object of name to dtype, shape and data offsets; the data without
holes. The library maps whole files and hides the offsets that a streaming converter needs; what it
checks is checked here too, from the header alone: length, JSON, known dtypes, offsets in order,
without overlap or hole, ending with the file; and no name twice, of which it takes the last.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_k2.checkpoint.errors import CorruptSourceError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4,
    "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the format's dtype names."""
_MINUS_NOUGHT = re.compile(r"[\[,]\s*-0")  # which Python takes for 0
_FIELDS = {"dtype", "shape", "data_offsets"}
_LARGEST = 1 << 60  # of any count; times 8 bytes it stays within 64 bits, as the library asks


class Tensor(NamedTuple):
    """Where one tensor's bytes lie: ``[start, start + num_bytes)`` of ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """One file's tensors in the order of their data, and the header as it stands in the file."""

    path: Path
    raw: bytes  # length and JSON, padding included
    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        CorruptSourceError: the file is cut short, or its header does not describe it.
    """
    try:
        with open(path, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
                raise CorruptSourceError(
                    f"{path}: a header of {length} bytes in a file of {size}: cut short, or not "
                    "safetensors"
                )
            text = stream.read(length)
    except OSError as error:
        raise CorruptSourceError(f"{path}: {error.strerror or error}") from error
    return parse_header(path, prefix + text, size)


def parse_header(path: Path, raw: bytes, size: int | None) -> Header:
    """Check the first bytes of a file.

    Args:
        path: the file, named in errors and in the tensors.
        raw: length and JSON.
        size: bytes of the file; None if it is not there.

    Raises:
        CorruptSourceError: the header does not describe such a file.
    """
    length = len(raw) - 8
    try:
        text = raw[8:].decode("utf-8")
        if _MINUS_NOUGHT.search(text):
            raise ValueError("-0 is no whole number")
        entries = json.loads(text, object_pairs_hook=_no_twins)
        metadata = _strings(entries.pop("__metadata__", {}))
        tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    except CorruptSourceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptSourceError(f"{path}: unreadable header ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    _check_cover(path, tensors, 8 + length, size)
    return Header(path, raw, tuple(tensors), metadata)


def encode_header(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """Return the first bytes of a file that holds these tensors, in this order.

    Args:
        tensors: name, dtype and shape of each.
        metadata: ``__metadata__``; transformers wants ``{"format": "pt"}``.

    Returns:
        Length and JSON, padded with spaces so that the data begins at a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} twice")
    return found


def _strings(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise ValueError("__metadata__ is no object of strings")
    for text in (*metadata, *metadata.values()):
        text.encode("utf-8")  # half a surrogate pair is no text
    return metadata


def _tensor(path: Path, name: str, entry: dict[str, Any], base: int) -> Tensor:
    name.encode("utf-8")
    if entry.keys() != _FIELDS:
        raise ValueError(f"{name!r}: has {', '.join(entry)}, not {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{name!r}: shape and data_offsets are no lists of numbers")
    for number in (*shape, *offsets):
        if type(number) is not int or not 0 <= number <= _LARGEST:
            raise ValueError(f"{name!r}: shape or offsets are no whole numbers in range")
    if math.prod(number or 1 for number in shape) > _LARGEST:
        raise ValueError(f"{name!r}: {shape} is too large")
    start, end = offsets
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name!r}: dtype {dtype!r} is unknown")
    tensor = Tensor(name, dtype, tuple(shape), path, base + start)
    if end - start != tensor.num_bytes:
        raise ValueError(f"{name!r}: {end - start} bytes for {dtype} {shape}")
    return tensor


def _check_cover(path: Path, tensors: list[Tensor], begin: int, size: int | None) -> None:
    position = begin
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps another" if tensor.start < position else "leaves a hole before it"
            raise CorruptSourceError(f"{path}: tensor {tensor.name!r} {kind}")
        position += tensor.num_bytes
    if size is not None and position != size:
        raise CorruptSourceError(
            f"{path}: {size} bytes, its header says {position}: cut short, or bytes at the end"
        )
