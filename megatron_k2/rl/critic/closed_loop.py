"""The closed loop's source of tasks: pairs out of the policy's own verified answers.

A verifiable group with right and wrong answers gives a pair; pairs become tasks of
``critic_pairs``, trained in the same batch as all else (arXiv 2507.20534, 3.2.2). Only answers that
ended by themselves are taken: a critic that sees cut answers on the wrong side alone learns to look
for the cut. Tasks with tools are left out, whose last answer does not show the work.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_k2.gym.base import Task
from megatron_k2.rl.bounds import least
from megatron_k2.rl.critic.brief import Brief, correctness
from megatron_k2.rl.critic.groups import answer_of, question_of
from megatron_k2.rl.critic.pair_tasks import (
    ENVIRONMENT,
    PAIRS_PER_TASK,
    Pair,
    make_task,
    pair_from,
)
from megatron_k2.rl.episode import Group


class CriticPairs:
    """Pairs, newest last, and the tasks drawn from them.

    Args:
        brief: of the tasks; ``correctness()`` by default, ``correctness("label_last")`` for small
            models.
        pairs_per_task: in both orders; 0: one comparison a task; see ``pair_tasks``.
        pairs_per_group: of one group at most; each answer is in one pair of a group only.
        capacity: pairs kept; the oldest go first, being the oldest policy's.
        uses: draws after which a pair goes.
    """

    def __init__(
        self,
        brief: Brief | None = None,
        pairs_per_task: int = PAIRS_PER_TASK,
        pairs_per_group: int = 1,
        capacity: int = 4096,
        uses: int = 4,
    ) -> None:
        least("pairs_per_task", pairs_per_task, 0)
        for name, value in (
            ("pairs_per_group", pairs_per_group),
            ("capacity", capacity),
            ("uses", uses),
        ):
            least(name, value, 1)
        self._brief = brief or correctness()
        self._per_task, self._per_group = pairs_per_task, pairs_per_group
        self._capacity, self._uses = capacity, uses
        self._pairs: OrderedDict[str, Pair] = OrderedDict()
        self._used: dict[str, int] = {}
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, groups: Sequence[Group]) -> int:
        """Take the pairs of finished groups; return how many are new."""
        added = 0
        for group in groups:
            for pair in pairs_of(group, self._per_group):
                added += pair.id not in self._pairs
                self._pairs[pair.id] = pair
                self._pairs.move_to_end(pair.id)
                self._used[pair.id] = 0
        while len(self._pairs) > self._capacity:
            self._drop(next(iter(self._pairs)))
        return added

    def draw(self, num_tasks: int, seed: int) -> list[Task]:
        """Return tasks, fewer where pairs are few; no pair is in two of them.

        Args:
            num_tasks: wanted.
            seed: of the choice; the same state and seed give the same tasks.
        """
        roll = random.Random(f"{seed} {self._drawn}")
        chosen = list(self._pairs)
        roll.shuffle(chosen)
        size = max(1, self._per_task)
        whole = min(num_tasks, len(chosen) // size)
        tasks = []
        for at in range(whole):
            ids = chosen[at * size : (at + 1) * size]
            pairs = [self._pairs[one] for one in ids]
            name = f"{seed} {self._drawn + at}"
            tasks.append(make_task(pairs, self._brief, name, both_orders=self._per_task > 0))
            for one in ids:
                self._used[one] += 1
                if self._used[one] >= self._uses:
                    self._drop(one)
        self._drawn += whole
        return tasks

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        rows = [asdict(pair) | {"used": self._used[id]} for id, pair in self._pairs.items()]
        return {"pairs": rows, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ValueError: it is not that.
        """
        self._pairs.clear()
        self._used.clear()
        for row in state["pairs"]:
            pair = pair_from({key: value for key, value in row.items() if key != "used"})
            self._pairs[pair.id], self._used[pair.id] = pair, int(row["used"])
        self._drawn = int(state["drawn"])

    def _drop(self, id: str) -> None:
        del self._pairs[id], self._used[id]


def pairs_of(group: Group, most: int = 1) -> list[Pair]:
    """Return pairs of a group's right and wrong answers, drawn by its id; often none."""
    if group.task.env == ENVIRONMENT or group.task.tools:
        return []
    finished = [one for one in group.judged if one.ending == "finished"]
    texts = [
        (answer_of(one), one.verdict is not None and one.verdict.status == "ok") for one in finished
    ]
    right = sorted({text for text, ok in texts if ok and text})
    wrong = sorted({text for text, ok in texts if not ok and text} - set(right))
    roll = random.Random(group.id)
    roll.shuffle(right)
    roll.shuffle(wrong)
    question = question_of(group.task)
    chosen = list(zip(right, wrong, strict=False))[:most]
    return [Pair(question, good, bad, group.task.env) for good, bad in chosen]
