"""Sizes of a tokenised corpus, from its ``.idx``, and what the preprocessing left beside it.

Lengths come from the index alone, which must fit the ``.bin``. The side files of
``tools/preprocess_data.py`` (``PREFIX.json``, ``PREFIX.provenance.bin``) are optional: without them
nothing is known of a document but its tokens. Memory: 16 bytes a document.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.data.blend.manifest import Corpus
from megatron_k2.data.preprocess.provenance import RECORD

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
"""Megatron's codes of token types (``DType``, megatron/core/datasets/indexed_dataset.py)."""
_ANEW = "bring it back, or tokenise anew by megatron-k2 preprocess-data"


@dataclass(frozen=True)
class Side:
    """Side files of a corpus.

    Attributes:
        prefix: ``--output-prefix`` of the preprocessing.
        summary: ``PREFIX.json``.
        places: ``provenance.RECORD`` [documents].
        key: which of the run's JSON keys the corpus holds.
    """

    prefix: Path
    summary: dict[str, Any]
    places: np.ndarray
    key: int

    def source_path(self, number: int) -> Path:
        """Return where a source's file is: as it was named, or beside the side files."""
        path = Path(self.summary["sources"][number]["path"])
        beside = self.prefix.parent / path
        return beside if not path.exists() and beside.exists() else path


@dataclass(frozen=True)
class Tokens:
    """A corpus as its index has it.

    Attributes:
        corpus: what the manifest says.
        lengths: int64 [documents], tokens; 0 for an empty document.
        pointers: int64 [documents], first byte in the ``.bin``; -1 for an empty one.
        dtype: of the tokens.
        side: None where there are no side files.
    """

    corpus: Corpus
    lengths: np.ndarray
    pointers: np.ndarray
    dtype: np.dtype
    side: Side | None

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return int(self.lengths.sum())

    @property
    def num_documents(self) -> int:
        """That have a token."""
        return int(np.count_nonzero(self.lengths))


