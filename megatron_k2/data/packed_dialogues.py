"""The packed rows of ``tools/preprocess_sft.py`` as a dataset of Megatron's.

A sample is a row: dialogues side by side, each of which sees itself alone and counts its positions
from 0 (``cu_seqlens``), with labels shifted inside it. What is left of the row is a sequence of its
own that nothing is learned from. Every epoch goes through the rows in an order of its own, and
Megatron blends such datasets like any other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_k2.data.dialogues.rows import LEARNED, SETS
from megatron_k2.inputs import UsageError

Weighting = Literal["token", "dialogue"]


@dataclass
class DialogueConfig(GPTDatasetConfig):
    """Megatron's configuration and the weight of a learned token.

    ``token``: 1. ``dialogue``: 1 over the learned tokens of its dialogue, so that every dialogue
    weighs the same.
    """

    weighting: Weighting = "token"


class PackedRows:
    """The two indexed datasets of ``PREFIX``, opened together.

    Raises:
        UsageError: they are not there, or do not belong together.
    """

    def __init__(self, prefix: str) -> None:
        for name in (prefix, prefix + LEARNED):
            if not Path(f"{name}.idx").is_file():
                raise UsageError(
                    f"{name}.idx is not there: dialogues are packed by megatron-k2 preprocess-sft, "
                    "and a data path is its PREFIX_train or PREFIX_heldout"
                )
        self.tokens, self.learned = IndexedDataset(prefix), IndexedDataset(prefix + LEARNED)
        self.bounds = self.tokens.document_indices
        if not np.array_equal(self.bounds, self.learned.document_indices):
            raise UsageError(f"{prefix}{LEARNED}.idx belongs to another {prefix}.idx")
        self.settings = _settings(prefix)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the dialogues of a row: ids [n] and what is learned uint8 [n] of each."""
        places = range(self.bounds[number], self.bounds[number + 1])
        return [(self.tokens[at], self.learned[at]) for at in places]

    def longest_row(self) -> int:
        """Return the places that the fullest row takes."""
        places = self.tokens.sequence_lengths.astype(np.int64) - 1
        return int(np.add.reduceat(places, self.bounds[:-1]).max())


class PackedDialogues(MegatronDataset):
    """Rows in an order of their own each epoch; see ``__getitem__``."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
        """Open the rows of a data path.

        Raises:
            UsageError: there are none, or a row is longer than ``--seq-length``.
        """
        rows = PackedRows(dataset_path)
        if (longest := rows.longest_row()) > config.sequence_length:
            packed = rows.settings.get("seq_length", longest)
            raise UsageError(
                f"--seq-length {config.sequence_length}: {dataset_path} is packed into rows of "
                f"{packed}; give --seq-length {packed}, or pack it anew"
            )
        return rows

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Return the number of rows."""
        return len(low_level_dataset)

    def __len__(self) -> int:
        return self.num_samples if self.num_samples is not None else len(self.indices)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Return a sample.

        Args:
            idx: in the order of training; None is Megatron's padding of a batch, without a loss.

        Returns:
            ``tokens``, ``labels``, ``position_ids`` int64 and ``loss_mask`` fp32, all [seq_length];
            ``cu_seqlens`` int32 [seq_length + 1], filled up with seq_length; ``max_seqlen``.
        """
        epoch, place = divmod(idx or 0, len(self.indices))
        order = _order(self.config.random_seed, epoch, len(self.indices))
        sample = lay_out(
            self.dataset.row(int(self.indices[order[place]])),
            self.config.sequence_length,
            self.config.weighting,
        )
        if idx is None:
            sample["loss_mask"].zero_()
        return sample


def lay_out(
    dialogues: list[tuple[np.ndarray, np.ndarray]], seq_length: int, weighting: Weighting
) -> dict[str, torch.Tensor]:
    """Return the sample of one row; see ``PackedDialogues.__getitem__``.

    Args:
        dialogues: ids [n] and what is learned uint8 [n] of each; they take n - 1 places.
        seq_length: places of the row.
        weighting: of learned tokens.
    """
    tokens, labels, positions = (np.zeros(seq_length, dtype=np.int64) for _ in range(3))
    mask = np.zeros(seq_length, dtype=np.float32)
    bounds = [0]
    for ids, learned in dialogues:
        first, end = bounds[-1], bounds[-1] + len(ids) - 1
        tokens[first:end], labels[first:end] = ids[:-1], ids[1:]
        positions[first:end] = np.arange(len(ids) - 1)
        count = int(learned[1:].sum())
        weight = 1.0 if weighting == "token" or not count else 1.0 / count
        mask[first:end] = learned[1:] * np.float32(weight)
        bounds.append(end)
    if bounds[-1] < seq_length:
        positions[bounds[-1] :] = np.arange(seq_length - bounds[-1])
        bounds.append(seq_length)
    places = np.full(seq_length + 1, seq_length, dtype=np.int32)
    places[: len(bounds)] = bounds
    arrays = {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
        "cu_seqlens": torch.from_numpy(places),
        "max_seqlen": torch.tensor(int(np.diff(bounds).max()), dtype=torch.int32),
    }


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def _settings(prefix: str) -> dict[str, Any]:
    """Return what PREFIX.json says of how the rows were made, nothing if it is gone."""
    for name in SETS:
        path = Path(prefix.removesuffix(f"_{name}") + ".json")
        if prefix.endswith(f"_{name}") and path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            return found["settings"] | {"vocab_size": found["vocab_size"]}
    return {}
