"""The environment ``tool_use``: an agent's task with its tools, judged by the rubric's rules.

Tasks are lines of ``output/rl_tasks.py``, or, without a file, those of ``world/compact.py``. Calls
are answered by the simulator; tasks of real servers by those, in the sandbox. The user is a script:
an answer without calls ends the episode, unless the task has words of the user left to
say. The score is 1 if every mandatory criterion and every general rule holds (``judge/rules.py``),
else 0; what rules cannot say of an answer does not count. Left out: a user played by a model, and
rubrics that only a judge can score; tasks of which rules can say nothing are refused.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_k2.agentic.judge.rules import by_rules
from megatron_k2.agentic.output.rl_tasks import Split, line
from megatron_k2.agentic.records import Agent, AgentTask, Call, Domain, Ending, Tool, Trajectory
from megatron_k2.agentic.tasks.dialogue import call_record, declarations, returned
from megatron_k2.agentic.tasks.solution import play_solution
from megatron_k2.agentic.toolbox import Toolbox, ToolboxError
from megatron_k2.agentic.world import compact
from megatron_k2.agentic.world.simulator import Simulator
from megatron_k2.chat.format import Message
from megatron_k2.gym.base import Answer, Environment, Observation, Step, Task, judged, unjudged
from megatron_k2.gym.splits import check_split, distinct

MAX_TURNS = 24  # of the agent; more than the longest plans have steps, faults included
MAX_CALLS = 8  # of one answer; more are not made
_COMPACT_BUDGET = 512  # tokens of a compact task; gold has under 250 characters
_GENERATED = 512  # tasks, where neither a file nor a number is given


class ToolUse(Environment):
    """Tools over simulated worlds, with rubrics; compact tasks, or a file of synthesised ones."""

    name = "tool_use"
    budget = 4096

    @classmethod
    def load(
        cls,
        split: str,
        num_tasks: int | None = None,
        seed: int = 0,
        file: str = "",
        levels: Sequence[int] = compact.LEVELS,
        fault_share: float = 0.0,
        servers: str = "",
    ) -> Sequence[Task]:
        """Return tasks.

        Args:
            split: ``train`` or ``test``; a file's lines say where they belong, a compact task's
                words do.
            num_tasks: at most so many; None: all of a file, or 512 compact ones.
            seed: of compact tasks.
            file: JSONL of the stage ``rl_tasks``.
            levels: of compact tasks, of 1 to 3.
            fault_share: of compact tasks whose first call fails once.
            servers: folder of installed MCP servers, for a file's tasks of real servers.

        Raises:
            ValueError: no such split or level, no such file, or a line that is no task.
        """
        check_split(split)
        if file:
            rows = _rows(Path(file), split, num_tasks)
            return [_task(row | {"servers": servers}, cls.name) for row in rows]
        if not levels or not set(levels) <= set(compact.LEVELS):
            raise ValueError(f"levels {list(levels)} must be of {list(compact.LEVELS)}")
        wanted = _GENERATED if num_tasks is None else num_tasks
        made = compact.tasks(seed, levels, fault_share)
        found = distinct(made, lambda one: one.task.opening, split, wanted)
        part: Split = "train" if split == "train" else "test"
        lines = [line(one.task, one.agent, one.domain, one.tools, part) for one in found]
        return [_task(json.loads(json.dumps(row)), cls.name, _COMPACT_BUDGET) for row in lines]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return the plan's calls, made again where a fault stops them, and its last words.

        Raises:
            ValueError: the plan needs real servers, or does not work.
        """
        records = Records(task.metadata)
        if records.real:
            raise ValueError(f"task {task.id}: the results of real servers are not known before")
        played = _finished(
            play_solution(records.task, records.agent, records.tools, records.simulator())
        )
        said = [one for one in played.messages if one["role"] == "assistant"]
        return tuple(Answer(str(one.get("content") or ""), one) for one in said)

    async def reset(self, task: Task, seed: int) -> Observation:
        """Begin with the world as it was; the seed is the task's, so that plans hold."""
        self._over = False
        self._records = records = Records(task.metadata)
        self._toolbox: Toolbox | None = None
        self._messages = list(task.messages)
        self._calls: list[Call] = []
        self._turns = 0
        exchanges = records.task.origin.get("solution", {}).get("exchanges", ())
        self._user_says = [str(one["user"]) for one in exchanges]
        return Observation(tuple(task.messages), tuple(task.tools))

    async def step(self, answer: Answer) -> Step:
        """Make the calls of an answer, let the user answer, or judge the dialogue."""
        if getattr(self, "_over", True):
            raise RuntimeError("no episode: call reset first")
        self._turns += 1
        message = answer.message or {"role": "assistant", "content": answer.text}
        self._messages.append({**message, "content": message.get("content") or ""})
        calls = message.get("tool_calls") or ()
        if answer.truncated:
            return await self._end("context")
        try:
            said = [await self._call(at, one) for at, one in enumerate(calls)]
        except ToolboxError as error:
            self._over = True
            return Step(terminated=True, verdict=unjudged(str(error)))
        if not calls:
            if not self._user_says:
                return await self._end("finished")
            said = [{"role": "user", "content": self._user_says.pop(0)}]
        self._messages += said
        if self._turns >= MAX_TURNS:
            return await self._end("turns")
        return Step(tuple(said))

    async def close(self) -> None:
        """Close the toolbox."""
        toolbox, self._toolbox = getattr(self, "_toolbox", None), None
        self._over = True
        if toolbox is not None:
            await toolbox.close()

    async def _call(self, at: int, call: Mapping[str, Any]) -> Message:
        """Make a call; return the tool's message."""
        function = call.get("function") or {}
        name, arguments = str(function.get("name")), function.get("arguments")
        id_ = str(call.get("id") or "")
        if at >= MAX_CALLS:
            words = f"at most {MAX_CALLS} calls at once; this one was not made"
            return {"role": "tool", "tool_call_id": id_, "content": words}
        if self._toolbox is None:
            self._toolbox = await self._records.open(self.services.sandbox)
        result = await self._toolbox.call(name, arguments)
        turn = len(self._messages) - 1
        self._calls.append(call_record(turn, id_, name, arguments, result))
        return returned(id_, result)

    async def _end(self, ending: Ending) -> Step:
        """Judge the dialogue by its rubric."""
        records, self._over = self._records, True
        world: Any = records.task.world
        evidence: Mapping[str, Any] = {}
        if records.real and self._toolbox is None:
            try:
                self._toolbox = await records.open(self.services.sandbox)  # its files are judged
            except ToolboxError as error:
                return Step(terminated=True, verdict=unjudged(str(error)))
        if self._toolbox is not None:
            world = self._toolbox.world()
            toolbox, self._toolbox = self._toolbox, None
            await toolbox.close()
            evidence = toolbox.evidence()
        trajectory = Trajectory(
            records.task.id, 0, tuple(self._messages), declarations(records.tools),
            tuple(asdict(one) for one in self._calls), world, ending,
            "real" if records.real else "simulated", "policy", evidence,
        )  # fmt: skip
        ruling = by_rules(records.task, trajectory, records.domain.types)
        components = {name: score for name, score in ruling.scores.items() if score is not None}
        score = float(ruling.passes and bool(components))
        verdict = judged(score, ", ".join(ruling.reasons), components)
        cut = ending in ("turns", "context")
        info = {"ending": ending, "calls": len(self._calls), "open": list(ruling.open)}
        return Step(reward=score, terminated=not cut, truncated=cut, verdict=verdict, info=info)


