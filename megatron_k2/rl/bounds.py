"""Bounds of a run file's values: the errors name key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Check a word.

    Raises:
        ValueError: it is not allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")


def above(name: str, value: float, bound: float) -> None:
    """Check that a number is above a bound.

    Raises:
        ValueError: it is not.
    """
    if not value > bound:
        raise ValueError(f"{name} {value} must be above {bound}")


def least(name: str, value: float, bound: float) -> None:
    """Check that a number is a bound or more.

    Raises:
        ValueError: it is not.
    """
    if not value >= bound:
        raise ValueError(f"{name} {value} must be {bound} or more")
