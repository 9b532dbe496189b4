"""What a check says of a rewriting: stored with the text that passed, and with what did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_DETAILS = 5  # of what is missing or extra, stored

TOLERATED = 0.15  # of the clauses may be worded too differently: 0 of 6, 2 of a chunk's 17


def beyond_tolerance(found: list[str], total: int) -> list[str]:
    """Return clauses without a counterpart, none if they are so few that wording explains them."""
    return found if len(found) > TOLERATED * total else []


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check; `passed` is None where it did not apply."""

    check: str
    passed: bool | None
    score: float | None = None
    detail: str = ""
    tokens: int = 0  # that a language model took to judge

    @classmethod
    def of_sets(
        cls, check: str, missing: Sequence[str], extra: Sequence[str], total: int
    ) -> Verdict:
        """Return the verdict of a comparison both ways.

        Args:
            check: name.
            missing: what the rewriting lacks.
            extra: what it has and the source has not.
            total: how much the source has; the score is the share that was kept.
        """
        details = [f"missing {x}" for x in missing[:MOST_DETAILS]]
        details += [f"extra {x}" for x in extra[:MOST_DETAILS]]
        kept = 1.0 if total <= 0 else max(0.0, 1 - len(missing) / total)
        return cls(check, not missing and not extra, round(kept, 4), "; ".join(details))

    @classmethod
    def skipped(cls, check: str, why: str) -> Verdict:
        """Return the verdict of a check that does not apply."""
        return cls(check, None, None, why)

    def record(self) -> dict[str, Any]:
        """Return it as JSON values, without what says nothing."""
        found: dict[str, Any] = {"check": self.check, "passed": self.passed}
        if self.score is not None:
            found["score"] = self.score
        if self.detail:
            found["detail"] = self.detail
        if self.tokens:
            found["tokens"] = self.tokens
        return found
