"""What an RL run reads is read before a model is built: what is wrong is named at once."""

from __future__ import annotations

import asyncio
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_k2.gym.judging import EngineJudge
from megatron_k2.inputs import UsageError
from megatron_k2.rl.colocated import engine_limits
from megatron_k2.rl.rollout.repetition import Repetition
from megatron_k2.rl.run_file import run_from
from megatron_k2.rl.run_play import Rollout
from megatron_k2.rl.services import ServicePlan
from megatron_k2.training.rl import check_run
from megatron_k2.training.rl_inputs import Inputs, read_inputs
from megatron_k2.training.rl_players import digest, rollout_settings
from tests.unit.chat.kimi_files import write_tokenizer
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine

HASHED = "tests.distributed.rl_environment:Hashed"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("kimi"))


def read(tokenizer: Path, environments: str, more: str = "", **flags: Any) -> Inputs:
    """Read the inputs of a run; there is no model, nor anything distributed."""
    run = run_from(tomllib.loads(f"[run]\nsteps = 2\n{environments}\n{more}"))
    given = dict(
        *(),
        tokenizer_model=str(tokenizer),
        seq_length=64,
        k2_rl_judge_url="",
        k2_rl_judge_model="",
        k2_rl_sandbox_url="",
    )
    return read_inputs(run, SimpleNamespace(**given | flags))


def source(name: str, more: str = "") -> str:
    return f'[[environments]]\nname = "{name}"\n{more}'


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (source("mathematic"), r"\[\[environments\]\] 'mathematic' name: .* none of .*mathematics"),
        (source(HASHED, "options = {fil = 1}"), r"options: 'fil' is none of \(none\)"),
        (source("instructions", 'options = {files = "x"}'), "options: 'files' is none of file"),
        (source("instructions", 'options = {file = "/no/such.jsonl"}'), "options: .*no/such.jsonl"),
        (source(HASHED, 'tasks = "/no/such.jsonl"'), "tasks /no/such.jsonl"),
        (source("faithfulness"), "'faithfulness' needs a judge: .*--k2-rl-judge-url"),
        (source(HASHED) + '[ptx]\ndata = "/no/such"', r"\[ptx\] data /no/such"),
        (source(HASHED) + '[critic]\nwatch = "/no/such"', r"\[critic\] watch /no/such"),
        (source(HASHED) + '[critic]\nprompt = "short"', r"\[critic\] .*short"),
    ],
)
def test_what_is_not_there_is_named_before_a_model_is_built(
    tokenizer: Path, text: str, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        read(tokenizer, text)


def test_a_file_of_several_environments_gives_each_its_own(tokenizer: Path, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "go"}]
    rows = [{"id": str(n), "env": env, "messages": asked} for n, env in enumerate((HASHED, "sums"))]
    kept = lines(tmp_path / "kept.jsonl", *rows)
    found = read(tokenizer, source(HASHED, f'tasks = "{kept}"\nsystem = "s"'))
    (prompts,) = found.prompts
    assert [task.id for task in prompts.tasks] == ["0"]
    assert [one["role"] for one in prompts.tasks[0].messages] == ["system", "user"]
    assert found.held_out == () and found.critic_tasks == ()
    with pytest.raises(UsageError, match=r"they are of sums, .*Hashed, none of"):
        read(tokenizer, source("instructions", f'tasks = "{kept}"'))


def test_pairs_of_a_file_are_read_with_their_lines(tokenizer: Path, tmp_path: Path) -> None:
    pair = {"question": "q", "right": "a", "wrong": "b"}
    bad = lines(tmp_path / "bad.jsonl", pair, {"question": "q"})
    rules = f'[critic]\naccuracy_every = 2\naccuracy_pairs = "{bad}"'
    with pytest.raises(UsageError, match=r"accuracy_pairs .*bad.jsonl, line 2"):
        read(tokenizer, source(HASHED) + rules)
    rules = "[critic]\naccuracy_every = 2\naccuracy_tasks = 3"
    assert len(read(tokenizer, source(HASHED) + rules).critic_tasks) == 3


def test_every_key_reaches_the_rollouts() -> None:
    table = """
    [run]
    steps = 2
    [[environments]]
    name = "mathematics"
    budget = 99
    [[environments]]
    name = "coding"
    [rollout]
    budget = 500
    max_turns = 3
    env_timeout_s = 7
    max_failed = 0.2
    max_lag = 2
    too_old = "drop"
    old_latents = true
    [repetition]
    max_period = 5
    min_tokens = 20
    min_repeats = 4
    """
    found = rollout_settings(run_from(tomllib.loads(table)), 1, 2)
    assert (found.budgets, found.max_budget) == ({"mathematics": 99}, 500)
    assert (found.max_turns, found.env_timeout_s, found.max_failed) == (3, 7.0, 0.2)
    assert (found.max_lag, found.too_old, found.copy) == (2, "drop", 1)
    assert found.old_latents
    assert found.repetition == Repetition(5, 20, 4)


@pytest.mark.parametrize("key", ["keeps_pages", "old_latents"])
def test_kept_pages_reach_the_engine_and_are_off_by_themselves(key: str) -> None:
    assert not engine_limits(64, Rollout()).keeps_pages
    found = engine_limits(64, Rollout(max_lag=1, max_running=600, **{key: True}))
    assert found.keeps_pages and found.step_tokens > found.max_running == 600


def test_what_is_only_looked_at_makes_no_other_run() -> None:
    plain = source(HASHED)
    looks = plain + "[critic]\naccuracy_every = 2\n[evaluation]\nevery = 1"
    other = plain + "[repetition]\nmin_tokens = 9"
    runs = [run_from(tomllib.loads(f"[run]\nsteps = 2\n{one}")) for one in (plain, looks, other)]
    assert digest(runs[0]) == digest(runs[1]) != digest(runs[2])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"k2_rl_ray_actors": 2}, r"--k2-rl-ray-actors.*max_lag must be 0"),
        ({"k2_rl_judge_url": "policy"}, r"--k2-rl-judge-url policy.*max_lag must be 0"),
    ],
)
def test_what_needs_whole_batches_says_so(flags: dict[str, Any], named: str) -> None:
    run = run_from(tomllib.loads(f"[run]\nsteps = 2\n{source(HASHED)}[rollout]\nmax_lag = 1"))
    given = {"k2_rl_ray_actors": 0, "k2_rl_judge_url": ""} | flags
    with pytest.raises(UsageError, match=named):
        check_run(SimpleNamespace(**given), run)


def test_the_policy_judges_where_it_is_asked_to(tokenizer: Path) -> None:
    found = read(tokenizer, source("faithfulness"), k2_rl_judge_url="policy")
    engine = ScriptedEngine(script=lambda prompt: [*b'{"a": 1}', 0])
    services = asyncio.run(found.services.make(engine, ByteFormat()))
    judge = services.judge
    assert isinstance(judge, EngineJudge) and judge.model == "policy@7"
    assert asyncio.run(judge.ask([{"role": "user", "content": "?"}], 0)) == '{"a": 1}'
    assert asyncio.run(ServicePlan().make()).judge is None
