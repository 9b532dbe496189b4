"""Are the tool calls of an answer valid: id, count, declared name, arguments by JSON schema.

The last three questions are those of Moonshot's vendor verifier
(github.com/MoonshotAI/K2-Vendor-Verifier, ``tool_calls_eval.py``), whose two numbers ``CallScore``
computes: the share of messages with calls whose calls all fit their schemas, and the F1 of calling
at all where a reference calls. The first two follow from Moonshot's tool-call guide.

Schemas are read by the ``jsonschema`` package; a ``$ref`` to another document is not fetched. A
declaration's ``pattern`` is run as it is: do not check arguments against declarations of strangers
without a time limit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from megatron_k2.chat.call_ids import call_id, parse_id
from megatron_k2.chat.call_reading import declared_name, quoted, wrong_arguments

Kind = Literal["id", "count", "name", "json", "schema"]
MAX_SHOWN = 5  # schema errors of one call


@dataclass(frozen=True)
class CallProblem:
    """Why a call is not valid. ``text`` names the call and the path."""

    kind: Kind
    text: str


class ToolSchemas:
    """The declarations of a dialogue, ready to check calls."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], strict: bool = True) -> None:
        """Read declarations in OpenAI's form.

        Args:
            tools: declarations.
            strict: refuse parameters that are no JSON schema. Without, every call of such a tool
                has that as its problem: data from elsewhere knows types such as ``dict``.

        Raises:
            ValueError: one has no name, a name is declared twice, or its ``parameters`` are no
                JSON schema.
        """
        self._validators: dict[str, Any] = {}
        self._no_schemas: dict[str, str] = {}
        for at, tool in enumerate(tools):
            name = declared_name(tool)
            if not isinstance(name, str) or not name:
                raise ValueError(f"tools[{at}] has no function.name: {tool!r}")
            if name in self._validators:
                raise ValueError(f"tools[{at}] declares {name!r} once more")
            try:
                made = _validator(name, tool["function"].get("parameters") or {})
            except ValueError as error:
                if strict:
                    raise
                made, self._no_schemas[name] = None, str(error)
            self._validators[name] = made

    @property
    def names(self) -> tuple[str, ...]:
        """Return the declared names, in their order."""
        return tuple(self._validators)

    def problems(self, name: str, arguments: Any) -> list[str]:
        """Return what is wrong with the arguments of a call, a line each.

        Args:
            name: of a declared tool.
            arguments: decoded JSON.
        """
        from referencing.exceptions import Unresolvable

        if name in self._no_schemas:
            return [self._no_schemas[name]]
        try:
            errors = list(self._validators[name].iter_errors(arguments))
        except Unresolvable as error:
            return [f"the schema of {name!r} refers to {error.ref!r}, which is not in it"]
        except RecursionError:
            return [f"arguments of {name!r} are nested too deeply to check"]
        errors.sort(key=lambda error: error.json_path)
        lines = [f"{error.json_path}: {error.message}" for error in errors[:MAX_SHOWN]]
        if len(errors) > MAX_SHOWN:
            lines.append(f"{len(errors) - MAX_SHOWN} more")
        return lines

    def check_call(self, call: Mapping[str, Any], index: int) -> list[CallProblem]:
        """Return why a call is not valid.

        Args:
            call: in OpenAI's form, arguments as text or an object.
            index: its place among the calls of the dialogue, from 0.
        """
        function = call.get("function") or {}
        id_, name = str(call.get("id")), str(function.get("name"))
        found = []
        read = parse_id(id_)
        if read is None:
            text = f"id {quoted(id_)} has not the form functions.NAME:INDEX"
            found.append(CallProblem("id", text))
        elif read[0] != name:
            found.append(CallProblem("id", f"id {quoted(id_)} names another tool than {name!r}"))
        elif id_ != call_id(name, index):
            text = f"id {quoted(id_)} should be {quoted(call_id(name, index))}, by count of calls"
            found.append(CallProblem("count", text))
        if name not in self._validators:
            known = ", ".join(self.names) or "none"
            text = f"call {quoted(id_)}: no tool {name!r} is declared; declared: {known}"
            found.append(CallProblem("name", text))
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            if wrong := wrong_arguments(arguments):
                return [*found, CallProblem("json", f"call {quoted(id_)}: arguments {wrong}")]
            try:
                arguments = json.loads(arguments)
            except ValueError as error:  # a number of more digits than Python reads
                text = f"call {quoted(id_)}: arguments cannot be read: {error}"
                return [*found, CallProblem("json", text)]
        if name in self._validators:
            lines = self.problems(name, arguments)
            found += [CallProblem("schema", f"call {quoted(id_)}: {line}") for line in lines]
        return found


