"""Tasks of real servers: proven before they are kept, played again after a time limit, for RL."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_k2.agentic.environment import ToolUse
from megatron_k2.agentic.model import Refused
from megatron_k2.agentic.models.counted import TALLY, Tally
from megatron_k2.agentic.output.rl_tasks import domain_of_servers, line
from megatron_k2.agentic.real import checks_inside
from megatron_k2.agentic.real.prove import Opens, Proven, prove_real, repeats
from megatron_k2.agentic.real.servers import Missing, load_servers, locate
from megatron_k2.agentic.real.tasks import RealTask, real_tasks
from megatron_k2.agentic.real.toolbox import open_toolbox
from megatron_k2.agentic.repository.live import harvest_servers
from megatron_k2.agentic.stages import body_real
from megatron_k2.agentic.tasks.dialogue import calling
from megatron_k2.agentic.toolbox import ToolboxError
from megatron_k2.gym.base import Answer, Step
from megatron_k2.gym.sandbox.local import LocalSandbox
from megatron_k2.gym.services import Services
from tests.unit.agentic.real.setting import use

PLACES = locate(load_servers())


def changed(real: RealTask, code: str) -> RealTask:
    """A task whose plan's first step runs other code."""
    first = {"name": "run_python", "arguments": {"code": code}}
    return replace(real, task=replace(real.task, plan=(first, *real.task.plan[1:])))


async def play(sandbox: LocalSandbox, row: Mapping[str, Any], plan: Any, says: str) -> list[Step]:
    """An episode of the environment: a plan's calls, one a turn, and last words."""
    (task,) = [ToolUse.load("train", file=str(row["file"]))[0]]
    environment = ToolUse(Services(sandbox=sandbox))
    await environment.reset(task, 0)
    answers = [calling(one["name"], one["arguments"], at) for at, one in enumerate(plan)]
    answers.append({"role": "assistant", "content": says})
    steps = [await environment.step(Answer(one["content"], one)) for one in answers]
    await environment.close()
    return steps


def test_a_proven_task_repeats_and_is_an_episode_of_rl_that_does_too(tmp_path: Path) -> None:
    place = PLACES["code"]
    assert not isinstance(place, Missing)
    found: dict[str, Any] = {}

    async def prove(sandbox: LocalSandbox) -> None:
        tools = (await harvest_servers({"code": place}, sandbox)).tools
        real = next(one for one in real_tasks(tools) if one.task.origin["name"] == "code count")

        async def proven(one: RealTask) -> Proven:
            return await prove_real(one, lambda: open_toolbox(one.task, one.tools, sandbox, PLACES))

        made, varying, broken = await asyncio.gather(
            proven(real),
            proven(changed(real, "import time; print(time.time())")),
            proven(replace(real, task=replace(real.task, plan=real.task.plan[:1]))),
        )
        found.update(made=made, varying=varying, broken=broken)
        assert made.task is not None
        row = line(made.task, real.agent, domain_of_servers(real.agent, real.tools),
                   real.tools, "train")  # fmt: skip
        file = tmp_path / "rl_real_tasks_train.jsonl"
        file.write_text(json.dumps(row) + "\n")
        says = made.task.origin["solution"]["answer"]
        gold = [await play(sandbox, {"file": file}, made.task.plan, says) for _ in range(2)]
        lazy = await play(sandbox, {"file": file}, (), says)
        found.update(gold=gold, lazy=lazy)

    use([place], prove)
    assert found["made"].task is not None and repeats(found["made"].task)
    assert found["varying"].task is not None and not repeats(found["varying"].task)
    assert found["broken"].reason == "goal: number does not hold" and not found["broken"].task
    first, again = found["gold"]
    assert first == again and first[-1].reward == 1.0
    assert found["lazy"][-1].reward == 0.0


class Desk:
    """As much of a desk as ``undisturbed`` uses."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    async def hold(self, name: str, make: Any, close: Any) -> Any:
        if name not in self.held:
            self.held[name] = await make()
        return self.held[name]


def tried(outcomes: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """What ``undisturbed`` makes of servers that behave so, and how often it says "again"."""
    left = iter(outcomes)

    async def opened(desk: Any, task: Any) -> Any:
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        return SimpleNamespace(was_disturbed=outcome)

    async def does(opens: Opens) -> Any:
        return await opens()

    async def run() -> Any:
        TALLY.set(tally)
        return await body_real.undisturbed(Desk(), None, does)  # type: ignore[arg-type]

    tally = Tally()
    monkeypatch.setattr(body_real, "real_toolbox", opened)
    return asyncio.run(run()), tally.counts[body_real.AGAIN]


def test_a_dialogue_that_met_a_time_limit_is_played_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, again = tried([ToolboxError("start_timeout"), True, False], monkeypatch)
    assert made.was_disturbed is False and again == 2
    made, again = tried([True, True, True], monkeypatch)  # slow for ever: as it is
    assert made.was_disturbed is True and again == 2
    with pytest.raises(Refused, match="real servers: gone"):
        tried([ToolboxError("gone")] * 3, monkeypatch)


def test_a_check_is_ended_by_the_processors_time_and_not_by_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks_inside, "SECONDS", 3600)  # a second of work may take minutes here
    waits = {"argv": [sys.executable, "-c", "import time; time.sleep(1.5)"], "cpu_s": 1}
    works = {"argv": [sys.executable, "-c", "while True: pass"], "cpu_s": 1}
    assert checks_inside.run(waits) == (True, "exit status 0")
    assert checks_inside.run(works) == (False, "more than 1 s of the processor")
