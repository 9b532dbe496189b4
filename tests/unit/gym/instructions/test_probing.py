"""The failure-probing generator draws what fails more often, the same for the same counts."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

from megatron_k2.gym.instructions.probing import PassRates
from megatron_k2.gym.instructions.rules import RULES

DRAWS = 400


def observed(weak: str, pair: tuple[str, str]) -> PassRates:
    """Counts of a policy that fails at one kind, and at two others only together."""
    rates = PassRates()
    for _ in range(30):
        for kind in RULES:
            rates.observe({kind: float(kind != weak), "followed": 1.0, "false_claim": 0.0})
        rates.observe({pair[0]: 1.0, pair[1]: 0.0})
        rates.observe({pair[0]: 0.0, pair[1]: 1.0})
        for kind in pair:
            for _ in range(6):
                rates.observe({kind: 1.0})
    return rates


def drawn(rates: PassRates) -> list[frozenset[str]]:
    rng = Random(5)
    return [frozenset(rates.choose(rng)) for _ in range(DRAWS)]


def test_failing_kinds_and_pairs_come_more_often() -> None:
    pair = ("bullets", "ends_with")
    before, after = drawn(PassRates()), drawn(observed("table", pair))
    count = Counter(kind for kinds in after for kind in kinds)
    assert count["table"] > 3 * sum("table" in kinds for kinds in before)
    assert count["table"] == max(count.values())
    together = sum(set(pair) <= kinds for kinds in after)
    assert together > 3 * max(1, sum(set(pair) <= kinds for kinds in before))
    assert len(count) > 0.7 * len(RULES)  # nothing is forgotten


def test_the_same_counts_and_seed_give_the_same_tasks() -> None:
    rates = observed("table", ("bullets", "ends_with"))
    again = PassRates(**json.loads(json.dumps(rates.as_json())))
    first, second = rates.tasks(12, seed=1), again.tasks(12, seed=1)
    assert first == second
    assert first != rates.tasks(12, seed=2)
    assert {task.env for task in first} == {"instructions"}


def test_verdict_components_that_are_no_kinds_are_ignored() -> None:
    rates = PassRates()
    rates.observe({"words": 0.0, "followed": 0.5, "false_claim": 1.0})
    assert set(rates.kinds) == {"words"} and not rates.pairs
