"""Puzzles that Kimi K2 names and reasoning-gym lacks: Morse code, tables, 24, a little science.

Multi-hop reasoning over tables, aggregation across tables and Morse code are of arXiv 2507.20534,
3.2.1; ``science`` adds quantities of physics, chemistry and biology, of which reasoning-gym has
none. All by construction: the answer is computed from what the question shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from megatron_k2.gym.puzzle_numbers import is_solution, twenty_four
from megatron_k2.gym.puzzle_science import science
from megatron_k2.gym.splits import distinct

_CODES = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- "
    ".-- -..- -.-- --.. ----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----."
)
_MORSE = dict(
    zip(
        "abcdefghijklmnopqrstuvwxyz0123456789",
        _CODES.split(),
        strict=True,
    )
)
_WORDS = (
    "anchor amber arrow autumn basket beacon bridge candle canyon castle cellar chapel circle "
    "cloud copper corner cotton cradle desert drum eagle ember engine falcon feather ferry field "
    "forest garden ginger glacier granite harbor harvest hazel hollow island ivory jacket jungle "
    "kettle lantern lemon marble meadow mirror mountain needle north oak ocean orchard palace "
    "pepper pillow planet quarry quiet rabbit raven river saddle salt shadow silver spider stone "
    "summer table thunder timber tower tunnel valley velvet violet wagon walnut willow winter"
)
_SYLLABLES = "ba ka la ma na ra sa ta ve ze bo do lo mo no ri si ti vi lu mu nu ru su"
Entry = dict[str, Any]


def draw(
    rows: Sequence[Mapping[str, Any]], split: str, num_items: int, seed: int
) -> list[list[Entry]]:
    """Return different entries of each row's family; as ``reasoning_worker.draw``."""
    streams = [
        entries(row["generator"], row["parameters"], f"{row['name']} {seed}") for row in rows
    ]
    return [
        distinct(stream, lambda entry: str(entry["question"]), split, num_items)
        for stream in streams
    ]


def score(row: Mapping[str, Any], entry: Mapping[str, Any], answer: str) -> float:
    """Return 1.0 if an answer is right, else 0.0; as ``reasoning_worker.score``."""
    return float(is_right(entry, answer))


def entries(generator: str, parameters: Mapping[str, Any], seed: str) -> Iterator[Entry]:
    """Yield entries of a family without end: ``question``, ``answer``, maybe ``tolerance``.

    Raises:
        ValueError: no such family.
    """
    if generator not in _FAMILIES:
        raise ValueError(f"generator {generator!r} is none of {', '.join(_FAMILIES)}")
    rng = random.Random(seed)
    while True:
        yield _FAMILIES[generator](rng, **parameters)


def is_right(entry: Mapping[str, Any], answer: str) -> bool:
    """Return whether an answer is the entry's.

    Words must be the same but for case and space; with a ``tolerance``, a share of the gold answer,
    the first word must be a number so near it. With ``numbers`` any solution is right.
    """
    if "numbers" in entry:
        return is_solution(entry, answer)
    gold, found = str(entry["answer"]), " ".join(answer.casefold().split())
    if "tolerance" not in entry:
        return found == " ".join(gold.casefold().split())
    try:
        number = float(found.split()[0].replace(",", ""))
    except (ValueError, IndexError):
        return False
    return abs(number - float(gold)) <= entry["tolerance"] * abs(float(gold))


def morse(rng: random.Random, min_words: int = 2, max_words: int = 4) -> Entry:
    """Return a text to be read from, or put into, Morse code."""
    words = rng.sample(_WORDS.split(), rng.randint(min_words, max_words))
    if rng.random() < 0.3:
        words.append(str(rng.randint(10, 9999)))
    code = " / ".join(" ".join(_MORSE[letter] for letter in word) for word in words)
    rule = "Letters are separated by a space, words by ' / '."
    if rng.random() < 0.5:
        return {"question": f"Decode this Morse code. {rule}\n{code}", "answer": " ".join(words)}
    return {"question": f"Write in Morse code. {rule}\n{' '.join(words)}", "answer": code}


def table_hops(rng: random.Random, min_hops: int = 2, max_hops: int = 4, rows: int = 6) -> Entry:
    """Return a question whose answer lies several tables away."""
    kinds = ["employee", "project", "laboratory", "city", "region"]
    start = rng.randint(0, len(kinds) - 1 - min_hops)
    hops = rng.randint(min_hops, min(max_hops, len(kinds) - 1 - start))
    chain = kinds[start : start + hops + 1]
    names = {kind: _names(rng, rows) for kind in chain}
    tables, links = [], []
    for kind, following in pairwise(chain):
        link = {name: rng.choice(names[following]) for name in names[kind]}
        links.append(link)
        lines = [(name, str(rng.randint(1960, 2024)), link[name]) for name in names[kind]]
        rng.shuffle(lines)
        tables.append(_table((kind, "since", following), lines))
    first = answer = rng.choice(names[chain[0]])
    phrase = f"the {chain[0]} {first}"
    for following, link in zip(chain[1:], links, strict=True):
        phrase, answer = f"the {following} of {phrase}", link[answer]
    rng.shuffle(tables)
    return {"question": "\n\n".join([*tables, f"What is {phrase}?"]), "answer": answer}


def cross_tables(rng: random.Random, orders: int = 12) -> Entry:
    """Return a question that adds up rows of one table by columns of two others."""
    products, customers = _names(rng, 5), _names(rng, 5)
    categories, cities = _names(rng, 2), _names(rng, 2)
    price = {name: rng.randint(2, 60) for name in products}
    category = {name: rng.choice(categories) for name in products}
    city = {name: rng.choice(cities) for name in customers}
    sold = [
        (str(number), rng.choice(customers), rng.choice(products), rng.randint(1, 12))
        for number in rng.sample(range(100, 1000), orders)
    ]
    tables = [
        _table(
            ("product", "category", "price"), [(n, category[n], str(price[n])) for n in products]
        ),
        _table(("customer", "city"), [(n, city[n]) for n in customers]),
        _table(("order", "customer", "product", "quantity"), [(*o[:3], str(o[3])) for o in sold]),
    ]
    place, group = rng.choice(cities), rng.choice(categories)
    chosen = [one for one in sold if city[one[1]] == place and category[one[2]] == group]
    where = f"of customers in {place} for products of category {group}"
    if rng.random() < 0.5:
        question = f"What is the value (price times quantity) of all orders {where}?"
        answer = sum(price[one[2]] * one[3] for one in chosen)
    else:
        question = f"What is the sum of the squares of the quantities of all orders {where}?"
        answer = sum(one[3] ** 2 for one in chosen)
    return {"question": "\n\n".join([*tables, question]), "answer": str(answer)}


def _names(rng: random.Random, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        name = "".join(rng.choices(_SYLLABLES.split(), k=3)).capitalize()
        if name not in found:
            found.append(name)
    return found


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_FAMILIES: dict[str, Callable[..., Entry]] = {
    "morse": morse,
    "table_hops": table_hops,
    "cross_tables": cross_tables,
    "twenty_four": twenty_four,
    "science": science,
}
