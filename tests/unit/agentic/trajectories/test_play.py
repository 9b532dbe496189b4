"""One dialogue: endings, limits, failures, faults that the policy tries again, known mistakes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from megatron_k2.agentic.judge.rules import by_rules
from megatron_k2.agentic.model import Question, Refused, Reply
from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.records import Agent, AgentTask, Trajectory
from megatron_k2.agentic.tasks.prove import simulated
from megatron_k2.agentic.toolbox import ToolboxError
from megatron_k2.agentic.trajectories.play import Limits, play
from megatron_k2.agentic.trajectories.policies import ModelPolicy
from megatron_k2.agentic.trajectories.user import SimulatedUser, read_word, seen_by_user
from megatron_k2.data.rephrase.gate import BudgetSpent
from tests.unit.agentic.tasks.written import Case, cases, of_form


class Saying:
    """A policy's model that says the same again and again."""

    def __init__(self, message: dict[str, Any], tokens: int = 0) -> None:
        self._message, self._tokens = message, tokens

    async def ask(self, question: Question) -> Reply:
        return Reply({"role": "assistant", **self._message}, self._tokens, 0, "saying")

    async def close(self) -> None:
        pass


class Raising(Saying):
    """A model that raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def ask(self, question: Question) -> Reply:
        raise self._error


def played(case: Case, model: Any = None, toolbox: Any = None, **changes: Any) -> Trajectory:
    domain, tools, agent, task = case
    user = SimulatedUser(changes.pop("user", None) or ScriptedModel())
    box = toolbox or simulated(domain, tools, task, task.faults)
    policy = ModelPolicy(model or ScriptedModel(), mistakes=changes.pop("mistakes", None))
    return asyncio.run(play(task, agent, box, policy, user, **changes))


def called(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"content": None, "tool_calls": [{"id": "x", "type": "function", "function": function}]}


def test_a_script_without_mistakes_passes_every_rubric() -> None:
    for case in cases():
        found = played(case)
        assert by_rules(case[3], found, case[0].types).passes, case[3].origin["form"]
        assert found.evidence == {} and found.model == "scripted"


def test_the_same_dialogue_comes_out_again_and_another_attempt_differs() -> None:
    case = of_form("chain")
    assert played(case) == played(case)
    assert played(case, attempt=1).id != played(case).id


def test_tasks_read_from_a_file_play_the_same_dialogue() -> None:
    for domain, tools, agent, task in cases()[:20]:
        lines = [json.dumps(one.to_json(), sort_keys=True) for one in (agent, task)]
        read = (Agent.from_json(json.loads(lines[0])), AgentTask.from_json(json.loads(lines[1])))
        case = (domain, tools, agent, task)
        assert read[1].id == task.id
        again = played((domain, tools, *read), mistakes=0.5)
        assert json.dumps(again.to_json()) == json.dumps(played(case, mistakes=0.5).to_json())


def test_evidence_is_read_after_the_toolbox_has_ended() -> None:
    domain, tools, _, task = case = of_form("one")
    box = Broken(simulated(domain, tools, task, {}), is_broken=False)
    assert played(case, toolbox=box).evidence["num_closed"] == 1


def test_many_dialogues_at_once_are_those_played_alone() -> None:
    chosen = cases()[:12]

    async def together() -> list[Trajectory]:
        model = ScriptedModel()
        return await asyncio.gather(
            *(
                play(
                    task, agent, simulated(domain, tools, task, task.faults),
                    ModelPolicy(model), SimulatedUser(model),
                )
                for domain, tools, agent, task in chosen
            )
        )  # fmt: skip

    assert asyncio.run(together()) == [played(case) for case in chosen]


def test_a_missing_fact_is_told_when_asked_and_not_before() -> None:
    found = played(of_form("missing"))
    roles = [message["role"] for message in found.messages[:4]]
    assert roles == ["system", "user", "assistant", "user"]
    assert "?" in found.messages[2]["content"]


def test_call_ids_are_kimis_and_every_call_has_its_result() -> None:
    found = played(of_form("several"))
    ids = [call.call_id for call in found.made]
    assert ids == [f"functions.{call.name}:{at}" for at, call in enumerate(found.made)]
    returns = [one["tool_call_id"] for one in found.messages if one["role"] == "tool"]
    assert returns == ids
    for call in found.made:
        assert found.messages[call.turn]["role"] == "assistant"


@pytest.mark.parametrize(
    ("limits", "ending"),
    [(Limits(turns=3), "turns"), (Limits(calls=2), "turns"), (Limits(context=50), "context")],
)
def test_limits_end_a_dialogue(limits: Limits, ending: str) -> None:
    case = of_form("one")
    endless = Saying(called(case[1][0].name, "{}"), tokens=60)
    if limits.context > 50:
        endless = Saying(called(case[1][0].name, "{}"))
    found = played(case, endless, limits=limits)
    assert found.ending == ending
    assert sum(one["role"] == "assistant" for one in found.messages) <= 3


def test_a_malformed_call_is_an_answer_that_the_policy_reads() -> None:
    case = of_form("one")
    found = played(case, Saying(called("no_such_tool", '{"a": ')), limits=Limits(turns=2))
    first = found.made[0]
    assert (first.outcome, first.arguments) == ("invalid", None)
    assert "no tool" in found.messages[3]["content"]


def test_a_user_who_is_told_nothing_gives_up() -> None:
    found = played(of_form("missing"), Saying({"content": "Is it raining? Which colour is it?"}))
    assert found.ending in ("user", "finished", "turns") and not found.calls


class Broken:
    """A toolbox that fails at its first call, if it is broken."""

    def __init__(self, inner: Any, is_broken: bool = True) -> None:
        self._inner, self.tools, self.num_closed = inner, inner.tools, 0
        self._is_broken = is_broken

    async def call(self, name: str, arguments: Any) -> Any:
        if not self._is_broken:
            return await self._inner.call(name, arguments)
        raise ToolboxError("the server is gone")

    def world(self) -> Any:
        return self._inner.world()

    def evidence(self) -> dict[str, Any]:
        return {"num_closed": self.num_closed}

    async def close(self) -> None:
        self.num_closed += 1


def test_a_broken_toolbox_is_a_failed_trajectory_and_is_closed_once() -> None:
    case = of_form("one")
    domain, tools, _, task = case
    box = Broken(simulated(domain, tools, task, {}))
    found = played(case, toolbox=box)
    assert found.ending == "failed" and "the server is gone" in found.evidence["failure"]
    assert box.num_closed == 1


def test_a_refusing_model_fails_one_dialogue_and_a_spent_budget_stops_the_run() -> None:
    case = of_form("one")
    assert played(case, Raising(Refused("no"))).ending == "failed"
    assert played(case, user=Raising(Refused("no"))).ending == "failed"
    with pytest.raises(BudgetSpent):
        played(case, Raising(BudgetSpent("spent")))


def test_marks_end_a_dialogue_and_are_not_said() -> None:
    assert read_word("Thanks. ###DONE###").ends == "satisfied"
    assert read_word("Enough. ###GIVE UP### ###DONE###").ends == "gives_up"
    assert read_word("Which one?").ends == "" and read_word("Thanks ###DONE### x").text == "Thanks"


def test_a_user_never_sees_calls_and_a_policy_never_sees_the_goal() -> None:
    case = of_form("dependent")
    found = played(case)
    seen = seen_by_user(case[3], found.messages)
    assert {one["role"] for one in seen} == {"system", "user", "assistant"}
    results = [one["content"] for one in found.messages if one["role"] == "tool"]
    assert not any(text and text in str(seen) for text in results)
    assert case[3].goal in seen[0]["content"]
    assert not any(case[3].goal in str(one["content"]) for one in found.messages)


def test_mistakes_are_recorded_and_only_where_they_are_wanted() -> None:
    found = [played(case, mistakes=1.0).evidence["planted"] for case in cases()[:30]]
    assert found.count("correct") <= 3 and len(set(found)) >= 5
    assert played(cases()[0], mistakes=0.0).evidence == {"planted": "correct"}
