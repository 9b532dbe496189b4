"""Instructions that a run draws from what its policy fails at."""

from __future__ import annotations

import json
from collections import Counter

from megatron_k2.gym.base import Task, judged
from megatron_k2.gym.instructions.rules import RULES
from megatron_k2.rl.curation.probing import ProbingTasks
from megatron_k2.rl.episode import Episode, Group

WEAK = "no_commas"


def group(components: dict[str, float], env: str = "instructions") -> Group:
    task = Task("t", env, ({"role": "user", "content": "q"},))
    verdict = judged(0.0, components=components)
    return Group("g", task, [Episode("g/0", task, 0, None, "finished", verdict)])  # type: ignore[arg-type]


def drawn(probing: ProbingTasks) -> Counter[str]:
    tags = [tag for step in range(20) for task in probing.tasks(step) for tag in task.tags]
    return Counter(tag.partition(":")[2] for tag in tags if tag.startswith("kind:"))


def test_what_fails_is_drawn_more_often_and_a_restart_draws_the_same() -> None:
    probing = ProbingTasks(3, seed=5, system="s")
    before = drawn(probing)
    kinds = dict.fromkeys(RULES, 1.0) | {WEAK: 0.0}
    probing.add([group(kinds)] * 30)
    probing.add([group(dict.fromkeys(RULES, 0.0), env="reasoning")] * 30)  # no instructions
    after = drawn(probing)
    assert after[WEAK] > 3 * before[WEAK] and sum(after.values()) > 60
    assert probing.scalars() == {"kinds_tried": len(RULES), "followed": 1 - 1 / len(RULES)}
    again = ProbingTasks(3, seed=5, system="s")
    again.load_state_dict(json.loads(json.dumps(probing.state_dict())))
    tasks = again.tasks(7)
    assert tasks == probing.tasks(7) and len(tasks) == 3
    assert {task.messages[0]["content"] for task in tasks} == {"s"}
    assert tasks != ProbingTasks(3, seed=5, copy=1, system="s").tasks(7)
