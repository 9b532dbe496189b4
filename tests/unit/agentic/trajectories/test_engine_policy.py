"""The agent by token ids: the same dialogue as by messages, from a ledger that never changes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.records import Trajectory
from megatron_k2.agentic.tasks.prove import simulated
from megatron_k2.agentic.trajectories.engine_policy import EnginePolicy
from megatron_k2.agentic.trajectories.play import Limits, play
from megatron_k2.agentic.trajectories.policies import ModelPolicy
from megatron_k2.agentic.trajectories.user import SimulatedUser
from megatron_k2.chat.ledger_check import agreement
from megatron_k2.chat.ledger_file import from_json
from tests.unit.agentic.tasks.written import Case, of_form
from tests.unit.engine.scripted_engine import ScriptedEngine
from tests.unit.rl.rollout.scripted import small_format

FORMAT = small_format()


def by_messages(case: Case) -> Trajectory:
    domain, tools, agent, task = case
    box = simulated(domain, tools, task, task.faults)
    model = ScriptedModel()
    return asyncio.run(play(task, agent, box, ModelPolicy(model), SimulatedUser(model)))


def by_ids(case: Case, engine: ScriptedEngine, **changes: Any) -> Trajectory:
    domain, tools, agent, task = case
    box = simulated(domain, tools, task, task.faults)
    policy = EnginePolicy(engine, FORMAT, name="tiny", keeps_ledger=True)
    return asyncio.run(play(task, agent, box, policy, SimulatedUser(ScriptedModel()), **changes))


def following(told: Trajectory) -> ScriptedEngine:
    """An engine that says what the agent of a trajectory said."""
    answers = {}
    for at, message in enumerate(told.messages):
        if message["role"] == "assistant":
            prompt = FORMAT.encode(told.messages[:at], told.tools)
            whole = FORMAT.encode(told.messages[: at + 1], told.tools, add_generation_prompt=False)
            assert whole[: len(prompt)] == prompt
            answers[tuple(prompt)] = whole[len(prompt) :]
    return ScriptedEngine(lambda prompt: answers[tuple(prompt)], max_context=100_000)


def test_ids_and_messages_play_the_same_dialogue() -> None:
    for form in ("several", "missing", "change"):
        case = of_form(form)
        told = by_messages(case)
        engine = following(told)
        found = by_ids(case, engine)
        assert found.calls == told.calls and found.world == told.world
        assert found.ending == told.ending and found.model == "tiny"
        assert [one["role"] for one in found.messages] == [one["role"] for one in told.messages]
        ledger = from_json(FORMAT, found.evidence["ledger"])
        checked = agreement(ledger)
        assert checked.num_engine == sum(ledger.row().loss_mask) and not checked.malformed_turns
        for before, after in zip(engine.requests, engine.requests[1:], strict=False):
            assert after.prompt[: len(before.prompt)] == before.prompt
        assert ledger.ids[: len(engine.requests[-1].prompt)] == list(engine.requests[-1].prompt)


def said(text: str) -> Sequence[int]:
    return [*FORMAT.encode_text(text), FORMAT.stop_ids[0]]


def test_a_call_that_cannot_be_read_is_told_so_and_then_ends_the_dialogue() -> None:
    begin = FORMAT.tokenizer.special_id("<|tool_calls_section_begin|>")
    broken = [begin, *FORMAT.encode_text("no call"), FORMAT.stop_ids[0]]
    case = of_form("one")
    engine = ScriptedEngine(lambda prompt: broken, max_context=100_000)
    found = by_ids(case, engine, limits=Limits(unreadable=2))
    assert found.ending == "turns" and found.evidence["unreadable"] == 2
    notes = [one["content"] for one in found.messages[2:] if one["role"] == "system"]
    assert len(notes) == 1 and "could not be read" in notes[0]


def test_a_full_context_ends_the_dialogue() -> None:
    case = of_form("one")
    room = len(FORMAT.encode(by_messages(case).messages[:2], by_messages(case).tools)) + 3
    engine = ScriptedEngine(lambda prompt: said("a long answer that is cut"), max_context=room)
    assert by_ids(case, engine).ending == "context"
    engine = ScriptedEngine(lambda prompt: said("x"), max_context=room - 3)
    assert by_ids(case, engine).ending == "context"


def test_a_prompt_that_the_engine_refuses_fails_the_dialogue() -> None:
    class Refusing(ScriptedEngine):
        def answer(self, request: Any) -> Any:
            raise ValueError("too long")

    found = by_ids(of_form("one"), Refusing(max_context=100_000))
    assert found.ending == "failed" and "too long" in found.evidence["failure"]
