"""The critic's first lessons: rows for fine-tuning out of preference pairs.

Kimi K2's critic is bootstrapped by SFT on preference data (arXiv 2507.20534, 3.2.2). A pair is a
line ``{"prompt", "chosen", "rejected"}``, as public sets have them; it may label rubrics,
``{"rubrics": {"clarity": "chosen", "no_initial_praise": {"chosen": "pass", "rejected": "fail"}}}``,
and then teaches those. Without labels it teaches the one rubric that it is evidence for, which
answer was preferred. Each pair makes two rows, one an order; the answer is the JSON of
``verdicts.py``. ``tools/preprocess_sft.py`` reads the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.gym.base import Task
from megatron_k2.rl.critic.brief import Brief, Comparison, CriticPrompt, correctness
from megatron_k2.rl.critic.json_lines import numbered_objects
from megatron_k2.rl.critic.pair_tasks import Pair, gold_answer, make_task
from megatron_k2.rl.critic.rubrics import Rubric, RubricBook
from megatron_k2.rl.critic.verdicts import MIRRORED, PairVerdict, Side

PREFERRED = Rubric("preferred", "People who saw both preferred it.", "preference")
_SIDES: dict[str, Side] = {"chosen": "A", "rejected": "B", "tie": "tie"}
_MARKS = {"pass": False, "fail": True}


def preference_rows(
    pair: Mapping[str, Any], prompt: CriticPrompt, book: RubricBook
) -> list[dict[str, Any]]:
    """Return two rows ``{"messages": [...]}`` of a preference pair, one an order.

    Args:
        pair: see the module; ``prompt`` is a text, or messages.
        prompt: the words.
        book: its rubrics that the pair labels are asked about.

    Raises:
        ValueError: a field is missing or empty, both answers are the same, a label is of no rubric
            of the book or none of its kind, or the prompt cannot ask for these rubrics.
    """
    chosen, rejected = _text(pair, "chosen"), _text(pair, "rejected")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same text: neither is better")
    rubrics, verdict = _labelled(pair.get("rubrics") or {}, book)
    brief = Brief(prompt, rubrics)
    one = Comparison(_question(pair.get("prompt")), chosen, rejected)
    return [_row(brief, one, verdict), _row(brief, one.swapped(), mirrored(verdict))]


def pair_rows(
    pairs: Sequence[Pair],
    brief: Brief | None = None,
    pairs_per_row: int = 0,
    seed: str = "sft",
    shows_work: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield rows of pairs whose right answer is known.

    Args:
        pairs: one or more.
        brief: ``correctness()`` by default.
        pairs_per_row: 0: one comparison a row, as a tournament asks; else so many pairs in both
            orders, as ``critic_pairs`` asks.
        seed: of their order.
        shows_work: the right answers stand before the JSON, which may follow thoughts, in the
            prompt's words (``work``): a small model that can solve the task then only compares.
    """
    brief = brief or correctness()
    if not pairs_per_row:
        for pair in pairs:
            one = Comparison(pair.question, pair.right, pair.wrong)
            verdict = PairVerdict("A", {brief.rubrics[0].name: "A"})
            for order, said in ((one, verdict), (one.swapped(), mirrored(verdict))):
                work = f"{brief.work(pair.right, said.better)}\n" if shows_work else ""
                yield _row(brief, order, said, work)
        return
    for start in range(0, len(pairs) - pairs_per_row + 1, pairs_per_row):
        part = pairs[start : start + pairs_per_row]
        task = make_task(part, brief, f"{seed} {start}")
        work = _work(task, part, brief) if shows_work else ""
        answer = {"role": "assistant", "content": work + gold_answer(task)}
        yield {"messages": [*task.messages, answer]}


def _work(task: Task, pairs: Sequence[Pair], brief: Brief) -> str:
    """Return a line a comparison; of a pair's two orders one, where the side is not told."""
    sides = zip(task.metadata["pairs"], task.metadata["expected"], strict=True)
    lines = dict.fromkeys((at, brief.work(pairs[at].right, side)) for at, side in sides)
    return "".join(f"{line}\n" for _, line in lines)


def mirrored(verdict: PairVerdict) -> PairVerdict:
    """Return the verdict of the other order."""
    return PairVerdict(
        MIRRORED[verdict.better],
        {name: MIRRORED[side] for name, side in verdict.weighed.items()},
        {name: (second, first) for name, (first, second) in verdict.failed.items()},
    )


def read_preferences(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, pair) of a JSONL file.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON object.
    """
    yield from numbered_objects(path, "--pairs")


def _labelled(given: Any, book: RubricBook) -> tuple[tuple[Rubric, ...], PairVerdict]:
    if not isinstance(given, Mapping):
        raise ValueError("rubrics: an object of labels is needed")
    known = {one.name: one for one in book.rubrics}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"rubrics: {unknown[0]!r} is none of {', '.join(known)} (--rubrics); a pair without "
            f"labels teaches {PREFERRED.name!r}, which needs none: chosen is the better one"
        )
    if not given:
        return (PREFERRED,), PairVerdict("A", {PREFERRED.name: "A"})
    weighed: dict[str, Side] = {}
    failed: dict[str, tuple[bool, bool]] = {}
    for name, label in given.items():
        try:
            if known[name].mandatory:
                failed[name] = (_MARKS[label["chosen"]], _MARKS[label["rejected"]])
            else:
                weighed[name] = _SIDES[label]
        except (KeyError, TypeError) as error:
            wanted = (
                'mandatory, {"chosen": "pass" or "fail", "rejected": "pass" or "fail"}'
                if known[name].mandatory
                else 'one of "chosen", "rejected", "tie": the answer that is better by it'
            )
            raise ValueError(f"rubrics.{name}: {label!r} is not {wanted}") from error
    rubrics = tuple(one for one in book.rubrics if one.name in given)
    alone = not failed and len(weighed) == 1  # then its side is all that the answer says
    return rubrics, PairVerdict(next(iter(weighed.values())) if alone else "A", weighed, failed)


def _row(brief: Brief, one: Comparison, verdict: PairVerdict, work: str = "") -> dict[str, Any]:
    said = {"role": "assistant", "content": work + brief.write([verdict])}
    return {"messages": [*brief.messages([one]), said]}


def _question(prompt: Any) -> str:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and all(isinstance(one, Mapping) for one in prompt):
        said = [(one.get("role"), str(one.get("content") or "")) for one in prompt]
        if any(content.strip() for _, content in said):
            alone = said[0][1] if len(said) == 1 else ""
            return alone or "\n\n".join(f"{role}: {content}" for role, content in said)
    raise ValueError("prompt: a text or messages with content are needed")


def _text(pair: Mapping[str, Any], key: str) -> str:
    value = pair.get(key)
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")  # some sets repeat the dialogue
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: a text is needed, not {value!r:.40}")
    return value
