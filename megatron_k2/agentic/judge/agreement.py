"""How far judges agree beyond chance: Cohen's and Fleiss' kappa, Krippendorff's alpha.

Votes are categories without an order. Cohen, Educational and Psychological Measurement 20 (1960);
Fleiss, Psychological Bulletin 76 (1971); Krippendorff, Content Analysis (nominal form, which takes
missing votes). Where all votes are of one category none of them is defined: None, not 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

Votes = Sequence[str | None]


def cohen(one: Votes, other: Votes) -> float | None:
    """Return Cohen's kappa of two judges over the items that both judged.

    Args:
        one, other: a vote an item, in the same order.
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(left[name] * right[name] for name in left) / len(pairs) ** 2
    return _beyond(sum(a == b for a, b in pairs) / len(pairs), chance)


def fleiss(items: Sequence[Votes]) -> float | None:
    """Return Fleiss' kappa over the items that every judge judged.

    Args:
        items: the votes of each item, a judge each.
    """
    whole = [item for item in items if len(item) > 1 and None not in item]
    if not whole or len({len(item) for item in whole}) > 1:
        return None
    judges = len(whole[0])
    counts = [Counter(item) for item in whole]
    pairs = judges * (judges - 1)
    agreed = [sum(n * (n - 1) for n in one.values()) / pairs for one in counts]
    total = sum(counts, Counter[str | None]())
    chance = sum((n / (len(whole) * judges)) ** 2 for n in total.values())
    return _beyond(math.fsum(agreed) / len(whole), chance)


def krippendorff(items: Sequence[Votes]) -> float | None:
    """Return Krippendorff's alpha for categories; items with fewer than two votes say nothing.

    Args:
        items: the votes of each item; None where a judge gave none.
    """
    kept = [Counter(vote for vote in item if vote is not None) for item in items]
    kept = [one for one in kept if one.total() > 1]
    total = sum(kept, Counter[str]())
    num_votes = total.total()
    if num_votes < 2:
        return None
    within = math.fsum(
        (one.total() ** 2 - sum(n * n for n in one.values())) / (one.total() - 1) for one in kept
    )
    between = (num_votes**2 - sum(n * n for n in total.values())) / (num_votes - 1)
    return 1 - within / between if between else None


def agreement(items: Sequence[Votes]) -> dict[str, Any]:
    """Return the agreement of judges with its counts, as JSON.

    Args:
        items: the votes of each item, a judge each; None where a judge gave none.
    """
    judges = max((len(item) for item in items), default=0)
    padded = [tuple(item) + (None,) * (judges - len(item)) for item in items]
    columns = [[item[at] for item in padded] for at in range(judges)]
    pairs = [(item[a], item[b]) for item in padded for a, b in combinations(range(judges), 2)]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    cohens = [cohen(columns[a], columns[b]) for a, b in combinations(range(judges), 2)]
    votes = Counter(vote for item in padded for vote in item)
    return {
        "items": len(padded),
        "judges": judges,
        "votes": {name or "void": votes[name] for name in sorted(votes, key=str)},
        "pairs": len(both),
        "agree": round(sum(a == b for a, b in both) / len(both), 4) if both else None,
        "cohen_kappa": [None if one is None else round(one, 4) for one in cohens],
        "fleiss_kappa": _rounded(fleiss(padded)),
        "krippendorff_alpha": _rounded(krippendorff(padded)),
    }


def _beyond(observed: float, chance: float) -> float | None:
    return (observed - chance) / (1 - chance) if chance < 1 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
