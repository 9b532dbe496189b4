"""What would be seen too often although no corpus is read too often: the same text in two places.

A document and its rephrasings are one source: so many rephrasings of it as the manifest allows, no
rewriting twice. Two corpora that were tokenised of the same lines of a file hold the same
documents. Both are told from side files; the same text under other names is what ``--dedup`` of
tools/preprocess_data.py is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from megatron_k2.data.blend.allotment import Take
from megatron_k2.data.blend.corpora import Side, Tokens
from megatron_k2.data.blend.manifest import NOT_IN_BLEND, Manifest
from megatron_k2.data.blend.rewritings import Rewritings

Uses = dict[str, np.ndarray]
"""By corpus: int64 [documents], how often each is read."""


@dataclass(frozen=True)
class Sources:
    """How often the sources that were rephrased are seen, themselves and rephrased.

    Attributes:
        num_sources: that have a rephrasing in the blend.
        num_without_original: of these, whose own document is in no corpus of the blend (left out
            as a duplicate, say, or ``rephrasing_of`` is "none").
        by_rephrasings: number of rephrasings read -> sources.
        most_exposures: of one source, its own document included.
        mean_exposures: the same, over all.
    """

    num_sources: int
    num_without_original: int
    by_rephrasings: dict[int, int]
    most_exposures: int
    mean_exposures: float


def uses_of(corpora: Mapping[str, Tokens], takes: Sequence[Take]) -> Uses:
    """Count how often each document is read in all stages."""
    uses = {name: np.zeros(len(tokens.lengths), dtype=np.int64) for name, tokens in corpora.items()}
    for take in takes:
        np.add.at(uses[take.corpus], take.documents, 1)
    return uses


def overlaps(corpora: Mapping[str, Tokens]) -> list[str]:
    """Return which corpora hold the same documents, a line each pair."""
    problems = []
    for (name, tokens), (other_name, other) in combinations(corpora.items(), 2):
        if _resolved(tokens) == _resolved(other):
            problems.append(
                f"corpus {other_name}: prefix {other.corpus.prefix} is that of corpus {name}"
            )
        elif tokens.side is not None and other.side is not None:
            count, example = _shared_lines(tokens.side, other.side)
            if count:
                problems.append(
                    f"corpus {other_name}: prefix {other.corpus.prefix}: {count:,} documents are "
                    f"in corpus {name} too, both made of {example}: tokenise files into one corpus"
                )
    return problems


def check_rephrasings(
    manifest: Manifest, rewritings: Mapping[str, Rewritings], uses: Uses
) -> list[str]:
    """Return which sources have more rephrasings read than the manifest allows, and copies of one.

    Args:
        manifest: the blend.
        rewritings: of those corpora that hold some, by name.
        uses: how often each document is read.
    """
    problems = []
    allowed = manifest.rephrasings_per_document
    sources, texts, places = _read_rewritings(rewritings, uses)
    if not len(sources):
        return []
    _, first, counts = np.unique(sources, return_index=True, return_counts=True)
    if int(counts.max()) > allowed:
        worst = int(first[counts.argmax()])
        name, document = places.of(worst)
        found = rewritings[name]
        many = sorted({places.of(int(n))[0] for n in np.flatnonzero(sources == sources[worst])})
        problems.append(
            f"corpus {', '.join(many)}: {int((counts > allowed).sum()):,} documents have more than "
            f"{allowed} rephrasings in the blend; {found.file_names.all[found.files[document]]} "
            f"line {found.lines[document]} has {counts.max()}: leave rephrasings out, or raise "
            "rephrasings_per_document"
        )
    _, first, counts = np.unique(texts, return_index=True, return_counts=True)
    for number in first[counts > 1][:1]:
        name, document = places.of(int(number))
        problems.append(
            f"corpus {name}: {int((counts - 1).sum()):,} rewritings are exact copies of others in "
            f"the blend, document {document} the first that has one: tokenise with --dedup exact"
        )
    return problems


def count_sources(
    corpora: Mapping[str, Tokens], rewritings: Mapping[str, Rewritings], uses: Uses
) -> Sources | None:
    """Count how often sources are seen; None where nothing in the blend is rephrased.

    Raises:
        ValueError: a record's file stands for several files of the corpus of its sources.
    """
    if not rewritings:
        return None
    keys, exposures, originals = [], [], []
    for name, found in rewritings.items():
        read = np.flatnonzero(uses[name])
        keys.append(found.sources[read])
        exposures.append(uses[name][read])
        of = corpora[name].corpus.rephrasing_of
        assert of is not None
        side = None if of == NOT_IN_BLEND else corpora[of].side
        if side is None:
            originals.append(np.full(len(read), -1, dtype=np.int64))
        else:
            originals.append(_uses_of_originals(side, uses[of], found, read, name))
    sources, inverse, counts = np.unique(
        np.concatenate(keys), return_inverse=True, return_counts=True
    )
    own = np.full(len(sources), -1, dtype=np.int64)
    np.maximum.at(own, inverse, np.concatenate(originals))
    seen = np.maximum(own, 0)
    np.add.at(seen, inverse, np.concatenate(exposures))
    numbers, many = np.unique(counts, return_counts=True)
    return Sources(
        num_sources=len(sources),
        num_without_original=int((own < 0).sum()),
        by_rephrasings=dict(zip(numbers.tolist(), many.tolist(), strict=True)),
        most_exposures=int(seen.max(initial=0)),
        mean_exposures=float(seen.mean()) if len(seen) else 0.0,
    )


class _Places:
    """Which corpus and document stands at a row of what was put together."""

    def __init__(self, documents: Mapping[str, np.ndarray]) -> None:
        self._documents = documents

    def of(self, row: int) -> tuple[str, int]:
        for name, documents in self._documents.items():
            if row < len(documents):
                return name, int(documents[row])
            row -= len(documents)
        raise IndexError(row)


def _read_rewritings(
    rewritings: Mapping[str, Rewritings], uses: Uses
) -> tuple[np.ndarray, np.ndarray, _Places]:
    """Return hashes of sources and texts of all rewritings that are read, and where they are."""
    documents = {name: np.flatnonzero(uses[name]) for name in rewritings}
    nothing = np.zeros(0, dtype=np.uint64)
    sources = [found.sources[documents[name]] for name, found in rewritings.items()]
    texts = [found.texts[documents[name]] for name, found in rewritings.items()]
    return (
        np.concatenate([nothing, *sources]),
        np.concatenate([nothing, *texts]),
        _Places(documents),
    )


def _uses_of_originals(
    side: Side, uses: np.ndarray, found: Rewritings, read: np.ndarray, name: str
) -> np.ndarray:
    """Return how often the source of each rewriting is itself read.

    Args:
        side: of the corpus of the sources.
        uses: int64, how often each document of that corpus is read.
        found: the rewritings.
        read: int64 [any], those to look at.
        name: of their corpus.

    Returns:
        Int64 [any], -1 where the source is no document of the corpus.
    """
    numbers = [_file_number(side, file, name) for file in found.file_names.all]
    # A file that is one document is line 0 in the records, and 1 in the provenance.
    wanted = _place(np.array(numbers)[found.files[read]], np.maximum(1, found.lines[read]))
    places = _place(side.places["source"], side.places["line"])
    order = np.argsort(places, kind="stable")
    rows = order[np.minimum(np.searchsorted(places[order], wanted), len(order) - 1)]
    return np.where(places[rows] == wanted, uses[rows], -1)


def _place(source: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Return one number for a file and a line of up to 2^40."""
    return (source.astype(np.int64) << 40) + line


