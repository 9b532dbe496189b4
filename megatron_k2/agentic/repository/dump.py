"""Import of dumps of MCP servers' descriptions: an archive, a folder, a file of JSON or JSONL.

Two forms of a server are read: that of Toucan (github.com/TheAgentArk/Toucan, arXiv 2510.01179),
where tools stand under ``metadata.remote_server_response.tools`` if the server could be reached and
else under ``server_info_crawled.tools``, often with a list of parameters instead of a schema; and
``{"name", "category", "tools"}`` with tools as MCP's ``tools/list`` gives them. Of two lists of the
same server the reached one is taken. What cannot be used is left out and counted by its reason.
One server is in memory at a time. A crawler's parameters are words of prose (``is_scraped``): valid
schemas that say little, and often wrong ones.
"""

from __future__ import annotations

import gzip
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.repository.schemas import check_tool, reason_kind

MAX_SERVER_BYTES = 16 * 2**20  # the largest of Toucan's has 0.4 MiB
_TYPES = {
    **{name: name for name in ("string", "integer", "number", "boolean", "object", "array")},
    **{"str": "string", "int": "integer", "float": "number", "bool": "boolean"},
    **{"dict": "object", "list": "array"},
}
SCRAPED = "crawled"
_SCHEMA_KEYS = ("inputSchema", "input_schema", "parameters")


def read_dump(
    path: Path, dropped: Counter[str], first: int = 0, last: int | None = None
) -> Iterator[Tool]:
    """Yield the valid tools of a dump, in its order; a folder's files by name.

    Args:
        path: ``.tar``, ``.tar.gz``, ``.json``, ``.jsonl``, ``.jsonl.gz``, or a folder of those.
        dropped: counts what is left out, by reason; servers as ``server: ...``.
        first, last: of the documents to read (``num_documents``), the last one left out.

    Raises:
        ValueError: the path cannot be read.
    """
    try:
        for name, text in islice(_documents(path), first, last):
            for server in _servers(text, dropped):
                yield from server_tools(server, name, dropped)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"--dump {path}: {error}") from error


def is_scraped(tool: Tool) -> bool:
    """Return whether a crawler made a tool's parameters from prose: no server declared them."""
    return tool.origin.get("form") == SCRAPED


def num_documents(path: Path) -> int:
    """Return how many documents a dump has: files, or lines of JSONL.

    Raises:
        ValueError: the path cannot be read.
    """
    try:
        return sum(1 for _ in _documents(path))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"--dump {path}: {error}") from error


def server_tools(server: Mapping[str, Any], file: str, dropped: Counter[str]) -> Iterator[Tool]:
    """Yield the valid tools of one server.

    Args:
        server: its description, in one of the two forms.
        file: where it comes from.
        dropped: counts what is left out, by reason.
    """
    name, category, form, tools = _read(server)
    if not tools:
        dropped["server: no tools"] += 1
    seen: set[str] = set()
    for at, given in enumerate(tools):
        try:
            tool = _tool(given, name, category, {"file": file, "form": form, "at": at})
        except ValueError as error:
            dropped[reason_kind(str(error))] += 1
            continue
        reasons = check_tool(tool)
        if reasons:
            dropped[reason_kind(reasons[0])] += 1
        elif tool.name in seen:
            dropped["name twice in a server"] += 1
        else:
            seen.add(tool.name)
            yield tool


def list_schema(parameters: list[Any]) -> dict[str, Any]:
    """Return the JSON Schema of a list of ``{"name", "required", "type"}``.

    Raises:
        ValueError: no such list, or a type that JSON Schema lacks.
    """
    properties: dict[str, Any] = {}
    required = []
    for one in parameters:
        if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
            raise ValueError(f"parameter: no name in {one!r:.80}")
        name, kind = one["name"], str(one.get("type", "string")).lower()
        if kind not in _TYPES:
            raise ValueError(f"parameter type: {kind!r:.80}")
        if name in properties:
            raise ValueError(f"parameter: {name!r:.80} twice")
        properties[name] = {"type": _TYPES[kind]}
        if isinstance(one.get("description"), str) and one["description"].strip():
            properties[name]["description"] = one["description"].strip()
        if one.get("required") in (True, "true", "True", "yes"):
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _documents(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (name, text) of each document: a JSON file, or a line of a JSONL file."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.name.endswith((".json", ".jsonl", ".jsonl.gz")):
                yield from ((f"{file.relative_to(path)}", text) for _, text in _documents(file))
    elif path.name.endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(path, "r|*") as archive:  # a stream: nothing is unpacked to disk
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None and member.name.endswith(".json"):
                    yield member.name, _text(stream.read(MAX_SERVER_BYTES + 1))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
            while line := lines.readline(MAX_SERVER_BYTES + 1):
                yield path.name, _text(line)
                while len(line) > MAX_SERVER_BYTES and not line.endswith(b"\n"):
                    line = lines.readline(MAX_SERVER_BYTES + 1)  # what is left of a giant one
    elif path.name.endswith(".json"):
        with path.open("rb") as stream:
            yield path.name, _text(stream.read(MAX_SERVER_BYTES + 1))
    else:
        raise OSError("neither a folder nor .tar, .tar.gz, .json, .jsonl or .jsonl.gz")


def _text(data: bytes) -> str | None:
    """Return text; None where it is too large or no text."""
    try:
        return data.decode() if len(data) <= MAX_SERVER_BYTES else None
    except UnicodeDecodeError:
        return None


def _servers(text: str | None, dropped: Counter[str]) -> Iterator[Mapping[str, Any]]:
    if text is None:
        dropped["server: too large or no text"] += 1
        return
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        dropped["server: no JSON"] += 1
        return
    for server in value if isinstance(value, list) else [value]:
        if isinstance(server, Mapping):
            yield server
        else:
            dropped["server: no object"] += 1


def _read(server: Mapping[str, Any]) -> tuple[str, str, str, list[Any]]:
    """Return name, category, form and tools of a server."""
    if "metadata" not in server:
        name = str(server.get("name") or server.get("server") or "unnamed")
        category = str(server.get("category") or "unknown")
        return name, category, "listed", _list(server.get("tools"))
    metadata = _mapping(server["metadata"])
    crawled = _mapping(metadata.get("server_info_crawled"))
    reached = _list(_mapping(metadata.get("remote_server_response")).get("tools"))
    names: tuple[Any, ...] = (
        crawled.get("author"),
        metadata.get("server_name"),
        metadata.get("server_id"),
    )
    found = next((one for one in names if one not in (None, "", "Not found")), None)
    category = _mapping(server.get("labels")).get("primary_label") or "unknown"
    tools = reached or _list(crawled.get("tools"))
    return str(found or "unnamed"), str(category), "reached" if reached else SCRAPED, tools


def _tool(given: Any, server: str, category: str, origin: Mapping[str, Any]) -> Tool:
    if not isinstance(given, Mapping):
        raise ValueError("tool: no object")
    found = [given[key] for key in _SCHEMA_KEYS if given.get(key) is not None]
    parameters: Any = found[0] if found else {}
    if isinstance(parameters, list):
        parameters = list_schema(parameters)
    if isinstance(parameters, Mapping):
        parameters = {key: one for key, one in parameters.items() if key != "$schema"}
        parameters = {"type": "object", "properties": {}, **parameters}
    description = given.get("description")
    description = description.strip() if isinstance(description, str) else ""
    return Tool(server, str(given.get("name")), description, parameters, category, "dump",
                origin=origin)  # fmt: skip


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
