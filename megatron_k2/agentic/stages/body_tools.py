"""The stage ``tools``: a dump, live servers, evolution; then what is there twice goes.

Real tools come first, those that a server declared before those that a crawler read, so that an
evolved or a crawled one that repeats them is dropped; live servers in the sandbox keep all of
theirs, however alike: they are what real tasks call. Servers of a dump or at an address become
domains with inferred operations where enough of their tools could be read (``world/inferred.py``);
tools scraped from prose, or whose words give a model orders, become none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_k2.agentic.records import Domain, Tool
from megatron_k2.agentic.repository.coverage import coverage, draw_coverage
from megatron_k2.agentic.repository.dump import is_scraped, num_documents, read_dump
from megatron_k2.agentic.repository.duplicates import deduplicate
from megatron_k2.agentic.repository.evolution import Settings, num_domains
from megatron_k2.agentic.repository.growth import assemble, evenly, grow_domain, list_domains
from megatron_k2.agentic.stages.body_real import (
    harvested,
    harvested_by_http,
    is_http,
    wanted_servers,
    wanted_urls,
)
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.work import Work
from megatron_k2.agentic.world.inferred import infer

DOCUMENTS_A_UNIT = 100  # of a dump
LEAST_OPERATIONS = 3  # of a server whose tools are simulated: fewer make no tasks


async def tools_stage(work: Work) -> None:
    """Make the repository of tools and their domains."""
    live = await _harvest(work)
    listed = [*await _harvest_http(work), *await _dumped(work)]
    domains, evolved = await _evolve(work)
    unique = deduplicate([*live, *listed, *evolved])
    dropped = [one for one in unique.dropped if not _is_installed(one.tool)]
    for one in dropped:
        work.counts[f"{one.kind} duplicate"] += 1
    work.write("duplicates.jsonl", (
        {"tool": one.tool.to_json(), "of": one.of, "kind": one.kind, "similarity": one.similarity}
        for one in dropped
    ))  # fmt: skip
    kept = [one for one in unique.kept if not _is_installed(one)]
    tools, inferred = _inferred(kept, work.args.scraped_tools == "use")
    tools = [*live, *tools]
    left = {tool.server for tool in tools}
    domains = [one for one in domains if one.id in left]
    work.write("domains.jsonl", [*domains, *inferred])
    for tool in tools:
        work.counts[f"source {tool.source}"] += 1
        if tool.source == "dump":
            how = "scraped from prose" if is_scraped(tool) else "declared by its server"
            work.counts[f"source dump, {how}"] += 1
        work.counts["with an operation"] += tool.operation is not None
    work.counts["domains evolved"], work.counts["domains of servers"] = len(domains), len(inferred)
    work.write("tools.jsonl", tools)
    text = json.dumps(coverage(tools), indent=1, ensure_ascii=False) + "\n"
    work.path("coverage.json").write_text(text, encoding="utf-8")
    draw_coverage(
        [tool for tool in tools if tool.source != "evolved"],
        [tool for tool in tools if tool.source == "evolved"],
        work.path("coverage.png"),
    )


async def _dumped(work: Work) -> list[Tool]:
    path, most = work.args.dump, work.args.max_dump_tools
    if path is None:
        return []
    last = num_documents(path)
    starts = range(0, last, DOCUMENTS_A_UNIT if most is None else max(1, last))
    values = [[str(path.resolve()), one, min(last, one + starts.step), most] for one in starts]
    found: list[Tool] = []
    for one in await work.map("dump", f"{__name__}:dump_of", values):
        work.counts.update(one["dropped"])
        found += [Tool.from_json(tool) for tool in one["tools"]]
    if not found and most != 0:
        raise ValueError(f"--dump {path}: no tool can be read of it: {dict(work.counts)}")
    scraped = [tool for tool in found if is_scraped(tool)]
    if work.args.scraped_tools == "drop" and scraped:
        work.counts["dump dropped: parameters scraped from prose"] = len(scraped)
        scraped = []
    return [*(tool for tool in found if not is_scraped(tool)), *scraped]


async def dump_of(desk: Desk, value: list[Any]) -> dict[str, Any]:
    """Do a unit: [path of a dump, first document, last, most tools]."""
    path, first, last, most = value
    dropped: Counter[str] = Counter()
    tools = islice(read_dump(Path(path), dropped, first, last), most)
    return {"tools": [tool.to_json() for tool in tools], "dropped": _dropped("dump", dropped)}


async def _harvest(work: Work) -> list[Tool]:
    found = []
    for one in await work.map("live", f"{__name__}:live_of", wanted_servers(work.args)):
        work.counts.update(one["counts"])
        found += [Tool.from_json(tool) for tool in one["tools"]]
    return found


async def _harvest_http(work: Work) -> list[Tool]:
    found: list[Tool] = []
    for one in await work.map("http", f"{__name__}:http_of", wanted_urls(work.args)):
        work.counts.update(one["counts"])
        found += [Tool.from_json(tool) for tool in one["tools"]]
    return found


async def http_of(desk: Desk, value: list[str]) -> dict[str, Any]:
    """Do a unit: [name, address] of a server."""
    tools, counts = await harvested_by_http(*value)
    return {"tools": [tool.to_json() for tool in tools], "counts": counts}


def _is_installed(tool: Tool) -> bool:
    """Return whether a tool is of a live server that dialogues start in the sandbox."""
    return tool.source == "live" and not is_http(tool)


async def live_of(desk: Desk, name: str) -> dict[str, Any]:
    """Do a unit: the name of a declared server."""
    tools, counts = await harvested(desk, name)
    return {"tools": [tool.to_json() for tool in tools], "counts": counts}


def settings_of(args: Any) -> Settings:
    """Return how tools are grown."""
    return Settings(num_tools=args.evolved_tools, seed=args.seed)


async def _evolve(work: Work) -> tuple[list[Domain], list[Tool]]:
    if not work.args.evolved_tools:
        return [], []
    settings = settings_of(work.args)
    wanted = [[name, count] for name, count in num_domains(settings).items() if count]
    lists = list(await work.map("domains", f"{__name__}:domains_of", wanted))
    seeds = [one for found in lists if found for one in found["domains"]]
    grown = list(await work.map("evolution", f"{__name__}:domain_of", seeds))
    evolved = assemble([one for one in [*lists, *grown] if one], settings)
    work.counts.update(_dropped("evolved", evolved.dropped))
    tools = evenly(evolved, work.args.evolved_tools)
    if beyond := len(evolved.tools) - len(tools):
        work.counts["evolved dropped: more than --evolved-tools"] = beyond
    return evolved.domains, tools


async def domains_of(desk: Desk, value: list[Any]) -> dict[str, Any]:
    """Do a unit: [category, number of domains]."""
    return await list_domains(desk.model, settings_of(desk.args), value[0], value[1])


async def domain_of(desk: Desk, seed: dict[str, Any]) -> dict[str, Any]:
    """Do a unit: the seed of a domain."""
    return await grow_domain(desk.model, settings_of(desk.args), seed)


def _inferred(tools: Sequence[Tool], uses_scraped: bool) -> tuple[list[Tool], list[Domain]]:
    """Return the tools, those of servers with operations where they could be inferred."""
    servers: dict[str, list[Tool]] = {}
    for tool in tools:
        ordered = bool(tool.origin.get("injection"))
        if tool.source != "evolved" and not ordered and (uses_scraped or not is_scraped(tool)):
            servers.setdefault(tool.server, []).append(tool)
    operated: dict[str, Tool] = {}
    domains = []
    for server, own in servers.items():
        found = infer(server, own)
        if sum(tool.operation is not None for tool in found.tools) < LEAST_OPERATIONS:
            continue
        domains.append(found.domain)
        operated |= {before.id: after for before, after in zip(own, found.tools, strict=True)}
    return [operated.get(tool.id, tool) for tool in tools], domains


def _dropped(where: str, dropped: Counter[str]) -> dict[str, int]:
    return {f"{where} dropped: {reason}": n for reason, n in sorted(dropped.items())}