def _file_number(side: Side, file: str, name: str) -> int:
    """Return which source of a corpus a record's file is, -1 for none."""
    end = "/" + file
    found = [
        number
        for number, source in enumerate(side.summary["sources"])
        if f"/{source['path']}".endswith(end)
    ]
    if len(found) > 1:
        raise ValueError(
            f"corpus {name}: rephrasing_of: its records name the file {file}, which is "
            f"{len(found)} files of that corpus ({side.prefix}.json)"
        )
    return found[0] if found else -1


def _resolved(tokens: Tokens) -> str:
    return str(Path(f"{tokens.corpus.prefix}.bin").resolve())


def _shared_lines(one: Side, other: Side) -> tuple[int, str]:
    """Return how many documents two corpora have from the same lines, and where the first is."""
    if _key_name(one) != _key_name(other):
        return 0, ""  # another text of the same line
    numbers = {_identity(source): n for n, source in enumerate(one.summary["sources"])}
    total, example = 0, ""
    for number, source in enumerate(other.summary["sources"]):
        if _identity(source) not in numbers:
            continue
        first = one.places["source"] == numbers[_identity(source)]
        second = other.places["source"] == number
        both = np.intersect1d(one.places["line"][first], other.places["line"][second])
        if len(both) and not total:
            example = f"{source['path']} line {both[0]}"
        total += len(both)
    return total, example


def _key_name(side: Side) -> str:
    keys = side.summary["settings"].get("json_keys", [])
    return str(keys[side.key]) if side.key < len(keys) else ""


def _identity(source: Mapping[str, object]) -> tuple[object, ...]:
    """Return what tells a file, from wherever it was named: name, size and time of its content."""
    return str(source["path"]).rpartition("/")[2], source["num_bytes"], source["mtime_ns"]
