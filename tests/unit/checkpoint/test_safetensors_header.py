"""Headers are read as the safetensors library reads them; whatever is wrong is refused by name."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from megatron_k2.checkpoint.errors import CorruptSourceError
from megatron_k2.checkpoint.hf.safetensors_header import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    encode_header,
    read_header,
)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NUM_CASES = 2000
ODD_VALUES = [
    -1, -0.0, 1.5, 1e3, 1e400, True, False, None, "", "3", "F32", "f32", [], [0], [0, 0], {},
    1 << 31, 1 << 61, 1 << 63, 1 << 64, 1 << 200, [1 << 40, 1 << 40], [1 << 40, 1 << 40, 0], [[2]],
    "\ud800", {"a": 1}, [0, 8, 8], [8, 0],
]  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 4), (7,)]
    found = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        values = torch.randint(0, 2, shapes[number % len(shapes)], generator=generator)
        found[f"layers.{number}.{name}/ü"] = values.to(dtype)
    return found


def assert_same_as_the_library(path: Path) -> None:
    header = read_header(path)
    data = path.read_bytes()
    with safe_open(path, "pt") as file:
        assert {tensor.name for tensor in header.tensors} == set(file.keys())
        assert header.metadata == (file.metadata() or {})
        for tensor in header.tensors:
            theirs = file.get_tensor(tensor.name)
            assert theirs.dtype == DTYPES[tensor.dtype]
            assert tuple(theirs.shape) == tensor.shape
            raw = theirs.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            assert raw == data[tensor.start : tensor.start + tensor.num_bytes], tensor.name


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file(some_tensors(), tmp_path / "file", metadata)
        assert_same_as_the_library(tmp_path / "file")
    assert DTYPES.keys() == ITEM_BYTES.keys()


def test_empty_file_of_no_tensors_is_read(tmp_path: Path) -> None:
    save_file({}, tmp_path / "file")
    assert read_header(tmp_path / "file").tensors == ()


def test_written_headers_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = [("b", "BF16", (3, 5)), ("a", "F32", (2,)), ("é", "F8_E4M3", (1, 1)), ("z", "U8", ())]
    header = encode_header(tensors, {"format": "pt"})
    assert len(header) % 8 == 0
    (tmp_path / "file").write_bytes(header + bytes(30 + 8 + 1 + 1))
    assert_same_as_the_library(tmp_path / "file")
    found = read_header(tmp_path / "file")
    assert [(t.name, t.dtype, t.shape) for t in found.tensors] == tensors
    assert found.raw == header


@cache
def good_file() -> bytes:
    return save(some_tensors(), {"format": "pt"})


def parts() -> tuple[dict[str, Any], bytes]:
    """Return a good file's header and data."""
    whole = good_file()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(header: dict[str, Any], number: int = 3) -> dict[str, Any]:
    found: dict[str, Any] = header[[name for name in header if name != "__metadata__"][number]]
    return found


def with_entry(**changes: Any) -> bytes:
    header, data = parts()
    entry(header).update(changes)
    return join(header, data)


def twice() -> bytes:
    header, data = parts()
    text = json.dumps(header)
    first = next(iter(header.keys() - {"__metadata__"}))
    again = f"{json.dumps(first)}: {json.dumps(header[first])}"
    return join((text[:-1] + ", " + again + "}").encode(), data)


