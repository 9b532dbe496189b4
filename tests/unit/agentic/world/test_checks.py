"""Types, states and operations that do not fit are refused before any call, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megatron_k2.agentic.world.operation_checks import check_operation
from megatron_k2.agentic.world.types import check_state, check_types
from tests.unit.agentic.world.shop import TOOLS, TYPES, WORLD

PARAMETERS = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "maybe": {"type": "string"},
        "any": {},
        "flag": {"type": "boolean"},
        "many": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["id"],
            },
        },
        "after": {"type": "string"},
    },
    "required": ["id", "n", "x", "any", "flag", "many"],
}
GET = {"do": "get", "entity": "order", "key": "$id"}


def test_the_shop_is_well_typed() -> None:
    assert check_types(TYPES) == []
    assert check_state(TYPES, WORLD) == []
    assert [check_operation(TYPES, tool.operation, tool.parameters) for tool in TOOLS] == (
        [[]] * len(TOOLS)
    )


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("key",), "name_", "'key' must be a field"),
        (("key",), "total", "'key' must be a field"),
        (("prefix",), 3, "no text"),
        (("more",), 3, "unknown 'more'"),
        (("fields", "customer"), {"ref": "nobody"}, "unknown entity 'nobody'"),
        (("fields", "customer"), {"ref": "customer", "minimum": 1}, "is a reference"),
        (("fields", "total"), {"type": "money"}, "has type 'money'"),
        (("fields", "total"), {"type": "integer", "default": "1"}, "must be integer"),
        (("fields", "total"), {"type": "integer", "minimum": 1, "default": 0}, "at least 1"),
        (("fields", "total"), {"type": "integer", "minimum": "0"}, "is no number"),
        (("fields", "tags"), {"type": "array"}, "without 'items'"),
        (("fields", "tags"), {"type": "array", "items": {"type": "array"}}, "without 'items'"),
        (("fields", "status"), {"enum": []}, "no list of values"),
        (("fields", "a b"), {"type": "string"}, "no good name"),
    ],
)
def test_wrong_types_are_refused(path: tuple[str, ...], value: Any, reason: str) -> None:
    types = copy.deepcopy(TYPES)
    place = types["entities"]["order"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert reason in "; ".join(check_types(types))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("customer", "c9", "there is no customer 'c9'"),
        ("total", 51, "at most 50"),
        ("total", True, "not boolean"),
        ("total", 1.5, "not number"),
        ("status", "gone", "must be one of"),
        ("note", 3, "must be null or string"),
        ("tags", ["a", 1], "must be string"),
        ("id", "o7", "its id is 'o7'"),
        ("colour", "red", "its type has not"),
    ],
)
def test_wrong_records_are_refused(field: str, value: Any, reason: str) -> None:
    world = copy.deepcopy(WORLD)
    world["order"]["o1"][field] = value
    assert reason in "; ".join(check_state(TYPES, world))


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        ({"do": "fly"}, "none of get"),
        ({**GET, "entity": "cart"}, "no entity 'cart'"),
        ({**GET, "where": []}, "unknown 'where'"),
        ({"do": "get", "entity": "order"}, "lacks 'key'"),
        ({**GET, "key": "$other"}, "'$other' is no parameter"),
        ({**GET, "key": "$maybe"}, "not required"),
        ({**GET, "key": "$n"}, "may be integer, not string"),
        ({**GET, "key": "$any"}, "without a type"),
        ({"do": "update", "entity": "order", "key": "$id", "set": {"total": "$x"}}, "number"),
        ({"do": "update", "entity": "order", "key": "$id", "set": {"total": 51}}, "at most 50"),
        ({"do": "update", "entity": "order", "key": "$id", "set": {"id": "$id"}}, "never changes"),
        (
            {"do": "update", "entity": "order", "key": "$id", "set": {"note": {"plus": 1}}},
            "always a number",
        ),
        (
            {"do": "update", "entity": "order", "key": "$id", "set": {"tags": {"append": "$n"}}},
            "may be integer",
        ),
        ({"do": "create", "entity": "order", "set": {"total": "$n"}}, "nothing fills 'customer'"),
        (
            {"do": "create", "entity": "order", "set": {"total": "$n", "customer": "$maybe"}},
            "nothing fills 'customer'",
        ),
        (
            {"do": "list", "entity": "order",
             "where": [{"field": "status", "is": "equals", "value": "gone"}]},
            "none of ['open', 'closed']",
        ),
        (
            {"do": "list", "entity": "order",
             "where": [{"field": "status", "is": "equals", "value": "$n"}]},
            "may be integer",
        ),
        (
            {"do": "list", "entity": "order",
             "where": [{"field": "tags", "is": "above", "value": "a"}]},
            "no order",
        ),
        ({"do": "list", "entity": "order", "sort": "tags"}, "without an order"),
        ({"do": "list", "entity": "order", "cursor": "$id"}, "optional parameter"),
        ({"do": "sum", "entity": "order", "field": "status"}, "is no number"),
        ({"do": "batch", "over": "$id", "each": GET}, "an array"),
        ({"do": "batch", "over": "$many", "each": {"do": "batch", "over": "$many", "each": GET}},
         "not of batches"),
        ({"do": "batch", "over": "$many", "each": {**GET, "key": "$item.key"}}, "no property"),
        ({"do": "batch", "over": "$many", "each": {**GET, "key": "$item.n"}}, "not required"),
        ({"do": "steps", "each": [{**GET, "key": "$step.0.id"}]}, "no earlier step"),
        ({"do": "steps", "each": [GET, {**GET, "key": "$step.0.colour"}]}, "no part"),
        ({"do": "steps", "each": [GET, {**GET, "key": "$step.0.total"}]}, "may be integer"),
        (
            {"do": "create", "entity": "order", "set": {"customer": "c1", "total": 1},
             "require": [{"field": "status", "is": "equals", "value": "open"}]},
            "another record",
        ),
        (
            {"do": "create", "entity": "order", "set": {"customer": "c1", "total":
             {"read": "customer", "key": "c1", "field": "credit", "times": "$n"}}},
            "may be number",
        ),
    ],
)  # fmt: skip
def test_wrong_operations_are_refused(operation: Any, reason: str) -> None:
    assert reason in "; ".join(check_operation(TYPES, operation, PARAMETERS))


@pytest.mark.parametrize(
    "operation",
    [
        {"do": "batch", "over": "$many", "each": {**GET, "key": "$item.id"}},
        {"do": "steps", "each": [GET, {"do": "get", "entity": "customer",
                                       "key": "$step.0.customer"}]},
        {"do": "update", "entity": "order", "key": "$id", "set": {"note": "$maybe"}},
        {"do": "update", "entity": "customer", "key": "$id", "set": {"credit":
         {"plus": {"read": "order", "key": "o1", "field": "total", "times": "$x"}}}},
        {"do": "create", "entity": "customer", "set": {"id": "$id", "name": "$$x"},
         "replace": True},
        {"do": "list", "entity": "order", "limit": "$n", "cursor": "$after", "sort": "-total"},
    ],
)  # fmt: skip
def test_right_operations_are_taken(operation: Any) -> None:
    assert check_operation(TYPES, operation, PARAMETERS) == []
