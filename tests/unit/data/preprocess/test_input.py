"""Reading: blocks hold each line once, bad input is one line that names the flag and the place."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from megatron_k2.data.preprocess.command import preprocess
from megatron_k2.data.preprocess.line_reader import LineReader
from megatron_k2.data.preprocess.records import BlockReader, Options
from megatron_k2.data.preprocess.sources import find_sources
from tests.unit.data.preprocess.inputs import contents, jsonl, kimi_flags, packed, tokenise


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return kimi_flags(tmp_path_factory.mktemp("kimi"))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_blocks_hold_each_line_once_in_any_order(tmp_path, monkeypatch, suffix: str) -> None:
    """Random lines, sizes of blocks from 1 byte up, reads of a few bytes, blocks out of order."""
    if suffix.endswith("zst"):
        pytest.importorskip("zstandard")
    generator = random.Random(1)
    for case in range(30):
        monkeypatch.setattr(
            "megatron_k2.data.preprocess.line_reader.CHUNK_BYTES", generator.choice([1, 7, 1 << 20])
        )
        lines = [b"x" * generator.choice([0, 1, 5, 60]) + b"\n" for _ in range(case)]
        data = b"".join(lines) + generator.choice([b"", b"tail"])
        (source,) = find_sources([str(packed(tmp_path / f"{case}{suffix}", data))])
        size = generator.choice([1, 3, 10, 100])
        blocks = list(range(len(data) // size + 2))
        if case % 2:
            generator.shuffle(blocks)
        reader, found, last = LineReader(source), {}, set()
        for block in blocks:
            reader.seek(block * size)
            pieces = list(reader.chunks((block + 1) * size))
            for place, piece in pieces:
                assert data[place : place + len(piece)] == piece
            found[block] = b"".join(piece for _, piece in pieces)
            last |= {block} if reader.at_end else set()
        assert b"".join(found[block] for block in sorted(found)) == data
        filled = [block for block in sorted(found) if found[block]]
        assert (filled[-1] if filled else 0) in last
        starts = [0, *(place + 1 for place in range(len(data)) if data[place] == 10)]
        for block, piece in found.items():  # a line is of the block in which it begins
            mine = [s for s in starts if block * size <= s < (block + 1) * size and s < len(data)]
            assert piece.startswith(data[mine[0] : mine[0] + 1] if mine else b"")
            assert (len(piece) > 0) == bool(mine)
        reader.close()


def test_memory_does_not_grow_with_the_file(tmp_path) -> None:
    """20 MB of text, packed small: the reader never holds more than a few chunks."""
    import tracemalloc

    path = packed(tmp_path / "a.jsonl.gz", b'{"text": "%s"}\n' % (b"word " * 200) * 20_000)
    (source,) = find_sources([str(path)])
    reader, documents = BlockReader(Options(block_bytes=4 << 20)), 0
    tracemalloc.start()
    block = 0
    while not reader.is_last:
        documents += sum(len(batch.places) for batch in reader.read(source, block))
        block += 1
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    reader.close()
    assert documents == 20_000 and block == 5
    assert peak_bytes < 8 << 20


BAD_LINES = {
    b'{"text": "a"}\n\n{"text": 1}\n': "line 3 has no text.*holds no string",
    b'{"text": "a"}\n{"body": "b"}\n': r"line 2 has no text.*not among \['body'\].*--json-keys",
    b'{"text": "a"}\n["text"]\n': "line 2 is no JSON object",
    b'{"text": "a"\n{"text": "a"}\n': "line 1 is not JSON",
    b'{"text": "a"}\n{"text": "\xff"}\n': "line 2 is not UTF-8",
    b'{"text": "a"}\n{"text": null}\n': "line 2 has no text",
    b'{"text": "a"}\n{"text": ["b", 3]}\n': "line 2 has no text",
    b'{"text": "a"}\n' + b"[" * 100_000 + b"\n": "line 2 is JSON of too many levels",
}


@pytest.mark.parametrize("data", BAD_LINES, ids=[m[:24] for m in BAD_LINES.values()])
def test_a_bad_line_is_named_or_left_out_when_asked(kimi, tmp_path, data: bytes) -> None:
    path = packed(tmp_path / "a.jsonl", data)
    with pytest.raises(ValueError, match=f"--input .*a.jsonl: {BAD_LINES[data]}"):
        tokenise(tmp_path / "o", [path], *kimi, "--block-bytes", "16")
    prefix = tokenise(tmp_path / "skip", [path], *kimi, "--skip-bad-records")
    totals = json.loads(Path(f"{prefix}.json").read_text())["totals"]
    assert totals["num_bad"] == 1
    assert totals["num_documents"] == (b'{"text": "a"}' in data)


def test_what_the_fast_parser_refuses_is_read_all_the_same(kimi, tmp_path) -> None:
    lines = [b'{"text": "a\\ud800b", "n": NaN}', b'{"text": "c", "n": 1%s}' % (b"0" * 400)]
    path = packed(tmp_path / "a.jsonl", b"\r\n".join(lines))
    same = jsonl(tmp_path / "b.jsonl", ["a\ufffdb", "c"])
    ours, theirs = (
        contents(tokenise(tmp_path / p.stem, [p], *kimi))["_text_document.bin"]
        for p in (path, same)
    )
    assert ours == theirs


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_cut_short_is_an_error_not_a_short_corpus(kimi, tmp_path, suffix: str) -> None:
    if suffix.endswith("zst"):
        pytest.importorskip("zstandard")
    path = jsonl(tmp_path / f"a{suffix}", ["some words " * 50] * 500)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=r"--input .*a\.jsonl.*: damaged after [\d,]+ decompressed"
    ):
        tokenise(tmp_path / "o", [path], *kimi)


def test_wrong_flags_are_named(kimi, tmp_path, capsys) -> None:
    good = jsonl(tmp_path / "a.jsonl", ["a"])
    cases = [
        ([tmp_path / "none.jsonl"], [], "--input .*none.jsonl: no such file"),
        ([f"{tmp_path}/*.nothing"], [], "--input .*: the glob matches no file"),
        ([tmp_path], [], "--input .*: a folder; give a glob"),
        ([packed(tmp_path / "a.tar", b"")], [], "--input .*a.tar: unpack it"),
        ([good], ["--tokenizer-type", "BertWordPieceCase"], "--tokenizer-type BertWordPieceCase"),
        ([good], ["--tokenizer-model", "nowhere"], "nowhere"),
        ([good], ["--json-keys", "text", "text"], "--json-keys text text"),
        ([packed(tmp_path / "bad.parquet", b"PAR1")], [], "not readable as Parquet"),
    ]
    for inputs, flags, message in cases:
        if "Parquet" in message:
            pytest.importorskip("pyarrow")
        with pytest.raises(ValueError, match=message):
            tokenise(tmp_path / "o", inputs, *kimi, *flags)
    assert not list(tmp_path.glob("o_*"))
    with pytest.raises(SystemExit):
        preprocess(["--help"])
    assert "examples:" in capsys.readouterr().out


def test_a_missing_package_is_named_with_its_install_line(kimi, tmp_path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs the package pyarrow.*megatron-k2\[data\]"):
        tokenise(tmp_path / "o", [packed(tmp_path / "a.parquet", b"PAR1")], *kimi)


def test_globs_are_sorted_and_a_file_is_read_once(tmp_path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.JSON.gz", "d.parquet", "e.md"):
        packed(tmp_path / name, b"") if name[0] != "c" else (tmp_path / name).write_bytes(
            gzip.compress(b"")
        )
    found = find_sources([f"{tmp_path}/b.jsonl", f"{tmp_path}/*"])
    assert [Path(source.path).name[0] for source in found] == ["b", "a", "c", "d", "e"]
    assert [source.format for source in found] == ["jsonl"] * 3 + ["parquet", "text"]
    assert found[2].compression == "gzip"
