"""Groups of finished episodes, and critics that do one thing, for the tests of the critic."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

from megatron_k2.chat.ledger import TokenLedger
from megatron_k2.gym.base import Task, judged, unjudged
from megatron_k2.rl.critic.brief import Brief, Comparison, load_prompt
from megatron_k2.rl.critic.critics import CriticFailed, Said, ScriptedCritic
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.critic.verdicts import PairVerdict, Side
from megatron_k2.rl.episode import Episode, Group

CORRECT = load_rubrics(("correctness",)).rubrics
BRIEF = Brief(load_prompt(), CORRECT)


def say(*sides: Side) -> str:
    """Return the answer that names these sides."""
    return BRIEF.write([PairVerdict(side, {"correct": side}) for side in sides])


def prefers(better: Callable[[str, str], bool]) -> ScriptedCritic:
    """Return a critic that prefers by the two texts."""

    def script(brief: Brief, asked: Sequence[Comparison], seed: int) -> str:
        return say(*("A" if better(one.first, one.second) else "B" for one in asked))

    return ScriptedCritic(script)


class SlowCritic:
    """Says what another says, after a time that is drawn anew in every run; may fail."""

    model = "slow"

    def __init__(self, inner: ScriptedCritic, fails_on: str = "") -> None:
        self.inner, self.fails_on, self.asked = inner, fails_on, 0

    async def say(self, brief: Brief, comparisons: Sequence[Comparison], seed: int) -> Said:
        self.asked += 1
        await asyncio.sleep(random.random() / 500)
        if self.fails_on and self.fails_on in comparisons[0].first:
            raise CriticFailed("no answer")
        return await self.inner.say(brief, comparisons, seed)


def group(
    answers: Sequence[tuple[str, float | None]], name: str = "1", env: str = "sums", **task: Any
) -> Group:
    """Return a finished group; an answer is a text and its score, None where it was not judged."""
    asked = Task(name, env, ({"role": "user", "content": f"question {name}?"},), **task)
    episodes = []
    for index, (text, score) in enumerate(answers):
        ledger = TokenLedger(None)  # type: ignore[arg-type]  # its tokens play no part here
        ledger.messages = [*asked.messages, {"role": "assistant", "content": text}]
        verdict = unjudged("broke") if score is None else judged(score)
        ending = "failed" if score is None else "finished"
        episodes.append(Episode(f"{name}/{index}", asked, index, ledger, ending, verdict))
    return Group(f"{env}/{name}#0", asked, episodes)
