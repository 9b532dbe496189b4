"""What became of chunks: the text that is put together, and where each part of it comes from."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from megatron_k2.data.rephrase.chunks import Span
from megatron_k2.data.rephrase.prompts import Prompt
from megatron_k2.data.rephrase.settings import Settings
from megatron_k2.data.rephrase.sources import Source


@dataclass
class Chunk:
    """What became of a chunk: `kind` is rewritten, source, copied (no prose) or dropped."""

    span: Span
    kind: str
    text: str
    record: dict[str, Any] | None  # of the attempt that passed
    failures: Counter[str]
    tokens: tuple[int, int]
    num_thoughts: int  # answers that began with thoughts, which were cut off
    num_attempts: int = 0


def make_record(
    source: Source,
    found: str,
    number: int,
    prompt: Prompt,
    chunks: list[Chunk],
    model: str,
    settings: Settings,
) -> dict[str, Any] | None:
    """Return the line of a rewriting, None where nothing of it is left.

    Args:
        source: the document.
        found: its language.
        number: of the rewriting, from 0.
        prompt: that was used.
        chunks: of all excerpts, in order.
        model: that rewrote them.
        settings: of the run; under "drop-document" nothing is left if a chunk was dropped.
    """
    any_dropped = any(chunk.kind == "dropped" for chunk in chunks)
    if any_dropped and settings.on_failure == "drop-document":
        return None
    if not any(chunk.kind == "rewritten" for chunk in chunks):
        return None
    text, spans = stitched(chunks, source.text)
    return {
        "text": text,
        "id": f"{source.id}#{number}",
        "source": {
            "file": source.file,
            "line": source.line,
            "hash": source.hash,
            "chars": len(source.text),
            "language": found,
        },
        "prompt": {
            "id": prompt.id,
            "hash": prompt.hash,
            "task": prompt.task,
            "style": prompt.style,
            "perspective": prompt.perspective,
            "language": prompt.output_language,
        },
        "model": model,
        "sampler": asdict(settings.sampler),
        "spans": [_span(chunk, place) for chunk, place in zip(chunks, spans, strict=True)],
    }


def stitch(chunks: list[Chunk], source: str) -> str:
    """Return the text of chunks, put together."""
    return stitched(chunks, source)[0]


def stitched(chunks: list[Chunk], source: str) -> tuple[str, list[tuple[int, int]]]:
    """Put the text of chunks together with the breaks that the source has between them.

    Returns:
        The text, and each chunk's first and last offset in it (equal where it was dropped).
    """
    text, places = "", []
    for chunk in chunks:
        part = chunk.text.strip()
        if part and text:
            text += _break_before(chunk.span.start, source, part)
        places.append((len(text), len(text) + len(part)))
        text += part
    return text, places


def _break_before(start: int, source: str, part: str) -> str:
    between = source[max(0, start - 4) : start]
    if "\n\n" in between or part.startswith("```"):
        return "\n\n"
    if between.endswith("\n"):
        return "\n"
    return " " if between[-1:].isspace() or not between or ord(between[-1]) < 0x2E80 else ""


def _span(chunk: Chunk, place: tuple[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "source": [chunk.span.start, chunk.span.end],
        "text": list(place),
        "kind": chunk.kind,
        "tokens": list(chunk.tokens),
    }
    if chunk.failures:
        found["rejected"] = dict(sorted(chunk.failures.items()))
    if chunk.record is not None:
        found |= {key: chunk.record[key] for key in ("seed", "temperature", "verdicts")}
    return found


def count_chunks(chunks: list[Chunk], counts: Counter[str]) -> None:
    """Add what became of chunks to counts."""
    for chunk in chunks:
        counts["chunks"] += 1
        counts[f"chunks_{chunk.kind}"] += 1
        counts["attempts"] += chunk.num_attempts
        counts["prompt_tokens"] += chunk.tokens[0]
        counts["completion_tokens"] += chunk.tokens[1]
        counts["source_chars"] += chunk.span.end - chunk.span.start
        counts["text_chars"] += len(chunk.text)
        for check, count in chunk.failures.items():
            counts[f"rejected {check}"] += count
        counts["thoughts_cut"] += chunk.num_thoughts
