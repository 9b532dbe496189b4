"""What the requests of a part cost and what was answered: a checked line each.

The first line names the run that the part belongs to. A request is written down before it is sent,
at the most that it can cost, and again with what it did cost; an answer as soon as it is there, its
verdicts after it. So `kill -9` loses no answer, and budgets count even the requests that it cut
off. A line cut by a kill is dropped. Lines reach the operating system at once and the disk at most
a second later: a power cut costs that second.
"""

from __future__ import annotations

import time
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.journal import CheckedLines, JournalBusy

SYNC_EVERY_S = 1.0


class Journal:
    """The journal of a part, open for appending and locked for one process.

    Raises:
        ValueError: it belongs to another run, or another process has it.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.troubles: Counter[str] = Counter()  # failed requests by kind
        self._records: dict[str, dict[str, Any]] = {}
        self._requests = self._tokens = 0
        self._sent: dict[int, int] = {}  # requests without an outcome -> the most they can cost
        self._is_open = True
        try:
            self._lines = CheckedLines(path)
        except JournalBusy as error:
            raise ValueError(
                f"--output {path.parent.parent}: another run is writing it; wait for it or "
                "give another --output"
            ) from error
        for value in self._lines.before:
            if value.get("run", run) != run:
                self.close()
                raise ValueError(
                    f"{path}: belongs to a run with other input or flags; give another "
                    "--output, or remove it"
                )
            self._take(value)
        self._synced_s = time.monotonic()
        if not self._lines.before:
            self._append({"run": run})

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what was recorded under a key."""
        return self._records.get(key)

    def record(self, key: str, value: dict[str, Any]) -> None:
        """Record an answer or its verdicts.

        Raises:
            RuntimeError: there is one already.
        """
        if key in self._records:
            raise RuntimeError(f"{self.path}: {key} was recorded before")
        self._append({"key": key, **value})
        self._records[key] = value

    def sent(self, tokens: int) -> int:
        """Note a request before it is sent; return its number.

        Args:
            tokens: the most that it can cost.
        """
        value = {"sent": self._requests, "tokens": tokens}
        self._append(value)
        self._take(value)
        return value["sent"]

    def settled(self, number: int, tokens: int, trouble: str) -> None:
        """Note what a request cost; after `close`, it counts as the most it can.

        Args:
            number: that `sent` gave.
            tokens: spent.
            trouble: why it failed; "" if it was answered.
        """
        if self._is_open:
            value = {"settled": number, "tokens": tokens, "trouble": trouble}
            self._append(value)
            self._take(value)

    def spent(self) -> tuple[int, int]:
        """Return the (requests, tokens) of all starts; unknown outcomes at the most they cost."""
        return self._requests, self._tokens + sum(self._sent.values())

    def close(self) -> None:
        """Flush it to the disk and close it."""
        self._is_open = False
        self._lines.close()

    def _take(self, value: dict[str, Any]) -> None:
        """Count a line, or keep what it records."""
        if "sent" in value:
            self._requests += 1
            self._sent[value["sent"]] = value["tokens"]
        elif "settled" in value:
            self._sent.pop(value["settled"], None)
            self._tokens += value["tokens"]
            if value["trouble"]:
                self.troubles[value["trouble"]] += 1
        elif "key" in value:
            self._records[value.pop("key")] = value

    def _append(self, value: dict[str, Any]) -> None:
        now_s = time.monotonic()
        due = now_s - self._synced_s >= SYNC_EVERY_S
        self._lines.append(value, to_disk=due)
        if due:
            self._synced_s = now_s


@dataclass(frozen=True)
class Attempt:
    """The lines of one attempt at a chunk."""

    journal: Journal
    key: str

    def get(self, name: str) -> dict[str, Any] | None:
        """Return what was recorded of it under a name."""
        return self.journal.get(f"{self.key}.{name}")

    def record(self, name: str, value: dict[str, Any]) -> None:
        """Record something of it."""
        self.journal.record(f"{self.key}.{name}", value)


ATTEMPT: ContextVar[Attempt | None] = ContextVar("ATTEMPT", default=None)
"""What the requests of this task are for: model, judge and embedder write them down there."""
