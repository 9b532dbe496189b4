"""The torch.save archives inside ``.distcp`` files: one per chunk, at an offset.

An archive is an uncompressed zip; the tensor's bytes are its record ``data/0``, at a multiple of
64 (torch/serialization.py, ``_save`` and ``_load``). It is written without torch, whose import
costs more than a small conversion; its checksum is 0, as under torch's own
``set_crc32_options(False)``, so that nothing around the data depends on it: torch.load reads none.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_k2.checkpoint.errors import CorruptSourceError
from megatron_k2.checkpoint.hf.safetensors_header import ITEM_BYTES
from megatron_k2.checkpoint.torch_dist.inert_pickle import (
    Reference,
    name_of,
    read_pickle,
    record_class,
    write_pickle,
)

DTYPES = {
    "bfloat16": "BF16", "float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""torch's dtype names to those of safetensors, which are used throughout."""

_STORAGES = {
    "BFloat16Storage": "BF16", "FloatStorage": "F32", "HalfStorage": "F16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip


_STORAGE_NAMES = {dtype: n for n, dtype in _STORAGES.items() if not dtype.startswith("F8")}

_ALIGNMENT = 64  # of each record's data, torch's own
# PKWARE's APPNOTE.TXT, 4.3.7, 4.3.12, 4.3.16 and 4.5.1: all little endian.
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_EXTRA = struct.Struct("<2sH")


@dataclass(frozen=True)
class Frame:
    """The bytes before and after a tensor's data in its archive."""

    before: bytes
    after: bytes


@dataclass(frozen=True)
class SavedTensor:
    """A contiguous tensor inside an archive; ``start`` counts from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class _Window(io.RawIOBase):
    """A read-only stretch of an open file, for zipfile."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        data = os.pread(self._descriptor, wanted, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def find_tensor(descriptor: int, start: int, length: int, where: str) -> SavedTensor:
    """Return where an archive keeps its tensor.

    Args:
        descriptor: an open ``.distcp`` file.
        start: first byte of the archive.
        length: bytes of the archive.
        where: named in errors.

    Raises:
        CorruptSourceError: no archive, or its tensor is not contiguous from its storage's begin.
    """
    records = _records(descriptor, start, length, where)
    value = _pickle_of(descriptor, start, records, where)
    if name_of(value) not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        raise CorruptSourceError(f"{where}: holds {name_of(value) or type(value)}, not a tensor")
    try:
        storage, offset, size, stride = value.args[:4]
        dtype = _STORAGES[name_of(storage[1]).rpartition(".")[2]]
        shape = tuple(size.args[0] if name_of(size) == "torch.Size" else size)
        begin, num_bytes = records[f"data/{storage[2]}"]
        is_plain = offset == 0 and tuple(stride) == _contiguous(shape)
        is_plain &= math.prod(shape) * ITEM_BYTES[dtype] <= num_bytes
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        is_plain = False
    if not is_plain:
        raise CorruptSourceError(f"{where}: a tensor that is not plain and contiguous")
    return SavedTensor(dtype, shape, start + begin)


def read_object(descriptor: int, start: int, length: int, where: str) -> Any:
    """Return the value of an archive without tensors, classes as inert records.

    Raises:
        CorruptSourceError: no archive.
    """
    records = _records(descriptor, start, length, where)
    return _pickle_of(descriptor, start, records, where)


@cache
def make_frame(dtype: str, shape: tuple[int, ...]) -> Frame:
    """Return the frame of an archive that torch.load reads as a contiguous tensor."""
    items = math.prod(shape)
    # torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)
    storage = Reference(
        ("storage", record_class("torch", _STORAGE_NAMES[dtype]), "0", "cpu", items)
    )
    rebuild = record_class("torch._utils", "_rebuild_tensor_v2")
    hooks = record_class("collections", "OrderedDict")()
    value = rebuild(storage, 0, shape, _contiguous(shape), False, hooks)
    return _archive(write_pickle(value), items * ITEM_BYTES[dtype])


def save_archive(value: Any) -> bytes:
    """Return an archive of a value without tensors, its bytes a function of the value."""
    frame = _archive(pickle.dumps(value, protocol=2), None)
    return frame.before + frame.after


def _archive(pickled: bytes, data_bytes: int | None) -> Frame:
    """Return a stored zip with the records that torch.load asks for, around ``data/0``."""
    before, after = bytearray(), bytearray()
    directory = bytearray()

    def add(name: str, data: bytes, num_bytes: int, crc: int, into: bytearray, base: int) -> None:
        path = f"archive/{name}".encode()
        at = base + len(into)
        padding = -(at + _LOCAL.size + len(path) + 4) % _ALIGNMENT
        extra = _EXTRA.pack(b"FB", padding) + b"Z" * padding
        common = (20, 0, 0, 0, 0x21, crc, num_bytes, num_bytes, len(path))  # dated 1980-01-01
        into += _LOCAL.pack(b"PK\x03\x04", *common, len(extra)) + path + extra + data
        directory.extend(_CENTRAL.pack(b"PK\x01\x02", 20, *common, 0, 0, 0, 0, 0, at) + path)

    small = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
    for name, data in small.items():
        add(name, data, len(data), zlib.crc32(data), before, 0)
    if data_bytes is not None:
        add("data/0", b"", data_bytes, 0, before, 0)
    end = len(before) + (data_bytes or 0)
    count = len(small) + (data_bytes is not None)
    after += directory
    after += _END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), end, 0)
    return Frame(bytes(before), bytes(after))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, found = 1, []
    for size in reversed(shape):
        found.append(stride)
        stride *= max(1, size)
    return tuple(reversed(found))


def _records(descriptor: int, start: int, length: int, where: str) -> dict[str, tuple[int, int]]:
    window = io.BufferedReader(_Window(descriptor, start, length), 4096)
    found = _zip_records(window, where)
    for name, (begin, num_bytes) in found.items():
        if begin + num_bytes > length:
            raise CorruptSourceError(f"{where}: its record {name} goes beyond its end")
    return found


def _zip_records(stream: Any, where: str) -> dict[str, tuple[int, int]]:
    """Return name (without the archive's own) to (start, bytes) of each record."""
    found = {}
    try:
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{entry.filename} is compressed")
                stream.seek(entry.header_offset)
                local = stream.read(30)
                name, extra = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
                begin = entry.header_offset + 30 + name + extra
                found[entry.filename.partition("/")[2]] = (begin, entry.file_size)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CorruptSourceError(f"{where}: not a torch.save archive ({error})") from error
    return found


def _pickle_of(descriptor: int, start: int, records: dict[str, tuple[int, int]], where: str) -> Any:
    if "data.pkl" not in records:
        raise CorruptSourceError(f"{where}: not a torch.save archive (no data.pkl)")
    begin, length = records["data.pkl"]
    try:
        return read_pickle(os.pread(descriptor, length, start + begin))
    except ValueError as error:
        raise CorruptSourceError(f"{where}: {error}") from error
