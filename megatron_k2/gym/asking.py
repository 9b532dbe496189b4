"""Questions to a judge, as JSON both ways.

The question's fields go as one JSON object, so that what an answer says cannot pose as the
question, and the answer must be one JSON object and nothing else (a code fence around it is
allowed). What cannot be read is asked for once more; then it is a ``RuntimeError``, which becomes a
verdict of ``error``, never a score.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from megatron_k2.chat.format import Message
from megatron_k2.gym.services import Judge

ASKED, ASKED_AGAIN, UNREADABLE = "asked", "asked again", "unreadable"
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL | re.IGNORECASE)


async def ask_json[T](
    judge: Judge,
    instruction: str,
    fields: dict[str, Any],
    read: Callable[[dict[str, Any]], T],
    seed: int = 0,
    max_tokens: int = 512,
) -> T:
    """Ask a judge and read its answer; what cannot be read is asked for once more.

    Args:
        judge: to ask.
        instruction: what to judge, and the object to answer with.
        fields: what is judged, by name; quoted as JSON.
        read: takes the answer's object.
        seed: of the sampler.
        max_tokens: of an answer.

    Raises:
        TimeoutError: the judge took too long.
        RuntimeError: it gave no answer, or none that can be read.
    """
    known = getattr(judge, "counts", None)
    counts: Counter[str] = Counter() if known is None else known
    messages: list[Message] = [
        {"role": "system", "content": instruction},
        {"role": "user", "content": json.dumps(fields, ensure_ascii=False)},
    ]
    counts[ASKED] += 1
    text = await judge.ask(messages, seed, max_tokens)
    try:
        return read(strict_object(text))
    except ValueError as error:
        counts[ASKED_AGAIN] += 1
        again = f"That cannot be read ({error}). Answer with the JSON object alone."
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": again}]
    text = await judge.ask(messages, seed + 1, max_tokens)
    try:
        return read(strict_object(text))
    except ValueError as error:
        counts[UNREADABLE] += 1
        raise RuntimeError(
            f"judge {judge.model} gave no judgement ({error}): {text[:120]!r}"
        ) from error


def strict_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text is, alone or in one code fence.

    Raises:
        ValueError: it is none; an object twice named, a number that is none, other text around it.
    """
    stripped = text.strip()
    fenced = _FENCE.match(stripped)
    try:
        value = json.loads(
            fenced[1] if fenced else stripped,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise ValueError("brackets without end") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def field_of[T](value: dict[str, Any], name: str, kind: type[T]) -> T:
    """Return a field of a judge's answer.

    Raises:
        ValueError: it is missing or of another type.
    """
    found = value.get(name)
    if not isinstance(found, kind) or (kind is not bool and isinstance(found, bool)):
        raise ValueError(f"{name} is no {kind.__name__}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
