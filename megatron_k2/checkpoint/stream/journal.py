"""Which units of a conversion are on the disk: one line each, appended after the unit was flushed.

The first line is the plan's fingerprint; a line cut by a kill is dropped. ``kill -9`` therefore
costs at most the units under way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.journal import CheckedLines, JournalBusy

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
        try:
            self._lines = CheckedLines(self.path)
        except JournalBusy as error:
            raise ConversionRefused(f"{folder}: another process is writing there") from error
        for value in self._lines.before:
            if value.get("plan", fingerprint) != fingerprint:
                self._lines.close()
                raise ConversionRefused(
                    f"{folder}: an unfinished conversion of other input or other flags; "
                    "remove it, or run it with the same"
                )
            if "unit" in value:
                self.done[value["unit"]] = value["crc32"]
                self.note = value.get("note") or self.note
        if not self._lines.before:
            self._lines.append({"plan": fingerprint}, to_disk=True)

    def record(self, unit: int, crc32: int, note: dict[str, Any] | None = None) -> None:
        """Note a unit whose bytes are on the disk, and what the caller has to know to go on."""
        value: dict[str, Any] = {"unit": unit, "crc32": crc32}
        self._lines.append(value if note is None else value | {"note": note}, to_disk=True)
        self.done[unit] = crc32
        self.note = note or self.note

    def close(self) -> None:
        """Close it, and let another process have the folder."""
        self._lines.close()
