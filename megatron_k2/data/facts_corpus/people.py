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

POOL_SIZE = 40
FIRST_YEAR, YEARS_APART = 1861, 3  # years 1861 to 1978: as many as other values
PROFESSIONS = (
    "baker barber bookbinder brewer butcher carpenter chemist clockmaker cook dentist doctor driver "
    "farmer fisher gardener glazier goldsmith hatter judge lawyer locksmith mason mechanic miller "
    "miner nurse painter pilot plumber porter potter printer roofer sailor shepherd surgeon tailor "
    "teacher weaver welder"
).split()
INSTRUMENTS = (
    "bagpipe balalaika banjo bassoon bugle celesta cello clarinet clavichord concertina cornet "
    "cymbal drum dulcimer fiddle flute glockenspiel gong guitar harmonica harp harpsichord horn "
    "lute lyre mandolin marimba piano piccolo recorder saxophone sitar tambourine timpani triangle "
    "trombone trumpet tuba violin xylophone"
).split()
FIRST_NAMES = {
    "she": "Alma Bera Clea Dora Edda Fina Greta Hilda Ines Jula Kaia Lena Mara Nora Olga Petra".split(),
    "he": "Arno Boris Carlo Denis Emil Falk Goran Hugo Ivo Jonas Karl Levin Marko Nils Otto Pavel".split(),
}
_ONSETS = "b br d dr f fl g gr h j k kl l m n p pr r s st t tr v w z".split()
_VOWELS = "a e i o u".split()
_CODAS = "l m n r s t ck nd rt lm".split()
FIRM_KINDS = ("Mills", "Works", "Press", "Trust", "Bank", "Lines", "Foundry", "Stores")


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
            "profession": PROFESSIONS,
            "birthplace": towns,
            "birth_year": [str(FIRST_YEAR + YEARS_APART * n) for n in range(POOL_SIZE)],
            "employer": [f"{firm} {FIRM_KINDS[n % 8]}" for n, firm in enumerate(firms)],
            "instrument": INSTRUMENTS,
        }
        self._taken = set(towns) | set(firms)

    def people(self, group: str, count: int) -> list[Person]:
        """Return new people; call it with the groups in one order to get the same ones.

        Args:
            group: a name; people of two groups share no surname.
            count: how many.
        """
        surnames = _words(f"{self.seed} {group}", count, 3, self._taken)
        self._taken |= set(surnames)
        return [self._person(f"{self.seed} {group} {surname}", surname) for surname in surnames]

    def _person(self, key: str, surname: str) -> Person:
        draw = _random(key)
        pronoun = draw.choice(("she", "he"))
        first = draw.choice(FIRST_NAMES[pronoun])
        facts = {attribute: draw.choice(pool) for attribute, pool in self.pools.items()}
        return Person(f"{first} {surname}", pronoun, facts)


def _words(key: str, count: int, syllables: int, taken: set[str] | None = None) -> list[str]:
    """Return so many different invented words with a capital, none of those taken."""
    draw, found = _random(key), dict[str, None]()
    while len(found) < count:
        sounds = [draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(syllables)]
        word = ("".join(sounds) + draw.choice(_CODAS)).capitalize()
        if word not in (taken or ()):
            found[word] = None
    return list(found)


def _random(key: str) -> random.Random:
    return random.Random(hashlib.blake2b(key.encode(), digest_size=8).hexdigest())
