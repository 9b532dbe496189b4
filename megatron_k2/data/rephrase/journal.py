"""Which attempts of a part were answered: a checked line each, so that a run resumes per chunk.

The first line names the run that the part belongs to. A line cut by a kill is dropped. Lines reach
the operating system at once and the disk at most a second later: `kill -9` costs the requests under
way, a power cut a second more.
"""

from __future__ import annotations

import time
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
        self._records: dict[str, dict[str, Any]] = {}
        try:
            self._lines = CheckedLines(path)
        except JournalBusy as error:
            raise ValueError(
                f"--output {path.parent.parent}: another run is writing it; wait for it or "
                "give another --output"
            ) from error
        for value in self._lines.before:
            if value.get("run", run) != run:
                self._lines.close()
                raise ValueError(
                    f"{path}: belongs to a run with other input or flags; give another "
                    "--output, or remove it"
                )
            if "key" in value:
                self._records[value.pop("key")] = value
        self._synced_s = time.monotonic()
        if not self._lines.before:
            self._append({"run": run})

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what was recorded under a key."""
        return self._records.get(key)

    def record(self, key: str, value: dict[str, Any]) -> None:
        """Record the outcome of an attempt.

        Raises:
            RuntimeError: there is one already.
        """
        if key in self._records:
            raise RuntimeError(f"{self.path}: {key} was recorded before")
        self._append({"key": key, **value})
        self._records[key] = value

    def spent(self) -> tuple[int, int]:
        """Return the (requests, tokens) of all that is recorded."""
        requests = tokens = 0
        for record in self._records.values():
            judged = [v["tokens"] for v in record["verdicts"] if "tokens" in v]
            requests += 1 + sum(record["troubles"].values()) + len(judged)
            tokens += sum(record["tokens"]) + sum(judged)
        return requests, tokens

    def close(self) -> None:
        """Flush it to the disk and close it."""
        self._lines.close()

    def _append(self, value: dict[str, Any]) -> None:
        now_s = time.monotonic()
        due = now_s - self._synced_s >= SYNC_EVERY_S
        self._lines.append(value, to_disk=due)
        if due:
            self._synced_s = now_s
