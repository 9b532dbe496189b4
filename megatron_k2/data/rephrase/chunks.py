"""A document cut into excerpts of some 4,096 tokens and chunks of some 256 (K2's report, figure 4).

Cuts fall between paragraphs where they can, else between sentences; code blocks, displayed formulae
and tables stay whole unless one alone is far larger than a chunk. Spans are character offsets;
those of all chunks put together are the document. Tokens are estimated unless a tokenizer is given.
"""

# ruff: noqa: RUF001 - punctuation of other languages
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_k2.data.rephrase.languages import Language, language

CountTokens = Callable[[str], int]
LARGEST = 1.5  # times the wanted size: up to here a chunk is not cut further
SMALLEST = 0.25  # times the wanted size: a shorter rest joins its neighbour
PARAGRAPH_FROM = 0.7  # times the wanted size: from here on a chunk ends where a paragraph does
_BLOCK = re.compile(
    r"^```.*?^```[^\n]*(?:\n|\Z)|\$\$.*?\$\$[^\S\n]*\n?|\\\[.*?\\\][^\S\n]*\n?"
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\1\}[^\S\n]*\n?|(?:^\|[^\n]*\n)+",
    re.DOTALL | re.MULTILINE,
)
_WIDE = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")
_END = re.compile(
    r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[”’」』）]*\s*|\n[^\S\n]*\n\s*|\n(?=[^\S\n]*(?:[-*•]|\d+[.)]|#+)\s)"
)
_LAST_WORD = re.compile(r"([\w.\-]+?)\.[\"'”’»)\]]*\s+$")
# Text that only names, such as a heading, does not end a chunk.
_HEADING = re.compile(r"\A\s*(?:#{1,6}\s[^\n]*|[^\n.!?。]{1,80}\n(?:=+|-+))\s*\Z")  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a document."""

    start: int
    end: int


@dataclass(frozen=True)
class Excerpt:
    """What the model sees as context, and the chunks that it rewrites one by one."""

    span: Span
    chunks: tuple[Span, ...]


def estimate_tokens(text: str) -> int:
    """Estimate tokens: 4 bytes of most scripts, or two thirds of a Chinese or Japanese sign, each.

    Within some 20 % of byte-pair vocabularies of 100,000 and more on running text.
    """
    wide = len(_WIDE.findall(text))
    narrow = len(text.encode()) - 3 * wide
    return math.ceil(narrow / 4 + wide / 1.5)


def split_document(
    text: str,
    chunk_tokens: int = 256,
    excerpt_tokens: int = 4096,
    count_tokens: CountTokens = estimate_tokens,
) -> list[Excerpt]:
    """Cut a document.

    Args:
        text: the document.
        chunk_tokens: wanted of a chunk; between a quarter and one and a half times as much.
        excerpt_tokens: of an excerpt at most, but at least one chunk.
        count_tokens: tokens of a text.

    Returns:
        Excerpts whose chunks, put together, are the text; none of an empty text.

    Raises:
        ValueError: sizes that cannot be.
    """
    if not 16 <= chunk_tokens <= excerpt_tokens:
        raise ValueError(
            f"--chunk-tokens {chunk_tokens} must be 16 or more and at most --excerpt-tokens "
            f"{excerpt_tokens}"
        )
    atoms = _pieces(text, chunk_tokens, count_tokens)
    chunks = _pack(text, atoms, chunk_tokens, count_tokens)
    sizes = [count_tokens(text[chunk.start : chunk.end]) for chunk in chunks]
    return list(_excerpts(chunks, sizes, excerpt_tokens))


def sentence_spans(text: str, known: Language | None = None) -> list[Span]:
    """Return the sentences of a text, each with the white space that follows it.

    Args:
        text: any text.
        known: its language, for the abbreviations; English if not given.
    """
    abbreviations = (known or language("en")).abbreviations
    spans, start = [], 0
    for match in _END.finditer(text):
        word = _LAST_WORD.search(text[max(start, match.end() - 40) : match.end()])
        if word and "\n\n" not in match[0]:
            last = word[1].lower()
            initial = len(last) == 1 and last.isalpha() and word[1].isupper()
            if last in abbreviations or initial or text[match.end() : match.end() + 1].islower():
                continue
        spans.append(Span(start, match.end()))
        start = match.end()
    if start < len(text):
        spans.append(Span(start, len(text)))
    return spans


def prose_share(text: str) -> float:
    """Return the share (0..1) of a text's characters outside code, formulae and tables."""
    return len(_BLOCK.sub("", text).strip()) / max(1, len(text.strip()))


def _pieces(text: str, limit: int, count: CountTokens) -> list[Span]:
    """Cut into pieces that are packed whole: sentences, blocks, and parts of what is too large."""
    found: list[Span] = []
    at = 0
    for block in _BLOCK.finditer(text):
        found += _sentences(text, at, block.start())
        found.append(Span(block.start(), block.end()))
        at = block.end()
    found += _sentences(text, at, len(text))
    return [part for piece in found for part in _halves(text, piece, limit, count)]


def _sentences(text: str, start: int, end: int) -> Iterator[Span]:
    for span in sentence_spans(text[start:end]):
        yield Span(start + span.start, start + span.end)


def _halves(text: str, span: Span, limit: int, count: CountTokens) -> Iterator[Span]:
    """Yield a span, in parts cut at a line, a comma or a space near the middle if too large."""
    part = text[span.start : span.end]
    if len(part) < 2 or count(part) <= LARGEST * limit:
        yield span
        return
    middle = span.start + len(part) // 2
    cut = middle
    for mark in ("\n", "; ", "，", "；", ", ", " "):
        before = text.rfind(mark, span.start + len(part) // 4, middle)
        if before >= 0:
            cut = before + len(mark)
            break
    yield from _halves(text, Span(span.start, cut), limit, count)
    yield from _halves(text, Span(cut, span.end), limit, count)


def _pack(text: str, atoms: Sequence[Span], wanted: int, count: CountTokens) -> list[Span]:
    """Join neighbouring pieces into chunks."""
    chunks: list[Span] = []
    start = size = 0
    for index, atom in enumerate(atoms):
        own = count(text[atom.start : atom.end])
        if size and size + own > LARGEST * wanted:
            chunks.append(Span(start, atom.start))
            start, size = atom.start, 0
        size += own
        piece = text[atom.start : atom.end]
        paragraph_ends = "\n\n" in piece[-4:] or index + 1 == len(atoms)
        full = size >= wanted or (size >= PARAGRAPH_FROM * wanted and paragraph_ends)
        if full and not _HEADING.match(piece):
            chunks.append(Span(start, atom.end))
            start, size = atom.end, 0
    if start < len(text):
        last = Span(start, len(text))
        short = size < SMALLEST * wanted and bool(chunks)
        chunks[-1:] = [Span(chunks[-1].start, last.end)] if short else [*chunks[-1:], last]
    return chunks


def _excerpts(chunks: Sequence[Span], sizes: Sequence[int], limit: int) -> Iterator[Excerpt]:
    """Group chunks into excerpts of similar size, each at most the limit where chunks allow it."""
    share = sum(sizes) / max(1, math.ceil(sum(sizes) / limit))
    group: list[Span] = []
    size = 0
    for chunk, own in zip(chunks, sizes, strict=True):
        if group and (size + own > limit or size + own / 2 > share):
            yield Excerpt(Span(group[0].start, group[-1].end), tuple(group))
            group, size = [], 0
        group.append(chunk)
        size += own
    if group:
        yield Excerpt(Span(group[0].start, group[-1].end), tuple(group))
