"""Is a criterion's check one that ``checks.py`` can evaluate, over these tools and this world?

Run where tasks are made, so that a rubric written by a model is dropped there and evaluation never
meets a malformed one. A tool, an argument or a field that does not exist is a problem too: such a
check could never hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_k2.agentic.judge.checks import KINDS
from megatron_k2.agentic.judge.patterns import ANY
from megatron_k2.agentic.records import Criterion, Tool
from megatron_k2.agentic.world.conditions import WORDS as OPERATORS
from megatron_k2.agentic.world.predicates import check_predicate

PATTERN = frozenset({"tool", "arguments", "outcome", "returned"})
FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "called": (frozenset(), PATTERN | {"count"}),
    "order": (frozenset({"tools"}), frozenset()),
    "before": (frozenset({"first", "then"}), frozenset()),
    "writes": (frozenset({"calls"}), frozenset()),
    "recovered": (frozenset(), frozenset()),
    "answer": (frozenset(), frozenset({"contains", "any_of", "lacks", "where"})),
    "asked": (frozenset(), PATTERN | {"about", "answered"}),
    "no_invention": (frozenset(), frozenset({"allow"})),
    "valid_calls": (frozenset(), frozenset({"at_most"})),
    "honest": (frozenset(), frozenset()),
    "ended": (frozenset(), frozenset()),
    "effort": (frozenset(), frozenset({"calls", "turns"})),
    "evidence": (frozenset({"name"}), frozenset()),
    "all": (frozenset({"of"}), frozenset()),
    "any": (frozenset({"of"}), frozenset()),
}
"""Kind -> fields that it needs, and those that it may have."""
Tools = Mapping[str, Tool]


def check_criterion(types: Any, tools: Sequence[Tool], criterion: Criterion) -> list[str]:
    """Return what is wrong with a criterion, a line each; none: rules can evaluate it.

    Args:
        types: of the domain.
        tools: that the agent has.
        criterion: whose ``check`` may be None, which is right.
    """
    found = [] if criterion.name.strip() else ["a criterion needs a name"]
    if not criterion.text.strip():
        found.append(f"criterion {criterion.name!r} needs a text")
    if criterion.kind not in ("success", "pattern", "checkpoint"):
        found.append(f"criterion {criterion.name!r}: kind {criterion.kind!r} is unknown")
    if criterion.check is not None:
        lines = _check(types, {tool.name: tool for tool in tools}, criterion.check)
        found += [f"criterion {criterion.name!r}: {line}" for line in lines]
    return found


def _check(types: Any, tools: Tools, check: Any, depth: int = 0) -> Iterator[str]:
    if not isinstance(check, Mapping) or check.get("kind") not in KINDS:
        yield f"a check needs a kind of {', '.join(KINDS)}, not {check!r}"
        return
    kind = str(check["kind"])
    if kind == "state":
        predicate = {name: value for name, value in check.items() if name != "kind"}
        yield from check_predicate(types, predicate)
        return
    needs, may = FIELDS[kind]
    wrong = [f"{kind} needs {name!r}" for name in sorted(needs - check.keys())]
    unknown = sorted(map(str, check.keys() - needs - may - {"kind"}))
    wrong += [f"{kind} has no field {name!r}" for name in unknown]
    if wrong:
        yield from wrong
    elif kind in ("all", "any"):
        if not _is_list(check["of"]) or not check["of"] or depth > 4:  # deeper is a mistake
            yield f"{kind}: of must be a list of checks, not nested for ever"
        else:
            for one in check["of"]:
                yield from _check(types, tools, one, depth + 1)
    elif kind in _DETAILS:
        yield from _DETAILS[kind](tools, check)


def _pattern(tools: Tools, pattern: Any) -> Iterator[str]:
    if not isinstance(pattern, Mapping):
        yield f"a pattern is an object with {', '.join(sorted(PATTERN))}, not {pattern!r}"
        return
    wanted = pattern.get("tool")
    names = [] if wanted is None else [wanted] if isinstance(wanted, str) else wanted
    if not _is_texts(names):
        yield f"tool {wanted!r} must be a name or a list of names"
        return
    yield from (f"the agent has no tool {name!r}" for name in names if name not in tools)
    arguments = pattern.get("arguments", {})
    if not isinstance(arguments, Mapping):
        yield f"arguments {arguments!r} must be an object"
        return
    for name, value in arguments.items():
        if isinstance(value, Mapping) and "is" in value and value["is"] != "any":
            yield from _condition(value)
        for one in (tools[tool] for tool in names if tool in tools):
            if name not in one.parameters.get("properties", {}):
                yield f"tool {one.name!r} has no argument {name!r}"
    outcomes = pattern.get("outcome", ["ok"])
    if not _is_texts(outcomes) or not outcomes or not set(outcomes) <= set(ANY):
        yield f"outcome {outcomes!r} must be a list of {', '.join(ANY)}"
    returned = pattern.get("returned", [])
    if not _is_list(returned) or not all(isinstance(one, str | int | float) for one in returned):
        yield f"returned {returned!r} must be a list of texts or numbers"


def _called(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    yield from _pattern(tools, check)
    if "count" in check:
        yield from _condition(check["count"])


def _order(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    if not _is_list(check["tools"]) or not check["tools"]:
        yield "order: tools must be a list of names or patterns"
        return
    for one in check["tools"]:
        yield from _pattern(tools, {"tool": one} if isinstance(one, str) else one)


def _before(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    yield from _pattern(tools, check["first"])
    yield from _pattern(tools, check["then"])


def _writes(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    if not _is_list(check["calls"]):
        yield "writes: calls must be a list of patterns"
        return
    for one in check["calls"]:
        yield from _pattern(tools, one)


def _answer(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    if check.get("where", "last") not in ("last", "any"):
        yield f"answer: where {check['where']!r} must be last or any"
    if not any(check.get(name) for name in ("contains", "any_of", "lacks")):
        yield "answer: needs contains, any_of or lacks"
    for name in ("contains", "any_of", "lacks"):
        yield from _facts(tools, name, check.get(name, []))


def _no_invention(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    yield from _facts(tools, "allow", check.get("allow", []))


def _facts(tools: Tools, field: str, facts: Any) -> Iterator[str]:
    if not _is_list(facts):
        yield f"{field} must be a list of facts, not {facts!r}"
        return
    for fact in facts:
        if isinstance(fact, Mapping):
            if set(fact) - {"path"} != {"result"} or not _is_list(fact.get("path", [])):
                yield f"{field}: a fact from a result has result and path, not {fact!r}"
            else:
                yield from _pattern(tools, fact["result"])
        elif not isinstance(fact, int | float) and not (isinstance(fact, str) and fact.strip()):
            yield f"{field}: {fact!r} is no fact"


def _asked(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    yield from _pattern(tools, check)
    for name in ("about", "answered"):
        if not _is_texts(check.get(name, [])):
            yield f"asked: {name} must be a list of words"


def _numbers(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    for name in ("at_most", "calls", "turns"):
        value = check.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield f"{check['kind']}: {name} {value!r} must be a number of at least 0"


def _evidence(tools: Tools, check: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(check["name"], str) or not check["name"]:
        yield f"evidence: name {check['name']!r} must be the name of a check of the real execution"


def _condition(value: Any) -> Iterator[str]:
    if not isinstance(value, Mapping) or "value" not in value or value.get("is") not in OPERATORS:
        yield f"{value!r} needs a value and an is of {', '.join(OPERATORS)}"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_texts(value: Any) -> bool:
    return _is_list(value) and all(isinstance(one, str) and one.strip() for one in value)


_DETAILS: dict[str, Callable[[Tools, Mapping[str, Any]], Iterator[str]]] = {
    "called": _called,
    "order": _order,
    "before": _before,
    "writes": _writes,
    "answer": _answer,
    "no_invention": _no_invention,
    "asked": _asked,
    "valid_calls": _numbers,
    "effort": _numbers,
    "evidence": _evidence,
}
