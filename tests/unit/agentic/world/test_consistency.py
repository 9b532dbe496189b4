"""Random dialogues with the simulator: nothing is lost, half done, silently wrong, or random."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from megatron_k2.agentic.toolbox import Result
from megatron_k2.agentic.world.faults import FAULTS
from megatron_k2.agentic.world.simulator import Simulator
from megatron_k2.agentic.world.state import State
from megatron_k2.agentic.world.types import check_state, compiled
from tests.unit.agentic.world.shop import DOMAIN, TOOLS, TYPES, WORLD, Shop, random_call

COMPILED = compiled(TYPES)
RATES = {"rate_limit": 0.06, "timeout": 0.06, "transient": 0.06, "empty": 0.06, "partial": 0.3,
         "truncated": 0.3}  # fmt: skip
CHANGING = ("ok", "partial")


def dialogue(
    seed: int, length: int, faults: Mapping[str, Any]
) -> list[tuple[str, Any, Result, State, State]]:
    """Play random calls; return name, arguments, result, the states before and after of each."""
    rng = random.Random(seed)
    simulator = Simulator(TOOLS, DOMAIN, WORLD, faults, seed)
    made = []
    for _ in range(rng.randint(1, length)):
        name, given = random_call(rng)
        before = simulator.state
        result = simulator.call_now(name, given)
        made.append((name, given, result, before, simulator.state))
    return made


def check_call(result: Result, before: State, after: State) -> None:
    """Only what went well changes the world, and the ids of the record say so."""
    assert (result.before, result.after) == (before.id, after.id)
    if result.outcome not in CHANGING:
        assert after is before
        assert result.content == "" or "error" in result.content
    if result.fault in ("rate_limit", "timeout", "transient", "empty"):
        assert result.outcome == ("timeout" if result.fault == "timeout" else "failed")
    if result.outcome == "partial":
        results = json.loads(result.content)["results"]
        assert {one["ok"] for one in results} == {True, False}


def agrees(shop: Shop, name: str, given: Mapping[str, Any], result: Result, after: State) -> None:
    """The simulator did and said what the shop in plain Python does and says."""
    if result.outcome == "invalid":
        return
    outcome, expected = shop.call(name, given)
    assert (outcome, shop.world) == (result.outcome, after.world()), (name, given, result)
    if name == "close":
        assert [one["ok"] for one in json.loads(result.content)["results"]] == expected
    elif outcome == "ok":
        assert json.loads(result.content) == expected
    assert dict(after.counters) == shop.last


def many(first: int, number: int, length: int) -> Counter[str]:
    """Play dialogues, every second one with faults; return how often what happened."""
    seen: Counter[str] = Counter()
    for seed in range(first, first + number):
        faults = {"rates": RATES} if seed % 2 else {}
        shop = Shop()
        made = dialogue(seed, length, faults)
        for name, given, result, before, after in made:
            check_call(result, before, after)
            if not faults:
                agrees(shop, name, given, result, after)
            seen.update((result.outcome, f"{name} {result.outcome}", result.fault))
        last = made[-1][-1]
        assert check_state(COMPILED, last) == []
        assert State.of(COMPILED, last.world()).id == last.id
    return seen


@pytest.mark.parametrize("number", [2_000, pytest.param(10_000, marks=pytest.mark.evidence)])
def test_random_dialogues_do_what_the_shop_in_plain_python_does(number: int) -> None:
    seen = many(0, number, 4)
    assert not {*FAULTS, "ok", "partial", "invalid", "refused", "failed", "timeout"} - set(seen)
    assert not {f"{tool.name} ok" for tool in TOOLS} - set(seen)


@pytest.mark.evidence
def test_long_random_dialogues_do_what_the_shop_in_plain_python_does() -> None:
    many(1_000_000, 5_000, 40)


def test_the_same_seed_gives_the_same_dialogue_and_another_one_others() -> None:
    faults = {"rates": RATES}
    for seed in range(100):
        first, second = (
            [(one[0], repr(one[1]), one[2]) for one in dialogue(seed, 12, faults)] for _ in range(2)
        )
        assert first == second
    calls = [("get", {"id": "o1"})] * 20
    told = set()
    for seed in range(5):
        simulator = Simulator(TOOLS, DOMAIN, WORLD, faults, seed)
        told.add(tuple(simulator.call_now(*call).fault for call in calls))
    assert len(told) == 5


def test_what_was_written_is_read_back() -> None:
    for seed in range(150):
        rng = random.Random(seed)
        simulator = Simulator(TOOLS, DOMAIN, WORLD, {}, seed)
        written: dict[str, Any] = {}
        for _ in range(8):
            name, given = random_call(rng)
            result = simulator.call_now(name, given)
            if name in ("create", "update", "raise", "tag", "untag") and result.outcome == "ok":
                record = json.loads(result.content)
                written[record["id"]] = result.content
            if name in ("close", "delete", "join"):
                written.clear()
        for key, content in written.items():
            assert simulator.call_now("get", {"id": key}).content == content


def test_nobody_can_change_the_world_from_outside() -> None:
    simulator = Simulator(TOOLS, DOMAIN, WORLD, {}, 0)
    before = simulator.state.id
    simulator.world()["order"]["o2"]["tags"].append("mine")
    simulator.world()["order"].clear()
    assert simulator.world() == WORLD
    assert State.of(COMPILED, simulator.world()).id == before