def check_message(
    message: Mapping[str, Any], schemas: ToolSchemas, num_before: int = 0
) -> list[list[CallProblem]]:
    """Return the problems of each call of an assistant's message.

    Args:
        message: the assistant's.
        schemas: what it may call.
        num_before: calls of the dialogue before this message.
    """
    calls = message.get("tool_calls") or ()
    return [schemas.check_call(call, num_before + at) for at, call in enumerate(calls)]


def check_calls(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    ids: bool = False,
) -> list[CallProblem]:
    """Return the problems of all calls of a dialogue.

    Args:
        messages: the dialogue.
        tools: its declarations.
        ids: look at form and count of ids too, which prompts and training data rename.

    Raises:
        ValueError: a declaration has no name, or one of another.
    """
    schemas = _schemas(json.dumps(tools))
    found = []
    count = 0
    for message in messages:
        for problems in check_message(message, schemas, count):
            count += 1
            found += [one for one in problems if ids or one.kind not in ("id", "count")]
    return found


@lru_cache(maxsize=64)  # a data set has few sets of tools, and reading one takes milliseconds
def _schemas(tools: str) -> ToolSchemas:
    return ToolSchemas(json.loads(tools), strict=False)


@dataclass
class CallScore:
    """Validity of tool calls over many answers.

    Attributes:
        num_answers, num_calling: answers, and those of them with calls.
        num_calls, num_valid_calls: calls, and those without any problem.
        num_fitting: answers whose calls all are declared, JSON and fit their schemas.
        kinds: number of calls with a problem, by kind.
    """

    num_answers: int = 0
    num_calling: int = 0
    num_calls: int = 0
    num_valid_calls: int = 0
    num_fitting: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    _both: int = 0
    _reference: int = 0

    def add(
        self, problems: Sequence[Sequence[CallProblem]], reference_calls: bool | None = None
    ) -> None:
        """Count an answer.

        Args:
            problems: of each of its calls, from ``check_message``.
            reference_calls: whether the reference answer to the same prompt calls tools.
        """
        self.num_answers += 1
        self.num_calling += bool(problems)
        self.num_calls += len(problems)
        self.num_valid_calls += sum(not one for one in problems)
        found = [{problem.kind for problem in one} for one in problems]
        self.kinds.update(kind for kinds in found for kind in kinds)
        fits = not any(kinds & {"name", "json", "schema"} for kinds in found)
        self.num_fitting += bool(problems) and fits
        if reference_calls:
            self._reference += 1
            self._both += bool(problems)

    @property
    def schema_accuracy(self) -> float | None:
        """Share of the answers with calls whose calls all fit; None without any."""
        return self.num_fitting / self.num_calling if self.num_calling else None

    @property
    def trigger_f1(self) -> float | None:
        """F1 of calling where the reference calls; None where neither ever does."""
        total = self.num_calling + self._reference
        return 2 * self._both / total if total else None


def _validator(name: str, schema: Any) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if not isinstance(schema, Mapping):
        raise ValueError(f"tool {name!r}: parameters are no JSON schema but {schema!r}")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(
            f"tool {name!r}: parameters are no JSON schema: {error.json_path}: {error.message}"
        ) from error
    return kind(schema, registry=Registry())  # an empty registry, which fetches nothing
