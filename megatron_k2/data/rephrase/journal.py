"""Which attempts of a part were answered: a checked line each, so that a run resumes per chunk.

The first line names the run that the part belongs to. A line cut by a kill is dropped. Lines reach
the operating system at once and the disk at most a second later: `kill -9` costs the requests under
way, a power cut a second more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

SYNC_EVERY_S = 1.0


class Journal:
    """The journal of a part, open for appending and locked for one process.

    Raises:
        ValueError: it belongs to another run, or another process has it.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self._records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "a+b")  # noqa: SIM115 - open as long as the part is under way
        try:
            self._lock()
            kept = self._read(run)
        except BaseException:
            self._stream.close()
            raise
        self._stream.truncate(kept)
        self._synced_s = time.monotonic()
        if not kept:
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
        if not self._stream.closed:
            os.fdatasync(self._stream.fileno())
            self._stream.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--output {self.path.parent.parent}: another run is writing it; wait for it or "
                "give another --output"
            ) from None
        except OSError as error:  # a file system without locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise

    def _append(self, value: dict[str, Any]) -> None:
        text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._stream.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._stream.flush()
        now_s = time.monotonic()
        if now_s - self._synced_s >= SYNC_EVERY_S:
            os.fdatasync(self._stream.fileno())
            self._synced_s = now_s

    def _read(self, run: str) -> int:
        """Read what is whole; return its bytes."""
        self._stream.seek(0)
        kept = 0
        for line in self._stream:
            check, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or check != b"%08x" % zlib.crc32(text):
                break
            value = json.loads(text)
            if "run" in value and value["run"] != run:
                raise ValueError(
                    f"{self.path}: belongs to a run with other input or flags; give another "
                    "--output, or remove it"
                )
            if "key" in value:
                self._records[value.pop("key")] = value
            kept += len(line)
        return kept
