"""Background text: other people, told in all wordings, from which a model learns the language."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from megatron_k2.data.facts_corpus.people import Person
from megatron_k2.data.facts_corpus.tables import wordings
from megatron_k2.data.facts_corpus.wordings import rewritten_document, source_document


def background_documents(people: Sequence[Person], each: int, seed: int) -> Iterator[str]:
    """Yield documents about people, of each its source document and so many rewritings, all mixed.

    Args:
        people: whom the probe does not ask about.
        each: rewritings of a person.
        seed: of styles, perspectives, wordings and order.
    """
    draw = random.Random(f"background {seed}")
    styles, views = list(wordings()["styles"]), list(wordings()["perspectives"])
    places = [(person, number) for person in people for number in range(each + 1)]
    draw.shuffle(places)
    for person, number in places:
        style, view = draw.choice(styles), draw.choice(views)
        if number == each:
            yield source_document(person)
        else:
            yield rewritten_document(person, style, view, draw.getrandbits(31))
