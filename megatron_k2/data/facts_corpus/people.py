"""Invented people and their facts, from a seed: who they are follows from the seed and number.

A fact is a value of one attribute, drawn evenly from a pool of `POOL_SIZE`, so that guessing is
right once in as many times. Names, towns and firms are made of syllables; surnames are unique, and
people of another *group* of the same seed share none.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_k2.data.facts_corpus.tables import pools

POOL_SIZE = 40
FIRST_YEAR, YEARS_APART = 1861, 3  # years 1861 to 1978: as many as other values


@dataclass(frozen=True)
class Person:
    """Somebody invented; `facts` maps an attribute to its value, in the order of documents."""

    name: str
    pronoun: str
    facts: Mapping[str, str]


class World:
    """The pools of values and the people of a seed.

    Args:
        seed: decides all of it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        towns = _words(f"{seed} towns", POOL_SIZE, 2)
        firms = _words(f"{seed} firms", POOL_SIZE, 2, set(towns))
        self.pools: dict[str, list[str]] = {
            "profession": pools()["professions"],
            "birthplace": towns,
            "birth_year": [str(FIRST_YEAR + YEARS_APART * n) for n in range(POOL_SIZE)],
            "employer": firms,
            "instrument": pools()["instruments"],
        }
        self._taken = set(towns) | set(firms)

    def people(self, group: str, count: int) -> list[Person]:
        """Return new people; call it with the groups in one order to get the same ones.

        Args:
            group: a name; people of two groups share no surname.
            count: how many.
        """
        surnames = _words(f"{self.seed} {group}", count, 2, self._taken)
        self._taken |= set(surnames)
        return [self._person(f"{self.seed} {group} {surname}", surname) for surname in surnames]

    def _person(self, key: str, surname: str) -> Person:
        draw = _random(key)
        pronoun = draw.choice(("she", "he"))
        first = draw.choice(pools()["first_names"][pronoun])
        facts = {attribute: draw.choice(pool) for attribute, pool in self.pools.items()}
        return Person(f"{first} {surname}", pronoun, facts)


def _words(key: str, count: int, syllables: int, taken: set[str] | None = None) -> list[str]:
    """Return so many different invented words with a capital, none of those taken."""
    sizes = range(syllables)
    draw, found, parts = _random(key), dict[str, None](), pools()["syllables"]
    while len(found) < count:
        sounds = [draw.choice(parts["onsets"]) + draw.choice(parts["vowels"]) for _ in sizes]
        word = ("".join(sounds) + draw.choice(parts["codas"])).capitalize()
        if word not in (taken or ()):
            found[word] = None
    return list(found)


def _random(key: str) -> random.Random:
    return random.Random(hashlib.blake2b(key.encode(), digest_size=8).hexdigest())
