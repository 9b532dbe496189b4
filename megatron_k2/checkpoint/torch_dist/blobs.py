"""The torch.save archives inside ``.distcp`` files: one per chunk, at an offset.

An archive is an uncompressed zip; the tensor's bytes are its record ``data/0``. To write one
without torch in every worker, torch itself saves a tensor of zeros of each shape once and the
frame around its bytes is kept: with checksums off (``torch.serialization.set_crc32_options``;
torch.load never reads them) nothing else in an archive depends on the data.
"""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_k2.checkpoint.errors import CorruptSourceError
from megatron_k2.checkpoint.torch_dist.inert_pickle import name_of, read_pickle

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
    storage, offset, size, stride = value.args[:4]
    dtype = _STORAGES.get(name_of(storage[1]).rpartition(".")[2])
    shape = tuple(size.args[0] if name_of(size) == "torch.Size" else size)
    if dtype is None or offset != 0 or tuple(stride) != _contiguous(shape):
        raise CorruptSourceError(f"{where}: a tensor that is not plain and contiguous")
    return SavedTensor(dtype, shape, start + records[f"data/{storage[2]}"][0])


def read_object(descriptor: int, start: int, length: int, where: str) -> Any:
    """Return the value of an archive without tensors, classes as inert records.

    Raises:
        CorruptSourceError: no archive.
    """
    records = _records(descriptor, start, length, where)
    return _pickle_of(descriptor, start, records, where)


@cache
def make_frame(dtype: str, shape: tuple[int, ...]) -> Frame:
    """Return the frame of torch's archive of a tensor. Imports torch."""
    import torch

    names = {ours: theirs for theirs, ours in DTYPES.items()}
    # The memory is never touched: a large tensor's bytes are written in one piece and not kept.
    tensor = torch.empty(shape, dtype=getattr(torch, names[dtype]))
    stream = _FrameStream(tensor.nbytes)
    _save(tensor, stream)
    if stream.after is None:  # a small one is told by its place in the archive
        archive = bytes(stream.before)
        data_start, data_bytes = _zip_records(io.BytesIO(archive), "frame")["data/0"]
        return Frame(archive[:data_start], archive[data_start + data_bytes :])
    return Frame(bytes(stream.before), bytes(stream.after))


def save_archive(value: Any) -> bytes:
    """Return torch.save's archive of a value, its bytes a function of the value. Imports torch."""
    stream = io.BytesIO()
    _save(value, stream)
    return stream.getvalue()


def _save(value: Any, stream: Any) -> None:
    import torch

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(value, stream)
    finally:
        torch.serialization.set_crc32_options(before)


class _FrameStream:
    """Keeps what is written before and after the one long piece: the tensor's bytes."""

    _LONG = 1 << 16  # everything else in an archive is shorter

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self.before = bytearray()
        self.after: bytearray | None = None

    def write(self, data: Any) -> int:
        data = memoryview(data)
        if data.nbytes == self._num_bytes >= self._LONG and self.after is None:
            self.after = bytearray()
        elif self.after is None:
            self.before += data
        else:
            self.after += data
        return data.nbytes

    def flush(self) -> None:
        pass


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, found = 1, []
    for size in reversed(shape):
        found.append(stride)
        stride *= max(1, size)
    return tuple(reversed(found))


def _records(descriptor: int, start: int, length: int, where: str) -> dict[str, tuple[int, int]]:
    window = io.BufferedReader(_Window(descriptor, start, length), 4096)
    return _zip_records(window, where)


def _zip_records(stream: Any, where: str) -> dict[str, tuple[int, int]]:
    """Return name (without the archive's own) to (start, bytes) of each record."""
    found = {}
    try:
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                stream.seek(entry.header_offset)
                local = stream.read(30)
                name, extra = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
                begin = entry.header_offset + 30 + name + extra
                found[entry.filename.partition("/")[2]] = (begin, entry.file_size)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
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
