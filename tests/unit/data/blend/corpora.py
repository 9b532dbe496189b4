"""Corpora in which every token is another number, and Megatron's own reading of a blend."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np


def write_corpus(prefix: Path, first: int, num_documents: int, seed: int = 0) -> int:
    """Write documents of 1 to 60 tokens with ids that count on from ``first``; return the next."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = random.Random(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(num_documents):
        length = generator.randrange(1, 61)
        builder.add_document(np.arange(first, first + length), [length])
        first += length
    builder.finalize(f"{prefix}.idx")
    return first


def labels_read(
    words: Sequence[str], num_samples: int, seq_length: int, cache: Path
) -> tuple[list[int], list[int]]:
    """Read the first samples of a blend as Megatron's training does.

    Returns:
        All labels, and the number of samples by dataset.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=seq_length,
        blend=get_blend_from_list(list(words)),
        split="100,0,0",
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(
            vocab_size=1 << 20, eod=-1, pad=-2, unique_identifiers={"class": "numbers"}
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config)
    train = builder.build()[0]
    labels: list[int] = []
    counts = [0] * (len(words) // 2)
    for index in range(num_samples):
        sample = train[index]
        counts[int(sample.get("dataset_id", 0))] += 1
        labels += sample["labels"].tolist()
    return labels, counts
