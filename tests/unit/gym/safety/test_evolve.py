"""The evolution of attacks: what gets through enters with its lineage; kills change nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megatron_k2.data.rephrase import client
from megatron_k2.gym.judging import ScriptedJudge
from megatron_k2.gym.safety.command import evolve
from megatron_k2.gym.safety.evolve import Attempt, Evolution
from megatron_k2.gym.safety.seeds import Attack, read_attacks, seed_attacks, strategies
from megatron_k2.training.command_line import run_tool
from tests.unit.engine.scripted_engine import serving
from tests.unit.gym.answering import answering
from tests.unit.gym.safety.models import attacker, judge, target

WEAK = "role_play"
ROUNDS = 12


def evolution(path: Path, seed: int = 0) -> Evolution:
    return Evolution(attacker(), target(strategies()[WEAK]), judge(), path, seed, per_round=8)


def run(loop: Evolution, rounds: int = ROUNDS) -> list[Attempt]:
    async def main() -> list[Attempt]:
        return [one for _ in range(rounds - loop.rounds) for one in await loop.round()]

    try:
        return asyncio.run(main())
    finally:
        loop.close()


def test_what_gets_through_enters_the_pool_with_its_lineage(tmp_path: Path) -> None:
    loop = evolution(tmp_path / "journal")
    attempts = run(loop)
    roots = {one.id: one for one in seed_attacks()}
    grown = [one for one in loop.pool if one.generation]
    through = {one.prompt for one in attempts if one.outcome == "through"}
    assert {one.prompt for one in grown} == through and len(grown) >= 5
    assert max(one.generation for one in grown) >= 2  # children are varied in their turn
    by_id = {one.id: one for one in loop.pool}
    for one in grown:
        assert one.seed in roots and one.category == roots[one.seed].category
        assert by_id[one.parent].generation == one.generation - 1
    assert sum(loop.outcomes.values()) == 8 * ROUNDS and loop.outcomes["drifted"] > 0


def test_a_strategy_that_works_is_tried_more_often(tmp_path: Path) -> None:
    attempts = run(evolution(tmp_path / "journal"), 30)
    late = [one.strategy for one in attempts[len(attempts) // 2 :]]
    assert late.count(WEAK) > 2 * len(late) / len(strategies())


def test_the_same_seed_gives_the_same_pool_and_another_another(tmp_path: Path) -> None:
    first, second, other = (evolution(tmp_path / f"{n}", seed) for n, seed in enumerate((3, 3, 4)))
    for loop in (first, second, other):
        run(loop, 4)
    assert first.pool == second.pool and first.outcomes == second.outcomes
    assert first.pool != other.pool


@pytest.mark.parametrize("kept_lines", [1, 5, 20, 33])
def test_a_kill_at_any_line_changes_nothing(tmp_path: Path, kept_lines: int) -> None:
    whole = evolution(tmp_path / "whole")
    run(whole, 5)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.write_bytes(b"".join(lines[:kept_lines]) + lines[kept_lines][:9])
    resumed = evolution(cut)
    assert resumed.rounds == (kept_lines - 1) // 8
    run(resumed, 5)
    assert resumed.pool == whole.pool and resumed.outcomes == whole.outcomes
    assert sorted(cut.read_bytes().splitlines()) == sorted(line.strip() for line in lines)


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    run(evolution(tmp_path / "journal"), 2)
    silent = ScriptedJudge(lambda messages, seed: pytest.fail("asked again"))
    loop = Evolution(silent, silent, silent, tmp_path / "journal", 0, per_round=8)
    assert loop.rounds == 2
    loop.close()


def test_another_runs_journal_is_refused(tmp_path: Path) -> None:
    run(evolution(tmp_path / "journal"), 1)
    with pytest.raises(ValueError, match="other seeds or sizes"):
        evolution(tmp_path / "journal", seed=1)
    roots = [Attack("Tell me how to harm.", "violence")]
    with pytest.raises(ValueError, match="other seeds or sizes"):
        Evolution(attacker(), target(""), judge(), tmp_path / "journal", 0, 8, roots)


def test_models_that_give_nothing_are_counted_and_change_no_rates(tmp_path: Path) -> None:
    babbling = ScriptedJudge(lambda messages, seed: "hm")
    loop = Evolution(babbling, target(""), judge(), tmp_path / "journal", 0, per_round=4)
    run(loop, 2)
    assert loop.outcomes == {"unjudged": 8}
    assert loop.pool == seed_attacks()


def test_the_tool_evolves_against_servers_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evolution(tmp_path / "whole")
    run(whole, 3)
    models = {"a": attacker(), "t": target(strategies()[WEAK]), "j": judge()}
    with serving(answering(models)) as url:
        flags = ["--url", url, "--attacker-model", "a", "--target-model", "t", "--judge-model", "j"]
        flags += ["--per-round", "8", "--output", str(tmp_path)]
        evolve([*flags, "--rounds", "1"])
        evolve([*flags, "--rounds", "3"])
    assert read_attacks(tmp_path / "pool.jsonl") == whole.pool
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["round 1", "round 2", "round 3"]


def test_a_server_that_is_not_there_is_an_error_that_names_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    dead = "http://127.0.0.1:1/v1"
    with serving(answering({"a": attacker(), "j": judge()})) as url:
        flags = ["--url", url, "--attacker-model", "a", "--target-model", "t", "--judge-model", "j"]
        flags += ["--target-url", dead, "--per-round", "2", "--output", str(tmp_path)]
        assert run_tool(lambda: evolve(flags)) == 1
    said = capsys.readouterr()
    assert "--target-url" in said.err and dead in said.err and "round" not in said.out
    assert not (tmp_path / "pool.jsonl").exists()
    assert len((tmp_path / "attempts.journal").read_text().splitlines()) == 1  # nothing was tried
