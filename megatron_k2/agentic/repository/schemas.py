"""Is a tool fit to be declared to a model: what is wrong with it, as a list of reasons.

A tool of a stranger, or of a model that was asked for one, is data: it may be no JSON Schema, fetch
documents, describe no finite value, blow up when its references are followed, or hold a regular
expression that never ends. Everything that is refused here is refused before any of it is run.
JSON Schema is 2020-12 (``chat/schema.py`` reads it), references are local.

Limits come from the 6,044 schemas of the reachable servers of the Toucan dump: each is above its
99.7th percentile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.repository.references import recursion_problems, subschemas
from megatron_k2.chat.schema import ToolSchemas
from megatron_k2.chat.template import render

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # OpenAI's rule for names of functions
MAX_DESCRIPTION = 8192  # characters
MAX_BYTES = 16_384  # of the schema as JSON
MAX_DEPTH = 24  # of the JSON
MAX_PATTERN = 256  # characters of a regular expression
# A repeated group that repeats inside: time may grow exponentially with the length of a text.
_REPEATED = re.compile(r"\((?:[^()\\]|\\.)*[*+}](?:[^()\\]|\\.)*\)[*+{]")
_MARK = re.compile(r"<\|[a-z_]+\|>")
_NOTHING = {
    "description not available",
    "no description",
    "no description available",
    "none",
    "n/a",
}
_WORDS = ("description", "title", "$comment")
_ANYTHING = ("default", "const")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def reason_kind(reason: str) -> str:
    """Return what reasons are counted by: the word before the colon."""
    return reason.partition(":")[0]


def check_tool(tool: Tool) -> list[str]:
    """Return why a tool cannot be declared, ``kind: words`` each; [] if it can."""
    found = [*_text_problems(tool)]
    wrong = check_parameters(tool.parameters)
    return [*found, *wrong] if found or wrong else _render_problems(tool)


def check_parameters(parameters: Any) -> list[str]:
    """Return why parameters are no schema of arguments; cheap and safe checks come first."""
    if not isinstance(parameters, Mapping):
        return [f"schema: parameters are no object but {type(parameters).__name__}"]
    if is_deeper(parameters, MAX_DEPTH):
        return [f"depth: parameters are nested more than {MAX_DEPTH} deep"]
    try:
        size = len(json.dumps(parameters, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        return [f"json: parameters are no JSON: {error}"]
    if size > MAX_BYTES:
        return [f"size: parameters of {size} bytes; at most {MAX_BYTES}"]
    if parameters.get("type") != "object":
        return ["schema: parameters must have type object"]
    if wrong := _schema_problem(parameters):
        return [f"schema: {wrong}"]
    parts = [*subschemas(schema := dict(parameters))]
    return [
        *recursion_problems(schema, parts),
        *_pattern_problems(parts),
        *_required_problems(schema, parts),
    ]


def is_deeper(value: Any, limit: int) -> bool:
    """Return whether JSON is nested deeper than a limit, without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for one in level
            if isinstance(one, Mapping | list | tuple)
            for child in (one.values() if isinstance(one, Mapping) else one)
        ]
        if not level:
            return False
    return any(isinstance(one, Mapping | list | tuple) for one in level)


def _text_problems(tool: Tool) -> Iterator[str]:
    if not isinstance(tool.name, str) or not NAME.fullmatch(tool.name):
        yield f"name: {tool.name!r:.80} is not 1 to 64 of letters, digits, _ and -"
    if not isinstance(tool.description, str) or _says_nothing(tool.description):
        yield "description: there is none"
    elif len(tool.description) > MAX_DESCRIPTION:
        yield f"description: {len(tool.description)} characters; at most {MAX_DESCRIPTION}"


def _says_nothing(description: str) -> bool:
    return description.strip().rstrip(".").lower() in {"", *_NOTHING}


def _schema_problem(parameters: Mapping[str, Any]) -> str:
    """Return why it is no JSON Schema, "" if it is one; asked once for all schemas of a shape."""
    if _is_schema(json.dumps(_shape(parameters, True), sort_keys=True)):
        return ""
    return _jsonschema_problem(parameters)


@lru_cache(maxsize=16_384)  # reading the metaschema takes 10 ms; a dump has few shapes
def _is_schema(shape: str) -> bool:
    return not _jsonschema_problem(json.loads(shape))


def _jsonschema_problem(parameters: Mapping[str, Any]) -> str:
    if "$schema" in parameters:
        return "$schema: leave it out; 2020-12 is meant"
    try:
        ToolSchemas([{"function": {"name": "tool", "parameters": parameters}}])
    except ValueError as error:
        return str(error).partition("no JSON schema: ")[2] or str(error)
    except RecursionError:
        return "nested too deeply to read"
    return ""


def _shape(value: Any, is_schema: bool) -> Any:
    """Return a schema without what its validity does not depend on: words, names, numbers."""
    if isinstance(value, list):
        return [_shape(one, is_schema) for one in value]
    if not is_schema or not isinstance(value, dict):
        return value
    shape: dict[str, Any] = {}
    for key, inner in value.items():
        if key in _ANYTHING or (key in _WORDS and isinstance(inner, str)):
            continue
        if key == "properties" and isinstance(inner, dict):
            kinds = {json.dumps(_shape(one, True), sort_keys=True) for one in inner.values()}
            shape[key] = {f"p{at}": json.loads(one) for at, one in enumerate(sorted(kinds))}
        elif key == "required" and isinstance(inner, list):
            texts = [one for one in inner if isinstance(one, str)]
            shape[key] = [] if len(inner) == len({*texts}) else inner
        elif key in ("enum", "examples") and isinstance(inner, list):
            shape[key] = []
        elif _is_any_number(key, inner):
            shape[key] = 0
        else:
            shape[key] = _shape(inner, key in ("items", "anyOf", "oneOf", "allOf"))
    return shape


def _is_any_number(key: str, value: Any) -> bool:
    if key in _COUNTS:
        return type(value) is int and value >= 0
    return key in _NUMBERS and type(value) in (int, float)


def _pattern_problems(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for schema in parts:
        texts = [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
        texts += [*(schema.get("patternProperties") or ())]
        for text in texts:
            if len(text) > MAX_PATTERN or _REPEATED.search(text):
                yield f"pattern: {text!r:.80} may take exponential time"
                continue
            try:
                re.compile(text)
            except (re.error, RecursionError, OverflowError) as error:
                yield f"pattern: {text!r:.80}: {error}"


def _required_problems(
    root: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    for schema in parts:
        known = schema.get("properties")
        if known is None and schema is not root:
            continue  # a branch that only demands
        missing = [name for name in schema.get("required") or () if name not in (known or ())]
        if missing:
            yield f"required: {', '.join(map(repr, missing[:5]))} not among the properties"


def _render_problems(tool: Tool) -> list[str]:
    """Return why it cannot stand in a prompt of K2."""
    declaration = json.dumps(tool.declaration, ensure_ascii=False)
    if mark := _MARK.search(declaration):
        return [f"render: spells the control token {mark[0]!r:.40}"]
    try:
        text = render([{"role": "user", "content": ""}], [tool.declaration])
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        return [f"render: {error}"]
    return [] if json.dumps(tool.name) in text else ["render: its name is not in the prompt"]
