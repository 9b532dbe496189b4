"""The agent of a script: follows a plan, asks, tries again, reports; or errs as it is told."""

from __future__ import annotations

import json
import random
from typing import Any

from megatron_k2.agentic.model import Question
from megatron_k2.agentic.tasks.references import resolve_words
from megatron_k2.agentic.tasks.settings import derived_seed
from megatron_k2.agentic.trajectories.mistakes import mistaken, solution_of
from megatron_k2.agentic.trajectories.part import Part
from megatron_k2.agentic.trajectories.progress import Progress
from megatron_k2.chat.format import Message

TOGETHER_SHARE = 0.4  # of dialogues in which calls that do not depend on each other go together
FREE_FORMS = ("several", "chain")  # whose calls need not wait for each other
SPOKEN_SHARE = 0.3  # of messages with calls that also have words
LEADS = (
    "Let me look that up.",
    "One moment, I will check.",
    "I will do that now.",
    "Let me take care of it.",
    "I am on it.",
)
STUCK = "I am sorry, I could not finish this: the service fails again and again. Please try later."
NOTHING_MORE = "I have nothing to add to that."


def answer(question: Question) -> Message:
    """Return the agent's next message, from the dialogue so far."""
    part: Part = question.script["part"]
    solution = mistaken(part, question.script["mistake"] or "correct") or solution_of(part)
    progress = Progress(solution)
    progress.read(question.messages[len(part.messages) :])
    waiting = solution.exchanges[progress.num_said :]
    todo = progress.todo()
    place = todo[0] if todo else len(solution.plan)
    if progress.is_stuck:
        return _text(STUCK)
    if waiting and waiting[0]["before"] <= place:
        return _text(str(waiting[0]["agent"]))
    if todo:
        return _calls(part, progress, random.Random(question.seed))
    if progress.num_said > len(solution.exchanges):
        return _text(NOTHING_MORE)
    return _text(_last_words(progress))


def _calls(part: Part, progress: Progress, rng: random.Random) -> Message:
    """Return a message that makes the next call, or several at once."""
    style = random.Random(derived_seed(part.seed, "together"))
    may = part.task.origin.get("form") in FREE_FORMS and style.random() < TOGETHER_SHARE
    steps = progress.together() if may else progress.todo()[:1]
    if any(at in progress.tries for at in steps):
        steps = steps[:1]
    calls: list[dict[str, Any]] = []
    for at in steps:
        name, arguments = progress.call(at)
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{at}", "type": "function", "function": function})
    words = rng.choice(LEADS) if rng.random() < SPOKEN_SHARE else ""
    return {"role": "assistant", "content": words, "tool_calls": calls}


def _last_words(progress: Progress) -> str:
    """Return the last answer; what no result tells is left out."""
    known = [progress.results.get(at) for at in range(len(progress.solution.plan))]
    sentences = []
    for one in progress.solution.answer.split(". "):
        try:
            sentences.append(resolve_words(one, known))
        except ValueError:
            continue
    said = ". ".join(sentences).strip()
    return said if said else "I am done with it."


def _text(words: str) -> Message:
    return {"role": "assistant", "content": words}