def open_corpus(corpus: Corpus) -> Tokens:
    """Read a corpus's index and find its side files.

    Raises:
        ValueError: a file is missing or does not fit the others; names the corpus.
    """
    where = f"corpus {corpus.name}: prefix {corpus.prefix}"
    index, data = Path(f"{corpus.prefix}.idx"), Path(f"{corpus.prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise ValueError(f"{where}: there is no {path}")
    lengths, pointers, dtype = _read_index(index, where)
    ends = pointers + lengths * dtype.itemsize
    if len(ends) and int(ends.max()) > data.stat().st_size:
        raise ValueError(f"{where}: the .idx goes to byte {ends.max():,} of {data}, which is less")
    if not lengths.any():
        raise ValueError(f"{where}: there is no token in it")
    side = _find_side(corpus, index)
    if side is not None and len(side.places) != len(lengths):
        raise ValueError(
            f"{where}: {len(lengths):,} documents, and {len(side.places):,} in "
            f"{side.prefix}.provenance.bin; side_files are of another corpus"
        )
    return Tokens(corpus, lengths, pointers, dtype, side)


def check_tokenizers(corpora: Mapping[str, Tokens]) -> list[str]:
    """Return which corpora were tokenised otherwise than the first, a line each."""
    problems: list[str] = []
    first: tuple[str, dict[str, Any]] | None = None
    for name, tokens in corpora.items():
        if tokens.side is None:
            continue
        settings = tokens.side.summary["settings"]
        first = first or (name, settings)
        for key in ("tokenizer_digest", "append_eod"):
            if settings.get(key) != first[1].get(key):
                problems.append(
                    f"corpus {name}: prefix {tokens.corpus.prefix}: {key} is {settings.get(key)}, "
                    f"that of corpus {first[0]} {first[1].get(key)}: tokenise both alike"
                )
    return problems


def _read_index(path: Path, where: str) -> tuple[np.ndarray, np.ndarray, np.dtype]:
    """Return tokens and first byte of each document, and the type of tokens."""
    with path.open("rb") as file:
        head = file.read(len(HEADER) + 9)
        if head[: len(HEADER)] != HEADER or len(head) < len(HEADER) + 9:
            raise ValueError(f"{where}: {path} is no index of Megatron's")
        version, code = struct.unpack("<QB", head[len(HEADER) :])
        if version != VERSION or code not in DTYPES:
            raise ValueError(f"{where}: {path} has version {version} and token type {code}")
        counts = np.fromfile(file, dtype=np.int64, count=2)
        size = path.stat().st_size
        if len(counts) < 2 or counts.min() < 0 or size < 34 + 12 * counts[0] + 8 * counts[1]:
            raise ValueError(f"{where}: {path} is cut off")
        lengths = np.fromfile(file, dtype=np.int32, count=counts[0])
        pointers = np.fromfile(file, dtype=np.int64, count=counts[0])
        bounds = np.fromfile(file, dtype=np.int64, count=counts[1])
    per_document = np.diff(bounds)
    if len(per_document) and per_document.max() > 1:
        raise ValueError(
            f"{where}: {counts[0]:,} sequences in {len(per_document):,} documents; GPT datasets "
            "shuffle sequences: tokenise without --split-sentences"
        )
    if int(per_document.sum()) != counts[0]:
        raise ValueError(f"{where}: {path} has sequences outside documents")
    of_documents = np.zeros(len(per_document), dtype=np.int64)
    starts = np.full(len(per_document), -1, dtype=np.int64)
    of_documents[per_document == 1], starts[per_document == 1] = lengths, pointers
    return of_documents, starts, DTYPES[code]


def _find_side(corpus: Corpus, index: Path) -> Side | None:
    """Return the side files, those that name this ``.idx``."""
    if corpus.side_files is not None:
        candidates = [Path(corpus.side_files)]
        if not Path(f"{corpus.side_files}.json").is_file():
            raise ValueError(
                f"corpus {corpus.name}: side_files {corpus.side_files}: no {corpus.side_files}.json"
            )
    else:  # PREFIX_KEY_document: a key may have underscores too
        words = index.stem.split("_")
        candidates = [index.parent / "_".join(words[:n]) for n in range(len(words) - 1, 0, -1)]
    for prefix in candidates:
        summary = Path(f"{prefix}.json")
        if not summary.is_file():
            continue
        where = f"corpus {corpus.name}: side file"
        table = _read_summary(summary, where)
        indices = [name for name in table.get("files", ()) if name.endswith(".idx")]
        if index.name in indices:
            places = _read_places(prefix, len(table["sources"]), where)
            return Side(prefix, table, places, indices.index(index.name))
    if corpus.side_files is not None:
        raise ValueError(f"corpus {corpus.name}: {corpus.side_files}.json is not of {index.name}")
    return None


def _read_summary(path: Path, where: str) -> dict[str, Any]:
    """Return ``PREFIX.json``; an empty table of a file that is another's, such as JSONL input.

    Raises:
        ValueError: it is damaged.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a whole value, and more: lines of JSON
            return {}
        raise ValueError(f"{where} {path}: damaged, not JSON ({error}): {_ANEW}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} {path}: cannot be read ({error}): {_ANEW}") from error
    if not isinstance(table, dict) or not isinstance(table.get("files"), dict):
        return {}
    sources = table.get("sources")
    whole = isinstance(table.get("settings"), dict) and isinstance(sources, list)
    if not whole or not all(_is_source(source) for source in sources or ()):
        raise ValueError(f"{where} {path}: damaged, lacks settings or sources: {_ANEW}")
    return table


def _is_source(source: Any) -> bool:
    return (
        isinstance(source, dict)
        and isinstance(source.get("path"), str)
        and isinstance(source.get("num_bytes"), int)
    )


def _read_places(prefix: Path, num_sources: int, where: str) -> np.ndarray:
    """Return the provenance of all documents."""
    path = f"{prefix}.provenance.bin"
    try:
        places = np.fromfile(path, dtype=RECORD)
    except OSError as error:
        raise ValueError(f"{where} {path}: {error.strerror or error}: {_ANEW}") from error
    if len(places) and int(places["source"].max()) >= num_sources:
        raise ValueError(f"{where} {path}: damaged, names sources that {prefix}.json has not")
    return places
