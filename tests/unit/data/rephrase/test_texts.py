"""Chunks, prompts, languages, faults of answers, sources, the journal and the retry header."""

# ruff: noqa: RUF001 - punctuation of other languages
from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_k2.data.rephrase.chunks import estimate_tokens, sentence_spans, split_document
from megatron_k2.data.rephrase.client import retry_after
from megatron_k2.data.rephrase.faults import check_faults
from megatron_k2.data.rephrase.journal import Journal
from megatron_k2.data.rephrase.languages import detect
from megatron_k2.data.rephrase.prompts import Library
from megatron_k2.data.rephrase.sources import find_inputs, plan_parts, read_part
from tests.unit.data.rephrase.scripted_server import GERMAN, make_text, rewrite

CODE = "```python\ndef f(x):\n    return x. y\n\n\nprint(f(1))\n```\n"


def random_text(seed: int) -> str:
    draw = random.Random(seed)
    pieces = [
        make_text(seed, 3),
        CODE,
        "# A heading\n",
        "- one\n- two\n",
        "$$\na + b = c.\nd\n$$\n",
        "水很深。真的很深！\n",
        "word " * 900,
        "x" * 3000,
        "\n\n",
        "Dr. A. Smith left. See fig. 3 there. ",
    ]
    return "".join(draw.choice(pieces) for _ in range(draw.randint(0, 12)))


@pytest.mark.parametrize("seed", range(40))
def test_chunks_put_together_are_the_document_and_of_the_wanted_size(seed: int) -> None:
    text = random_text(seed)
    excerpts = split_document(text, 64, 256)
    chunks = [chunk for excerpt in excerpts for chunk in excerpt.chunks]
    assert "".join(text[c.start : c.end] for c in chunks) == text
    assert [e.span.start for e in excerpts[1:]] == [e.span.end for e in excerpts[:-1]]
    for excerpt in excerpts:
        assert (excerpt.span.start, excerpt.span.end) == (
            excerpt.chunks[0].start,
            excerpt.chunks[-1].end,
        )
        size = estimate_tokens(text[excerpt.span.start : excerpt.span.end])
        assert size <= 256 + 8 or len(excerpt.chunks) == 1
    for chunk in chunks:
        assert estimate_tokens(text[chunk.start : chunk.end]) <= 64 * 2.5  # a full one and a rest


def test_chunks_end_where_sentences_do_and_blocks_stay_whole() -> None:
    text = make_text(1, 12) + "\n\n" + CODE + "\n" + make_text(2, 12)
    chunks = [c for e in split_document(text, 48, 4096) for c in e.chunks]
    parts = [text[c.start : c.end] for c in chunks]
    assert all(part.rstrip()[-1] in ".`" for part in parts)
    assert sum(CODE in part for part in parts) == 1


def test_sentences_do_not_end_at_abbreviations_initials_or_decimals() -> None:
    text = "Dr. A. Smith paid 3.5 marks. He left (see fig. 3). “Why?” Nobody knew."
    found = [text[s.start : s.end].strip() for s in sentence_spans(text)]
    assert found == [
        "Dr. A. Smith paid 3.5 marks.",
        "He left (see fig. 3).",
        "“Why?”",
        "Nobody knew.",
    ]


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="--chunk-tokens 5000 must be"):
        split_document("A.", 5000, 4096)


def test_prompts_are_sampled_by_content_and_all_of_a_document_differ() -> None:
    library = Library()
    one = library.choose("abc", 1, 20, "rewrite", "en", "")
    assert one == library.choose("abc", 1, 20, "rewrite", "en", "")
    assert len({prompt.id for prompt in one}) == len({prompt.hash for prompt in one}) == 20
    assert one != library.choose("abc", 2, 20, "rewrite", "en", "")
    styles = Counter(
        library.choose(str(i), 1, 1, "rewrite", "en", "")[0].style for i in range(2400)
    )
    assert len(styles) == 12
    assert all(140 <= count <= 260 for count in styles.values())  # 200 expected, sigma is 13.5


def test_prompts_are_in_the_language_of_the_document_or_ask_for_another() -> None:
    library = Library()
    assert "改写" in library.choose("a", 1, 1, "rewrite", "zh", "")[0].system
    assert "Schreibe auf Deutsch" in library.choose("a", 1, 1, "rewrite", "de", "")[0].system
    assert "Write in Japanese" in library.choose("a", 1, 1, "rewrite", "ja", "")[0].system
    note = library.choose("a", 1, 1, "learning-note", "zh", "en")[0]
    assert note.style == "note" and "Write in English, translating" in note.system
    for table in library.languages.values():
        assert len(table["styles"]) >= 8 and len(table["perspectives"]) >= 7


def test_a_document_that_looks_like_a_prompt_is_filled_in_as_it_is() -> None:
    prompt = Library().choose("a", 1, 1, "rewrite", "en", "")[0]
    user = prompt.messages("{passage}", "", "x {done} y")[1]["content"]
    assert "<excerpt>\n{passage}\n</excerpt>" in user and "x {done} y" in user


