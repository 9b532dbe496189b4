"""Planted faults, retries, latency, strangers' declarations, and tools that a model answers."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from megatron_k2.agentic.model import Question, Reply
from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.toolbox import Result, ToolboxError
from megatron_k2.agentic.world.faults import FAULTS, check_faults
from megatron_k2.agentic.world.scripted import answer
from megatron_k2.agentic.world.simulator import Simulator
from tests.unit.agentic.world.shop import DOMAIN, TOOLS, WORLD

CALLS: Mapping[str, tuple[str, Any]] = {
    **dict.fromkeys(("rate_limit", "timeout", "transient"), ("raise", {"id": "o1", "by": 1})),
    "empty": ("get", {"id": "o1"}),
    "partial": ("close", {"ids": ["o1", "o2"]}),
    "truncated": ("list", {}),
}


def shop(faults: Mapping[str, Any], tools: tuple[Tool, ...] = TOOLS, **more: Any) -> Simulator:
    """Return a simulator of the shop."""
    return Simulator(tools, DOMAIN, WORLD, faults, 7, **more)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_met_at_its_call_and_then_over(fault: str) -> None:
    name, given = CALLS[fault]
    faults = {"planted": [{"tool": name, "call": 1, "fault": fault}]}
    assert check_faults(faults, TOOLS) == []
    simulator = shop(faults)
    invalid = simulator.call_now(name, {"nonsense": 1})  # does not count
    results = [simulator.call_now(name, given) for _ in range(3)]
    assert invalid.outcome == "invalid"
    assert [one.fault for one in results] == ["", fault, ""]
    if fault in ("rate_limit", "timeout", "transient"):
        assert json.loads(results[1].content)["error"]["retry"] is True
        assert simulator.world()["order"]["o1"]["total"] == 7  # 5 and twice 1
    if fault == "timeout":
        assert results[1].latency_s == 30
    if fault == "empty":
        assert results[1].content == ""
    if fault == "truncated":
        page = json.loads(results[1].content)
        rest = json.loads(simulator.call_now(name, {"after": page["next"]}).content)
        assert page["items"] + rest["items"] == json.loads(results[2].content)["items"]


def test_a_batch_that_fails_in_part_changes_what_it_says_it_changed() -> None:
    world = {**WORLD, "order": {f"o{n}": {**WORLD["order"]["o1"], "id": f"o{n}"}
                                for n in range(1, 9)}}  # fmt: skip
    keys = list(world["order"])
    planted = {"planted": [{"tool": "close", "call": 0, "fault": "partial"}]}
    for seed in range(20):
        simulator = Simulator(TOOLS, DOMAIN, world, planted, seed)
        result = simulator.call_now("close", {"ids": keys})
        said = [one["ok"] for one in json.loads(result.content)["results"]]
        after = simulator.world()["order"]
        assert result.outcome == "partial"
        assert [after[key]["status"] == "closed" for key in keys] == said


def test_faults_by_chance_come_as_often_as_they_should_and_retries_get_through() -> None:
    faults = {"rates": {"transient": 0.3, "timeout": 0.2}, "most_in_row": 2}
    results = [
        simulator.call_now("count", {})
        for seed in range(60)
        for simulator in [Simulator(TOOLS, DOMAIN, WORLD, faults, seed)]
        for _ in range(20)
    ]
    share = sum(one.outcome != "ok" for one in results) / len(results)
    assert 0.38 < share < 0.5  # below 0.5: the third in a row goes well
    rows = "".join("." if one.outcome == "ok" else "x" for one in results)
    assert all("xxx" not in rows[at : at + 20] for at in range(0, len(rows), 20))
    fine = [one.latency_s for one in results if one.outcome == "ok"]
    assert 0.3 < statistics.median(fine) < 0.5 and max(fine) > 1  # simulated: nothing slept


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"rate": {}}, "unknown 'rate'"),
        ({"rates": {"flood": 0.1}}, "'flood' is none of"),
        ({"rates": {"timeout": 0.6, "transient": 0.6}}, "at most 1"),
        ({"rates": {"timeout": "often"}}, "is none, or below 0"),
        ({"latency": {"median_s": -1}}, "is none, or below 0"),
        ({"latency": 3}, "are objects"),
        ({"planted": [{"tool": "get", "call": 0, "fault": "partial"}]}, "no fault of such a tool"),
        ({"planted": [{"tool": "nope", "call": 0, "fault": "timeout"}]}, "no such tool"),
        ({"planted": [{"tool": "get", "call": -1, "fault": "timeout"}]}, "wrong call"),
    ],
)
def test_wrong_faults_are_refused(faults: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        shop(faults)


@pytest.mark.parametrize(
    "given",
    ['{"id": NaN}', '{"id": 1e999}', '{"id": "\\ud800"}', '["o1"]', "{", "[" * 99_999,
     {"id": 10**5000}, {"id": {1}}, '{"id": "' + "x" * 100_001 + '"}', {"id": float("inf")}],
)  # fmt: skip
def test_what_is_no_json_object_is_an_invalid_call_not_a_crash(given: Any) -> None:
    assert shop({}).call_now("get", given).outcome == "invalid"


def test_a_strangers_regular_expression_is_not_run() -> None:
    slow = {"type": "object", "properties": {"pattern": {"type": "string", "pattern": "(a+)+$"}}}
    tool = replace(TOOLS[-1], parameters=slow, source="dump")
    assert shop({}, (tool,)).call_now("count", {"pattern": "a" * 60 + "!"}).outcome == "ok"
    assert shop({}, (tool,)).call_now("count", {"pattern": 3}).outcome == "invalid"


class Told:
    """A model that says what it is told, and counts."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Question] = []

    async def ask(self, question: Question) -> Reply:
        """Return the next answer."""
        self.asked.append(question)
        if not self.answers:
            return Reply(answer(question))
        return Reply({"role": "assistant", "content": json.dumps(self.answers.pop(0))})

    async def close(self) -> None:
        """Nothing."""


