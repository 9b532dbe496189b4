"""Near-duplicates: planted ones go, others stay, and the exact measure agrees with brute force."""

import random
from itertools import combinations

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.repository.duplicates import deduplicate, jaccard, shingles
from megatron_k2.agentic.repository.pairwise import (
    character_grams,
    near_duplicate_share,
    similar_pairs,
)

WORDS = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("ado", "ilu", "emo", "ark", "oon", "ury")]


def tool(name: str, description: str, server: str = "s") -> Tool:
    parameters = {"type": "object", "properties": {}}
    return Tool(server, name, description, parameters, "unknown", "dump")


def drawn(count: int, seed: int) -> list[Tool]:
    draw = random.Random(seed)
    return [
        tool(f"{draw.choice(WORDS)}_{at}", " ".join(draw.choices(WORDS, k=draw.randint(3, 60))))
        for at in range(count)
    ]


def test_planted_duplicates_go_and_the_first_stays() -> None:
    tools = drawn(300, 1)
    long = [one for one in tools if len(one.description.split()) > 30]
    exact = [tool(one.name, one.description, "another server") for one in tools[:40]]
    near = [tool(one.name, one.description.replace(" ", " the ", 1)) for one in long[:40]]
    found = deduplicate([*tools, *exact, *near])
    assert found.kept == tools
    assert found.reasons == {"exact duplicate": 40, "near duplicate": 40}
    ids = {one.id for one in tools}
    assert all(one.of in ids and one.similarity >= 0.7 for one in found.dropped)


def test_no_pair_above_the_threshold_is_kept() -> None:
    """MinHash misses nothing that the exact measure finds on the same features."""
    draw = random.Random(2)
    tools = []
    for one in drawn(60, 3):
        words = one.description.split()
        for _ in range(6):  # from identical to strangers
            changed = [draw.choice(WORDS) if draw.random() < 0.06 else word for word in words]
            tools.append(tool(one.name, " ".join(changed)))
    assert near_duplicate_share(tools, 0.7, shingles) > 0.3
    kept = deduplicate(tools).kept
    assert 60 < len(kept) < len(tools)
    assert near_duplicate_share(kept, 0.7, shingles) == 0


def test_the_exact_measure_finds_the_pairs_of_brute_force() -> None:
    draw = random.Random(4)
    sets = [frozenset(draw.sample("abcdefghijkl", draw.randint(1, 9))) for _ in range(200)]
    for threshold in (0.3, 0.5, 0.7, 0.8, 1.0):
        wanted = {
            (at, other)
            for (at, one), (other, two) in combinations(enumerate(sets), 2)
            if jaccard(one, two) >= threshold
        }
        assert set(similar_pairs(sets, threshold)) == wanted


def test_short_texts_and_none_have_features() -> None:
    assert shingles(tool("x", "")) == {"x"}
    assert character_grams(tool("ab", "c")) == {"ab c"}
    assert deduplicate([]).kept == [] and near_duplicate_share([]) == 0
