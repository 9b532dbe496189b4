"""The wordings of `wordings.toml`, filled with people: source documents, rewritings, probes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_k2.data.facts_corpus import tables
from megatron_k2.data.facts_corpus.people import Person

_POSSESSIVE = {"she": "her", "he": "his"}
_OBJECT = {"she": "her", "he": "him"}


@dataclass(frozen=True)
class Question:
    """What the probe asks: a prompt, the value that continues it, and all values of its kind."""

    person: str
    attribute: str
    wording: int
    prompt: str
    answer: str
    candidates: tuple[str, ...]


def fill(template: str, person: Person, value: str, named: bool) -> str:
    """Return a sentence about a person.

    Args:
        template: with the slots of `wordings.toml`.
        person: whom it is about.
        value: of the fact.
        named: by name; else by pronouns.
    """
    pronoun, possessive = person.pronoun, _POSSESSIVE[person.pronoun]
    words = {
        "s": person.name if named else pronoun,
        "S": person.name if named else pronoun.capitalize(),
        "p": f"{person.name}'s" if named else possessive,
        "P": f"{person.name}'s" if named else possessive.capitalize(),
        "o": person.name if named else _OBJECT[pronoun],
        "name": person.name,
        "v": value,
    }
    return template.format_map(words)


def source_document(person: Person) -> str:
    """Return the document that tells a person's facts in the one wording of sources."""
    table = tables.wordings()
    facts = [
        fill(table["attributes"][attribute]["source"], person, value, named=number == 0)
        for number, (attribute, value) in enumerate(person.facts.items())
    ]
    frame = {place: fill(text, person, "", named=True) for place, text in table["source"].items()}
    return " ".join([frame["opening"], *facts, frame["closing"]])


def rewritten_document(person: Person, style: str, perspective: str, seed: int) -> str:
    """Return the facts of a person in other words.

    Args:
        person: with the facts to tell, all of them.
        style: of `wordings.toml`; gives the form and the opening.
        perspective: gives the order of facts and how often the person is named.
        seed: draws the wording of each fact, and the order where it is shuffled.
    """
    table, draw = tables.wordings(), random.Random(seed)
    shape, view = table["styles"][style], table["perspectives"][perspective]
    facts = list(person.facts.items())
    if view["order"] == "reversed":
        facts.reverse()
    elif view["order"] == "shuffled":
        draw.shuffle(facts)
    opening = fill(shape["opening"], person, "", named=True)
    parts = [opening] if opening else []
    for number, (attribute, value) in enumerate(facts):
        wording = table["attributes"][attribute]
        named = {"once": not number, "always": True, "turns": number % 2 == 0}[view["naming"]]
        if shape["form"] in ("questions", "dialogue"):
            question = fill(draw.choice(wording["questions"]), person, value, named)
            answer = fill(draw.choice(wording["rewritten"]), person, value, named=False)
            marks = ("Q: ", "A: ") if shape["form"] == "dialogue" else ("", "")
            parts.append(f"{marks[0]}{question}\n{marks[1]}{answer}")
        else:
            parts.append(fill(draw.choice(wording["rewritten"]), person, value, named))
    return (" " if shape["form"] == "sentences" else "\n").join(parts)


def questions(people: Sequence[Person], pools: Mapping[str, Sequence[str]]) -> Iterator[Question]:
    """Yield what the probe asks of people: every fact in each of its wordings.

    Args:
        people: whose facts are asked for.
        pools: attribute -> all values it can have.
    """
    for person in people:
        for attribute, answer in person.facts.items():
            for number, template in enumerate(tables.wordings()["attributes"][attribute]["probe"]):
                prompt = fill(template, person, "", named=True)
                candidates = tuple(pools[attribute])
                yield Question(person.name, attribute, number, prompt, answer, candidates)
