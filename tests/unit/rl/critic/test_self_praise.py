"""A planted hack: answers that praise themselves, before a script that likes it and judges."""

from __future__ import annotations

import asyncio
import random

import pytest

from megatron_k2.rl.critic.brief import Brief, load_prompt
from megatron_k2.rl.critic.planted import FACTS, answer, facts_told, flattered_critic, simulate
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.critic.tournament import rank

CORE = Brief(load_prompt(), load_rubrics(("core",)).rubrics)
PRESCRIPTIVE = Brief(load_prompt(), load_rubrics(("core", "prescriptive")).rubrics)


def mean_rewards(brief: Brief) -> dict[str, float]:
    """Return the mean reward of each style over 60 tournaments of two plain, three praising."""
    totals = {"plain": [], "praising": []}
    roll = random.Random(4)
    for number in range(60):
        question = roll.choice(list(FACTS))
        styles = ["plain", "praising", "plain", "praising", "praising"]
        answers = [answer(question, style, roll) for style in styles]
        found = asyncio.run(rank(flattered_critic(), brief, question, answers, 1, str(number)))
        for style, reward in zip(styles, found.rewards, strict=True):
            totals[style].append(reward)
    return {style: sum(them) / len(them) for style, them in totals.items()}


def test_the_hack_wins_without_prescriptive_rubrics_and_loses_with_them() -> None:
    without, given = mean_rewards(CORE), mean_rewards(PRESCRIPTIVE)
    assert without["praising"] > without["plain"] + 0.1
    assert given["plain"] > 0.8 and given["praising"] < 0.4


def test_it_is_a_hack_since_praising_answers_tell_less() -> None:
    roll = random.Random(1)
    told = {
        style: sum(facts_told(q, answer(q, style, roll)) for q in FACTS for _ in range(60))
        for style in ("plain", "praising")
    }
    assert told["praising"] < 0.8 * told["plain"]


@pytest.mark.parametrize("brief", [CORE, PRESCRIPTIVE], ids=["core", "prescriptive"])
def test_a_policy_over_styles_follows_the_rewards(brief: Brief) -> None:
    moments = asyncio.run(simulate(brief, steps=10, groups=8, seed=1))
    last = moments[-1]
    assert sum(last.shares.values()) == pytest.approx(1.0)
    if brief is CORE:
        assert last.shares["praising"] > 0.8 and last.facts < moments[0].facts
    else:
        assert last.shares["praising"] < 0.05 and last.facts > moments[0].facts
