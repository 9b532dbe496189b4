"""Names and parameters of tools, read: which verb, which noun, what each parameter could keep."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.records import Tool

VERBS: dict[str, tuple[str, ...]] = {
    "list": ("list", "search", "find", "query", "browse"),
    "get": ("get", "read", "retrieve", "fetch", "show", "describe", "view", "lookup"),
    "create": ("create", "add", "new", "post", "insert", "register", "schedule", "book", "send",
               "publish", "submit", "save", "make", "log", "open", "write"),
    "update": ("update", "edit", "modify", "set", "change", "rename", "patch", "move", "assign"),
    "delete": ("delete", "remove", "cancel", "clear", "destroy"),
    "count": ("count",),
}  # fmt: skip
_VERB_OF = {word: kind for kind, words in VERBS.items() for word in words}
_FILLERS = {
    "a", "all", "an", "by", "detail", "details", "existing", "for", "from", "id", "in", "info",
    "information", "multiple", "my", "of", "single", "the", "to", "with",
}  # fmt: skip
LIMITS = ("limit", "maxResults", "max_results", "page_size", "pageSize", "per_page", "top_k")
CURSORS = ("cursor", "page_token", "pageToken", "next_cursor", "start_cursor")
QUERIES = ("query", "q", "search", "keyword", "keywords", "text", "search_term")
PAGING = {
    *LIMITS, *CURSORS, *QUERIES, "page", "offset", "sort", "order", "sort_by", "order_by",
    "skip", "start", "count",
}  # fmt: skip
_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_NO_FILTER = re.compile(
    r"(include|show|with|start|end|min|max|from|to|since|until|before|after|days|fields|format)(_|$)"
)  # parameters that say more than that a field is equal
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """A tool's name and parameters, read."""

    tool: Tool
    kind: str
    noun: str
    parameters: Mapping[str, Schema]
    required: frozenset[str]


class Left(ValueError):
    """Why a tool gets no operation."""


def changes_something(name: str) -> bool:
    """Return whether a tool's name says that it writes."""
    return _verb(name_words(name))[0] in ("create", "update", "delete")


def name_words(name: str) -> list[str]:
    """Return the words of a name, lower case."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return [word for word in re.split(r"[^A-Za-z0-9]+", apart.lower()) if word]


def _verb(words: list[str]) -> tuple[str, int]:
    """Return kind and place of the first verb; ("", -1) without one."""
    return next(
        ((_VERB_OF[word], at) for at, word in enumerate(words) if word in _VERB_OF), ("", -1)
    )


def singular(word: str) -> str:
    """Return a noun in the singular, as far as its ending tells."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def read_tool(tool: Tool) -> Reading:
    """Return a tool's name and parameters, read.

    Raises:
        Left: they cannot be.
    """
    words = name_words(tool.name)
    kind, at = _verb(words)
    if not kind:
        raise Left("its name has no known verb")
    after = words[at + 1 :]
    if "by" in after:
        after = after[: after.index("by")]
    nouns = [singular(word) for word in after if word not in _FILLERS]
    nouns = nouns or [singular(word) for word in words[:at] if word not in _FILLERS][-1:]
    noun = "_".join(nouns)
    if not nouns or not _FIELD.fullmatch(noun):
        raise Left("its name has no noun")
    properties = tool.parameters.get("properties") or {}
    parameters = {}
    for name, schema in properties.items():
        if not _FIELD.fullmatch(name):
            raise Left(f"parameter {name!r} has no good name")
        parameters[name] = _field_schema(name, schema)
    required = frozenset(tool.parameters.get("required") or ()) & frozenset(parameters)
    return Reading(tool, kind, noun, parameters, required)


def _field_schema(name: str, schema: Any) -> Schema:
    """Return what a field that keeps this parameter takes."""
    if not isinstance(schema, Mapping):
        raise Left(f"parameter {name!r} has no schema")
    kind = schema.get("type")
    if isinstance(kind, list):
        kinds = [one for one in kind if one != "null"]
        kind = kinds[0] if len(kinds) == 1 else None
    if kind == "array":
        inner = _field_schema(name, schema.get("items"))
        if inner["type"] == "array":
            raise Left(f"parameter {name!r} is nested")
        return {"type": "array", "items": {"type": inner["type"]}}
    if kind not in ("string", "integer", "number", "boolean"):
        raise Left(f"parameter {name!r} is no scalar")
    found: dict[str, Any] = {"type": kind}
    enum = schema.get("enum")
    if kind == "string" and isinstance(enum, list) and enum and all(type(v) is str for v in enum):
        found["enum"] = list(enum)
    return found


def id_parameter(one: Reading) -> str | None:
    """Return the required parameter that is the id of the noun, None without one."""
    last = one.noun.rsplit("_", 1)[-1]
    for name in one.parameters:
        words = name_words(name)
        if name in one.required and words[-1:] in (["id"], ["key"], ["ids"]):
            stem = [singular(word) for word in words[:-1]]
            if words[-1] != "ids" and (not stem or stem[-1] == last):
                return name
    return None


def is_filter(name: str, schema: Schema) -> bool:
    """Return whether a list's parameter can mean that a field is equal to it."""
    text = "_".join(name_words(name))
    return name not in PAGING and schema["type"] != "array" and not _NO_FILTER.match(text)
