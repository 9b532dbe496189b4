"""tools/preprocess_data.py: the bytes that stock Megatron writes, whatever the input's form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_k2.data.kimi_tokenizer import KimiMegatronTokenizer
from megatron_k2.data.preprocess.command import preprocess
from megatron_k2.data.preprocess.provenance import RECORD, where
from megatron_k2.data.preprocess.sources import find_sources, group_sources
from tests.unit.data.preprocess.inputs import (
    HARD_TEXTS,
    contents,
    jsonl,
    kimi_flags,
    packed,
    texts,
    tokenise,
    write_stock,
)

DOCUMENTS = texts(150)
SMALL_BLOCKS = ["--block-bytes", "3000"]


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return kimi_flags(tmp_path_factory.mktemp("kimi"))


@pytest.fixture(scope="module")
def stock(kimi: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("stock") / "stock"
    write_stock(prefix, DOCUMENTS, KimiMegatronTokenizer(kimi[-1]))
    return prefix


def assert_stock(prefix: Path, stock: Path, key: str = "text") -> None:
    for suffix in (".bin", ".idx"):
        found = Path(f"{prefix}_{key}_document{suffix}").read_bytes()
        assert found == Path(f"{stock}{suffix}").read_bytes(), suffix


@pytest.mark.parametrize(
    ("suffix", "workers"),
    [
        (".jsonl", 1),
        (".jsonl", 2),
        (".jsonl.gz", 1),
        (".jsonl.zst", 2),
        (".parquet", 1),
        *(pytest.param(s, 8, marks=pytest.mark.evidence) for s in (".jsonl", ".jsonl.gz")),
    ],
)
def test_every_form_of_input_gives_upstreams_bytes(kimi, stock, tmp_path, suffix, workers) -> None:
    halves = DOCUMENTS[:60], DOCUMENTS[60:]
    for number, half in enumerate(halves):
        path = tmp_path / f"part-{number}{suffix}"
        if suffix == ".parquet":
            pytest.importorskip("pyarrow")
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"text": half}), path, row_group_size=17)
            continue
        if suffix.endswith("zst"):
            pytest.importorskip("zstandard")
        jsonl(path, half)
    flags = [*kimi, "--append-eod", *SMALL_BLOCKS]
    glob = str(tmp_path / f"part-*{suffix}")
    assert_stock(tokenise(tmp_path / "out", [glob], *flags, workers=workers), stock)
    assert not list(tmp_path.glob("*.partial"))


def test_upstream_reads_it(kimi, tmp_path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = tokenise(
        tmp_path / "o", [jsonl(tmp_path / "a.jsonl", DOCUMENTS)], *kimi, "--append-eod"
    )
    tokenizer = KimiMegatronTokenizer(kimi[-1])
    dataset = IndexedDataset(f"{prefix}_text_document")
    assert len(dataset.document_indices) == len(DOCUMENTS) + 1
    filled = [text for text in DOCUMENTS if text]
    assert len(dataset) == len(filled)
    for row, text in enumerate(filled):
        assert dataset[row].tolist() == [*tokenizer.tokenize(text), tokenizer.eod]


@pytest.mark.parametrize("data", [b"", b"\n\n", b'{"text": ""}\n'])
def test_empty_files_and_documents_are_upstreams_too(kimi, tmp_path, data: bytes) -> None:
    documents = ["a word"] + [""] * data.count(b"text")
    write_stock(tmp_path / "stock", documents, KimiMegatronTokenizer(kimi[-1]))
    word = b'{"text": "a word"}\n'
    inputs = [packed(tmp_path / "a.jsonl", word + data), packed(tmp_path / "b.jsonl.gz", data)]
    for dedup in ("none", "minhash"):
        prefix = tmp_path / dedup
        tokenise(prefix, inputs[:1], *kimi, "--append-eod", "--dedup", dedup)
        assert_stock(prefix, tmp_path / "stock")
    tokenise(tmp_path / "both", inputs, *kimi)
    totals = json.loads((tmp_path / "both.json").read_text())["totals"]
    assert totals["num_empty"] == 2 * data.count(b"text") == totals["num_documents"] - 1


def test_copies_are_left_out_of_all_keys_and_listed(kimi, tmp_path) -> None:
    first = " ".join(f"word{number}" for number in range(300))
    near = first.replace("word7 ", "other ")
    rows = [(first, "1"), ("b", "2"), (first, "1"), (near, "1"), (first, "3"), ("b", "2")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": a, "more": b}) + "\n" for a, b in rows))
    tokenizer = KimiMegatronTokenizer(kimi[-1])
    # The third is a copy of both fields; the fifth of one field only, and so a near copy.
    for dedup, kept in (("none", [0, 1, 2, 3, 4, 5]), ("exact", [0, 1, 3, 4]), ("minhash", [0, 1])):
        prefix = tmp_path / dedup
        flags = ["--dedup", dedup, "--append-eod", "--json-keys", "text", "more"]
        tokenise(prefix, [path], *kimi, *flags, "--block-bytes", "700")
        for column, key in enumerate(("text", "more")):
            write_stock(tmp_path / "stock", [rows[row][column] for row in kept], tokenizer)
            assert_stock(prefix, tmp_path / "stock", key)
        lines = [where(str(prefix), row)["line"] - 1 for row in range(len(kept))]
        assert lines == kept
        if dedup != "none":
            dropped = np.fromfile(f"{prefix}.dropped.bin", dtype=RECORD)
            assert sorted([*(dropped["line"] - 1).tolist(), *kept]) == list(range(6))


def test_lists_are_sentences_and_keys_are_outputs(kimi, tmp_path) -> None:
    sentences = [[text, "", text[:9]] for text in DOCUMENTS[:20]] + [[], [""]]
    path = tmp_path / "a.jsonl"
    rows = [{"s": many, "t": "x".join(many)} for many in sentences]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # blank lines are no records
    tokenizer = KimiMegatronTokenizer(kimi[-1])
    for append_eod in (False, True):
        write_stock(tmp_path / "stock", sentences, tokenizer, append_eod)
        flags = ["--append-eod"] * append_eod
        prefix = tmp_path / f"o{append_eod}"
        tokenise(prefix, [path], *kimi, *flags, "--json-keys", "t", "s")
        assert_stock(prefix, tmp_path / "stock", "s")
        write_stock(tmp_path / "stock", [row["t"] for row in rows], tokenizer, append_eod)
        assert_stock(prefix, tmp_path / "stock", "t")
    tokenise(tmp_path / "split", [path], *kimi, "--json-keys", "s", "--split-sentences")
    assert (tmp_path / "split_s_sentence.idx").exists()
    with pytest.raises(ValueError, match="--split-sentences"):
        tokenise(tmp_path / "no", [path], *kimi, "--json-keys", "t", "--split-sentences")


def test_text_files_are_documents_or_lines(kimi, tmp_path) -> None:
    tokenizer = KimiMegatronTokenizer(kimi[-1])
    whole = ["eins\n\n zwei\r\n", "drei"]
    for number, text in enumerate(whole):
        packed(tmp_path / f"{number}.txt{'.gz' * number}", text.encode())
    inputs = [tmp_path / "0.txt", tmp_path / "1.txt.gz"]
    write_stock(tmp_path / "stock", whole, tokenizer)
    assert_stock(tokenise(tmp_path / "files", inputs, *kimi, "--append-eod"), tmp_path / "stock")
    write_stock(tmp_path / "stock", ["eins", " zwei", "drei"], tokenizer)
    flags = [*kimi, "--append-eod", "--text-documents", "line"]
    assert_stock(tokenise(tmp_path / "lines", inputs, *flags), tmp_path / "stock")


def test_small_text_files_are_read_together_and_told_apart(kimi, tmp_path) -> None:
    whole = [f"text {number} " * (number % 7) for number in range(40)]
    for number, text in enumerate(whole):
        packed(tmp_path / f"{number:02d}.txt", text.encode())
    jsonl(tmp_path / "19.jsonl", ["between"])
    inputs = sorted(tmp_path.glob("[0-9]*"))
    assert len(group_sources(find_sources([*map(str, inputs)]), 150, "file")) < 20
    texts = [
        text for number, text in enumerate(whole) for text in ["between"] * (number == 19) + [text]
    ]
    write_stock(tmp_path / "stock", texts, KimiMegatronTokenizer(kimi[-1]))
    prefix = tokenise(tmp_path / "o", inputs, *kimi, "--append-eod", "--block-bytes", "150")
    assert_stock(prefix, tmp_path / "stock")
    for document, path in enumerate(inputs):
        found = where(str(prefix), document)
        assert (found["file"], found["line"]) == (str(path), 1)


def test_provenance_names_file_line_and_bytes(kimi, tmp_path) -> None:
    paths = [jsonl(tmp_path / name, DOCUMENTS[:50]) for name in ("a.jsonl", "b.jsonl.gz")]
    prefix = tokenise(tmp_path / "o", paths, *kimi, *SMALL_BLOCKS)
    lines = paths[0].read_bytes().splitlines()
    for document in range(100):
        found = where(str(prefix), document)
        assert found["file"] == str(paths[document // 50])
        assert found["line"] == document % 50 + 1
        assert found["num_bytes"] == len(lines[document % 50])
        stop = found["start"] + found["num_bytes"]
        assert paths[0].read_bytes()[found["start"] : stop] == lines[document % 50]
    with pytest.raises(ValueError, match="0 to 99, not 100"):
        where(str(prefix), 100)


def test_control_texts_are_counted_and_stay_text_unless_asked(kimi, tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", HARD_TEXTS)
    tokenizer = KimiMegatronTokenizer(kimi[-1])
    kimi_tokenizer = tokenizer._tokenizer.kimi
    name = next(n for n, i in kimi_tokenizer.special_tokens.items() if n.startswith("<|reserved"))
    path.write_text(path.read_text().replace("<|reserved_token_441|>", name))
    counts = {"<|im_end|>": 2, "[EOS]": 1, name: 1}
    for control_tokens, wanted in (("text", 0), ("ids", 4)):
        prefix = tmp_path / control_tokens
        tokenise(prefix, [path], *kimi, "--control-tokens", control_tokens)
        ids = np.fromfile(f"{prefix}_text_document.bin", dtype=np.uint16)
        assert (ids >= kimi_tokenizer.num_ranks).sum() == wanted
        assert json.loads(Path(f"{prefix}.json").read_text())["totals"]["control_texts"] == counts


def test_a_damaged_output_is_found_out(kimi, tmp_path, capsys) -> None:
    prefix = tokenise(tmp_path / "o", [jsonl(tmp_path / "a.jsonl", DOCUMENTS)], *kimi)
    assert not preprocess(["verify", str(prefix)])
    target = Path(f"{prefix}_text_document.bin")
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    Path(f"{prefix}.provenance.bin").unlink()
    problems = preprocess(["verify", str(prefix)]) or []
    assert len(problems) == 2 and "missing" in "".join(problems)


def test_a_trained_sentencepiece_model_gives_upstreams_bytes(tmp_path) -> None:
    from megatron.core.tokenizers import MegatronTokenizer

    path, model = jsonl(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "spm.model"
    train = ["train-tokenizer", "--input", str(path), "--vocab-size", "420"]
    preprocess([*train, "--output", str(model)])
    preprocess([*train, "--output", str(tmp_path / "again")])
    assert model.read_bytes() == (tmp_path / "again").read_bytes()
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    prefix = tokenise(tmp_path / "o", [path], *flags, "--append-eod")
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(model), metadata_path={"library": "sentencepiece"}
    )
    write_stock(tmp_path / "stock", DOCUMENTS, tokenizer)
    assert_stock(prefix, tmp_path / "stock")


@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)
def test_stock_preprocess_data_writes_the_same_bytes(kimi, tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    tool = Path(os.environ["MEGATRON_LM_PATH"]) / "tools" / "preprocess_data.py"
    command = [sys.executable, "-m", "megatron_k2", "--k2-megatron", "wheel", str(tool)]
    command += ["--input", str(path), "--output-prefix", str(tmp_path / "stock"), *kimi]
    command += ["--append-eod", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    prefix = tokenise(tmp_path / "o", [path], *kimi, "--append-eod")
    ours, theirs = contents(prefix), contents(tmp_path / "stock")
    assert ours["_text_document.bin"] == theirs["_text_document.bin"]
    assert ours["_text_document.idx"] == theirs["_text_document.idx"]
