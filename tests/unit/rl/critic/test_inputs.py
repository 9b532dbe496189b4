"""What a user gives the critic is checked before it is asked: prompts, rubrics, pairs, rules."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gym.base import Task
from megatron_k2.gym.registry import environment
from megatron_k2.rl.critic.bootstrap import pair_rows, preference_rows
from megatron_k2.rl.critic.brief import OURS, Brief, correctness, load_prompt
from megatron_k2.rl.critic.groups import RANKED
from megatron_k2.rl.critic.held_out import read_pairs
from megatron_k2.rl.critic.in_run import check_critic
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.critic.spelled import made_pairs
from megatron_k2.rl.critic.watch import read_comparisons
from megatron_k2.rl.run_critic import CriticRules

OPEN = environment("open_ranked").load("train", 2)
PAIRS = environment("critic_pairs").load("train", 1)
VERIFIED = [Task("1", "sums", ({"role": "user", "content": "1 + 1?"},))]
OWN: dict[str, Any] = {
    **{"name": "own", "version": 2, "system": "", "user": "{comparisons}", "rubric": "{name}"},
    "comparison": "{question}|{first}|{second}",
}


def toml(path: Path, table: dict[str, Any]) -> Path:
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()))
    return path


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_prompt_of_one_s_own_needs_no_work_and_may_have_it(tmp_path: Path) -> None:
    (pair,) = made_pairs(1, "train", random.Random(1))
    for work, line in (({}, pair.right), ({"work": "it is {side}"}, "it is A")):
        brief = correctness(toml(tmp_path / "own.toml", OWN | work))
        row = next(iter(pair_rows([pair], brief, shows_work=True)))
        asked, said = (one["content"] for one in row["messages"])
        assert asked == f"{pair.question}|{pair.right}|{pair.wrong}"
        assert said == f'{line}\n{{"verdicts": ["A"]}}'


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"wrok": "x"}, "wrok is none of name, version, system"),
        ({"comparison": "{question} {first}"}, r"comparison has no \{second\}"),
        ({"user": "Judge!"}, r"user has no \{comparisons\}"),
        ({"work": "{anser}"}, r"work has \{anser\}, which is none of \{answer\}, \{side\}"),
        ({"work": 3}, "work 3 is no text"),
        ({"work": ""}, "work '' is no text"),
        ({"name": ""}, "name '' is no text"),
        ({"version": "1"}, "version '1' is no whole number"),
        ({"version": True}, "version True is no whole number"),
        ({"rubric": None}, "rubric is missing"),
    ],
)
def test_a_prompt_that_cannot_work_is_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    table = {key: value for key, value in (OWN | change).items() if value is not None}
    path = toml(tmp_path / "own.toml", table)
    with pytest.raises(ValueError, match=f"{path}: {named}"):
        load_prompt(path)


def test_names_that_are_not_there_are_told_what_is(tmp_path: Path) -> None:
    for name in ("labellast", "", str(tmp_path)):
        with pytest.raises(ValueError, match=rf"prompt '{name}' is none of {', '.join(OURS)}, and"):
            load_prompt(name)
    with pytest.raises(ValueError, match="rubrics 'cor': none of core, prescriptive, correctness"):
        load_rubrics(("cor",))


@pytest.mark.parametrize("name", ["compact", "label_last"])
def test_a_prompt_without_rubrics_asks_for_one_weighed_rubric_alone(name: str) -> None:
    prompt = load_prompt(name)
    assert correctness(name).rubrics
    for asked in (("core",), ("prescriptive",)):
        with pytest.raises(ValueError, match=rf"prompt {name} has no \{{rubrics\}} and \{{form\}}"):
            Brief(prompt, load_rubrics(asked).rubrics)
    with pytest.raises(ValueError, match="no rubric to judge by"):
        Brief(load_prompt(), ())
    labelled = {"prompt": "p", "chosen": "a", "rejected": "b", "rubrics": {"clarity": "chosen"}}
    two = labelled["rubrics"] | {"engagement": "tie"}  # type: ignore[operator]
    assert len(preference_rows(labelled, prompt, load_rubrics())) == 2
    with pytest.raises(ValueError, match="not for clarity, engagement"):
        preference_rows(labelled | {"rubrics": two}, prompt, load_rubrics())


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"right": None}, "are texts"),
        ({"right": [{"role": "assistant", "content": "a"}]}, "are texts"),
        ({"right": "b"}, "the same text"),
        ({"wrong": " "}, "is empty"),
        ({"more": "x"}, "is no pair"),
    ],
)
def test_pairs_that_nobody_can_win_are_refused(
    tmp_path: Path, row: dict[str, Any], named: str
) -> None:
    pair = {"question": "q", "right": "a", "wrong": "b"}
    path = jsonl(tmp_path / "pairs.jsonl", pair, pair | row)
    with pytest.raises(ValueError, match=f"accuracy_pairs {path}, line 2: .*{named}"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rejected": "a"}, "the same text"),
        ({"rejected": " "}, "rejected: a text"),
        ({"prompt": [{"role": "user"}]}, "prompt: .* with content"),
        ({"prompt": " "}, "prompt: .* with content"),
    ],
)
def test_preferences_that_teach_nothing_are_refused(change: dict[str, Any], named: str) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=named):
        preference_rows(pair | change, load_prompt(), load_rubrics())


def test_what_is_watched_is_text(tmp_path: Path) -> None:
    row = {"question": "q", "first": "a", "second": "b"}
    for change in ({"question": 1}, {"first": None}, {"more": "x"}):
        path = jsonl(tmp_path / "watch.jsonl", row, row | change)
        with pytest.raises(ValueError, match=f"watch {path}, line 2: wanted are the texts"):
            read_comparisons(path)
    path = jsonl(tmp_path / "watch.jsonl")
    with pytest.raises(ValueError, match=f"watch {path}: no comparison in it"):
        read_comparisons(path)


def test_rules_that_do_not_fit_the_run_are_refused(tmp_path: Path) -> None:
    for rules in (CriticRules(tasks=1), CriticRules(accuracy_every=1)):
        check_critic(rules, [*OPEN, *VERIFIED])
        for tasks in (OPEN, PAIRS):
            with pytest.raises(ValueError, match=r"^(tasks|accuracy_every): pairs come from"):
                check_critic(rules, tasks)
    path = jsonl(tmp_path / "p.jsonl", {"question": "q", "right": "a", "wrong": "b"})
    check_critic(CriticRules(accuracy_every=1, accuracy_pairs=path), PAIRS)
    small = CriticRules(prompt="label_last", tasks=1, pairs_per_task=0)
    check_critic(small, VERIFIED)
    with pytest.raises(ValueError, match=r"prompt label_last has no \{rubrics\}"):
        check_critic(small, OPEN)
    sample = jsonl(tmp_path / "w.jsonl", {"question": "q", "first": "a", "second": "b"})
    with pytest.raises(ValueError, match=r"prompt label_last has no \{rubrics\}"):
        check_critic(CriticRules(prompt="label_last", watch=sample), VERIFIED)
    context = tmp_path / "clinic.toml"
    context.write_text(
        'version = 1\n[[rubric]]\nname = "dose"\ntext = "A dose."\ncontexts = ["domain:x"]\n'
    )
    with pytest.raises(ValueError, match=f"no rubric is for task '{OPEN[0].id}'"):
        check_critic(CriticRules(rubrics=(str(context),)), OPEN)
    assert OPEN[0].metadata[RANKED]
    with pytest.raises(ValueError, match="rubrics: one or more"):
        CriticRules(rubrics=())
