"""``critic_pairs``: telling right answers from wrong ones, as an environment among others.

The policy's verdicts on pairs whose right answer is known are the answer; they score 1 where all
are right, and 0 otherwise, unreadable ones too: here the form is learned as well. This closes the
loop of Kimi K2's critic (arXiv 2507.20534, 3.2.2): what verifiable rewards teach, its judgement
learns in the same batch. In a run the tasks come from the policy's own answers
(``closed_loop.CriticPairs``). Those of ``load`` are made: words, one spelled backward, one nearly.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, cast, get_args

from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged
from megatron_k2.gym.splits import check_split
from megatron_k2.rl.bounds import least
from megatron_k2.rl.critic.brief import correctness
from megatron_k2.rl.critic.pair_tasks import ENVIRONMENT, PAIRS_PER_TASK, gold_answer, make_task
from megatron_k2.rl.critic.rubrics import Rubric
from megatron_k2.rl.critic.spelled import QUESTION, Mistakes, made_pairs
from megatron_k2.rl.critic.verdicts import read_verdicts

NUM_TASKS = {"train": 512, "test": 128}


class CriticPairsEnvironment(SingleTurn):
    """Which of two answers is right, several times or once."""

    name: ClassVar[str] = ENVIRONMENT
    budget: ClassVar[int] = 512

    @classmethod
    def load(
        cls,
        split: str,
        num_tasks: int | None = None,
        seed: int = 0,
        prompt: str = "pairwise",
        pairs: int = PAIRS_PER_TASK,
        question: str = QUESTION,
        mistakes: str = "one",
    ) -> Sequence[Task]:
        """Return tasks over made pairs; no word is in both splits.

        Args:
            split: ``train`` or ``test``.
            num_tasks: None: 512 or 128.
            seed: of the words.
            prompt: ``pairwise``, ``compact``, ``label_last``, or a TOML file.
            pairs: of a task, each in both orders; 0: one comparison, as a tournament asks.
            question: with {word}, once; a short one for models of a short context.
            mistakes: ``one`` in a wrong answer, or ``all`` of its letters, a first lesson.

        Raises:
            ValueError: another split, a prompt that is not there or wrong, fewer than 0 pairs, no
                {word}, or other mistakes.
        """
        check_split(split)
        least("pairs", pairs, 0)
        if mistakes not in get_args(Mistakes):
            raise ValueError(f"mistakes {mistakes!r} is none of {', '.join(get_args(Mistakes))}")
        if "{word}" not in question:
            raise ValueError(f"question {question!r} has no {{word}}")
        brief = correctness(prompt)
        roll = random.Random(f"critic_pairs {split} {seed}")
        wanted = NUM_TASKS[split] if num_tasks is None else num_tasks
        kind = cast(Mistakes, mistakes)
        return [
            make_task(
                made_pairs(max(1, pairs), split, roll, question, kind),
                brief,
                f"{split} {seed} {number}",
                both_orders=pairs > 0,
            )
            for number in range(wanted)
        ]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return the right verdicts."""
        return (Answer(gold_answer(task)),)

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Judge verdicts: 1 where all are right."""
        expected = task.metadata["expected"]
        rubric = Rubric(task.metadata["rubric"], text="")
        verdicts = read_verdicts(answer.text, len(expected), [rubric])
        if verdicts is None:
            return judged(0.0, "the answer is not in the form", {"readable": 0.0, "share": 0.0})
        hits = [one.better == side for one, side in zip(verdicts, expected, strict=True)]
        wrong = [str(at) for at, hit in enumerate(hits, 1) if not hit]
        share = sum(hits) / len(hits)
        detail = f"wrong in comparison {', '.join(wrong)}" if wrong else ""
        return judged(float(all(hits)), detail, {"readable": 1.0, "share": share})