def shifted(by: int) -> bytes:
    header, data = parts()
    last = max(
        (e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"]
    )
    last["data_offsets"] = [n + by for n in last["data_offsets"]]
    return join(header, data + bytes(max(0, by)))


WRONG: dict[str, Callable[[], bytes]] = {
    "empty file": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "no header": lambda: bytes(8),
    "length past the end": lambda: (1 << 20).to_bytes(8, "little") + b"{}",
    "length of eight exabytes": lambda: b"\xff" * 8 + b"{}",
    "cut inside the header": lambda: join(*parts())[:40],
    "cut by one byte": lambda: join(*parts())[:-1],
    "one byte too many": lambda: join(*parts()) + b"\0",
    "not JSON": lambda: join(b"hello", b""),
    "not UTF-8": lambda: join(b'{"\xff": 1}', b""),
    "a list": lambda: join([1, 2], b""),
    "a string": lambda: join("x", b""),
    "deep nesting": lambda: join(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "deep and open": lambda: join(b"[" * 500_000, b""),
    "the same name twice": twice,
    "offsets overlap": lambda: shifted(-1),
    "a hole": lambda: shifted(8),
    "unknown dtype": lambda: with_entry(dtype="F7"),
    "dtype of another width": lambda: with_entry(dtype="F64"),
    "dtype is a list": lambda: with_entry(dtype=["F32"]),
    "negative size": lambda: with_entry(shape=[-3, -5]),
    "huge sizes": lambda: with_entry(shape=[1 << 62, 1 << 62]),
    "sizes beyond 64 bits": lambda: with_entry(shape=[1 << 90]),
    "huge but empty": lambda: with_entry(shape=[1 << 40, 1 << 40, 0], data_offsets=[0, 0]),
    "bool size": lambda: with_entry(shape=[True, 15]),
    "float size": lambda: with_entry(shape=[3.0, 5]),
    "shape is no list": lambda: with_entry(shape=""),
    "one offset": lambda: with_entry(data_offsets=[0]),
    "offsets backwards": lambda: with_entry(data_offsets=[30, 0]),
    "negative offset": lambda: with_entry(data_offsets=[-30, 0]),
    "offsets are text": lambda: with_entry(data_offsets="00"),
    "entry without dtype": lambda: join({"a": {"shape": [], "data_offsets": [0, 0]}}, b""),
    "entry is no object": lambda: join({"a": 3}, b""),
    "half a surrogate pair": lambda: join(
        {"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, b""
    ),
    "metadata is no object": lambda: join({"__metadata__": 3}, b""),
    "metadata holds numbers": lambda: join({"__metadata__": {"format": 3}}, b""),
    "NaN among the numbers": lambda: join(b'{"__metadata__": {}, "a": NaN}', b""),
    "minus nought": lambda: join(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(WRONG[name]())
    with pytest.raises(CorruptSourceError, match="model-00001-of-00002"):
        read_header(path)
    if name == "the same name twice":
        return  # the library takes the last
    with pytest.raises((SafetensorError, ValueError, OSError)):
        safe_open(path, "pt").keys()


def test_header_longer_than_the_library_allows_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # a sparse file
    with pytest.raises(CorruptSourceError, match="100000001 bytes"):
        read_header(path)


@pytest.mark.parametrize("kind", ["missing", "a folder", "no permission to read"])
def test_unreadable_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        if os.geteuid() == 0:
            pytest.skip("root reads every file")
        path.touch(mode=0)
    with pytest.raises(CorruptSourceError, match=r"model\.safetensors"):
        read_header(path)


def mutated(clock: random.Random) -> bytes:
    """Return a good file with one to three random changes of its bytes or of its JSON."""
    header, data = parts()
    text = json.dumps(header)
    if clock.random() < 0.5:
        for _ in range(clock.randint(1, 2)):
            names = list(header)
            name = clock.choice(names)
            target = header[name]
            kind = clock.randrange(5)
            if kind == 0 and isinstance(target, dict) and target:
                target[clock.choice(list(target))] = clock.choice(ODD_VALUES)
            elif kind == 1 and name != "__metadata__" and isinstance(target, dict):
                numbers = target.get(clock.choice(["shape", "data_offsets"]))
                if isinstance(numbers, list) and numbers:
                    place = clock.randrange(len(numbers))
                    numbers[place] = clock.choice([*ODD_VALUES, clock.randrange(200)])
            elif kind == 2:
                header[name] = clock.choice(ODD_VALUES)
            elif kind == 3:
                header[clock.choice(["", "x", "__metadata__", name + "\0"])] = header.pop(name)
            elif isinstance(target, dict):
                target[clock.choice(["extra", "shape", "strides"])] = clock.choice(ODD_VALUES)
        text = json.dumps(header)
    raw = bytearray(join(text.encode(), data))
    for _ in range(clock.randint(0, 3)):
        place = clock.randrange(min(len(raw), clock.choice([8, 300, len(raw)])))
        kind = clock.randrange(5)
        if kind == 0:
            raw[place] ^= 1 << clock.randrange(8)
        elif kind == 1:
            raw[place:place] = clock.randbytes(clock.randint(1, 9))
        elif kind == 2:
            del raw[place : place + clock.randint(1, 9)]
        elif kind == 3:
            raw[place : place + 1] = clock.choice([b"{", b"}", b'"', b",", b"-", b"0", b" ", b"["])
        else:
            del raw[place:]
        raw = raw or bytearray(1)
    return bytes(raw)


def test_random_damage_is_refused_or_read_as_the_library_reads_it(tmp_path: Path) -> None:
    clock = random.Random(7)
    path = tmp_path / "file"
    accepted = 0
    for case in range(NUM_CASES):
        path.write_bytes(mutated(clock))
        try:
            read_header(path)
        except CorruptSourceError:
            continue
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        accepted += 1
        try:
            assert_same_as_the_library(path)
        except Exception as error:
            raise AssertionError(f"case {case}: {error}: {path.read_bytes()[:3000]!r}") from error
    assert NUM_CASES // 50 < accepted < NUM_CASES  # both kinds occur


def test_offsets_are_those_of_the_data(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5, dtype=torch.int32)}, tmp_path / "file")
    (tensor,) = read_header(tmp_path / "file").tensors
    data = (tmp_path / "file").read_bytes()[tensor.start :][: tensor.num_bytes]
    assert np.array_equal(np.frombuffer(data, np.int32), np.arange(5))
