"""Joins parts in the order of the input: tokens, index, provenance, duplicates left out.

Everything is appended to files of the unfinished output. A commit flushes them and notes their
sizes in the journal; after a kill they are cut back to these, and what comes next is the same.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from megatron_k2.checkpoint.stream.journal import Journal
from megatron_k2.data.preprocess.duplicates import EXACT, KEPT, NEAR, Duplicates
from megatron_k2.data.preprocess.parts import Part, Unit, token_path
from megatron_k2.data.preprocess.provenance import records

_COPY_BYTES = 1 << 20


@dataclass
class Totals:
    """What is counted over all parts merged."""

    num_documents: int = 0
    num_empty: int = 0
    """Documents without a token in any key."""
    num_exact_duplicates: int = 0
    num_near_duplicates: int = 0
    num_bad: int = 0
    num_tokens: list[int] = field(default_factory=list)
    """Of each key."""
    control_texts: dict[str, int] = field(default_factory=dict)
    """Names of control tokens that the input spells out, duplicates included."""


class Merger:
    """The unfinished output.

    Attributes:
        unit: the next to be merged.
        totals: of what was merged.
        crcs: CRC-32 of each key's tokens.
        uncommitted_bytes: of tokens since the last commit.
    """

    def __init__(
        self, folder: Path, parts: Path, dtype: np.dtype, num_keys: int, journal: Journal
    ) -> None:
        self._parts, self._dtype, self._num_keys = parts, dtype, num_keys
        self._journal = journal
        keys = range(num_keys)
        names = [f"{key}.{kind}" for key in keys for kind in ("bin", "lengths", "documents")]
        names += ["provenance", "dropped", "seen"]
        note: dict[str, Any] = journal.note or {}
        self.unit = Unit(*note.get("unit", (0, 0)))
        self.totals = Totals(**note.get("totals", {"num_tokens": [0] * num_keys}))
        self.crcs: list[int] = note.get("crcs", [0] * num_keys)
        self._sequences: list[int] = note.get("sequences", [0] * num_keys)
        self._line_base: int = note.get("line_base", 0)
        sizes = note.get("sizes", {})
        self._files = {name: _cut(folder / name, sizes.get(name, 0)) for name in names}
        self._duplicates = Duplicates()
        self._files["seen"].seek(0)
        self._duplicates.restore(np.frombuffer(self._files["seen"].read(), dtype=np.uint64))
        self.uncommitted_bytes = 0
        self._flushed = {name: file.tell() for name, file in self._files.items()}
        self._num_commits = max(journal.done, default=-1) + 1

    def merge(self, part: Part) -> None:
        """Append the part of ``unit`` and go to the next.

        Raises:
            RuntimeError: its tokens are not what its checksums say.
        """
        verdicts = np.zeros(len(part.places), dtype=np.uint8)
        if len(part.hashes):
            verdicts, keys = self._duplicates.judge(part.hashes, part.bands)
            self._files["seen"].write(keys)
        kept = verdicts == KEPT
        where = records(part.places, self._line_base)
        self._files["provenance"].write(where[kept])
        self._files["dropped"].write(where[~kept])
        for key in range(self._num_keys):
            self._append(key, part, kept)
        self._count(part, verdicts)
        self._line_base += part.report.num_lines
        self.unit = Unit(self.unit.group, self.unit.block + 1)
        if part.report.is_last:
            self.unit, self._line_base = Unit(self.unit.group + 1, 0), 0
        self.uncommitted_bytes += sum(part.report.token_bytes)

    def commit(self) -> None:
        """Put what was merged on the disk, and note it."""
        self._sync()
        self._journal.record(self._num_commits, self.crcs[0], self._note())
        self._num_commits += 1
        self.uncommitted_bytes = 0

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _append(self, key: int, part: Part, kept: np.ndarray) -> None:
        """Append one key's tokens and lengths."""
        per_document, lengths = part.per_document[key], part.lengths[key]
        token_ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        ends = np.cumsum(per_document, dtype=np.int64)
        stops = token_ends[ends]
        starts = token_ends[ends - per_document]
        if not kept.all():
            lengths = lengths[np.repeat(kept, per_document)]
            per_document, starts, stops = per_document[kept], starts[kept], stops[kept]
        self._files[f"{key}.lengths"].write(lengths)
        totals = self._sequences[key] + np.cumsum(per_document, dtype=np.int64)
        self._files[f"{key}.documents"].write(totals)
        self._sequences[key] += int(per_document.sum())
        self.totals.num_tokens[key] += int(lengths.sum(dtype=np.int64))
        self._copy(key, part, _stretches(starts, stops) * self._dtype.itemsize)

    def _copy(self, key: int, part: Part, stretches: np.ndarray) -> None:
        """Copy stretches [any, 2] of a part's bytes; check the whole part on the way."""
        target = self._files[f"{key}.bin"]
        place = crc = 0
        with open(token_path(self._parts, self.unit, key), "rb", buffering=0) as file:
            bounds = [0, *stretches.ravel().tolist(), part.report.token_bytes[key]]
            for number, stop in enumerate(bounds[1:]):
                while place < stop:
                    data = file.read(min(_COPY_BYTES, stop - place))
                    if not data:
                        break
                    crc = crc32(data, crc)
                    place += len(data)
                    if number % 2:  # between the start and the stop of a stretch
                        target.write(data)
                        self.crcs[key] = crc32(data, self.crcs[key])
        if crc != part.report.token_crcs[key]:
            raise RuntimeError(
                f"{file.name}: damaged on the disk; run the same command again, it makes it anew"
            )

    def _count(self, part: Part, verdicts: np.ndarray) -> None:
        totals, kept = self.totals, verdicts == KEPT
        totals.num_documents += int(kept.sum())
        some = np.zeros(len(kept), dtype=bool)
        for per_document in part.per_document:
            some |= per_document > 0
        totals.num_empty += int((kept & ~some).sum())
        totals.num_exact_duplicates += int((verdicts == EXACT).sum())
        totals.num_near_duplicates += int((verdicts == NEAR).sum())
        totals.num_bad += part.report.num_bad
        counts = Counter(totals.control_texts)
        counts.update(part.report.control_texts)
        totals.control_texts = dict(sorted(counts.items()))

    def _sync(self) -> None:
        for name, file in self._files.items():
            file.flush()
            if file.tell() != self._flushed.get(name):
                os.fdatasync(file.fileno())
                self._flushed[name] = file.tell()

    def _note(self) -> dict[str, Any]:
        return {
            "unit": list(self.unit),
            "line_base": self._line_base,
            "sequences": self._sequences,
            "crcs": self.crcs,
            "sizes": {name: file.tell() for name, file in self._files.items()},
            "totals": asdict(self.totals),
        }


def _cut(path: Path, size: int) -> IO[bytes]:
    """Open a file to append after its first ``size`` bytes.

    Raises:
        RuntimeError: it has fewer.
    """
    file = open(path, "a+b")  # noqa: SIM115 - closed by the merger
    if os.fstat(file.fileno()).st_size < size:
        raise RuntimeError(f"{path}: shorter than its journal says; remove {path.parent}")
    file.truncate(size)
    file.seek(size)
    return file


def _stretches(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return [any, 2] of joined neighbours, none empty."""
    some = stops > starts
    starts, stops = starts[some], stops[some]
    if not len(starts):
        return np.empty((0, 2), dtype=np.int64)
    first = np.concatenate([[True], starts[1:] != stops[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([starts[first], stops[last]], axis=1)
