"""What a run shows: a progress bar while it works, a table and `report.json` when it leaves."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from tqdm import tqdm

from megatron_k2.data.rephrase.provenance import Chunk

REFRESH_S = 0.5


class Progress:
    """A bar over documents with chunks a second, tokens, accept rate and time left."""

    def __init__(self, num_documents: int, num_done: int, quiet: bool = False) -> None:
        self._bar = tqdm(
            total=num_documents,
            initial=num_done,
            unit="doc",
            disable=quiet,
            mininterval=REFRESH_S,
            bar_format="{l_bar}{bar} {n:.1f}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
        )
        self._start_s = time.monotonic()
        self._shown_s = 0.0
        self.chunks = self.rewritten = self.tried = self.tokens = 0

    def chunk(self, chunk: Chunk, share: float) -> None:
        """Count a chunk and its share of a document."""
        self.chunks += 1
        self.rewritten += chunk.kind == "rewritten"
        self.tried += chunk.kind != "copied"
        self.tokens += sum(chunk.tokens)
        self._bar.update(share)
        now_s = time.monotonic()
        if now_s - self._shown_s >= REFRESH_S:
            self._shown_s = now_s
            rate = self.chunks / max(1e-9, now_s - self._start_s)
            accepted = self.rewritten / max(1, self.tried)
            self._bar.set_postfix_str(
                f"{rate:.1f} chunks/s, {self.tokens:,} tokens, {accepted:.0%} accepted",
                refresh=False,
            )

    def done(self, num_documents: int, num_chunks: int) -> None:
        """Count whole documents and their chunks, of a part done elsewhere."""
        self.chunks += num_chunks
        self._bar.update(num_documents)

    def close(self) -> float:
        """Close the bar; return the seconds it ran."""
        self._bar.close()
        return time.monotonic() - self._start_s


def summary(counts: Counter[str], num_parts: int) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        counts: of all published parts.
        num_parts: of the run.
    """
    tried = counts["chunks"] - counts["chunks_copied"]
    return {
        "parts": f"{counts['parts']} of {num_parts}",
        "documents": counts["documents"],
        "bad_records_skipped": counts["bad_records_skipped"],
        "rewritings": counts["rewritings"],
        "rewritings_dropped": counts["rewritings_dropped"],
        "chunks": counts["chunks"],
        "chunks_rewritten": counts["chunks_rewritten"],
        "chunks_kept_as_source": counts["chunks_source"],
        "chunks_dropped": counts["chunks_dropped"],
        "chunks_without_prose": counts["chunks_copied"],
        "accept_rate": _share(counts["chunks_rewritten"], tried),
        "attempts": counts["attempts"],
        "accept_rate_of_attempts": _share(counts["chunks_rewritten"], counts["attempts"]),
        "rejected_by_check": _under(counts, "rejected "),
        "answers_with_thoughts_cut": counts["thoughts_cut"],
        "failed_requests": _under(counts, "trouble "),
        "requests": counts["requests"],
        "tokens": counts["tokens"],
        "prompt_tokens": counts["prompt_tokens"],
        "completion_tokens": counts["completion_tokens"],
        "characters_a_source_character": round(
            counts["text_chars"] / max(1, counts["source_chars"]), 3
        ),
        "styles": _under(counts, "style "),
        "languages": _under(counts, "language "),
        "source_languages": _under(counts, "source_language "),
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """Return the figures as lines of text."""
    found = []
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count:,}" for key, count in value.items()) or "none"
        elif isinstance(value, int):
            value = f"{value:,}"
        found.append(f"  {name.replace('_', ' '):<30} {value}")
    return found


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _under(counts: Counter[str], prefix: str) -> dict[str, int]:
    found = {k.removeprefix(prefix): n for k, n in counts.items() if k.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
