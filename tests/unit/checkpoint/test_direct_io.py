"""Reads and writes past the page cache give the bytes that ordinary ones give, at any offset."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_k2.checkpoint.errors import CorruptSourceError
from megatron_k2.checkpoint.stream import direct_io
from megatron_k2.checkpoint.stream.direct_io import Buffer, File, Inputs, create, pages_up
from megatron_k2.checkpoint.stream.units import Matrix, Slab, cut_rows, take_rows

SIZE = 5 * 4096 + 777


@pytest.fixture(params=["direct", "through the cache"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param != "direct":
        monkeypatch.setattr(direct_io, "_open_direct", lambda path, flags: None)
    return tmp_path / "file"


def test_random_stretches_are_read_as_they_lie(path: Path) -> None:
    clock = random.Random(1)
    data = clock.randbytes(SIZE)
    path.write_bytes(data)
    file, buffer = File(path), Buffer()
    assert file.size_bytes == SIZE
    for _ in range(300):
        start = clock.randrange(SIZE)
        count = clock.randint(0, SIZE - start)
        assert file.read(start, count, buffer) == data[start : start + count]
    for start, count in ((SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (10 * SIZE, 1)):
        with pytest.raises(CorruptSourceError, match=f"ends before byte {start + count}"):
            file.read(start, count, buffer)
    file.close()


def test_random_stretches_are_written_where_they_belong(path: Path) -> None:
    clock = random.Random(2)
    create(path, SIZE)
    expected = bytearray(SIZE)
    file, buffer = File(path, writable=True), Buffer()
    for _ in range(150):
        start = clock.randrange(SIZE)
        count = clock.randint(1, SIZE - start)
        lead = start % 4096
        memory = buffer.take(pages_up(lead + count))
        memory[lead : lead + count] = new = clock.randbytes(count)
        file.write(start, memory, count)
        expected[start : start + count] = new
    file.close()
    assert path.read_bytes() == expected
    create(path, SIZE + 5)  # keeps what is there
    assert path.read_bytes() == expected + bytes(5)


def test_matrix_is_put_together_from_slabs_of_several_files(tmp_path: Path) -> None:
    clock = random.Random(3)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(clock.randbytes(9000))
    a, b = (str(tmp_path / name) for name in ("a", "b"))
    slabs = (  # left columns of a in two pieces, right columns of b
        Slab(a, 100, 30, 6, 20, to_row=0),
        Slab(a, 5000, 20, 6, 6, to_row=30),
        Slab(b, 7, 50, 4, 50, to_row=0, to_byte=6),
    )
    matrix = Matrix("BF16", 50, 5, slabs)
    texts = {path: Path(path).read_bytes() for path in (a, b)}
    rows = [bytearray(10) for _ in range(50)]
    for slab in slabs:
        for row in range(slab.rows):
            piece = texts[slab.path][slab.start + row * slab.stride :][: slab.width]
            rows[slab.to_row + row][slab.to_byte : slab.to_byte + slab.width] = piece
    inputs, buffer = Inputs(), Buffer()
    assert inputs.read(matrix, buffer) == b"".join(rows)
    for first, last in ((0, 50), (0, 1), (29, 31), (30, 50), (13, 44)):
        found = inputs.read(take_rows(matrix, first, last), buffer)
        assert found == b"".join(rows[first:last])
    inputs.close()


def test_rows_are_cut_at_blocks_within_the_largest_part() -> None:
    for rows, width in ((1, 1), (127, 10), (163_840, 14_336), (300, 1 << 20), (129, 1 << 27)):
        pieces = cut_rows(rows, width)
        assert [first for first, _ in pieces] == [0, *(last for _, last in pieces[:-1])]
        assert pieces[-1][1] == rows
        assert all(first % 128 == 0 for first, _ in pieces)
        assert all(
            (last - first) * width <= 64 << 20 or last - first <= 128 for first, last in pieces
        )
