"""A journal: lines of JSON, each after its CRC-32, in a file that one process has for itself.

What makes a tool survive ``kill -9``: a unit of work is on a line once it is done, and the next run
reads the lines instead of doing the work again. A line that a kill cut short is dropped, with all
after it. Lines reach the operating system at once, and the disk when ``append`` says so. Where a
file system has no locks, the journal goes without one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import IO, Any


class JournalBusy(ValueError):
    """Another process has the journal."""


class CheckedLines:
    """The lines of a journal, read when it is opened, and open for appending.

    ``before`` are the lines that were there: JSON objects, in their order.

    Raises:
        JournalBusy: another process has it; the message is the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "a+b")  # noqa: SIM115 - open as long as the work is under way
        try:
            self._lock()
            self._stream.seek(0)
            self.before, kept = _whole_lines(self._stream)
            self._stream.truncate(kept)
        except BaseException:
            self._stream.close()
            raise

    def append(self, value: dict[str, Any], to_disk: bool) -> None:
        """Append a line; ``to_disk`` waits until the disk has it and all before it."""
        text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._stream.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._stream.flush()
        if to_disk:
            os.fdatasync(self._stream.fileno())

    def close(self) -> None:
        """Flush it to the disk, close it, and let another process have it."""
        if not self._stream.closed:
            os.fdatasync(self._stream.fileno())
            self._stream.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalBusy(str(self.path)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal, which another process may be writing."""
    with path.open("rb") as stream:
        return _whole_lines(stream)[0]


def _whole_lines(stream: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines of a stream and their bytes."""
    found, kept = [], 0
    for line in stream:
        check, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or check != b"%08x" % zlib.crc32(text):
            break
        found.append(json.loads(text))
        kept += len(line)
    return found, kept
