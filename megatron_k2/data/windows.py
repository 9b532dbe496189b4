"""The very token windows that Megatron trains on, in the order in which it reads them.

Upstream's GPTDataset cuts the shuffled documents into windows of sequence_length + 1 tokens that
overlap by one, and shuffles the windows. Built here with the same arguments it gives the same
windows, so that an n-gram model can be fitted on exactly the tokens that a model has seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_windows(
    prefix: Path,
    tokenizer_model: Path,
    sequence_length: int,
    seed: int,
    cache: Path,
    count: int | None,
) -> np.ndarray:
    """Return the first `count` windows that a run reads from `prefix.bin`, all when None.

    Args:
        prefix: path without suffix, as in --train-data-path.
        tokenizer_model: sentencepiece model of the run (for its EOD id).
        sequence_length: --seq-length.
        seed: --seed.
        cache: folder for upstream's index files.
        count: number of windows; more than one epoch repeats documents as training does.

    Returns:
        Integer tokens [count, sequence_length + 1], on the host.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(tokenizer_model), metadata_path={"library": "sentencepiece"}
    )
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=tokenizer,
        path_to_cache=str(cache),
        mmap_bin_files=True,
    )
    low_level = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(low_level.document_indices.shape[0] - 1, dtype=np.int32)
    dataset = GPTDataset(low_level, str(prefix), documents, count, Split.train, config)
    windows = np.empty((count or len(dataset), sequence_length + 1), dtype=np.int64)
    for row in range(len(windows)):
        sample = dataset[row]
        windows[row, :-1] = sample["tokens"].numpy()
        windows[row, 1:] = sample["labels"].numpy()
    return windows
