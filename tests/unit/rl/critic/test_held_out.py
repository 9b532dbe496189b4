"""The critic's accuracy on held-out pairs, as a run measures it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.rl.critic.held_out import HeldOutPairs, read_pairs
from megatron_k2.rl.critic.in_run import RunCritic
from megatron_k2.rl.run_critic import CriticRules
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine
from tests.unit.rl.critic.critic_setting import BRIEF, group, prefers

HIGHER = prefers(lambda first, second: first > second)
LOWER = prefers(lambda first, second: first < second)


def mixed(name: str) -> Any:
    return group([("9", 1.0), ("3", 0.0)], name)


def test_the_policys_own_answers_become_pairs_once_and_are_kept() -> None:
    played: list[int] = []

    async def play(version: int) -> Any:
        played.append(version)
        return [mixed(str(n)) for n in range(4)] if version else [group([("9", 1.0)])]

    async def body() -> None:
        found = HeldOutPairs(BRIEF, 0, play=play)
        assert await found.measure(HIGHER, 0, 1) == {"held_out/pairs": 0.0}  # never wrong yet
        first = await found.measure(HIGHER, 5, 1)
        assert first["held_out/pairs"] == 4 and first["held_out/pairs_won"] == 1.0
        resumed = HeldOutPairs(BRIEF, 0, play=play)
        resumed.load_state_dict(json.loads(json.dumps(found.state_dict())))
        assert (await resumed.measure(LOWER, 9, 1))["held_out/pairs_won"] == 0.0
        assert played == [0, 5]

    asyncio.run(body())


def test_a_run_reports_it_every_so_many_steps_and_a_critic_that_fails_ends_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "q", "right": "a", "wrong": "b"}) + "\n")
    rules = CriticRules(accuracy_every=2, accuracy_pairs=str(path))
    critic = RunCritic(ScriptedEngine(max_context=1 << 16), ByteFormat(), rules, 1)

    async def noted(critic: RunCritic, step: int) -> dict[str, float]:
        return await critic.judge([], step)

    found = [asyncio.run(noted(critic, step)) for step in range(3)]
    measured = [one.get("held_out/unparsable") for one in found]
    assert measured == [1.0, None, 1.0]  # random bytes are no verdicts
    short = RunCritic(ScriptedEngine(max_context=8), ByteFormat(), rules, 1)
    assert asyncio.run(noted(short, 0))["held_out/failed"] == 1.0
    assert "held_out" in critic.state_dict()
    other = RunCritic(ScriptedEngine(), ByteFormat(), rules, 1, measures=False)
    assert "held_out/pairs" not in asyncio.run(noted(other, 0))


def test_a_file_of_no_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no pair in it"):
        read_pairs(str(tmp_path / "none.jsonl"))
