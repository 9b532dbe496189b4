"""Rewards for groups of the policy's open answers: a tournament each.

A group is atomic: it is ranked whole, or all of it is unjudged. Episodes that broke (``failed``)
have no answer and take no part; an answer that was cut takes part as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_k2.gym.base import Task, Verdict, judged, unjudged
from megatron_k2.rl.critic.brief import Brief, CriticPrompt
from megatron_k2.rl.critic.critics import Critic, CriticFailed
from megatron_k2.rl.critic.rubrics import RubricBook
from megatron_k2.rl.critic.tournament import Counts, Ranking, await_all, rank
from megatron_k2.rl.episode import Episode, Group

RANKED = "ranked"  # in a task's metadata, true: its answers are paid by rank


def question_of(task: Task) -> str:
    """Return a task's messages as one text, the content alone where there is one.

    System messages are left out: they are the run's words to the policy, not the request.
    """
    asked = [one for one in task.messages if one.get("role") != "system"]
    if len(asked) == 1:
        return str(asked[0].get("content") or "")
    return "\n\n".join(f"{one['role']}: {one.get('content') or ''}" for one in asked)


def answer_of(episode: Episode) -> str | None:
    """Return the content of the last answer, without reasoning; None where there is none."""
    if episode.ending == "failed":
        return None
    said = [one for one in episode.ledger.messages if one.get("role") == "assistant"]
    return str(said[-1].get("content") or "") if said else None


async def judge_group(
    group: Group, critic: Critic, prompt: CriticPrompt, book: RubricBook, seed: int
) -> tuple[list[Verdict], Counts]:
    """Return the verdicts of a group's episodes, in their order, and what was counted.

    Args:
        group: finished episodes of one prompt.
        critic: who judges.
        prompt: the words.
        book: of which the task's rubrics are taken.
        seed: of the run.

    Raises:
        ValueError: no rubric is for this task.
    """
    texts = [answer_of(one) for one in group.episodes]
    present = [text for text in texts if text is not None]
    nothing = unjudged("no answer to compare", backend=critic.model)
    if len(present) < 2:
        return [nothing] * len(texts), Counts(unjudged=1)
    brief = Brief(prompt, book.of(group.task))
    try:
        found = await rank(critic, brief, question_of(group.task), present, seed, group.id)
    except CriticFailed as error:
        return [unjudged(str(error), backend=critic.model)] * len(texts), Counts(unjudged=1)
    by = f"{found.model} {prompt.id} {found.brief} weights {list(found.versions)}"
    places = [place for place, text in enumerate(texts) if text is not None]
    verdicts = [nothing] * len(texts)
    for one, place in enumerate(places):
        parts = {"points": found.points[one], "mandatory": float(not found.failed[one])}
        verdicts[place] = judged(found.rewards[one], _why(found, one, places), parts, by)
    return verdicts, found.counts


def _why(found: Ranking, one: int, places: Sequence[int]) -> str:
    """Say how an answer fared; the others by their place in the group, as in episodes' ids."""
    met: dict[str, list[int]] = {"better than": [], "equal to": [], "worse than": []}
    for (first, second), side in found.winners.items():
        if one in (first, second):
            won = side == ("A" if one == first else "B")
            word = "equal to" if side == "tie" else "better than" if won else "worse than"
            met[word].append(places[second if one == first else first])
    said = [f"{word} {', '.join(map(str, others))}" for word, others in met.items() if others]
    failed = ["fails a mandatory rubric"] if found.failed[one] else []
    return "; ".join([f"points {found.points[one]:.3f}", *said, *failed])


async def judge_ranked(
    groups: Sequence[Group], critic: Critic, prompt: CriticPrompt, book: RubricBook, seed: int
) -> Counts:
    """Give the episodes of all groups that are to be ranked their verdicts; return the counts.

    Args:
        groups: of a step; those of other tasks stay as they are.
        critic: who judges; in a run the policy, with the weights that answered.
        prompt: the words.
        book: of which each task's rubrics are taken.
        seed: of the run.

    Raises:
        ValueError: no rubric is for a task.
    """
    total = Counts()
    wanted = [one for one in groups if one.task.metadata.get(RANKED)]
    found = await await_all([judge_group(one, critic, prompt, book, seed) for one in wanted])
    for group, (verdicts, counts) in zip(wanted, found, strict=True):
        total.add(counts)
        for episode, verdict in zip(group.episodes, verdicts, strict=True):
            episode.verdict = verdict
    return total
