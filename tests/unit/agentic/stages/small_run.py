"""A run of three small stages on the real engine: numbers, their words, sentences of words.

Every process that does units imports this module, so the scripted model knows its answers there.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from megatron_k2.agentic.model import Question, Refused
from megatron_k2.agentic.models import scripted
from megatron_k2.agentic.models.json_answers import ask_json
from megatron_k2.agentic.repository import scripted as evolving
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.flags import parser
from megatron_k2.agentic.stages.runner import Stage
from megatron_k2.agentic.stages.start import run_stages
from megatron_k2.agentic.stages.work import Work
from megatron_k2.chat.format import Message

NAME = "tests.unit.agentic.stages.small_run"
SLOW_S = 0.01  # of a unit, so that a kill finds the run under way


def answer(question: Question) -> Message:
    """Return a word for a number; now and then nothing that can be read."""
    if "number" not in question.script:  # other tests of this process have the role's own answers
        return evolving.answer(question)
    number = int(question.script["number"])
    if number % 7 == 3 and len(question.messages) == 1:
        return {"role": "assistant", "content": "I think it is " + str(number)}
    if number % 31 == 5:
        return {"role": "assistant", "content": "never JSON"}
    word = hashlib.sha256(f"{number} {question.seed}".encode()).hexdigest()[:8]
    return {"role": "assistant", "content": f'{{"word": "{word}"}}'}


async def word_of(desk: Desk, number: int) -> Any:
    """Do a unit: ask for the word of a number."""
    if desk.args.timeout_s == 1.0:
        time.sleep(SLOW_S)
    text = f"a word for {number}"
    question = Question(
        "evolve", ({"role": "user", "content": text},), seed=number, script={"number": number}
    )
    return await ask_json(desk.model, question, lambda found: found["word"])


async def sentence_of(desk: Desk, place: list[int]) -> Any:
    """Do a unit: a sentence of a word's record."""
    if desk.args.timeout_s == 1.0:
        time.sleep(SLOW_S)
    record = desk.tables.line("tools/words.jsonl", place)
    if record["number"] < 0:
        raise Refused("a negative number")
    return f"{record['number']} is {record['word']} {desk.args.tasks}"


async def words(work: Work) -> None:
    """Make words for ``--evolved-tools`` numbers."""
    numbers = list(range(work.args.evolved_tools))
    found = await work.map("words", f"{NAME}:word_of", numbers)
    records = (
        {"number": number, "word": word}
        for number, word in zip(numbers, found, strict=True)
        if word is not None
    )
    work.write("words.jsonl", records)


async def sentences(work: Work) -> None:
    """Make a sentence of each word."""
    places = work.tables.places("tools/words.jsonl")
    found = await work.map("sentences", f"{NAME}:sentence_of", places)
    work.write("sentences.jsonl", ({"text": text} for text in found))


async def total(work: Work) -> None:
    """Count them, without units."""
    places = work.tables.places("agents/sentences.jsonl")
    work.write("total.jsonl", [{"sentences": len(places), "attempts": work.args.attempts}])


STAGES = (
    Stage("tools", words, settings=("evolved_tools", "seed"), outside=("dump",), roles=("evolve",)),
    Stage("agents", sentences, reads=("tools/words.jsonl",), settings=("tasks",)),
    Stage("tasks", total, reads=("agents/sentences.jsonl",), settings=("attempts",)),
)
scripted.ROLES["evolve"] = f"{NAME}:answer"


def run(*arguments: str) -> list[str]:
    """Run the small stages as the tool would."""
    args = parser().parse_args(
        ["run", "--quiet", "--stages", "tools", "agents", "tasks", *arguments]
    )
    return run_stages(args, STAGES)


def published(out: Path) -> dict[str, bytes]:
    """Return the published files, manifests included."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for stage in ("tools", "agents", "tasks")
        for path in sorted((out / stage).rglob("*"))
        if path.is_file()
    }
