"""Curated text for the PTX loss, as rows in an order that follows from the seed and the step.

K2 mixes an auxiliary language-modelling loss on hand-selected samples into RL's objective, against
forgetting (arXiv 2507.20534, 3.2.3). The data is what the project's tools write: packed dialogues,
of which assistants' tokens count, or documents, of which all do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_k2.data.dialogues.rows import LEARNED
from megatron_k2.data.packed_dialogues import PackedRows
from megatron_k2.inputs import UsageError
from megatron_k2.rl.rows import Row, ptx_row

Sequences = list[tuple[np.ndarray, np.ndarray]]


class PtxRows:
    """Rows of a data prefix.

    Args:
        prefix: of ``tools/preprocess_sft.py`` or ``tools/preprocess_data.py``, without ``.idx``.
        num_rows: a step.
        seq_length: places of a row.
        seed: of the order; each epoch has its own.

    Raises:
        UsageError: no such data, or its rows are longer than ``seq_length``.
    """

    def __init__(self, prefix: str, num_rows: int, seq_length: int, seed: int) -> None:
        self._num_rows, self._seq_length, self._seed = num_rows, seq_length, seed
        self._packed = Path(f"{prefix}{LEARNED}.idx").is_file()
        if self._packed:
            self._rows = PackedRows(prefix)
            if (longest := self._rows.longest_row()) > seq_length:
                raise UsageError(f"--seq-length {seq_length}: rows of [ptx] data have {longest}")
            self._size = len(self._rows)
            return
        if not Path(f"{prefix}.idx").is_file():
            raise UsageError(f"[ptx] data {prefix}: there is no {prefix}.idx")
        self._documents = IndexedDataset(prefix)
        self._size = len(self._documents)

    def step(self, number: int) -> list[Row]:
        """Return the rows of a step; the same whenever they are asked for."""
        first = number * self._num_rows
        return [
            ptx_row(self._sequences(at), self._seq_length)
            for at in range(first, first + self._num_rows)
        ]

    def _sequences(self, at: int) -> Sequences:
        epoch, place = divmod(at, self._size)
        order = np.random.default_rng((self._seed, epoch)).permutation(self._size)
        chosen = int(order[place])
        if self._packed:
            return self._rows.row(chosen)
        ids = np.asarray(self._documents[chosen][: self._seq_length + 1], dtype=np.int64)
        return [(ids, np.ones(len(ids), dtype=np.uint8))]
