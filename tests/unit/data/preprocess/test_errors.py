"""Errors are one short line that names the flag; a byte order mark is no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_k2.data.dialogues.command import preprocess as preprocess_dialogues
from megatron_k2.data.preprocess.command import preprocess
from megatron_k2.data.preprocess.provenance import where
from tests.unit.data.preprocess.inputs import contents, jsonl, kimi_flags, packed, tokenise

BINARY = b"\n\xff\xfe\x00" * 2000
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return kimi_flags(tmp_path_factory.mktemp("kimi"))


def test_a_wrong_tokenizer_file_is_named_and_not_printed(tmp_path) -> None:
    path, model = jsonl(tmp_path / "a.jsonl", ["a"]), packed(tmp_path / "sp.model", BINARY)
    cases = [
        ("HuggingFaceTokenizer", model, "a binary file.*SentencePieceTokenizer"),
        ("HuggingFaceTokenizer", packed(tmp_path / "a.json", b"{"), "not a tokenizer.json"),
        ("HuggingFaceTokenizer", packed(tmp_path / "b.json", b"[1]"), "not a tokenizer.json"),
        ("KimiTiktokenTokenizer", model, "line 2: .*base64"),
        ("SentencePieceTokenizer", path, "not a sentencepiece model"),
    ]
    for kind, file, message in cases:
        flags = ["--tokenizer-type", kind, "--tokenizer-model", str(file)]
        with pytest.raises(ValueError, match=f"^--tokenizer-model {file}.*{message}") as refused:
            tokenise(tmp_path / "o", [path], *flags)
        assert len(str(refused.value)) < len(str(file)) + 200
    with pytest.raises(ValueError, match=f"^--tokenizer-model {model}, line 2: .*base64"):
        given = ["--input", str(path), "--output-prefix", str(tmp_path / "s"), "--workers", "1"]
        preprocess_dialogues([*given, "--tokenizer-model", str(model)])
    folder = tmp_path / "kimi"
    kimi_flags(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "nobody"}')
    flags = ["--tokenizer-type", "KimiTiktokenTokenizer", "--tokenizer-model", f"{folder}/"]
    with pytest.raises(ValueError, match=f"^--tokenizer-model {folder}/: tokenizer_config.json"):
        tokenise(tmp_path / "o", [path], *flags)


@pytest.mark.parametrize("tool", [preprocess, preprocess_dialogues])
def test_a_prefix_must_be_a_name_in_a_folder_that_can_be_made(kimi, tmp_path, tool) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["a"])
    flags = kimi if tool is preprocess else kimi[2:]
    bad = [(f"{tmp_path}/o/", "give a name, not a folder"), (".", "give a name, not a folder")]
    bad += [(f"{path}/o", r"File exists"), ("/proc/o", "No such file"), ("/proc/o/x", "No such")]
    for prefix, message in bad:
        with pytest.raises(ValueError, match=f"^--output-prefix {prefix}: .*{message}"):
            tool(["--input", str(path), "--output-prefix", prefix, "--workers", "1", *flags])
    assert not (tmp_path / "o").exists()


def test_a_byte_order_mark_is_skipped(kimi, tmp_path) -> None:
    lines = b'{"text": "eins"}\n{"text": "zwei"}\n'
    for name, data in (("a.jsonl", lines), ("b.jsonl.gz", lines), ("c.txt", b"eins zwei")):
        plain, marked = tmp_path / "plain" / name, tmp_path / "marked" / name
        for path, content in ((plain, data), (marked, BOM + data)):
            path.parent.mkdir(exist_ok=True)
            packed(path, content)
        prefix = tokenise(tmp_path / name[0], [marked], *kimi)
        wanted = contents(tokenise(tmp_path / f"plain-{name[0]}", [plain], *kimi))
        assert contents(prefix)["_text_document.bin"] == wanted["_text_document.bin"]
        place = where(str(prefix), 0)
        assert place["start"] == 3 and place["num_bytes"] == len(data.splitlines()[0])
    with pytest.raises(ValueError, match=r"byte 4: .*messages"):  # read, and no dialogue
        path = packed(tmp_path / "d.jsonl", BOM + b'\n{"text": 1}\n')
        flags = ["--output-prefix", str(tmp_path / "sft"), "--workers", "1", *kimi[2:]]
        preprocess_dialogues(["--input", str(path), *flags])


def test_train_tokenizer_refuses_in_its_own_words(tmp_path) -> None:
    path, empty = jsonl(tmp_path / "a.jsonl", ["hello world"]), jsonl(tmp_path / "b.jsonl", [""])
    cases = [
        (path, "32000", "^--vocab-size 32000: the text gives only"),
        (path, "100", "^--vocab-size 100: the text's characters alone need 269 pieces"),
        (empty, "300", "^--input: no text to learn from"),
    ]
    output = tmp_path / "made" / "m.model"
    train = ["train-tokenizer", "--vocab-size"]
    for source, size, message in cases:
        with pytest.raises(ValueError, match=message) as refused:
            preprocess([*train, size, "--input", str(source), "--output", str(output)])
        assert "INTERNAL" not in str(refused.value) and "coverage" not in str(refused.value)
    preprocess([*train, "280", "--input", str(path), "--output", str(output)])
    assert output.stat().st_size
    with pytest.raises(ValueError, match=f"^--output {path}/m: .*File exists"):
        preprocess([*train, "280", "--input", str(path), "--output", f"{path}/m"])


def test_verify_says_in_words_what_is_wrong(kimi, tmp_path) -> None:
    prefix = tokenise(tmp_path / "o", [jsonl(tmp_path / "a.jsonl", ["a b c", "d"])], *kimi)
    data, places = Path(f"{prefix}_text_document.bin"), Path(f"{prefix}.provenance.bin")
    data.write_bytes(bytes(data.stat().st_size))
    places.write_bytes(b"x")
    problems = "\n".join(preprocess(["verify", str(prefix)]) or [])
    assert f"{data}: checksum " in problems and f"{places}: 1 bytes, and 56 were" in problems
    assert "{" not in problems
    Path(f"{prefix}.json").write_text("[")
    with pytest.raises(ValueError, match=r"o\.json: damaged"):
        preprocess(["verify", str(prefix)])


def test_a_bad_row_is_named_with_its_row_group(kimi, tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", "b", "c", None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pytest.raises(ValueError, match=r"row 1 \(from 1\) of row group 1 \(from 0\) has no text"):
        tokenise(tmp_path / "o", [tmp_path / "a.parquet"], *kimi)
    tokenise(tmp_path / "o", [tmp_path / "a.parquet"], *kimi, "--skip-bad-records")
    assert json.loads((tmp_path / "o.json").read_text())["totals"]["num_bad"] == 1
