"""How many near-duplicates are among tools: every pair, exactly, by other features than removal.

The measure of ``duplicates.py``'s success, and independent of it: sets of five characters in a row
instead of three words, no hashing, no sampling. All pairs above a threshold are found by prefix
filtering (Bayardo, Ma and Srikant, Scaling up all pairs similarity search, WWW 2007): two sets of
Jaccard similarity t share one of their rarest elements, so only pairs that do are compared.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.repository.duplicates import jaccard, text_of, words

THRESHOLD = 0.8  # Lee et al. (arXiv 2107.06499) call documents near-duplicates from 0.8 on
NUM_CHARACTERS = 5
Features = Callable[[Tool], frozenset[str]]


def near_duplicate_share(
    tools: Sequence[Tool], threshold: float = THRESHOLD, features: Features | None = None
) -> float:
    """Return the share (0 to 1) of tools that have a near-duplicate among the others.

    Args:
        tools: to compare, all with all.
        threshold: of the Jaccard similarity.
        features: what a tool is a set of; five characters in a row without.
    """
    sets = [(features or character_grams)(tool) for tool in tools]
    found = {at for pair in similar_pairs(sets, threshold) for at in pair}
    return len(found) / len(tools) if tools else 0.0


def character_grams(tool: Tool) -> frozenset[str]:
    """Return every five characters in a row of a tool's words."""
    text = " ".join(words(text_of(tool)))
    last = max(1, len(text) - NUM_CHARACTERS + 1)
    return frozenset(text[at : at + NUM_CHARACTERS] for at in range(last))


def similar_pairs(sets: Sequence[frozenset[str]], threshold: float) -> Iterator[tuple[int, int]]:
    """Yield the places of every two sets whose Jaccard similarity is at least the threshold.

    Args:
        sets: none of them empty.
        threshold: above 0.
    """
    rarity = Counter(element for one in sets for element in one)
    index: defaultdict[str, list[int]] = defaultdict(list)
    for at in sorted(range(len(sets)), key=lambda place: (len(sets[place]), place)):
        one = sets[at]
        # 1e-9: 0.7 * 10 is a little above 7 in floating point
        least = math.ceil(threshold * len(one) - 1e-9)
        prefix = sorted(one, key=lambda element: (rarity[element], element))
        prefix = prefix[: len(one) - least + 1]
        candidates = {other for element in prefix for other in index[element]}
        for other in sorted(candidates):
            if len(sets[other]) < least:
                continue
            if jaccard(one, sets[other]) >= threshold - 1e-9:
                yield min(at, other), max(at, other)
        for element in prefix:
            index[element].append(at)
