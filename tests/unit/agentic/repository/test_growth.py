"""Evolution: valid tools of a script without near-duplicates, resumable, faults mended."""

import asyncio
import json
from collections import Counter
from functools import cache
from typing import Any

import pytest

from megatron_k2.agentic.model import Question, Reply
from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.repository import scripted
from megatron_k2.agentic.repository.duplicates import shingles
from megatron_k2.agentic.repository.evolution import Settings, all_categories, num_domains
from megatron_k2.agentic.repository.growth import Evolved, evenly, evolve
from megatron_k2.agentic.repository.pairwise import near_duplicate_share
from megatron_k2.agentic.repository.schemas import check_tool
from megatron_k2.agentic.world.operation_checks import check_operation

SMALL = Settings(num_tools=40, categories=("smart_home", "unknown"))


@cache
def grown(num_tools: int) -> Evolved:
    return asyncio.run(evolve(ScriptedModel(), Settings(num_tools=num_tools), {}))


class Model(ScriptedModel):
    """The script, with answers changed on their way, and a count of questions."""

    def __init__(self, change: Any = None, stop_after: int = 10**9) -> None:
        super().__init__()
        self.change, self.stop_after, self.asked = change, stop_after, 0

    async def ask(self, question: Question) -> Reply:
        self.asked += 1
        if self.asked > self.stop_after:
            raise KeyError("killed")
        answer = json.loads(str(scripted.answer(question)["content"]))
        if self.change is not None:
            answer = self.change(question, answer)
        return Reply({"role": "assistant", "content": json.dumps(answer)}, model="changed")


def as_text(found: Evolved) -> str:
    return json.dumps([one.to_json() for one in [*found.domains, *found.tools]])


@pytest.mark.parametrize("num_tools", [340, pytest.param(2000, marks=pytest.mark.evidence)])
def test_tools_are_as_many_as_asked_for_valid_and_differ(num_tools: int) -> None:
    found = grown(num_tools)
    types = {one.id: one.types for one in found.domains}
    assert len(found.tools) >= num_tools
    for tool in found.tools:
        assert check_tool(tool) == []
        assert check_operation(types[tool.server], tool.operation, tool.parameters) == []
        described = tool.parameters["properties"].values()
        assert all(one["description"] for one in described)
    assert near_duplicate_share(found.tools, 0.7, shingles) == 0
    assert near_duplicate_share(found.tools) < 0.02


@pytest.mark.parametrize("count", [340, 100, 17, 10**6])
def test_what_is_beyond_the_number_is_left_out_of_every_category_alike(count: int) -> None:
    found = grown(340)
    tools = evenly(found, count)
    assert len(tools) == min(count, len(found.tools))
    places = [found.tools.index(one) for one in tools]
    assert places == sorted(set(places))
    domains = Counter(
        one.category for one in found.domains if any(t.server == one.id for t in tools)
    )
    if count == 340:
        assert domains.keys() == set(all_categories())
    if count <= 340:
        assert max(domains.values()) - min(domains.values()) <= 1


def test_every_category_step_and_operation_is_there() -> None:
    found = grown(340)
    assert {one.category for one in found.tools} == set(all_categories())
    assert len(all_categories()) == 17
    steps = Counter(one.origin["step"] for one in found.tools)
    assert set(steps) == {"base", "add_parameter", "add_precondition", "deepen", "broaden",
                          "batch", "combine"}  # fmt: skip
    assert min(steps.values()) > 15
    assert {one.operation["do"] for one in found.tools if one.operation} == {
        "get", "list", "create", "update", "delete", "transfer", "sum", "count", "batch", "steps"
    }  # fmt: skip
    assert max(one.origin["depth"] for one in found.tools) >= 2


def test_policies_are_enforced_by_conditions_of_operations() -> None:
    found = grown(340)
    policy = {one.id: one.policy for one in found.domains}
    enforcing = [one for one in found.tools if one.origin["enforces"]]
    assert len(enforcing) > 100
    for tool in enforcing:
        assert set(tool.origin["enforces"]) <= set(policy[tool.server])
        assert '"require"' in json.dumps(tool.operation)
    assert all(len(one.policy) >= 2 for one in found.domains)


def test_a_run_that_was_killed_ends_with_the_same_bytes() -> None:
    whole = asyncio.run(evolve(Model(), SMALL, {}))
    finished: dict[str, Any] = {}
    for stop_after in (1, 4, 9, 15, 10**9):
        model = Model(stop_after=stop_after)
        try:
            again = asyncio.run(evolve(model, SMALL, finished))
        except KeyError:
            finished = json.loads(json.dumps(finished))  # as a journal has it
    assert as_text(again) == as_text(whole)
    assert again.dropped == whole.dropped
    model = Model()
    assert as_text(asyncio.run(evolve(model, SMALL, finished))) == as_text(whole)
    assert model.asked == 0


def broken_once(question: Question, answer: dict[str, Any]) -> dict[str, Any]:
    if len(question.messages) == 2 and "tools" in answer:
        answer["tools"][0]["operation"] = {"do": "explode"}
    return answer


def broken_always(question: Question, answer: dict[str, Any]) -> dict[str, Any]:
    for one in answer.get("tools", [])[:1]:
        one["parameters"]["properties"]["x"] = {"$ref": "https://example.org/"}
    return answer


def test_a_broken_tool_is_asked_for_again_with_the_reason() -> None:
    seen = []

    def change(question: Question, answer: dict[str, Any]) -> dict[str, Any]:
        if len(question.messages) > 2:
            seen.append(str(question.messages[-1]["content"]))
        return broken_once(question, answer)

    found = asyncio.run(evolve(Model(change), SMALL, {}))
    assert any("'do' 'explode' is none of" in one for one in seen)
    assert found.dropped["operation"] == 0
    assert len(found.tools) >= 40


def test_a_tool_that_stays_broken_is_dropped_and_counted_and_the_others_stay() -> None:
    model = Model(broken_always)
    found = asyncio.run(evolve(model, SMALL, {}))
    assert found.dropped["reference"] > 5
    assert len(found.tools) >= 40
    assert all("https" not in json.dumps(one.parameters) for one in found.tools)


def unusable(question: Question, answer: dict[str, Any]) -> Any:
    match question.script["prompt"]:
        case "domains" if question.script["inputs"]["category"] == "smart_home":
            return []
        case "world" if "robot_control" in question.script["inputs"]["name"]:
            return {**answer, "types": {"entities": {}}}
        case "tools" if "legal" in question.script["inputs"]["domain"]:
            return {"tools": "none"}
    return answer


def test_what_a_model_cannot_do_is_counted_and_stops_nothing() -> None:
    names = ("smart_home", "robot_control", "legal_compliance", "unknown")
    settings = Settings(num_tools=60, categories=names)
    found = asyncio.run(evolve(Model(unusable), settings, {}))
    assert {one.category for one in found.domains} == {"unknown"}
    assert found.wanted == 4
    for reason in ("domain: none offered", "domain: no valid world", "domain: no valid tool"):
        assert found.dropped[reason] == 1
    assert found.dropped["unreadable answer"] == settings.base_tools


def test_the_number_of_tools_is_the_one_flag() -> None:
    assert sum(num_domains(Settings()).values()) == 115
    assert min(num_domains(Settings(num_tools=20_000)).values()) == 67
    with pytest.raises(ValueError, match="known are"):
        Settings(categories=("cooking",))


def test_tools_of_a_domain_are_made_of_json_and_read_back() -> None:
    found = grown(340)
    for tool in found.tools[:50]:
        assert Tool.from_json(json.loads(json.dumps(tool.to_json()))).id == tool.id
