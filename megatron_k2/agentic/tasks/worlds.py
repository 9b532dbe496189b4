"""Initial worlds: typed records written by a model and checked before anything is built on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_k2.agentic.model import Model
from megatron_k2.agentic.models.json_answers import ask_json
from megatron_k2.agentic.records import Domain
from megatron_k2.agentic.tasks.asking import in_order, question_of
from megatron_k2.agentic.tasks.settings import TaskSettings
from megatron_k2.agentic.world.types import check_state

World = Mapping[str, Mapping[str, Mapping[str, Any]]]
MAX_RECORDS = 200  # worlds stand in every task's line


async def make_world(model: Model, domain: Domain, settings: TaskSettings, seed: int) -> World:
    """Return a domain's records; {} for a domain without types.

    Raises:
        Refused: the model wrote none that fit the types.
    """
    if not domain.types.get("entities"):
        return {}
    fewest, most = settings.records
    inputs = {
        "domain": {"name": domain.name, "description": domain.description},
        "types": domain.types,
        "fewest": fewest,
        "most": most,
    }
    script = {"types": domain.types, "fewest": fewest, "most": most}
    question = question_of("task", "world", inputs, settings, seed, script)
    return await ask_json(model, question, lambda found: _read(found, domain), settings.tries)


def _read(found: Mapping[str, Any], domain: Domain) -> World:
    world = in_order(found.get("world"))
    if not isinstance(world, Mapping):
        raise ValueError("there is no world")
    if problems := check_state(domain.types, world):
        raise ValueError("; ".join(problems[:5]))
    if sum(map(len, world.values())) > MAX_RECORDS:
        raise ValueError(f"more than {MAX_RECORDS} records")
    if not any(world.values()):
        raise ValueError("the world is empty")
    return world
