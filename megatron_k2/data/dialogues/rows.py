"""The packed rows on the disk: ``PREFIX_train.bin/.idx`` in Megatron's own format, and two more.

A row is a document of the index and a dialogue in it one of its sequences, so that boundaries need
no file of their own. ``PREFIX_train_learned.bin/.idx`` has the same shape, uint8: 1 where
predicting the token counts. ``PREFIX.json`` has settings, counts and checksums.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.checkpoint.intact import publish_text, record_file
from megatron_k2.data.dialogues.units import unit_path
from megatron_k2.data.preprocess.index_file import write_index

SETS = ("train", "heldout")
LEARNED = "_learned"


class Dialogues:
    """All encoded dialogues of a run, by number, over the units' files.

    Attributes:
        lengths: int64 [dialogues], tokens.
        hashes: uint64 [dialogues], of their ids.
    """

    def __init__(self, folder: Path, num_units: int) -> None:
        lengths, hashes, firsts = [], [], [0]
        for number in range(num_units):
            with np.load(unit_path(folder, number, "index")) as index:
                lengths.append(index["lengths"])
                hashes.append(index["hashes"])
                firsts.append(firsts[-1] + len(index["lengths"]))
        self.lengths, self.hashes = np.concatenate(lengths), np.concatenate(hashes)
        self._folder, self._firsts = folder, np.array(firsts)
        starts = [np.cumsum(one) - one for one in lengths]
        self._starts = np.concatenate(starts)
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a dialogue's ids int32 [n] and what is learned uint8 [n]."""
        unit = int(np.searchsorted(self._firsts, number, side="right")) - 1
        if unit not in self._open:
            tokens, learned = (
                np.load(unit_path(self._folder, unit, part), mmap_mode="r")
                for part in ("tokens", "learned")
            )
            self._open[unit] = tokens, learned
        place = slice(self._starts[number], self._starts[number] + self.lengths[number])
        tokens, learned = self._open[unit]
        return tokens[place], learned[place]

    def learned_tokens(self) -> np.ndarray:
        """Return how many tokens of each dialogue are learned, int64 [dialogues]."""
        found = [int(self[number][1].sum()) for number in range(len(self.lengths))]
        return np.array(found, dtype=np.int64)


def write_rows(
    base: Path, rows: list[list[int]], dialogues: Dialogues, dtype: np.dtype
) -> Iterator[int]:
    """Write rows to ``BASE.bin`` and the like, whole and on the disk; yield after each row.

    Args:
        base: of the names.
        rows: numbers of the dialogues of each.
        dialogues: what the numbers mean.
        dtype: of the ids.
    """
    lengths, ends = base.with_suffix(".lengths"), base.with_suffix(".documents")
    masks = base.with_name(base.name + LEARNED)
    with open(f"{base}.bin", "wb") as tokens, open(f"{masks}.bin", "wb") as learned:
        for done, row in enumerate(rows):
            for number in row:
                ids, mask = dialogues[number]
                tokens.write(ids.astype(dtype))
                learned.write(np.ascontiguousarray(mask))
            yield done
        for file in (tokens, learned):
            file.flush()
            os.fsync(file.fileno())
    order = [number for row in rows for number in row]
    dialogues.lengths[order].astype(np.int32).tofile(lengths)
    np.cumsum([len(row) for row in rows], dtype=np.int64).tofile(ends)
    write_index(Path(f"{base}.idx"), lengths, ends, dtype)
    write_index(Path(f"{masks}.idx"), lengths, ends, np.dtype(np.uint8))
    lengths.unlink()
    ends.unlink()


def publish(folder: Path, prefix: Path, sets: list[str], summary: dict[str, Any]) -> None:
    """Give the files their names, the indexes last, and ``PREFIX.json`` their checksums."""
    names = [f"{one}{kind}" for one in sets for kind in ("", LEARNED)]
    files = [f"{name}.{suffix}" for suffix in ("bin", "idx") for name in names]
    checksums = {f"{prefix.name}_{file}": asdict(record_file(folder / file)) for file in files}
    publish_text(
        Path(f"{prefix}.json"), json.dumps(summary | {"files": checksums}, indent=1) + "\n"
    )
    for file in files:
        os.replace(folder / file, prefix.with_name(f"{prefix.name}_{file}"))