class Records:
    """The records of a line: task, agent, domain, tools."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        """Read a line.

        Raises:
            ValueError: it is none.
        """
        missing = [name for name in ("task", "agent", "domain", "tools") if name not in row]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
        self.task = AgentTask.from_json(row["task"])
        self.agent = Agent.from_json(row["agent"])
        self.domain = Domain.from_json(row["domain"])
        self.tools = tuple(Tool.from_json(one) for one in row["tools"])
        self.real = bool(self.task.origin.get("real"))
        self._servers = str(row.get("servers") or "")

    def simulator(self) -> Simulator:
        """Return a fresh simulator of the task.

        Raises:
            ValueError: world, tools, types and faults do not fit each other.
        """
        task = self.task
        return Simulator(self.tools, self.domain, task.world, task.faults, task.seed)

    async def open(self, sandbox: Any) -> Toolbox:
        """Begin the dialogue's tools.

        Raises:
            ToolboxError: there is no sandbox for real servers, or they do not start.
        """
        if not self.real:
            return self.simulator()
        # Only tasks of real servers need them and the SDK of MCP.
        from megatron_k2.agentic.real.servers import load_servers, locate
        from megatron_k2.agentic.real.toolbox import open_toolbox

        if sandbox is None:
            raise ToolboxError("a task of real servers needs a sandbox")
        places = locate(load_servers(), Path(self._servers) if self._servers else None)
        return await open_toolbox(self.task, self.tools, sandbox, places)


def _rows(path: Path, split: str, num_tasks: int | None) -> list[dict[str, Any]]:
    """Return the lines of a split, checked.

    Raises:
        ValueError: the file cannot be read, or a line is no task that rules can judge.
    """
    try:
        with path.open(encoding="utf-8") as file:
            numbered = [(at, json.loads(text)) for at, text in enumerate(file, 1) if text.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"file = {str(path)!r} cannot be read: {error}") from error
    found = []
    for at, row in numbered:
        try:
            if row["split"] != split:
                continue
            records = Records(row)
            if not any(one.mandatory and one.check for one in records.task.criteria):
                raise ValueError("no mandatory criterion has a check; a judge would be needed")
            if not records.real:
                records.simulator()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {at}: no task: {error}") from error
        found.append(row)
    return list(itertools.islice(found, num_tasks))


def _task(row: Mapping[str, Any], env: str, budget: int | None = None) -> Task:
    records = Records(row)
    system = {"role": "system", "content": records.agent.system}
    user = {"role": "user", "content": records.task.opening}
    messages = (system, user) if records.agent.system else (user,)
    tags = (f"domain:{records.domain.name}", f"level:{records.task.level}")
    tools = declarations(records.tools)
    return Task(str(row.get("id") or records.task.id), env, messages, row, tools, tags, budget)


def _finished[T](running: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never waits, as a simulator's do.

    Raises:
        ValueError: it waits, or a plan does not work.
    """
    try:
        running.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    except RuntimeError as error:
        raise ValueError(f"the plan does not work: {error}") from error
    running.close()
    raise ValueError("the plan has to wait for a server")
