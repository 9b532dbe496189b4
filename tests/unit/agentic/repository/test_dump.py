"""Dumps: every form is read, what is broken is counted, a tool's form is one."""

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.agentic.repository.dump import list_schema, read_dump
from megatron_k2.agentic.repository.schemas import check_tool

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
SHARED = Path(__file__).resolve().parents[5] / "shared/data/toucan-mcp-servers.tar.gz"


def toucan(reached: list[Any], crawled: list[Any], author: str = "@a/files") -> dict[str, Any]:
    return {
        "labels": {"primary_label": "File Management"},
        "metadata": {
            "server_id": 7,
            "remote_server_response": {"tools": reached},
            "server_info_crawled": {"author": author, "tools": crawled},
        },
    }


def declared(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "description": f"Does {name}.", "input_schema": SCHEMA, **changes}


CRAWLED = {
    "name": "move", "description": "Moves a file.",
    "parameters": [{"name": "from", "required": True, "type": "string"},
                   {"name": "force", "required": False, "type": "bool"}],
}  # fmt: skip
SERVERS = [
    toucan([declared("read")], [declared("read"), declared("write")]),
    toucan([], [CRAWLED, {**CRAWLED, "name": "Move It"}], "Not found"),
    {"name": "plain", "category": "Time", "tools": [
        {"name": "now", "description": "Tells the time.", "inputSchema": {}}]},
]  # fmt: skip
WANTED = [("@a/files", "read", "File Management"), ("7", "move", "File Management"),
          ("plain", "now", "Time")]  # fmt: skip


def written(folder: Path, form: str) -> Path:
    texts = [json.dumps(one) for one in SERVERS]
    path = folder / f"dump{form}"
    if form == "":
        path.mkdir()
        for at, text in enumerate(texts):
            (path / f"{at}.json").write_text(text)
    elif form.startswith(".tar"):
        with tarfile.open(path, "w:gz" if form.endswith("gz") else "w") as archive:
            for at, text in enumerate(texts):
                member = tarfile.TarInfo(f"servers/{at}.json")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
    elif form == ".json":
        path.write_text(json.dumps(SERVERS))
    else:
        data = "\n".join(texts).encode()
        path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    return path


@pytest.mark.parametrize("form", ["", ".tar", ".tar.gz", ".json", ".jsonl", ".jsonl.gz"])
def test_every_form_of_a_dump_gives_the_same_tools(tmp_path: Path, form: str) -> None:
    dropped: Counter[str] = Counter()
    tools = list(read_dump(written(tmp_path, form), dropped))
    assert [(one.server, one.name, one.category) for one in tools] == WANTED
    assert dropped == {"name": 1}
    assert all(check_tool(one) == [] and one.source == "dump" for one in tools)
    assert tools[1].parameters == {
        "type": "object",
        "properties": {"from": {"type": "string"}, "force": {"type": "boolean"}},
        "required": ["from"],
    }


def test_what_is_broken_is_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    bad = [
        declared("a", description=None), declared("b", input_schema={"type": "strng"}),
        declared("c", input_schema="x"), declared("d", parameters=None, input_schema=[{}]),
        declared("e", input_schema=[{"name": "x", "type": "blob"}]), "text",
        declared("ok"), declared("ok"),
    ]  # fmt: skip
    lines = [json.dumps(toucan(bad, [])), "{", "[" * 100_000, "7", json.dumps(toucan([], []))]
    path = tmp_path / "servers.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    dropped: Counter[str] = Counter()
    assert [one.name for one in read_dump(path, dropped)] == ["ok"]
    assert dropped == {
        "description": 1, "schema": 2, "parameter": 1, "parameter type": 1, "tool": 1,
        "name twice in a server": 1, "server: no JSON": 2, "server: no object": 1,
        "server: no tools": 1, "server: too large or no text": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["missing.json", "dump.zip", "broken.tar.gz"])
def test_a_dump_that_cannot_be_read_names_the_flag(tmp_path: Path, name: str) -> None:
    if name == "broken.tar.gz":
        (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(ValueError, match="--dump"):
        list(read_dump(tmp_path / name, Counter()))


def test_a_parameter_twice_is_no_schema() -> None:
    with pytest.raises(ValueError, match="twice"):
        list_schema([{"name": "x"}, {"name": "x"}])


@pytest.mark.evidence
@pytest.mark.skipif(not SHARED.exists(), reason="needs the Toucan dump beside the project")
def test_the_real_dump_gives_over_three_thousand_valid_tools() -> None:
    dropped: Counter[str] = Counter()
    tools = list(read_dump(SHARED, dropped))
    assert len(tools) > 15_000
    assert dropped["description"] > 1000  # most of them: "Description not available"
    assert sum(dropped.values()) < 2500
