"""A judge for tests that knows the gold answers of tasks: criteria hold for those alone."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_k2.chat.format import Message
from megatron_k2.gym.base import Task
from megatron_k2.gym.judging import ScriptedJudge


def judge_of(tasks: Sequence[Task], claims: bool = False) -> ScriptedJudge:
    """Return a judge that finds the gold answer to a request to meet its criteria.

    Args:
        tasks: with gold answers in their metadata.
        claims: what it says of claims.
    """
    gold = {(task.metadata["request"], task.metadata.get("gold")) for task in tasks}

    def answer(messages: Sequence[Message], seed: int) -> str:
        fields = json.loads(messages[1]["content"])
        if "criterion" in fields:
            return json.dumps({"meets": (fields["request"], fields["answer"]) in gold})
        return json.dumps({"claims": claims})

    return ScriptedJudge(answer)
