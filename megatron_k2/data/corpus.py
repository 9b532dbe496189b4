"""A corpus: documents without duplicates, split into training and held-out ones.

The split is by document and derived from content hashes, so it is the same on every machine and
does not change when files are renamed. A training document that is in large part a copy of kept
documents is dropped, and so is a held-out document of which the training text holds a large part:
the held-out loss measures prediction and not recall.

Left out: quality filters, language identification, and corpora larger than memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_k2.data.documents import Document
from megatron_k2.data.near_duplicates import ShingleIndex, sketch

MAX_OVERLAP = 0.3  # share of a document that may be copied from documents already kept
HELDOUT_SHARE = 0.1  # of all text, at most
LARGEST_HELDOUT_SHARE = 0.5  # no single document may dominate the held-out set
MIN_TEXT_BYTES = 200_000  # below this no tokenizer of a preset can be learnt


@dataclass(frozen=True)
class CorpusReport:
    """What was kept and dropped; counts of documents that are not blank, bytes of UTF-8 text."""

    num_documents: int
    num_exact_duplicates: int
    num_near_duplicates: int
    num_train: int
    num_heldout: int
    train_bytes: int
    heldout_bytes: int


@dataclass(frozen=True)
class Corpus:
    """The two splits, disjoint and deduplicated."""

    train: list[Document]
    heldout: list[Document]
    report: CorpusReport


def content_hash(text: str) -> str:
    """Return a hash of a text that ignores white space."""
    return hashlib.blake2b("".join(text.split()).encode(), digest_size=16).hexdigest()


def build_corpus(documents: Iterable[Document], heldout_bytes: int) -> Corpus:
    """Deduplicate and split documents.

    Args:
        documents: any number of documents; they are all held in memory.
        heldout_bytes: wanted size of the held-out split; never more than 10 % of the text.

    Returns:
        The splits; training documents keep their input order.

    Raises:
        ValueError: less than 200,000 bytes of distinct text, or too few documents to split.
    """
    distinct: dict[str, Document] = {}
    num_documents = 0
    for document in documents:
        if document.text.strip():
            num_documents += 1
            distinct.setdefault(content_hash(document.text), document)
    sizes = {key: len(document.text.encode()) for key, document in distinct.items()}
    total_bytes = sum(sizes.values())
    if total_bytes < MIN_TEXT_BYTES:
        raise ValueError(
            f"--input: {total_bytes:,} bytes of distinct text in {len(distinct)} documents; "
            f"at least {MIN_TEXT_BYTES:,} bytes are needed"
        )
    index = ShingleIndex()
    target_bytes = min(heldout_bytes, int(total_bytes * HELDOUT_SHARE))
    heldout_keys = _choose_heldout(distinct, sizes, target_bytes, index)
    if not heldout_keys:
        raise ValueError(
            f"--input: {len(distinct)} documents are too few (or too large) to hold some out; "
            f"documents of at most {int(target_bytes * LARGEST_HELDOUT_SHARE):,} bytes are needed"
        )
    train_keys, train_index = _choose_training(distinct, heldout_keys, index)
    heldout_keys = {
        key
        for key in heldout_keys
        if train_index.overlap(sketch(distinct[key].text)) <= MAX_OVERLAP
    }
    if not heldout_keys:
        raise ValueError("--input: every held-out document is mostly contained in other documents")
    train = [distinct[key] for key in train_keys]
    heldout = [distinct[key] for key in sorted(heldout_keys)]
    report = CorpusReport(
        num_documents=num_documents,
        num_exact_duplicates=num_documents - len(distinct),
        num_near_duplicates=len(distinct) - len(train) - len(heldout),
        num_train=len(train),
        num_heldout=len(heldout),
        train_bytes=sum(sizes[key] for key in train_keys),
        heldout_bytes=sum(sizes[key] for key in heldout_keys),
    )
    return Corpus(train, heldout, report)


def _choose_heldout(
    distinct: dict[str, Document], sizes: dict[str, int], target_bytes: int, index: ShingleIndex
) -> set[str]:
    """Take documents in order of their hash until the target is reached; index their shingles."""
    chosen: set[str] = set()
    chosen_bytes = 0
    for key in sorted(distinct):
        if chosen_bytes >= target_bytes:
            break
        if sizes[key] > target_bytes * LARGEST_HELDOUT_SHARE:
            continue
        shingles = sketch(distinct[key].text)
        if index.overlap(shingles) <= MAX_OVERLAP:
            index.add(shingles)
            chosen.add(key)
            chosen_bytes += sizes[key]
    return chosen


def _choose_training(
    distinct: dict[str, Document], heldout_keys: set[str], index: ShingleIndex
) -> tuple[list[str], ShingleIndex]:
    """Take documents that are no copies of kept ones, in input order; index their shingles."""
    chosen: list[str] = []
    own = ShingleIndex()
    for key, document in distinct.items():
        if key in heldout_keys:
            continue
        shingles = sketch(document.text)
        if index.overlap(shingles) <= MAX_OVERLAP:
            index.add(shingles)
            own.add(shingles)
            chosen.append(key)
    return chosen, own


def write_corpus(corpus: Corpus, directory: Path) -> dict[str, int]:
    """Write `train.jsonl` and `heldout.jsonl`, in the form stock preprocess_data.py reads.

    Returns:
        The report as a dictionary.
    """
    for split, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
        with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for document in documents:
                record = {"text": document.text, "name": document.name}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return asdict(corpus.report)
