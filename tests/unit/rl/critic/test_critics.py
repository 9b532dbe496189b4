"""The policy and a frozen judge as critics."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from megatron_k2.engine.base import EngineFull
from megatron_k2.gym.judging import ScriptedJudge
from megatron_k2.rl.critic import critics
from megatron_k2.rl.critic.brief import Comparison
from megatron_k2.rl.critic.critics import CriticFailed, JudgeCritic, PolicyCritic
from megatron_k2.rl.critic.in_run import RunCritic
from megatron_k2.rl.critic.tournament import rank
from megatron_k2.rl.critic.watch import CriticDiverged
from megatron_k2.rl.run_critic import CriticRules
from megatron_k2.rl.sync.fingerprint import SyncRefused
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine
from tests.unit.rl.critic.critic_setting import BRIEF, say

ONE = [Comparison("6 x 7?", "42", "41")]


def choice(text: str, liked: str) -> str:
    first = text.partition("<A-")[2].partition("\n")[2].partition("\n")[0]
    return say("A" if first == liked else "B")


def prefers_42(prompt) -> list[int]:
    return [*choice(bytes(prompt).decode(), "42").encode(), 0]


def test_the_policy_judges_by_its_own_engine_and_the_version_is_recorded() -> None:
    engine = ScriptedEngine(prefers_42)
    critic = PolicyCritic(engine, ByteFormat())
    found = asyncio.run(rank(critic, BRIEF, "6 x 7?", ["41", "42", "43"], 3, "g"))
    assert found.rewards[1] == 1.0 and found.versions == (7,) and found.model == "policy"
    assert {one.sampling.temperature for one in engine.requests} == {0.0}
    assert len({one.sampling.seed for one in engine.requests}) == 6


def test_a_full_engine_is_asked_again_and_for_ever_full_is_no_verdict(monkeypatch) -> None:
    class Full(ScriptedEngine):
        refusals = 3

        async def stream(self, request):
            if self.refusals:
                self.refusals -= 1
                raise EngineFull("full")
            async for piece in super().stream(request):
                yield piece

    monkeypatch.setattr(critics, "WAIT_S", 0.001)
    said = asyncio.run(PolicyCritic(Full(prefers_42), ByteFormat()).say(BRIEF, ONE, 1))
    assert said.text == say("A")
    monkeypatch.setattr(critics, "WAITS", 2)
    with pytest.raises(CriticFailed, match="full"):
        asyncio.run(PolicyCritic(Full(prefers_42), ByteFormat()).say(BRIEF, ONE, 1))


def test_unconfirmed_weights_stop_the_run() -> None:
    class Shut(ScriptedEngine):
        async def stream(self, request):
            raise SyncRefused("weights 3 differ")
            yield

    with pytest.raises(SyncRefused):
        asyncio.run(rank(PolicyCritic(Shut(), ByteFormat()), BRIEF, "q", ["a", "b"], 1))


def test_no_room_or_an_abort_is_no_verdict() -> None:
    with pytest.raises(CriticFailed, match="no room"):
        small = ScriptedEngine(prefers_42, max_context=64)
        asyncio.run(PolicyCritic(small, ByteFormat()).say(BRIEF, ONE, 1))

    async def aborted() -> None:
        engine = ScriptedEngine(prefers_42, step_s=0.01)
        asked = asyncio.create_task(PolicyCritic(engine, ByteFormat()).say(BRIEF, ONE, 1))
        while not engine.held:
            await asyncio.sleep(0.001)
        await engine.abort(next(iter(engine.held)))
        await asked

    with pytest.raises(CriticFailed, match="aborted"):
        asyncio.run(aborted())


def test_a_frozen_judge_is_a_critic_and_its_failure_no_verdict() -> None:
    critic = JudgeCritic(ScriptedJudge(lambda messages, seed: say("B"), "frozen"))
    assert critic.model == "frozen"
    assert asyncio.run(critic.say(BRIEF, ONE, 1)).text == say("B")

    def fails(messages, seed) -> str:
        raise RuntimeError("refused")

    with pytest.raises(CriticFailed, match="refused"):
        asyncio.run(JudgeCritic(ScriptedJudge(fails)).say(BRIEF, ONE, 1))


def test_a_run_watches_its_critic_by_the_policys_first_verdicts_or_a_judge(tmp_path) -> None:
    sample = tmp_path / "pairs.jsonl"
    pairs = [{"question": f"{n}\u2028x 7?", "first": "42", "second": "41"} for n in range(12)]
    sample.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n\n" for one in pairs))
    rules = CriticRules(rubrics=("correctness",), watch=str(sample), watch_every=5)
    likes = {"word": "42"}
    engine = ScriptedEngine(
        lambda ids: [*choice(bytes(ids).decode(), likes["word"]).encode(), 0], slots=64
    )
    critic = RunCritic(engine, ByteFormat(), rules, seed=1)
    assert asyncio.run(critic.judge([], 0))["agreement"] == 1.0
    assert "agreement" not in asyncio.run(critic.judge([], 3))
    state = json.loads(json.dumps(critic.state_dict()))
    likes["word"] = "41"  # the policy drifts
    drifted = asyncio.run(critic.judge([], 5))
    assert drifted["agreement"] == 0.0 and drifted["diverged"] == 1.0
    stopping = RunCritic(engine, ByteFormat(), replace(rules, watch_stops=True), seed=1)
    stopping.load_state_dict(state)
    with pytest.raises(CriticDiverged):
        asyncio.run(stopping.judge([], 10))
    judge = ScriptedJudge(lambda messages, seed: choice(str(messages[-1]["content"]), "41"))
    watched = RunCritic(engine, ByteFormat(), rules, 1, judge)
    assert asyncio.run(watched.judge([], 0))["agreement"] == 1.0
    sample.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 1"):
        RunCritic(engine, ByteFormat(), rules, seed=1)
