"""The simulator: a dialogue's tools over a typed world, with faults and consistent answers.

A call is checked against its declaration, meets the fault that is drawn for it, and is applied to
the world: whole, in parts that it names, or not at all. The same calls with the same seed give the
same answers. Tools without an operation are answered by a model (``model_simulator.py``), whose
changes pass the same checks.

Declarations of strangers may hold regular expressions that take for ever; ``pattern`` is checked
only for evolved tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from megatron_k2.agentic.model import Model
from megatron_k2.agentic.records import Domain, Outcome, Tool
from megatron_k2.agentic.toolbox import Result
from megatron_k2.agentic.world.faults import (
    FAILING,
    Drawn,
    FaultPlan,
    check_faults,
    failure,
    words,
)
from megatron_k2.agentic.world.model_simulator import ModelSimulator
from megatron_k2.agentic.world.operation_checks import check_operation
from megatron_k2.agentic.world.operations import Applied, apply
from megatron_k2.agentic.world.state import State
from megatron_k2.agentic.world.types import World, check_state, compiled
from megatron_k2.chat.schema import ToolSchemas

_MAX_CHARS = 100_000  # of arguments: more is no call but an attack
_INVALID_S = 0.01  # simulated: a call that never left


class Simulator:
    """A ``Toolbox`` of one dialogue."""

    def __init__(
        self,
        tools: Sequence[Tool],
        domain: Domain,
        world: World,
        faults: Mapping[str, Any],
        seed: int,
        model: Model | None = None,
    ) -> None:
        """Begin a dialogue.

        Args:
            tools: of the agent; their names differ.
            domain: whose types the world has.
            world: the records before the first turn.
            faults: see ``faults.check_faults``.
            seed: of faults, and of the model.
            model: answers tools without an operation (role ``simulator``).

        Raises:
            ValueError: one of them does not fit the others; says which.
        """
        self._tools = {tool.name: tool for tool in tools}
        self._types = compiled(domain.types)
        said = [[one.name, one.parameters, one.operation, one.source] for one in tools]
        self._schemas, found = _checked_tools(json.dumps([domain.types, said]))
        problems = [*check_state(self._types, world), *check_faults(faults, tools), *found]
        if model is None:
            without = [tool.name for tool in tools if tool.operation is None]
            problems += [f"tool {name!r} has no operation, and no model" for name in without]
        if problems:
            raise ValueError(f"domain {domain.name!r}: {'; '.join(problems[:5])}")
        self._state = State.of(self._types, world)
        self._faults = FaultPlan(faults, seed)
        self._model = None if model is None else ModelSimulator(model, domain, seed)

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What may be called."""
        return tuple(self._tools.values())

    @property
    def state(self) -> State:
        """The world as it is."""
        return self._state

    async def call(self, name: str, arguments: Any) -> Result:
        """Answer a call; see ``Toolbox.call``."""
        given = self._checked(name, arguments)
        if isinstance(given, Result):
            return given
        tool, drawn = self._tools[name], self._faults.draw(self._tools[name])
        if drawn.fault in FAILING:
            return self._result(drawn.outcome, drawn.words, drawn)
        if tool.operation is not None:
            return self._commit(*self._applied(tool, given, drawn))
        assert self._model is not None  # ``__init__``
        applied = await self._model.answer(tool, given, self._types, self._state)
        return self._commit(applied, drawn)

    def call_now(self, name: str, arguments: Any) -> Result:
        """Answer a call as ``call`` does, outside of any event loop.

        Raises:
            ValueError: the tool has no operation.
        """
        running = self.call(name, arguments)
        try:
            running.send(None)
        except StopIteration as end:
            result: Result = end.value
            return result
        running.close()
        raise ValueError(f"tool {name!r} has no operation: a model must answer it")

    def world(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return a copy of the records as they are."""
        return self._state.world()

    def evidence(self) -> Mapping[str, Any]:
        """Return nothing: a simulation proves nothing."""
        return {}

    async def close(self) -> None:
        """End the dialogue; nothing is held."""

    def _checked(self, name: str, arguments: Any) -> dict[str, Any] | Result:
        """Return the arguments of a valid call, or what an invalid one is told."""
        if name not in self._tools:
            return self._invalid(
                f"there is no tool {name!r:.80}; there are {', '.join(self._tools)}"
            )
        try:
            given = decoded(arguments)
        except ValueError as error:
            return self._invalid(str(error))
        if problems := self._schemas[name].problems(name, given):
            return self._invalid("; ".join(problems)[:1000])
        return given

    def _applied(self, tool: Tool, given: Mapping[str, Any], drawn: Drawn) -> tuple[Applied, Drawn]:
        """Apply an operation, with its fault; the fault is gone where it did not fit."""
        operation = tool.operation
        assert operation is not None
        options: dict[str, Any] = {}
        if drawn.fault == "partial":
            items = given.get(operation["over"].removeprefix("$")) or ()
            if len(items) > 1:
                options["failing"] = _failing(len(items), drawn.share)
        applied = apply(self._types, self._state, operation, given, **options)
        if drawn.fault == "truncated" and applied.outcome == "ok":
            num_shown = len(applied.result["items"])
            if num_shown > 1:
                options["page"] = 1 + int(drawn.share * (num_shown - 1))
                applied = apply(self._types, self._state, operation, given, **options)
        return applied, drawn if options or not drawn.fault else Drawn("", drawn.latency_s)

    def _commit(self, applied: Applied, drawn: Drawn) -> Result:
        """Take over the next state and tell the model."""
        told = words(applied.result)
        if applied.result is None and applied.outcome == "refused":
            told = failure("refused", applied.detail, retry=False)
        return self._result(applied.outcome, told, drawn, applied.state)

    def _result(
        self, outcome: Outcome, content: str, drawn: Drawn, after: State | None = None
    ) -> Result:
        before = self._state.id
        if after is not None and outcome in ("ok", "partial"):
            self._state = after
        return Result(outcome, content, drawn.fault, drawn.latency_s, before, self._state.id)

    def _invalid(self, reason: str) -> Result:
        told = failure("invalid", reason, retry=False)
        return self._result("invalid", told, Drawn("", _INVALID_S))


def decoded(arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call: a JSON object, or JSON text of one; "" is {}.

    Raises:
        ValueError: they are none, or hold what JSON cannot (NaN, half a surrogate pair).
    """
    try:
        given = arguments
        if isinstance(arguments, str):
            if len(arguments) > _MAX_CHARS:
                raise ValueError(f"longer than {_MAX_CHARS} characters")
            given = json.loads(arguments or "{}")
        text = json.dumps(given, allow_nan=False, ensure_ascii=False)
        if len(text.encode()) > 4 * _MAX_CHARS:
            raise ValueError(f"longer than {_MAX_CHARS} characters")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"arguments are no JSON: {error}"[:300]) from error
    if not isinstance(given, Mapping):
        raise ValueError(f"arguments are no JSON object but {type(given).__name__}")
    return dict(given)


