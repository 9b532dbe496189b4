"""Who answers a question: servers, recordings, scripts; and answers that must be JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_k2.agentic.model import Model, NotRecorded, Question, Refused, Reply
from megatron_k2.agentic.models.counted import TALLY, CountedModel, Tally
from megatron_k2.agentic.models.json_answers import ask_json
from megatron_k2.agentic.models.recorded import RecordedModel, Recording, read_recordings
from megatron_k2.agentic.models.routed import RenamedModel, RoutedModel
from megatron_k2.agentic.models.scripted import ScriptedModel, in_one_form
from megatron_k2.agentic.models.server import FLAGS, ServerModel
from megatron_k2.agentic.stages.flags import parser
from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.agentic.stages.run_models import build_bench
from megatron_k2.data.rephrase.client import Client, Endpoint
from megatron_k2.data.rephrase.gate import Budget, BudgetSpent, Gate

TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


def question(text: str = "hi", kind: str = "policy", **more: Any) -> Question:
    return Question(kind, ({"role": "user", "content": text},), **more)


class Fixed:
    """A model that says what a function says, and counts."""

    def __init__(self, answer: Callable[[Question], str]) -> None:
        self.answer, self.asked = answer, 0

    async def ask(self, asked: Question) -> Reply:
        self.asked += 1
        text = self.answer(asked)
        if text == "refuse":
            raise Refused("never")
        return Reply({"role": "assistant", "content": text}, 3, 2, "fixed")

    async def close(self) -> None:
        pass


def server(handler: Callable[[httpx.Request], httpx.Response]) -> ServerModel:
    endpoint = Endpoint("http://x/v1", "m", "secret", flags=FLAGS)
    transport = httpx.MockTransport(handler)
    return ServerModel(Client(endpoint, Gate(4), Budget(), 2, transport))


def says(**message: Any) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "stop"}]})


def test_a_request_has_tools_and_seed_and_never_the_script_or_the_role() -> None:
    bodies: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return says(content="fine")

    asked = question(tools=(TOOL,), seed=7, script={"secret": 1})
    reply = asyncio.run(server(handler).ask(asked))
    assert (reply.text, reply.model) == ("fine", "m")
    assert bodies[0]["tools"] == [TOOL] and bodies[0]["seed"] == 7
    assert set(bodies[0]) == {"model", "messages", "tools", "temperature", "max_tokens", "seed"}


def test_calls_come_in_one_form_with_broken_arguments_as_they_are() -> None:
    calls = [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": '}},
        {"function": {"name": "g", "arguments": {"y": 1}}},
    ]
    reply = asyncio.run(server(lambda _: says(content=None, tool_calls=calls)).ask(question()))
    found = [(one["id"], one["function"]["arguments"]) for one in reply.message["tool_calls"]]
    assert found == [("a", '{"x": '), ("functions.g:1", '{"y": 1}')]
    assert reply.message["content"] == "" and reply.completion_tokens > 0
    scripted = {"content": None, "tool_calls": calls, "refusal": None}
    assert in_one_form(scripted) == reply.message  # a script's answer has a server's form


def test_calls_that_cannot_be_read_are_asked_for_again() -> None:
    answers = iter([says(tool_calls=[{"function": {}}]), says(content="fine")])
    assert asyncio.run(server(lambda _: next(answers)).ask(question())).text == "fine"


def test_a_request_refused_for_good_is_refused_and_a_wrong_key_names_our_flag() -> None:
    with pytest.raises(Refused, match="status 400: too long"):
        asyncio.run(server(lambda _: httpx.Response(400, text="too long")).ask(question()))
    with pytest.raises(ValueError, match="check --key-env"):
        asyncio.run(server(lambda _: httpx.Response(401)).ask(question()))


def test_a_replay_asks_nobody_and_repeats_refusals(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    model = Fixed(lambda asked: str(asked.messages[0]["content"]))

    async def first() -> Reply:
        recorded = RecordedModel(model, Recording(path))
        with pytest.raises(Refused, match="never"):
            await recorded.ask(question("refuse"))
        found = [await recorded.ask(question("a")) for _ in range(2)]
        await recorded.close()
        assert found[0] == found[1] and model.asked == 2
        return found[0]

    async def again() -> Reply:
        replay = RecordedModel(None, Recording(None, read_recordings([tmp_path])))
        with pytest.raises(NotRecorded, match='of the role policy, which ends "b"'):
            await replay.ask(question("b"))
        with pytest.raises(Refused, match="never"):
            await replay.ask(question("refuse"))
        return await replay.ask(question("a", script={"other": "script"}))

    assert asyncio.run(first()) == asyncio.run(again())


def test_a_recording_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=f"--replay {path}: has no recorded answer"):
        read_recordings([path])


def test_an_unreadable_answer_is_asked_again_with_the_reason_then_refused() -> None:
    texts = iter(["no JSON", '{"n": -1}', '```json\n{"n": 4}\n```', "{}", "{}", "{}"])
    seen: list[Question] = []

    def answer(asked: Question) -> str:
        seen.append(asked)
        return next(texts)

    def check(value: dict[str, Any]) -> int:
        if value.get("n", -1) < 0:
            raise ValueError("n must not be below 0")
        return int(value["n"])

    async def run() -> int:
        TALLY.set(tally)
        model = CountedModel(Fixed(answer))
        found = await ask_json(model, question(kind="task", seed=5, script={"a": 1}), check)
        with pytest.raises(Refused, match="task could be read in 3 tries: n must not be below 0"):
            await ask_json(model, question(kind="task"), check)
        return found

    tally = Tally()
    assert asyncio.run(run()) == 4
    assert [one.seed for one in seen[:3]] == [5, 6, 7]
    assert len({one.key for one in seen}) == 6 and seen[2].script == {"a": 1}
    assert "n must not be below 0" in seen[2].messages[-1]["content"]
    assert seen[2].messages[1]["content"] == '{"n": -1}'
    assert tally.counts["asked again task"] == 4 and tally.counts["unreadable task"] == 1
    assert tally.counts["questions task"] == 6 and tally.counts["prompt tokens task"] == 18


def test_a_scripted_run_keeps_a_budget_and_the_tally_keeps_what_stops_it() -> None:
    budget = Budget(max_requests=2)
    roles = {"judge": lambda asked: {"content": asked.kind}}
    model: Model = CountedModel(ScriptedModel(budget, roles))

    async def run() -> None:
        TALLY.set(tally)
        assert (await model.ask(question(kind="judge"))).text == "judge"
        assert (await RenamedModel(model, "judge-2").ask(question(kind="judge"))).text == "judge-2"
        with pytest.raises(BudgetSpent):
            await model.ask(question(kind="judge"))
        with pytest.raises(Refused, match="no script for the role user"):
            await ScriptedModel(budget, roles).ask(question(kind="user"))

    tally = Tally()
    asyncio.run(run())
    assert isinstance(tally.stopped, BudgetSpent)
    assert tally.counts["questions judge"] == tally.counts["questions judge-2"] == 1
    assert budget.requests == 2 and budget.tokens > 0


def test_each_role_has_its_model() -> None:
    one, other = Fixed(lambda _: "one"), Fixed(lambda _: "other")
    model = RoutedModel(one, {"judge": other})
    kinds = ("task", "judge", "user")
    found = [asyncio.run(model.ask(question(kind=kind))).text for kind in kinds]
    assert found == ["one", "other", "one"]


def test_a_key_is_sent_to_no_other_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(*flags: str) -> dict[str, str]:
        arguments = ["run", "--out", "x", "--model", "http://a/v1,m", *flags]
        args = parser().parse_args(arguments)
        bench = build_bench(args, Layout(args.out), Budget())
        asked = bench.asked
        assert isinstance(asked, RoutedModel)
        models = {"": asked._default, **asked._by_kind}
        return {role: model._client.endpoint.key for role, model in models.items()}  # type: ignore[attr-defined]

    monkeypatch.setenv("ONE", "1")
    monkeypatch.setenv("TWO", "2")
    judges = ("--model-for", "judge=http://b/v1,m", "--model-for", "user=http://a/v1,n")
    found = {"": "1", "judge": "", "judge-2": "", "user": "1"}
    assert keys(*judges, "--key-env", "ONE") == found
    both = ("--key-env", "ONE", "--key-env", "judge=TWO")
    assert keys(*judges, *both) == found | {"judge": "2", "judge-2": "2"}
    with pytest.raises(ValueError, match="--key-env THREE: this environment variable is not set"):
        keys("--key-env", "THREE")
