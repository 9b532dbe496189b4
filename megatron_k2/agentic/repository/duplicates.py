"""Removal of tools that say what an earlier one says: MinHash finds pairs, their overlap decides.

A tool's features are the rows of three words in its name, description and parameters' names and
descriptions. Two tools are near-duplicates from a Jaccard similarity of 0.7 on, the threshold of
BigCode's code deduplication (huggingface.co/blog/dedup, whose shingles have five words: half of the
dump's descriptions have fewer than ten). ``data/near_duplicates.py`` does not fit: its sketch of a
text under a hundred words is mostly empty. The first of near-duplicates stays, so what is kept
depends on the order alone; candidates are compared exactly, so no tool is dropped by chance.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from megatron_k2.agentic.records import Tool, content_id

THRESHOLD = 0.7
SHINGLE_WORDS = 3
NUM_BANDS, BAND_ROWS = 32, 4  # finds a pair of similarity 0.7 with 0.9998: 1 - (1 - 0.7**4)**32
_WORD = re.compile(r"[a-z]+|\d+|[^\W\d_a-z]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class Duplicate:
    """A dropped tool, the id of the kept one that it repeats, and their similarity."""

    tool: Tool
    of: str
    kind: Literal["exact", "near"]
    similarity: float


@dataclass(frozen=True)
class Deduplicated:
    """Tools that stay, in their order, and those that do not."""

    kept: list[Tool] = field(default_factory=list)
    dropped: list[Duplicate] = field(default_factory=list)

    @cached_property
    def reasons(self) -> Counter[str]:
        """Number of dropped tools by kind."""
        return Counter(f"{one.kind} duplicate" for one in self.dropped)


class NearDuplicates:
    """The tools kept so far, findable by what is similar to them."""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.threshold = threshold
        self._exact: dict[str, str] = {}
        self._features: list[tuple[str, frozenset[str]]] = []
        self._bands: defaultdict[bytes, list[int]] = defaultdict(list)

    def repeats(self, tool: Tool) -> Duplicate | None:
        """Return what a tool repeats of the kept ones; if nothing, keep it and return None."""
        content = _content(tool)
        if (same := self._exact.get(content)) is not None:
            return Duplicate(tool, same, "exact", 1.0)
        features = shingles(tool)
        keys = _keys(features)
        best, best_id = 0.0, ""
        for at in sorted({at for key in keys for at in self._bands.get(key, ())}):
            id_, others = self._features[at]
            if (similarity := jaccard(features, others)) > best:
                best, best_id = similarity, id_
        if best >= self.threshold:
            return Duplicate(tool, best_id, "near", best)
        self._exact[content] = tool.id
        for key in keys:
            self._bands[key].append(len(self._features))
        self._features.append((tool.id, features))
        return None


def deduplicate(tools: Iterable[Tool], threshold: float = THRESHOLD) -> Deduplicated:
    """Return the tools that repeat no earlier one, and the others with what they repeat."""
    index = NearDuplicates(threshold)
    found = Deduplicated()
    for tool in tools:
        match = index.repeats(tool)
        if match is None:
            found.kept.append(tool)
        else:
            found.dropped.append(match)
    return found


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the share (0 to 1) of the elements of either that are in both."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if shared else 0.0


def shingles(tool: Tool, num_words: int = SHINGLE_WORDS) -> frozenset[str]:
    """Return every ``num_words`` words in a row of a tool's text; all of it if it is shorter."""
    said = words(text_of(tool))
    last = max(1, len(said) - num_words + 1)
    return frozenset(" ".join(said[at : at + num_words]) for at in range(last))


def text_of(tool: Tool) -> str:
    """Return what a model reads of a tool: name, description, parameters by name."""
    return "\n".join([tool.name, tool.description, *_parameter_lines(tool.parameters)])


def words(text: str) -> list[str]:
    """Return the words of a text, small, with snake_case and camelCase taken apart."""
    return _WORD.findall(_CAMEL.sub(" ", text).lower())


def _parameter_lines(parameters: Mapping[str, Any]) -> Iterable[str]:
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping):
        return
    for name in sorted(properties):
        about = properties[name]
        text = about.get("description") if isinstance(about, Mapping) else None
        yield f"{name} {text}" if isinstance(text, str) else name


def _content(tool: Tool) -> str:
    """Return what two exact duplicates have in common, whatever server offers them."""
    return content_id([tool.name, tool.description, tool.parameters])


def _coefficients() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(20507)
    count = NUM_BANDS * BAND_ROWS
    odd = draw.integers(1, 2**63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return odd, draw.integers(0, 2**63, count, dtype=np.uint64)


_FACTORS, _SHIFTS = _coefficients()


def _keys(features: frozenset[str]) -> list[bytes]:
    """Return the key of each band of the MinHash signature."""
    crcs = [zlib.crc32(one.encode("utf-8", "replace")) for one in features]
    hashes = np.array(crcs, dtype=np.uint64)
    mixed = hashes[:, None] * _FACTORS[None, :] + _SHIFTS[None, :]  # wraps, as intended
    signature = (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)
    rows = signature.reshape(NUM_BANDS, BAND_ROWS)
    return [bytes([band]) + rows[band].tobytes() for band in range(NUM_BANDS)]
