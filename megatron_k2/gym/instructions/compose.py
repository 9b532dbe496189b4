"""Gold answers to any combination of rules, made of filler words.

A skeleton has what rules ask for literally; then sentences and words are added until all counts
are reached. The rules' own checks have the last word: ``gold`` returns nothing that one denies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from random import Random

from megatron_k2.gym.instructions import measures
from megatron_k2.gym.instructions.filler import Filler
from megatron_k2.gym.instructions.plan import Plan, Unsatisfiable
from megatron_k2.gym.instructions.rule import Instruction
from megatron_k2.gym.instructions.rules import holds, plan_of
from megatron_k2.gym.instructions.skeleton import Line, skeleton

ROUNDS = 60  # of adding what is missing; each adds something, and few need more than ten
NATURAL_WORDS = 5  # of a sentence, where no rule says how long
SPARE_WORDS = 7  # of the longest sentence, for what stands before it: a title, a start phrase
TRIES = 3  # with other filler words


def gold(asked: Sequence[Instruction], seed: int = 0) -> str:
    """Return an answer that follows all instructions.

    Raises:
        Unsatisfiable: none was found, which names what failed.
    """
    failed = ""
    for attempt in range(TRIES):
        text = compose(plan_of(asked), Random(f"{seed}/{attempt}"))
        failed = ", ".join(one.kind for one in asked if not holds(one, text))
        if not failed:
            return text
    raise Unsatisfiable(f"no answer follows {failed} beside the others")


def compose(plan: Plan, rng: Random) -> str:
    """Return a text made to a plan.

    Raises:
        Unsatisfiable: counts cannot be reached.
    """
    filler = Filler(plan, rng)
    page = skeleton(plan, filler)
    slots = [line for part in page for line in part if line.is_open]
    _spread(plan, filler, slots)
    for _ in range(ROUNDS):
        text = render(plan, page, filler)
        if not _add(plan, filler, slots, text):
            return text
    raise Unsatisfiable("the counts cannot be reached together")


def render(plan: Plan, page: Sequence[Sequence[Line]], filler: Filler) -> str:
    """Return a page as text."""
    enders = _enders(plan, filler)
    parts = ["\n".join(line.text(plan, filler, enders) for line in part) for part in page]
    if plan.json_keys:
        first, *others = plan.json_keys
        values = {first: parts[0], **{key: filler.fixed(key) for key in others}}
        return json.dumps(values, ensure_ascii=False)
    text = plan.parts[1].join(parts)
    text = f"{text} {plan.end}" if plan.end else text
    text = {"upper": text.upper(), "lower": text.lower()}.get(plan.case, text)
    return f'"{text}"' if plan.quoted else text


def _enders(plan: Plan, filler: Filler) -> Iterator[str]:
    """Yield what ends each sentence: the marks that are asked for first, then full stops."""
    literal = " ".join((plan.repeat, plan.end, plan.option, plan.start))
    for mark in ("!", "?"):
        wanted = plan.marks[mark].least if mark in plan.marks else 0
        yield from mark * max(0, wanted - literal.count(mark))
    while True:
        yield filler.stop


def _spread(plan: Plan, filler: Filler, slots: Sequence[Line]) -> None:
    """Put the words that must appear into the open lines."""
    literal = " ".join((plan.repeat, plan.end, plan.option, plan.start, *plan.first_words.values()))
    atoms = [filler.highlight() for _ in range(plan.highlights)]
    atoms += [filler.placeholder() for _ in range(plan.placeholders)]
    for term, wanted in plan.terms.items():
        atoms += [term] * max(0, wanted.least - measures.count_word(literal, term))
    for mark in ";:":
        wanted_marks = plan.marks[mark].least if mark in plan.marks else 0
        atoms += [filler.word() + mark for _ in range(wanted_marks - literal.count(mark))]
    for number, atom in enumerate(atoms):
        slots[number % len(slots)].sentences[0].append(atom)


def _add(plan: Plan, filler: Filler, slots: Sequence[Line], text: str) -> bool:
    """Add what a text lacks; return whether anything was."""
    needed = _lacking_sentences(plan, text)
    for _ in range(needed):
        min(slots, key=lambda line: len(line.sentences)).sentences.append([filler.word()])
    if needed:
        return True
    for letter, wanted in plan.letters.items():
        lacking = wanted.least - text.lower().count(letter)
        if lacking > 0:
            _append(plan, slots, filler.with_letter(letter), text)
            return True
    if (shouted := plan.shouted.least - measures.num_shouted(text)) > 0 and not plan.case:
        for _ in range(shouted):
            _append(plan, slots, filler.word().upper(), text)
        return True
    count = len(measures.words(text))
    most = plan.words.most
    if count < plan.words.least:
        _append(plan, slots, filler.word(), text)
        for _ in range(min(plan.words.least - count, 4 * len(slots)) - 1):
            _append(plan, slots, filler.word(), text)
        return True
    short = [one for line in slots for one in line.sentences if len(one) < NATURAL_WORDS]
    if short and (most is None or count + len(short) <= most) and plan.sentence_words is None:
        for one in short:
            one.append(filler.word())
        return True
    return False


def _lacking_sentences(plan: Plan, text: str) -> int:
    """Return how many sentences a text lacks: for their own count, or for the marks that end them.

    Raises:
        Unsatisfiable: it has too many.
    """
    count = len(measures.sentences(text))
    most = plan.sentences.most
    if most is not None and count > most:
        raise Unsatisfiable(f"{count} sentences, of {most} at most")
    lacking = plan.sentences.least - count
    for mark in "!?":
        if mark in plan.marks:
            lacking = max(lacking, plan.marks[mark].least - text.count(mark))
    if plan.initial:
        lacking = max(lacking, 2 - count)
    return max(0, lacking)


def _append(plan: Plan, slots: Sequence[Line], atom: str, text: str) -> None:
    """Append a word to the shortest sentence, or as a new one where all are as long as they may."""
    one = min((one for line in slots for one in line.sentences), key=len)
    longest = (plan.sentence_words or 1000) - SPARE_WORDS
    if len(measures.words(" ".join(one))) < longest:
        one.append(atom)
        return
    if plan.sentences.most is not None and len(measures.sentences(text)) >= plan.sentences.most:
        raise Unsatisfiable("more words than the sentences may have")
    min(slots, key=lambda line: len(line.sentences)).sentences.append([atom])
