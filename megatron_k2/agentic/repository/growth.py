"""Growing the repository: domains of each category, then each domain's tools, then near-duplicates.

Units of work are a category (``list_domains``) and a domain (``domain_growth.grow_domain``). Their
results are JSON, so that a run can journal them; ``evolve`` runs all that are not finished, and
``assemble`` makes one repository of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_k2.agentic.model import Model, Refused
from megatron_k2.agentic.models.json_answers import ask_json
from megatron_k2.agentic.records import Domain, Tool
from megatron_k2.agentic.repository.answers import domain_names
from megatron_k2.agentic.repository.domain_growth import grow_domain
from megatron_k2.agentic.repository.duplicates import deduplicate
from megatron_k2.agentic.repository.evolution import Settings, data, num_domains, question_of

DOMAINS_AT_ONCE = 10  # a model repeats itself in longer lists
UNITS_AT_ONCE = 64


@dataclass(frozen=True)
class Evolved:
    """What was grown.

    Attributes:
        domains: those with tools left.
        tools: valid, without near-duplicates.
        dropped: number of tools left out, by reason; domains as ``domain: ...``.
        wanted: number of domains that were asked for.
    """

    domains: list[Domain] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    wanted: int = 0


async def evolve(
    model: Model,
    settings: Settings,
    finished: MutableMapping[str, dict[str, Any]],
    progress: Callable[[str], None] | None = None,
) -> Evolved:
    """Grow the repository; does only the units that are not finished.

    Args:
        model: that is asked.
        settings: of the run.
        finished: unit -> result; new results are set in it.
        progress: is told the name of each unit that is done.

    Raises:
        BudgetSpent, ServerGone, ValueError: as the model's; what is finished stays finished.
    """
    gate = asyncio.Semaphore(UNITS_AT_ONCE)

    async def unit(key: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        async with gate:
            if key not in finished:
                finished[key] = await work()
            if progress is not None:
                progress(key)
            return finished[key]

    counts = [(name, count) for name, count in num_domains(settings).items() if count]
    lists = await _all(
        unit(f"domains {name}", partial(list_domains, model, settings, name, count))
        for name, count in counts
    )
    seeds = [seed for one in lists for seed in one["domains"]]
    grown = await _all(
        unit(f"domain {seed['name']}", partial(grow_domain, model, settings, seed))
        for seed in seeds
    )
    return assemble([*lists, *grown], settings)


def assemble(results: Sequence[Mapping[str, Any]], settings: Settings) -> Evolved:
    """Return what units grew, near-duplicates across domains removed.

    Args:
        results: of ``list_domains`` and ``grow_domain``, in the order of their seeds.
        settings: of the run.
    """
    found = Evolved(wanted=sum(num_domains(settings).values()))
    domains: list[Domain] = []
    tools: list[Tool] = []
    for one in results:
        found.dropped.update(one["dropped"])
        if one.get("domain"):
            domains.append(Domain.from_json(one["domain"]))
            tools += [Tool.from_json(tool) for tool in one["tools"]]
    unique = deduplicate(tools)
    found.dropped.update(unique.reasons)
    found.tools.extend(unique.kept)
    left = {tool.server for tool in unique.kept}
    found.domains.extend(one for one in domains if one.id in left)
    return found


def evenly(evolved: Evolved, count: int) -> list[Tool]:
    """Return so many tools, in their order: domain after domain, the categories in turns."""
    sizes = Counter(tool.server for tool in evolved.tools)
    turns: dict[str, int] = {}
    places = []
    for place, domain in enumerate(evolved.domains):
        turns[domain.category] = turns.get(domain.category, -1) + 1
        places.append((turns[domain.category], place, domain.id))
    left, most = count, {}
    for _, _, name in sorted(places):
        most[name] = min(sizes[name], left)
        left -= most[name]
    found = []
    for tool in evolved.tools:
        most[tool.server] -= 1
        if most[tool.server] >= 0:
            found.append(tool)
    return found


async def list_domains(
    model: Model, settings: Settings, category: str, count: int
) -> dict[str, Any]:
    """Return ``{"domains": [{"name", "category", "about"}], "dropped"}`` of a category."""
    known: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    missed = 0
    while len(known) < count and missed < settings.tries:
        inputs = {
            "category": category,
            "about": data("seeds")["categories"][category],
            "count": min(DOMAINS_AT_ONCE, count - len(known)),
            "known": [one["name"].partition("/")[2] for one in known],
        }
        question = question_of("domains", inputs, settings, category, len(known), missed)
        try:
            new = await ask_json(
                model, question, partial(domain_names, inputs=inputs), settings.tries
            )
        except Refused:
            new = []
        missed += not new
        known += new[: count - len(known)]
    if len(known) < count:
        dropped["domain: none offered"] += count - len(known)
    return {"domains": known, "dropped": dict(dropped)}


async def _all[T](works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results in order; the first failure ends the others and is raised as it is."""
    tasks = [asyncio.create_task(one) for one in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
