"""Requests without one right answer: a judge and a reference, or ranks within the group."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import pytest

from megatron_k2.gym.base import Answer
from megatron_k2.gym.judging import ScriptedJudge
from megatron_k2.gym.registry import environment
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import validate
from megatron_k2.rl.critic.brief import Brief, load_prompt
from megatron_k2.rl.critic.groups import judge_ranked
from megatron_k2.rl.critic.planted_ranks import misranked
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.critic.verdicts import PairVerdict
from tests.unit.rl.critic.critic_setting import group, prefers

BRIEF = Brief(load_prompt(), load_rubrics().rubrics)


def likes_sentences(messages, seed) -> str:
    """Prefer what has punctuation and grammar, as a judge would to words in a row."""
    text = messages[-1]["content"]
    first, second = re.findall(r"<[AB]-\w+>\n(.*?)\n</[AB]-", text, re.DOTALL)
    worth = [min(1, one.count(".") + one.count(",")) for one in (first, second)]
    side = "tie" if worth[0] == worth[1] else "A" if worth[0] > worth[1] else "B"
    weighed = {one.name: side for one in BRIEF.rubrics if not one.mandatory}
    failed = {one.name: (False, False) for one in BRIEF.rubrics if one.mandatory}
    return BRIEF.write([PairVerdict(side, weighed, failed)])


def test_gold_scores_1_and_empty_and_words_0() -> None:
    kind = environment("open_prompts")
    tasks = [*kind.load("train"), *kind.load("test")]
    assert len(tasks) == 16 and len({one.id for one in tasks}) == 16 and kind.load("test")
    services = Services(judge=ScriptedJudge(likes_sentences))
    report = asyncio.run(validate(kind, tasks, services))
    for wrong in ("empty", "words", "digits"):
        assert report.tallies[wrong].mean == 0.0, wrong
    assert report.tallies["gold"].mean == 1.0  # another's reference is no wrong answer to a script


def test_planted_answers_to_ranked_requests_are_ranked_as_planted() -> None:
    kind = environment("open_ranked")
    tasks = [*kind.load("train"), *kind.load("test")]
    report = asyncio.run(validate(kind, tasks, Services()))
    assert report.failures == [] and "no gold" in report.line() and len(tasks) == 16
    without = Brief(load_prompt(), load_rubrics(("core",)).rubrics)  # nothing forbids praise
    found = asyncio.run(misranked(tasks, without))
    assert len(found) == 16 and "half of it 0, that half with praise 0.5" in found[0]
    bare = replace(tasks[0], metadata={"reference": "Hm."})
    (said,) = asyncio.run(validate(kind, [bare], Services())).failures
    assert "nothing can be planted" in said


def test_an_unreadable_judge_is_an_error_never_a_zero() -> None:
    kind = environment("open_prompts")
    env = kind(Services(judge=ScriptedJudge(lambda messages, seed: "hm")))
    with pytest.raises(RuntimeError, match="neither verdict"):
        asyncio.run(env.verify(kind.load("train", 1)[0], Answer("Something.")))


def test_ranked_groups_get_ranks_and_others_keep_their_verdicts() -> None:
    answers = [("1", 0.0), ("2", 0.0), ("3", 0.0)]
    groups = [group(answers, "a", metadata={"ranked": True}), group(answers, "b")]
    book = load_rubrics(("correctness",))
    better = prefers(lambda a, b: a > b)
    counts = asyncio.run(judge_ranked(groups, better, load_prompt(), book, 1))
    assert [one.score for one in groups[0].episodes] == [0.0, 0.5, 1.0]
    assert [one.score for one in groups[1].episodes] == [0.0, 0.0, 0.0] and counts.asked == 6
    said = [one.verdict.detail for one in groups[0].episodes]
    assert said[0] == "points 0.000; worse than 1, 2"
    assert said[1] == "points 0.500; better than 0; worse than 2"


def test_requests_come_from_a_file_too(tmp_path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(
        json.dumps({"prompt": "Hm?", "reference": "Hm.", "tags": ["domain:x"]}) + "\n{}"
    )
    with pytest.raises(ValueError, match=r"line 2: prompt"):
        environment("open_prompts").load("train", file=str(path))
    path.write_text(path.read_text().splitlines()[0])
    kind = environment("open_ranked")
    both = [*kind.load("train", file=str(path)), *kind.load("test", file=str(path))]
    assert [one.metadata["reference"] for one in both] == ["Hm."]
