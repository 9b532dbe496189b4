"""Real dialogues: code tools and a server of PyPI, checked on what they leave."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from megatron_k2.agentic.judge.validation import check_criterion
from megatron_k2.agentic.real.servers import Missing, load_servers, locate
from megatron_k2.agentic.real.tasks import DECLARED, RealTask, is_real, real_tasks
from megatron_k2.agentic.real.toolbox import open_toolbox
from megatron_k2.agentic.records import AgentTask, Tool
from megatron_k2.agentic.repository.live import harvest_servers
from megatron_k2.agentic.toolbox import Result
from megatron_k2.gym.sandbox.local import LocalSandbox
from tests.unit.agentic.real.setting import task_of, use

PLACES = locate(load_servers())
Played = tuple[list[Result], Mapping[str, Any]]


def named(made: Sequence[RealTask], name: str) -> RealTask:
    return next(one for one in made if one.task.origin["name"] == name)


async def play(
    sandbox: LocalSandbox, real: RealTask, calls: Sequence[Mapping[str, Any]] | None = None
) -> Played:
    """Play a plan; the task and tools as they come from a file."""
    task = AgentTask.from_json(json.loads(json.dumps(real.task.to_json())))
    box = await open_toolbox(task, real.tools, sandbox, PLACES)
    done = []
    for call in task.plan if calls is None else calls:
        done.append(await box.call(call["name"], json.dumps(call["arguments"])))
    await box.close()
    return done, box.evidence()


def test_plans_of_code_tasks_pass_their_checks_every_time_alike_and_a_lazy_one_fails() -> None:
    place = PLACES["code"]
    assert not isinstance(place, Missing)

    async def plays(sandbox: LocalSandbox) -> tuple[Played, ...]:
        tools = (await harvest_servers({"code": place}, sandbox)).tools
        made = real_tasks(tools)
        assert {one.task.origin["name"] for one in made} == {"code fix", "code count"}
        fix, count = named(made, "code fix"), named(made, "code count")
        lazy = [{"name": "write_text", "arguments": {"path": "errors.txt", "content": "4"}}]
        return await asyncio.gather(
            play(sandbox, fix), play(sandbox, fix), play(sandbox, count), play(sandbox, count, lazy)
        )

    first, again, count, lazy = use([place], plays)
    assert first == again
    results, evidence = first
    assert [one.outcome for one in results] == ["ok"] * 4
    changed = [one.before != one.after for one in results]
    assert changed == [False, False, True, False] and all(one.before for one in results)
    assert all(one["holds"] for one in evidence["checks"].values())
    assert evidence["files"]["stats.py"]["text"].endswith("sum(values) / len(values)\n")
    assert evidence["servers"] == {"code": {"what": "ended", "code": None}}
    assert count[1]["checks"]["number"] == {"holds": True, "found": "3\n"}
    assert lazy[1]["checks"]["number"] == {"holds": False, "found": "4"}


def test_calls_against_the_declaration_are_not_sent_and_outcomes_are_named() -> None:
    place = PLACES["code"]
    assert not isinstance(place, Missing)
    loop = "import time\ntime.sleep(60)"
    calls: list[tuple[str, Any, str, str]] = [
        ("fly", {}, "invalid", "no tool 'fly'"),
        ("read_text", {}, "invalid", "'path' is a required property"),
        ("read_text", '{"path": ', "invalid", "arguments"),
        ("read_text", {"path": "../../etc/passwd"}, "refused", "outside"),
        ("read_text", {"path": "none"}, "refused", "no file"),
        ("run_python", {"code": "open('/tmp/x', 'w')"}, "ok", "exit status 1"),
        ("run_python", {"code": loop}, "refused", "ended after"),
    ]

    async def plays(sandbox: LocalSandbox) -> list[Result]:
        tools = (await harvest_servers({"code": place}, sandbox)).tools
        box = await open_toolbox(task_of(["code"]), tools, sandbox, PLACES)
        assert box.evidence() == {}
        found = [await box.call(name, arguments) for name, arguments, _, _ in calls[:-1]]
        await box.close()
        return found

    for (name, _, outcome, words), result in zip(calls[:-1], use([place], plays), strict=True):
        assert (result.outcome, result.latency_s) == (outcome, 0.0), (name, result)
        assert words in result.content, (name, result)


def test_a_server_of_pypi_answers_with_its_clock_still() -> None:
    place = PLACES["time"]
    assert not isinstance(place, Missing), place.reason

    async def plays(sandbox: LocalSandbox) -> Played:
        return await play(sandbox, named(real_tasks(all_tools()), "time two places"))

    (now, converted), evidence = use([place], plays)
    assert json.loads(now.content)["datetime"] == "2026-03-02T04:30:00-05:00"
    assert json.loads(converted.content)["target"]["datetime"] == "2026-03-02T19:45:00+05:45"
    assert evidence["checks"] == {} and evidence["reports"] == {}


def test_every_rubric_is_of_known_checks_and_a_task_without_its_servers_is_not_made() -> None:
    table = real_tasks(all_tools())
    assert len(table) == 15 and len({one.agent.id for one in table}) == 9
    for one in table:
        assert is_real(one.task) and one.task.agent == one.agent.id
        for criterion in one.task.criteria:
            assert check_criterion({}, list(one.tools), criterion) == [], criterion
            if criterion.check and criterion.check["kind"] == "evidence":
                assert criterion.check["name"] in one.task.origin["real"]["checks"]
    assert real_tasks([]) == ()
    with pytest.raises(ValueError, match="none for real servers"):
        asyncio.run(open_toolbox(AgentTask("a", 1, {}, {}, "", "", ()), [], object(), {}))  # type: ignore[arg-type]


def all_tools() -> list[Tool]:
    """Tools with the names and arguments that plans use."""
    table = tomllib.loads(DECLARED.read_text(encoding="utf-8"))
    used: dict[tuple[str, str], dict[str, Any]] = {}
    for one in table["task"]:
        for call in one["plan"]:
            server = "git" if call["name"].startswith("git_") else one["servers"][0]
            known = used.setdefault((server, call["name"]), {})
            known.update((key, {}) for key in call["arguments"])
    return [
        Tool(server, name, name, {"type": "object", "properties": arguments}, "x", "live")
        for (server, name), arguments in sorted(used.items())
    ]
