"""The package's life: every command's flags are those of the tool that it starts."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from megatron_k2.life.command import default_life
from megatron_k2.life.plan import fill, read_life, words
from megatron_k2.rl.run_file import run_from
from megatron_k2.training.recipes.plan import Run, plan_stages
from megatron_k2.training.recipes.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ROOT / "tests" / "docs" / "flags.py"


def lines() -> list[tuple[str, list[str]]]:
    """Return (stage, words) of every command that is no recipe."""
    life = read_life(default_life())
    found = []
    for stage in life.stages:
        known = life.variables(Path("OUT"), stage, 1) | {"PORT": "8000", "SERVER": "http://x"}
        for command in stage.commands:
            given = [*command.run, *filter(None, [command.serve])]
            found += [(stage.name, words(fill(line, known))) for line in given]
    return found


def filled(template: str, stage: str) -> dict[str, object]:
    life = read_life(default_life())
    known = life.variables(Path("OUT"), life.stages[life.place(stage, "stage")], 1)
    return tomllib.loads(fill((life.path.parent / template).read_text(), known))


def test_the_parsers_take_every_command_of_the_life() -> None:
    recipe = parse_recipe(filled("nano_recipe.toml", "pretrain"))
    run = Run(recipe, plan_stages(recipe), Path("OUT"), {})
    launched = ["torchrun", "--nproc-per-node", "2", "-m", "megatron_k2.training.pretrain"]
    recipes = [(one.stage.name, [*launched, *run.stage_arguments(one)]) for one in run.stages]
    asked = [[name, line, False] for name, line in [*lines(), *recipes]]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FLAGS)],
        input=json.dumps({"commands": asked, "written": []}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert json.loads(done.stdout) == []


def test_all_ways_of_a_large_model_are_in_it() -> None:
    names = [stage.name for stage in read_life(default_life()).stages]
    wanted = (
        "corpus tokenizer rephrase pretrain long-context export synthesize sft rl evaluate serve"
    )
    assert names == wanted.split()


def test_reinforcement_learning_is_verified_and_judged_by_the_policy() -> None:
    run = run_from(filled("nano_rl.toml", "rl"))
    assert [one.name for one in run.environments] == ["reasoning", "open_ranked"]
    assert run.critic.tasks > 0 and run.ptx.data


def test_every_figure_can_fail_and_commands_come_with_the_wheel() -> None:
    for stage in read_life(default_life()).stages:
        assert stage.figures, stage.name
    for name, line in lines():
        module = line[line.index("-m") + 1]
        assert module.startswith("megatron_k2"), (name, line)
