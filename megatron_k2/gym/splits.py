"""Which split a generated or given problem belongs to: its text decides, nothing else.

One problem in five is ``test``, by a hash of its words. So the splits share no problem whatever
the seeds, the numbers of tasks or the order of a file; a problem that a generator draws again in a
later run stays where it was. Two spellings that differ in case or space alone are one problem.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

SPLITS = ("train", "test")
_ONE_IN = 5  # of generated items a fifth is wanted for tests; more would waste what is hard to draw


def content_hash(text: str) -> str:
    """Return 16 hexadecimal digits of a hash of the words of a text."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()[:16]


def split_of(text: str) -> str:
    """Return the split of the problem with this text."""
    return SPLITS[int(content_hash(text), 16) % _ONE_IN == 0]


def check_split(split: str) -> None:
    """Check a split's name.

    Raises:
        ValueError: it is none of ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} must be {' or '.join(SPLITS)}")


def distinct[Item](
    items: Iterable[Item], text: Callable[[Item], str], split: str, num_items: int | None
) -> list[Item]:
    """Return the first different items of a split.

    Args:
        items: a file's, or a generator's without end.
        text: of the problem.
        split: see ``SPLITS``.
        num_items: so many, or fewer where ``items`` runs dry: after twenty draws an item (and 200)
            a generator has said what it can say. None takes all of a file.

    Raises:
        ValueError: no such split.
    """
    check_split(split)
    found: dict[str, Item] = {}
    for number, item in enumerate(items):
        if num_items is not None and (len(found) >= num_items or number >= 20 * num_items + 200):
            break
        problem = text(item)
        if split_of(problem) == split:
            found.setdefault(content_hash(problem), item)
    return list(found.values())
