"""Faithfulness: a claim at a time, and no reward for saying nothing or something else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_k2.chat.format import Message
from megatron_k2.gym.base import Answer, Task, Verdict
from megatron_k2.gym.faithfulness import Faithfulness, split_sentences
from megatron_k2.gym.judging import ScriptedJudge
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import validate

DENIES = ("does not say", "does not name")
STOP = {"the", "a", "an", "of", "in", "is", "it", "was", "and", "to", "for", "its", "so", "i"}


def words(text: str) -> set[str]:
    return {word.strip(".,'?").lower() for word in text.split()} - STOP


def by_shared_words(messages: Sequence[Message], seed: int) -> str:
    """A rule, no model: sentences whose words the text has, answers that share the question's."""
    fields = json.loads(messages[1]["content"])
    if "sentence" in fields:
        said = fields["sentence"]
        if any(mark in said for mark in DENIES):
            return '{"label": "no_claim"}'
        of_its_own = words(said) - words(fields["text"]) - {"no", "yes", "they", "may", "since"}
        label = "supported" if len(of_its_own) <= len(words(said)) // 2 else "unsupported"
        return json.dumps({"label": label})
    matter = {word[:4] for word in words(fields["answer"])} - {"text", "does"}
    asked = {word[:4] for word in words(fields["question"])} - {"many", "whic"}
    about = "say that" in fields["answer"] or bool(matter & asked)
    declines = about and any(mark in fields["answer"] for mark in DENIES)
    return json.dumps(
        {"answers": not any(m in fields["answer"] for m in DENIES), "declines": declines}
    )


def judge() -> ScriptedJudge:
    return ScriptedJudge(by_shared_words, "shared words, no model")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [*Faithfulness.load("train"), *Faithfulness.load("test")]


def verdict(task: Task, text: str) -> Verdict:
    env = Faithfulness(Services(judge=judge()))
    return asyncio.run(env.verify(task, Answer(text)))


def test_gold_scores_one_and_wrong_answers_nothing_over_all_tasks(tasks: list[Task]) -> None:
    report = asyncio.run(validate(Faithfulness, tasks, Services(judge=judge())))
    assert report.failures == []
    assert report.num_tasks == 30


def test_the_score_is_the_share_of_supported_claims(tasks: list[Task]) -> None:
    task = next(one for one in tasks if "lichens" in str(one.metadata["context"]))
    said = "Her herbarium has 6,300 specimens. Parrots sang operas nightly everywhere."
    found = verdict(task, said)
    assert (found.score, found.status) == (0.5, "wrong")
    assert "Parrots" in found.detail
    assert found.backend == "shared words, no model"


def test_an_answer_without_claims_scores_only_where_the_text_has_no_answer(
    tasks: list[Task],
) -> None:
    says_nothing = "The text does not say that."
    for task in tasks:
        assert verdict(task, says_nothing).score == float(task.metadata["refusal"])


def test_copying_the_text_does_not_answer_a_question() -> None:
    task = Faithfulness.load("train")[0]

    def off_topic(messages: Sequence[Message], seed: int) -> str:
        is_sentence = "sentence" in json.loads(messages[1]["content"])
        label, whole = '{"label": "supported"}', '{"answers": false, "declines": false}'
        return label if is_sentence else whole

    env = Faithfulness(Services(judge=ScriptedJudge(off_topic)))
    found = asyncio.run(env.verify(task, Answer(str(task.metadata["context"]))))
    assert found.score == 0 and found.components["supported"] == 1


def test_an_unreadable_judge_is_an_error_and_no_score() -> None:
    async def main() -> Verdict:
        unreadable = ScriptedJudge(lambda messages, seed: '{"label": "maybe"}')
        env = Faithfulness(Services(judge=unreadable))
        task = Faithfulness.load("train")[0]
        await env.reset(task, 0)
        step = await env.step(env.gold(task)[0])
        assert step.verdict is not None
        return step.verdict

    found = asyncio.run(main())
    assert (found.status, found.score) == ("error", None)


def test_without_a_judge_it_is_refused() -> None:
    with pytest.raises(ValueError, match="judge"):
        Faithfulness(Services())


def test_each_sentence_is_asked_about_once() -> None:
    asked = []

    def answer(messages: Sequence[Message], seed: int) -> str:
        asked.append(json.loads(messages[1]["content"]).get("sentence"))
        return by_shared_words(messages, seed)

    env = Faithfulness(Services(judge=ScriptedJudge(answer)))
    text = "It has nine arches. Dr. Abel saw 3.5 of them!"
    asyncio.run(env.verify(Faithfulness.load("train")[0], Answer(text)))
    assert sorted(one for one in asked if one) == sorted(split_sentences(text))
    assert len(split_sentences(text)) == 2


def test_tasks_of_a_file_are_split_by_their_text(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    rows = [
        {"context": f"Room {n} is blue.", "question": "Which?", "gold": f"Room {n}."}
        for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    train = Faithfulness.load("train", file=str(path))
    test = Faithfulness.load("test", file=str(path))
    assert len(train) + len(test) == 40 and len(test) > 0
    path.write_text('{"context": "x"}')
    with pytest.raises(ValueError, match=r"row 1: lacks question, gold"):
        Faithfulness.load("train", file=str(path))
