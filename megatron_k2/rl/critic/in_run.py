"""The critic's part of a run, on the leader of each engine: ranks open groups, makes its own tasks.

After a step's episodes are played, groups of open prompts are ranked by the policy that gave the
answers. Verified groups with right and wrong answers become tasks of ``critic_pairs``, which the
next step plays with its prompts: the closed loop of Kimi K2 (arXiv 2507.20534, 3.2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Engine
from megatron_k2.gym.base import Task
from megatron_k2.rl.critic.brief import correctness, load_prompt
from megatron_k2.rl.critic.closed_loop import CriticPairs
from megatron_k2.rl.critic.critics import PolicyCritic
from megatron_k2.rl.critic.groups import judge_ranked
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.episode import Group
from megatron_k2.rl.run_tables import CriticRules


class RunCritic:
    """The policy as critic of a run.

    Args:
        engine: that plays the run's episodes.
        chat_format: of the model.
        rules: of the run file.
        seed: of the run.

    Raises:
        ValueError: no such prompt or rubrics.
    """

    def __init__(
        self, engine: Engine, chat_format: ChatFormat, rules: CriticRules, seed: int
    ) -> None:
        self._critic = PolicyCritic(engine, chat_format, max_tokens=rules.max_tokens)
        self._prompt, self._book = load_prompt(rules.prompt), load_rubrics(rules.rubrics)
        self._pairs = CriticPairs(correctness(rules.prompt), rules.pairs_per_task)
        self._rules, self._seed = rules, seed

    def tasks(self, step: int, num_engines: int) -> list[Task]:
        """Return this engine's critic tasks of a step; none before there are pairs."""
        return self._pairs.draw(self._rules.tasks // num_engines, self._seed + step)

    async def judge(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Rank open groups, and take the pairs of verified ones; return what to log."""
        counts = await judge_ranked(
            groups, self._critic, self._prompt, self._book, self._seed + step
        )
        added = self._pairs.add(groups)
        return dict(counts.scalars()) | {"pairs": float(len(self._pairs)), "new": float(added)}

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs as JSON."""
        return self._pairs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._pairs.load_state_dict(state)