def test_a_wrong_flag_of_prompts_names_what_is_known() -> None:
    with pytest.raises(ValueError, match="--styles poem: known in en: encyclopaedia"):
        Library().choose("a", 1, 1, "rewrite", "en", "", ["poem"])
    with pytest.raises(ValueError, match="--rephrasings 2: there are 1 pairs"):
        Library().choose("a", 1, 2, "rewrite", "en", "", ["news"], ["teacher"])


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", make_text(1, 2)),
        ("de", GERMAN),
        ("fr", "Le musée est ouvert tous les jours et les enfants ne paient pas dans la ville."),
        ("es", "El acueducto fue construido por los romanos y lleva el agua a la ciudad."),
        ("zh", "这座大桥由工程师设计，全长一千米。"),
        ("ja", "この橋はとても長いです。"),
        ("ru", "Этот мост был построен очень давно."),
        ("", "Tokyo 1993"),
        ("", "```\nif x and the of is in\n```"),
    ],
)
def test_languages_are_told_apart(language: str, text: str) -> None:
    assert detect(text) == language


PASSAGE = make_text(5, 6)
CHATTER = (
    "I will give you this new version of it now, as you asked me to, and hope that you like it. "
    * 2
)


@pytest.mark.parametrize(
    ("fault", "answer", "finish_reason"),
    [
        ("", rewrite(PASSAGE), "stop"),
        ("empty", " \n", "stop"),
        ("truncated", rewrite(PASSAGE)[:200], "length"),
        ("refused", "I'm sorry, but I cannot help with that.", "stop"),
        ("leak", "Here is the rewritten passage:\n" + rewrite(PASSAGE), "stop"),
        ("leak", rewrite(PASSAGE) + "\n</passage>", "stop"),
        ("leak", rewrite(PASSAGE) + " Add no fact, example, opinion or name that.", "stop"),
        ("repetition", rewrite(PASSAGE) + " and he went on and on and on" * 9, "stop"),
        ("language", GERMAN, "stop"),
        ("length", rewrite(PASSAGE)[:60], "stop"),
        ("copied", PASSAGE, "stop"),
        ("copied", f"{PASSAGE} {CHATTER}", "stop"),
    ],
)
def test_faults_of_answers_are_named(fault: str, answer: str, finish_reason: str) -> None:
    prompt = Library().choose("a", 1, 1, "rewrite", "en", "")[0]
    found = check_faults(
        answer,
        finish_reason,
        f"{PASSAGE}\0{PASSAGE}",
        prompt.instructions(),
        "",
        "en",
        (0.3, 4),
        False,
    )
    assert {verdict.check for verdict in found} == ({fault} if fault else set())


def test_what_was_written_before_is_not_written_again() -> None:
    before, passage = make_text(6, 6), make_text(7, 6)
    found = check_faults(
        rewrite(before), "stop", f"{passage}\0", "", "A. " + rewrite(before), "en", (0.3, 4), False
    )
    assert {verdict.check for verdict in found} == {"repeats_earlier"}


def test_parts_hold_each_document_once_whatever_the_compression(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{n}", "id": n}) + "\n" for n in range(7)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:4]))  # with blank lines
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(lines[4:])
    (tmp_path / "c.txt").write_text("plain")
    parts = plan_parts(find_inputs([str(tmp_path / "*")]), 3, "text", None)
    assert [(Path(p.path).name, p.num_documents) for p in parts] == [
        ("a.jsonl", 3), ("a.jsonl", 1), ("b.jsonl.gz", 3), ("c.txt", 1),
    ]  # fmt: skip
    found = [source for part in parts for source in read_part(part)]
    assert [source.text for source in found] == [f"t{n}" for n in range(7)] + ["plain"]
    assert [s.line for s in found] == [1, 3, 5, 7, 1, 2, 3, 0]
    assert len(plan_parts(find_inputs([str(tmp_path / "*")]), 3, "text", 5)) == 3


def test_a_line_that_is_no_document_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line, message in (('{"text": 3}', 'line 1 has no "text"'), ("{", "line 1 is not JSON")):
        path.write_text(line)
        with pytest.raises(ValueError, match=message):
            list(read_part(plan_parts([path], 9, "text", None)[0]))
    with pytest.raises(ValueError, match="no such file"):
        find_inputs([str(tmp_path / "missing*")])


def test_a_journal_drops_a_torn_line_and_refuses_another_run_and_process(tmp_path: Path) -> None:
    path = tmp_path / "journal" / "p.jsonl"
    value = {"text": "t", "tokens": [5, 7]}
    journal = Journal(path, "a")
    journal.settled(journal.sent(90), 90, "timeout")
    journal.settled(journal.sent(80), 12, "")
    journal.sent(70)  # and the process was killed
    journal.record("k", value)
    with pytest.raises(RuntimeError, match="recorded before"):
        journal.record("k", value)
    with pytest.raises(ValueError, match="another run is writing"):
        Journal(path, "a")
    journal.close()
    whole = path.read_bytes()
    for cut in (1, 9, 20):
        path.write_bytes(whole + whole[-40:][:cut])
        journal = Journal(path, "a")
        assert journal.get("k") == value and journal.get("other") is None
        assert journal.spent() == (3, 90 + 12 + 70) and journal.troubles == {"timeout": 1}
        journal.close()
        assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="other input or flags"):
        Journal(path, "b")


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("2.5") == 2.5
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now_s=40.0) == 60.0
    assert retry_after(None) == retry_after("soon") == retry_after("-3") == 0.0
