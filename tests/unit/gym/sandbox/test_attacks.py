"""Nothing gets out of the sandbox, nothing is left behind, and the host answers meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.gym.sandbox.attacks import ATTEMPTS, MARK, SIEGES
from tests.unit.gym.sandbox.setting import (
    WAYS,
    attempts,
    host,
    kind_or_skip,
    run_and_listen,
    siege,
    tried,
)

# An event loop beside a fork bomb on two cores with a load of 30; a hung host is minutes.
LONGEST_SILENCE_S = 15.0
HEAVY = pytest.mark.evidence


def test_at_least_one_sandbox_works_on_this_machine() -> None:
    outcomes = {way: tried(way) for way in WAYS}
    working = [way for way, kind in outcomes.items() if not isinstance(kind, str)]
    print("sandboxes that hold here:", ", ".join(working))
    assert working, outcomes


def test_the_list_is_long() -> None:
    assert len(ATTEMPTS) + len(SIEGES) >= 40


@pytest.mark.parametrize("way", WAYS)
def test_no_attempt_gets_out(way: str, tmp_path: Path) -> None:
    kind = kind_or_skip(way)
    with host(tmp_path) as target:
        before = target.look()
        result, _ = asyncio.run(run_and_listen(kind, attempts(target, list(ATTEMPTS))))
        assert result.outcome == "exited", result
        assert MARK not in result.stdout and b"all tried" in result.stdout, result
        assert target.look() == before


def cases() -> list[object]:
    """Every siege in every way; only one way of the quick ones is for `make test`."""
    found = []
    for index, (name, one) in enumerate(SIEGES.items()):
        for way in WAYS:
            quick = one.quick and way == WAYS[index % len(WAYS)]
            found.append(pytest.param(name, way, id=f"{name}-{way}", marks=[] if quick else HEAVY))
    return found


@pytest.mark.parametrize(("name", "way"), cases())
def test_a_siege_ends_by_its_limit_and_leaves_nothing(name: str, way: str, tmp_path: Path) -> None:
    kind = kind_or_skip(way)
    with host(tmp_path) as target:
        before = target.look()
        result, silence = asyncio.run(run_and_listen(kind, siege(target, SIEGES[name])))
        assert result.outcome in SIEGES[name].outcomes, result
        assert MARK not in result.stdout
        assert not any(result.files.values())
        assert silence < LONGEST_SILENCE_S
        assert target.look() == before


@HEAVY
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTEMPTS)
def test_each_attempt_alone_does_not_get_out(name: str, way: str, tmp_path: Path) -> None:
    kind = kind_or_skip(way)
    with host(tmp_path) as target:
        before = target.look()
        result, _ = asyncio.run(run_and_listen(kind, attempts(target, [name])))
        assert MARK not in result.stdout, result
        assert target.look() == before
