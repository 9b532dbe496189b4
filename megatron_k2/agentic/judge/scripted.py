"""The scripted judge: reads words, understands nothing, and errs on purpose by its seed.

It looks for the numbers, ids and quoted words of a criterion in what was said and called, for
numbers that only the last answer has, and for success told after an error. Then it flips some
verdicts, is unsure of some, and misquotes some, so that agreement, voiding and asking again have
something to do. It proves plumbing; its precision and recall say nothing of a model's.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.judge import words
from megatron_k2.agentic.model import Question
from megatron_k2.agentic.records import content_id
from megatron_k2.chat.format import Message

FLIPPED, UNCLEAR, MISQUOTED, CHATTY = 0.05, 0.03, 0.04, 0.02
"""Shares of verdicts wrong on purpose, undecided, quoted from nowhere; of answers in prose."""
_NAMED = re.compile(r"`([^`]+)`|\"([^\"]+)\"|\b([a-z]+(?:_[a-z0-9]+)+)\b")
_FORBIDS = re.compile(r"\b(?:not|never|no|off limits|forbidden)\b", re.IGNORECASE)


def answer(question: Question) -> Message:
    """Return verdicts on the criteria of a question; a pure function of messages and seed."""
    asked = json.loads(str(question.messages[1]["content"]))
    lines = json.loads(asked["dialogue"])
    first_time = len(question.messages) == 2
    rng = random.Random(content_id([question.kind, question.seed, asked["dialogue"]]))
    if first_time and rng.random() < CHATTY:
        return {"role": "assistant", "content": "Here is what I think: it looks fine."}
    given = []
    for one in asked["criteria"]:
        holds, place = read(str(one["text"]), lines)
        draw = rng.random()
        if draw < FLIPPED:
            holds = not holds
        word = "unclear" if draw > 1 - UNCLEAR else "yes" if holds else "no"
        quote = _quote(place)
        if first_time and rng.random() < MISQUOTED:
            quote = f"as they said, {quote[::-1]}"
        why = "the words of the criterion are there" if holds else "something speaks against it"
        given.append({"criterion": one["criterion"], "why": why, "quote": quote, "holds": word})
    return {"role": "assistant", "content": json.dumps({"verdicts": given}, ensure_ascii=False)}


def read(text: str, lines: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """Return whether a criterion seems to hold, and a text to quote from.

    Args:
        text: of the criterion.
        lines: of the dialogue, as ``transcript.transcript`` has them.
    """
    said = [line for line in lines if line.get("role") == "assistant"]
    last = next((str(one["content"]) for one in reversed(said) if one.get("content")), "")
    done = [str(call) for one in said for call in one.get("calls", ())]
    results = [str(one.get("content", "")) for one in lines if one.get("role") == "tool"]
    others = [str(one.get("content", "")) for one in lines if one.get("role") in ("user", "system")]
    place = last or next((str(one["content"]) for one in lines if one.get("content")), "")
    if not last or not said or said[-1].get("calls"):
        return False, place
    known = words.read("\n".join([*results, *others]))
    told = words.read(last, list_marks=False)
    if told.ids - known.ids or len(told.numbers - known.numbers) > 1:
        return False, place
    if results and '"error"' in results[-1] and words.claims_done(last) and not words.admits(last):
        return False, place
    wanted = {part for found in _NAMED.findall(text) for part in found if part}
    if _FORBIDS.search(text):
        called = {str(call.get("tool")) for one in said for call in one.get("calls", ())}
        return not wanted & called, place
    wanted |= words.read(text).ids
    seen = "\n".join([*(str(one.get("content", "")) for one in said), *done, *results]).casefold()
    missing = sum(one.casefold() not in seen for one in wanted)
    return 2 * missing <= len(wanted), place


def _quote(place: str) -> str:
    """Return the beginning of a text, whole words."""
    return " ".join(place.split()[:12])[:200] if len(place) > 80 else place
