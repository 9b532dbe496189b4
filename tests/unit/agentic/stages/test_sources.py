"""Where tools and the policy come from: scraped schemas, MCP servers by HTTP, an engine here."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette

from tests.unit.agentic.stages.whole_run import DUMP, published, synthesize
from tests.unit.engine.scripted_engine import ScriptedEngine
from tests.unit.rl.rollout.scripted import small_format

ALONE = ("--evolved-tools", "0", "--stages", "tools", "agents")
PROSE = {
    "labels": {"primary_label": "Storage"},
    "metadata": {
        "server_info_crawled": {
            "author": "@crawled/boxes",
            "tools": [
                {
                    "name": f"{verb}_box",
                    "description": f"To {verb} a box in the attic, with all that is in it.",
                    "parameters": [{"name": "box_id", "type": "string", "required": True}],
                }
                for verb in ("create", "get", "delete", "list")
            ],
        }
    },
}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts(out: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((out / "tools/manifest.json").read_text())["counts"]
    return found


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    path = tmp_path / "servers.json"
    path.write_text(json.dumps([PROSE, DUMP]))
    return path


def test_scraped_tools_are_marked_and_in_no_agent_unless_a_flag_says_so(
    tmp_path: Path, dump: Path
) -> None:
    for how in ("mark", "drop", "use"):
        assert synthesize(tmp_path / how, dump, *ALONE, "--scraped-tools", how) == []
    marked, dropped = counts(tmp_path / "mark"), counts(tmp_path / "drop")
    assert marked["source dump, scraped from prose"] == marked["source dump"] - 4 == 4
    assert marked["source dump, declared by its server"] == dropped["source dump"] == 4
    assert dropped["dump dropped: parameters scraped from prose"] == 4
    domains = {how: {one["domain"] for one in records(tmp_path / how / "agents/agents.jsonl")}
               for how in ("mark", "drop", "use")}  # fmt: skip
    assert domains["mark"] == domains["drop"] == {"shelf"}
    assert domains["use"] == {"shelf", "@crawled/boxes"}
    first = records(tmp_path / "mark" / "tools/tools.jsonl")[0]
    assert first["server"] == "shelf"  # what a server declared stands before what was scraped


def notes() -> Starlette:
    """An MCP server of the official SDK with four tools."""
    server = MCPServer(name="notes", version="1")

    @server.tool()
    def create_note(title: str, text: str) -> str:
        """Write down a new note."""
        return f"{title}: {text}"

    @server.tool()
    def get_note(note_id: str) -> str:
        """Read one note again."""
        return note_id

    @server.tool()
    def update_note(note_id: str, text: str) -> str:
        """Give a note another text."""
        return note_id + text

    @server.tool()
    def delete_note(note_id: str) -> str:
        """Throw a note away for good."""
        return note_id

    return server.streamable_http_app()


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """Serve an application on this machine; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def test_a_dump_without_a_tool_is_refused(tmp_path: Path) -> None:
    dump = tmp_path / "dump.json"
    dump.write_text("{not json")
    with pytest.raises(ValueError, match=r"--dump .*dump.json: no tool .*no JSON"):
        synthesize(tmp_path / "out", None, "--evolved-tools", "0", "--dump", str(dump))


def test_tools_of_a_server_at_an_address_are_harvested_and_played_in_the_simulator(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    size = ("--evolved-tools", "0", "--agents", "2", "--tasks", "8", "--scripted-mistakes", "0")
    with served(notes()) as url:
        assert synthesize(out, None, *size, "--mcp-url", f"jotter={url}") == []
    tools = records(out / "tools/tools.jsonl")
    assert {one["name"] for one in tools} >= {"create_note", "get_note", "delete_note"}
    assert all((one["source"], one["server"]) == ("live", "jotter") for one in tools)
    assert all(one["origin"]["transport"] == "http" and one["operation"] for one in tools)
    played = records(out / "trajectories/trajectories.jsonl")
    called = {call["name"] for one in played for call in one["calls"]}
    assert called & {"create_note", "update_note", "get_note"}
    assert {one["executed"] for one in played} == {"simulated"}
    with pytest.raises(ValueError, match=r"--mcp-url http://127.0.0.1:9/mcp: no tool was had"):
        synthesize(tmp_path / "gone", None, *size, "--mcp-url", "http://127.0.0.1:9/mcp")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("ftp://x",), "--mcp-url ftp://x: wanted URL or NAME=URL"),
        (("a=http://x", "a=http://y"), "there is another server a"),
    ],
)
def test_an_address_that_cannot_be_is_refused(
    tmp_path: Path, given: tuple[str, ...], words: str
) -> None:
    flags = [one for url in given for one in ("--mcp-url", url)]
    with pytest.raises(ValueError, match=words):
        synthesize(tmp_path / "out", None, "--evolved-tools", "0", *flags)


class Opened:
    """What opens checkpoints for a run: a scripted engine with K2's format."""

    def __init__(self, says: str | None) -> None:
        self.format = small_format()
        self.says, self.engines = says, list[ScriptedEngine]()

    def __call__(self, folder: str, args: argparse.Namespace) -> tuple[Any, Any]:
        def script(prompt: Any) -> list[int]:
            assert self.says is not None, "a replay asked the engine"
            return [*self.format.encode_text(self.says), self.format.stop_ids[0]]

        self.engines.append(ScriptedEngine(script, max_context=200_000))
        return self.engines[-1], self.format


def test_an_engine_of_this_process_plays_the_policy_and_a_replay_asks_it_nothing(
    tmp_path: Path, dump: Path
) -> None:
    checkpoint = tmp_path / "tiny"
    checkpoint.mkdir()
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("1")
    policy = ("--model-for", f"policy=engine:{checkpoint}", "--tasks", "6")
    first, again = Opened("I cannot do that."), Opened(None)
    assert synthesize(tmp_path / "out", dump, *policy, "--record", open_checkpoint=first) == []
    played = records(tmp_path / "out/trajectories/trajectories.jsonl")
    assert len(played) >= 3 and {one["model"] for one in played} == {"engine:tiny"}
    assert all(one["evidence"]["ledger"] for one in played)
    assert not any("planted" in one["evidence"] for one in played)
    assert len(first.engines) == 1 and first.engines[0].closed
    replay = (*policy, "--replay", str(tmp_path / "out" / "answers"), "--concurrency", "3")
    assert synthesize(tmp_path / "again", dump, *replay, open_checkpoint=again) == []
    assert published(tmp_path / "again") == published(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/trajectories/manifest.json").read_text())
    assert manifest["settings"]["--model of policy"] == "engine:tiny"
    assert manifest["counts"]["answers of engine:tiny"] == manifest["counts"]["questions policy"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model-for", "policy=engine:nowhere"), "engine:nowhere: there is no such folder"),
        (("--model-for", "judge=engine:."), "engine: plays the policy alone"),
        (("--model-for", "policy=engine:.", "--ray"), "--ray: policy=engine:. plays in one"),
        (("--engine-tokenizer", "."), "give --model-for policy=engine:PATH too"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(
    tmp_path: Path, dump: Path, flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        synthesize(tmp_path / "out", dump, *flags)
