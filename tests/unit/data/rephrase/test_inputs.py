"""What cannot be is found before anything is asked or written: files, lines, flags, languages."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from megatron_k2.data.rephrase.flag_checks import PromptCheck, check_flags
from megatron_k2.data.rephrase.flags import parser
from megatron_k2.data.rephrase.sources import find_inputs, plan_parts, read_part
from tests.unit.data.rephrase.scripted_server import GERMAN, Plan, serving
from tests.unit.data.rephrase.test_pipeline import flags, records, rephrase, write_corpus

LINES = b"".join(b'{"text": "document %d"}\n' % n for n in range(3000))


def texts(path: Path) -> list[str]:
    parts = plan_parts(find_inputs([str(path)]), 1000, "text", None)
    return [source.text for part in parts for source in read_part(part)]


def test_zstd_of_several_frames_and_a_large_window_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    parts = [zstandard.ZstdCompressor().compress(LINES[:-500])]
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    parts.append(stream.compress(LINES[-500:]) + stream.flush())
    path.write_bytes(b"".join(parts))
    assert texts(path) == [f"document {n}" for n in range(3000)]


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.999])
def test_a_cut_zstd_file_is_an_error_and_not_a_short_corpus(tmp_path: Path, cut: float) -> None:
    path = tmp_path / "a.jsonl.zst"
    whole = zstandard.ZstdCompressor().compress(LINES)
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: damaged after .* within a zstd frame"):
        texts(path)
    path.write_bytes(b"no zstd at all")
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: damaged"):
        texts(path)


def test_a_byte_order_mark_is_skipped_and_parquet_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    assert texts(tmp_path / "a.jsonl") == ["one", "two"] and texts(tmp_path / "b.txt") == ["three"]
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"c\.parquet: Parquet is not read here"):
        texts(tmp_path / "c.parquet")


def test_a_bad_line_ends_the_run_before_anything_is_asked_or_is_skipped_and_counted(
    tmp_path: Path,
) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 6, 5)
    bad = [b"[" * 100_000, b'{"text": 7}', b'{"text": "\xff"}', b"9" * 5000]
    lines = corpus.read_bytes().splitlines()
    corpus.write_bytes(b"\n".join([*lines[:2], bad[0], *lines[2:], *bad[1:]]) + b"\n")
    with serving(Plan()) as server:
        arguments = flags(server, corpus, tmp_path / "out")
        with pytest.raises(ValueError, match=r"line 3 is JSON .* deep; --skip-bad-records"):
            rephrase(*arguments)
        assert server.served.total() == 0 and not (tmp_path / "out").exists()
        assert rephrase(*arguments, "--skip-bad-records") == []
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["documents"], report["bad_records_skipped"]) == (6, 4)
    assert [r["source"]["line"] for r in records(tmp_path / "out")] == [1, 2, 4, 5, 6, 7]


def test_an_id_that_is_half_a_surrogate_pair_does_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x \\ud800", "id": "\\ud800"}')
    skipped: Counter[str] = Counter()
    (part,) = plan_parts([tmp_path / "a.jsonl"], 9, "text", None, skipped)
    (source,) = read_part(part)
    assert (source.text, source.id, skipped.total()) == ("x �", "�", 0)


def arguments(corpus: Path, *extra: str) -> argparse.Namespace:
    return parser().parse_args(
        [
            *("--input", str(corpus), "--output", str(corpus.parent / "out")),
            *("--server", "http://localhost:1/v1", "--model", "m", *extra),
        ]
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(
            ("--server", "localhost:8000/v1"),
            ("--judge-server", "ftp://x"),
            ("--server", "http://"),
        ),
        *(("--timeout-s", "0"), ("--temperature", "nan"), ("--retry-temperature", "-1")),
        *(("--check-processes", "-1"), ("--max-new-tokens", "-5"), ("--max-requests", "-1")),
        *(("--min-similarity", "7"), ("--limit", "0"), ("--language", "xx"), ("--top-p", "0")),
        *(("--tokenizer-model", "."), ("--tokenizer-model", "nosuch"), ("--extra-body", "[1]")),
        *(("--embedder", "hf:nosuch"), ("--entailment", "hf:nosuch"), ("--concurrency", "0")),
    ],
)
def test_a_flag_that_cannot_be_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"\A{flag} {re.escape(value)}") as caught:
        check_flags(arguments(tmp_path / "in.jsonl", flag, value))
    assert "\n" not in str(caught.value)


def test_styles_are_checked_in_each_documents_language_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 2, 5)
    library = ("--styles", "encyclopaedia", "--prompts", str(tmp_path / "prompts"))
    own_prompts(tmp_path / "prompts")
    anything = arguments(corpus, *library)
    check_flags(anything)
    plan_parts([corpus], 9, "text", None, None, PromptCheck(anything))
    with corpus.open("a") as file:
        file.write(json.dumps({"text": GERMAN}) + "\n")
    with pytest.raises(ValueError, match=r"--styles encyclopaedia: known in de: .* line 3 is in"):
        plan_parts([corpus], 9, "text", None, None, PromptCheck(anything))
    english = arguments(corpus, *library, "--language", "en")
    plan_parts([corpus], 9, "text", None, None, PromptCheck(english))
    many = arguments(corpus, *library[:2], "--rephrasings", "9", "--language", "de")
    with pytest.raises(ValueError, match=r"--rephrasings 9: there are \d pairs"):
        check_flags(many)


def own_prompts(folder: Path) -> None:
    """Copy the package's prompts, with another name for a German style."""
    from megatron_k2.data.rephrase import prompts

    folder.mkdir()
    for name in ("en", "de"):
        text = (Path(prompts.__file__).parent / "prompts" / f"{name}.toml").read_text()
        if name == "de":
            text = text.replace("encyclopaedia", "lexikon")
        (folder / f"{name}.toml").write_text(text)
