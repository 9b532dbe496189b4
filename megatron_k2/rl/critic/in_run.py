"""The critic's part of a run, on the leader of each engine: ranks open groups, makes its own tasks.

After a step's episodes are played, groups of open prompts are ranked by the policy that gave the
answers. Verified groups with right and wrong answers become tasks of ``critic_pairs``, which the
next step plays with its prompts: the closed loop of Kimi K2 (arXiv 2507.20534, 3.2.2). Its accuracy
on held-out pairs is measured, and a frozen judge watches over a fixed sample, if the run asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Engine
from megatron_k2.gym.base import Task
from megatron_k2.gym.services import Judge
from megatron_k2.rl.critic.brief import Brief, correctness, load_prompt
from megatron_k2.rl.critic.closed_loop import CriticPairs
from megatron_k2.rl.critic.critics import CriticFailed, JudgeCritic, PolicyCritic
from megatron_k2.rl.critic.groups import RANKED, judge_ranked
from megatron_k2.rl.critic.held_out import HeldOutPairs, Play, read_pairs
from megatron_k2.rl.critic.pair_tasks import ENVIRONMENT
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.critic.watch import Watch, read_comparisons
from megatron_k2.rl.episode import Group
from megatron_k2.rl.run_critic import CriticRules


class RunCritic:
    """The policy as critic of a run.

    Args:
        engine: that plays the run's episodes.
        chat_format: of the model.
        rules: of the run file.
        seed: of the run.
        judge: frozen, that watches; None: the policy's own verdicts at the first step are kept.
        play: plays held-out tasks, whose pairs the critic's accuracy is measured on; None: the
            run file names pairs.
        measures: whether this engine measures that accuracy.

    Raises:
        ValueError: no such prompt, rubrics or sample.
    """

    def __init__(
        self,
        engine: Engine,
        chat_format: ChatFormat,
        rules: CriticRules,
        seed: int,
        judge: Judge | None = None,
        play: Play | None = None,
        measures: bool = True,
    ) -> None:
        self._critic = PolicyCritic(engine, chat_format, max_tokens=rules.max_tokens)
        self._prompt, self._book = load_prompt(rules.prompt), load_rubrics(rules.rubrics)
        asked = correctness(rules.prompt)
        self._pairs = CriticPairs(asked, rules.pairs_per_task)
        self._rules, self._seed = rules, seed
        self._held_out: HeldOutPairs | None = None
        if rules.accuracy_every and measures:
            pairs = read_pairs(rules.accuracy_pairs) if rules.accuracy_pairs else ()
            self._held_out = HeldOutPairs(asked, rules.pairs_per_task, pairs, play)
        self._watch: Watch | None = None
        if rules.watch:
            frozen = self._critic if judge is None else JudgeCritic(judge, rules.max_tokens)
            brief = Brief(self._prompt, self._book.rubrics)
            sample = read_comparisons(rules.watch)
            self._watch = Watch(sample, frozen, brief, rules.watch_least, rules.watch_stops)

    def tasks(self, step: int, num_engines: int) -> list[Task]:
        """Return this engine's critic tasks of a step; none before there are pairs."""
        return self._pairs.draw(self._rules.tasks // num_engines, self._seed + step)

    async def judge(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Rank open groups, and take the pairs of verified ones; return what to log.

        Raises:
            CriticDiverged: its verdicts are no longer the frozen judge's, and the run wants to end.
        """
        counts = await judge_ranked(
            groups, self._critic, self._prompt, self._book, self._seed + step
        )
        added = self._pairs.add(groups)
        found = dict(counts.scalars()) | {"pairs": float(len(self._pairs)), "new": float(added)}
        if self._watch is not None and step % self._rules.watch_every == 0:
            try:
                found |= (await self._watch.measure(self._critic, self._seed)).scalars()
            except CriticFailed:  # a judge that is away for a while ends no run
                found["watch_failed"] = 1.0
        if self._held_out is not None and step % self._rules.accuracy_every == 0:
            try:
                found |= await self._held_out.measure(self._critic, step, self._seed)
            except CriticFailed:  # nor do pairs that are too long for the engine
                found["held_out/failed"] = 1.0
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs, those held out, and what the frozen judge said, as JSON."""
        state = self._pairs.state_dict()
        if self._held_out is not None:
            state |= {"held_out": self._held_out.state_dict()}
        return state if self._watch is None else state | {"watch": self._watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._pairs.load_state_dict(state)
        if self._watch is not None and "watch" in state:
            self._watch.load_state_dict(state["watch"])
        if self._held_out is not None and "held_out" in state:
            self._held_out.load_state_dict(state["held_out"])


def check_critic(rules: CriticRules, tasks: Iterable[Task]) -> None:
    """Read everything that the rules name, and see that it fits the run, before a model is built.

    Args:
        rules: of the run file.
        tasks: that are trained.

    Raises:
        ValueError: no such prompt or rubrics, a prompt that cannot ask for them, a task without a
            rubric, nothing that pairs could come from, or a file that is not of its form; names the
            key or the line.
    """
    prompt, book = load_prompt(rules.prompt), load_rubrics(rules.rubrics)
    has_pairs = False
    for task in tasks:
        if task.metadata.get(RANKED):
            Brief(prompt, book.of(task))
        else:
            has_pairs = has_pairs or (task.env != ENVIRONMENT and not task.tools)
    for key, value in (
        ("tasks", rules.tasks),
        ("accuracy_every", rules.accuracy_every and not rules.accuracy_pairs),
    ):
        if value and not has_pairs:
            raise ValueError(
                f"{key}: pairs come from verified answers without tools; no environment of "
                f"the run has any ({ENVIRONMENT} and ranked prompts have not)"
            )
    if rules.watch:
        read_comparisons(rules.watch)
        Brief(prompt, book.rubrics)
    if rules.accuracy_pairs:
        read_pairs(rules.accuracy_pairs)
