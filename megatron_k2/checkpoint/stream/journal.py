"""Which units of a conversion are on the disk: one line each, appended after the unit was flushed.

The first line is the plan's fingerprint; a line cut by a kill is dropped. ``kill -9`` therefore
costs at most the units under way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused

NAME = "journal.jsonl"


class Journal:
    """The journal in a folder, open for appending and locked for one process.

    Raises:
        ConversionRefused: it belongs to another plan, or another process has it.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / NAME
        self.done: dict[int, int] = {}  # unit to CRC-32 of its bytes
        self.note: dict[str, Any] | None = None  # of the last unit that has one
        self._stream = open(self.path, "a+b")  # noqa: SIM115 - open as long as the conversion
        try:
            self._lock()
            kept = self._read(fingerprint)
        except BaseException:
            self._stream.close()
            raise
        self._stream.truncate(kept)
        self._stream.seek(kept)
        if not kept:
            self._append({"plan": fingerprint})

    def record(self, unit: int, crc32: int, note: dict[str, Any] | None = None) -> None:
        """Note a unit whose bytes are on the disk, and what the caller has to know to go on."""
        value: dict[str, Any] = {"unit": unit, "crc32": crc32}
        self._append(value if note is None else value | {"note": note})
        self.done[unit] = crc32
        self.note = note or self.note

    def close(self) -> None:
        """Close it, and let another process have the folder."""
        self._stream.close()

    def _lock(self) -> None:
        """Take the folder for this process; where the file system has no locks, go without."""
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionRefused(
                f"{self.path.parent}: another process is writing there"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise

    def _append(self, value: dict[str, object]) -> None:
        text = json.dumps(value)
        self._stream.write(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
        self._stream.flush()
        os.fdatasync(self._stream.fileno())

    def _read(self, fingerprint: str) -> int:
        """Read what is whole; return its bytes.

        Raises:
            ConversionRefused: it belongs to another plan.
        """
        self._stream.seek(0)
        kept = 0
        for line in self._stream.read().splitlines(keepends=True):
            check, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or check != f"{zlib.crc32(text):08x}".encode():
                break
            value = json.loads(text)
            if "plan" in value and value["plan"] != fingerprint:
                raise ConversionRefused(
                    f"{self.path.parent}: an unfinished conversion of other input or other flags; "
                    "remove it, or run it with the same"
                )
            if "unit" in value:
                self.done[value["unit"]] = value["crc32"]
                self.note = value.get("note") or self.note
            kept += len(line)
        return kept
