"""What a model answers while tools are grown: read, checked, with reasons to ask it again.

Everything is checked before it is used: names, types of the world and operations by ``world/``,
declarations by ``schemas.py``. Of an answer with several tools the valid ones stay when the others
cannot be mended.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_k2.agentic.records import Domain, Tool
from megatron_k2.agentic.repository.evolution import data
from megatron_k2.agentic.repository.schemas import check_tool, is_deeper, reason_kind
from megatron_k2.agentic.world.operation_checks import check_operation
from megatron_k2.agentic.world.types import check_types

SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
MAX_NAME = 48  # characters of a domain's name
MAX_TYPES_DEPTH = 8
_TOOL_KEYS = ("name", "description", "parameters", "operation")


@dataclass(frozen=True)
class Draft:
    """A valid tool, and how many steps of evolution it is from the first ones."""

    tool: Tool
    depth: int

    @property
    def shown(self) -> dict[str, Any]:
        """Return what a model that evolves it has to know."""
        return {key: getattr(self.tool, key) for key in _TOOL_KEYS}


def domain_names(answer: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the new domains of an answer, ``name`` with its category.

    Args:
        answer: of a model.
        inputs: of the question.

    Raises:
        ValueError: there is none.
    """
    category, found = inputs["category"], {}
    known = {*inputs["known"]}
    for one in _objects(answer, "domains"):
        name, about = str(one.get("name")), str(one.get("about") or "").strip().rstrip(".")
        if SNAKE.fullmatch(name) and len(name) <= MAX_NAME and about and name not in known:
            found[name] = {"name": f"{category}/{name}", "category": category, "about": about}
    if not found:
        raise ValueError('"domains" has no new domain with a snake_case "name" and an "about"')
    return list(found.values())


def read_world(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``description``, ``types`` and ``policy`` of a domain.

    Raises:
        ValueError: one of them cannot be used; says why.
    """
    description, policy = answer.get("description"), answer.get("policy")
    types = answer.get("types")
    reasons = []
    if not isinstance(description, str) or not description.strip():
        reasons.append('"description" is no text')
    if not isinstance(policy, list) or not all(isinstance(o, str) and o.strip() for o in policy):
        reasons.append('"policy" is no list of sentences')
    if is_deeper(types, MAX_TYPES_DEPTH):
        reasons.append('"types" is nested too deeply')
    else:
        reasons += check_types(types)
    if reasons:
        raise ValueError("; ".join(reasons))
    return {"description": str(description).strip(), "types": types, "policy": policy}


class DraftTools:
    """Tools of one question: valid ones are kept over its tries, reasons are of the last try.

    Args:
        domain: whose tools they are.
        requests: ``step``, and ``parents`` of evolved ones, of each tool.
        taken: names.
        is_base: tools are in the order of the requests, and do not name them.
    """

    def __init__(
        self, domain: Domain, requests: Sequence[Mapping[str, Any]], taken: set[str], is_base: bool
    ) -> None:
        self._domain, self._requests, self._is_base = domain, requests, is_base
        self._server = domain.id
        self._taken = taken
        self._made: dict[int, Tool] = {}
        self.was_read = False
        self.reasons: Counter[str] = Counter()

    def read(self, answer: Mapping[str, Any]) -> None:
        """Take an answer.

        Raises:
            ValueError: a tool of it is not valid, or one is missing; says which and why.
        """
        given = [*_objects(answer, "tools")]
        self.was_read = True
        self.reasons = Counter()
        words = []
        for at, one in enumerate(given[: len(self._requests)]):
            number = at if self._is_base else one.get("request")
            if type(number) is not int or not 0 <= number < len(self._requests):
                reasons = ["request: no index of one of the requests"]
            elif number in self._made:
                continue
            else:
                tool, reasons = self._checked(one)
                if tool is not None:
                    self._made[number] = tool
                    self._taken.add(tool.name)
            if reasons:
                self.reasons[reason_kind(reasons[0])] += 1
                words.append(f"{one.get('name')!r:.70}: {'; '.join(reasons[:3])}")
        if words:
            raise ValueError("\n".join(words))

    def made(self, model: str) -> Iterator[Draft]:
        """Yield the valid tools, in the order of the requests.

        Args:
            model: that answered.
        """
        for number in sorted(self._made):
            tool, request = self._made[number], self._requests[number]
            parents: Sequence[Draft] = request.get("parents", ())
            depth = 1 + max((one.depth for one in parents), default=-1)
            origin = {
                **tool.origin,
                "step": request["step"],
                "parents": [one.tool.name for one in parents],
                "depth": depth,
                "prompts": data("prompts")["version"],
                "model": model,
            }
            yield Draft(replace(tool, origin=origin), depth)

    def _checked(self, one: Mapping[str, Any]) -> tuple[Tool | None, list[str]]:
        missing = [key for key in _TOOL_KEYS if key not in one]
        if missing:
            return None, [f"tool: lacks {', '.join(missing)}"]
        name, enforces = str(one["name"]), one.get("enforces") or []
        if name in self._taken:
            return None, [f"name: {name!r} is taken"]
        tool = Tool(
            self._server, name, str(one["description"]).strip(), one["parameters"],
            self._domain.category, "evolved", one["operation"],
        )  # fmt: skip
        reasons = check_tool(tool)
        if not reasons and is_deeper(one["operation"], MAX_TYPES_DEPTH):
            reasons = ["operation: nested too deeply"]
        if not reasons:
            found = check_operation(self._domain.types, one["operation"], one["parameters"])
            reasons = [f"operation: {reason}" for reason in found]
        if not reasons:
            reasons = self._undescribed(one["parameters"])
        if not _are_indexes(enforces, len(self._domain.policy)):
            reasons = [*reasons, "enforces: no list of indexes of sentences of the policy"]
        if reasons:
            return None, reasons
        origin = {"enforces": [self._domain.policy[at] for at in enforces]}
        return replace(tool, origin=origin), []

    def _undescribed(self, parameters: Mapping[str, Any]) -> list[str]:
        bare = [
            name
            for name, schema in (parameters.get("properties") or {}).items()
            if not isinstance(schema, Mapping) or not schema.get("description")
        ]
        return [f"parameter: {', '.join(bare[:5])} without a description"] if bare else []


def _are_indexes(values: Any, count: int) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < count for v in values)


def _objects(answer: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    given = answer.get(key)
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise ValueError(f'"{key}" is no list of objects')
    yield from given
