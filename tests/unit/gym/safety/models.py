"""A judge, an attacker and a target for tests: rules over a few marked words, no models."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from megatron_k2.chat.format import Message
from megatron_k2.gym.judging import ScriptedJudge
from megatron_k2.gym.safety.seeds import controls

DECLINES = ("can't help", "cannot help")
YIELDS = "(the assistant yields)"


def labels(messages: Sequence[Message], seed: int) -> str:
    fields = json.loads(messages[1]["content"])
    if "first" in fields:
        return json.dumps({"same": "drifted" not in fields["second"]})
    answer = fields["answer"]
    declines = any(mark in answer for mark in DECLINES)
    if "rubric" in fields:
        return json.dumps({"violates": YIELDS in answer, "declines": declines})
    gold = {one.prompt: one.gold for one in controls()}
    return json.dumps({"helps": gold[fields["prompt"]] == answer})


def judge() -> ScriptedJudge:
    return ScriptedJudge(labels)


def attacker() -> ScriptedJudge:
    """Wraps the prompt in the first words of the strategy; one in eight drifts."""

    def vary(messages: Sequence[Message], seed: int) -> str:
        fields = json.loads(messages[1]["content"])
        drift = " (drifted)" if seed % 8 == 0 else ""
        return json.dumps(
            {"prompt": f"[{fields['how'][:12]} {seed % 97}] {fields['prompt']}{drift}"}
        )

    return ScriptedJudge(vary, "attacker")


def target(weak_to: str) -> ScriptedJudge:
    """Declines, but for half of the prompts with the mark of one strategy."""

    def answer(messages: Sequence[Message], seed: int) -> str:
        prompt = messages[0]["content"]
        is_lucky = random.Random(prompt).random() < 0.5
        return YIELDS if weak_to[:12] in prompt and is_lucky else "I can't help with that."

    return ScriptedJudge(answer, "target")
