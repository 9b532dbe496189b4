"""Growing the tools of one domain: its world, the tools that users need first, rounds of evolution.

A domain is a unit of work: a pure function of settings, its seed, and what the model answers. An
answer that cannot be used is asked for again with the reasons; what is still wrong then is dropped
and counted by reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.model import Model, Refused
from megatron_k2.agentic.models.json_answers import ask_json
from megatron_k2.agentic.models.noted import NotedModel
from megatron_k2.agentic.records import Domain
from megatron_k2.agentic.repository.answers import Draft, DraftTools, read_world
from megatron_k2.agentic.repository.duplicates import NearDuplicates
from megatron_k2.agentic.repository.evolution import Settings, data, question_of, seed_of


async def grow_domain(model: Model, settings: Settings, seed: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"domain", "tools", "dropped"}`` as JSON values; domain is None where it failed.

    Args:
        model: that is asked.
        settings: of the run.
        seed: ``name``, ``category`` and ``about``.
    """
    growth = _Growth(NotedModel(model), settings, seed)
    domain = await growth.world()
    if domain is None:
        return {"domain": None, "tools": [], "dropped": dict(growth.dropped)}
    await growth.base(domain)
    for number in range(settings.rounds):
        if not growth.tools or len(growth.tools) >= settings.tools_per_domain:
            break
        await growth.round(domain, number)
    tools = [one.tool.to_json() for one in growth.tools]
    if not tools:
        growth.dropped["domain: no valid tool"] += 1
    return {"domain": domain.to_json(), "tools": tools, "dropped": dict(growth.dropped)}


class _Growth:
    """A domain under way."""

    def __init__(self, model: NotedModel, settings: Settings, seed: Mapping[str, Any]) -> None:
        self._model, self._settings, self._seed = model, settings, seed
        self._index = NearDuplicates()
        self.tools: list[Draft] = []
        self.dropped: Counter[str] = Counter()

    async def world(self) -> Domain | None:
        """Ask for types and policy."""
        inputs = {key: self._seed[key] for key in ("name", "category", "about")}
        question = question_of("world", inputs, self._settings, self._seed["name"])
        origin = {"prompts": data("prompts")["version"]}
        try:
            read = await ask_json(self._model, question, read_world, self._settings.tries)
        except Refused:
            self.dropped["domain: no valid world"] += 1
            return None
        return Domain(
            self._seed["name"], self._seed["category"], read["description"], read["types"],
            tuple(read["policy"]), {**origin, "model": self._model.name},
        )  # fmt: skip

    async def base(self, domain: Domain) -> None:
        """Ask for the tools that users need first."""
        missing = min(self._settings.base_tools, self._settings.tools_per_domain)
        at = 0
        while missing > 0:
            count = min(self._settings.batch, missing)
            inputs = {**self._about(domain), "count": count}
            await self._ask("tools", domain, inputs, [{"step": "base"}] * count, at)
            missing, at = missing - count, at + 1

    async def round(self, domain: Domain, number: int) -> None:
        """Ask for evolved tools, each from parents drawn from those there are."""
        draw = random.Random(seed_of(self._settings.seed, "round", domain.name, number))
        steps = data("seeds")["steps"]
        missing = self._settings.tools_per_domain - len(self.tools)
        requests = []
        for step in draw.sample(sorted(steps), len(steps))[: min(self._settings.batch, missing)]:
            parents = draw.sample(self.tools, min(2 if step == "combine" else 1, len(self.tools)))
            requests.append({"step": step, "how": steps[step], "parents": parents})
        shown = [
            {**one, "parents": [parent.shown for parent in one["parents"]]} for one in requests
        ]
        inputs = {**self._about(domain), "requests": shown}
        await self._ask("evolve", domain, inputs, requests, number)

    def _about(self, domain: Domain) -> dict[str, Any]:
        return {
            "domain": domain.name,
            "description": domain.description,
            "types": domain.types,
            "policy": list(domain.policy),
            "taken": [one.tool.name for one in self.tools],
        }

    async def _ask(
        self, prompt: str, domain: Domain, inputs: Mapping[str, Any],
        requests: Sequence[Mapping[str, Any]], number: int,
    ) -> None:  # fmt: skip
        taken = {one.tool.name for one in self.tools}
        reading = DraftTools(domain, requests, taken, is_base=prompt == "tools")
        question = question_of(prompt, inputs, self._settings, domain.name, number)
        try:
            await ask_json(self._model, question, reading.read, self._settings.tries)
        except Refused:
            if not reading.was_read:
                self.dropped["unreadable answer"] += len(requests)
        self.dropped.update(reading.reasons)
        for draft in reading.made(self._model.name):
            if (match := self._index.repeats(draft.tool)) is not None:
                self.dropped[f"{match.kind} duplicate"] += 1
            elif len(self.tools) < self._settings.tools_per_domain:
                self.tools.append(draft)
