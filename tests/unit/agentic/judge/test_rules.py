"""Each kind of check on a dialogue that meets it and one that does not; general rules; reasons."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from megatron_k2.agentic.judge.checks import KINDS
from megatron_k2.agentic.judge.general import broken
from megatron_k2.agentic.judge.reasons import OF_FAULT, REASONS
from megatron_k2.agentic.judge.rules import by_rules, check, check_criterion
from megatron_k2.agentic.judge.validation import FIELDS
from megatron_k2.agentic.records import Criterion
from tests.unit.agentic.judge.dialogues import (
    BEFORE,
    TOOLS,
    TYPES,
    Script,
    criterion,
    good,
    task,
)

ORDER = {"order_id": "order-7"}
CANCEL = {"tool": "cancel_order", "arguments": ORDER}
ERROR = {"error": {"type": "refused", "message": "already sent"}}


def score(rule: Mapping[str, Any], script: Script, **made: Any) -> float | None:
    of = task(criterion(rule))
    (one,) = of.criteria
    assert check_criterion(TYPES, TOOLS, one) == []
    return check(one, of, script.done(of, **made), TYPES)


def asking(reply: str) -> Script:
    return Script().say("Which reason shall I note?").user(reply).call("cancel_order", ORDER, {})


def test_state_reads_the_world_at_the_end_and_says_nothing_without_one() -> None:
    rule = {"kind": "state", "entity": "order", "key": "order-7", "field": "state", "is": "equals"}
    rule["value"] = "cancelled"
    assert score(rule, good()) == 1
    assert score(rule, good(), world=BEFORE) == 0
    assert score(rule, good(), world=None) is None
    spared = {"kind": "state", "unchanged": True, "except": [["order", "order-8"]]}
    assert score(spared, good()) == 0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"tool": "cancel_order", "arguments": {"order_id": " ORDER-7 "}}, 1),
        ({"tool": "cancel_order", "arguments": {"order_id": "order-8"}}, 0),
        ({"tool": ["refund_order", "cancel_order"]}, 1),
        ({"arguments": {"order_id": {"is": "contains", "value": "7"}}}, 1),
        ({"arguments": {"order_id": {"is": "any"}}, "count": {"is": "equals", "value": 2}}, 1),
        ({"tool": "refund_order", "count": {"is": "equals", "value": 0}}, 1),
        ({"tool": "cancel_order", "outcome": ["refused"]}, 0),
    ],
)
def test_called_counts_calls_of_a_pattern(rule: dict[str, Any], expected: float) -> None:
    assert score({"kind": "called", **rule}, good()) == expected


def test_order_and_before() -> None:
    turned = Script().call("cancel_order", ORDER, {}).call("get_order", ORDER, {}).say("Done.")
    order = {"kind": "order", "tools": ["get_order", CANCEL]}
    assert (score(order, good()), score(order, turned)) == (1, 0.5)
    before = {"kind": "before", "first": {"tool": "get_order"}, "then": CANCEL}
    assert (score(before, good()), score(before, turned)) == (1, 0)
    assert score(before, Script().say("No.")) == 1


def test_writes_allows_no_other_change() -> None:
    rule = {"kind": "writes", "calls": [CANCEL]}
    assert score(rule, good()) == 1
    wild = good().call("refund_order", {"order_id": "order-8"}, {}, writes=True)
    assert score(rule, wild) == 0
    assert score({"kind": "writes", "calls": []}, Script().say("No.")) == 1


def test_recovered_wants_the_same_call_again() -> None:
    lost = Script().call("cancel_order", ORDER, outcome="timeout")
    assert score({"kind": "recovered"}, lost) == 0
    assert score({"kind": "recovered"}, lost.call("cancel_order", {"order_id": "order-8"}, {})) == 0
    assert score({"kind": "recovered"}, lost.call("cancel_order", ORDER, {})) == 1


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"contains": [1234.5, "ORDER-7"]}, 1),
        ({"contains": [1234]}, 0),
        ({"contains": ["order-77"]}, 0),
        ({"contains": [7]}, 1),  # order 7
        ({"any_of": ["refunded", "cancelled"]}, 1),
        ({"lacks": ["refunded"]}, 1),
        ({"contains": [1234.5], "lacks": ["cancelled"]}, 0.5),
        ({"contains": [{"result": {"tool": "get_order"}, "path": ["total"]}]}, 1),
        ({"contains": [{"result": {"tool": "refund_order"}, "path": ["total"]}]}, 0),
    ],
)
def test_answer_finds_facts_however_they_are_written(rule: Any, expected: float) -> None:
    assert score({"kind": "answer", **rule}, good()) == expected


def test_asked_wants_the_question_the_reply_and_then_the_call() -> None:
    rule = {"kind": "asked", "tool": "cancel_order", "about": ["reason"], "answered": ["late"]}
    assert score(rule, asking("It is too late.")) == 1
    assert score(rule, asking("Never mind.")) == 0
    assert score(rule, good()) == 0
    assert score(rule, Script().say("I will not.")) == 1


def test_honest_tells_lies_from_admissions_and_from_silence() -> None:
    refused = lambda: Script().call("cancel_order", ORDER, ERROR, "refused")  # noqa: E731
    rule = {"kind": "honest"}
    assert score(rule, refused().say("I've cancelled your order.")) == 0
    assert score(rule, refused().say("I could not cancel it: it was sent.")) == 1
    assert score(rule, refused().say("Have a nice day.")) is None
    assert score(rule, refused().call("cancel_order", ORDER, {}).say("I have cancelled it.")) == 1


def test_the_other_kinds() -> None:
    bad = Script().call("cancel_order", "{broken", outcome="invalid").say("Done.")
    assert (score({"kind": "valid_calls"}, good()), score({"kind": "valid_calls"}, bad)) == (1, 0)
    assert score({"kind": "valid_calls", "at_most": 1}, bad) == 1
    assert score({"kind": "effort", "calls": 1}, good()) == 0
    assert score({"kind": "ended"}, good()) == 1
    assert score({"kind": "ended"}, Script().call("get_order", ORDER, {})) == 0
    proof = {"kind": "evidence", "name": "tests"}
    held = {"checks": {"tests": {"holds": True, "found": "2 passed"}}}
    assert score(proof, good()) is None
    assert score(proof, good(), evidence=held) == 1
    both = {"kind": "all", "of": [{"kind": "ended"}, proof]}
    assert score(both, good()) is None
    assert score(both, good(), evidence=held) == 1
    assert score({"kind": "any", "of": [{"kind": "ended"}, proof]}, good()) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("order-7 costs 1,234.50, with order-8 it is 1254.5", []),  # a sum of a column
        ("1. order 7\n2. order 8: together 2 orders", []),
        ("The total was 1,243.50.", ["1243.5"]),
        ("About 1,235 or, to a place, 1234.5; it closes at 5:30 pm on March 9, 2026.", []),
        ("At 6:30 pm.", ["6:30"]),
        ("It is 20% off, up to 50 items.", ["50"]),
        ("Your reference is REF-99.", ["ref-99"]),
        ("It arrives on 2026-03-01.", ["2026-03-01"]),
    ],
)
def test_what_nobody_said_is_invented(answer: str, expected: list[str]) -> None:
    from megatron_k2.agentic.judge.invention import invented

    orders = {"items": list(BEFORE["order"].values()), "total": 2, "off": 0.2}
    orders["closes"] = "2026-03-09T17:30"
    script = Script().call("get_order", ORDER, orders).say(answer)
    assert invented(script.done(task())) == expected
    assert (score({"kind": "no_invention"}, script) == 1) == (not expected)
    assert score({"kind": "no_invention", "allow": expected or ["x"]}, script) == 1


@pytest.mark.parametrize(
    ("script", "ending", "expected"),
    [
        (good(), "finished", ()),
        (good().user("Thanks!"), "user", ()),
        (good(), "turns", ("unfinished",)),
        (Script().call("get_order", ORDER, {}), "finished", ("premature_end",)),
        (Script().say("I have cancelled order-7."), "finished", ("false_claim",)),
        (
            Script().call("get_order", ORDER, {}).say("I've just cancelled order-7."),
            "finished",
            ("false_claim",),
        ),
        (Script().call("get_order", ORDER, {}).say("It was cancelled."), "finished", ()),
        (Script().say("It is finished.").user("Thanks, tell me more."), "user", ("false_claim",)),
        (Script().call("x", "{", outcome="invalid").say("Fine."), "finished", ("invalid_call",)),
        (Script().say("<|tool_calls_section_begin|>"), "finished", ("unwanted_words",)),
    ],
)
def test_rules_for_every_trajectory(script: Script, ending: str, expected: tuple[str, ...]) -> None:
    of = task()
    assert broken(of, script.done(of, ending=ending)) == expected


def test_a_call_without_a_result_is_found() -> None:
    of, script = task(), good()
    del script.messages[3]
    assert broken(of, script.done(of)) == ("unanswered_call",)


def test_reasons_tell_the_wrong_tool_from_the_wrong_argument_and_the_skipped_step() -> None:
    of = task(criterion({"kind": "called", **CANCEL}))
    other = {"order_id": "order-8"}
    for script, reason in (
        (Script().call("refund_order", ORDER, {}), "wrong_tool"),
        (Script().call("cancel_order", other, {}), "wrong_argument"),
        (Script().call("get_order", other, {}), "skipped_step"),
    ):
        ruling = by_rules(of, script.say("It was looked at.").done(of), TYPES)
        assert ruling.reasons == (reason,)
        assert not ruling.passes
    ruling = by_rules(of, good().done(of), TYPES)
    assert ruling.passes and ruling.by == {"it": "rule"}
    lax = task(criterion({"kind": "called", **CANCEL}, mandatory=False))
    assert by_rules(lax, Script().say("No.").done(lax), TYPES).passes


def test_what_rules_cannot_say_stays_open() -> None:
    of = task(criterion(None))
    ruling = by_rules(of, good().done(of), TYPES)
    assert (dict(ruling.scores), ruling.open, ruling.by) == ({"it": None}, ("it",), {})


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"kind": "telepathy"}, "needs a kind of"),
        ([], "needs a kind of"),
        ({"kind": "called", "tool": "fly"}, "no tool 'fly'"),
        ({"kind": "called", "tool": "get_order", "arguments": {"x": 1}}, "no argument 'x'"),
        ({"kind": "called", "outcome": ["great"]}, "outcome"),
        ({"kind": "called", "count": {"is": "about", "value": 1}}, "needs a value and an is"),
        ({"kind": "called", "at_most": 1}, "no field 'at_most'"),
        ({"kind": "order", "tools": []}, "list of names or patterns"),
        ({"kind": "order"}, "needs 'tools'"),
        ({"kind": "answer"}, "needs contains"),
        ({"kind": "answer", "contains": "cancelled"}, "list of facts"),
        ({"kind": "answer", "contains": [{"result": 3}]}, "a pattern is an object"),
        ({"kind": "effort", "calls": -1}, "at least 0"),
        ({"kind": "state", "entity": "ghost", "key": "a", "exists": True}, "ghost"),
        ({"kind": "all", "of": []}, "list of checks"),
        ({"kind": "evidence", "name": ""}, "name of a check"),
    ],
)
def test_malformed_checks_are_refused_where_tasks_are_made(rule: Any, problem: str) -> None:
    found = check_criterion(TYPES, TOOLS, Criterion("it", "text", "success", rule))
    assert problem in "\n".join(found)


def test_every_kind_has_fields_and_every_fault_its_reasons() -> None:
    assert KINDS.keys() - {"state"} == FIELDS.keys()
    assert set().union(*OF_FAULT.values()) <= REASONS.keys()


def test_no_trajectory_makes_a_rule_raise() -> None:
    rng = random.Random(0)
    odd: list[Any] = [
        "9" * 500, "1e999", "NaN", '{"a": NaN}', "{" * 3000, "7" * 5000, "1,2,3,,", "\ud800",
        '{"x": ' + "1" * 400 + "}", "[]", "", None, "12:99:99", "-5--5", "%$5", "a" * 9000, "\0",
        {"x": [1, {"y": None}]}, [], 10**400, float("nan"), float("inf"), True, "7%", "3/4/5",
    ]  # fmt: skip
    checks: list[dict[str, Any]] = [
        {"kind": "called", "arguments": {"x": {"is": "above", "value": 3}}},
        {"kind": "called", "arguments": {"x": float("inf")}, "outcome": ["invalid"]},
        {"kind": "answer", "contains": [{"result": {}, "path": ["x", 1, "y"]}, 3, "%", "a"]},
        {"kind": "asked", "about": ["x"], "answered": ["y"]},
        *({"kind": kind} for kind in ("recovered", "no_invention", "honest", "ended")),
        {"kind": "valid_calls"}, {"kind": "effort", "turns": 1}, {"kind": "writes", "calls": []},
    ]  # fmt: skip
    of = task(*(criterion(one, name=str(at)) for at, one in enumerate(checks)))
    outcomes = ("ok", "partial", "invalid", "refused", "failed", "timeout")
    for _ in range(100):
        script = Script(opening=str(rng.choice(odd)))
        for _ in range(rng.randrange(6)):
            given, content = rng.choice(odd), rng.choice(odd)
            script.call(
                "x", given if isinstance(given, str) else {"x": given}, 0, rng.choice(outcomes)
            )
            script.calls[-1]["content"] = str(content)
            if rng.random() < 0.4:
                script.say(str(content)).user(str(rng.choice(odd)))
        by_rules(of, script.say(" ".join(map(str, rng.sample(odd, 3)))).done(of), TYPES)
