"""What is in a blend: tokens by domain, corpus, style and language, duplicates, rejected share.

Tokens are those of the documents that stages get. Of these, up to one document a stage and corpus
is left over where the last sequence ends, and no other stage reads it. Duplicates and the share of
rejected rewritings are what the preprocessing and the rephrasing counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.data.blend.allotment import Take
from megatron_k2.data.blend.corpora import Side, Tokens
from megatron_k2.data.blend.manifest import Manifest
from megatron_k2.data.blend.repetition import Sources, Uses
from megatron_k2.data.blend.rewritings import Names, Rewritings

KINDS = ("domain", "corpus", "style", "language")


def figures(
    manifest: Manifest,
    corpora: Mapping[str, Tokens],
    rewritings: Mapping[str, Rewritings],
    takes: Sequence[Take],
    uses: Uses,
    sources: Sources | None,
) -> dict[str, Any]:
    """Return all figures of a blend, ready for JSON."""
    stages: dict[str, Any] = {}
    for take in takes:
        stage = stages.setdefault(
            take.stage,
            {"tokens_read": 0, "tokens_left_over": 0, **{kind: {} for kind in KINDS}},
        )
        stage["tokens_read"] += take.num_read
        stage["tokens_left_over"] += take.num_allotted - take.num_read
        tokens = corpora[take.corpus]
        for kind, name, count in _by_kind(tokens, rewritings.get(take.corpus), take):
            stage[kind][name] = stage[kind].get(name, 0) + count
    table = {
        name: _corpus(tokens, uses[name], [take for take in takes if take.corpus == name])
        for name, tokens in corpora.items()
    }
    return {
        "seed": manifest.seed,
        "rephrasings_per_document": manifest.rephrasings_per_document,
        "stages": stages,
        "corpora": table,
        "rephrased_sources": None if sources is None else asdict(sources),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the figures as lines of text."""
    stages, corpora = found["stages"], found["corpora"]
    text = ["Tokens of documents, by stage"]
    rows: list[tuple[str, ...]]
    for kind in KINDS:
        names = list(dict.fromkeys(name for stage in stages.values() for name in stage[kind]))
        sums = {name: [stage[kind].get(name, 0) for stage in stages.values()] for name in names}
        whole = max(1, sum(map(sum, sums.values())))
        rows = [(kind, *stages, "all", "share")]
        rows += [
            (name, *map(_whole, counts), _whole(sum(counts)), f"{sum(counts) / whole:.1%}")
            for name, counts in sorted(sums.items(), key=lambda item: -sum(item[1]))
        ]
        text += ["", *_aligned(rows)]
    rows = [("stage", "tokens read", "left over at cuts")]
    rows += [
        (n, _whole(s["tokens_read"]), _whole(s["tokens_left_over"])) for n, s in stages.items()
    ]
    text += ["", *_aligned(rows), "", "Corpora"]
    head: tuple[str, ...] = ("corpus", "tokens", "documents", "unread", "seen", "at most", "asked")
    head += ("exact copies", "near copies", "rejected")
    rows = [head]
    rows += [
        (
            name,
            _whole(one["tokens"]),
            _whole(one["documents"]),
            _whole(one["documents_unread"]),
            f"{one['epochs_seen']:.3f}",
            str(one["most_times_a_document"]),
            str(one["epochs_asked"]),
            _whole(one["exact_duplicates_left_out"]),
            _whole(one["near_duplicates_left_out"]),
            "-" if one["rejected_share"] is None else f"{one['rejected_share']:.1%}",
        )
        for name, one in corpora.items()
    ]
    return [*text, *_aligned(rows), *_source_lines(found["rephrased_sources"])]


def _source_lines(sources: dict[str, Any] | None) -> list[str]:
    if sources is None:
        return []
    counts = ", ".join(f"{many:,} with {n}" for n, many in sources["by_rephrasings"].items())
    return [
        "",
        f"Rephrased sources {sources['num_sources']:,}, by rephrasings read: {counts or 'none'}; "
        f"{sources['num_without_original']:,} without their own document in the blend",
        f"A source is seen, itself and rephrased, {sources['mean_exposures']:.2f} times on average "
        f"and {sources['most_exposures']} at most",
    ]


def _by_kind(tokens: Tokens, found: Rewritings | None, take: Take) -> list[tuple[str, str, int]]:
    """Return (kind, name, tokens) of what a stage gets of a corpus."""
    corpus, whole = tokens.corpus, take.num_allotted
    answer = [("domain", corpus.domain, whole), ("corpus", corpus.name, whole)]
    if found is None:
        return [*answer, ("style", corpus.style, whole), ("language", corpus.language, whole)]
    lengths = tokens.lengths[take.documents]
    columns: list[tuple[str, np.ndarray, Names]] = [
        ("style", found.styles, found.style_names),
        ("language", found.languages, found.language_names),
    ]
    for kind, codes, names in columns:
        counts = np.zeros(len(names.all), dtype=np.int64)
        np.add.at(counts, codes[take.documents], lengths)
        answer += [(kind, name, int(n)) for name, n in zip(names.all, counts, strict=True) if n]
    return answer


def _corpus(tokens: Tokens, uses: np.ndarray, takes: Sequence[Take]) -> dict[str, Any]:
    some = tokens.lengths > 0
    totals = {} if tokens.side is None else tokens.side.summary["totals"]
    return {
        "tokens": tokens.num_tokens,
        "documents": tokens.num_documents,
        "documents_unread": int((uses[some] == 0).sum()),
        "epochs_seen": sum(take.num_allotted for take in takes) / tokens.num_tokens,
        "most_times_a_document": int(uses.max()),
        "epochs_asked": tokens.corpus.epochs,
        "rephrasing_of": tokens.corpus.rephrasing_of,
        "exact_duplicates_left_out": totals.get("num_exact_duplicates"),
        "near_duplicates_left_out": totals.get("num_near_duplicates"),
        "rejected_share": _rejected_share(tokens),
    }


def _rejected_share(tokens: Tokens) -> float | None:
    """Return the share of rewriting attempts that the fidelity checks or the server failed."""
    if tokens.side is None or tokens.corpus.rephrasing_of is None:
        return None
    attempts = passed = 0
    for path in sorted(_report_paths(tokens.side)):
        report = json.loads(path.read_text())
        attempts += report["attempts"]
        passed += report["chunks_rewritten"]
    return 1 - passed / attempts if attempts else None


def _report_paths(side: Side) -> set[Path]:
    """Return the ``report.json`` of each rephrasing that gave documents (``OUT/parts/*.jsonl``)."""
    paths = {
        side.source_path(number).parent.parent / "report.json"
        for number in np.unique(side.places["source"]).tolist()
    }
    return {path for path in paths if path.is_file()}


def _whole(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
