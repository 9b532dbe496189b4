"""What makes an answer unusable before its facts are looked at.

Cut off, empty, refused, in the wrong language, prompt text in it, endless repetition, repeating
what was rewritten before, far too short or long, a copy of the source. Each is a verdict of its own
name, so that reports can count them. The thresholds are our own; each says what they come from.
"""

# ruff: noqa: RUF001 - punctuation of other languages
from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_k2.data.rephrase.languages import detect, is_han, words
from megatron_k2.data.rephrase.verdict import Verdict

LEAK_WORDS = 7  # of the prompt in a row; 5 or 6 occur by chance in lectures and dialogues
LEAK_SIGNS = 12  # the same for text without spaces
LOOP_TIMES = 4  # a phrase three times in a row occurs in verse and speeches
LOOP_CHARS = 48  # that a loop takes at least in all: "ha ha ha ha" is no fault
LONGEST_LOOP = 400  # characters of what is repeated
PACKED = 0.22  # of the size after compression; prose packs to 0.4 to 0.6 at these lengths
PACKED_FROM = 400  # bytes; shorter texts do not pack
REPEATS = 0.5  # of the answer's 8-word runs stand in what was rewritten before
COPIED = 0.8  # of the answer's 5-word runs stand in the source, or of the source's in the answer
_TAGS = re.compile(r"</?(?:excerpt|passage|rewritten|source)>|<\|[a-z_]+\|>|</?think>")
_PREAMBLE = re.compile(
    r"\A\W*(?:sure|certainly|of course|okay|here(?:'s| is| are)|below is|as an ai"
    r"|as a language model|hier ist|gerne|natürlich|voici|bien sûr|aquí (?:está|tienes)|claro"
    r"|好的|当然|以下是)"
    r"[^.。\n]{0,80}(?:rewrit|rephras|passage|version|text|note|abschnitt|réécri|reescri|pasaje|改写|段落|笔记|[!:：，]\s*\n)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\A\W*(?:i(?:'m| am) sorry|sorry|i can(?:not|'t)|i(?:'m| am) unable|as an ai|es tut mir leid"
    r"|je suis désolé|lo siento|抱歉|对不起|我无法|我不能)",
    re.IGNORECASE,
)


def check_faults(
    answer: str,
    finish_reason: str,
    source: str,
    instructions: str,
    done: str,
    wanted_language: str,
    length_bounds: tuple[float, float],
    may_copy: bool,
) -> list[Verdict]:
    """Return what is wrong with an answer, nothing if it can be judged.

    Args:
        answer: the model's text.
        finish_reason: "stop" where the model ended by itself.
        source: the passage and its excerpt, whose words are no leak.
        instructions: the prompt without the document's text.
        done: what was rewritten before.
        wanted_language: of the answer; "" if not known.
        length_bounds: least and most characters of the answer to those of the passage.
        may_copy: a rewriting may repeat the passage.
    """
    if not answer.strip():
        return [Verdict("empty", False)]
    if finish_reason not in ("stop", "eos", ""):
        return [Verdict("truncated", False, None, f"finish_reason {finish_reason}")]
    if _REFUSAL.search(answer) and not _REFUSAL.search(source):
        return [Verdict("refused", False, None, answer.strip()[:80])]
    passage = source.split("\0", 1)[0]
    found = {
        "leak": _leak(answer, source, instructions),
        "repetition": _repetition(answer, passage),
        "repeats_earlier": _repeats(answer, done, source),
        "language": _language(answer, wanted_language),
        "length": _length(answer, passage, length_bounds),
        "copied": "" if may_copy else _copied(answer, passage),
    }
    return [Verdict(name, False, None, detail) for name, detail in found.items() if detail]


def _leak(answer: str, source: str, instructions: str) -> str:
    for pattern in (_TAGS, _PREAMBLE):
        match = pattern.search(answer)
        if match and match[0] not in source:
            return match[0].strip()[:80]
    size = LEAK_SIGNS if is_han(instructions) else LEAK_WORDS
    shared = _runs(answer, size) & _runs(instructions, size) - _runs(source, size)
    return min(shared) if shared else ""


def _repetition(answer: str, passage: str) -> str:
    loop = _loop(answer)
    if loop and loop * LOOP_TIMES not in passage and re.search(r"\w", loop):
        return f"{loop.strip()[:40]!r} again and again"
    if len(answer.encode()) < PACKED_FROM:
        return ""
    packed, given = _packed(answer), _packed(passage)
    return f"packs to {packed:.2f}" if packed < min(PACKED, 0.7 * given) else ""


def _loop(text: str) -> str:
    """Return what a text repeats several times in a row, "" if nothing."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
    for period in range(1, min(LONGEST_LOOP, codes.size // LOOP_TIMES) + 1):
        same = codes[period:] == codes[:-period]
        needed = max(period * (LOOP_TIMES - 1), LOOP_CHARS)
        if np.count_nonzero(same) < needed:
            continue
        breaks = np.flatnonzero(np.concatenate(([True], ~same, [True])))
        longest = int(np.argmax(np.diff(breaks)))
        if breaks[longest + 1] - breaks[longest] - 1 >= needed:
            start = int(breaks[longest])
            return text[start : start + period]
    return ""


def _packed(text: str) -> float:
    raw = text.encode()
    return len(zlib.compress(raw, 6)) / max(1, len(raw))


def _repeats(answer: str, done: str, source: str) -> str:
    ours = _runs(answer, 8)
    shared = ours & _runs(done, 8) - _runs(source, 8)
    share = len(shared) / max(1, len(ours))
    return f"{share:.0%} of it was written before" if share > REPEATS else ""


def _language(answer: str, wanted: str) -> str:
    found = detect(answer)
    return f"{found}, wanted {wanted}" if found and wanted and found != wanted else ""


def _length(answer: str, passage: str, bounds: tuple[float, float]) -> str:
    ratio = len(answer.strip()) / max(1, len(passage.strip()))
    return "" if bounds[0] <= ratio <= bounds[1] else f"{ratio:.2f} times the passage"


def _copied(answer: str, passage: str) -> str:
    """Say how much of the answer is the passage's, or of the passage stands in the answer."""
    ours, theirs = _runs(answer, 5), _runs(passage, 5)
    sizes = [len(runs) for runs in (ours, theirs) if len(runs) >= 8]  # fewer say little
    share = len(ours & theirs) / min(sizes) if len(ours) >= 8 else 0.0
    return f"{share:.0%} word by word" if share > COPIED else ""


@lru_cache(maxsize=256)  # a prompt's and an excerpt's are asked for again and again
def _runs(text: str, size: int) -> frozenset[str]:
    """Return runs of words, or of signs where there are no spaces, in lower case."""
    signs: Sequence[str] = words(text.lower())
    glue = " "
    if is_han(text):
        signs, glue = re.sub(r"[\W_]+", "", text.lower()), ""
    return frozenset(glue.join(signs[i : i + size]) for i in range(len(signs) - size + 1))
