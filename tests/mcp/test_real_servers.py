"""Eight MCP servers, seven of them from PyPI and npm, in whole trajectories under the sandbox.

`make test-mcp` installs them into out/mcp-servers first; what is missing fails here, it is not
skipped. Played by scripts: this shows that servers, sandbox, checks and judge go together, not a
model's skill.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_k2.agentic.judge.rules import by_rules
from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.real.servers import Missing, load_servers, locate, readable
from megatron_k2.agentic.real.tasks import RealTask, real_tasks
from megatron_k2.agentic.real.toolbox import open_toolbox
from megatron_k2.agentic.records import Trajectory
from megatron_k2.agentic.repository.live import Harvest, harvest_servers
from megatron_k2.agentic.trajectories.play import play
from megatron_k2.agentic.trajectories.policies import ModelPolicy
from megatron_k2.agentic.trajectories.user import SimulatedUser
from megatron_k2.gym.sandbox.base import Sandbox
from megatron_k2.gym.sandbox.find import find_sandbox

FOLDER = Path(__file__).parents[2] / "out" / "mcp-servers"
PLACES = locate(load_servers(), FOLDER)
AT_A_TIME = 2
Played = list[tuple[RealTask, Trajectory]]


@pytest.fixture(scope="module")
def seen() -> tuple[Harvest, Played, Played]:
    """What was harvested, and every task played twice."""
    missing = [one.reason for one in PLACES.values() if isinstance(one, Missing)]
    assert not missing, f"make test-mcp installs them: {missing}"

    async def all_of_it() -> tuple[Harvest, Played, Played]:
        sandbox = await find_sandbox(readable=readable(PLACES))
        try:
            harvest = await harvest_servers(PLACES, sandbox)
            made = real_tasks(harvest.tools)
            return harvest, await played(sandbox, made), await played(sandbox, made)
        finally:
            await sandbox.close()

    return asyncio.run(all_of_it())


async def played(sandbox: Sandbox, made: Sequence[RealTask]) -> Played:
    model, turn = ScriptedModel(), asyncio.Semaphore(AT_A_TIME)

    async def one(real: RealTask) -> tuple[RealTask, Trajectory]:
        async with turn:
            toolbox = await open_toolbox(real.task, real.tools, sandbox, PLACES)
            policy, user = ModelPolicy(model), SimulatedUser(model)
            return real, await play(real.task, real.agent, toolbox, policy, user)

    return list(await asyncio.gather(*map(one, made)))


def test_every_server_gives_valid_tools_and_none_misbehaves(
    seen: tuple[Harvest, Played, Played],
) -> None:
    harvest = seen[0]
    assert {tool.server for tool in harvest.tools} == set(PLACES)
    assert len(harvest.tools) >= 60 and not harvest.dropped and not harvest.reports
    for tool in harvest.tools:
        assert tool.origin["protocol"] and tool.origin["server_info"]["name"]


def test_every_plan_is_played_for_real_and_passes_rules_and_checks(
    seen: tuple[Harvest, Played, Played],
) -> None:
    servers = set()
    for real, trajectory in seen[1]:
        assert trajectory.executed == "real" and trajectory.ending in ("finished", "user")
        assert {call.outcome for call in trajectory.made} == {"ok"}, trajectory.calls
        ruling = by_rules(real.task, trajectory)
        assert ruling.passes and not ruling.open, (real.task.origin["name"], ruling)
        servers |= set(real.servers)
    assert servers == set(PLACES) and len(seen[1]) == 15


def test_the_same_dialogues_come_again_byte_for_byte(
    seen: tuple[Harvest, Played, Played],
) -> None:
    for (real, first), (_, again) in zip(seen[1], seen[2], strict=True):
        assert json.dumps(first.to_json()) == json.dumps(again.to_json()), real.task.origin["name"]