@lru_cache(maxsize=512)
def _checked_tools(text: str) -> tuple[dict[str, ToolSchemas], tuple[str, ...]]:
    """Return the schemas of an agent's tools, and what is wrong with the tools.

    Args:
        text: JSON of the types and of ``[name, parameters, operation, source]`` of each tool.
    """
    types, tools = json.loads(text)
    schemas: dict[str, ToolSchemas] = {}
    problems = []
    for name, parameters, operation, source in tools:
        if name in schemas:
            problems.append(f"two tools are called {name!r}")
        if operation is not None:
            found = check_operation(types, operation, parameters)
            problems += [f"tool {name!r}: {reason}" for reason in found]
        checked = parameters if source == "evolved" else _without_patterns(parameters)
        schemas[name] = _schemas(name, json.dumps(checked))
    return schemas, tuple(problems)


def _without_patterns(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_patterns(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {name: value for name, value in schema.items() if name not in ("patternProperties",)}
    if len(kept) < len(schema):
        kept.pop("additionalProperties", None)  # would refuse what a pattern allowed
        kept.pop("unevaluatedProperties", None)
    return {
        name: value
        if name in ("enum", "const", "default", "examples")
        else _without_patterns(value)
        for name, value in kept.items()
        if not (name == "pattern" and isinstance(value, str))
    }


def _failing(num_items: int, share: float) -> frozenset[int]:
    """Return which elements of a batch fail: at least one, never all, by an even spread."""
    count = 1 + int(share * (num_items - 1) * 0.999)
    first = int(share * 7919) % num_items  # any prime: where the failures begin
    return frozenset((first + at) % num_items for at in range(min(count, num_items - 1)))


@lru_cache(maxsize=4096)  # agents share tools, and reading a schema takes a millisecond
def _schemas(name: str, parameters: str) -> ToolSchemas:
    function = {"name": name, "parameters": json.loads(parameters)}
    return ToolSchemas([{"type": "function", "function": function}], strict=False)