MODELLED = replace(TOOLS[0], name="ship", operation=None)


def asked(model: Told, *calls: Any) -> tuple[list[Result], Simulator]:
    """Make calls of a tool without an operation."""
    simulator = shop({}, (MODELLED, *TOOLS), model=model)

    async def run() -> list[Result]:
        return [await simulator.call("ship", one) for one in calls]

    return asyncio.run(run()), simulator


def test_a_models_changes_are_made_and_its_answer_is_remembered_while_nothing_changes() -> None:
    change = {"entity": "order", "key": "o1", "set": {"note": "$sent"}}
    model = Told({"result": {"sent": True}, "changes": [change]}, {"result": {"seen": 1}})
    (first, second, third), simulator = asked(model, {"id": "o1"}, {"id": "o1"}, {"id": "o1"})
    assert simulator.world()["order"]["o1"]["note"] == "$sent"
    assert first.outcome == "ok" and first.before != first.after
    assert second.content == third.content == '{"seen":1}' and len(model.asked) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"result": 1, "changes": [{"entity": "order", "key": "o9", "set": {"note": "x"}}]},
        {"result": 1, "changes": [{"entity": "order", "key": "o1", "set": {"total": 99}}]},
        {"result": 1, "changes": [{"entity": "customer", "key": "c1", "delete": True}]},
        {"result": 1, "changes": [{"entity": "ghost", "set": {}}]},
        {"result": 1, "changes": [{"entity": "order", "key": "$id", "set": {"note": {"a": 1}}}]},
        {"answer": 1},
    ],
)
def test_a_models_changes_that_do_not_fit_are_asked_for_again_then_given_up(wrong: Any) -> None:
    good = {"error": "sold out"}
    (result,), simulator = asked(model := Told(wrong, good), {"id": "o1"})
    assert result.outcome == "refused" and "sold out" in result.content
    assert simulator.world() == WORLD and len(model.asked) == 2
    with pytest.raises(ToolboxError, match="could not be simulated"):
        asked(Told(wrong, wrong, wrong), {"id": "o1"})


def test_a_tool_without_an_operation_needs_a_model() -> None:
    with pytest.raises(ValueError, match="no operation, and no model"):
        shop({}, (MODELLED,))
    (result,), _ = asked(Told(), {"id": "o1"})
    assert json.loads(result.content)["tool"] == "ship"
