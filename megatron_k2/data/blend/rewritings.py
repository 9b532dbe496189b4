"""Whose rephrasing each document of a corpus is: from the records of ``tools/rephrase_data.py``.

The provenance of the tokenised corpus says which line of which file a document is; that line has
the source's file, line and hash, the style and the language. All records are read once, as fast as
JSON is. Sources are told apart by the hash of their text. 128-bit hashes are cut to 64 bits: among
a billion sources the chance that two are taken for one is 3 % in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.data.blend.corpora import Side, Tokens
from megatron_k2.data.preprocess.line_reader import LineReader
from megatron_k2.data.preprocess.optional import json_loads
from megatron_k2.data.preprocess.sources import find_sources

_loads: Any = json_loads()


class Names:
    """Texts by number, in the order in which they came."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """Return the number of a text; a new one gets the next."""
        return self._numbers.setdefault(name, len(self._numbers))

    @property
    def all(self) -> list[str]:
        """Every text, by number."""
        return list(self._numbers)


@dataclass
class Rewritings:
    """What the records say of each document of a corpus.

    Attributes:
        sources: uint64 [documents], hash of the source.
        texts: uint64 [documents], hash of the rewriting.
        styles, languages, files: int32 [documents], numbers of names; files below the folder that
            all inputs of the rephrasing shared.
        lines: int64 [documents], of the source in its file; 0 where a file is one document.
    """

    sources: np.ndarray
    texts: np.ndarray
    styles: np.ndarray
    languages: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    style_names: Names = field(default_factory=Names)
    language_names: Names = field(default_factory=Names)
    file_names: Names = field(default_factory=Names)

    @classmethod
    def empty(cls, num_documents: int) -> Rewritings:
        """Return room for so many documents."""
        return cls(
            sources=np.zeros(num_documents, dtype=np.uint64),
            texts=np.zeros(num_documents, dtype=np.uint64),
            styles=np.zeros(num_documents, dtype=np.int32),
            languages=np.zeros(num_documents, dtype=np.int32),
            files=np.zeros(num_documents, dtype=np.int32),
            lines=np.zeros(num_documents, dtype=np.int64),
        )


def read_rewritings(tokens: Tokens) -> Rewritings | None:
    """Return whose rephrasings a corpus holds; None where the manifest says that they are none.

    Raises:
        ValueError: the records cannot be read, are no rephrasings, or are some and the manifest
            does not say so.
    """
    corpus, side = tokens.corpus, tokens.side
    if corpus.rephrasing_of is None:
        if side is not None and _looks_rephrased(side):
            raise ValueError(
                f"corpus {corpus.name}: rephrasing_of is not set, and its documents are "
                "rephrasings (they have source and prompt): name the corpus of their sources, or "
                '"none" where these are not in the blend'
            )
        return None
    where = f"corpus {corpus.name}: rephrasing_of {corpus.rephrasing_of}"
    if side is None:
        raise ValueError(
            f"{where}: there are no side files of {corpus.prefix}, so nothing says whose "
            "rephrasing a document is: tokenise by megatron-k2 preprocess-data, or set side_files"
        )
    found = Rewritings.empty(len(tokens.lengths))
    for number in range(len(side.summary["sources"])):
        documents = np.flatnonzero(side.places["source"] == number)
        if len(documents):
            _read_file(side, number, documents, found, where)
    return found


def _read_file(
    side: Side, number: int, documents: np.ndarray, found: Rewritings, where: str
) -> None:
    path = _unchanged(side, number, where)
    wanted = iter(zip(documents.tolist(), side.places["line"][documents].tolist(), strict=True))
    document, line = next(wanted)
    for at, data in enumerate(_lines(path), 1):
        if at < line:
            continue
        try:
            _note(found, document, _loads(data))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{where}: {path} line {at} is no record of megatron-k2 rephrase-data "
                f"({type(error).__name__}: {error})"  # no repr: that of bad UTF-8 is the line
            ) from error
        document, line = next(wanted, (-1, -1))
        if document < 0:
            return
    raise ValueError(f"{where}: {path} has no line {line}, of which document {document} was made")


def _note(found: Rewritings, document: int, record: dict[str, Any]) -> None:
    source, prompt = record["source"], record["prompt"]
    found.sources[document] = int(source["hash"][:16], 16)
    text = hashlib.blake2b(record["text"].encode("utf-8", "surrogatepass"), digest_size=8)
    found.texts[document] = int(text.hexdigest(), 16)
    style = prompt["style"] or prompt["task"]
    found.styles[document] = found.style_names.number(style)
    found.languages[document] = found.language_names.number(prompt["language"])
    found.files[document] = found.file_names.number(source["file"])
    found.lines[document] = source["line"]


def _looks_rephrased(side: Side) -> bool:
    """Return whether the first document's line has what a rephrasing's has; no if it is gone."""
    if not len(side.places):
        return False
    path = side.source_path(int(side.places["source"][0]))
    if not path.is_file() or find_sources([str(path)])[0].format != "jsonl":
        return False
    first = int(side.places["line"][0])
    data = next((data for at, data in enumerate(_lines(path), 1) if at == first), b"")
    try:
        record = _loads(data)
        return "hash" in record["source"] and "task" in record["prompt"]
    except (ValueError, KeyError, TypeError):
        return False


def _unchanged(side: Side, number: int, where: str) -> Path:
    path, noted = side.source_path(number), side.summary["sources"][number]
    if not path.is_file():
        raise ValueError(f"{where}: {path}, of which it was tokenised, is gone")
    if path.stat().st_size != noted["num_bytes"]:
        raise ValueError(
            f"{where}: {path} has {path.stat().st_size:,} bytes, {noted['num_bytes']:,} when it "
            "was tokenised: tokenise it again"
        )
    if find_sources([str(path)])[0].format != "jsonl":
        raise ValueError(f"{where}: {path} is not JSONL, which megatron-k2 rephrase-data writes")
    return path


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, whatever its compression."""
    reader = LineReader(find_sources([str(path)])[0])
    try:
        for _, data in reader.chunks(1 << 62):
            lines = data.split(b"\n")
            yield from lines if lines[-1] else lines[:-1]
    finally:
        reader.close()
