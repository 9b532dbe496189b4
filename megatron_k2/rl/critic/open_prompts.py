"""Requests without one right answer: ``open_prompts`` by a judge, ``open_ranked`` by the critic.

``open_prompts``: a judge compares the answer with a reference, in both orders: 1 if it does not
lose, 0 if it does. ``open_ranked``: answers are paid by their rank in their group, by the policy as
critic (``groups.judge_ranked``); ``verify`` holds the place until then, for one answer alone has no
rank: 0, but 1 for the reference itself. Requests are a small set of our own, or a JSONL file of
``{"prompt", "reference", "tags"}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged
from megatron_k2.gym.services import Services
from megatron_k2.gym.splits import content_hash, distinct
from megatron_k2.inputs import read_toml
from megatron_k2.rl.critic.brief import Brief, load_prompt
from megatron_k2.rl.critic.critics import JudgeCritic
from megatron_k2.rl.critic.groups import RANKED, question_of
from megatron_k2.rl.critic.planted_ranks import misranked
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.critic.tournament import rank

TABLE = Path(__file__).with_name("open_prompts.toml")


class OpenPrompts(SingleTurn):
    """Requests without one right answer; a judge compares with a reference."""

    name: ClassVar[str] = "open_prompts"
    budget: ClassVar[int] = 1024
    needs: ClassVar[tuple[str, ...]] = ("judge",)
    is_ranked: ClassVar[bool] = False

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self._brief = Brief(load_prompt(), load_rubrics().rubrics)

    @classmethod
    def load(
        cls,
        split: str,
        num_tasks: int | None = None,
        seed: int = 0,
        file: str = "",
    ) -> Sequence[Task]:
        """Return tasks; a request's words decide its split.

        Args:
            split: ``train`` or ``test``.
            num_tasks: at most.
            seed: plays no part.
            file: JSONL; empty: our own requests.

        Raises:
            ValueError: a wrong split, or a line of the file is wrong.
        """
        rows = list(_rows(Path(file)) if file else read_toml(TABLE)["request"])
        found = distinct(rows, lambda row: str(row["prompt"]), split, None)
        return [
            Task(
                f"open-{content_hash(row['prompt'])}",
                cls.name,
                ({"role": "user", "content": row["prompt"]},),
                {"reference": row.get("reference", ""), RANKED: cls.is_ranked},
                tags=("domain:open", *row.get("tags", ())),
            )
            for row in found[:num_tasks]
        ]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return the reference."""
        return (Answer(task.metadata["reference"]),)

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Compare with the reference."""
        reference = task.metadata["reference"]
        if not answer.text.strip() or not reference:
            return judged(0.0, "no answer" if reference else "no reference to compare with")
        assert self.services.judge is not None  # ``needs``
        critic = JudgeCritic(self.services.judge)
        texts = [answer.text, reference]
        found = await rank(critic, self._brief, question_of(task), texts, 0, task.id)
        if found.counts.unparsable == found.counts.asked > 0:
            raise RuntimeError(f"{critic.model}: neither verdict can be read")
        loses = found.rewards[0] < found.rewards[1]
        return judged(float(not loses), "the reference is better" if loses else "", {}, found.model)


class RankedPrompts(OpenPrompts):
    """Requests without one right answer; the critic ranks the answers of a group.

    One answer has no gold: what proves it are planted groups, see ``planted_ranks.py``.
    """

    name: ClassVar[str] = "open_ranked"
    needs: ClassVar[tuple[str, ...]] = ()
    is_ranked: ClassVar[bool] = True

    @classmethod
    async def prove(cls, tasks: Sequence[Task]) -> Sequence[str] | None:
        """Return which planted groups are not ranked as they were planted."""
        return await misranked(tasks, Brief(load_prompt(), load_rubrics().rubrics))

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Hold the place of a rank."""
        is_reference = answer.text != "" and answer.text == task.metadata["reference"]
        return judged(float(is_reference), "to be ranked with its group")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"file {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"file {path}, line {number}: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ValueError(f"file {path}, line {number}: prompt is a text")
            yield row
