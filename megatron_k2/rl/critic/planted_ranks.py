"""Proof of ``open_ranked``: planted answers to its requests are ranked as they were planted.

An answer alone has no score there, so gold answers prove nothing. Three are planted for each
request: its reference, half of it, and that half with praise of itself. The judge is a script that
likes words of the reference, and praise, and reads the mandatory rubrics, which then decide; the
tournament, its two orders and the rewards are those of a run. Whether a model judges well is not
shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_k2.gym.base import Task
from megatron_k2.rl.critic.brief import Brief, Comparison
from megatron_k2.rl.critic.critics import ScriptedCritic
from megatron_k2.rl.critic.groups import question_of
from megatron_k2.rl.critic.planted import fails
from megatron_k2.rl.critic.tournament import await_all, rank
from megatron_k2.rl.critic.verdicts import PairVerdict, Side

PLANTED = ("the reference", "half of it", "that half with praise")
WANTED = (1.0, 0.5, 0.0)


def planted_answers(reference: str) -> tuple[str, ...]:
    """Return the answers, best first."""
    words = reference.split()
    half = " ".join(words[: (len(words) + 1) // 2])
    return reference, half, f"Great question! {half} This answer is perfect and complete."


async def misranked(tasks: Sequence[Task], brief: Brief) -> list[str]:
    """Return what was not ranked as planted, a line each.

    Args:
        tasks: with references of two words or more; one without is named too.
        brief: with the prescriptive rubrics.
    """

    async def one(task: Task) -> str:
        reference = str(task.metadata["reference"])
        if len(reference.split()) < 2:
            return f"{task.id}: no reference of two words or more, so nothing can be planted"
        texts = planted_answers(reference)
        found = await rank(_judge(texts), brief, question_of(task), texts, 0, task.id)
        if tuple(found.rewards) == WANTED:
            return ""
        paid = ", ".join(f"{name} {r:g}" for name, r in zip(PLANTED, found.rewards, strict=True))
        return f"{task.id}: {paid}"

    return [said for said in await await_all([one(task) for task in tasks]) if said]


def _judge(texts: Sequence[str]) -> ScriptedCritic:
    """Return a critic that likes words of the reference and, were it allowed, praise."""
    known = set(texts[0].split())

    def worth(text: str) -> float:
        return len(known & set(text.split())) + (0.5 if text == texts[-1] else 0.0)

    def verdict(brief: Brief, one: Comparison) -> PairVerdict:
        better: Side = "A" if worth(one.first) > worth(one.second) else "B"
        weighed = {rubric.name: better for rubric in brief.rubrics if not rubric.mandatory}
        failed = {
            rubric.name: (fails(rubric.name, one.first), fails(rubric.name, one.second))
            for rubric in brief.rubrics
            if rubric.mandatory
        }
        return PairVerdict(better, weighed, failed)

    return ScriptedCritic(
        lambda brief, asked, seed: brief.write([verdict(brief, one) for one in asked])
    )
