"""Documents, deduplication and the split."""

import json
import random
from pathlib import Path

import pytest

from megatron_k2.data.corpus import MAX_OVERLAP, build_corpus, write_corpus
from megatron_k2.data.documents import Document, read_input, read_python_library
from megatron_k2.data.near_duplicates import SAMPLE_EVERY, SHINGLE_WORDS, sketch

WORDS = [f"w{i}" for i in range(5000)]


def prose(seed: int, num_words: int = 1500) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def documents(count: int = 80) -> list[Document]:
    return [Document(f"d{i}", prose(i)) for i in range(count)]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def test_sketch_samples_one_shingle_in_sixteen_without_bias():
    text = prose(0, 40_000)
    expected = len(shingles(text)) / SAMPLE_EVERY
    # 5 standard deviations of a binomial count.
    assert abs(len(sketch(text)) - expected) < 5 * expected**0.5


def test_splits_are_disjoint_and_a_second_run_gives_the_same():
    first, second = build_corpus(documents(), 20_000), build_corpus(documents(), 20_000)
    assert first == second
    train = {document.text for document in first.train}
    heldout = {document.text for document in first.heldout}
    assert train and heldout and not train & heldout
    assert len(train | heldout) == 80


def test_the_split_does_not_depend_on_names_or_order():
    renamed = [Document(f"x{i}", d.text) for i, d in enumerate(reversed(documents()))]
    texts = [d.text for d in build_corpus(documents(), 20_000).heldout]
    assert texts == [d.text for d in build_corpus(renamed, 20_000).heldout]


def test_exact_duplicates_differing_in_white_space_are_kept_once():
    extra = [Document("copy", prose(3).replace(" ", "\n"))]
    report = build_corpus(documents() + extra, 20_000).report
    assert report.num_exact_duplicates == 1
    assert report.num_train + report.num_heldout == 80


def test_a_training_document_that_copies_held_out_text_is_dropped():
    heldout = build_corpus(documents(), 20_000).heldout[0].text
    stitched = heldout[: len(heldout) // 2] + " " + prose(999, 700)
    corpus = build_corpus([*documents(), Document("stitched", stitched)], 20_000)
    assert heldout in {d.text for d in corpus.heldout}
    assert "stitched" not in {d.name for d in corpus.train}
    assert corpus.report.num_near_duplicates == 1


def test_a_held_out_document_inside_a_larger_training_document_is_dropped():
    heldout = build_corpus(documents(), 20_000).heldout[0].text
    anthology = Document("anthology", prose(997, 8000) + " " + heldout)
    corpus = build_corpus([*documents(), anthology], 20_000)
    assert "anthology" in {d.name for d in corpus.train}
    assert corpus.heldout and heldout not in {d.text for d in corpus.heldout}


def test_a_short_quotation_is_no_reason_to_drop():
    quotation = documents()[0].text[: int(0.2 * len(documents()[0].text))]
    corpus = build_corpus([*documents(), Document("quotes", quotation + prose(998))], 20_000)
    assert corpus.report.num_near_duplicates == 0


def test_python_library_is_text_without_tests_and_its_splits_share_little():
    corpus = build_corpus(read_python_library(), 131_072)
    names = {document.name for document in corpus.train + corpus.heldout}
    assert "argparse.py" in names and "pydoc_data/topics.py" in names
    assert not any(name.startswith(("test/", "encodings/")) for name in names)
    assert corpus.report.train_bytes > 5_000_000
    train = set().union(*(shingles(document.text) for document in corpus.train))
    for document in corpus.heldout:
        own = shingles(document.text)
        # Exact shingles, not sampled ones: 5 standard deviations of the sample above the bar.
        slack = 5 * (0.25 * SAMPLE_EVERY / max(len(own), 1)) ** 0.5
        assert len(own & train) <= (MAX_OVERLAP + slack) * len(own)


def test_written_jsonl_is_what_preprocess_data_reads(tmp_path):
    report = write_corpus(build_corpus(documents(), 20_000), tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert len(lines) == report["num_train"]
    assert all(isinstance(json.loads(line)["text"], str) for line in lines)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', 'line 2 has no "text" field'),
        ("a.jsonl", b'{"text": 5}\n', 'line 1 has no "text" field that holds a string'),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\xff\xfe\n', "line 2 is not UTF-8"),
        ("a.txt", b"fine\n\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_bad_input_is_named_in_one_line(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(read_input(write(tmp_path / name, data), 10**9))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        list(read_input(tmp_path / "none.jsonl", 10**9))
    with pytest.raises(ValueError, match="not a file"):
        list(read_input(tmp_path, 10**9))


def test_too_little_text_is_refused_with_the_amount_needed():
    with pytest.raises(ValueError, match=r"5 bytes of distinct text in 1 documents; at least 200,"):
        build_corpus([Document("d", "hello")], 20_000)


def test_one_huge_document_cannot_be_split():
    with pytest.raises(ValueError, match="too few"):
        build_corpus([Document("d", prose(0, 60_000))], 20_000)


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(prose(i, 300) for i in range(30))
    pieces = list(read_input(write(tmp_path / "a.txt", text.encode()), 10**9))
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces) == text


def test_reading_stops_at_the_limit_and_surrogates_become_valid(tmp_path):
    line = json.dumps({"text": "\ud800 a"}) + "\n"
    path = write(tmp_path / "a.jsonl", line.encode() * 10)
    read = list(read_input(path, max_bytes=3 * len(line)))
    assert [document.text for document in read] == ["\ufffd a"] * 3
