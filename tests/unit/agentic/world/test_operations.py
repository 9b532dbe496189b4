"""What the random dialogues do not say aloud: words of refusals, pages, values, predicates."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_k2.agentic.world.operations import Applied, apply
from megatron_k2.agentic.world.predicates import changed, check_predicate, holds
from megatron_k2.agentic.world.state import State
from tests.unit.agentic.world.shop import TYPES, WORLD

START = State.of(TYPES, WORLD)


def done(operation: Any, **arguments: Any) -> Applied:
    """Apply to the shop as it is at first."""
    return apply(TYPES, START, operation, arguments)


def test_a_refusal_says_why_in_the_operations_own_words_if_it_has_them() -> None:
    condition = {"field": "status", "is": "equals", "value": "open"}
    update = {"do": "update", "entity": "order", "key": "$id", "set": {}, "require": [condition]}
    assert done(update, id="o2").detail == "status must be 'open'; it is 'closed'"
    update["require"] = [{**condition, "else": "too late"}]
    assert done(update, id="o2").detail == "too late"
    assert done(update, id="o9").detail == "there is no order with id 'o9'"
    assert done({"do": "delete", "entity": "customer", "key": "c1"}).detail == (
        "customer 'c1' is needed by order 'o1'"
    )


def test_pages_of_a_list_follow_each_other_and_miss_nothing() -> None:
    operation = {"do": "list", "entity": "customer", "sort": "-credit", "cursor": "$after",
                 "limit": 2}  # fmt: skip
    first = done(operation).result
    second = done(operation, after=first["next"]).result
    assert [one["id"] for one in first["items"] + second["items"]] == ["c1", "c3", "c2"]
    assert "next" not in second and first["total"] == second["total"] == 3
    assert done(operation, after="c9").outcome == "refused"


def test_a_value_may_be_read_from_another_record() -> None:
    price = {"read": "customer", "key": "$who", "field": "credit", "times": "$n"}
    operation = {"do": "update", "entity": "customer", "key": "c3", "set": {"credit": price}}
    assert done(operation, who="c2", n=3).result["credit"] == 1.5
    assert done(operation, who="c9", n=3).outcome == "refused"


def test_steps_are_all_or_none() -> None:
    steps = {"do": "steps", "each": [
        {"do": "update", "entity": "order", "key": "o1", "set": {"total": 1}},
        {"do": "update", "entity": "order", "key": "o2", "set": {"total": {"minus": 10}}},
    ]}  # fmt: skip
    found = done(steps)
    assert found.outcome == "refused" and found.state is START


def test_a_key_is_never_used_again() -> None:
    create = {"do": "create", "entity": "order", "set": {"customer": "c1", "total": 1}}
    first = done(create)
    gone = apply(TYPES, first.state, {"do": "delete", "entity": "order", "key": "o3"}, {})
    assert gone.state.id == START.id
    assert apply(TYPES, gone.state, create, {}).result["id"] == "o4"


def test_a_chosen_key_is_refused_when_it_is_taken_unless_it_replaces() -> None:
    create = {"do": "create", "entity": "customer", "set": {"id": "$id", "name": "Di"}}
    assert done(create, id="c1").outcome == "refused"
    assert done(create, id="c40").result == {"id": "c40", "name": "Di", "credit": 0}
    found = done({**create, "replace": True}, id="c1")
    assert found.result["name"] == "Di" and len(found.state["customer"]) == 3


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        ({"entity": "order", "key": "o1", "field": "total", "is": "equals", "value": 7}, True),
        ({"entity": "order", "key": "o1", "field": "total", "is": "equals", "value": 7.0}, True),
        ({"entity": "order", "key": "o1", "field": "total", "is": "at_most", "value": 6}, False),
        ({"entity": "order", "key": "o9", "field": "total", "is": "not", "value": 6}, False),
        ({"entity": "order", "key": "o1", "field": "tags", "is": "contains", "value": "a"}, False),
        ({"entity": "order", "key": "o2", "exists": False}, True),
        ({"entity": "order", "where": [], "count": {"is": "equals", "value": 1}}, True),
        ({"unchanged": True}, False),
        ({"unchanged": False}, True),
        ({"unchanged": True, "except": [["order", "o1"]]}, False),
        ({"unchanged": True, "except": [["order", "o1"], ["order", "o2"]]}, True),
        ({"unchanged": True, "except": [["order", "*"]]}, True),
        ({"not": {"unchanged": True}}, True),
        ({"any": [{"unchanged": True}, {"entity": "order", "key": "o1", "exists": True}]}, True),
        ({"all": [{"unchanged": True}, {"entity": "order", "key": "o1", "exists": True}]}, False),
    ],
)
def test_predicates_judge_the_state_at_the_end(predicate: Any, expected: bool) -> None:
    after = {**WORLD, "order": {"o1": {**WORLD["order"]["o1"], "total": 7}}}
    assert check_predicate(TYPES, predicate) == []
    assert holds(predicate, WORLD, after) is expected
    assert holds(predicate, START, State.of(TYPES, after)) is expected
    assert changed(WORLD, after) == [("order", "o1"), ("order", "o2")]


@pytest.mark.parametrize(
    ("predicate", "reason"),
    [
        ([], "an object"),
        ({"entity": "cart", "key": "x", "exists": True}, "no entity 'cart'"),
        ({"entity": "order", "exists": True}, "'key' is no text"),
        ({"entity": "order", "key": "o1", "field": "size", "is": "equals", "value": 1}, "no field"),
        ({"entity": "order", "key": "o1", "field": "total", "is": "like", "value": 1}, "none of"),
        ({"entity": "order", "key": "o1", "field": "total", "is": "equals", "value": "1"}, "is no"),
        ({"entity": "order", "key": "o1"}, "has 'field'"),
        ({"entity": "order", "count": {"is": "equals", "value": "1"}}, "'count' has"),
        ({"unchanged": True, "except": [["order"]]}, "no [ENTITY, KEY]"),
        ({"all": []}, "a list of predicates"),
    ],
)
def test_wrong_predicates_are_refused(predicate: Any, reason: str) -> None:
    assert reason in "; ".join(check_predicate(TYPES, predicate))
