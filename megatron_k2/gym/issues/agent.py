"""Issues in many turns: the model reads, searches, edits and runs tests with tools, then submits.

The repository's files are texts in memory; ``run_tests`` runs those that are there, in the sandbox,
not the hidden ones that judge. What is submitted is judged as in one turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from megatron_k2.chat.format import Message
from megatron_k2.gym.base import Answer, Environment, Observation, Step, Task, unjudged
from megatron_k2.gym.issues.environment import listing, load_tasks
from megatron_k2.gym.issues.patch import PatchError, checked, replaced
from megatron_k2.gym.issues.run import judge, run_tests
from megatron_k2.gym.issues.trees import is_test, load
from megatron_k2.gym.sandbox.base import SandboxError

MAX_TURNS = 30
_MAX_CHARS = 16_000  # of one tool's answer
_MAX_HITS = 50
_HOW = (
    "Solve the issue with the tools: read and search the files, edit them, run the tests, and "
    "call `submit` when you are done. Changes of tests do not count."
)


def _tool(name: str, about: str, **properties: str) -> dict[str, Any]:
    kinds = {"first": "integer", "last": "integer"}
    fields = {
        key: {"type": kinds.get(key, "string"), "description": words}
        for key, words in properties.items()
    }
    required = [key for key in fields if key not in (*kinds, "module")]
    schema = {"type": "object", "properties": fields, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": about, "parameters": schema},
    }


TOOLS = (
    _tool("read_file", "Read a file, or some of its lines.", path="of the file",
          first="number of the first line", last="number of the last line"),
    _tool("search", "List the lines that contain a text.", text="to look for"),
    _tool("edit", "Replace a part of a file that stands there once; an empty part makes a file.",
          path="of the file", old="what is there", new="what replaces it"),
    _tool("run_tests", "Run the tests.", module="dotted name of a test module; all without it"),
    _tool("submit", "End: the change is done."),
)  # fmt: skip


class IssuesAgent(Environment):
    """Repository issues, with tools."""

    name = "issues_agent"
    needs: ClassVar[tuple[str, ...]] = ("sandbox",)
    budget = 65536

    @classmethod
    def load(
        cls, split: str, num_tasks: int | None = None, seed: int = 0, file: str = ""
    ) -> Sequence[Task]:
        """Return the tasks of a file; see ``Issues.load``."""
        return load_tasks(cls.name, split, num_tasks, file, _ask)

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return the repository's own fix as edits, then the submission."""
        tree = load(Path(task.metadata["tree"]))
        calls = [
            ("edit", {"path": path, "old": tree.get(path, ""), "new": text or ""})
            for path, text in task.metadata["fix"].items()
        ]
        return (_calling(calls), _calling([("submit", {})]))

    async def reset(self, task: Task, seed: int) -> Observation:
        """Begin with the repository as it was."""
        self._task: Task | None = task
        self._tree = dict(load(Path(task.metadata["tree"])))
        self._changed: dict[str, str | None] = {}
        self._turns = 0
        return Observation(tuple(task.messages), TOOLS)

    async def step(self, answer: Answer) -> Step:
        """Do what the calls say; a submission, or the last turn, is judged."""
        if getattr(self, "_task", None) is None:
            raise RuntimeError("no episode: call reset first")
        self._turns += 1
        calls = answer.message.get("tool_calls") or []
        replies: list[Message] = []
        for call in calls:
            function = call.get("function", {})
            if function.get("name") == "submit":
                return await self._end()
            replies.append(
                {
                    "role": "tool",
                    "tool_call_id": call.get("id", ""),
                    "content": await self._do(function.get("name", ""), function.get("arguments")),
                }
            )
        if self._turns >= MAX_TURNS:
            return await self._end(truncated=True)
        if not replies:
            replies = [{"role": "user", "content": "Call a tool, or `submit` to end."}]
        return Step(tuple(replies))

    async def _end(self, truncated: bool = False) -> Step:
        assert self._task is not None and self.services.sandbox is not None
        task, self._task = self._task, None
        try:
            verdict = await judge(self.services.sandbox, task.metadata, self._changed)
        except SandboxError as error:
            verdict = unjudged(str(error))
        return Step(
            reward=verdict.score, terminated=not truncated, truncated=truncated, verdict=verdict
        )

    async def _do(self, name: str, arguments: Any) -> str:
        """Return a tool's answer; what is wrong with a call is one too."""
        try:
            given = json.loads(arguments) if isinstance(arguments, str) else dict(arguments or {})
            if name == "read_file":
                return self._read(given["path"], given.get("first"), given.get("last"))
            if name == "search":
                return self._search(given["text"])
            if name == "edit":
                return self._edit(given["path"], given["old"], given["new"])
            if name == "run_tests":
                return await self._run_tests(given.get("module", ""))
            return f"error: no tool {name!r}"
        except KeyError as error:
            return f"error: argument {error} is missing"
        except (PatchError, SandboxError, ValueError, TypeError, AttributeError) as error:
            return f"error: {error}"

    def _read(self, path: str, first: int | None, last: int | None) -> str:
        if path not in self._tree:
            return f"error: {path!r} is not there"
        lines = self._tree[path].splitlines()[(first or 1) - 1 : last]
        return "\n".join(lines)[:_MAX_CHARS]

    def _search(self, text: str) -> str:
        hits = [
            f"{path}:{number}: {line.strip()[:200]}"
            for path, content in sorted(self._tree.items())
            for number, line in enumerate(content.splitlines(), 1)
            if text in line
        ]
        more = f"\n... and {len(hits) - _MAX_HITS} more" if len(hits) > _MAX_HITS else ""
        return "\n".join(hits[:_MAX_HITS]) + more if hits else "nothing found"

    def _edit(self, path: str, old: str, new: str) -> str:
        path = checked(path)
        before = self._tree.get(path, "")
        self._tree[path] = new if before and old == before else replaced(before, old, new, path)
        self._changed[path] = self._tree[path]
        return "done"

    async def _run_tests(self, module: str) -> str:
        assert self.services.sandbox is not None and self._task is not None
        paths = self._task.metadata["paths"]
        modules = [module] if module else modules_of(self._tree)
        run = await run_tests(self.services.sandbox, self._tree, modules, paths)
        if run.problem:
            return run.problem[:_MAX_CHARS]
        good = sum(outcome == "passed" for outcome in run.outcomes.values())
        words = "\n".join(f"{name}:\n{text}" for name, text in run.words.items())
        return f"{good} of {len(run.outcomes)} tests passed\n{words}"[:_MAX_CHARS]


def modules_of(files: Any) -> list[str]:
    """Return the dotted names of a repository's test modules."""
    names = [path for path in sorted(files) if is_test(path) and path.endswith(".py")]
    return [
        path.removesuffix(".py").replace("/", ".")
        for path in names
        if "test" in Path(path).stem and Path(path).stem != "conftest"
    ]


def _ask(row: dict[str, Any]) -> str:
    return f"{row['issue'].strip()}\n\n{listing(load(Path(row['tree'])))}\n\n{_HOW}"


def _calling(calls: list[tuple[str, dict[str, Any]]]) -> Answer:
    made = [
        {
            "id": f"functions.{name}:{number}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for number, (name, arguments) in enumerate(calls)
    ]
    return Answer("", {"role": "assistant", "content": None, "tool_calls": made})
