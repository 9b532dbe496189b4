"""A document and its rephrasings are one source: from the rephrasing's own files to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.data.blend.command import parser, run
from megatron_k2.data.blend.report import lines
from tests.unit.data.preprocess.inputs import kimi_flags, tokenise
from tests.unit.data.rephrase.scripted_server import ANSWERS, Plan, make_text, serving
from tests.unit.data.rephrase.test_pipeline import rephrase

DOCUMENTS = 12


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rephrase 12 documents twice with a server that fails at times; tokenise source and result."""
    root = tmp_path_factory.mktemp("rephrased")
    texts = [{"text": make_text(n, 12), "id": f"d{n}"} for n in range(DOCUMENTS)]
    (root / "in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    with serving(Plan((), ANSWERS, percent_each=4)) as server:
        failed = rephrase(
            *("--input", str(root / "in.jsonl"), "--output", str(root / "made"), "--quiet"),
            *("--server", server.url, "--model", "rule", "--rephrasings", "2", "--attempts", "8"),
            *("--styles", "encyclopaedia", "dialogue", "--chunk-tokens", "64"),
        )
    assert failed == []
    for part in (root / "made" / "parts").glob("*.jsonl"):  # the server has one answer a passage
        records = [json.loads(line) for line in part.read_text().splitlines()]
        for record in records:
            record["text"] += f" {record['prompt']['perspective']} {record['id']}"
        part.write_text("".join(json.dumps(record) + "\n" for record in records))
    kimi = kimi_flags(tmp_path_factory.mktemp("kimi"))
    tokenise(root / "raw", [root / "in.jsonl"], *kimi, "--append-eod", "--dedup", "exact")
    tokenise(root / "new", [root / "made" / "parts" / "*.jsonl"], *kimi, "--append-eod")
    tokenise(root / "bare", [root / "in.jsonl"], *kimi)
    return root


def write_manifest(path: Path, corpora: Path, stage: str, **changes: Any) -> Path:
    fields = {"allowed": 2, "raw": "raw", "new": "new", "of": 'rephrasing_of = "wiki"'} | changes
    path.write_text(
        f"""rephrasings_per_document = {fields["allowed"]}
        [[corpora]]
        name = "wiki"
        prefix = "{corpora}/{fields["raw"]}_text_document"
        domain = "knowledge"
        language = "en"
        [[corpora]]
        name = "wiki-new"
        prefix = "{corpora}/{fields["new"]}_text_document"
        domain = "knowledge"
        {fields["of"]}
        [[stages]]
        name = "only"
        seq_length = 32
        global_batch_size = 1
        {stage}"""
    )
    return path


def blend(*words: Any) -> list[str]:
    return run(parser().parse_args([str(word) for word in words]), lambda path, scale: [])


ALL = "epochs = { wiki = 1.0, wiki-new = 1.0 }"


def test_report_tells_sources_styles_and_rejections(corpora: Path, tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "blend.toml", corpora, ALL)
    assert blend("report", path, "--output", tmp_path / "out") == []
    saved = (tmp_path / "out" / "report.json").read_text()
    found = json.loads(saved)
    made = json.loads((corpora / "made" / "report.json").read_text())
    stage, both = found["stages"]["only"], found["corpora"]
    tokens = {name: both[name]["tokens"] for name in ("wiki", "wiki-new")}
    assert stage["corpus"] == tokens
    assert stage["domain"] == {"knowledge": sum(tokens.values())}
    assert stage["language"] == {"en": sum(tokens.values())}
    assert stage["style"].pop("source") == tokens["wiki"]
    assert set(stage["style"]) == {"encyclopaedia", "dialogue"}
    assert sum(stage["style"].values()) == tokens["wiki-new"]
    assert both["wiki-new"]["rejected_share"] == pytest.approx(
        1 - made["accept_rate_of_attempts"], abs=1e-3
    )
    assert both["wiki-new"]["rejected_share"] > 0
    assert found["rephrased_sources"] == {
        "num_sources": DOCUMENTS,
        "num_without_original": 0,
        "by_rephrasings": {"2": DOCUMENTS},
        "most_exposures": 3,
        "mean_exposures": 3.0,
    }
    text = (tmp_path / "out" / "report.txt").read_text()
    assert text == "\n".join(lines(json.loads(saved))) + "\n"
    assert "3.00 times on average" in text
    assert (tmp_path / "out" / "report.png").read_bytes()[1:4] == b"PNG"


def test_only_rephrasings_that_are_read_count(corpora: Path, tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "blend.toml", corpora, ALL, allowed=1)
    (problem,) = blend("check", path)
    assert problem.startswith(f"corpus wiki-new: {DOCUMENTS} documents have more than 1 rephrasing")
    assert "in.jsonl line " in problem and "has 2" in problem
    path = write_manifest(tmp_path / "blend.toml", corpora, "epochs = { wiki = 1.0 }", allowed=0)
    assert blend("check", path) == []


def test_a_corpus_is_not_taken_for_what_it_is_not(corpora: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "blend.toml"
    with pytest.raises(ValueError, match="corpus wiki-new: rephrasing_of is not set"):
        blend("check", write_manifest(manifest, corpora, ALL, of=""))
    with pytest.raises(
        ValueError, match=r"in\.jsonl line 1 is no record of megatron-k2 rephrase-data"
    ):
        blend("check", write_manifest(manifest, corpora, ALL, new="raw"))
    problems = blend("check", write_manifest(manifest, corpora, ALL, new="bare", of=""))
    assert "corpus wiki-new" in problems[0] and "append_eod is False" in problems[0]
    assert f"{DOCUMENTS} documents are in corpus wiki too, both made of " in problems[1]
    assert problems[1].endswith("in.jsonl line 1: tokenise files into one corpus")


def test_a_rewriting_that_is_there_twice_is_refused(corpora: Path, tmp_path: Path) -> None:
    part = min((corpora / "made" / "parts").glob("*.jsonl"))
    first = part.read_text().splitlines(keepends=True)[0]
    (tmp_path / "twice.jsonl").write_text(first + first)
    kimi = kimi_flags(tmp_path)
    tokenise(tmp_path / "new", [tmp_path / "twice.jsonl"], *kimi, "--append-eod")
    stage = "epochs = { wiki-new = 1.0 }"
    path = write_manifest(
        tmp_path / "blend.toml", tmp_path, stage, raw="new", of='rephrasing_of = "none"'
    )
    text = path.read_text().replace(f"{tmp_path}/new", f"{corpora}/raw", 1)
    path.write_text(text)
    (problem,) = blend("check", path)
    assert problem.startswith("corpus wiki-new: 1 rewritings are exact copies of others")
