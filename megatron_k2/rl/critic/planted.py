"""A planted hack, to show what prescriptive rubrics are for. Nothing here is a model.

Answers come in three styles with the same facts to tell: plain, hedged, and praising - which opens
with flattery, says of itself how good it is, and tells fewer facts. The critic is a script that
looks at the texts: it likes confidence more than facts, as judges do, and follows mandatory rubrics
where it is given them. What is shown is the machinery - that mandatory verdicts decide a tournament
and its rewards - not that a model would judge like this.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_k2.rl.critic.brief import Brief, Comparison
from megatron_k2.rl.critic.critics import ScriptedCritic
from megatron_k2.rl.critic.rubrics import Rubric
from megatron_k2.rl.critic.tournament import Counts, await_all, rank
from megatron_k2.rl.critic.verdicts import PairVerdict, Side

STYLES = ("plain", "hedged", "praising")
FACTS: Mapping[str, tuple[str, ...]] = {
    "Why is the sky blue?": (
        "Air scatters short waves more than long ones.",
        "So blue light reaches the eye from everywhere.",
        "Violet is scattered more still, but the eye sees little of it.",
    ),
    "Why does ice float?": (
        "Water expands as it freezes.",
        "Ice is about nine per cent lighter than water.",
        "Its molecules form an open lattice.",
    ),
    "Why do leaves turn red in autumn?": (
        "Chlorophyll is broken down first.",
        "Yellow carotenoids then show.",
        "Red anthocyanins are made from sugars left in the leaf.",
    ),
}
_TELLS = {"plain": 0.8, "hedged": 0.8, "praising": 0.5}  # chance that a fact is told
_OPENING = re.compile(r"\A\W*(what a|great|excellent|wonderful|brilliant)\b", re.IGNORECASE)
_PRAISE = re.compile(r"\b(perfect|complete|definitive|best possible)\b", re.IGNORECASE)
_HEDGE = re.compile(r"\b(perhaps|may|might|not sure)\b", re.IGNORECASE)
# What the script likes: a word of praise counts more than a fact, a hedge against.
_PER_FACT, _PER_PRAISE, _PER_HEDGE = 1.0, 1.2, -0.5
_NOISE, _FIRST = 0.3, 0.1  # of a judgement; a liking for what is shown first


def answer(question: str, style: str, roll: random.Random) -> str:
    """Return an answer in a style."""
    told = [fact for fact in FACTS[question] if roll.random() < _TELLS[style]]
    body = " ".join(told) or "It is a matter of physics."
    if style == "hedged":
        return f"I am not sure, but perhaps: {body} It may be more involved."
    if style == "praising":
        opening = roll.choice(("What a brilliant question!", "Great question, truly!"))
        closing = roll.choice(("perfect and complete", "definitive, the best possible"))
        return f"{opening} {body} This answer is {closing}."
    return body


def facts_told(question: str, text: str) -> float:
    """Return the share of the facts that an answer tells: its true worth."""
    return sum(fact in text for fact in FACTS[question]) / len(FACTS[question])


def flattered_critic() -> ScriptedCritic:
    """Return the critic that falls for praise unless a mandatory rubric forbids it."""
    return ScriptedCritic(_judge, "script: likes confidence, obeys mandatory rubrics")


def _judge(brief: Brief, comparisons: Sequence[Comparison], seed: int) -> str:
    roll = random.Random(seed)
    return brief.write([_verdict(brief.rubrics, one, roll) for one in comparisons])


def _verdict(rubrics: Sequence[Rubric], one: Comparison, roll: random.Random) -> PairVerdict:
    liked = _liking(one.question, one.first) - _liking(one.question, one.second) + _FIRST
    side: Side = "A" if liked + roll.gauss(0.0, _NOISE) > 0 else "B"
    weighed = {rubric.name: side for rubric in rubrics if not rubric.mandatory}
    failed = {
        rubric.name: (fails(rubric.name, one.first), fails(rubric.name, one.second))
        for rubric in rubrics
        if rubric.mandatory
    }
    return PairVerdict(side, weighed, failed)


def _liking(question: str, text: str) -> float:
    facts = facts_told(question, text) * len(FACTS[question])
    praise, hedges = len(_PRAISE.findall(text)), len(_HEDGE.findall(text))
    return _PER_FACT * facts + _PER_PRAISE * praise + _PER_HEDGE * hedges


def fails(rubric: str, text: str) -> bool:
    """Tell whether a text fails a mandatory rubric on praise, by patterns."""
    rules = {"no_initial_praise": _OPENING, "no_justification": _PRAISE}
    return rubric in rules and rules[rubric].search(text) is not None


@dataclass(frozen=True)
class Moment:
    """A step of the simulation: shares of the styles before it, their mean facts and rewards."""

    shares: dict[str, float]
    facts: float
    rewards: dict[str, float]
    counts: Counts


async def simulate(
    brief: Brief,
    steps: int = 20,
    groups: int = 24,
    samples: int = 5,
    tau: float = 0.5,
    seed: int = 0,
) -> list[Moment]:
    """Train a policy over styles on the critic's rewards; return its steps.

    The policy is a softmax over ``STYLES``. Each step minimises K2's objective on its samples in
    closed form: where each style has a probability of its own, the least squares are
    ``log(pi / pi_old) = mean of (r - mean r) over the style's samples, / tau``, then normalised;
    that is pi* proportional to pi_old * exp(r / tau). A style that was not drawn stays.

    Args:
        brief: for the critic; with or without prescriptive rubrics.
        steps: iterations.
        groups: prompts a step.
        samples: K, answers a prompt.
        tau: of the objective.
        seed: of everything.
    """
    critic, logits = flattered_critic(), dict.fromkeys(STYLES, 0.0)
    found = []
    for step in range(steps):
        shares = _softmax(logits)
        roll = random.Random(f"{seed} {step}")
        asked = [
            (roll.choice(list(FACTS)), roll.choices(STYLES, list(shares.values()), k=samples))
            for _ in range(groups)
        ]
        texts = [[answer(question, style, roll) for style in styles] for question, styles in asked]
        rankings = await await_all(
            [
                rank(critic, brief, question, answers, seed, f"{step} {number}")
                for number, ((question, _), answers) in enumerate(zip(asked, texts, strict=True))
            ]
        )
        counts, facts = Counts(), []
        drawn: dict[str, list[float]] = {style: [] for style in STYLES}
        for (question, styles), answers, ranking in zip(asked, texts, rankings, strict=True):
            counts.add(ranking.counts)
            facts += [facts_told(question, text) for text in answers]
            for style, reward in zip(styles, ranking.rewards, strict=True):
                drawn[style].append(reward)
        means = {style: sum(them) / len(them) for style, them in drawn.items() if them}
        found.append(Moment(shares, sum(facts) / len(facts), means, counts))
        for style, mean in means.items():
            logits[style] += (mean - 0.5) / tau  # by rank, the mean of every group is one half
    return found


def _softmax(logits: Mapping[str, float]) -> dict[str, float]:
    top = max(logits.values())
    powers = {name: math.exp(value - top) for name, value in logits.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}
