"""One assumption about a release, what a folder has instead, and how that is said."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OK, DIFFERS, MISSING = "ok", "differs", "missing"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        area: the file or the kind of files it is about.
        name: what was looked at.
        assumed: what this package takes for granted.
        found: what the folder has.
        status: ``ok``, ``differs``, or ``missing`` where the folder has nothing to look at.
        note: what a difference means, where that is known.
    """

    area: str
    name: str
    assumed: Any
    found: Any
    status: str
    note: str = ""


def compare(area: str, name: str, assumed: Any, found: Any, note: str = "") -> Check:
    """Return a check that is ok where both values are equal; the note is for a difference."""
    status = OK if assumed == found else DIFFERS
    return Check(area, name, assumed, found, status, note if status == DIFFERS else "")


def absent(area: str, name: str, assumed: Any, what: str) -> Check:
    """Return a check that could not be made, because ``what`` is not in the folder."""
    return Check(area, name, assumed, f"{what} is not here", MISSING)


def listed(problems: Iterable[str], limit: int = 3) -> str:
    """Return the first problems in one line and how many more there are."""
    found = list(problems)
    more = f" and {len(found) - limit:,} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def none_of(area: str, name: str, problems: Iterable[str], note: str = "", limit: int = 3) -> Check:
    """Return a check that is ok where there are no problems."""
    return compare(area, name, "none", listed(problems, limit) or "none", note)
